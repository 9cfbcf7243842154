"""Scores of units: one number for each head, channel, row, column or block, or each entry where a grid is chosen.

| importance | score of a unit u |
| --- | --- |
| random | uniform, from the seed |
| weight | ‖W_u‖₂ |
| activation | Σ over samples of ‖a_u‖₂: of columns the inputs, of rows the outputs, else inputs × outputs |
| product | weight × activation |
| gradient | Σ over samples of ‖∇W_u‖₂ |
| fisher | Σ over samples of ‖∇W_u‖₂² (the empirical Fisher's diagonal, summed over the unit) |
| sylva | Σ over the unit of O_o · I_i, from the mean gradient and hierarchical Kronecker factors (`kfac.py`) |

A sample's gradient is that of its loss, the mean over its labelled tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparseft import __version__, console
from sparseft.distributed import ranks
from sparseft.distributed.shards import any_sharded, gathered
from sparseft.errors import UserError
from sparseft.importance.batching import Share, groups_of
from sparseft.importance.calibration import (
    SCORES,
    STATISTICS,
    Calibration,
    CalibrationState,
    Watch,
    check_samples,
    keep,
)
from sparseft.importance.hooks import Observation
from sparseft.importance.kfac import SUMS, FactorSettings, KroneckerFactors, statistics_bytes, summary
from sparseft.importance.layerwise import LAYERS, Walk, split_by_layer, trial
from sparseft.importance.room import DISK, Room
from sparseft.importance.units import Candidate, generator_for, sum_features, sum_units
from sparseft.kernels.reference import product, to_blocks, token_product
from sparseft.models.decoder import logical_weight

# Tokens, padding included, that go through the model at once where samples may be summed together: on a CPU 512 fill
# the products (256 were 10 % slower, 1,024 as fast), and from a width of a thousand on their activations are less than
# a layer's gradient; an accelerator needs more to be busy. A longer sample goes alone.
TOKENS_TOGETHER, TOKENS_TOGETHER_CUDA = 512, 4096


# Importances that keep sums as large as the model: those that gain by taking a layer at a time.
LARGE = ("sylva",)


def activation_norms(x: Tensor, y: Tensor, candidate: Candidate) -> Tensor:
    """‖a_u‖₂ of each unit over one sample's tokens."""
    inputs, outputs = x.float().square().sum(0), y.float().square().sum(0)
    if candidate.kind == "columns":
        return sum_features(inputs, candidate).double().sqrt()
    if candidate.kind == "rows":
        return sum_features(outputs, candidate).double().sqrt()
    block_in = to_blocks(inputs[None], candidate.unit).sum(-1)[0].double().sqrt()
    block_out = to_blocks(outputs[None], candidate.unit).sum(-1)[0].double().sqrt()
    return (block_out[:, None] * block_in[None, :]).reshape(-1)


def gradient_norms(x: Tensor, gradient: Tensor, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Tensor]]:
    """‖∇W_u‖₂² of each unit of a linear's candidates, float64, from its input (tokens, in) and its output's gradient
    (tokens, out).

    Of columns alone (or rows) no dense gradient is needed: ‖gᵀ x_u‖² = x_uᵀ (g gᵀ) x_u, which is cheaper by a long
    way where there are fewer tokens than features.
    """
    kinds = {c.kind for c in candidates}
    if (
        len(kinds) == 1
        and kinds <= {"rows", "columns"}
        and len(x) * (x.shape[1] + gradient.shape[1]) < x.shape[1] * gradient.shape[1]
    ):
        one, other = (x, gradient) if kinds == {"columns"} else (gradient, x)
        within = product(other, other.t())  # (tokens, tokens)
        side = (within @ one.to(within.dtype)).mul_(one).sum(0).clamp_(min=0)
        for c in candidates:
            yield c, sum_features(side, c).double()
        return
    squares = token_product(gradient, x).square_()  # (out, in): one layer's, freed at the end
    for c in candidates:
        yield c, sum_units(squares, c).double()


class UnitSums:
    """`calibration.Statistics` of the scores that are sums over samples of one number per unit: activation (product),
    gradient and fisher. One sample at a time; float64 on `device`, so that nothing waits for it."""

    def __init__(
        self, importance: str, by_module: Mapping[str, Sequence[Candidate]], device: torch.device | str = "cpu"
    ) -> None:
        self.importance, self.by_module = importance, by_module
        self.totals = {
            c.key: torch.zeros(c.count, dtype=torch.float64, device=device)
            for members in by_module.values()
            for c in members
        }

    def __call__(self, seen: Observation) -> None:
        assert seen.samples == 1  # a sum over samples of norms needs each by itself
        if seen.gradient is None:
            assert seen.y is not None
            for c in self.by_module[seen.name]:
                self.totals[c.key] += activation_norms(seen.x, seen.y, c)
            return
        for c, sums in gradient_norms(seen.x, seen.gradient, self.by_module[seen.name]):
            self.totals[c.key] += sums.sqrt() if self.importance == "gradient" else sums

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The totals by candidate key, live."""
        return dict(self.totals), {}

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Takes over a `state()` of the same candidates."""
        for key, total in self.totals.items():
            total.copy_(tensors[key])

    def reduce(self) -> None:
        """Adds up the totals of all ranks."""
        for total in self.totals.values():
            ranks.all_reduce_sum(total)

    def scores(self) -> dict[str, Tensor]:
        """The totals on the CPU."""
        return {key: total.cpu() for key, total in self.totals.items()}


class Scored(NamedTuple):
    """Scores (units,) in float64 on the CPU by candidate key, and what the statistics say of themselves."""

    scores: dict[str, Tensor]
    facts: dict[str, Any]


def compute_scores(
    model: nn.Module,
    candidates: Sequence[Candidate],
    importance: str,
    *,
    seed: int,
    batches: Iterable[Mapping[str, Any]] | None = None,
    factors: FactorSettings | None = None,
    watch: Watch | None = None,
    by_layer: bool | None = None,
) -> Scored:
    """The scores of all candidates' units.

    With `torch.distributed` initialised, an importance that needs data is a collective call: each rank runs its share
    of the samples and all get the same scores. The model is unchanged afterwards.

    Args:
        batches: dicts as the model takes them, the same on all ranks; needed by all but random and weight.
        factors: the settings of sylva's Kronecker factors.
        watch: of its folder, a call that was interrupted with the same arguments goes on.
        by_layer: whether an importance that needs gradients takes a decoder layer at a time (`layerwise.py`), where the
            model allows it, so that the sums of one layer alone exist; None: where those of all crowd the memory.
    """
    if importance == "random":
        return Scored({c.key: _random(c, seed) for c in candidates}, {})
    weights: dict[str, Tensor] = {}
    if importance in ("weight", "product"):
        for c in candidates:
            module = model.get_submodule(c.module)
            with gathered([module._parameters.get("weight")]):
                weight = logical_weight(module).detach().float()
                weights[c.key] = sum_units(weight.square(), c).double().sqrt().cpu()  # ‖W_u‖₂ of each unit
    if importance == "weight":
        return Scored(weights, {})
    if batches is None:
        raise UserError(f"importance '{importance}' needs calibration batches.")
    if importance not in ("activation", "product", "gradient", "fisher", "sylva"):
        raise UserError(f"importance '{importance}' is unknown.")

    by_module: dict[str, list[Candidate]] = defaultdict(list)
    for c in candidates:
        by_module[c.module].append(c)
    factors, watch = factors or FactorSettings(), watch or Watch()
    device = next(model.parameters()).device
    together = TOKENS_TOGETHER_CUDA if device.type == "cuda" else TOKENS_TOGETHER
    if importance != "sylva" or any_sharded(model):
        together = 0
    own = [asdict(factors), together, SUMS] if importance == "sylva" else None
    units = [(c.key, c.kind, c.shape, c.start, c.unit, c.count) for c in candidates]
    state = CalibrationState(watch.resume, [__version__, importance, seed, own, units], ranks.rank_and_world())
    folder = watch.resume.parent if watch.resume else None
    needed = 0  # bytes of the sums of all layers that count beside the model
    if importance == "sylva":
        needed = statistics_bytes(factors, (members[0].shape for members in by_module.values()))

    def statistics(modules: Mapping[str, Sequence[Candidate]]) -> UnitSums | KroneckerFactors:
        if importance != "sylva":
            return UnitSums(importance, modules, device)
        shapes = {module: members[0].shape for module, members in modules.items()}
        return KroneckerFactors(factors, seed, shapes, device, folder)

    found, gradients = None, importance in ("gradient", "fisher", "sylva")
    if gradients and by_layer is not False:
        crowded = not Room(needed, device, "the summed gradients").in_memory
        begun = state.has(LAYERS) or (crowded and not state.has(STATISTICS))  # what was begun so goes on so
        if by_layer or any(ranks.all_gather_object(begun)):
            batches = list(batches)
            instead = 0 if by_layer else needed
            found = _by_layer(model, by_module, batches, together, statistics, instead, state, watch)
    if found is None:
        sums = statistics(by_module)
        state.expect(needed)
        calibration = Calibration(model, batches, state, watch)
        done = calibration.collect(by_module, sums, gradients=gradients, together=together)
        found = _scored(sums, by_module, state, watch, done=done)
    scores, dampings = found
    scores = {c.key: weights[c.key] * scores[c.key] if weights else scores[c.key] for c in candidates}
    return Scored(scores, {"second_order": summary(dampings, factors.damping)} if importance == "sylva" else {})


Found = tuple[dict[str, Tensor], list[float]]  # scores by candidate key, and every matrix's effective damping


def _by_layer(
    model: nn.Module,
    by_module: Mapping[str, Sequence[Candidate]],
    batches: Sequence[Mapping[str, Any]],
    together: int,
    statistics: Callable[[Mapping[str, Sequence[Candidate]]], UnitSums | KroneckerFactors],
    needed: int,  # bytes of all layers' sums, where they may be kept instead; else 0
    state: CalibrationState,
    watch: Watch,
) -> Found | None:
    """The scores, a decoder layer at a time; None, with a line that says why, where all layers have to be taken at
    once."""
    rank, world = ranks.rank_and_world()
    split = split_by_layer(model, by_module)
    if isinstance(split, str):
        console.log(f"calibration: all layers at once, as {split}")
        return None
    layers, members = split
    first = next(groups_of(model, batches, gradients=True, together=together), None)
    groups = list(groups_of(model, batches, gradients=True, together=together, share=Share(rank, world)))
    count = sum(len(group.samples) for group in groups)
    check_samples(count)
    assert first is not None
    found = ranks.all_gather_object(trial(model, layers, members, first))
    for token_bytes in found:
        if isinstance(token_bytes, str):
            console.log(f"calibration: all layers at once, as {token_bytes}")
            return None
    chosen = [{name: by_module[name] for name in names} for names in members]
    walk = Walk(model, layers, chosen, groups, found[0], state)
    size = f"{walk.room.total_bytes / 2**30:.1f} GiB"
    if needed and any(ranks.all_gather_object(walk.room.place == DISK and walk.room.total_bytes >= needed)):
        console.log(f"calibration: all layers at once, as hidden states ({size}) would take more disk than the sums")
        return None
    console.log(f"calibration: layer by layer; hidden states ({size}) are kept {walk.room.place}")
    return walk.run(statistics, partial(_scored, done=(len(groups), count)), watch)


def _scored(
    sums: UnitSums | KroneckerFactors,
    by_module: Mapping[str, Sequence[Candidate]],
    state: CalibrationState | None = None,
    watch: Watch | None = None,
    *,
    done: tuple[int, int],
) -> Found:
    """What complete statistics come to; with several ranks on each the same."""
    if isinstance(sums, UnitSums):
        return sums.scores(), []
    return score_modules(sums, by_module, state or CalibrationState(None, None), watch or Watch(), done)


def _random(candidate: Candidate, seed: int) -> Tensor:
    generator = generator_for(seed, "random", candidate.key)
    count = sum(candidate.shape) if candidate.kind == "grid" else candidate.count  # its rows and columns are drawn
    return torch.rand(count, generator=generator, dtype=torch.float64)


def score_modules(
    statistics: KroneckerFactors,
    by_module: Mapping[str, Sequence[Candidate]],
    state: CalibrationState,
    watch: Watch,
    done: tuple[int, int],  # (groups, samples) that this rank's statistics have seen
) -> tuple[dict[str, Tensor], list[float]]:
    """Every unit's score and every matrix's effective damping, from statistics that are complete. Each rank scores a
    share of the modules; what an interrupted call has finished is not scored again."""
    rank, world = ranks.rank_and_world()
    scored = watch.scored
    scores: dict[str, Tensor] = {}
    names: list[str] = []
    dampings: list[float] = []
    if (saved := state.load(SCORES)) is not None:
        scores, names, dampings = saved[0], saved[1]["modules"], saved[1]["dampings"]
    sources = dict.fromkeys(statistics.sources.get(name, name) for name in by_module)
    turn = {source: place % world for place, source in enumerate(sources)}
    mine = {name: members for name, members in by_module.items() if turn[statistics.sources.get(name, name)] == rank}

    def keep_scores() -> None:
        if state.folder is not None and names:
            state.save(SCORES, scores, {"modules": names, "dampings": dampings})

    def finished(modules: list[str], found: dict[str, Tensor], raised: list[float]) -> None:
        scores.update(found)
        names.extend(modules)
        dampings.extend(raised)
        if state.due():
            keep_scores()
        if scored is not None:
            scored(len(names), len(mine))

    samples = sum(ranks.all_gather_object(done[1]))
    scored_before = set(names)
    try:
        left = {name: members for name, members in mine.items() if name not in scored_before}
        statistics.score(left, samples, finished)
    except BaseException:
        keep_scores()
        if world == 1:  # with several ranks the sums are reduced by now: no longer this rank's own
            keep(state, statistics, done)
        raise
    every = ranks.all_gather_object((scores, dampings))
    return {key: score for found, _ in every for key, score in found.items()}, [d for _, found in every for d in found]

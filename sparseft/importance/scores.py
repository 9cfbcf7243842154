"""Scores of units: one number for each head, channel, row, column or block.

| importance | score of a unit u |
| --- | --- |
| random | uniform, from the seed |
| weight | ‖W_u‖₂ |
| activation | Σ over samples of ‖a_u‖₂: of columns the inputs, of rows the outputs, of blocks inputs × outputs |
| product | weight × activation |
| gradient | Σ over samples of ‖∇W_u‖₂ |
| fisher | Σ over samples of ‖∇W_u‖₂² (the empirical Fisher's diagonal, summed over the unit) |
| sylva | Σ over the unit of O_o · I_i, from the mean gradient and hierarchical Kronecker factors (`kfac.py`) |

A sample's gradient is that of its loss, the mean over its labelled tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparseft import __version__
from sparseft.distributed import ranks
from sparseft.distributed.zero3 import any_sharded, gathered
from sparseft.errors import UserError
from sparseft.importance.calibration import SCORES, Calibration, CalibrationState, Watch, keep
from sparseft.importance.hooks import Observation
from sparseft.importance.kfac import FactorSettings, KroneckerFactors, summary
from sparseft.importance.units import Candidate, generator_for, sum_features, sum_units
from sparseft.kernels.reference import to_blocks
from sparseft.models.decoder import logical_weight

# Tokens, padding included, that go through the model at once where samples may be summed together: a thousand fill the
# products, and their activations take little beside a model for which memory matters (twice as many were 4 % slower on
# a CPU, half as many as fast). A longer sample goes alone.
TOKENS_TOGETHER = 1024


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


class UnitSums:
    """`calibration.Statistics` of the scores that are sums over samples of one number per unit: activation (product),
    gradient and fisher. One sample at a time; float64 on the CPU."""

    def __init__(self, importance: str, by_module: Mapping[str, Sequence[Candidate]]) -> None:
        self.importance, self.by_module = importance, by_module
        self.totals = {
            c.key: torch.zeros(c.count, dtype=torch.float64) for members in by_module.values() for c in members
        }

    def __call__(self, seen: Observation) -> None:
        assert seen.samples == 1  # a sum over samples of norms needs each by itself
        if seen.gradient is None:
            assert seen.y is not None
            for c in self.by_module[seen.name]:
                self.totals[c.key] += activation_norms(seen.x, seen.y, c).cpu()
            return
        squares = (seen.gradient.float().t() @ seen.x.float()).square_()  # (out, in): one layer's, freed on return
        for c in self.by_module[seen.name]:
            sums = sum_units(squares, c).double().cpu()
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
) -> Scored:
    """The scores of all candidates' units.

    With `torch.distributed` initialised, an importance that needs data is a collective call: each rank runs its share
    of the samples and all get the same scores. The model is unchanged afterwards.

    Args:
        batches: dicts as the model takes them, the same on all ranks; needed by all but random and weight.
        factors: the settings of sylva's Kronecker factors.
        watch: of its folder, a call that was interrupted with the same arguments goes on.
    """
    if importance == "random":
        return Scored({c.key: _random(c, seed) for c in candidates}, {})
    weights: dict[str, Tensor] = {}
    if importance in ("weight", "product"):
        for c in candidates:
            module = model.get_submodule(c.module)
            with gathered([module.weight]):
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
    together = 0 if any_sharded(model) else TOKENS_TOGETHER
    own = [asdict(factors), together] if importance == "sylva" else None
    units = [(c.key, c.kind, c.shape, c.start, c.unit, c.count) for c in candidates]
    state = CalibrationState(watch.resume, [__version__, importance, seed, own, units], ranks.rank_and_world())
    calibration = Calibration(model, batches, state, watch)
    if importance == "sylva":
        shapes = {module: members[0].shape for module, members in by_module.items()}
        device = next(model.parameters()).device
        folder = watch.resume.parent if watch.resume else None
        statistics = KroneckerFactors(factors, seed, shapes, device, folder)
        done = calibration.collect(by_module, statistics, gradients=True, together=together)
        scores, dampings = score_modules(statistics, by_module, calibration, done)
        return Scored({c.key: scores[c.key] for c in candidates}, {"second_order": summary(dampings, factors.damping)})
    sums = UnitSums(importance, by_module)
    calibration.collect(by_module, sums, gradients=importance in ("gradient", "fisher"))
    return Scored({key: weights[key] * total for key, total in sums.totals.items()} if weights else sums.totals, {})


def _random(candidate: Candidate, seed: int) -> Tensor:
    generator = generator_for(seed, "random", candidate.key)
    return torch.rand(candidate.count, generator=generator, dtype=torch.float64)


def score_modules(
    statistics: KroneckerFactors,
    by_module: Mapping[str, Sequence[Candidate]],
    calibration: Calibration,
    done: tuple[int, int],  # (groups, samples) that this rank's statistics have seen
) -> tuple[dict[str, Tensor], list[float]]:
    """Every unit's score and every matrix's effective damping, from statistics that are complete. Each rank scores a
    share of the modules; what an interrupted call has finished is not scored again."""
    rank, world = ranks.rank_and_world()
    state, scored = calibration.state, calibration.watch.scored
    scores: dict[str, Tensor] = {}
    names: list[str] = []
    dampings: list[float] = []
    if (saved := state.load(SCORES)) is not None:
        scores, names, dampings = saved[0], saved[1]["modules"], saved[1]["dampings"]
    sources = list(dict.fromkeys(statistics.sources.get(name, name) for name in by_module))
    mine = {
        name: members
        for name, members in by_module.items()
        if sources.index(statistics.sources.get(name, name)) % world == rank
    }

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

    try:
        statistics.score({name: members for name, members in mine.items() if name not in set(names)}, finished)
    except BaseException:
        keep_scores()
        if world == 1:  # with several ranks the sums are reduced by now: no longer this rank's own
            keep(state, statistics, done)
        raise
    every = ranks.all_gather_object((scores, dampings))
    return {key: score for found, _ in every for key, score in found.items()}, [d for _, found in every for d in found]

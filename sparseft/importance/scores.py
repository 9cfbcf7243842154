"""Scores of units: one number for each head, channel, row, column or block.

| importance | score of a unit u |
| --- | --- |
| random | uniform, from the seed |
| weight | ‖W_u‖₂ |
| activation | Σ over samples of ‖a_u‖₂: of columns the inputs, of rows the outputs, of blocks inputs × outputs |
| product | weight × activation |
| gradient | Σ over samples of ‖∇W_u‖₂ |
| fisher | Σ over samples of ‖∇W_u‖₂² (the empirical Fisher's diagonal, summed over the unit) |
| sylva | Σ over the unit of O_o · I_i, from the mean gradient and hierarchical second moments (`kfac.py`) |

A sample's gradient is that of its loss, the mean over its labelled tokens.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseft import __version__
from sparseft.distributed import ranks
from sparseft.distributed.zero3 import any_sharded, gathered
from sparseft.errors import UserError
from sparseft.importance.calibration import collect, keep
from sparseft.importance.calibration_state import SCORES, Partial
from sparseft.importance.kfac import SecondOrder, SecondOrderStatistics, summary
from sparseft.importance.units import Unitised, sum_features, sum_units
from sparseft.kernels.reference import to_blocks

# Tokens, padding included, that go through the model at once where samples may be summed together: a thousand fill the
# products, and their activations take little beside a model for which memory matters (twice as many were 4 % slower on
# a CPU, half as many as fast). A longer sample goes alone.
TOKENS_TOGETHER = 1024


def weight_norms(weight: Tensor, candidate: Unitised) -> Tensor:
    """‖W_u‖₂ of each unit, in float64, from the logical weight (out, in)."""
    return sum_units(weight.detach().float().square(), candidate).double().sqrt()


def activation_norms(x: Tensor, y: Tensor, candidate: Unitised) -> Tensor:
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
    """`collecting.Statistics` of the scores that are sums over samples of one number per unit: activation (product),
    gradient and fisher. One sample at a time; float64 on the CPU."""

    def __init__(self, importance: str, by_module: Mapping[str, Sequence[Unitised]]) -> None:
        self.importance, self.by_module = importance, by_module
        self.totals = {
            c.key: torch.zeros(c.count, dtype=torch.float64) for members in by_module.values() for c in members
        }

    def starting(self, samples: int) -> None:
        """Shown one sample at a time: a sum over samples of norms needs each by itself."""
        assert samples == 1

    def __call__(self, name: str, x: Tensor, y: Tensor | None, grad: Tensor | None, source: str) -> None:
        if grad is None:
            assert y is not None
            for c in self.by_module[name]:
                self.totals[c.key] += activation_norms(x, y, c).cpu()
            return
        squares = (grad.float().t() @ x.float()).square_()  # (out, in): one layer's, freed on return
        for c in self.by_module[name]:
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


def compute_scores(
    model: nn.Module,
    candidates: Sequence[Unitised],
    importance: str,
    *,
    seed: int,
    batches: Iterable[Mapping[str, Any]] | None,
    generator: Callable[..., torch.Generator],
    progress: Callable[[int], None] | None = None,
    scoring: Callable[[int, int], None] | None = None,
    second_order: SecondOrder | None = None,
    resume: Path | None = None,
    meta: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Scores (units,) in float64 on the CPU, by candidate key.

    With `torch.distributed` initialised, an importance that needs data is a collective call: each rank runs its share
    of the samples and all get the same scores. The model is unchanged afterwards.

    Args:
        candidates: what to score.
        batches: dicts as the model takes them, the same on all ranks; needed by all but random and weight.
        generator: `generator(seed, *names)` gives the random numbers.
        progress: called with the number of samples done; scoring: with (linears scored, linears) of sylva afterwards.
            An exception out of them ends the call with what is done saved in `resume`.
        second_order: the settings of sylva's statistics.
        resume: a folder for unfinished work, from which an interrupted call with the same arguments goes on.
        meta: gets what the statistics have to say about themselves (`second_order`).
    """
    if importance == "random":
        return {
            c.key: torch.rand(c.count, generator=generator(seed, "random", c.key), dtype=torch.float64)
            for c in candidates
        }
    weights: dict[str, Tensor] = {}
    if importance in ("weight", "product"):
        for c in candidates:
            module = model.get_submodule(c.module)
            with gathered([module.weight]):
                weights[c.key] = weight_norms(_logical(module), c).cpu()
    if importance == "weight":
        return weights
    if batches is None:
        raise UserError(f"importance '{importance}' needs calibration batches.")
    if importance not in ("activation", "product", "gradient", "fisher", "sylva"):
        raise UserError(f"importance '{importance}' is unknown.")

    by_module: dict[str, list[Unitised]] = defaultdict(list)
    for c in candidates:
        by_module[c.module].append(c)
    settings = second_order or SecondOrder()
    together = 0 if any_sharded(model) else TOKENS_TOGETHER
    scored = [(c.key, c.kind, c.shape, c.start, c.unit, c.count) for c in candidates]
    key = [
        __version__,
        importance,
        seed,
        [asdict(settings), together] if importance == "sylva" else None,
        scored,
    ]
    partial = Partial(resume, key, ranks.rank_and_world())
    run = functools.partial(collect, model, by_module, batches, partial=partial, progress=progress)
    if importance == "sylva":
        shapes = {module: members[0].shape for module, members in by_module.items()}
        device = next(model.parameters()).device
        statistics = SecondOrderStatistics(settings, seed, shapes, device, resume.parent if resume else None)
        done = run(statistics=statistics, gradients=True, together=together)
        scores, dampings = score_modules(statistics, by_module, partial, done, scoring)
        if meta is not None:
            meta["second_order"] = summary(dampings, settings.damping)
        return {c.key: scores[c.key] for c in candidates}
    sums = UnitSums(importance, by_module)
    run(statistics=sums, gradients=importance in ("gradient", "fisher"))
    return {key: weights[key] * total for key, total in sums.totals.items()} if weights else sums.totals


def score_modules(
    statistics: SecondOrderStatistics,
    by_module: Mapping[str, Sequence[Unitised]],
    partial: Partial,
    done: tuple[int, int],  # (groups, samples) that this rank's statistics have seen
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, Tensor], list[float]]:
    """Every unit's score and every matrix's effective damping, from statistics that are complete. Each rank scores a
    share of the modules; what an interrupted call has finished is not scored again."""
    rank, world = ranks.rank_and_world()
    scores: dict[str, Tensor] = {}
    names: list[str] = []
    dampings: list[float] = []
    if (saved := partial.load(SCORES)) is not None:
        scores, names, dampings = saved[0], saved[1]["modules"], saved[1]["dampings"]
    sources = list(dict.fromkeys(statistics.sources.get(name, name) for name in by_module))
    mine = {
        name: members
        for name, members in by_module.items()
        if sources.index(statistics.sources.get(name, name)) % world == rank
    }

    def keep_scores() -> None:
        if partial.folder is not None and names:
            partial.save(SCORES, scores, {"modules": names, "dampings": dampings})

    def finished(modules: list[str], found: dict[str, Tensor], raised: list[float]) -> None:
        scores.update(found)
        names.extend(modules)
        dampings.extend(raised)
        if partial.due():
            keep_scores()
        if progress is not None:
            progress(len(names), len(mine))

    try:
        statistics.score({name: members for name, members in mine.items() if name not in set(names)}, finished)
    except BaseException:
        keep_scores()
        if world == 1:  # with several ranks the sums are everybody's by now, and must not be counted as this one's
            keep(partial, statistics, done)
        raise
    every = ranks.all_gather_object((scores, dampings))
    return {key: score for found, _ in every for key, score in found.items()}, [d for _, found in every for d in found]


def _logical(module: nn.Module) -> Tensor:
    weight = module.weight.detach()
    return weight.t() if type(module).__name__ == "Conv1D" or getattr(module, "transposed", False) else weight

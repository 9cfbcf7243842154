"""Scores of units: one number for each head, channel, row, column or block.

| importance | score of a unit u |
| --- | --- |
| random | uniform, from the seed |
| weight | ‖W_u‖₂ |
| activation | Σ over samples of ‖a_u‖₂: of columns the inputs, of rows the outputs, of blocks inputs × outputs |
| product | weight × activation |
| gradient | Σ over samples of ‖∇W_u‖₂ |
| fisher | Σ over samples of ‖∇W_u‖₂² (the empirical Fisher's diagonal, summed over the unit) |
| sylva | Σ over the unit of O_o · I_i, from the mean gradient and hierarchical second moments (`second_order.py`) |

A sample's gradient is that of its loss, the mean over its labelled tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.errors import UserError
from sparseft.importance.second_order import SecondOrder, SecondOrderStatistics
from sparseft.importance.statistics import observe
from sparseft.importance.units import Unitised, sum_features, sum_units
from sparseft.kernels.reference import to_blocks


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


def compute_scores(
    model: nn.Module,
    candidates: Sequence[Unitised],
    importance: str,
    *,
    seed: int,
    batches: Iterable[Mapping[str, Any]] | None,
    generator: Callable[..., torch.Generator],
    progress: Callable[[int], None] | None = None,
    second_order: SecondOrder | None = None,
) -> dict[str, Tensor]:
    """Scores (units,) in float64 on the CPU, by candidate key.

    `generator(seed, *names)` gives the random numbers; `batches` (dicts as the model takes them) are needed by every
    importance but random and weight; `second_order` sets the statistics of sylva. The model is unchanged afterwards.
    """
    if importance == "random":
        return {
            c.key: torch.rand(c.count, generator=generator(seed, "random", c.key), dtype=torch.float64)
            for c in candidates
        }
    weights: dict[str, Tensor] = {}
    if importance in ("weight", "product"):
        weights = {c.key: weight_norms(_logical(model.get_submodule(c.module)), c).cpu() for c in candidates}
    if importance == "weight":
        return weights
    if batches is None:
        raise UserError(f"importance '{importance}' needs calibration batches.")

    by_module: dict[str, list[Unitised]] = defaultdict(list)
    for c in candidates:
        by_module[c.module].append(c)
    if importance == "sylva":
        statistics = SecondOrderStatistics(second_order or SecondOrder(), seed)
        observe(model, by_module, batches, statistics, gradients=True, progress=progress)
        return {
            key: score
            for module, members in by_module.items()
            for key, score in statistics.unit_scores(module, members).items()
        }
    if importance not in ("activation", "product", "gradient", "fisher"):
        raise UserError(f"importance '{importance}' is unknown.")
    totals = {c.key: torch.zeros(c.count, dtype=torch.float64) for c in candidates}

    def observer(name: str, x: Tensor, y: Tensor, grad: Tensor | None, source: str) -> None:
        if grad is None:
            for c in by_module[name]:
                totals[c.key] += activation_norms(x, y, c).cpu()
            return
        squares = (grad.float().t() @ x.float()).square()  # (out, in): one layer's, freed on return
        for c in by_module[name]:
            sums = sum_units(squares, c).double().cpu()
            totals[c.key] += sums.sqrt() if importance == "gradient" else sums

    observe(model, by_module, batches, observer, gradients=importance in ("gradient", "fisher"), progress=progress)
    return {key: weights[key] * total for key, total in totals.items()} if importance == "product" else totals


def _logical(module: nn.Module) -> Tensor:
    weight = module.weight.detach()
    return weight.t() if type(module).__name__ == "Conv1D" or getattr(module, "transposed", False) else weight

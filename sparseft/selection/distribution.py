"""What the scores of a selection look like: of each linear and role their quantiles, and where the cut lies.

Nothing is chosen by it: it travels in `selection.json` as `candidates`, and `sparseft report` draws it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparseft.importance.units import Candidate, units_of
from sparseft.selection.selection import Selection

LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)  # of `scores`
KEPT_LEVELS = (0.0, 0.5, 1.0)  # of `kept_scores`: the least is the cut, where the largest are kept


def distributions(
    candidates: Sequence[Candidate], selection: Selection, scores: Mapping[str, Tensor] | None
) -> dict[str, dict[str, Any]]:
    """By linear (and role, `<linear>:<role>`) what competed in it and what was kept; a layer's experts are one linear.

    Each entry: `kind` (rows, columns, blocks), `unit` (features of a unit, or the block size), `start` (first feature),
    `units` and `kept` (how many). With `scores` ((units,) by `Candidate.key`) also `scores` and `kept_scores`, their
    quantiles at `LEVELS` and `KEPT_LEVELS`, and `kept_share`, what the kept ones have of the sum of all scores (None
    where that is 0). Random scores say nothing: give None.
    """
    groups: dict[str, list[Candidate]] = defaultdict(list)
    for c in candidates:
        groups[_without_experts(c.module) + (f":{c.role}" if c.role else "")].append(c)
    described = {}
    for name, members in groups.items():
        first = members[0]
        kept = {c.key: _kept(c, selection) for c in members}
        described[name] = {
            "kind": first.kind,
            "unit": first.unit,
            "start": first.start,
            "units": sum(c.count for c in members),
            "kept": sum(map(len, kept.values())),
        }
        if scores is not None:
            every = torch.cat([scores[c.key].detach().double().cpu() for c in members])
            own = torch.cat([scores[c.key].detach().double().cpu()[kept[c.key]] for c in members])
            total = float(every.sum())
            described[name] |= {
                "scores": quantiles(every, LEVELS),
                "kept_scores": quantiles(own, KEPT_LEVELS),
                "kept_share": _rounded(float(own.sum()) / total) if total > 0 else None,
            }
    return described


def quantiles(values: Tensor, levels: Sequence[float]) -> list[float]:
    """Values that are there, nearest to each level, none of none: `torch.quantile` refuses more than 16 million."""
    if not len(values):
        return []
    ranked = values.sort().values
    return [_rounded(float(ranked[round(level * (len(ranked) - 1))])) for level in levels]


def _rounded(value: float) -> float:
    """Six digits: enough to draw, half the file."""
    return float(f"{value:.6g}")


def _kept(candidate: Candidate, selection: Selection) -> Tensor:
    index = selection.modules.get(candidate.module, {}).get(candidate.kind)
    return torch.zeros(0, dtype=torch.int64) if index is None else units_of(candidate, index)


def _without_experts(module: str) -> str:
    """`layers.3.mlp.experts.7.w1` -> `layers.3.mlp.experts.w1`: the first number is the layer's."""
    layer = re.search(r"(?:^|\.)\d+(?=\.|$)", module)
    if layer is None:
        return module
    return module[: layer.end()] + re.sub(r"\.\d+(?=\.|$)", "", module[layer.end() :])

"""`allocation=flops`: the units that bring the most importance for what a step with them costs.

Each trained weight costs its own gradient, wherever it is. What differs is how far back the gradient has to flow:
through all that stands above the lowest trained linear. So of every place where it might end, the choice is the best
units at or above it, as many of each role as the budget has; and of these choices the one with the largest

    importance kept ÷ FLOPs of a step

is taken. Importance kept is the sum of a choice's scores, as a share of what the best units of all layers have; of
several roles, whose scores do not compare, the mean by their trained weights. No choice of that many units has a
larger one. Where scores say nothing (importance random) every choice keeps all, so that the cheapest is taken: the
budget fills the model from its top.

FLOPs are those of `models.step_cost` without attention, which depends on the length of sequences, and with the logits
of all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparseft.importance.units import unit_index
from sparseft.kernels.reference import trainable_entries
from sparseft.models.spec import ModelSpec
from sparseft.models.step_cost import Place, StepCost, Trained
from sparseft.selection.max_rank import within
from sparseft.selection.pool import Pool


@dataclass(frozen=True)
class _Choice:
    """The best units at or above a place, by pool."""

    lowest: Place
    pools: list[Pool]
    importance: list[float]  # of each pool's
    weights: list[int]
    flops: float


def worthwhile(
    pools: list[Pool], scores: Mapping[str, Tensor] | None, spec: ModelSpec, max_rank: int | None
) -> tuple[list[Pool], dict[str, Any]]:
    """The pools without the units below the place where the gradient had best end, and facts of that choice.

    scores: (units,) by `Candidate.key`; None: they say nothing. Facts: `layer` (where the gradient ends), `kept`
    (importance, a share) and `cost` (FLOPs of a step, ÷ those with the best units of all layers).
    """
    cost = StepCost(spec)
    places = sorted({cost.place_of(c.module) for pool in pools for c in pool.members})
    choices: list[_Choice] = []
    for place in places:  # from below: the higher, the fewer units there are
        choice = _choice(place, pools, scores, cost, max_rank)
        if choices and any(
            len(now.ranked) < min(then.total, len(then.ranked))
            for now, then in zip(choice.pools, choices[0].pools, strict=True)
        ):
            break
        choices.append(choice)
    best = choices[0]
    worth = [_kept(choice, best) / choice.flops for choice in choices]
    found = choices[max(range(len(choices)), key=lambda number: (worth[number], number))]
    facts = {"layer": found.lowest[0], "kept": _kept(found, best), "cost": found.flops / best.flops}
    return found.pools, facts


def _choice(
    place: Place, pools: list[Pool], scores: Mapping[str, Tensor] | None, cost: StepCost, max_rank: int | None
) -> _Choice:
    limited = []
    for pool in pools:
        above = [torch.full((c.count,), cost.place_of(c.module) >= place) for c in pool.members]
        limited.append(replace(pool, ranked=pool.ranked[torch.cat(above)[pool.ranked]]))
    if max_rank is not None:
        limited = within(limited, max_rank)
    trained: dict[str, int] = {}
    importance, weights = [], []
    for pool in limited:
        kept, own = 0.0, 0
        best = pool.best()
        for c in pool.members:
            if len(units := best[c.key]):
                entries = trainable_entries(c.kind, unit_index(c, units), c.shape, c.unit)
                trained[c.module] = trained.get(c.module, 0) + entries
                own += entries
                kept += 0.0 if scores is None else float(scores[c.key].detach().double().cpu()[units].sum())
        importance.append(kept)
        weights.append(own)
    return _Choice(place, limited, importance, weights, cost.step(Trained(trained)))


def _kept(choice: _Choice, best: _Choice) -> float:
    shares = [own / most if most > 0 else 1.0 for own, most in zip(choice.importance, best.importance, strict=True)]
    return sum(s * w for s, w in zip(shares, best.weights, strict=True)) / max(1, sum(best.weights))

"""Scores to indices: which units are kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparseft.importance.units import Candidate, generator_for, unit_index
from sparseft.models.spec import ModelSpec
from sparseft.selection.budget import Budget
from sparseft.selection.grids import chosen_grid, random_grid
from sparseft.selection.max_rank import within
from sparseft.selection.pool import Pool
from sparseft.selection.ranking import rank_units
from sparseft.selection.selection import Selection
from sparseft.selection.worth import worthwhile


def choose(
    budget: Budget,
    scores: Mapping[str, Tensor],
    *,
    order: str,
    allocation: str,
    seed: int,
    max_rank: int | None = None,
    spec: ModelSpec | None = None,
    drawn: bool = False,
) -> Selection:
    """The selection that spends `budget` on the units with the best `scores` ((units,) by `Candidate.key`).

    max_rank: the most that any weight may need in an exact low-rank form. Where less than the budget finds a place, the
    selection's meta says how much: `placed`, (units chosen, units asked for). spec: the model's, for `allocation=flops`
    alone, whose facts are in the meta (`flops`, by `worth.worthwhile`). drawn: the scores say nothing.
    """
    if budget.grids:
        found = {c.module: {c.kind: _grid(c, budget, scores[c.key], order, seed, drawn)} for c in budget.candidates}
        return Selection(found)
    pools = []
    meta: dict[str, Any] = {}
    if allocation == "per_layer":
        for c in budget.candidates:
            ranked = rank_units(scores[c.key], order, generator_for(seed, "choose", c.key))
            pools.append(Pool([c], budget.per_candidate[c.key], 0, _free(ranked, budget, [c])))
    else:
        groups: dict[str, list[Candidate]] = defaultdict(list)
        for c in budget.candidates:
            groups[c.role or ""].append(c)
        for role, members in groups.items():
            generator = generator_for(seed, "choose", "global", role)
            ranked = rank_units(torch.cat([scores[c.key].cpu() for c in members]), order, generator)
            minimum = budget.minimum if allocation == "global" else 0
            pools.append(Pool(members, budget.pooled[role], minimum, _free(ranked, budget, members)))
    if allocation == "flops":
        assert spec is not None
        pools, meta["flops"] = worthwhile(pools, None if drawn else scores, spec, max_rank)
    if max_rank is not None:
        pools = within(pools, max_rank)
    kept = {key: units for pool in pools for key, units in pool.best().items()}
    modules: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for c in budget.candidates:
        units = kept[c.key]
        if len(units):
            modules[c.module][c.kind].append(unit_index(c, units))
    joined = {
        module: {
            kind: torch.cat(parts).sort().values if kind != "blocks" else parts[0] for kind, parts in kinds.items()
        }
        for module, kinds in modules.items()
    }
    placed, asked = sum(map(len, kept.values())), sum(pool.total for pool in pools)
    if max_rank is not None and placed < asked:
        meta["placed"] = [placed, asked]
    return Selection(joined, block_size=budget.block_size, meta=meta)


def _grid(c: Candidate, budget: Budget, scores: Tensor, order: str, seed: int, drawn: bool) -> Tensor:
    """The grid that a candidate keeps, by the scores of its entries."""
    size = budget.grids[c.key]
    if drawn:
        return random_grid(scores, c.shape, size)
    return chosen_grid(scores.detach().double().view(c.shape), size, order, generator_for(seed, "choose", c.key))


def _free(ranked: Tensor, budget: Budget, members: list[Candidate]) -> Tensor:
    """A ranking of all members' units without those that are not to be chosen."""
    if not budget.taken:
        return ranked
    return ranked[~torch.cat([budget.taken[c.key] for c in members])[ranked]]

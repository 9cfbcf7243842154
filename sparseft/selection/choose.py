"""Scores to indices: which units are kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from sparseft.errors import RunError
from sparseft.importance.units import Candidate, generator_for, unit_index
from sparseft.selection.budget import Budget
from sparseft.selection.selection import Selection


def rank_units(scores: Tensor, order: str, generator: torch.Generator) -> Tensor:
    """All units, the best first: ties broken by index; `sampled` draws without replacement, in proportion."""
    scores = scores.detach().double().cpu()
    if not torch.isfinite(scores).all():
        raise RunError("an importance score is not finite: the model's weights or activations overflow.")
    if order == "largest":
        return torch.argsort(scores, descending=True, stable=True)
    if order == "smallest":
        return torch.argsort(scores, stable=True)
    # Gumbel top-k: log(score) + noise ranks as successive draws in proportion to the score do.
    uniform = torch.rand(len(scores), generator=generator, dtype=torch.float64).clamp_min(1e-300)
    noise = -torch.log(-torch.log(uniform))
    # Scores of 0 come last, in random order: by index, re-selection would draw the same ones each time.
    keys = torch.where(scores > 0, torch.log(scores), -1e6) + noise
    return torch.argsort(keys, descending=True, stable=True)


def choose(budget: Budget, scores: Mapping[str, Tensor], *, order: str, allocation: str, seed: int) -> Selection:
    """The selection that spends `budget` on the units with the best `scores` ((units,) by `Candidate.key`)."""
    kept: dict[str, Tensor] = {}
    if allocation == "per_layer":
        for c in budget.candidates:
            ranked = rank_units(scores[c.key], order, generator_for(seed, "choose", c.key))
            kept[c.key] = _taken_last(ranked, budget, [c])[: budget.per_candidate[c.key]]
    else:
        groups: dict[str, list[Candidate]] = defaultdict(list)
        for c in budget.candidates:
            groups[c.role or ""].append(c)
        for role, members in groups.items():
            generator = generator_for(seed, "choose", "global", role)
            ranked = rank_units(torch.cat([scores[c.key].cpu() for c in members]), order, generator)
            ranked = _taken_last(ranked, budget, members)
            minimum = {c.key: min(budget.minimum, _left(c, budget)) for c in members}
            kept |= _best_together(ranked, members, budget.pooled[role], minimum)
    modules: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for c in budget.candidates:
        units = kept[c.key].sort().values
        if len(units):
            modules[c.module][c.kind].append(unit_index(c, units))
    joined = {
        module: {
            kind: torch.cat(parts).sort().values if kind != "blocks" else parts[0] for kind, parts in kinds.items()
        }
        for module, kinds in modules.items()
    }
    return Selection(joined, block_size=budget.block_size)


def _left(candidate: Candidate, budget: Budget) -> int:
    """How many of a candidate's units may be chosen."""
    taken = budget.taken.get(candidate.key)
    return candidate.count - (int(taken.sum()) if taken is not None else 0)


def _taken_last(ranked: Tensor, budget: Budget, members: list[Candidate]) -> Tensor:
    """A ranking of all members' units, those that are not to be chosen at its end."""
    if not budget.taken:
        return ranked
    last = torch.cat([budget.taken[c.key] for c in members])[ranked]
    return torch.cat([ranked[~last], ranked[last]])


def _best_together(
    ranked: Tensor, members: list[Candidate], total: int, minimum: Mapping[str, int]
) -> dict[str, Tensor]:
    """The first `total` units of a ranking of all members' units, each member keeping at least its `minimum`."""
    offsets, position = {}, 0
    for c in members:
        offsets[c.key] = position
        position += c.count
    rank = torch.empty_like(ranked)
    rank[ranked] = torch.arange(len(ranked))
    first = []
    for c in members:
        own = rank[offsets[c.key] : offsets[c.key] + c.count]
        first.append(own.argsort()[: minimum[c.key]] + offsets[c.key])
    forced = torch.cat(first)
    is_forced = torch.zeros(len(ranked), dtype=torch.bool)
    is_forced[forced] = True
    rest = ranked[~is_forced[ranked]][: max(0, total - len(forced))]
    taken = torch.cat([forced, rest])
    return {
        c.key: taken[(taken >= offsets[c.key]) & (taken < offsets[c.key] + c.count)] - offsets[c.key] for c in members
    }

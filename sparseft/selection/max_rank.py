"""`method.max_rank`: which units may be chosen so that an exact low-rank form of every weight stays within a rank."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch
from torch import Tensor

from sparseft.errors import UserError
from sparseft.importance.units import Candidate, unit_index
from sparseft.selection.budget import Budget
from sparseft.selection.cover import cover, extents, needed_rank
from sparseft.selection.pool import Pool


def check_units(budget: Budget, max_rank: int | None) -> None:
    """Refuses a cap that not one unit of some candidate fits in."""
    if max_rank is None:
        return
    needs = [(min(c.unit, *c.shape), c) for c in budget.candidates]
    most, widest = max(needs, key=lambda need: need[0], default=(0, None))
    if widest is not None and most > max_rank:
        what = "block" if widest.kind == "blocks" else "head"
        raise UserError(
            f"method.max_rank={max_rank}: one {what} of {widest.module} alone needs rank {most}; use "
            f"method.max_rank={most} or more."
        )


def within(pools: list[Pool], max_rank: int) -> list[Pool]:
    """The pools without the units that would take some weight above `max_rank`; as they are where their best fit.

    Whatever is chosen of the pools that are returned needs at most `max_rank` in each weight: what is cut in one of
    them goes to the next best in others of its pool.
    """
    best = {key: units for pool in pools for key, units in pool.best().items()}
    modules: dict[str, list[Candidate]] = defaultdict(list)
    for pool in pools:
        for c in pool.members:
            modules[c.module].append(c)
    if all(_need(members, best) <= max_rank for members in modules.values()):
        return pools
    if pools[0].members[0].kind != "blocks":
        return _features(pools, max_rank)
    limited = []
    for pool in pools:
        places = pool.standing()
        standing, free = pool.split(places), pool.split(places < len(pool.ranked))
        allowed = torch.cat([_blocks(c, free[c.key], standing[c.key], best[c.key], max_rank) for c in pool.members])
        if allowed[pool.ranked].sum() < pool.total:
            allowed = torch.cat([_blocks(c, free[c.key], None, best[c.key], max_rank) for c in pool.members])
        limited.append(replace(pool, ranked=pool.ranked[allowed[pool.ranked]]))
    return limited


def _need(members: list[Candidate], units: dict[str, Tensor]) -> int:
    """The rank that one weight's units need."""
    kinds: dict[str, list[Tensor]] = defaultdict(list)
    for c in members:
        kinds[c.kind].append(unit_index(c, units[c.key]))
    return needed_rank({kind: torch.cat(parts) for kind, parts in kinds.items()}, members[0].shape, members[0].unit)


def _features(pools: list[Pool], max_rank: int) -> list[Pool]:
    """The pools with the heads and channels that are taken: down all rankings at once, each whose weight has room.

    A unit's turn comes by the share of its pool that stands before it, so that roles in one weight are cut alike.
    """
    room = {
        c.module: max_rank if max_rank < min(c.shape) else c.shape[0] + c.shape[1] for p in pools for c in p.members
    }
    orders, turns, wanted = [], [], []
    for pool in pools:
        order, taken = pool.order()
        orders.append(order)
        turns.append(torch.arange(len(order)).double() / max(1, taken))
        wanted.append(taken)
    whose = torch.cat([torch.full((len(order),), number) for number, order in enumerate(orders)])
    sequence = torch.cat(turns).argsort(stable=True)
    kept: list[list[int]] = [[] for _ in pools]
    owners = [[c for c in pool.members for _ in range(c.count)] for pool in pools]
    for number, unit in zip(whose[sequence].tolist(), torch.cat(orders)[sequence].tolist(), strict=True):
        c = owners[number][unit]
        if len(kept[number]) < wanted[number] and room[c.module] >= c.unit:
            kept[number].append(unit)
            room[c.module] -= c.unit
    return [
        replace(pool, ranked=torch.tensor(units, dtype=torch.int64)) for pool, units in zip(pools, kept, strict=True)
    ]


def _blocks(c: Candidate, free: Tensor, standing: Tensor | None, best: Tensor, max_rank: int) -> Tensor:
    """Which blocks (count,) lie in the block rows and columns that are to hold all that trains.

    These are a cover of `best`, where one fits, and then one by one the row or column with the most in it for its
    height or width. A block counts the more the better it stands, also beyond those that are taken, since the lines are
    filled up with such; where standing is None all blocks count alike, which makes the most room. Those that are not
    `free` (count,) count nothing.
    """
    if max_rank >= min(c.shape):
        return torch.ones(c.count, dtype=torch.bool)
    high, wide = (-(-side // c.unit) for side in c.shape)
    values = torch.ones(c.count, dtype=torch.float64)
    if standing is not None:
        values[standing.argsort(stable=True)] = (1.0 + torch.arange(c.count) / max(1, len(best))).double() ** -2
    values = values.masked_fill(~free, 0.0).view(high, wide)
    sizes = torch.cat([extents(torch.arange(n), side, c.unit) for n, side in zip((high, wide), c.shape, strict=True)])
    taken = torch.zeros(high + wide, dtype=torch.bool)  # block rows, then block columns
    rows, columns = cover(unit_index(c, best), c.shape, c.unit)
    least = torch.cat([rows, columns + high])
    if sizes[least].sum() <= max_rank:
        taken[least] = True
    while True:
        left = max_rank - sizes[taken].sum()
        open_values = values.masked_fill(taken[:high, None], 0.0).masked_fill(taken[high:], 0.0)
        gains = torch.cat([open_values.sum(1), open_values.sum(0)]) / sizes
        gains[taken | (sizes > left)] = 0.0
        line = int(gains.argmax())
        if gains[line] <= 0.0:
            return (taken[:high, None] | taken[high:]).flatten()
        taken[line] = True

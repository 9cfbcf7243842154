"""Units that compete for one budget, ranked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseft.importance.units import Candidate


@dataclass(frozen=True)
class Pool:
    """Candidates whose units compete: `total` of them are kept, of each candidate at least `minimum`.

    ranked: the units that may be chosen, the best first, each by its place among all units of all members in turn.
    """

    members: list[Candidate]
    total: int
    minimum: int
    ranked: Tensor

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """What belongs to each member of a value for each unit, by `Candidate.key`."""
        parts = values.split([c.count for c in self.members])
        return {c.key: part for c, part in zip(self.members, parts, strict=True)}

    def standing(self) -> Tensor:
        """The place of each unit in `ranked`; those that are not in it come behind all others."""
        places = torch.full((sum(c.count for c in self.members),), len(self.ranked))
        places[self.ranked] = torch.arange(len(self.ranked))
        return places

    def order(self) -> tuple[Tensor, int]:
        """The units as they are taken, those that each member keeps in any case first; and how many are taken."""
        first = torch.zeros(sum(c.count for c in self.members), dtype=torch.bool)
        if self.minimum:
            own = self.split(first)  # views: what is marked in them is marked in `first`
            for key, places in self.split(self.standing()).items():
                best = places.argsort()[: self.minimum]
                own[key][best[places[best] < len(self.ranked)]] = True
        forced = first[self.ranked]
        taken = min(len(self.ranked), max(self.total, int(forced.sum())))
        return torch.cat([self.ranked[forced], self.ranked[~forced]]), taken

    def best(self) -> dict[str, Tensor]:
        """Which units of each member are kept, sorted, by `Candidate.key`; fewer than `total` where no more may be."""
        order, taken = self.order()
        chosen = torch.zeros(sum(c.count for c in self.members), dtype=torch.bool)
        chosen[order[:taken]] = True
        return {key: own.nonzero().flatten() for key, own in self.split(chosen).items()}

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

    @property
    def count(self) -> int:
        """Units of all members."""
        return sum(c.count for c in self.members)

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """What belongs to each member of a value for each unit (count,), by `Candidate.key`."""
        parts = values.split([c.count for c in self.members])
        return {c.key: part for c, part in zip(self.members, parts, strict=True)}

    def standing(self) -> Tensor:
        """The place of each unit in `ranked` (count,); those that are not in it come behind all others."""
        places = torch.full((self.count,), len(self.ranked))
        places[self.ranked] = torch.arange(len(self.ranked))
        return places

    def best(self) -> dict[str, Tensor]:
        """Which units of each member are kept, by `Candidate.key`: fewer than `total` where no more may be chosen."""
        chosen = torch.zeros(self.count, dtype=torch.bool)
        if self.minimum:
            for own, places in zip(
                self.split(chosen).values(), self.split(self.standing()).values(), strict=True
            ):  # views: marks in them are marks in `chosen`
                first = places.argsort()[: self.minimum]
                own[first[places[first] < len(self.ranked)]] = True
        rest = self.ranked[~chosen[self.ranked]]
        chosen[rest[: max(0, self.total - int(chosen.sum()))]] = True
        return {key: own.nonzero().flatten() for key, own in self.split(chosen).items()}

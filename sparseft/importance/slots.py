"""Where the rows of a matrix that is halved several times lie.

To treat a whole level of halves as one batch whatever the size, they lie in *slots*: every leaf has the same number c
of them, so a node of level l owns `c · 2^(levels - l)` consecutive slots, and where n leaves a leaf one row short its
last slot is empty (zero).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where the n rows of a matrix halved `levels` times lie in `slots` slots, `leaf` of them to a leaf."""

    n: int
    levels: int

    @property
    def leaf(self) -> int:
        return -(-self.n // 2**self.levels)

    @property
    def slots(self) -> int:
        return self.leaf * 2**self.levels

    def node(self, level: int) -> int:
        """Slots of one node of a level (0 is the whole matrix)."""
        return self.slots >> level

    def index(self) -> Tensor | None:
        """The slot of each row (n,), int64 on the CPU; None where rows and slots are the same. Not to be changed."""
        return _slots_of_rows(self)

    def _index(self) -> Tensor | None:
        if self.slots == self.n:
            return None
        sizes = [self.n]
        for _ in range(self.levels):  # floor and ceiling of the half, so that two leaves differ by one row at most
            sizes = [half for size in sizes for half in (size // 2, size - size // 2)]
        return torch.cat([torch.arange(size) + i * self.leaf for i, size in enumerate(sizes)])

    def spread(self, x: Tensor, dim: int) -> Tensor:
        """Rows -> slots along `dim`; the empty slots hold zeros."""
        index = self.index()
        if index is None:
            return x
        shape = list(x.shape)
        shape[dim] = self.slots
        return x.new_zeros(shape).index_copy_(dim, index.to(x.device), x)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Slots -> rows along `dim`."""
        index = self.index()
        return x if index is None else x.index_select(dim, index.to(x.device))


def relaid(x: Tensor, old: Layout, new: Layout) -> Tensor:
    """Slots of one layout -> those of another one of the same rows, along the first dimension."""
    return x if old == new else new.spread(old.gather(x, 0), 0)


def relaid_blocks(blocks: Tensor, old: Layout, new: Layout) -> Tensor:
    """Diagonal blocks (nodes, side, side) of one layout -> of the same nodes of another one."""
    for _ in range(2):  # their rows, then their columns
        rows = relaid(blocks.reshape(-1, blocks.shape[2]), old, new)
        blocks = rows.view(len(blocks), -1, blocks.shape[2]).mT
    return blocks


@functools.lru_cache(maxsize=64)
def _slots_of_rows(layout: Layout) -> Tensor | None:
    return layout._index()

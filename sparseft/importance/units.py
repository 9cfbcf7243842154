"""Units of a weight (heads, channels, rows, columns, blocks): sums over each of them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sparseft.kernels.reference import to_blocks


class Unitised(Protocol):
    """What is scored: `selection.Candidate`."""

    module: str
    kind: str
    shape: tuple[int, int]
    start: int
    unit: int
    count: int

    @property
    def key(self) -> str: ...


def sum_units(matrix: Tensor, candidate: Unitised) -> Tensor:
    """Sums a (out, in) matrix over each unit -> (units,)."""
    if candidate.kind == "blocks":
        size = candidate.unit
        by_column = to_blocks(matrix, size).sum(-1)  # (out, block columns)
        return to_blocks(by_column.t(), size).sum(-1).t().reshape(-1)
    side = matrix.sum(1) if candidate.kind == "rows" else matrix.sum(0)
    return sum_features(side, candidate)


def sum_features(side: Tensor, candidate: Unitised) -> Tensor:
    """Sums a vector over output (rows) or input (columns) features over each unit -> (units,)."""
    stop = candidate.start + candidate.unit * candidate.count
    return side[candidate.start : stop].reshape(candidate.count, candidate.unit).sum(1)

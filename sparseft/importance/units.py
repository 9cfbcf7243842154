"""Units of a weight (heads, channels, rows, columns, blocks): what is scored and chosen, and sums over each of them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseft.kernels import grid
from sparseft.kernels.reference import to_blocks


@dataclass(frozen=True)
class Candidate:
    """The units of one module that compete with each other: runs of rows or columns, its blocks, or its entries, of
    which a grid is chosen."""

    module: str
    kind: str  # rows | columns | blocks | grid
    shape: tuple[int, int]  # of the logical weight (out, in)
    start: int  # first feature
    unit: int  # features a unit; for blocks: the block size; for grids: 1
    count: int  # units
    role: str | None = None

    @property
    def key(self) -> str:
        """Names the candidate: the module and, where one has several, the role."""
        return f"{self.module}:{self.role}" if self.role else self.module


def generator_for(seed: int, *names: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the names only: the same on every rank and device."""
    digest = hashlib.sha256("\0".join((str(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def unit_index(candidate: Candidate, units: Tensor) -> Tensor:
    """The features (k,) or blocks (n, 2) that units stand for."""
    if candidate.kind == "blocks":
        across = math.ceil(candidate.shape[1] / candidate.unit)
        return torch.stack([units // across, units % across], dim=1)
    features = units[:, None] * candidate.unit + torch.arange(candidate.unit) + candidate.start
    return features.reshape(-1)


def units_of(candidate: Candidate, index: Tensor) -> Tensor:
    """The units (sorted, int64) that features (k,) or blocks (n, 2) of the module belong to, where they are among the
    candidate's: what `unit_index` undoes. Of a grid: entries, row · in + column."""
    if candidate.kind == "grid":
        pairs = grid.pairs(index)
        return (pairs[:, 0] * candidate.shape[1] + pairs[:, 1]).sort().values
    if candidate.kind == "blocks":
        return (index[:, 0] * math.ceil(candidate.shape[1] / candidate.unit) + index[:, 1]).sort().values
    own = index[(index >= candidate.start) & (index < candidate.start + candidate.unit * candidate.count)]
    return ((own - candidate.start) // candidate.unit).unique()


def sum_units(matrix: Tensor, candidate: Candidate) -> Tensor:
    """Sums a (out, in) matrix over each unit -> (units,)."""
    if candidate.kind == "grid":
        return matrix.reshape(-1)
    if candidate.kind == "blocks":
        size = candidate.unit
        by_column = to_blocks(matrix, size).sum(-1)  # (out, block columns)
        return to_blocks(by_column.t(), size).sum(-1).t().reshape(-1)
    side = matrix.sum(1) if candidate.kind == "rows" else matrix.sum(0)
    return sum_features(side, candidate)


def sum_features(side: Tensor, candidate: Candidate) -> Tensor:
    """Sums a vector over output (rows) or input (columns) features over each unit -> (units,)."""
    stop = candidate.start + candidate.unit * candidate.count
    return side[candidate.start : stop].reshape(candidate.count, candidate.unit).sum(1)

"""A change as two factors, b @ a = ΔW, exactly: what formats of LoRA hold.

Rows that train need a rank each, with a one-hot column of b; columns one with a one-hot row of a. Blocks are covered by
the least number of block rows and block columns, grids by all their rows or all their columns. What is zero in the
values takes no rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from sparseft.adapters.sparse import SparseDelta
from sparseft.export.changes import Change, LowRankChange, SparseChange
from sparseft.kernels import grid
from sparseft.selection.cover import cover


class Bands(NamedTuple):
    """Whole features: `index` (k,) sorted and unique, int64; `values` (k, length of the other side), fp32."""

    index: Tensor
    values: Tensor


def factors(change: Change) -> tuple[Tensor, Tensor]:
    """b (out, r) and a (r, in) in fp32, with b @ a = ΔW: every product of a sparse change has a one-hot side, so that
    only entries that rows and columns share are sums. A LoRA's scale is in b. r may be 0."""
    if isinstance(change, LowRankChange):
        return change.scale * change.b.float(), change.a.float()
    assert isinstance(change, SparseChange)
    rows, columns = bands(change)
    b = torch.zeros(change.shape[0], len(rows.index) + len(columns.index))
    a = torch.zeros(b.shape[1], change.shape[1])
    count = len(rows.index)
    b[rows.index, torch.arange(count)] = 1.0
    a[:count] = rows.values
    b[:, count:] = columns.values.t()
    a[torch.arange(count, len(a)), columns.index] = 1.0
    return b, a


def rank(change: Change) -> int:
    """How many columns `factors` has."""
    if isinstance(change, LowRankChange):
        return len(change.a)
    assert isinstance(change, SparseChange)
    return sum(len(part.index) for part in bands(change))


def bands(change: SparseChange) -> tuple[Bands, Bands]:
    """The change as whole rows (k, in) and whole columns (k, out) that add up to it: as few as its pattern allows."""
    out_features, in_features = change.shape
    rows, columns = [], []
    if (value := change.kinds.get("rows")) is not None:
        rows.append(Bands(value.index, value.delta.float()))
    if (value := change.kinds.get("columns")) is not None:
        columns.append(Bands(value.index, value.delta.float().t()))
    if (value := change.kinds.get("blocks")) is not None:
        of_rows, of_columns = _covered(value, change.shape)
        rows += _block_bands(value, of_rows, 0, change.shape)
        columns += _block_bands(value, of_columns, 1, change.shape)
    if (value := change.kinds.get("grid")) is not None:
        side, found = _grid_bands(value, change.shape)
        (rows if side == 0 else columns).extend(found)
    return _fewest(_united(rows, in_features), _united(columns, out_features), change)


def _fewest(rows: Bands, columns: Bands, change: SparseChange) -> tuple[Bands, Bands]:
    """The same change by rows alone, or by columns alone, where those that hold anything are fewer than both."""
    alone = []
    for own, crossing in ((rows, columns), (columns, rows)):
        live = crossing.values.any(dim=0)
        live[own.index] = True
        alone.append(live.nonzero().flatten() if crossing.index.numel() else own.index)
    side = int(len(alone[1]) < len(alone[0]))
    if len(alone[side]) >= len(rows.index) + len(columns.index):
        return rows, columns
    dense = change.dense() if side == 0 else change.dense().t()
    whole = Bands(alone[side], dense[alone[side]])
    nothing = Bands(torch.empty(0, dtype=torch.int64), torch.empty(0, change.shape[side]))
    return (whole, nothing) if side == 0 else (nothing, whole)


def _covered(value: SparseDelta, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which blocks (n,) go into rows and which into columns; those of zeros into neither."""
    live = value.delta.flatten(1).any(dim=1)
    block_rows, _ = cover(value.index[live], shape, value.block_size)
    in_rows = torch.isin(value.index[:, 0], block_rows)
    return live & in_rows, live & ~in_rows


def _block_bands(value: SparseDelta, chosen: Tensor, side: int, shape: tuple[int, int]) -> Iterable[Bands]:
    """The chosen blocks as bands, one of B features for each block row (side 0) or block column (side 1)."""
    size = value.block_size
    assert size is not None
    length, other = shape[side], shape[1 - side]
    index, delta = value.index[chosen], value.delta[chosen].float()
    for band in index[:, side].unique().tolist():
        height = min(size, length - band * size)  # an edge block's
        values = torch.zeros(height, other)
        for position in (index[:, side] == band).nonzero().flatten().tolist():
            start = int(index[position, 1 - side]) * size
            block = delta[position] if side == 0 else delta[position].t()
            width = min(size, other - start)
            values[:, start : start + width] = block[:height, :width]
        yield Bands(torch.arange(band * size, band * size + height), values)


def _grid_bands(value: SparseDelta, shape: tuple[int, int]) -> tuple[int, list[Bands]]:
    """Grids as whole rows (side 0) or whole columns (side 1), whichever are fewer."""
    found = grid.matrices(value.index, value.delta.float())
    height, width = sum(len(rows) for rows, _, _ in found), len(torch.cat([c for _, c, _ in found]).unique())
    side = int(width < height)
    made = []
    for rows, columns, matrix in found:
        lines, across, own = (rows, columns, matrix) if side == 0 else (columns, rows, matrix.t())
        values = torch.zeros(len(lines), shape[1 - side])
        values[:, across] = own
        made.append(Bands(lines, values))
    return side, made


def _united(parts: list[Bands], length: int) -> Bands:
    """The parts' sum, sorted, without features that are all zeros."""
    if not parts:
        return Bands(torch.empty(0, dtype=torch.int64), torch.empty(0, length))
    index, position = torch.unique(torch.cat([part.index for part in parts]), return_inverse=True)
    values = torch.zeros(len(index), length).index_add_(0, position, torch.cat([part.values for part in parts]))
    live = values.any(dim=1)
    return Bands(index[live], values[live])

"""Grids: the entries where some rows of a weight cross some of its columns, W[rows][:, columns].

A grid's index is one list, as every pattern's is: its rows, then its columns, each written as -1 - column. What has
trained one grid after another holds the union of them, which is no grid; it is grids without a common row, one behind
the other in the same list. Values are flat, (entries,): grid by grid, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseft.errors import UserError
from sparseft.kernels.kind import Kind, Shape

SHIFT, MASK = 32, 0xFFFFFFFF  # of keys
Part = tuple[Tensor, Tensor]  # the rows and columns of one grid


class Grids(NamedTuple):
    """An index made ready for products, on the weight's device.

    parts: the rows and columns of each grid. needed: input features that any of them needs, `count` of them, filled up
    as `reference.padded` does. within: each grid's columns among these; None: they are all of them, in order.
    """

    parts: tuple[Part, ...]
    needed: Tensor
    count: int
    within: tuple[Tensor | None, ...]


def encode(rows: Tensor, columns: Tensor) -> Tensor:
    """The index (rows + columns,) of one grid, int64."""
    return torch.cat([rows.to(torch.int64), -1 - columns.to(torch.int64)])


def parts(index: Tensor) -> list[Part]:
    """The rows and columns of each grid of an index, on the CPU. Looks at the values; of one that `Grid.check` refuses
    the parts mean nothing."""
    index = index.to("cpu", torch.int64).flatten()
    of_column = index < 0
    starts = (of_column[:-1] & ~of_column[1:]).nonzero().flatten() + 1  # a row behind a column begins the next grid
    found = []
    for own in torch.tensor_split(index, starts):
        columns = own < 0
        found.append((own[~columns], -1 - own[columns]))
    return found


def sides(index: Tensor) -> tuple[int, int]:
    """How many rows and columns the one grid of an index has; `UserError` where there are several."""
    found = parts(index)
    if len(found) > 1:
        raise UserError("grid: what has trained several grids has no single one: choose anew from a fresh adapter.")
    return len(found[0][0]), len(found[0][1])


def pairs(index: Tensor) -> Tensor:
    """The entries as (row, column) (n, 2), on the CPU, in the order of the values."""
    every = Grid().keys(index)
    return torch.stack([every >> SHIFT, every & MASK], dim=1)


def located(index: Tensor, pad: Any) -> Grids:
    """An index made ready on its device; `pad` fills up a list of features (`reference.padded`)."""
    device = index.device
    found = parts(index)
    if len(found) == 1:
        needed = found[0][1]
        within: Sequence[Tensor | None] = [None]
    else:
        needed = torch.cat([columns for _, columns in found]).unique()
        within = [torch.searchsorted(needed, columns).to(device) for _, columns in found]
    there = tuple((rows.to(device), columns.to(device)) for rows, columns in found)
    return Grids(there, pad(needed).to(device), len(needed), tuple(within))


def _parts_at(at: Tensor | Grids, device: torch.device) -> Sequence[Part]:
    if isinstance(at, Grids):
        return at.parts
    return [(rows.to(device), columns.to(device)) for rows, columns in parts(at)]


def matrices(at: Tensor | Grids, values: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each grid its rows, its columns and its values as (rows, columns), views of `values` (entries,)."""
    found, start = [], 0
    for rows, columns in _parts_at(at, values.device):
        count = len(rows) * len(columns)
        found.append((rows, columns, values[start : start + count].view(len(rows), len(columns))))
        start += count
    return found


class Grid(Kind):
    """Index and values as above; `at` an index or `Grids`."""

    name = "grid"

    def index(self, given: Any) -> Tensor:
        """From an index or from a pair (rows, columns); `UserError` where it is neither."""
        if not isinstance(given, Tensor) and len(given) == 2 and all(hasattr(side, "__len__") for side in given):
            sides = [torch.as_tensor(side, device="cpu") for side in given]
            if any(side.dim() != 1 or (side.numel() and side.is_floating_point()) for side in sides):
                raise UserError("grid: expected a pair of lists of integers, (rows, columns).")
            if any(bool((side < 0).any()) for side in sides):
                raise UserError("grid: an index lies below 0.")
            return encode(*sides)
        return super().index(given)

    def check(self, index: Tensor, shape: Shape, size: int | None) -> None:
        if index.dim() != 1:
            wanted = "expected a list, rows and then columns as -1 - column"
            raise UserError(f"grid: {wanted}, got shape {tuple(index.shape)}.")
        if len(index) == 0:
            raise UserError("grid: expected at least one row and one column.")
        if index.is_meta:
            return
        if int(index[0]) < 0 or int(index[-1]) >= 0:
            raise UserError("grid: expected rows, and behind them columns as -1 - column.")
        found = parts(index)
        rows = torch.cat([rows for rows, _ in found])
        if bool((rows >= shape[0]).any()) or any(bool((columns >= shape[1]).any()) for _, columns in found):
            raise UserError(f"grid: an index lies outside rows 0 … {shape[0] - 1} and columns 0 … {shape[1] - 1}.")
        if len(rows.unique()) != len(rows) or any(len(columns.unique()) != len(columns) for _, columns in found):
            raise UserError("grid: a row or a column occurs twice.")

    def values_shape(self, index: Tensor, shape: Shape, size: int | None) -> tuple[int, ...]:
        return (self.entries(index, shape, size),)

    def entries(self, index: Tensor, shape: Shape, size: int | None) -> int:
        return sum(len(rows) * len(columns) for rows, columns in parts(index))

    def gather(self, weight: Tensor, at: Tensor | Grids, size: int | None) -> Tensor:
        found = [weight[rows[:, None], columns].flatten() for rows, columns in _parts_at(at, weight.device)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def scatter_(self, weight: Tensor, at: Tensor | Grids, values: Tensor, size: int | None) -> None:
        for rows, columns, own in matrices(at, values):
            weight[rows[:, None], columns] = own

    def keys(self, index: Tensor) -> Tensor:
        """Of each entry the row above, the column below, in the order of the values."""
        return torch.cat([((rows[:, None] << SHIFT) + columns).flatten() for rows, columns in parts(index)])

    def of_keys(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Rows with the same columns make one grid; rows and columns are sorted, so that a set of entries has one
        index."""
        keys, order = keys.sort()
        rows, counts = (keys >> SHIFT).unique_consecutive(return_counts=True)
        starts = counts.cumsum(0) - counts
        columns = keys & MASK
        alike: dict[bytes, list[int]] = {}
        for place, own in enumerate(columns.split(counts.tolist())):
            alike.setdefault(own.numpy().tobytes(), []).append(place)
        index, places = [], []
        for members in alike.values():
            first = members[0]
            own = columns[starts[first] : starts[first] + counts[first]]
            index.append(encode(rows[members], own))
            places.append((starts[members][:, None] + torch.arange(len(own))).flatten())
        return torch.cat(index), order[torch.cat(places)]

    def unit_of(self, index: Tensor) -> Tensor | None:
        """Each row of each grid is a unit."""
        return pairs(index)[:, 0].unique(return_inverse=True)[1]

    def rectangles(self, index: Tensor, shape: Shape, size: int | None) -> Tensor:
        row, column = pairs(index).unbind(1)
        return torch.stack([row, row + 1, column, column + 1], dim=1)

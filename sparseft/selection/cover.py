"""The rank of a pattern: the fewest rows and columns of a weight that hold all that trains in it (König's theorem)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sparseft.kernels import grid


def needed_rank(kinds: Mapping[str, Tensor], shape: tuple[int, int], block_size: int | None) -> int:
    """The rank that an exact low-rank form of one weight's selection needs, whatever the values become.

    kinds: `{"rows" | "columns": (k,), "blocks": (n, 2)}` or a `"grid"` of a weight of `shape` (out, in). Those of one
    weight add up, as in a form that keeps them apart; it is never more than the weight's shorter side.
    """
    rank = sum(len(index) for kind, index in kinds.items() if kind not in ("blocks", "grid"))
    if "grid" in kinds:
        parts = grid.parts(kinds["grid"])
        rank += min(sum(len(rows) for rows, _ in parts), len(torch.cat([columns for _, columns in parts]).unique()))
    if "blocks" in kinds:
        assert block_size is not None
        rows, columns = cover(kinds["blocks"], shape, block_size)
        rank += int(extents(rows, shape[0], block_size).sum() + extents(columns, shape[1], block_size).sum())
    return min(rank, *shape)


def cover(index: Tensor, shape: tuple[int, int] | None = None, block_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Block rows and block columns (int64, sorted, unique) such that each block (n, 2) lies in one of them, with the
    least sum of heights and widths.

    That sum is the rank which almost all values on the blocks have. shape, block_size: of the weight (out, in), whose
    last blocks may be smaller; without them all blocks count as of one size.
    """
    index = index.to(torch.int64)
    ragged = []  # (dimension, position, extent) of block rows and columns that are narrower than the others
    if shape is not None and block_size is not None:
        for dim, side in enumerate(shape):
            if side % block_size and bool((index[:, dim] == side // block_size).any()):
                ragged.append((dim, side // block_size, side % block_size))
    if not ragged:
        return _fewest(index)
    # The narrow ones are in the cover, or all that crosses them is: what remains to be covered is all of one size.
    assert shape is not None and block_size is not None
    found = []
    for choice in range(2 ** len(ragged)):
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        rest = index
        for bit, (dim, position, _) in enumerate(ragged):
            crossing = rest[:, dim] == position
            if choice >> bit & 1:
                sides[dim].append(torch.tensor([position]))
            else:
                sides[1 - dim].append(rest[crossing, 1 - dim])
                taken = torch.isin(rest[:, 1 - dim], rest[crossing, 1 - dim])
                crossing = crossing | taken
            rest = rest[~crossing]
        rows, columns = (torch.cat([*s, more]).unique() for s, more in zip(sides, _fewest(rest), strict=True))
        cost = extents(rows, shape[0], block_size).sum() + extents(columns, shape[1], block_size).sum()
        found.append((int(cost), rows, columns))
    _, rows, columns = min(found, key=lambda option: option[0])
    return rows, columns


def extents(lines: Tensor, side: int, block_size: int) -> Tensor:
    """How many rows (columns) of the weight each block row (column) has."""
    return (side - lines * block_size).clamp(max=block_size)


def _fewest(index: Tensor) -> tuple[Tensor, Tensor]:
    """The least number of block rows and columns in which all blocks lie."""
    rows, row_of = index[:, 0].unique(return_inverse=True)
    columns, column_of = index[:, 1].unique(return_inverse=True)
    adjacent: list[list[int]] = [[] for _ in range(len(rows))]
    for row, column in zip(row_of.tolist(), column_of.tolist(), strict=True):
        adjacent[row].append(column)
    row_mate, column_mate = _matched(adjacent, len(columns))
    # König: from the rows without a mate, along any block to a column and along its mate back to a row: the rows that
    # are not reached and the columns that are make the cover.
    reached, seen = [False] * len(rows), [False] * len(columns)
    waiting = [row for row, mate in enumerate(row_mate) if mate < 0]
    for row in waiting:
        reached[row] = True
    while waiting:
        for column in adjacent[waiting.pop()]:
            if not seen[column]:
                seen[column] = True
                mate = column_mate[column]  # there is one, else the matching could grow
                if not reached[mate]:
                    reached[mate] = True
                    waiting.append(mate)
    return rows[~torch.tensor(reached, dtype=torch.bool)], columns[torch.tensor(seen, dtype=torch.bool)]


def _matched(adjacent: list[list[int]], columns: int) -> tuple[list[int], list[int]]:
    """A maximum matching by Hopcroft and Karp: of each row its column, of each column its row; -1: none."""
    row_mate, column_mate = [-1] * len(adjacent), [-1] * columns
    while True:
        depth = [0 if mate < 0 else -1 for mate in row_mate]
        level, found = [row for row, mate in enumerate(row_mate) if mate < 0], False
        free = level
        while level and not found:
            deeper = []
            for row in level:
                for column in adjacent[row]:
                    mate = column_mate[column]
                    if mate < 0:
                        found = True
                    elif depth[mate] < 0:
                        depth[mate] = depth[row] + 1
                        deeper.append(mate)
            level = deeper
        if not found:
            return row_mate, column_mate
        untried = [iter(row) for row in adjacent]  # each block is tried once a phase
        for row in free:
            _augment([row], untried, depth, row_mate, column_mate)


def _augment(
    path: list[int], untried: list[Iterator[int]], depth: list[int], row_mate: list[int], column_mate: list[int]
) -> None:
    """Looks for a column without a mate, from the row in `path` ever one level deeper; where there is one, the rows on
    the way each take the column that leads on."""
    while path:
        row = path[-1]
        for column in untried[row]:
            mate = column_mate[column]
            if mate < 0:
                for taker in reversed(path):
                    row_mate[taker], column_mate[column], column = column, taker, row_mate[taker]
                return
            if depth[mate] == depth[row] + 1:
                path.append(mate)
                break
        else:
            path.pop()

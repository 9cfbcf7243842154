"""The least cover of blocks by block rows and columns, against brute force and the rank of random values."""

import itertools
import random
import time

import pytest
import torch

from sparseft.kernels import reference
from sparseft.selection.cover import cover, needed_rank


def random_blocks(high, wide, count, seed):
    cells = torch.randperm(high * wide, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.stack([cells // wide, cells % wide], 1)


def least(index, heights, widths):
    """The least sum of heights and widths, by trying every set of rows: the columns of what is left must follow."""
    best = None
    there = {int(row) for row in index[:, 0]}
    for size in range(len(there) + 1):
        for rows in itertools.combinations(sorted(there), size):
            columns = {int(c) for r, c in index.tolist() if r not in rows}
            cost = sum(heights[r] for r in rows) + sum(widths[c] for c in columns)
            best = cost if best is None else min(best, cost)
    return best


@pytest.mark.parametrize("seed", range(60))
def test_no_smaller_cover_exists(seed):
    draw = random.Random(seed)
    high, wide = draw.randint(1, 7), draw.randint(1, 7)
    index = random_blocks(high, wide, draw.randint(1, high * wide), seed)
    rows, columns = cover(index)
    assert rows.equal(rows.unique()) and columns.equal(columns.unique())
    assert rows.dtype == columns.dtype == torch.int64
    assert (torch.isin(index[:, 0], rows) | torch.isin(index[:, 1], columns)).all()
    assert len(rows) + len(columns) == least(index, [1] * high, [1] * wide)


@pytest.mark.parametrize("seed", range(60))
def test_needed_rank_is_the_rank_of_random_values_also_at_narrow_edges(seed):
    draw = random.Random(seed)
    size = draw.choice([2, 3, 4])
    shape = (draw.randint(1, 6 * size), draw.randint(1, 6 * size))
    high, wide = (-(-side // size) for side in shape)
    index = random_blocks(high, wide, draw.randint(1, min(12, high * wide)), seed)
    weight, mask = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape)
    torch.manual_seed(seed)
    for row, column in index.tolist():
        part = mask[row * size : (row + 1) * size, column * size : (column + 1) * size]
        part.fill_(1)
    weight[mask.bool()] = torch.randn(int(mask.sum()), dtype=torch.float64)
    heights = [min(size, shape[0] - r * size) for r in range(high)]
    widths = [min(size, shape[1] - c * size) for c in range(wide)]
    assert needed_rank({"blocks": index}, shape, size) == torch.linalg.matrix_rank(weight)
    assert needed_rank({"blocks": index}, shape, size) == min(least(index, heights, widths), *shape)
    rows, columns = cover(index, shape, size)
    assert (torch.isin(index[:, 0], rows) | torch.isin(index[:, 1], columns)).all()


@pytest.mark.parametrize(("rows", "columns"), [(3, 0), (0, 5), (3, 5), (9, 7)])
def test_rows_and_columns_add_up_to_at_most_a_side(rows, columns):
    shape = (10, 12)
    kinds = {"rows": torch.randperm(10)[:rows], "columns": torch.randperm(12)[:columns]}
    kinds = {kind: index for kind, index in kinds.items() if len(index)}
    weight = torch.zeros(shape, dtype=torch.float64)
    for kind, index in kinds.items():
        old = reference.gather(weight, kind, index, None)
        reference.scatter_(weight, kind, index, old + torch.randn_like(old), None)
    assert needed_rank(kinds, shape, None) == min(rows + columns, 10) == torch.linalg.matrix_rank(weight)


def test_a_narrow_edge_is_cheaper_than_what_crosses_it():
    """5×5 in blocks of 4: the last block row has one row, so covering by rows and by columns differ."""
    assert needed_rank({"blocks": torch.tensor([[1, 0]])}, (5, 5), 4) == 1
    rows, columns = cover(torch.tensor([[1, 0]]), (5, 5), 4)
    assert (rows.tolist(), columns.tolist()) == ([1], [])


@pytest.mark.parametrize("count", [1500, 50_000])
def test_a_large_weight_takes_little_time(count):
    """A dense 1,024 × 2,752 grid of blocks, where a search of one path a time, each from nothing, takes minutes."""
    index = random_blocks(1024, 2752, count, 0)
    start = time.process_time()
    rows, columns = cover(index)
    assert time.process_time() - start < 5  # half a second here
    assert (torch.isin(index[:, 0], rows) | torch.isin(index[:, 1], columns)).all()


def test_a_long_chain_is_no_recursion():
    """Blocks along a staircase: the matching must be found through one path of thousands of steps."""
    steps = torch.arange(20_000)
    index = torch.cat([torch.stack([steps, steps + 1], 1), torch.stack([steps, steps], 1)])
    rows, columns = cover(index)
    assert len(rows) + len(columns) == 20_000

"""Changes as products of two factors: exact, and of no more columns than the pattern needs."""

from __future__ import annotations

import pytest
import torch

from sparseft.adapters.sparse import SparseDelta
from sparseft.export.changes import LowRankChange, SparseChange
from sparseft.export.low_rank import factors, rank
from sparseft.kernels import reference

SHAPE = (50, 43)


def change(shape: tuple[int, int], size: int = 8, seed: int = 0, **kinds: list) -> SparseChange:
    """Random deltas on rows, columns, blocks and grids of a weight."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for kind, index in kinds.items():
        place = torch.tensor(index, dtype=torch.int64)
        dense = torch.randn(shape, generator=generator)
        block_size = size if kind == "blocks" else None
        values[kind] = SparseDelta(place, reference.gather(dense, kind, place, block_size), block_size)
    return SparseChange(shape, values)


CASES = {
    "rows": {"rows": [7, 3, 49]},
    "columns": {"columns": [42, 0]},
    "a row of blocks": {"blocks": [[2, 0], [2, 3], [2, 5]]},
    "a column of blocks": {"blocks": [[0, 1], [3, 1], [6, 1]]},
    "an edge block row and column": {"blocks": [[6, 0], [6, 2], [0, 5], [1, 5]]},
    "a corner": {"blocks": [[6, 5]]},
    "blocks all over": {"blocks": [[0, 0], [0, 1], [1, 1], [2, 3], [3, 3], [3, 0], [6, 4]]},
    "all kinds": {"rows": [30], "columns": [41, 2], "blocks": [[0, 1], [4, 2], [6, 5]]},
    "rows through blocks": {"rows": [1, 9, 10], "blocks": [[1, 0], [1, 2]]},
    "a grid of few rows": {"grid": [7, 3, 49, -43, -1, -6, -9]},
    "a grid of few columns": {"grid": [7, 3, 49, 0, -43, -1, -6]},
    "grids": {"grid": [7, 3, -43, -1, -6, 12, 49, 1, -43, -2]},
    "everything": {"blocks": [[r, c] for r in range(7) for c in range(6)], "rows": [0, 4], "columns": [5]},
}


@pytest.mark.parametrize("case", CASES)
def test_factors_are_the_change_in_the_fewest_columns(case: str) -> None:
    it = change(SHAPE, **CASES[case])
    b, a = factors(it)
    assert b.shape == (50, rank(it)) and a.shape == (rank(it), 43)
    if len(CASES[case]) == 1:
        assert torch.equal(b @ a, it.dense())
    else:
        torch.testing.assert_close(b @ a, it.dense(), rtol=2e-7, atol=1e-7)
    assert rank(it) == torch.linalg.matrix_rank(it.dense().double())  # random values have no other


@pytest.mark.parametrize("seed", range(20))
def test_random_patterns_of_blocks(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(int(side) for side in torch.randint(9, 60, (2,), generator=generator))
    grid = torch.rand(-(-shape[0] // 8), -(-shape[1] // 8), generator=generator) < 0.25
    if not grid.any():
        grid[0, 0] = True
    it = change(shape, seed=seed, blocks=grid.nonzero().tolist())  # type: ignore[arg-type]
    b, a = factors(it)
    assert torch.equal(b @ a, it.dense())
    assert b.shape[1] == torch.linalg.matrix_rank(it.dense().double())


def test_what_is_zero_takes_no_rank() -> None:
    it = change(SHAPE, rows=[1, 2], columns=[3], blocks=[[0, 0], [4, 4]])
    it.kinds["rows"].delta[1] = 0
    it.kinds["columns"].delta[:] = 0
    it.kinds["blocks"].delta[1] = 0
    it.kinds["blocks"].delta[0, 3:] = 0
    b, a = factors(it)
    torch.testing.assert_close(b @ a, it.dense())
    assert b.shape[1] == rank(it) == 3  # row 1 is among rows 0, 1, 2 of the block
    nothing = SparseChange(SHAPE, {})
    assert factors(nothing)[0].shape == (50, 0) and rank(nothing) == 0


def test_bf16_keeps_the_one_hot_side() -> None:
    """Products of rounded factors are the rounded change: one side of each is one."""
    it = change(SHAPE, blocks=[[0, 0], [2, 1], [6, 5]])
    b, a = factors(it)
    assert torch.equal(b.bfloat16().float() @ a.bfloat16().float(), it.dense().bfloat16().float())


def test_a_loras_scale_is_in_its_factors() -> None:
    it = LowRankChange(torch.randn(3, 7), torch.randn(5, 3), 2.5)
    b, a = factors(it)
    torch.testing.assert_close(b @ a, it.dense())
    assert rank(it) == 3

"""The pattern arithmetic of `kernels/reference.py` against loops over single entries."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseft.kernels import dispatch, grid, reference
from sparseft.memory import AllocationCounter

# (out, in, block size): non-square, with and without edge blocks, blocks larger than one side
SHAPES = [(12, 8, 4), (10, 7, 4), (3, 9, 4), (9, 3, 4), (5, 5, 8), (16, 16, 16)]


def entries(
    kind: str, index: Tensor, shape: tuple[int, int], size: int | None
) -> list[tuple[tuple[int, ...], int, int]]:
    """(position in the values, row, column) of every entry that the pattern covers, by the definition."""
    rows, columns = shape
    found: list[tuple[tuple[int, ...], int, int]] = []
    if kind == "grid":
        ours: tuple[list[int], list[int]] = [], []
        for number in [*index.tolist(), 0]:
            if number >= 0 and ours[1]:  # a row behind columns: the grid before is complete
                found += [((len(found) + n,), *place) for n, place in enumerate(itertools.product(*ours))]
                ours = [], []
            ours[int(number < 0)].append(number if number >= 0 else -1 - number)
        return found
    for position, item in enumerate(index.tolist()):
        if kind == "rows":
            found += [((position, c), item, c) for c in range(columns)]
        elif kind == "columns":
            found += [((r, position), r, item) for r in range(rows)]
        else:
            assert size is not None
            for i in range(size):
                for j in range(size):
                    r, c = item[0] * size + i, item[1] * size + j
                    if r < rows and c < columns:
                        found.append(((position, i, j), r, c))
    return found


def some_index(kind: str, shape: tuple[int, int], size: int) -> Tensor:
    """Half of the units, unsorted, the last one (an edge block where there is one) among them."""
    generator = torch.Generator().manual_seed(1)
    if kind == "grid":  # of two, where there is room; the second shares columns with the first
        rows, columns = (torch.randperm(side, generator=generator)[: (side + 1) // 2] for side in shape)
        half = len(rows) // 2
        if not half:
            return grid.encode(rows, columns)
        return torch.cat([grid.encode(rows[:half], columns), grid.encode(rows[half:], columns[:1])])
    if kind != "blocks":
        count = shape[0] if kind == "rows" else shape[1]
        order = torch.randperm(count - 1, generator=generator)[: count // 2]
        return torch.cat([torch.tensor([count - 1]), order])
    down, across = -(-shape[0] // size), -(-shape[1] // size)
    order = torch.randperm(down * across, generator=generator)[: max(1, down * across // 2)]
    index = torch.unique(torch.cat([order, torch.tensor([down * across - 1])]))
    return torch.stack([index // across, index % across], dim=1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize(("rows", "columns", "size"), SHAPES)
def test_gather_scatter_and_count(rows: int, columns: int, size: int, kind: str, transposed: bool) -> None:
    storage = torch.randn(columns, rows) if transposed else torch.randn(rows, columns)
    weight = storage.t() if transposed else storage
    index = some_index(kind, (rows, columns), size)
    covered = entries(kind, index, (rows, columns), size)

    values = reference.gather(weight, kind, index, size)
    assert values.shape == reference.values_shape(kind, index, (rows, columns), size)
    expected = torch.zeros_like(values)
    for position, r, c in covered:
        expected[position] = weight[r, c]
    assert torch.equal(values, expected)
    assert reference.trainable_entries(kind, index, (rows, columns), size) == len(covered)

    new = torch.randn_like(values)
    wanted = weight.clone()
    for position, r, c in covered:
        wanted[r, c] = new[position]
    reference.scatter_(weight, kind, index, new, size)
    assert torch.equal(storage.t() if transposed else storage, wanted)


def test_gather_copies() -> None:
    weight = torch.zeros(8, 8)
    for kind, index in (
        ("rows", torch.tensor([1])),
        ("columns", torch.tensor([1])),
        ("blocks", torch.tensor([[0, 1]])),
        ("grid", torch.tensor([0, 1, -1])),
    ):
        reference.gather(weight, kind, index, 4).fill_(1.0)
    assert not weight.any()


@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize(("rows", "columns", "size"), SHAPES)
@pytest.mark.parametrize("tokens", [0, 1, 11])
def test_gradients_equal_the_dense_product(
    rows: int, columns: int, size: int, kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grad, x = torch.randn(tokens, rows, dtype=torch.float64), torch.randn(tokens, columns, dtype=torch.float64)
    dense = torch.zeros(rows, columns, dtype=torch.float64)
    for t in range(tokens):
        dense += torch.outer(grad[t], x[t])
    index = some_index(kind, (rows, columns), size)
    if kind == "rows":
        found = reference.rows_gradient(grad, x, index)
    elif kind == "columns":
        found = reference.columns_gradient(grad, x[:, index])
    elif kind == "grid":
        grids = grid.located(index, reference.padded)
        found = dispatch.grid_gradient(grad, x[:, grids.needed[: grids.count]], grids).double()
    else:
        found = reference.blocks_gradient(grad, x, index[:, 0], index[:, 1], size)
        for constant, value in (("GATHERED_CPU", 1), ("OWN_PRODUCT", 0)):  # block by block; a product each
            monkeypatch.setattr(reference, constant, value)
            again = reference.blocks_gradient(grad, x, index[:, 0], index[:, 1], size)
            torch.testing.assert_close(again, found, rtol=1e-12, atol=1e-12)
    expected = torch.zeros(reference.values_shape(kind, index, (rows, columns), size), dtype=torch.float64)
    for position, r, c in entries(kind, index, (rows, columns), size):
        expected[position] = dense[r, c]
    # The part of an edge block outside the weight must be exactly zero: the optimizer and clipping see it.
    tolerance = 1e-5 if kind == "grid" else 1e-12  # dispatched: fp32
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert not found[expected == 0].any() or tokens == 0


@pytest.mark.parametrize("at_once", [1, 2, 64])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)],
)
@pytest.mark.parametrize("size", [4, 32])
@pytest.mark.parametrize("index", [[[2, 0], [0, 0], [1, 0]], [[1, 3], [1, 0], [1, 2]], [[0, 3], [2, 1]]])
def test_blocks_at_once_or_by_themselves(
    index: list[list[int]],
    size: int,
    dtype: torch.dtype,
    tolerance: float,
    own: bool,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks of one column, of one row, scattered; edge blocks on both sides; operands that are not contiguous."""
    tokens = 6
    monkeypatch.setattr(reference, "GATHERED_CPU", at_once * tokens * size)
    monkeypatch.setattr(reference, "OWN_PRODUCT", 0 if own else 2**40)
    torch.manual_seed(0)
    grad = torch.randn(3 * size - 1, tokens).to(dtype).t()
    x = torch.randn(2 * tokens, 4 * size - 2).to(dtype)[::2]
    rows, columns = torch.tensor(index).unbind(1)
    found = reference.blocks_gradient(grad, x, rows, columns, size)
    assert found.dtype == torch.promote_types(dtype, torch.float32) and found.is_contiguous()
    dense = torch.zeros(3 * size, 4 * size, dtype=torch.float64)
    dense[:-1, :-2] = grad.double().t() @ x.double()
    expected = torch.stack([dense[r * size : (r + 1) * size, c * size : (c + 1) * size] for r, c in index])
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    assert not found[expected == 0].any()


@pytest.mark.parametrize("own", [2**15, 2**40])
def test_a_sum_beyond_the_range_of_fp16(own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "OWN_PRODUCT", own)
    x, one = torch.full((20_000, 16), 2.0, dtype=torch.float16), torch.tensor([0])
    assert (reference.blocks_gradient(x, x, one, one, 16) == 80_000).all()


@pytest.mark.parametrize("at_once", [1, 700, 2**20])  # entries cast to fp32 at a time
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [torch.tensor([36, 0, 5]), (3, 4)], ids=["rows", "a run"])
def test_sums_over_tokens_are_taken_and_kept_in_fp32(
    rows: Any, dtype: torch.dtype, autocast: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "GATHERED_CPU", at_once)
    torch.manual_seed(0)
    grad, x = torch.randn(301, 37).to(dtype), torch.randn(301, 29).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # a backward pass may run under it
        of_rows = dispatch.rows_gradient(grad, x, rows)
        of_columns = dispatch.columns_gradient(x, reference.select(grad, 1, rows))
    exact = reference.select(grad, 1, rows).double().t() @ x.double()
    for found, want in ((of_rows, exact), (of_columns, exact.t())):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), want, rtol=0, atol=1e-6 * want.abs().max().item())


def test_sums_of_rows_and_columns_beyond_the_range_of_fp16() -> None:
    x = torch.full((20_000, 16), 2.0, dtype=torch.float16)
    assert (dispatch.rows_gradient(x, x, torch.tensor([3])) == 80_000).all()
    assert (dispatch.columns_gradient(x, x[:, :2]) == 80_000).all()


def test_a_sum_over_tokens_casts_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "GATHERED_CPU", 2**10)
    grad, x = torch.randn(4096, 8).bfloat16(), torch.randn(4096, 64).bfloat16()
    with AllocationCounter() as memory:
        dispatch.rows_gradient(grad, x, (0, 4))
    assert memory.peak < 16 * 2**10 < x.nbytes


def test_where_torch_keeps_products_of_halves_in_fp32_nothing_is_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, whose two products are stood in for here: they alone cast."""
    assert reference.FP32_PRODUCTS  # of the torch that is installed here
    calls: list[str] = []

    def stand_in(multiply: Any) -> Any:
        def product(left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
            assert left.dtype == right.dtype == torch.bfloat16
            calls.append(multiply.__name__)
            return multiply(left.to(out_dtype), right.to(out_dtype), out=out)

        return product

    grad, x = (torch.randn(6, n).bfloat16() for n in (5, 7))
    blocks = torch.tensor([0]), torch.tensor([1])
    expected = dispatch.columns_gradient(grad, x), reference.blocks_gradient(grad, x, *blocks, 4)
    monkeypatch.setattr(reference, "_fp32_products", lambda half: True)
    for multiply in (torch.mm, torch.bmm):
        monkeypatch.setattr(torch, multiply.__name__, stand_in(multiply))
    found = dispatch.columns_gradient(grad, x), reference.blocks_gradient(grad, x, *blocks, 4)
    assert calls == ["mm", "bmm"]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_the_meta_device_gradients_have_their_shapes_and_nothing_is_cast(dtype: torch.dtype) -> None:
    grad, x = (torch.empty(6, n, dtype=dtype, device="meta") for n in (5, 7))
    with AllocationCounter() as memory:
        columns = dispatch.columns_gradient(grad, x)
    assert columns.shape == (5, 7) and columns.dtype == torch.float32 and memory.peak == columns.nbytes
    blocks = dispatch.blocks_gradient(grad, x, torch.tensor([0]), torch.tensor([1]), 4)
    assert blocks.shape == (1, 4, 4) and blocks.dtype == torch.float32


def test_the_sum_over_tokens_is_one_operator_to_the_compiler() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        grad, x = torch.randn(9, 5).to(dtype), torch.randn(9, 7).to(dtype)
        torch.library.opcheck(torch.ops.sparseft.token_product, (grad, x))
        compiled = torch.compile(dispatch.columns_gradient, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(grad, x), dispatch.columns_gradient(grad, x))


def test_to_blocks_pads_the_last_block_with_zeros() -> None:
    matrix = torch.arange(1.0, 11.0).reshape(2, 5)
    assert reference.to_blocks(matrix, 4).tolist() == [
        [[1, 2, 3, 4], [5, 0, 0, 0]],
        [[6, 7, 8, 9], [10, 0, 0, 0]],
    ]

"""What deltas make of rows that have adapters of their own, against dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparseft.errors import RunError
from sparseft.kernels import grid, reference
from sparseft.layers import SparseLinear
from sparseft.layers.by_row import ByRow
from sparseft.layers.pattern import Entries

OUT, IN = 44, 72  # blocks of 4 fit both, of 8 the columns only, of 16 neither


class Deltas(Entries):
    block_size: int | None = None


def deltas(kind: str, count: int, size: int | None = None, seed: int = 0) -> Deltas:
    generator = torch.Generator().manual_seed(seed)
    if kind == "grid":
        rows, columns = (torch.randperm(side, generator=generator)[:count] for side in (OUT, IN))
        half = len(rows) // 2
        if half > 1:  # two grids of different columns
            index = torch.cat([grid.encode(rows[:half], columns), grid.encode(rows[half:], columns[:2])])
        else:
            index = grid.encode(rows, columns)
    elif kind == "blocks":
        assert size is not None
        down, across = -(-OUT // size), -(-IN // size)
        chosen = torch.randperm(down * across, generator=generator)[:count]
        chosen[0] = down * across - 1  # the one in the corner
        chosen = chosen.unique()
        index = torch.stack([chosen // across, chosen % across], dim=1)
    else:
        index = torch.randperm(OUT if kind == "rows" else IN, generator=generator)[:count]
    shape = reference.values_shape(kind, index, (OUT, IN), size)
    found = Deltas(index, torch.randn(shape, generator=generator), torch.empty(0))
    found.block_size = size
    return found


def dense(kinds: dict[str, Deltas]) -> Tensor:
    total = torch.zeros(OUT, IN)
    for kind, content in kinds.items():
        one = torch.zeros(OUT, IN)
        if kind == "rows":
            one[content.index] = content.delta
        elif kind == "columns":
            one[:, content.index] = content.delta
        elif kind == "grid":
            for (r, c), value in zip(grid.pairs(content.index).tolist(), content.delta, strict=True):
                one[r, c] = value
        else:
            for (r, c), block in zip(content.index.tolist(), content.delta, strict=True):
                view = one[r * content.block_size :, c * content.block_size :]
                view = view[: content.block_size, : content.block_size]
                view += block[: view.shape[0], : view.shape[1]]
        total += one
    return total


ADAPTERS: dict[int, dict[str, Deltas]] = {
    0: {"rows": deltas("rows", 5)},
    1: {"columns": deltas("columns", 7, seed=1)},
    2: {"blocks": deltas("blocks", 20, 4, seed=2)},
    3: {"blocks": deltas("blocks", 9, 8, seed=3)},
    4: {"blocks": deltas("blocks", 6, 16, seed=4)},
    5: {"rows": deltas("rows", 5, seed=5), "columns": deltas("columns", 2, seed=6)},
    6: {"rows": deltas("rows", 3, seed=7), "blocks": deltas("blocks", 20, 4, seed=8)},
    7: {},
    8: {"columns": deltas("columns", 7, seed=9)},
    9: {"blocks": deltas("blocks", 8, 1, seed=10)},
    10: {"grid": deltas("grid", 3, seed=11)},
    11: {"grid": deltas("grid", 8, seed=12), "rows": deltas("rows", 3, seed=13)},
}
CHOICES = [
    (0,),
    (-1, -1),
    (1, 1, 1),  # one adapter for all rows
    (1, 8, 1, 8),  # as many rows each
    tuple(range(12)),
    (0, 5, 6, -1, 2, 2, 2, 3, 4, 9, 7, 1, 8, 8),
    (4, 4, -1, 3, 3),
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("permuted", [False, True], ids=["", "permuted"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_dense_matrices(choice: tuple[int, ...], tokens: int, permuted: bool, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = SparseLinear(IN, OUT, transposed=transposed)
    plain = layer.logical_weight.clone()
    x = torch.randn(len(choice), tokens, IN, generator=generator)
    rows, columns = torch.randperm(OUT, generator=generator), torch.randperm(IN, generator=generator)
    bias = layer.bias.detach().clone()
    expected = torch.stack(
        [
            one @ (plain + (dense(ADAPTERS[number]) if number >= 0 else 0)).t() + bias
            for one, number in zip(x, choice, strict=True)
        ]
    )
    if permuted:
        layer.permute(rows, columns)
        x, expected = x[..., columns], expected[..., rows]
    by_row = ByRow((OUT, IN), ADAPTERS)
    for _ in range(2):  # what was made for the first call serves the next
        with torch.no_grad():
            torch.testing.assert_close(by_row.add(layer(x), x, choice, tokens, layer), expected, atol=1e-5, rtol=1e-5)
    flat = x.flatten(0, 1)
    with torch.inference_mode():
        found = by_row.add(layer(flat), flat, choice, tokens, layer)
    torch.testing.assert_close(found, expected.flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_other_calls_find_nothing_of_the_last() -> None:
    """Other rows, tokens, dtypes and an order of the weight that has changed since."""
    layer, by_row = SparseLinear(IN, OUT, bias=False), ByRow((OUT, IN), ADAPTERS)
    weight = layer.logical_weight.clone()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for choice in ((2, 0), (0, 2), (2, 0, 3)):
            for tokens in (1, 3, 2):
                x = torch.randn(len(choice), tokens, IN, generator=generator)
                expected = torch.stack(
                    [one @ (weight + dense(ADAPTERS[n])).t() for one, n in zip(x, choice, strict=True)]
                )
                torch.testing.assert_close(
                    by_row.add(layer(x), x, choice, tokens, layer), expected, atol=1e-5, rtol=1e-5
                )
                columns = torch.randperm(IN, generator=generator)
                layer.permute(None, columns)
                found = by_row.add(layer(x[..., columns]), x[..., columns], choice, tokens, layer)
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
                layer.permute()
                half = by_row.add(nn.functional.linear(x.double(), weight.double()), x.double(), choice, tokens, layer)
                torch.testing.assert_close(half.float(), expected, atol=1e-5, rtol=1e-5)


def test_the_gradient_of_the_input_is_each_rows_own() -> None:
    layer, choice = nn.Linear(IN, OUT), (6, -1, 4, 1)
    x = torch.randn(4, 3, IN, requires_grad=True)
    found = ByRow((OUT, IN), ADAPTERS).add(layer(x), x, choice, 3, layer)
    grad = torch.randn_like(found)
    (got,) = torch.autograd.grad(found, x, grad)
    matrices: list[Any] = [layer.weight + (dense(ADAPTERS[n]) if n >= 0 else 0) for n in choice]
    expected = torch.stack([one @ matrix for one, matrix in zip(grad, matrices, strict=True)])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_grid_and_blocks_on_the_same_rows_are_both_added() -> None:
    """In an order of its own the weight's blocks are features as a grid's are: 4 by 4 both, and both in row 0 to 3."""
    square = Deltas(grid.encode(torch.arange(4), torch.arange(4)), torch.randn(16), torch.empty(0))
    block = Deltas(torch.tensor([[0, 0]]), torch.randn(1, 4, 4), torch.empty(0))
    block.block_size = 4
    adapter = {"grid": square, "blocks": block}
    layer, x = SparseLinear(IN, OUT), torch.randn(2, 3, IN)
    expected = (x @ (layer.logical_weight + dense(adapter)).t() + layer.bias).detach()
    rows, columns = torch.randperm(OUT), torch.randperm(IN)
    layer.permute(rows, columns)
    with torch.no_grad():
        found = ByRow((OUT, IN), {0: adapter}).add(layer(x[..., columns]), x[..., columns], (0, 0), 3, layer)
    torch.testing.assert_close(found, expected[..., rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 2, IN), (2, 3, IN), (7, IN), (6, IN), (IN,), (2, 1, 2, IN)])
def test_other_numbers_of_rows_are_refused(shape: tuple[int, ...]) -> None:
    layer, x = nn.Linear(IN, OUT), torch.zeros(shape)
    with pytest.raises(RunError, match="no 2 rows of 2 tokens"):
        ByRow((OUT, IN), ADAPTERS).add(layer(x), x, (0, 1), 2, layer)


def test_several_adapters_of_one_shape_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = {n: {"columns": deltas("columns", 7, seed=n)} for n in range(16)}
    layer, x, choice = nn.Linear(IN, OUT), torch.randn(32, 1, IN), tuple(n % 16 for n in range(32))
    by_row = ByRow((OUT, IN), adapters)
    calls: list[Tensor] = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *args, **kwargs: calls.append(args[0]) or bmm(*args, **kwargs))
    with torch.no_grad():
        by_row.add(layer(x), x, choice, 1, layer)
    assert [call.shape for call in calls] == [(16, 2, 7)]

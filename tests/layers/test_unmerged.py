"""The `delta` compute path against the written weights: the same products and the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparseft.layers import SparseLinear, sparse_layers

PATTERNS = {  # of a weight (29, 37); blocks of 8, edge ones among them
    "rows": ("rows", [3, 28, 7], None),
    "a run of rows": ("rows", [4, 5, 6], None),
    "columns": ("columns", [36, 0, 11, 12], None),
    "a run of columns": ("columns", [0, 1], None),
    "blocks": ("blocks", [[0, 0], [3, 4], [3, 1], [0, 4], [2, 2]], 8),
    "grid": ("grid", ([3, 28, 7], [36, 0, 11, 12]), None),
    "grids": ("grid", [3, 28, -1, -37, -12, 7, -1, -2, 5, 6, -37], None),  # columns that several of them share
    "all blocks": ("blocks", [[row, column] for row in range(4) for column in range(5)], 8),
}


def layer_with(*kinds: str, transposed: bool = False, dtype: torch.dtype = torch.float32) -> SparseLinear:
    torch.manual_seed(0)
    layer = SparseLinear(37, 29, transposed=transposed).to(dtype)
    for name in kinds:
        layer.add_pattern(*PATTERNS[name])
    with torch.no_grad():
        for pattern in layer.patterns.values():
            pattern.delta.normal_(0, 0.1)
            if pattern.kind == "blocks":  # outside the weight there is nothing
                for value, (row, column) in zip(pattern.delta, pattern.index.tolist(), strict=True):
                    value[29 - row * 8 :] = 0
                    value[:, 37 - column * 8 :] = 0
    layer.write_back()
    return layer


def outcome(layer: SparseLinear, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    grads = tuple(pattern.delta.grad for pattern in layer.patterns.values())
    for pattern in layer.patterns.values():
        pattern.delta.grad = None
    return (y.detach(), x.grad, *grads)


@pytest.mark.parametrize("shape", [(5, 37), (2, 3, 37), (1, 1, 37), (0, 37)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kinds", [*((name,) for name in PATTERNS), ("rows", "columns", "blocks", "grid")], ids=str)
def test_both_paths_compute_the_same(kinds: tuple[str, ...], transposed: bool, shape: tuple[int, ...]) -> None:
    layer = layer_with(*kinds, transposed=transposed, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    expected = outcome(layer, x)
    written = layer.weight.detach().clone()
    layer.unmerge()
    assert not torch.equal(layer.weight, written)  # it holds the base
    for got, want in zip(outcome(layer, x), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # deltas are fp32
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", PATTERNS)
def test_half_precision_differs_by_its_own_rounding(kind: str) -> None:
    layer = layer_with(kind, dtype=torch.bfloat16)
    x = torch.randn(64, 37).bfloat16()
    layer.unmerge()
    pattern = next(iter(layer.patterns.values()))
    exact = SparseLinear(37, 29).to(torch.float64)
    exact.weight.data.copy_(layer.weight)
    exact.bias.data.copy_(layer.bias)
    exact.add_pattern(*PATTERNS[kind])
    with torch.no_grad():
        exact.patterns[pattern.kind].delta.copy_(pattern.delta)
    want = exact(x.double())
    assert (layer(x).double() - want).abs().max() < 2**-6 * want.abs().max()


def test_steps_change_the_function_and_not_the_weight() -> None:
    layer = layer_with("blocks")
    layer.unmerge()
    base = layer.weight.detach().clone()
    x = torch.randn(4, 37)
    before = layer(x)
    optimizer = torch.optim.AdamW(pattern.delta for pattern in layer.patterns.values())
    before.sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight, base)
    after = layer(x).detach()
    assert not torch.equal(after, before)


def test_a_model_takes_the_path(make_model: Any) -> None:
    import sparseft

    config = sparseft.S2FTConfig(sparsity=0.8, roles=["v", "o", "up", "down"], layout="permuted")
    model = sparseft.attach(make_model("llama"), config)
    with torch.no_grad():
        for parameter in sparseft.trainable_parameters(model).values():
            parameter.normal_(0, 0.05)
    tokens = torch.arange(12).reshape(2, 6)
    expected = model(tokens).logits
    for layer in sparse_layers(model).values():
        layer.unmerge()
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-4)


def test_inactive_entries_need_the_written_weight() -> None:
    from sparseft.layers.inactive import swap

    layer = layer_with("rows")
    swap(layer, "rows", torch.tensor([3, 9, 10]))
    with pytest.raises(ValueError, match="inactive"):
        layer.unmerge()

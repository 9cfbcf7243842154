"""Deltas beside a module against deltas in a weight, and against a dense mirror: products, gradients, undoing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparseft
from sparseft.errors import UserError
from sparseft.kernels import reference
from sparseft.layers import BesideLinear, SparseLinear, put_beside, sparse_layers
from sparseft.models.packed.quantized import dequantized
from support.nf4 import NF4Linear, quantize

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
EVERY = ("rows", "columns", "blocks", "grid")
EPSILON = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 2**-7}


def dense(*, transposed: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    if transposed:
        from transformers.pytorch_utils import Conv1D

        return Conv1D(29, 37).to(dtype)
    return nn.Linear(37, 29).to(dtype)


def trained(layer: SparseLinear, *names: str) -> SparseLinear:
    """The layer with deltas, zero where a block lies outside the weight."""
    generator = torch.Generator().manual_seed(1)
    for name in names:
        layer.add_pattern(*PATTERNS[name])
    with torch.no_grad():
        for pattern in layer.patterns.values():
            pattern.delta.copy_(torch.randn(pattern.delta.shape, generator=generator) * 0.1)
            if pattern.kind == "blocks":
                for value, (row, column) in zip(pattern.delta, pattern.index.tolist(), strict=True):
                    value[29 - row * 8 :] = 0
                    value[:, 37 - column * 8 :] = 0
    layer.write_back()
    return layer


def outcome(layer: Any, x: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    grads = tuple(pattern.delta.grad for pattern in layer.patterns.values())
    for pattern in layer.patterns.values():
        pattern.delta.grad = None
    return (y.detach(), x.grad, *grads)


@pytest.mark.parametrize("shape", [(5, 37), (2, 3, 37), (1, 1, 37), (0, 37)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("names", [*((name,) for name in PATTERNS), EVERY], ids=str)
def test_beside_a_weight_as_within_it(names: tuple[str, ...], transposed: bool, shape: tuple[int, ...]) -> None:
    linear = dense(transposed=transposed, dtype=torch.float64)
    base = linear.weight.detach().clone()
    beside = trained(BesideLinear.wrap(copy.deepcopy(linear)), *names)
    within = trained(SparseLinear.wrap(linear), *names)
    x = torch.randn(shape, dtype=torch.float64)
    for got, want in zip(outcome(beside, x), outcome(within, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # deltas are fp32
    assert torch.equal(beside.weight, base)
    assert not torch.equal(within.weight, base)
    with torch.no_grad():
        torch.testing.assert_close(beside(x), within(x), rtol=1e-6, atol=1e-6)


def mirror(layer: Any, x: Tensor) -> tuple[Tensor, ...]:
    """The same by one dense product in float64, with autograd's gradient of the whole matrix."""
    weight = dequantized(layer.base).double()
    for pattern in layer.patterns.values():
        entries = reference.gather(weight, pattern.kind, pattern.index, pattern.block_size)
        entries = entries + pattern.compact.double()
        reference.scatter_(weight, pattern.kind, pattern.index, entries, pattern.block_size)
    weight.requires_grad_()
    x = x.double().requires_grad_()
    y = F.linear(x, weight, layer.bias.double())
    y.square().sum().backward()
    grads = (reference.gather(weight.grad, p.kind, p.index, p.block_size) for p in layer.patterns.values())
    return (y.detach(), x.grad, *grads)


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("names", [*((name,) for name in PATTERNS), EVERY], ids=str)
def test_beside_four_bits_as_a_dense_mirror(names: tuple[str, ...], dtype: torch.dtype) -> None:
    base = NF4Linear(dense(dtype=dtype))
    layer = trained(BesideLinear.wrap(base), *names)
    x = torch.randn(3, 7, 37).to(dtype)
    for got, want in zip(outcome(layer, x), mirror(layer, x), strict=True):
        assert (got.double() - want).abs().max() <= 2 * EPSILON[dtype] * want.abs().max()  # of deltas fp32 at most
    for pattern in layer.patterns.values():
        assert pattern.delta.dtype == torch.float32
        assert pattern.compact.dtype == dtype


def test_fresh_patterns_change_no_bit_and_the_base_is_never_touched() -> None:
    base = NF4Linear(dense(dtype=torch.bfloat16))
    packed = base.weight.detach().clone()
    x = torch.randn(4, 37).bfloat16()
    want = base(x)
    layer = BesideLinear.wrap(base)
    assert torch.equal(layer(x), want)
    for name in EVERY:
        layer.add_pattern(*PATTERNS[name])
    assert torch.equal(layer(x), want)
    trained(layer)
    assert not torch.equal(layer(x), want)
    assert torch.equal(base.weight, packed)
    assert torch.equal(layer.unwrap()(x), want)


@pytest.mark.parametrize("optimizer", ["AdamW", "SparseAdamW"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_write_the_parts(optimizer: str, dtype: torch.dtype) -> None:
    """As AdamW steps a dense mirror's entries, and the parts hold the deltas, rounded once."""
    kind = sparseft.SparseAdamW if optimizer == "SparseAdamW" else torch.optim.AdamW
    layer = BesideLinear.wrap(NF4Linear(dense(dtype=dtype)))
    for name in EVERY:
        layer.add_pattern(*PATTERNS[name])
    deltas = [pattern.delta for pattern in layer.patterns.values()]
    own = kind(deltas, lr=1e-2)
    for step in range(3):
        x = torch.randn(6, 37, generator=torch.Generator().manual_seed(step)).to(dtype)
        layer(x).float().square().sum().backward()
        own.step()
        own.zero_grad()
        for pattern in layer.patterns.values():
            assert pattern.delta.any()
            assert torch.equal(pattern.compact, pattern.delta.detach().to(dtype))
            assert not pattern.stale
    assert layer.is_written
    with torch.no_grad():
        layer.rows.delta.zero_()
    layer(x)  # sees what was changed by hand
    assert not layer.rows.compact.any()


def test_a_stale_graph_is_refused() -> None:
    layer = trained(BesideLinear.wrap(NF4Linear(dense())), "columns")
    loss = layer(torch.randn(4, 37, requires_grad=True)).sum()
    with torch.no_grad():
        layer.columns.delta.add_(1)
    layer.write_back()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copies_casts_and_state_dicts() -> None:
    layer = trained(BesideLinear.wrap(NF4Linear(dense())), "rows", "blocks")
    x = torch.randn(4, 37)
    want = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), want)
    assert twin._parameters is twin.base._parameters
    with torch.no_grad():
        twin.rows.delta.zero_()
    assert torch.equal(layer(x), want)
    fresh = BesideLinear.wrap(NF4Linear(dense()))
    fresh.add_pattern(*PATTERNS["rows"])
    fresh.add_pattern(*PATTERNS["blocks"])
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), want)
    base = NF4Linear(dense())
    assert base.state_dict().keys() == {"weight", "bias", "scales"}
    fresh.load_state_dict(base.state_dict(), strict=False)  # a plain checkpoint: the deltas start anew
    assert torch.equal(fresh(x), base(x))
    half = twin.bfloat16()
    assert half.rows.compact.dtype == torch.bfloat16
    assert half.rows.delta.dtype == torch.float32
    wide = trained(BesideLinear.wrap(NF4Linear(dense(dtype=torch.bfloat16))), "rows", "blocks").float()
    assert torch.equal(wide.rows.compact, wide.rows.base_values + wide.rows.delta)  # not what bf16 had left of it
    assert wide.is_written
    with pytest.raises(TypeError, match="wrap"):
        BesideLinear(3, 4)
    with pytest.raises(ValueError, match="order"):
        layer.permute(torch.arange(29))
    with pytest.raises(UserError, match="Sequential"):
        BesideLinear.wrap(nn.Sequential(nn.Linear(2, 2)))


CONFIGS = {
    "columns and rows": sparseft.S2FTConfig(sparsity=0.9, roles=["v", "o", "up", "down"], importance="random"),
    "permuted": sparseft.S2FTConfig(sparsity=0.9, roles=["o", "down"], layout="permuted", importance="random"),
    "blocks": sparseft.SylvaConfig(sparsity=0.9, importance="random", block_size=8),
    "grid": sparseft.LosiaConfig(importance="random", reselect_steps=0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantized_model_trains_switches_and_goes_back(name: str, make_model: Any, tmp_path: Path) -> None:
    model = quantize(make_model("llama"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tokens = torch.arange(12).reshape(2, 6)
    base = model(tokens).logits
    model = sparseft.attach(model, CONFIGS[name])
    layers = sparse_layers(model)
    assert layers and all(layer.beside for layer in layers.values())
    assert torch.equal(model(tokens).logits, base)
    own = sparseft.SparseAdamW(sparseft.trainable_parameters(model).values(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        own.step()
        own.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    learnt = model(tokens).logits
    assert torch.equal(sparseft.set_adapter(model, None)(tokens).logits, base)
    assert torch.equal(sparseft.set_adapter(model, "default")(tokens).logits, learnt)
    folder = sparseft.save_adapter(model, tmp_path / "adapter")
    assert {file.name for file in folder.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    model = sparseft.detach(model)
    assert torch.equal(model(tokens).logits, base)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model = sparseft.load_adapter(model, folder)
    assert torch.equal(model(tokens).logits, learnt)
    sparseft.fuse(model, {"default": 0.5}, "half")
    assert not torch.equal(model(tokens).logits, learnt)


class Codes(nn.Module):
    """A packed linear without a parameter `weight`, as HQQ's are."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.W_q = nn.Parameter(linear.weight.detach().mul(64).round().to(torch.int8), requires_grad=False)

    def dequantize(self) -> Tensor:
        return self.W_q.float() / 64

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize())


@pytest.mark.parametrize("importance", ["random", "weight"])
def test_a_packed_linear_may_keep_its_codes_under_any_name(
    importance: str, make_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def coded() -> nn.Module:
        model = make_model("llama")
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and "layers" in name:
                model.set_submodule(name, Codes(module))
        return model

    model, tokens = coded(), torch.arange(12).reshape(2, 6)
    base = model(tokens).logits
    sparseft.attach(model, sparseft.SylvaConfig(sparsity=0.9, importance=importance, block_size=8))
    own = sparseft.SparseAdamW(sparseft.trainable_parameters(model).values(), lr=1e-2)
    model(tokens, labels=tokens).loss.backward()
    own.step()
    learnt = model(tokens).logits
    assert not torch.equal(learnt, base)
    assert torch.equal(sparseft.set_adapter(model, None)(tokens).logits, base)
    assert torch.equal(sparseft.set_adapter(model, "default")(tokens).logits, learnt)
    loaded = sparseft.load_adapter(coded(), sparseft.save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(loaded(tokens).logits, learnt)
    assert "could not be run" not in capsys.readouterr().err  # the look at which linears train


def test_put_beside_keeps_the_function(make_model: Any) -> None:
    config = sparseft.S2FTConfig(sparsity=0.8, roles=["v", "o", "up", "down"], layout="permuted")
    model = sparseft.attach(make_model("llama"), config)
    with torch.no_grad():
        for parameter in sparseft.trainable_parameters(model).values():
            parameter.normal_(0, 0.05)
    tokens = torch.arange(12).reshape(2, 6)
    expected = model(tokens).logits
    names = set(sparseft.trainable_parameters(model))
    put_beside(model)
    assert set(sparseft.trainable_parameters(model)) == names
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-4)


def test_inactive_entries_need_the_written_weight() -> None:
    from sparseft.layers.inactive import swap

    layer = trained(SparseLinear.wrap(dense()), "rows")
    swap(layer, "rows", torch.tensor([3, 9, 10]))
    with pytest.raises(ValueError, match="inactive"):
        put_beside(nn.ModuleList([layer]))

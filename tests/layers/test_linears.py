"""The sparse layers alone, against `nn.Linear` and Conv1D trained by autograd."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from sparseft.errors import UserError
from sparseft.layers import BlockSparseLinear, S2ColumnLinear, S2RowLinear, SparseLinear, write_back
from sparseft.layers.convert import CLASSES
from sparseft.layers.write_back import layers_of

OUT, IN = 10, 7  # not square, and divisible by no block size below
PATTERNS: dict[str, dict[str, Any]] = {
    "rows": {"rows": [7, 0, 9]},
    "columns": {"columns": [6, 2]},
    "blocks": {"blocks": [[2, 1], [0, 0], [1, 1]]},  # (2, 1) is cut on both sides; 2 of 2 block columns: saves x
    "few_blocks": {"blocks": [[2, 2], [0, 2]], "block_size": 3},  # 1 of 3 block columns: saves a slice
    "grid": {"grid": ([7, 0, 9], [6, 2])},
    "grids": {"grid": [7, 0, -7, -3, 1, -7, -1]},  # of what has trained several: 2 × 2 and 1 × 2
    "mixed": {"rows": [0, 5], "columns": [6, 1], "blocks": [[0, 0], [2, 1]], "grid": ([0, 3], [6, 0])},  # overlapping
}


def mask_of(pattern: dict[str, Any], shape: tuple[int, int] = (OUT, IN)) -> Tensor:
    """Which entries of the weight a pattern covers, by plain slicing."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[pattern.get("rows", [])] = True
    mask[:, pattern.get("columns", [])] = True
    size = pattern.get("block_size", 4)
    for r, c in pattern.get("blocks", []):
        mask[r * size : (r + 1) * size, c * size : (c + 1) * size] = True
    for r, c in crossings(pattern.get("grid", [])):
        mask[r, c] = True
    return mask


def crossings(index: Any) -> list[tuple[int, int]]:
    """The entries (row, column) of grids, one after another, each row by row."""
    if isinstance(index, tuple):
        return [(r, c) for r in index[0] for c in index[1]]
    found: list[tuple[int, int]] = []
    rows: list[int] = []
    columns: list[int] = []
    for number in [*index, 0]:  # a row behind columns ends the grid before
        if number >= 0 and columns:
            found += [(r, c) for r in rows for c in columns]
            rows, columns = [], []
        (rows if number >= 0 else columns).append(number if number >= 0 else -1 - number)
    return found


def dense_part(dense: Tensor, kind: str, pattern: dict[str, Any]) -> Tensor:
    """The pattern's entries of a dense (out, in) matrix in the delta's shape, by plain slicing."""
    if kind == "rows":
        return torch.stack([dense[r] for r in pattern["rows"]])
    if kind == "columns":
        return torch.stack([dense[:, c] for c in pattern["columns"]], dim=1)
    if kind == "grid":
        return torch.stack([dense[r, c] for r, c in crossings(pattern["grid"])])
    size = pattern.get("block_size", 4)
    out = torch.zeros(len(pattern["blocks"]), size, size, dtype=dense.dtype)
    for n, (r, c) in enumerate(pattern["blocks"]):
        part = dense[r * size : (r + 1) * size, c * size : (c + 1) * size]
        out[n, : part.shape[0], : part.shape[1]] = part
    return out


def make_linear(conv: bool = False, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if conv:
        linear = Conv1D(OUT, IN)
        nn.init.normal_(linear.weight)
        nn.init.normal_(linear.bias)
        return linear.to(dtype)
    return nn.Linear(IN, OUT, bias=bias).to(dtype)


def convert(linear: nn.Module, pattern: dict[str, Any]) -> SparseLinear:
    layer = CLASSES.get(tuple(k for k in pattern if k != "block_size"), SparseLinear).wrap(linear)
    for kind in ("rows", "columns", "blocks", "grid"):
        if kind in pattern:
            layer.add_pattern(kind, pattern[kind], pattern.get("block_size", 4) if kind == "blocks" else None)
    return layer


def layer_of(name: str, seed: int = 0, **options: Any) -> SparseLinear:
    return convert(make_linear(seed=seed, **options), PATTERNS[name])


def logical(module: nn.Module) -> Tensor:
    weight = module.weight.detach()
    return weight.t() if type(module).__name__ == "Conv1D" or getattr(module, "transposed", False) else weight


def deltas(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if p.requires_grad]


def randomise(layer: SparseLinear, scale: float = 0.1) -> None:
    """Random deltas, zero outside the weight, as training leaves them; written."""
    with torch.no_grad():
        for kind, pattern in layer.patterns.items():
            inside = dense_part(
                torch.ones(OUT, IN), kind, {kind: pattern.index.tolist(), "block_size": pattern.block_size}
            )
            pattern.delta.copy_(torch.randn_like(pattern.delta) * scale * inside)
    layer.write_back()


names = pytest.mark.parametrize("name", list(PATTERNS))


# ---- forward and gradients ----


@names
@pytest.mark.parametrize(("conv", "bias"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", [(IN,), (1, IN), (5, IN), (2, 1, IN), (2, 5, IN), (2, 3, 4, IN), (0, IN), (2, 0, IN)])
def test_matches_a_dense_layer(name: str, conv: bool, bias: bool, shape: tuple[int, ...]) -> None:
    dense = make_linear(conv, bias)
    layer = convert(copy.deepcopy(dense), PATTERNS[name])
    x, x_dense = (torch.randn(shape, generator=torch.Generator().manual_seed(3)).requires_grad_() for _ in range(2))
    y, y_dense = layer(x), dense(x_dense)
    assert torch.equal(y, y_dense)
    upstream = torch.randn(y.shape)
    y.backward(upstream)
    y_dense.backward(upstream)
    torch.testing.assert_close(x.grad, x_dense.grad)
    gradient = dense.weight.grad.t() if conv else dense.weight.grad
    for kind, pattern in layer.patterns.items():
        assert pattern.delta.grad.dtype == torch.float32
        torch.testing.assert_close(pattern.delta.grad, dense_part(gradient, kind, PATTERNS[name]))
    assert layer.weight.grad is None and (layer.bias is None or layer.bias.grad is None)


@names
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_dtypes(name: str, dtype: torch.dtype, tolerance: float) -> None:
    dense = make_linear(dtype=dtype)
    layer = convert(copy.deepcopy(dense), PATTERNS[name])
    x = torch.randn(6, IN, dtype=dtype)
    assert torch.equal(layer(x), dense(x))
    layer(x).square().sum().backward()
    dense(x).square().sum().backward()
    for kind, pattern in layer.patterns.items():
        assert pattern.delta.dtype == pattern.delta.grad.dtype == torch.float32
        assert pattern.base_values.dtype == dtype
        expected = dense_part(dense.weight.grad.float(), kind, PATTERNS[name])
        torch.testing.assert_close(pattern.delta.grad, expected, rtol=tolerance, atol=tolerance * expected.abs().max())
    before = layer.weight.clone()
    layer.write_back()  # a delta of zero: no dtype loses a bit of the base
    assert torch.equal(layer.weight, before)


@names
@pytest.mark.parametrize("conv", [False, True])
def test_autocast(name: str, conv: bool) -> None:
    dense = make_linear(conv)
    layer = convert(copy.deepcopy(dense), PATTERNS[name])
    x, x_dense = torch.randn(6, IN).requires_grad_(), None
    x_dense = x.detach().clone().requires_grad_()
    saved: list[Tensor] = []
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = layer(x)
        y_dense = dense(x_dense)
    assert y.dtype == torch.bfloat16 and torch.equal(y, y_dense)
    y.float().square().sum().backward()
    y_dense.float().square().sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, x_dense.grad)
    gradient = dense.weight.grad.t() if conv else dense.weight.grad
    for kind, pattern in layer.patterns.items():
        assert pattern.delta.grad.dtype == torch.float32
        expected = dense_part(gradient, kind, PATTERNS[name])
        torch.testing.assert_close(pattern.delta.grad, expected, rtol=2e-2, atol=2e-2 * expected.abs().max())
    slices = [t for t in saved if t.is_floating_point() and t.data_ptr() not in (x.data_ptr(), layer.weight.data_ptr())]
    assert all(t.dtype == torch.bfloat16 for t in slices)  # a slice is kept in the precision it was used in


@names
def test_gradcheck_in_float64(name: str) -> None:
    """y as a function of x, by finite differences."""
    layer = layer_of(name, dtype=torch.float64)
    assert torch.autograd.gradcheck(layer, (torch.randn(3, IN, dtype=torch.float64, requires_grad=True),))


@names
def test_second_derivatives_are_an_error_and_not_wrong(name: str) -> None:
    layer = layer_of(name)
    x = torch.randn(3, IN, requires_grad=True)
    gradient = torch.autograd.grad(layer(x).square().sum(), deltas(layer)[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@names
def test_no_gradient_no_graph(name: str) -> None:
    layer = layer_of(name)
    with torch.no_grad():
        assert not layer(torch.randn(2, IN)).requires_grad
    for parameter in deltas(layer):
        parameter.requires_grad_(False)
    x = torch.randn(2, IN, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, IN))


@names
def test_a_bias_that_falcon_adds_to_the_rounded_product(name: str) -> None:
    torch.manual_seed(0)
    plain = FalconLinear(IN, OUT).bfloat16()
    x = torch.randn(200, IN).bfloat16()
    expected = plain(x).detach()
    assert not torch.equal(expected, F.linear(x, plain.weight, plain.bias))  # which rounds once
    layer = convert(copy.deepcopy(plain), PATTERNS[name])
    assert torch.equal(layer(x), expected)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
        deltas(layer)[0].normal_()  # by hand, without an optimizer
    changed = layer(x)
    changed.float().square().sum().backward()
    assert torch.equal(changed, x @ layer.weight.T + layer.bias) and not torch.equal(changed, expected)
    assert deltas(layer)[0].grad is not None


def test_a_thawed_bias_trains_as_in_a_linear() -> None:
    dense = make_linear()
    layer = convert(copy.deepcopy(dense), PATTERNS["rows"])
    layer.bias.requires_grad_(True)
    x = torch.randn(4, IN)
    layer(x).square().sum().backward()
    dense(x).square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


# ---- what backward keeps ----


def saved_storages(function: Callable[[], Any], ignore: list[Tensor]) -> dict[int, int]:
    """Storage address -> bytes of what autograd saves in `function`, indices and `ignore` aside."""
    found: dict[int, int] = {}
    skip = {t.untyped_storage().data_ptr() for t in ignore}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if t.is_floating_point() and storage.data_ptr() not in skip:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        keep = function()  # noqa: F841  (storages must stay alive while their addresses are compared)
    return found


def test_columns_keep_only_their_slice() -> None:
    torch.manual_seed(0)
    layer = S2RowLinear(64, 32, columns=range(0, 32, 2))
    x = torch.randn(5, 9, 64)
    saved = saved_storages(lambda: layer(x), [layer.weight])
    assert x.untyped_storage().data_ptr() not in saved
    assert list(saved.values()) == [5 * 9 * 16 * 4]  # tokens × columns × fp32, in a storage of its own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [[3, 60, 9], range(20, 31), [5], range(8, 16)])
def test_rows_of_a_slice_are_aligned(columns: Any, dtype: torch.dtype) -> None:
    """Products of halves are slow where rows begin elsewhere; what is between them is no part of the result."""
    torch.manual_seed(0)
    layer = S2RowLinear(64, 33, columns=columns, dtype=dtype)
    x, upstream = torch.randn(5, 9, 64).to(dtype), torch.randn(5, 9, 33).to(dtype)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    y.backward(upstream)
    (kept,) = [t for t in saved if t.shape[:-1] == (5, 9)]
    step = -(-len(columns) // 8) * 8
    assert kept.shape[-1] == len(columns) and kept.stride() == (9 * step, step, 1)
    assert torch.equal(kept, x[..., list(columns)])
    assert kept.untyped_storage().nbytes() == 45 * step * dtype.itemsize
    expected = upstream.double().flatten(0, 1).t() @ x.double().flatten(0, 1)[:, list(columns)]
    torch.testing.assert_close(layer.delta.grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_share_x_with_their_siblings() -> None:
    torch.manual_seed(0)
    q, k = S2ColumnLinear(64, 32, rows=[0, 1]), S2ColumnLinear(64, 16, rows=[5])
    x = torch.randn(5, 9, 64)
    saved = saved_storages(lambda: (q(x), k(x)), [q.weight, k.weight])
    assert list(saved) == [x.untyped_storage().data_ptr()]


@pytest.mark.parametrize(("blocks", "expected"), [([[0, 1], [3, 1]], 45 * 16 * 4), ([[0, 0], [0, 1], [0, 3]], None)])
def test_blocks_keep_the_smaller_of_slice_and_x(blocks: list[list[int]], expected: int | None) -> None:
    torch.manual_seed(0)
    layer = BlockSparseLinear(64, 64, blocks=blocks, block_size=16)
    x = torch.randn(5, 9, 64)
    saved = saved_storages(lambda: layer(x), [layer.weight])
    if expected is None:
        assert list(saved) == [x.untyped_storage().data_ptr()]
    else:
        assert list(saved.values()) == [expected] and x.untyped_storage().data_ptr() not in saved


# ---- training ----

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, foreach=True),
    "adamw_single": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, foreach=False),
    "adamw_fused": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=0.1),
    "adam_amsgrad_fused": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True, fused=True),
    "sgd_foreach": lambda p: torch.optim.SGD(p, 1e-2, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, fused=True),
    "asgd": lambda p: torch.optim.ASGD(p, 1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, 1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2),
    "radam": lambda p: torch.optim.RAdam(p, 1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1.0),
    "torch_adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
    "hf_adafactor": lambda p: transformers.Adafactor(p, 1e-2, relative_step=False, scale_parameter=False),
}


def train(layer: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, clip: float | None = 1.0) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x = torch.randn(6, IN, generator=generator).to(layer.weight.dtype)
        layer(x).float().square().mean().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(layer.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


@names
def test_an_optimizer_that_evaluates_again_within_a_step(name: str) -> None:
    """L-BFGS changes the deltas and calls the closure several times before its step ends."""
    layer = layer_of(name)
    optimizer = torch.optim.LBFGS(deltas(layer), lr=0.5, max_iter=4)
    x = torch.randn(6, IN, generator=torch.Generator().manual_seed(5))
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = layer(x).square().mean()
        effective = copy.deepcopy(layer)
        effective.write_back()
        assert torch.equal(effective(x), layer(x))
        loss.backward()
        losses.append(loss.item())
        return loss

    optimizer.step(closure)
    assert len(losses) > 2
    assert losses[-1] < losses[0] and layer(x).square().mean() <= losses[-1] + 1e-6
    assert not any(pattern.stale for pattern in layer.patterns.values())


@names
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_every_optimizer_writes_the_pattern_and_nothing_else(name: str, optimizer: str) -> None:
    layer = layer_of(name)
    before = layer.weight.clone()
    train(layer, OPTIMIZERS[optimizer](deltas(layer)))
    mask = mask_of(PATTERNS[name])
    assert torch.equal(layer.weight[~mask], before[~mask])
    assert (layer.weight[mask] != before[mask]).float().mean() > 0.9
    total = before.clone()
    for kind, pattern in layer.patterns.items():  # base + every delta, entry by entry
        spread = torch.zeros(OUT, IN)
        items = pattern.index.tolist()
        for n, item in enumerate(crossings(items) if kind == "grid" else items):
            if kind == "grid":
                spread[item] = pattern.delta[n].detach()
            elif kind == "rows":
                spread[item] = pattern.delta[n].detach()
            elif kind == "columns":
                spread[:, item] = pattern.delta[:, n].detach()
            else:
                size = pattern.block_size
                part = spread[item[0] * size : (item[0] + 1) * size, item[1] * size : (item[1] + 1) * size]
                part.copy_(pattern.delta[n, : part.shape[0], : part.shape[1]].detach())
                assert pattern.delta[n].count_nonzero() == part.count_nonzero()  # nothing learnt outside the weight
        total = total + spread
    torch.testing.assert_close(layer.weight.detach(), total, rtol=0, atol=1e-6)
    layer.restore_base()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("name", ["rows", "columns", "blocks", "few_blocks"])
def test_trains_as_a_masked_dense_layer(name: str) -> None:
    """The same steps as a dense layer whose gradient is masked (SGD: no decay of what is frozen)."""
    dense = make_linear()
    layer = convert(copy.deepcopy(dense), PATTERNS[name])
    mask = mask_of(PATTERNS[name])
    dense.bias.requires_grad_(False)
    dense.weight.register_hook(lambda grad: grad * mask)
    train(layer, torch.optim.SGD(deltas(layer), 0.1, momentum=0.9), steps=8)
    train(dense, torch.optim.SGD([dense.weight], 0.1, momentum=0.9), steps=8)
    torch.testing.assert_close(layer.weight, dense.weight.detach(), rtol=1e-5, atol=1e-6)


@names
def test_thousand_small_bf16_steps_are_not_lost(name: str) -> None:
    layer = layer_of(name, dtype=torch.bfloat16)
    before = layer.weight.clone()
    lossy = layer.weight.clone()
    optimizer = torch.optim.SGD(deltas(layer), lr=1e-6)
    for _ in range(1000):
        for parameter in deltas(layer):
            parameter.grad = torch.full_like(parameter, -1.0)
        optimizer.step()
        lossy += 1e-6  # what bf16 alone makes of it, where the weight is not tiny
    mask = mask_of(PATTERNS[name])
    large = before.abs() > 0.01
    assert torch.equal(lossy[large], before[large])
    assert torch.equal(layer.weight[~mask], before[~mask])
    small = mask & (before.abs() < 0.125)  # where a thousandth is more than a step of bf16
    assert small.any() and (layer.weight[small] > before[small]).all()
    for kind, pattern in layer.patterns.items():
        wanted = dense_part(torch.full((OUT, IN), 1e-3), kind, PATTERNS[name])
        if kind != "blocks":
            torch.testing.assert_close(pattern.delta.detach(), wanted, rtol=1e-3, atol=0)
        if name in ("rows", "columns"):
            assert torch.equal(
                dense_part(layer.weight, kind, PATTERNS[name]), (pattern.base_values + wanted).bfloat16()
            )


@names
def test_micro_batches_add_up(name: str) -> None:
    whole, parts = layer_of(name), layer_of(name)
    x = torch.randn(8, IN)
    whole(x).square().sum().backward()
    for chunk in x.split(3):
        parts(chunk).square().sum().backward()
    for a, b in zip(deltas(whole), deltas(parts), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    parts.zero_grad()
    assert all(p.grad is None for p in parts.parameters())
    parts(x).square().sum().backward()
    for a, b in zip(deltas(whole), deltas(parts), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@names
def test_one_layer_twice_in_a_graph(name: str) -> None:
    layer, dense = layer_of(name), make_linear()
    mix = torch.randn(OUT, IN)
    x = torch.randn(4, IN)
    layer(layer(x) @ mix).square().mean().backward()
    dense(dense(x) @ mix).square().mean().backward()
    for kind, pattern in layer.patterns.items():
        torch.testing.assert_close(pattern.delta.grad, dense_part(dense.weight.grad, kind, PATTERNS[name]))


@names
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    plain, layer = layer_of(name), layer_of(name)
    x = torch.randn(4, IN, requires_grad=True)
    plain(x).tanh().sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(lambda t: layer(t).tanh(), x, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(x.grad, expected)
    for a, b in zip(deltas(plain), deltas(layer), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@names
def test_skipped_step_changes_nothing(name: str) -> None:
    """As a gradient scaler does when it meets an infinity: backward without a step."""
    layer = layer_of(name)
    before = layer.weight.clone()
    optimizer = torch.optim.AdamW(deltas(layer), 1e-2)
    layer(torch.randn(3, IN)).sum().backward()
    optimizer.zero_grad()
    layer(torch.randn(3, IN))
    assert torch.equal(layer.weight, before)


def test_delta_changed_by_hand_is_seen_by_forward_and_state_dict() -> None:
    x = torch.randn(3, IN)
    for read in (lambda layer: layer(x), lambda layer: layer.state_dict()):
        layer = layer_of("rows")
        with torch.no_grad():
            layer.delta.add_(1.0)
        read(layer)
        torch.testing.assert_close(layer.weight[[7, 0, 9]], layer.base_values + 1.0)
    layer.to("cpu")
    with torch.no_grad():
        layer.delta.zero_()
    layer.to("cpu")  # moves nothing: the change must not be forgotten over it
    assert torch.equal(layer(x), F.linear(x, make_linear().weight, layer.bias))


@names
def test_exchanged_deltas_are_seen(name: str) -> None:
    """Tensors have versions of their own: those of other deltas may be the same."""
    layer, x = layer_of(name), torch.randn(3, IN)
    randomise(layer)
    before = layer(x)
    for seed in range(3):
        other = layer_of(name)
        torch.manual_seed(seed)
        randomise(other)
        given = {key: p.detach() for key, p in other.named_parameters() if key.endswith("delta")}
        wanted = other(x)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                computed = {key: delta * 1 for key, delta in given.items()}
                assert torch.equal(torch.func.functional_call(layer, given, (x,)), wanted)
                assert torch.equal(torch.func.functional_call(layer, computed, (x,)), wanted)
        assert torch.equal(layer(x), before)
    for kind, pattern in layer.patterns.items():
        pattern.delta = nn.Parameter(given[f"{kind}.delta"])
    assert torch.equal(layer(x), wanted)


def test_gradients_of_exchanged_deltas() -> None:
    layer, x = layer_of("rows"), torch.randn(3, IN)
    first = layer.delta + 1.0  # depends on the layer's own
    torch.func.functional_call(layer, {"rows.delta": first}, (x,)).square().sum().backward()
    found, layer.delta.grad = layer.delta.grad, None
    with torch.no_grad():
        layer.delta.add_(1.0)
    layer(x).square().sum().backward()
    torch.testing.assert_close(found, layer.delta.grad)


@names
def test_transforms_are_refused(name: str) -> None:
    layer, x = layer_of(name), torch.randn(3, IN)
    given = {key: p.detach() for key, p in layer.named_parameters() if key.endswith("delta")}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, given, (x,)).sum()

    before = layer.weight.clone()
    stacked = {key: torch.stack([delta, delta]) for key, delta in given.items()}
    for call in (
        lambda: torch.func.grad(loss)(given),
        lambda: torch.func.jvp(loss, (given,), (given,)),
        lambda: torch.func.vmap(loss)(stacked),
    ):
        with pytest.raises(UserError, match=r"by torch.func \(grad, vjp, jvp, vmap\): use loss.backward"):
            call()
    with torch.no_grad():  # no deltas in it
        torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    assert torch.equal(layer.weight, before)


@names
def test_a_change_of_type_leaves_indices(name: str) -> None:
    layer, x = layer_of(name), torch.randn(3, IN)
    if name == "rows":
        layer.permute(rows=torch.randperm(OUT))
    randomise(layer)
    expected = layer(x)
    layer.type(torch.float64).type(torch.float32)
    assert {p.index.dtype for p in layer.patterns.values()} == {torch.int64}
    torch.testing.assert_close(layer(x), expected)
    train(layer, torch.optim.AdamW(deltas(layer), 1e-2))


def test_two_models_share_nothing() -> None:
    left, right = layer_of("rows", seed=0), layer_of("rows", seed=1)
    optimizers = [torch.optim.AdamW(deltas(layer), 1e-2) for layer in (left, right)]
    right(torch.randn(2, IN)).sum().backward()
    version, before = right.weight._version, right.weight.clone()
    train(left, optimizers[0])
    assert right.weight._version == version and torch.equal(right.weight, before)
    right_only = left.weight.clone()
    optimizers[1].step()
    assert torch.equal(left.weight, right_only) and not torch.equal(right.weight, before)


def test_layers_are_collected() -> None:
    layer = layer_of("mixed")
    train(layer, torch.optim.AdamW(deltas(layer), 1e-2))
    assert {layer for layer, _ in layers_of(deltas(layer)).values()} == {layer}
    alive = [weakref.ref(layer), weakref.ref(layer.weight), weakref.ref(layer.patterns["rows"].delta)]
    del layer
    gc.collect()
    assert [ref() for ref in alive] == [None, None, None]


# ---- copies, casts, state dicts ----


def replica(module: nn.Module) -> nn.Module:
    """As `nn.DataParallel` makes one: tensors that depend on the module's parameters, and no parameters."""
    made = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        made._modules[name] = replica(child)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            setattr(made, name, tensor.clone())
    return made


@names
def test_a_replica_computes_and_gives_the_module_its_gradients(name: str) -> None:
    layer = layer_of(name)
    randomise(layer)
    x = torch.randn(2, IN)
    y = layer(x)  # the module itself has been called
    expected = torch.autograd.grad(y.square().sum(), deltas(layer))
    made = replica(layer)(x)
    found = torch.autograd.grad(made.square().sum(), deltas(layer))
    torch.testing.assert_close(made, y)
    torch.testing.assert_close(found, expected)


def pickled(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@names
@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
def test_a_copy_trains_on_its_own(name: str, clone: Callable[[nn.Module], nn.Module]) -> None:
    layer = layer_of(name)
    with torch.no_grad():
        deltas(layer)[0].add_(0.5)  # not written yet: the copy must notice too
    other = clone(layer)
    x = torch.randn(2, IN)
    assert torch.equal(other(x), layer(x))
    before = layer.weight.clone()
    train(other, torch.optim.AdamW(deltas(other), 1e-2))
    assert torch.equal(layer.weight, before) and not torch.equal(other.weight, before)
    weight = other.weight.clone()
    other.write_back()
    assert torch.equal(other.weight, weight)  # the hook had written it
    other.restore_base()
    assert torch.equal(other.weight, make_linear().weight)


@names
def test_casting_keeps_deltas_in_fp32(name: str) -> None:
    layer = layer_of(name)
    randomise(layer)
    layer(torch.randn(2, IN)).sum().backward()
    held, fine = deltas(layer), [p.detach().clone() for p in deltas(layer)]
    grads = [p.grad.clone() for p in held]
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    for parameter, old, delta, grad in zip(deltas(layer), held, fine, grads, strict=True):
        assert parameter is old and parameter.dtype == parameter.grad.dtype == torch.float32
        assert torch.equal(parameter, delta) and torch.equal(parameter.grad, grad)
    for kind, pattern in layer.patterns.items():
        assert pattern.base_values.dtype == torch.bfloat16
        if name != "mixed":  # base rounded to bf16, the sum rounded once
            wanted = (pattern.base_values.float() + pattern.delta).bfloat16()
            assert torch.equal(dense_part(layer.weight.detach(), kind, PATTERNS[name]), wanted.detach())
    for cast in (torch.float16, torch.float32, torch.float64, torch.float32):
        layer.to(cast)
        assert all(torch.equal(p, delta) for p, delta in zip(deltas(layer), fine, strict=True))
    assert layer.half().weight.dtype == torch.float16 and deltas(layer)[0].dtype == torch.float32


@names
@pytest.mark.parametrize("assign", [False, True])
def test_full_state_dict(name: str, assign: bool) -> None:
    source, target = layer_of(name, seed=0), layer_of(name, seed=1)
    randomise(source)
    state = copy.deepcopy(source.state_dict())
    target.load_state_dict(state, strict=True, assign=assign)
    x = torch.randn(3, IN)
    assert torch.equal(target(x), source(x))
    target.restore_base()
    assert torch.equal(target.weight, make_linear().weight)
    target.write_back()
    train(target, torch.optim.AdamW(deltas(target), 1e-2))
    assert not torch.equal(target.weight, source.weight)


@pytest.mark.parametrize("assign", [False, True])
def test_deltas_alone_load_too(assign: bool) -> None:
    source, target = layer_of("columns"), layer_of("columns")
    randomise(source)
    state = {k: v.clone() for k, v in source.state_dict().items() if k.endswith("delta")}
    target.load_state_dict(state, strict=False, assign=assign)
    assert torch.equal(target.weight, source.weight)  # at once: a compiled forward does not look for stale deltas
    x = torch.randn(3, IN)
    assert torch.equal(target(x), source(x))


@names
@pytest.mark.parametrize("assign", [False, True])
def test_plain_weight_becomes_the_base(name: str, assign: bool) -> None:
    plain, layer = make_linear(seed=4), layer_of(name)
    randomise(layer)
    held = deltas(layer)
    layer.load_state_dict(copy.deepcopy(plain.state_dict()), strict=True, assign=assign)
    x = torch.randn(3, IN)
    assert torch.equal(layer(x), plain(x)) and not any(p.any() for p in held)
    train(layer, torch.optim.AdamW(held, 1e-2))
    mask = mask_of(PATTERNS[name])
    assert torch.equal(layer.weight[~mask], plain.weight[~mask])
    layer.restore_base()
    assert torch.equal(layer.weight, plain.weight)


@names
def test_its_own_trained_weight_becomes_the_base_too(name: str) -> None:
    layer, plain = layer_of(name), make_linear()
    randomise(layer)
    plain.load_state_dict({key: layer.state_dict()[key].clone() for key in ("weight", "bias")})
    layer.load_state_dict(plain.state_dict())
    assert not any(delta.any() for delta in deltas(layer))
    layer.restore_base()
    assert torch.equal(layer.weight, plain.weight)


@names
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("first", ["weight", "deltas"])
def test_a_checkpoint_in_several_files_comes_in_any_order(name: str, assign: bool, first: str) -> None:
    """A weight that comes after its deltas holds them already: it is no new base."""
    source, target = layer_of(name), layer_of(name)
    randomise(source)
    state = copy.deepcopy(source.state_dict())
    for plain in (first == "weight", first != "weight"):
        part = {key: value for key, value in state.items() if (key in ("weight", "bias")) == plain}
        target.load_state_dict(part, strict=False, assign=assign)
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in source.state_dict().items())
    target.restore_base()
    assert torch.equal(target.weight, make_linear().weight)


@names
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("since", ["trained", "trained fused", "set", "other patterns"])
def test_deltas_that_came_alone_and_changed_are_not_awaited_in_a_weight(name: str, assign: bool, since: str) -> None:
    layer = layer_of(name)
    randomise(source := layer_of(name, seed=1))
    alone = {key: value.clone() for key, value in source.state_dict().items() if key.endswith("delta")}
    layer.load_state_dict(alone, strict=False, assign=assign)
    if since == "set":
        randomise(layer)
    elif since == "other patterns":
        layer.install(source.install({}))
    else:
        train(layer, torch.optim.AdamW(deltas(layer), 1e-2, fused=since == "trained fused"))
    plain = {key: layer.state_dict()[key].clone() for key in ("weight", "bias")}
    layer.load_state_dict({"bias": plain["bias"]}, strict=False)
    layer.load_state_dict(plain, strict=False)
    assert not any(delta.any() for delta in deltas(layer))
    layer.restore_base()
    assert torch.equal(layer.weight, plain["weight"])


@names
def test_a_copy_awaits_no_weight(name: str) -> None:
    randomise(source := layer_of(name))
    state, layer = source.state_dict(), layer_of(name)
    layer.load_state_dict({key: state[key].clone() for key in state if key.endswith("delta")}, strict=False)
    copied = copy.deepcopy(layer)
    copied.load_state_dict({"weight": state["weight"].clone()}, strict=False)
    assert not any(delta.any() for delta in deltas(copied))


def test_loading_still_reports_what_is_missing() -> None:
    layer = layer_of("rows")
    state = layer.state_dict()
    del state["rows.index"]
    with pytest.raises(RuntimeError, match="rows.index"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="weight"):
        layer.load_state_dict({"bias": layer.bias})


# ---- standing alone ----


def test_made_on_the_meta_device_and_filled() -> None:
    made = S2RowLinear(IN, OUT, columns=[4, 1])
    made.delta.data.normal_()
    made.write_back()
    with torch.device("meta"):
        empty = S2RowLinear(IN, OUT, columns=[4, 1])
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(made.state_dict(), assign=True)
    x = torch.randn(3, IN)
    assert torch.equal(empty(x), made(x)) and empty.columns.index.tolist() == [4, 1]
    empty(x).sum().backward()
    torch.testing.assert_close(empty.delta.grad, x.sum(0)[[4, 1]].expand(OUT, 2))


def test_constructors_match_linear() -> None:
    for make in (
        lambda: S2ColumnLinear(IN, OUT, rows=[1, 2]),
        lambda: S2RowLinear(IN, OUT, columns=torch.tensor([0])),
        lambda: BlockSparseLinear(IN, OUT, blocks=[(0, 1)], block_size=4),
    ):
        torch.manual_seed(7)
        layer = make()
        torch.manual_seed(7)
        linear = nn.Linear(IN, OUT)
        assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)
        assert [n for n, p in layer.named_parameters() if p.requires_grad] == [f"{next(iter(layer.patterns))}.delta"]
        assert layer.original is None and layer.delta.shape == layer.base_values.shape
        layer.reset_parameters()
        weight = layer.weight.clone()
        layer.write_back()
        assert torch.equal(layer.weight, weight)  # newly initialised, so a new base
    assert S2RowLinear(IN, OUT, bias=False, dtype=torch.bfloat16, columns=[0]).bias is None
    assert S2ColumnLinear(IN, OUT, device="meta", rows=[0]).delta.is_meta


def test_from_linear_shares_the_weight() -> None:
    for conv in (False, True):
        linear = make_linear(conv)
        layer = S2RowLinear.from_linear(linear, [1])
        assert layer.weight is linear.weight and layer.original is linear
        assert (layer.in_features, layer.out_features) == (IN, OUT)
        train(layer, torch.optim.AdamW(deltas(layer), 1e-2))
        assert torch.equal(layer(torch.ones(IN)), linear(torch.ones(1, IN))[0])


def test_trainable_entries_do_not_count_what_lies_outside() -> None:
    assert layer_of("rows").trainable_entries == 3 * IN
    assert layer_of("columns").trainable_entries == 2 * OUT
    assert layer_of("blocks").trainable_entries == int(mask_of(PATTERNS["blocks"]).sum())
    assert layer_of("few_blocks").trainable_entries == int(mask_of(PATTERNS["few_blocks"]).sum())


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"rows": [OUT]}, "outside 0 … 9"),
        ({"columns": [-1]}, "outside 0 … 6"),
        ({"blocks": [[0, 2]]}, "outside 0 … 2, 1"),
        ({"rows": [1, 1]}, "twice"),
        ({"blocks": [[0, 1], [0, 1]]}, "twice"),
        ({"rows": []}, "at least one"),
        ({"rows": [[0, 1]]}, "list of indices"),
        ({"blocks": [0, 1]}, "pairs"),
        ({"blocks": [[0, 1, 2]]}, "pairs"),
        ({"rows": [0.5]}, "integer"),
        ({"rows": [True, False]}, "integer"),
        ({"rows": {0, 1}}, "rows cannot be read as indices"),
        ({"columns": None}, "columns cannot be read as indices"),
        ({"blocks": [[0, 0]], "block_size": 0}, "block_size"),
        ({"blocks": [[0, 0]], "block_size": 2.5}, "block_size of at least 1, a whole number, got 2.5"),
    ],
)
def test_bad_indices_are_refused(pattern: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        convert(make_linear(), pattern)


def test_a_pattern_added_later_takes_the_base() -> None:
    layer = layer_of("rows")
    before = make_linear().weight
    randomise(layer)
    layer.add_pattern("columns", [1])
    assert torch.equal(layer.patterns["columns"].base_values, before[:, [1]])
    with pytest.raises(ValueError, match="already trains rows"):
        layer.add_pattern("rows", [2])
    with pytest.raises(TypeError, match="2 patterns"):
        _ = layer.delta
    layer.restore_base()
    assert torch.equal(layer.weight, before)


def test_overlapping_patterns_add_up() -> None:
    layer = layer_of("mixed")
    base_weight = layer.weight.clone()
    with torch.no_grad():
        for value, pattern in zip((1.0, 10.0, 100.0, 1000.0), layer.patterns.values(), strict=True):
            pattern.delta.fill_(value)
    write_back([layer])
    wanted = base_weight.clone()
    wanted[[0, 5]] += 1.0
    wanted[:, [6, 1]] += 10.0
    wanted[0:4, 0:4] += 100.0
    wanted[8:10, 4:7] += 100.0
    for place in ((0, 6), (0, 0), (3, 6), (3, 0)):
        wanted[place] += 1000.0
    torch.testing.assert_close(layer.weight, wanted, rtol=1e-6, atol=1e-5)
    layer.restore_base()
    assert torch.equal(layer.weight, base_weight)


def test_overlap_is_rounded_once() -> None:
    """bf16 has steps of 2⁻⁷ above 1: two deltas of 3/8 of a step make one together, none if rounded one by one."""
    layer = SparseLinear(4, 4, bias=False, dtype=torch.bfloat16)
    layer.load_state_dict({"weight": torch.ones(4, 4)})
    layer.add_pattern("rows", [0])
    layer.add_pattern("columns", [0])
    with torch.no_grad():
        for parameter in deltas(layer):
            parameter.fill_(2.0**-9 + 2.0**-10)
    layer.write_back()
    assert layer.weight[0, 0] == 1 + 2.0**-7
    assert layer.weight[0, 1] == 1.0


@names
def test_torch_compile_without_graph_breaks(name: str) -> None:
    layer, eager = layer_of(name), layer_of(name)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.AdamW(deltas(model), 1e-2) for model in (layer, eager)]
    for step in range(3):
        x = torch.randn(5, IN, generator=torch.Generator().manual_seed(step))
        a, b = compiled(x), eager(x)
        torch.testing.assert_close(a, b)
        a.square().mean().backward()
        b.square().mean().backward()
        for left, right in zip(deltas(layer), deltas(eager), strict=True):
            torch.testing.assert_close(left.grad, right.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_a_side_without_features(kind: str) -> None:
    """As `nn.Linear` does: nothing in gives the bias, nothing out gives nothing; gradients have their shapes."""
    layer = S2ColumnLinear(0, 5, rows=[1, 3]) if kind == "rows" else S2RowLinear(5, 0, columns=[1, 3])
    x = torch.randn(2, 3, layer.in_features, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (2, 3, layer.out_features) and x.grad.shape == x.shape and not x.grad.any()
    delta = layer.patterns[kind].delta
    assert delta.grad.shape == delta.shape and delta.numel() == 0
    if kind == "rows":
        assert torch.equal(y, layer.bias.expand(2, 3, 5))


def test_an_edge_block_filled_outside_of_the_weight_too_is_written() -> None:
    layer = BlockSparseLinear(40, 56, blocks=[[0, 0], [1, 1]], block_size=32)
    with torch.no_grad():
        layer.blocks.delta.normal_()
    layer.write_back()
    assert layer.is_written
    layer.blocks.delta.data.add_(1)
    assert not layer.is_written

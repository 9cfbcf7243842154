"""Sparse layers on the device: `nn.Linear`'s forward pass, float64's gradients, weights that follow their deltas."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from sparseft.kernels import reference
from sparseft.layers import BesideLinear, SparseLinear
from sparseft.training.optimizer import SparseAdamW
from support.syncs import waiting_is_an_error

OUT, IN, TOKENS = 150, 203, 77  # no multiple of 8, and divisible by no block size
EPSILON = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}
PATTERNS: dict[str, list[tuple[str, Any, int | None]]] = {
    "rows": [("rows", [7, 0, 149, 31], None)],
    "a run of rows": [("rows", list(range(5, 22)), None)],
    "columns": [("columns", [202, 0, 55], None)],
    "a run of columns": [("columns", list(range(3, 40)), None)],
    "blocks of 4": [("blocks", [[0, 0], [37, 50], [4, 11], [4, 12]], 4)],
    "blocks of 16": [("blocks", [[9, 12], [0, 3], [9, 3]], 16)],
    "blocks of 64": [("blocks", [[0, 0], [2, 3], [1, 3]], 64)],
    "all, overlapping": [("rows", [0, 5], None), ("columns", [6, 1], None), ("blocks", [[0, 0], [2, 1]], 32)],
}
each_pattern = pytest.mark.parametrize("name", list(PATTERNS))


def dense_linear(dtype: torch.dtype, device: str, conv: bool = False) -> nn.Module:
    torch.manual_seed(0)
    linear: nn.Module = Conv1D(OUT, IN) if conv else nn.Linear(IN, OUT)
    for parameter in linear.parameters():
        nn.init.normal_(parameter, std=0.1)
    return linear.to(device, dtype)


def sparse(linear: nn.Module, name: str, kind: type[SparseLinear] = SparseLinear) -> SparseLinear:
    """A layer that trains a pattern of a copy of `linear`."""
    layer = kind.wrap(copy.deepcopy(linear))
    for kind, index, size in PATTERNS[name]:
        layer.add_pattern(kind, index, size)
    return layer


def inputs(dtype: torch.dtype, device: str, seed: int = 1) -> tuple[Tensor, Tensor]:
    """x (7, 11, in) and a gradient of y (7, 11, out)."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(7, TOKENS // 7, n, generator=generator).to(device, dtype) for n in (IN, OUT))
    return x, grad


def logical(module: nn.Module) -> Tensor:
    weight = module.weight.detach()
    return weight.t() if isinstance(module, Conv1D) else weight


def near(found: Tensor, exact: Tensor, share: float) -> None:
    """Within a share of the largest number."""
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=share * exact.abs().max().item())


WAYS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "plain": lambda module, x: module(x),
    "checkpointed": lambda module, x: checkpoint(module, x, use_reentrant=False),
}


@each_pattern
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv1d"])
def test_forward_bits_and_gradients(name: str, conv: bool, device: str) -> None:
    for dtype, epsilon in EPSILON.items():
        dense = dense_linear(dtype, device, conv)
        x, grad = inputs(dtype, device)
        expected = dense(x)
        rows, columns = grad.flatten(0, 1).double(), x.flatten(0, 1).double()
        exact, exact_x = rows.t() @ columns, grad.double() @ logical(dense).double()
        for way in WAYS.values():
            layer, asks = sparse(dense, name), x.clone().requires_grad_()
            y = way(layer, asks)
            assert torch.equal(y, expected)
            y.backward(grad)
            assert asks.grad is not None
            near(asks.grad, exact_x, epsilon)
            for pattern in layer.patterns.values():
                assert pattern.delta.grad.dtype == torch.float32
                near(
                    pattern.delta.grad,
                    reference.gather(exact, pattern.kind, pattern.index, pattern.block_size),
                    epsilon,
                )


@each_pattern
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name: str, dtype: torch.dtype, device: str) -> None:
    dense = dense_linear(torch.float32, device)
    layer = sparse(dense, name)
    x, grad = inputs(torch.float32, device)
    with torch.autocast(device, dtype):
        y, expected = layer(x), dense(x)
    assert y.dtype == dtype and torch.equal(y, expected)
    y.backward(grad.to(dtype))
    exact = grad.to(dtype).flatten(0, 1).double().t() @ x.to(dtype).flatten(0, 1).double()
    for pattern in layer.patterns.values():
        near(
            pattern.delta.grad,
            reference.gather(exact, pattern.kind, pattern.index, pattern.block_size),
            EPSILON[dtype],
        )


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("blocks of 16", "cpu"),
        *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ("rows", "columns", "blocks of 16")),
    ],
)
def test_compiled(name: str, device: str) -> None:
    """As eager; on the device by the compiler that users have."""
    dense = dense_linear(torch.float32, device)
    eager, compiled = sparse(dense, name), sparse(dense, name)
    x, grad = inputs(torch.float32, device)
    run = torch.compile(compiled, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    try:
        for module in (eager, run):
            module(x).backward(grad)
        near(run(x), eager(x).double(), 1e-5)
        for kind, pattern in compiled.patterns.items():
            near(pattern.delta.grad, eager.patterns[kind].delta.grad.double(), 1e-5)
    finally:
        torch._dynamo.reset()


@each_pattern
def test_twenty_steps(name: str, device: str) -> None:
    """Weights are base + delta, rounded once, after each step; the base comes back bit for bit."""
    for dtype in EPSILON:
        dense = dense_linear(dtype, device)
        ours, theirs = sparse(dense, name), sparse(dense, name)
        base = dense.weight.detach().clone()
        fused = SparseAdamW([p for p in ours.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        plain = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        for step in range(20):
            x, grad = inputs(dtype, device, seed=step)
            for layer, optimizer in ((ours, fused), (theirs, plain)):
                layer(x).backward(grad)
                optimizer.step()
                optimizer.zero_grad()
            if step == 0:  # later the weights differ by a rounding here and there, and so do the gradients
                for kind, pattern in ours.patterns.items():
                    torch.testing.assert_close(pattern.delta, theirs.patterns[kind].delta, rtol=1e-5, atol=1e-6)
        total = base.float().clone()
        for pattern in ours.patterns.values():
            entries = reference.gather(total, pattern.kind, pattern.index, pattern.block_size) + pattern.delta
            reference.scatter_(total, pattern.kind, pattern.index, entries.detach(), pattern.block_size)
        assert torch.equal(ours.weight, total.to(dtype))
        assert not torch.equal(ours.weight, base)
        ours.restore_base()
        assert torch.equal(ours.weight, base)


@each_pattern
def test_beside(name: str, device: str) -> None:
    """The weight keeps the base and the deltas are added to the product: what base + delta gives in float64."""
    for dtype, epsilon in EPSILON.items():
        dense = dense_linear(dtype, device)
        layer = sparse(dense, name, BesideLinear)
        total = dense.weight.detach().double()
        with torch.no_grad():
            for seed, pattern in enumerate(layer.patterns.values()):
                values = torch.randn(pattern.delta.shape, generator=torch.Generator().manual_seed(seed)) * 0.1
                pattern.delta.copy_(values)
                entries = reference.gather(total, pattern.kind, pattern.index, pattern.block_size)
                whole = pattern.delta.to(dtype).double()
                reference.scatter_(total, pattern.kind, pattern.index, entries + whole, pattern.block_size)
        x, grad = inputs(dtype, device)
        asks = x.clone().requires_grad_()
        y = layer(asks)
        near(y, x.double() @ total.t() + dense.bias.double(), 2 * epsilon)
        y.backward(grad)
        assert asks.grad is not None
        near(asks.grad, grad.double() @ total, 2 * epsilon)
        assert torch.equal(layer.weight, dense.weight)
        results = {layer(x).detach().double().sum().item() for _ in range(3)}
        assert len(results) == 1  # in an order that is always the same


@each_pattern
def test_a_state_goes_from_device_to_device(name: str, device: str) -> None:
    layer = sparse(dense_linear(torch.bfloat16, device), name)
    with torch.no_grad():
        for pattern in layer.patterns.values():
            pattern.delta.normal_()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    on_cpu = sparse(dense_linear(torch.bfloat16, "cpu"), name)
    on_cpu.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    back = sparse(dense_linear(torch.bfloat16, device), name)
    back.load_state_dict(on_cpu.state_dict())
    after = back.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    moved = layer.to("cpu").to(device)
    assert all(torch.equal(value, before[key]) for key, value in moved.state_dict().items())


@pytest.mark.gpu
@each_pattern
def test_a_graph_of_passes_replays(name: str) -> None:
    """Forward and backward captured once give, for other inputs put in place, what eager passes give."""
    dense = dense_linear(torch.bfloat16, "cuda")
    captured, eager = sparse(dense, name), sparse(dense, name)
    deltas = [p for p in captured.parameters() if p.requires_grad]
    x, grad = inputs(torch.bfloat16, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            captured(x).backward(grad)
    torch.cuda.current_stream().wait_stream(side)
    for delta in deltas:
        delta.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured(x).backward(grad)
    other, other_grad = inputs(torch.bfloat16, "cuda", seed=9)
    x.copy_(other)
    grad.copy_(other_grad)
    graph.replay()
    eager(other).backward(other_grad)
    for kind, pattern in captured.patterns.items():
        torch.testing.assert_close(pattern.delta.grad, eager.patterns[kind].delta.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@each_pattern
def test_a_step_waits_for_nothing(name: str) -> None:
    if len(PATTERNS[name]) > 1:
        pytest.skip("overlapping patterns are torch's optimizer's, which is not ours")
    layer = sparse(dense_linear(torch.bfloat16, "cuda"), name)
    optimizer = SparseAdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-3)
    x, grad = inputs(torch.bfloat16, "cuda")

    def step() -> None:
        layer(x).backward(grad)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):  # kernels and tables are made
        step()
    with waiting_is_an_error():
        step()

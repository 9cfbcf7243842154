"""Gradients of deltas in half precision: as near to the exact product of the same inputs as fp32 comes.

The oracle is the float64 product of what the layers got: their inputs, and the gradients of their outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sparseft
from sparseft.kernels import reference
from sparseft.layers import BesideLinear, SparseLinear, sparse_layers
from support.experts import batch as tokens_of
from support.experts import build as build_experts

PATTERNS: dict[str, list[tuple[str, Any, int | None]]] = {  # of weights of at least 29 by 27
    "rows": [("rows", [3, 28, 7], None)],
    "a run of rows": [("rows", [4, 5, 6], None)],
    "columns": [("columns", [26, 0, 11], None)],
    "a run of columns": [("columns", [1, 2], None)],
    "blocks": [("blocks", [[0, 0], [3, 3], [3, 1], [0, 3], [2, 2]], 8)],
    "few blocks": [("blocks", [[0, 2], [3, 2]], 8)],  # saves a slice of x
    "grid": [("grid", ([3, 28, 7], [26, 0, 11]), None)],
    "grids": [("grid", [3, 28, -1, -27, 7, -1, -2, -12], None)],
    "all": [
        ("rows", [3, 28], None),
        ("columns", [26, 0], None),
        ("blocks", [[0, 0], [3, 3], [3, 1]], 8),
        ("grid", ([1, 0], [4, 2]), None),
    ],
}
SHAPES = [(29, 27), (32, 80)]  # (out, in)
TOKENS = 300
# Of the largest sum. Rounded to bf16 (fp16) results would differ by 2⁻⁹ (2⁻¹²).
TOLERANCE = 2e-6


def exact(pattern: Any, dense: Tensor) -> Tensor:
    """The pattern's entries of a dense (out, in) gradient."""
    return reference.gather(dense, pattern.kind, pattern.index, pattern.block_size)


def agree(pattern: Any, dense: Tensor, tolerance: float = TOLERANCE) -> None:
    found, want = pattern.delta.grad, exact(pattern, dense)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, rtol=0, atol=tolerance * want.abs().max().item())


def beside(layer: SparseLinear) -> SparseLinear:
    """The same patterns beside the weight, not in it."""
    linear = nn.Linear(layer.in_features, layer.out_features).to(layer.weight.dtype)
    found = BesideLinear.wrap(linear)
    found.install(layer.install({}))
    return found


def backward(mode: str, layer: SparseLinear, x: Tensor, grad: Tensor) -> None:
    """One micro-step, by another way of running the same layer."""
    if mode == "checkpointed":
        checkpoint(layer, x, use_reentrant=False).backward(grad)
    elif mode == "autocast":
        with torch.autocast("cpu", grad.dtype):
            y = layer(x)
        y.backward(grad)
    elif mode == "backward under autocast":
        with torch.autocast("cpu", torch.bfloat16):
            layer(x).backward(grad)
    elif mode == "compiled":
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x).backward(grad)
    else:
        layer(x).backward(grad)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(
    "mode", ["plain", "transposed", "delta path", "checkpointed", "autocast", "backward under autocast"]
)
def test_micro_steps_add_up_as_in_fp32(mode: str, name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = SparseLinear(shape[1], shape[0], transposed=mode == "transposed")
    layer = layer if mode == "autocast" else layer.to(dtype)
    for pattern in PATTERNS[name]:
        layer.add_pattern(*pattern)
    if mode == "delta path":
        layer = beside(layer)
    dense = torch.zeros(shape, dtype=torch.float64)
    for _ in range(3):
        x = torch.randn(3, TOKENS // 3, shape[1]).to(dtype)
        grad = torch.randn(3, TOKENS // 3, shape[0]).to(dtype)
        if mode == "backward under autocast" and dtype == torch.float16:
            grad = grad.bfloat16()  # in which the output comes
            x = x.bfloat16()
            layer = layer.bfloat16()
        backward(mode, layer, x.float() if mode == "autocast" else x, grad)
        dense += grad.flatten(0, 1).double().t() @ x.flatten(0, 1).double()
    for pattern in layer.patterns.values():
        agree(pattern, dense)


@pytest.mark.parametrize("name", ["rows", "columns", "all"])
def test_a_compiled_layer_too(name: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = SparseLinear(27, 29).to(torch.bfloat16)
    for pattern in PATTERNS[name]:
        layer.add_pattern(*pattern)
    x, grad = torch.randn(TOKENS, 27).bfloat16(), torch.randn(TOKENS, 29).bfloat16()
    backward("compiled", layer, x, grad)
    for pattern in layer.patterns.values():
        agree(pattern, grad.double().t() @ x.double())


# ---- in models: what each layer got, seen by hooks ----


@contextlib.contextmanager
def watched(model: nn.Module) -> Any:
    """Inside, sums up each sparse layer's exact dense gradient: {name: (out, in) in float64}."""
    dense: dict[str, Tensor] = {}
    hooks = []

    def hook(name: str) -> Callable[..., None]:
        def see(layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            if not output.requires_grad:
                return
            x = inputs[0].detach().to(output.dtype).reshape(-1, layer.in_features).double()

            def gradient(grad: Tensor) -> None:
                part = grad.reshape(-1, layer.out_features).double().t() @ x
                dense[name] = dense.get(name, 0) + part

            output.register_hook(gradient)

        return see

    for name, layer in sparse_layers(model).items():
        hooks.append(layer.register_forward_hook(hook(name)))
    yield dense
    for one in hooks:
        one.remove()


CONFIGS = {
    "s2ft": sparseft.S2FTConfig(sparsity=0.8, roles=["q", "v", "o", "up", "down"], importance="random"),
    "permuted": sparseft.S2FTConfig(sparsity=0.8, roles=["o", "up", "down"], importance="random", layout="permuted"),
    "sylva": sparseft.SylvaConfig(sparsity=0.8, block_size=8, importance="random"),
}
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # grouped queries; Conv1D
def test_every_layer_of_a_model(
    kind: str, config: str, checkpointing: bool, dtype: torch.dtype, make_model: Any
) -> None:
    model = sparseft.attach(make_model(kind, dtype), CONFIGS[config]).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with watched(model) as dense:
        for seed in range(2):
            ids = torch.randint(3, 96, (4, 30), generator=torch.Generator().manual_seed(seed))
            model(input_ids=ids, labels=ids).loss.backward()
    layers = sparse_layers(model)
    assert dense.keys() == layers.keys()
    assert any(layer.is_permuted for layer in layers.values()) == (config == "permuted" and kind == "llama")
    for name, layer in layers.items():
        found = dense[name]
        for side, order in enumerate((layer.row_permutation, layer.column_permutation)):
            if order is not None:  # the oracle in the checkpoint's order
                found = torch.empty_like(found).index_copy_(side, order, found)
        for pattern in layer.patterns.values():
            agree(pattern, found)


@pytest.mark.parametrize("config", [sparseft.S2FTConfig(g_ratio=0.1, u_ratio=0.2, d_ratio=0.1, importance="weight"),
                                    sparseft.S2FTConfig(d_ratio=0.1, importance="weight"),
                                    sparseft.SylvaConfig(importance="weight", block_size=16, sparsity=0.9),
                                    sparseft.LosiaConfig(importance="weight", sparsity=0.9)],
                         ids=["rows and columns", "columns", "blocks", "grids"])  # fmt: skip
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_every_expert(implementation: str, config: Any) -> None:
    model = build_experts("qwen3_moe", torch.bfloat16)
    model.config._experts_implementation = implementation
    sparseft.attach(model, config)
    gradients = []
    for watch in (False, True):  # hooks make experts compute one by one, so the plain pass is compared with that
        model.zero_grad()
        with watched(model) if watch else contextlib.nullcontext({}) as dense:
            for seed in range(2):
                model(**tokens_of(seed)).loss.backward()
        gradients.append({n: p.grad for n, p in sparseft.trainable_parameters(model).items()})
    experts = {name: layer for name, layer in sparse_layers(model).items() if ".experts." in name}
    assert len(experts) > 4
    for name, layer in experts.items():
        for kind, pattern in layer.patterns.items():
            if name not in dense:
                assert pattern.delta.grad is None
                continue
            agree(pattern, dense[name])
            one_by_one, together = (found[f"{name}.{kind}.delta"] for found in reversed(gradients))
            scale = one_by_one.abs().max().item()
            if implementation == "eager":
                torch.testing.assert_close(together, one_by_one, rtol=0, atol=TOLERANCE * scale)
            assert (together.bfloat16().float() != together).float().mean() > 0.9  # never rounded to bf16


# ---- one and the same result in every run ----

# Sums whose order CUDA leaves to chance, where an index occurs twice.
CHANCE = ("index_add", "scatter_add", "scatter_reduce", "index_reduce", "put_", "index_put", "segment_reduce")


class NoChance(TorchDispatchMode):
    """Fails on operations that add to places by an index."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        adds = any(name.strip("_").startswith(part.strip("_")) for part in CHANCE)
        if "index_put" in name:
            accumulate = kwargs.get("accumulate", args[3] if len(args) > 3 else False)
            adds = bool(accumulate)
        assert not adds, f"{name} adds up in no certain order on CUDA"
        return func(*args, **kwargs)


@pytest.mark.parametrize("writes", [True, False], ids=["written weights", "delta path"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PATTERNS)
def test_no_sum_is_left_to_chance(name: str, dtype: torch.dtype, writes: bool) -> None:
    torch.manual_seed(0)
    layer = SparseLinear(27, 29).to(dtype)
    for pattern in PATTERNS[name]:
        layer.add_pattern(*pattern)
    if not writes:
        layer = beside(layer)
    optimizer = torch.optim.AdamW([pattern.delta for pattern in layer.patterns.values()], lr=1e-3)
    x = torch.randn(40, 27).to(dtype).requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.set_multithreading_enabled(False), NoChance():
            layer(x).float().square().sum().backward()
            optimizer.step()
            layer(x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(pattern.delta.grad.any() for pattern in layer.patterns.values())


def test_what_is_left_to_chance_is_seen() -> None:
    x, at = torch.zeros(3), torch.tensor([1, 1])
    for act in (
        lambda: x.index_add_(0, at, torch.ones(2)),
        lambda: x.scatter_add_(0, at, torch.ones(2)),
        lambda: x.index_put_((at,), torch.ones(2), accumulate=True),
    ):
        with pytest.raises(AssertionError, match="no certain order"), NoChance():
            act()

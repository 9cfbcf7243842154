"""The grouped product of experts, by plain torch and by the kernel, against autograd's dense gradient of the weight."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sparseft.kernels import dispatch, reference
from sparseft.layers.grouped_product import Grouping, grouped_product
from sparseft.layers.pattern import Pattern
from sparseft.memory import AllocationCounter

OUT, IN = 45, 37  # the last blocks of 8 lie half outside
TOKENS = (5, 0, 17, 3, 1, 9)  # of each expert; three more tokens lie here for none
REST = 3


@pytest.fixture(params=["reference", "triton"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        triton = pytest.importorskip("sparseft.kernels.blocks_triton", reason="needs triton, which Linux has")
        if not triton.INTERPRETED:
            pytest.skip("triton was imported without its interpreter")
    monkeypatch.setenv("SPARSEFT_KERNELS", request.param)
    return request.param


def multiply(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """transformers' product, (tokens, in) with (experts, in, out), by as many operations whatever the experts."""
    experts = torch.searchsorted(offs, torch.arange(len(x), dtype=offs.dtype), right=True)
    known = weight.index_select(0, experts.clamp(max=len(offs) - 1))
    return torch.bmm(x[:, None], known)[:, 0] * (experts < len(offs))[:, None]


def layers_of(patterns: dict[int, dict[str, Any]], weight: Tensor) -> dict[int, Any]:
    """Stand-ins of experts' layers: {expert: {kind: index}}."""
    return {
        number: SimpleNamespace(
            patterns={
                kind: Pattern(kind, torch.as_tensor(index), weight[number], 8 if kind == "blocks" else None)
                for kind, index in kinds.items()
            }
        )
        for number, kinds in patterns.items()
    }


CASES: dict[str, dict[int, dict[str, Any]]] = {
    "columns, as many": {number: {"columns": [number, 36, 11]} for number in range(6)},
    "columns, some experts, differing": {
        0: {"columns": [3]},
        1: {"columns": [0, 36]},
        5: {"columns": [9, 2, 30, 4, 8]},
    },
    "rows": {number: {"rows": [43, number]} for number in range(6)},
    "rows, differing": {1: {"rows": [0]}, 2: {"rows": [43, 7, 20]}, 4: {"rows": [1, 2]}},
    "blocks": {number: {"blocks": [[5, 4], [number % 5, 1]]} for number in range(6)},
    "blocks, differing": {2: {"blocks": [[5, 0], [0, 4], [5, 4]]}, 3: {"blocks": [[1, 2]]}, 1: {"blocks": [[1, 1]]}},
    "all kinds": {0: {"rows": [4], "columns": [1, 5]}, 2: {"blocks": [[0, 0]], "columns": [7]}, 3: {"rows": [0, 43]}},
}


def operands(dtype: torch.dtype, tokens: tuple[int, ...] = TOKENS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    count = sum(tokens) + REST
    x, weight = torch.randn(count, IN, generator=generator), torch.randn(len(tokens), OUT, IN, generator=generator)
    grad = torch.randn(count, OUT, generator=generator)
    offs = torch.tensor(tokens).cumsum(0).int()
    return x.to(dtype), weight.to(dtype), grad.to(dtype), offs


def dense(x: Tensor, weight: Tensor, grad: Tensor, offs: Tensor) -> tuple[Tensor, Tensor]:
    """Autograd's gradients of the 3-D parameter and of x, in fp64."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    starts = [0, *offs.tolist()]
    for number, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
        (x[start:stop] @ weight[number].t()).backward(grad[start:stop].double())
    assert weight.grad is not None and x.grad is not None
    return weight.grad, x.grad


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_the_dense_ones_on_the_patterns(way: str, case: str, dtype: torch.dtype) -> None:
    x, weight, grad, offs = operands(dtype)
    wanted, wanted_x = dense(x, weight, grad, offs)
    grad[-REST:] = float("nan")  # what tokens of no expert have as gradient says nothing
    layers, x = layers_of(CASES[case], weight), x.requires_grad_()
    y = grouped_product(multiply, x, weight, offs, layers, Grouping())
    assert torch.equal(y, multiply(x, weight.mT, offs))
    y.backward(grad)
    assert x.grad is not None
    close = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]  # rounded once, as x is
    torch.testing.assert_close(x.grad[:-REST].double(), wanted_x[:-REST], rtol=close, atol=close)
    for number, layer in layers.items():
        for kind, pattern in layer.patterns.items():
            expected = reference.gather(wanted[number], kind, pattern.index, pattern.block_size)
            assert pattern.delta.grad is not None and pattern.delta.grad.dtype == torch.float32
            torch.testing.assert_close(pattern.delta.grad.double(), expected, rtol=1e-5, atol=1e-5)
            assert bool(pattern.delta.grad.any()) == (TOKENS[number] > 0)
            assert pattern.delta.grad.data_ptr() % 16 == 0 and pattern.delta.grad.is_contiguous()


def test_without_a_token_all_gradients_are_zero(way: str) -> None:
    x, weight, grad, offs = (operands(torch.float32)[0][:0], *operands(torch.float32)[1:])
    layers = layers_of(CASES["all kinds"], weight)
    y = grouped_product(multiply, x.requires_grad_(), weight, torch.zeros_like(offs), layers, Grouping())
    y.backward(grad[:0])
    for layer in layers.values():
        assert all(
            pattern.delta.grad is not None and not pattern.delta.grad.any() for pattern in layer.patterns.values()
        )


def test_sums_beyond_the_range_of_fp16_stay_finite(way: str) -> None:
    x = torch.full((600, 16), 16.0, dtype=torch.float16)
    weight, offs = torch.zeros(2, 16, 16, dtype=torch.float16), torch.tensor([600, 600]).int()
    layers = layers_of({0: {"columns": [1], "rows": [2]}}, weight)
    grouped_product(multiply, x, weight, offs, layers, Grouping()).backward(torch.full_like(x, 16.0))
    assert all((pattern.delta.grad == 600 * 256).all() for pattern in layers[0].patterns.values())


class Operations(TorchDispatchMode):
    """Counts what is dispatched, but for views, which launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func.is_view or func is torch.ops.aten.detach.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kinds", [("columns",), ("rows",), ("blocks",), ("rows", "columns")])
@pytest.mark.parametrize("way", ["triton"], indirect=True)
def test_where_a_kernel_computes_the_host_s_work_does_not_grow_with_the_experts(
    way: str, kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it ask where tokens went."""
    from sparseft.kernels import experts_triton

    counts: list[list[str]] = []
    launches: list[Any] = []
    launch = experts_triton.experts_gradient
    for experts in (8, 32):
        tokens = (2,) * experts
        x, weight, grad, offs = operands(torch.float32, tokens)
        index = {"columns": [3, 5, 7], "rows": [1, 2], "blocks": [[0, 1], [5, 4]]}
        layers = layers_of({number: {kind: index[kind] for kind in kinds} for number in range(experts)}, weight)
        grouping, x = Grouping(), x.requires_grad_()
        grouping.of(layers, weight.shape)  # once, ahead of the first step

        def counted(*args: Any) -> Tensor:
            launches.append(args)
            with _disable_current_modes():  # the interpreter copies its operands to numpy and back
                return launch(*args)

        monkeypatch.setattr(experts_triton, "experts_gradient", counted)
        with Operations() as operations:
            y = grouped_product(multiply, x, weight, offs, layers, grouping)
            y.backward(grad)
        counts.append(operations.found)
        grads = [pattern.delta.grad for one in layers.values() for pattern in one.patterns.values()]
        assert len({grad.untyped_storage()._cdata for grad in grads}) == len(kinds), "gradients were copied one by one"
    assert counts[0] == counts[1] and len(counts[0]) < 40
    assert len(launches) == 2 * len(kinds)
    assert not {"aten._local_scalar_dense.default", "aten.nonzero.default"} & set(counts[0])


def test_a_changed_index_is_seen() -> None:
    """Whether another one is set, one is loaded in place, or a delta no longer trains."""
    x, weight, grad, offs = operands(torch.float32)
    wanted, _ = dense(x, weight, grad, offs)
    layers, grouping = layers_of(CASES["columns, as many"], weight), Grouping()
    pattern = layers[2].patterns["columns"]

    def check() -> None:
        pattern.delta.grad = None
        grouped_product(multiply, x, weight, offs, layers, grouping).backward(grad)
        torch.testing.assert_close(pattern.delta.grad, wanted[2][:, pattern.index].float(), rtol=1e-5, atol=1e-5)

    check()
    pattern.set_index(torch.tensor([30, 20, 10]), weight[2][:, [30, 20, 10]])
    check()
    with torch.no_grad():
        pattern.index.copy_(torch.tensor([6, 5, 4]))
    check()
    layers[0].patterns["columns"].delta.requires_grad_(False)
    layers[0].patterns["columns"].delta.grad = None
    check()
    assert layers[0].patterns["columns"].delta.grad is None
    copied, saved = copy.deepcopy(grouping), io.BytesIO()
    torch.save(grouping, saved)
    assert copied._groups == [] and saved.tell() < 1500  # worked out anew, not carried along


def test_the_memory_plan_s_meta_device() -> None:
    """Shapes alone, and the memory of gradients and of what is gathered."""
    x, weight, grad, offs = operands(torch.bfloat16)
    x, weight, grad, offs = (one.to("meta") for one in (x, weight, grad, offs))
    for case in CASES.values():
        indices = {n: {k: torch.as_tensor(i).to("meta") for k, i in kinds.items()} for n, kinds in case.items()}
        layers = layers_of(indices, weight)
        y = grouped_product(lambda x, w, offs: x.new_empty(len(x), w.shape[-1]), x, weight, offs, layers, Grouping())
        with AllocationCounter() as memory:
            y.backward(grad)
        patterns = [pattern for layer in layers.values() for pattern in layer.patterns.values()]
        for pattern in patterns:
            assert pattern.delta.grad is not None and pattern.delta.grad.shape == pattern.delta.shape
        deltas = sum(pattern.delta.nbytes for pattern in patterns)
        assert deltas <= memory.peak <= deltas + 3 * len(x) * (OUT + 2 * IN)


def test_the_operator_is_one_to_the_compiler() -> None:
    x, weight, grad, offs = operands(torch.float32)
    layers = layers_of(CASES["columns, as many"], weight)
    (group,), _ = Grouping().of(layers, weight.shape)
    arguments = (grad, x, offs, group.parts, *group.sizes, group.total, group.block_size)
    torch.library.opcheck(torch.ops.sparseft.experts_gradient, arguments)
    compiled = torch.compile(dispatch.experts_gradient, fullgraph=True, backend="aot_eager")
    plain = (grad, x, offs, group.parts, group.sizes, group.total, group.block_size)
    assert torch.equal(compiled(*plain), dispatch.experts_gradient(*plain))


def test_a_gather_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, columns = torch.randn(50, 9), torch.randint(9, (4, 3))
    rows = torch.randint(4, (50,))
    whole = reference.take_columns(matrix, columns, rows)
    assert torch.equal(whole, torch.stack([one[columns[row]] for one, row in zip(matrix, rows.tolist(), strict=True)]))
    monkeypatch.setattr(reference, "GATHERED_CPU", 30)
    with AllocationCounter() as memory:
        assert torch.equal(reference.take_columns(matrix, columns, rows), whole)
    assert memory.peak <= 3 * whole.nbytes

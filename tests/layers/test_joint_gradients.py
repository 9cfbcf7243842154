"""The blocks of a decoder layer make their gradients together: the dense ones, whatever is done with the graph."""

from __future__ import annotations

import copy
import gc
import io
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import sparseft
from sparseft.errors import UserError
from sparseft.kernels import dispatch
from sparseft.kernels.block_group import BlockGroup
from sparseft.layers import BlockSparseLinear, SparseLinear, restore, share_inputs, sparse_layers
from sparseft.layers.pattern import Pattern

SIZE, HIDDEN, INNER = 4, 16, 24


class Branch(nn.Module):
    """A decoder layer of linears that can be left out, or used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(HIDDEN, HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)

    def inner(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())

    def forward(self, x: Tensor, use: str = "qkm") -> Tensor:
        for name in use:
            x = x + (self.inner(x) if name == "m" else getattr(self, name)(x).sin())
        return x


class Model(nn.Module):
    """What has a config counts as a decoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Branch(), Branch()])
        self.config = transformers.LlamaConfig(num_hidden_layers=2)

    def forward(self, x: Tensor, use: str = "qkm") -> Tensor:
        for layer in self.layers:
            x = layer(x, use)
        return x


def blocks_of(name: str) -> list[list[int]]:
    height, width = {"up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}.get(name, (HIDDEN, HIDDEN))
    order = torch.randperm((height // SIZE) * (width // SIZE), generator=torch.Generator().manual_seed(len(name)))
    return [[int(number) // (width // SIZE), int(number) % (width // SIZE)] for number in order[:3]]


def sparse(dtype: torch.dtype = torch.float32) -> Model:
    model = Model().to(dtype).requires_grad_(False)
    for layer in model.layers:
        for name, linear in list(layer.named_children()):
            setattr(layer, name, BlockSparseLinear.from_linear(linear, blocks_of(name), SIZE))
    share_inputs(model)
    return model


def batch(seed: int = 0, tokens: tuple[int, ...] = (2, 3), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*tokens, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(*batches: Tensor, use: str = "qkm") -> dict[str, Tensor]:
    """The dense gradients of all batches together, at the blocks."""
    model = Model().to(batches[0].dtype)
    for x in batches:
        model(x, use).square().sum().backward()
    found = {}
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and linear.weight.grad is not None:
            rows, columns = torch.tensor(blocks_of(name.rpartition(".")[2])).unbind(1)
            parts = linear.weight.grad.unfold(0, SIZE, SIZE).unfold(1, SIZE, SIZE)
            found[name] = parts[rows, columns].float()
    return found


def check(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, layer in sparse_layers(model).items():
        if name in expected:
            torch.testing.assert_close(layer.delta.grad, expected[name], rtol=1e-4, atol=1e-4)
        else:
            assert layer.delta.grad is None, name


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Of each product the number of weights whose gradients it made."""
    found: list[int] = []
    joint, alone = BlockGroup.gradients, dispatch._blocks_gradient

    def counted(self: BlockGroup, grads: Any, xs: Any) -> Any:
        found.append(len(grads))
        return joint(self, grads, xs)

    def counted_alone(*args: Any) -> Tensor:
        found.append(1)
        return alone(*args)

    monkeypatch.setattr(BlockGroup, "gradients", counted)
    monkeypatch.setattr(dispatch, "_blocks_gradient", counted_alone)
    yield found


def test_one_product_a_decoder_layer(products: list[int]) -> None:
    model = sparse()
    x = batch().requires_grad_()
    model(x).square().sum().backward()
    assert products == [4, 4]
    check(model, dense(batch()))
    other = batch().requires_grad_()
    Model()(other).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_gradients_are_views_that_nobody_copied() -> None:
    """And can be changed in place, as clipping, accumulating and zeroing do."""
    model = sparse()
    model(batch()).square().sum().backward()
    grads = [layer.delta.grad for layer in sparse_layers(model.layers[0]).values()]
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 1
    assert all(grad.is_contiguous() and grad.data_ptr() % 16 == 0 and not grad._is_view() for grad in grads)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert not any(grad.any() for grad in grads)


def halve(delta: nn.Parameter) -> None:
    delta.grad.div_(2)


def with_hooks(model: Model) -> None:
    seen = []
    for layer in sparse_layers(model).values():
        layer.delta.register_hook(lambda grad: seen.append(grad) or 2 * grad)
        layer.delta.register_post_accumulate_grad_hook(halve)
    model(batch()).square().sum().backward()
    assert len(seen) == 8


def by_autograd_grad(model: Model) -> None:
    deltas = [layer.delta for layer in sparse_layers(model).values()]
    for delta, grad in zip(deltas, torch.autograd.grad(model(batch()).square().sum(), deltas), strict=True):
        delta.grad = grad


def one_by_one(model: Model) -> None:
    loss = model(batch()).square().sum()
    for layer in sparse_layers(model).values():
        (layer.delta.grad,) = torch.autograd.grad(loss, layer.delta, retain_graph=True)


def after_gradients_of_activations(model: Model) -> None:
    x = batch().requires_grad_()
    loss = model(x).square().sum()
    torch.autograd.grad(loss, x, retain_graph=True)  # comes by all linears, but not to the node
    loss.backward()


def after_a_pass_that_failed(model: Model) -> None:
    loss = model(batch()).square().sum()
    hooks = [layer.delta.register_hook(lambda grad: 1 / 0) for layer in sparse_layers(model.layers[1]).values()]
    with pytest.raises(ZeroDivisionError):
        loss.backward(retain_graph=True)
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    loss.backward()


def checkpointed(reentrant: bool) -> Callable[[Model], None]:
    def run(model: Model) -> None:
        x = batch().requires_grad_()
        for layer in model.layers:
            x = checkpoint(layer, x, use_reentrant=reentrant)
        x.square().sum().backward()

    return run


def partly_checkpointed(reentrant: bool) -> Callable[[Model], None]:
    """Only what is inside a decoder layer is computed again, without the hook ahead of it."""

    def run(model: Model) -> None:
        for layer in model.layers:
            inner = layer.inner
            layer.inner = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=reentrant)
        model(batch().requires_grad_()).square().sum().backward()

    return run


def without_the_hook(model: Model) -> None:
    """The decoder layer is not called, but what it consists of."""
    x = batch()
    for layer in model.layers:
        x = layer.forward(x)
    x.square().sum().backward()


def in_evaluation_first(model: Model) -> None:
    with torch.no_grad():
        model(batch(5))
    model(batch(6))  # a graph that no one follows
    model(batch()).square().sum().backward()


def offloaded(model: Model) -> None:
    with torch.autograd.graph.save_on_cpu():
        loss = model(batch()).square().sum()
    loss.backward()


@pytest.mark.parametrize(
    "run",
    [
        with_hooks, by_autograd_grad, one_by_one, after_gradients_of_activations, after_a_pass_that_failed,
        checkpointed(True), checkpointed(False), partly_checkpointed(True), partly_checkpointed(False),
        without_the_hook, in_evaluation_first, offloaded,
    ],
    ids=lambda run: run.__qualname__.partition(".")[0],
)  # fmt: skip
def test_whatever_is_done_with_the_graph(run: Callable[[Model], None]) -> None:
    model = sparse()
    run(model)
    check(model, dense(batch()))


def test_batches_add_up_in_one_graph_or_several() -> None:
    model, batches = sparse(), [batch(seed) for seed in range(3)]
    losses = [model(x).square().sum() for x in batches]  # three graphs at once
    losses[2].backward()
    (losses[0] + losses[1]).backward()
    check(model, dense(*batches))


@pytest.mark.parametrize("use", ["q", "km", "qq", "mkm", "qkmq"])
def test_linears_left_out_and_used_twice(use: str) -> None:
    model = sparse()
    model(batch(), use).square().sum().backward()
    check(model, dense(batch(), use=use))


def test_a_frozen_delta_has_no_gradient_and_may_have_again() -> None:
    model = sparse()
    model.layers[0].k.delta.requires_grad_(False)
    model(batch()).square().sum().backward()
    expected = dense(batch())
    check(model, {name: grad for name, grad in expected.items() if name != "layers.0.k"})
    model.layers[0].k.delta.requires_grad_(True)
    model.zero_grad()
    model(batch()).square().sum().backward()
    check(model, expected)


def test_a_delta_that_trains_since_the_decoder_layer_was_called() -> None:
    """A linear may be called by itself, after a forward pass in which it was frozen."""
    model = sparse()
    k = model.layers[0].k
    k.delta.requires_grad_(False)
    model(batch())
    k.delta.requires_grad_(True)
    k(batch()).square().sum().backward()
    alone = BlockSparseLinear.from_linear(Model().layers[0].k, blocks_of("k"), SIZE)
    alone(batch()).square().sum().backward()
    torch.testing.assert_close(k.delta.grad, alone.delta.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sums_are_in_fp32(dtype: torch.dtype) -> None:
    model = sparse(dtype)
    model(batch(dtype=dtype)).square().sum().backward()
    for name, layer in sparse_layers(model).items():
        expected = dense(batch(dtype=dtype))[name]
        assert layer.delta.grad.dtype == torch.float32
        torch.testing.assert_close(layer.delta.grad, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("tokens", [(0,), (1,), (3,), (), (3000,)])
def test_any_number_of_tokens(tokens: tuple[int, ...], products: list[int]) -> None:
    """With many, each linear's product is made at once: its operands are not kept for the others'."""
    model = sparse()
    model(batch(tokens=tokens)).square().sum().backward()
    assert products == [1] * 8 if tokens == (3000,) else products == [4, 4]
    expected = dense(batch(tokens=tokens))
    for name, layer in sparse_layers(model).items():
        scale = float(expected[name].abs().max()) or 1.0
        torch.testing.assert_close(layer.delta.grad, expected[name], rtol=0, atol=1e-5 * scale)


def test_operands_are_let_go_with_the_product() -> None:
    model, alive = sparse(), []
    for layer in sparse_layers(model).values():
        layer.register_full_backward_hook(lambda module, grads, outputs: alive.append(weakref.ref(outputs[0])))
    loss = model(batch().requires_grad_()).square().sum()
    loss.backward(retain_graph=True)
    gc.collect()
    assert len(alive) == 8 and not any(reference() is not None for reference in alive)


def test_second_derivatives_are_an_error_and_not_wrong() -> None:
    model = sparse()
    layer = model.layers[0]
    (grad,) = torch.autograd.grad(model(batch()).square().sum(), layer.q.delta, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def through_pickle(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, through_pickle])
def test_copies_make_their_own(clone: Callable[[nn.Module], nn.Module], products: list[int]) -> None:
    model = sparse()
    model(batch(7))
    other = clone(model)
    other(batch()).square().sum().backward()
    assert products == [4, 4] and all(layer.delta.grad is None for layer in sparse_layers(model).values())
    check(other, dense(batch()))
    model(batch()).square().sum().backward()
    check(model, dense(batch()))


def test_what_trains_is_looked_at_anew(products: list[int]) -> None:
    """Another pattern, another index, and back to plain linears."""
    model = sparse()
    first = model.layers[0]
    first.q.add_pattern("rows", [1])
    first.k.install({})
    share_inputs(model)
    model(batch()).square().sum().backward()
    assert sorted(products) == [1, 2, 4]  # q alone, up and down, all of the other decoder layer
    for name, expected in dense(batch()).items():
        if name != "layers.0.k":
            found = model.get_submodule(name).patterns["blocks"].delta.grad
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for module in model.modules():
        assert len(module._forward_pre_hooks) == (module in set(model.layers))
    restore(model, merged=False)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(isinstance(module, SparseLinear) for module in model.modules())


@pytest.mark.parametrize("what", ["nothing", "rows", "blocks of another size", "a computed delta"])
def test_a_layer_that_trains_something_else_before_it_is_looked_at(what: str) -> None:
    model = sparse()
    model(batch())
    q = model.layers[0].q
    if what == "a computed delta":
        parametrize.register_parametrization(q.blocks, "delta", nn.Identity())
        q.add_pattern("rows", [1])
    else:
        patterns = {
            "rows": {"kind": "rows", "index": torch.tensor([1])},
            "blocks of another size": {"kind": "blocks", "index": torch.tensor([[0, 0]]), "block_size": 8},
        }
        made = Pattern(weight=q.logical_weight, **patterns[what]) if what in patterns else None
        q.install({} if made is None else {made.kind: made})
    model(batch()).square().sum().backward()
    for name, expected in dense(batch()).items():
        if name != "layers.0.q":
            torch.testing.assert_close(model.get_submodule(name).delta.grad, expected, rtol=1e-4, atol=1e-4)
    parts = q.patterns.values()
    grads = [p.parametrizations.delta.original.grad if hasattr(p, "parametrizations") else p.delta.grad for p in parts]
    assert len(grads) == (0 if what == "nothing" else 2 if what == "a computed delta" else 1)
    assert all(grad.any() for grad in grads)


def test_threads_go_forward_and_back_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with a graph of its own, of one decoder layer whose linears they use differently."""
    model = sparse()
    begin = BlockGroup.__init__

    def slow(*args: Any) -> None:
        time.sleep(0.001)  # lets another thread run
        begin(*args)

    monkeypatch.setattr(BlockGroup, "__init__", slow)
    uses = ["qkm", "km", "mq", "q"]
    failed: list[BaseException] = []

    def run(number: int) -> None:
        try:
            for step in range(40):
                model(batch(40 * number + step), uses[(number + step) % 4]).square().sum().backward()
        except BaseException as error:
            failed.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failed
    total: dict[str, Tensor] = {}
    for number in range(4):
        for step in range(40):
            for name, gradient in dense(batch(40 * number + step), use=uses[(number + step) % 4]).items():
                total[name] = total[name] + gradient if name in total else gradient
    for name, expected in total.items():
        found = model.get_submodule(name).delta.grad
        assert (found - expected).norm() <= 1e-4 * expected.norm(), name


def test_a_compiled_decoder_layer() -> None:
    """The compiler sees each linear on its own, and the hook breaks no graph."""
    model = sparse()
    torch._dynamo.reset()
    for layer in model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    model(batch()).square().sum().backward()
    check(model, dense(batch()))


def test_transforms_are_refused_and_other_deltas_are_not() -> None:
    model, other, x = sparse(), sparse(), batch()
    with torch.no_grad():
        for layer in sparse_layers(other).values():
            layer.delta.normal_()
    given = {name: p.detach().requires_grad_() for name, p in other.named_parameters() if name.endswith("delta")}
    with pytest.raises(UserError, match=r"by torch\.func \(grad"):
        torch.func.grad(lambda given: torch.func.functional_call(model, given, (x,)).square().sum())(given)
    torch.func.functional_call(model, given, (x,)).square().sum().backward()
    other(x).square().sum().backward()
    for name, layer in sparse_layers(other).items():
        assert torch.equal(given[f"{name}.blocks.delta"].grad, layer.delta.grad), name
    assert torch.equal(model(x), sparse()(x))


def test_a_transformer(products: list[int]) -> None:
    """Attached, with checkpointing as its own layers do it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=32,
    )  # fmt: skip
    model = sparseft.attach(
        transformers.AutoModelForCausalLM.from_config(config),
        sparseft.SylvaConfig(importance="random", block_size=8, sparsity=0.8),
    )
    ids = torch.arange(9)[None]
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert products == [7, 7]
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(input_ids=ids, labels=ids).loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == 14 and all(map(torch.equal, found, expected))

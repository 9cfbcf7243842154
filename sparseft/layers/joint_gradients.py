"""The gradients of all blocks of a decoder layer at once.

Where tokens are few, what a linear's weight gradient costs is its launch and the Python ahead of it, and a decoder
layer has seven linears. So each only leaves its operands, in the backward pass, at one node of the graph. That node
comes last, as it stands below all of them, and makes all gradients in one product.

It is made anew in each forward pass of the decoder layer, ahead of it. Its output, an empty tensor, is what the linears
take in place of their deltas: so they depend on the node, and give it no gradient.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparseft.kernels.block_group import BlockGroup
from sparseft.layers.product import Blocks, Left, applied
from sparseft.layers.sparse_linear import SparseLinear
from sparseft.models.decoder import decoder_layers


class JointGradients(torch.autograd.Function):
    """The node: takes deltas, for their gradients' sake."""

    @staticmethod
    def forward(ctx, joint, *deltas):
        ctx.set_materialize_grads(False)
        ctx.joint = joint
        ctx.left = {}  # by the pass that left it: `product.left_at`
        return deltas[0].new_empty(0)

    @staticmethod
    def backward(ctx, nothing):
        if torch.is_grad_enabled():  # a second derivative may be asked for, and has to be refused
            return _guarded(ctx, torch.zeros((), requires_grad=True))
        return _gradients(ctx, nothing)


def _gradients(ctx: Any, _: Any) -> tuple[Tensor | None, ...]:
    return (None, *ctx.joint.gradients(ctx.left.pop(torch._C._current_graph_task_id(), None)))


_guarded = once_differentiable(_gradients)  # asks its arguments whether they have a gradient
_make_node = applied(JointGradients)


class Joint:
    """The linears of one decoder layer that train blocks of one size."""

    def __init__(self, layers: Sequence[SparseLinear]) -> None:
        self.layers = list(layers)
        for place, layer in enumerate(self.layers):
            layer.joint = self, place
        self._forget()

    def _forget(self) -> None:
        self.node: Any = None
        self.token: Tensor | None = None
        self.deltas: list[Tensor] = []
        self._plans: tuple[Blocks, ...] = ()
        self._keys: list[int] = []
        self._group: BlockGroup | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers = state["layers"]
        self._forget()

    def begin(self, module: nn.Module, inputs: Any) -> None:
        """A hook: a forward pass of the decoder layer begins."""
        if torch.compiler.is_compiling():
            return  # the compiler sees each linear on its own
        self.node = self.token = None
        if torch.is_grad_enabled():
            self.deltas = [layer._modules["blocks"]._parameters["delta"] for layer in self.layers]
            token = _make_node(self, *self.deltas)
            if token.requires_grad:
                self.token, self.node = token, token.grad_fn

    def gradients(self, left: Left | None) -> list[Tensor | None]:
        """That of each linear, None where it left nothing; those made together are views of one tensor."""
        found: list[Tensor | None] = [None] * len(self.layers)
        if left is None:
            return found
        made = left.made
        if left.uses:
            places, plans, grads, xs = zip(*left.uses, strict=True)
            keys = list(map(id, plans))
            if keys != self._keys:
                self._keys, self._plans = keys, plans  # held, so that no other gets the number of one
                self._group = BlockGroup([(plan.rows, plan.columns) for plan in plans], plans[0].size)
            assert self._group is not None
            made = [*zip(places, self._group.gradients(grads, xs), strict=True), *made]
        for place, gradient in made:
            before = found[place]  # a linear may be used twice
            found[place] = gradient if before is None else before + gradient
        return found


def join(model: nn.Module) -> None:
    """Lets the linears of each decoder layer make the gradients of their blocks together, by what they train now.

    Others, those with patterns beside blocks, and experts, which are called with tokens of their own, go on making
    theirs alone.
    """
    separate(model)
    if getattr(model, "config", None) is None:
        return
    for module in decoder_layers(model)[1]:
        by_size: dict[int, list[SparseLinear]] = defaultdict(list)
        for layer in module.modules():
            if isinstance(layer, SparseLinear) and layer.joins and list(layer.patterns) == ["blocks"]:
                by_size[layer.patterns["blocks"].block_size].append(layer)
        for layers in by_size.values():
            if len(layers) > 1:
                module.register_forward_pre_hook(Joint(layers).begin)


def separate(model: nn.Module) -> None:
    """Takes back what `join` did."""
    for module in model.modules():
        if isinstance(module, SparseLinear):
            module.joint = None
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), Joint):
                del module._forward_pre_hooks[key]

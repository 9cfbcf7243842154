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
from sparseft.layers.pattern import changes
from sparseft.layers.product import Blocks, Left, applied, refuse_transforms
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
        # Each of these is one value: threads may call the layers, or go back, at the same time.
        # The last forward pass's node, its output, and by place the deltas that it gives gradients to.
        self.begun: tuple[Any, Tensor, list[Tensor | None]] | None = None
        self._fits = (-1, False)  # as of a count of `changes`
        # The last product, by its plans: held, so that no other gets the number of one.
        self._group: tuple[list[int], tuple[Blocks, ...], BlockGroup] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers = state["layers"]
        self._forget()

    def begin(self, module: nn.Module, inputs: Any) -> None:
        """A hook: a forward pass of the decoder layer begins."""
        if torch.compiler.is_compiling():
            return  # the compiler sees each linear on its own
        self.begun = None
        fits = self._fits
        if fits[0] != changes.count:
            count = changes.count  # before anything is read
            fits = self._fits = (count, _fit(self.layers))
        if fits[1] and torch.is_grad_enabled():
            refuse_transforms()
            deltas = [layer._modules["blocks"]._parameters["delta"] for layer in self.layers]
            token = _make_node(self, *deltas)
            if token.requires_grad:
                self.begun = token.grad_fn, token, [delta if delta.requires_grad else None for delta in deltas]

    def gradients(self, left: Left | None) -> list[Tensor | None]:
        """That of each linear, None where it left nothing; those made together are views of one tensor."""
        found: list[Tensor | None] = [None] * len(self.layers)
        if left is None:
            return found
        made = left.made
        if left.uses:
            places, plans, grads, xs = zip(*left.uses, strict=True)
            keys = list(map(id, plans))
            group = self._group
            if group is None or group[0] != keys:
                where = [(plan.rows, plan.columns) for plan in plans]
                group = self._group = keys, plans, BlockGroup(where, plans[0].size)
            made = [*zip(places, group[2].gradients(grads, xs), strict=True), *made]
        for place, gradient in made:
            before = found[place]  # a linear may be used twice
            found[place] = gradient if before is None else before + gradient
        return found


def _fit(layers: Sequence[SparseLinear]) -> bool:
    """Whether all train nothing but blocks, of one size: after a layer is given others, `join` looks at the model anew,
    but it may be called before. A delta that is computed is no parameter."""
    return all(_trains_blocks(layer) for layer in layers) and len({_size(layer) for layer in layers}) == 1


def _trains_blocks(layer: SparseLinear) -> bool:
    return layer.joins and list(layer.patterns) == ["blocks"] and "delta" in layer.patterns["blocks"]._parameters


def _size(layer: SparseLinear) -> int | None:
    return layer.patterns["blocks"].block_size


def join(model: nn.Module) -> None:
    """Lets the linears of each decoder layer make the gradients of their blocks together, by what they train now.

    Others, those with patterns beside blocks, and experts, which are called with tokens of their own, go on making
    theirs alone.
    """
    separate(model)
    if getattr(model, "config", None) is None:
        return
    for module in decoder_layers(model)[1]:
        by_size: dict[int | None, list[SparseLinear]] = defaultdict(list)
        for layer in module.modules():
            if isinstance(layer, SparseLinear) and _trains_blocks(layer):
                by_size[_size(layer)].append(layer)
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

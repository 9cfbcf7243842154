"""The product of all experts at once (transformers' `grouped_mm`), with the weight gradient on the patterns only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparseft.kernels import dispatch

Product = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x (tokens, a), weight (experts, a, b), offs) -> (tokens, b)


@dataclass(frozen=True)
class Part:
    """One pattern of one expert, with the delta that the same place of the arguments holds."""

    expert: int
    kind: str
    index: Tensor
    block_size: int | None


class GroupedProduct(torch.autograd.Function):
    """y[t] = W[e] x[t] for the tokens of each expert e: those up to `offs[e]`, from where the expert before ends.

    x (tokens, in) sorted by expert, weight (experts, out, in), offs (experts,) int32. The deltas enter for their
    gradients' sake: their values are already in the weight. An expert without a token gives its deltas no gradient,
    as the loop over experts does.
    """

    @staticmethod
    def forward(ctx, x, weight, offs, product, parts, *deltas):
        ctx.product, ctx.parts, ctx.bounds = product, parts, _bounds(offs, len(x))
        if all(part.kind == "columns" for part in parts):  # only slices of x, each in storage of its own
            slices = [_tokens(x, ctx.bounds, part).index_select(-1, part.index) for part in parts]
            ctx.whole = False
            ctx.save_for_backward(weight, offs, *slices)
        else:
            ctx.whole = True
            ctx.save_for_backward(weight, offs, x)
        return product(x, weight.transpose(-2, -1), offs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        weight, offs, *saved = ctx.saved_tensors
        grad_output = grad_output.to(weight.dtype).contiguous()
        grad_x = ctx.product(grad_output, weight, offs) if ctx.needs_input_grad[0] else None
        gradients = []
        for position, part in enumerate(ctx.parts):
            grad = _tokens(grad_output, ctx.bounds, part)
            if not len(grad):
                gradients.append(None)
                continue
            x = _tokens(saved[0], ctx.bounds, part) if ctx.whole else saved[position]
            gradients.append(_gradient(grad, x, part, sliced=not ctx.whole))
        return grad_x, None, None, None, None, *gradients


def _bounds(offs: Tensor, tokens: int) -> list[int]:
    """Where each expert's tokens begin, and where the last one's end. On the meta device, where `offs` has no content,
    all experts get as many: the products together are as large whoever gets which."""
    experts = len(offs)
    if offs.is_meta:
        return [tokens * number // experts for number in range(experts + 1)]
    return [0, *offs.tolist()]


def _tokens(x: Tensor, bounds: Sequence[int], part: Part) -> Tensor:
    return x[bounds[part.expert] : bounds[part.expert + 1]]


def _gradient(grad: Tensor, x: Tensor, part: Part, *, sliced: bool) -> Tensor:
    if part.kind == "rows":
        return dispatch.rows_gradient(grad, x, part.index)
    if part.kind == "columns":
        return dispatch.columns_gradient(grad, x if sliced else x.index_select(-1, part.index))
    assert part.block_size is not None
    return dispatch.blocks_gradient(grad, x, part.index[:, 0], part.index[:, 1], part.block_size)


def grouped_product(func: Any, x: Tensor, weight: Tensor, offs: Tensor, layers: dict[int, Any]) -> Tensor:
    """`func(x, weightᵀ, offs=offs)` with gradients for the deltas of `layers` (by expert)."""

    def product(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        return func(x, weight, offs=offs)

    parts, deltas = [], []
    for number, layer in layers.items():
        for kind, pattern in layer.patterns.items():
            if pattern.delta.requires_grad:
                parts.append(Part(number, kind, pattern.index, pattern.block_size))
                deltas.append(pattern.delta)
    if not deltas or not torch.is_grad_enabled():
        return product(x, weight.transpose(-2, -1), offs)
    return GroupedProduct.apply(x, weight, offs, product, parts, *deltas)

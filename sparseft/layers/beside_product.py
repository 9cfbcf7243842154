"""What deltas beside a base module make of its input: y = base(x) + x Δᵀ, and the gradients of that sum.

The base's own product gives its part of the input's gradient; here are the sparse product's part, and the deltas'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseft.kernels import grid, reference
from sparseft.kernels.reference import flat
from sparseft.layers.pattern import Pattern
from sparseft.layers.product import once


class BesideProduct(torch.autograd.Function):
    """y (…, out) plus x (…, in) times the transposed `values` of one pattern, in y's dtype; `delta` takes the gradient.

    values: what is multiplied by, shaped as the delta. Saves them and what `plan` keeps of x, no dense matrix.
    """

    @staticmethod
    def forward(ctx, y, x, delta, values, pattern, plan):
        ctx.save_for_backward(plan.kept(x, y.dtype), values)
        ctx.pattern, ctx.plan, ctx.in_features = pattern, plan, x.shape[-1]
        return added(y, x, values, pattern)

    @staticmethod
    @once
    def backward(ctx, grad_output):
        kept, values = ctx.saved_tensors
        grad_x = grad_delta = None
        if ctx.needs_input_grad[1]:
            grad_x = grad_output.new_zeros(*grad_output.shape[:-1], ctx.in_features)
            values = values.to(grad_output.dtype)
            values = values if ctx.pattern.kind == "grid" else values.transpose(-2, -1)
            add_product_(flat(grad_x), flat(grad_output), values, ctx.pattern, transposed=True)
        if ctx.needs_input_grad[2]:
            grad_delta = ctx.plan.gradient(grad_output, kept)
        return grad_output, grad_x, grad_delta, None, None, None


def added(y: Tensor, x: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """y (…, out) plus x (…, in) times the transposed values of the pattern, without gradients; y stays as it is."""
    result = y.detach().clone(memory_format=torch.contiguous_format)
    add_product_(flat(result), flat(x).to(y.dtype), values.to(y.dtype), pattern)
    return result


def add_product_(y: Tensor, x: Tensor, delta: Tensor, pattern: Pattern, *, transposed: bool = False) -> None:
    """Adds x (tokens, in) times the transposed delta of the pattern to y (tokens, out), in place.

    `transposed`: the product with the delta itself instead, x (tokens, out) and y (tokens, in); but for grids it is
    given as that of the transposed weight. Sums are taken in fp32 and rounded to
    y's dtype once, in an order that is always the same: each row of blocks is one product over all its blocks, as
    adding up blocks by `index_add_` is done by atomics on CUDA.
    """
    if pattern.kind == "grid":
        _add_grid_(y, x, delta, pattern, transposed)
    elif pattern.kind == "blocks":
        _add_blocks_(y, x, delta, pattern, transposed)
    elif (pattern.kind == "rows") != transposed:
        part = reference.product(x, delta.t())  # (tokens, k)
        if isinstance(pattern.at, tuple):
            y.narrow(1, *pattern.at).add_(part)
        else:
            y.index_copy_(1, pattern.at, (y.index_select(1, pattern.at) + part).to(y.dtype))
    else:
        y.add_(reference.product(reference.select(x, 1, pattern.at), delta.t()))


def _add_grid_(y: Tensor, x: Tensor, delta: Tensor, pattern: Pattern, transposed: bool) -> None:
    for rows, columns, matrix in grid.matrices(pattern.at, delta):
        takes, gives, own = (rows, columns, matrix) if transposed else (columns, rows, matrix.t())
        part = reference.product(x.index_select(1, takes), own)
        y.index_copy_(1, gives, (y.index_select(1, gives) + part).to(y.dtype))


def _add_blocks_(y: Tensor, x: Tensor, delta: Tensor, pattern: Pattern, transposed: bool) -> None:
    """As many rows of blocks at a time as make up about one x, so that memory does not grow with the blocks."""
    size, down, across = pattern.block_size, int(transposed), int(not transposed)
    assert size is not None
    pieces = reference.to_blocks(x, size)  # (tokens, block columns, B)
    total = x.new_zeros(len(y), -(-y.shape[1] // size), size, dtype=reference.sum_dtype(x.dtype))
    for rows, members in pattern.block_runs(down):
        count = members.shape[1]
        at_once = max(1, pieces.shape[1] // count)
        for some_rows, some in zip(rows.split(at_once), members.split(at_once), strict=True):
            columns = pattern.index[:, across].index_select(0, some.flatten())
            left = pieces.index_select(1, columns).view(len(x), len(some), count * size).transpose(0, 1)
            right = delta.index_select(0, some.flatten()).mT.reshape(len(some), count * size, size)
            part = reference.product(left.contiguous(), right)  # (rows of blocks, tokens, B)
            total.index_copy_(1, some_rows.to(total.device), part.transpose(0, 1))  # a plan keeps them on the CPU
    y.add_(total.flatten(1)[:, : y.shape[1]])

"""The unmerged forward, for weights that cannot be written: y = x W₀ᵀ + b + the deltas' own sparse product.

Under ZeRO-3 a process holds a shard of each weight and borrows the rest for the time of a product, so base + delta has
no place to stay. The weight then keeps the base, and what the deltas make of x is added to y. The deltas' gradients are
those of the merged forward; here is what that one has for free: the sparse product, and its part of the input gradient.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparseft.kernels import grid, reference
from sparseft.kernels.reference import flat
from sparseft.layers.pattern import Pattern


def add_deltas(y: Tensor, x: Tensor, patterns: Iterable[Pattern]) -> Tensor:
    """`y` (…, out) plus x (…, in) times the transposed deltas; patterns that overlap add up.

    Differentiable in y and x. The deltas' own gradients come from the product that made y.
    """
    for pattern in patterns:
        y = _SparseSum.apply(y, x, pattern.delta.detach(), pattern)
    return y


class _SparseSum(torch.autograd.Function):
    """y + x Δᵀ with Δ zero outside one pattern. Saves the pattern only: no activation, no dense Δ."""

    @staticmethod
    def forward(ctx, y, x, delta, pattern):
        ctx.save_for_backward(delta)
        ctx.pattern, ctx.in_features = pattern, x.shape[-1]
        result = y.clone(memory_format=torch.contiguous_format)
        add_product_(flat(result), flat(x).to(y.dtype), delta.to(y.dtype), pattern)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (delta,) = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = grad_output.new_zeros(*grad_output.shape[:-1], ctx.in_features)
            delta = delta.to(grad_output.dtype)
            delta = delta if ctx.pattern.kind == "grid" else delta.transpose(-2, -1)
            add_product_(flat(grad_x), flat(grad_output), delta, ctx.pattern, transposed=True)
        return grad_output, grad_x, None, None


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
            total.index_copy_(1, some_rows, part.transpose(0, 1))
    y.add_(total.flatten(1)[:, : y.shape[1]])

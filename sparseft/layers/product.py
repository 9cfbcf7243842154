"""The dense product whose weight gradient is the pattern's only, and what it saves of its input for that.

Rows need all of the input, which siblings that read the same one share; columns need a slice of it, and so do blocks,
unless the input is kept anyway (`layers/saved_inputs.py` settles that for a whole model).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparseft.kernels import dispatch, reference


@dataclass(frozen=True)
class Plan:
    """How a weight is stored, which of its entries train, and what of the input that takes in the backward pass.

    Rows and columns are indices (k,) into the stored weight, or (start, length) where they are consecutive. Of blocks
    (n, 2), `needed` (m,) are the block columns that a slice has and `position` (n,) each block's place among them;
    None: x itself is saved.
    """

    transposed: bool
    rows: Tensor | reference.Run | None = None
    columns: Tensor | reference.Run | None = None
    blocks: Tensor | None = None
    block_size: int | None = None
    needed: Tensor | None = None
    position: Tensor | None = None
    slices: SharedSlice | None = None

    @property
    def saves_input(self) -> bool:
        """Whether x itself is saved."""
        return self.rows is not None or (self.blocks is not None and self.needed is None)


class SparseProduct(torch.autograd.Function):
    """y = x Wᵀ + b with the weight gradient on the patterns only.

    The deltas enter for their gradients' sake: their values are already in the weight.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, rows_delta, columns_delta, blocks_delta, plan):
        y = dense_product(x, weight, bias, plan.transposed)
        ctx.bias_dtype = bias.dtype if bias is not None else None
        ctx.run, rows = (plan.rows, None) if isinstance(plan.rows, tuple) else (None, plan.rows)
        saved = [weight, rows, plan.blocks, plan.position, x if plan.saves_input else None]
        if isinstance(plan.columns, tuple):
            own = {"copy": True, "memory_format": torch.contiguous_format}  # a view would keep all of x alive
            saved.append(reference.select(x, -1, plan.columns).to(y.dtype, **own))
        else:
            saved.append(x.index_select(-1, plan.columns).to(y.dtype) if plan.columns is not None else None)
        if plan.blocks is not None and not plan.saves_input:
            take = slice_of if plan.slices is None else plan.slices.take
            saved.append(take(x, plan.needed, plan.block_size, y.dtype))
        else:
            saved.append(None)
        ctx.save_for_backward(*saved)
        ctx.transposed, ctx.size = plan.transposed, plan.block_size
        return y

    @staticmethod
    @once_differentiable  # a slice's own history is not kept, so a second derivative would be wrong without a word
    def backward(ctx, grad_output):
        weight, rows, blocks, position, x, x_columns, x_blocks = ctx.saved_tensors
        rows = rows if ctx.run is None else ctx.run
        grad_x = bias_grad = rows_grad = columns_grad = blocks_grad = None
        if ctx.needs_input_grad[0]:
            w = weight.to(grad_output.dtype)
            grad_x = grad_output @ (w.t() if ctx.transposed else w)
        grad = flat(grad_output)
        if ctx.needs_input_grad[2]:  # frozen unless the caller thawed it
            bias_grad = grad.sum(0).to(ctx.bias_dtype)
        if x is not None:
            x = flat(x).to(grad.dtype)
        if rows is not None:
            rows_grad = dispatch.rows_gradient(grad, x, rows)
        if x_columns is not None:
            columns_grad = dispatch.columns_gradient(grad, flat(x_columns).to(grad.dtype))
        if blocks is not None:
            x_side, at = (x, blocks[:, 1]) if x_blocks is None else (x_blocks.to(grad.dtype), position)
            blocks_grad = dispatch.blocks_gradient(grad, x_side, blocks[:, 0], at, ctx.size)
        return grad_x, None, bias_grad, rows_grad, columns_grad, blocks_grad, None


def dense_product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """x (…, in) times a weight stored as (out, in) or, `transposed`, as (in, out), plus the bias -> (…, out)."""
    if not transposed:
        return F.linear(x, weight, bias)
    tokens = x.reshape(-1, x.shape[-1])  # as Conv1D computes it, so that a fresh attach changes no bit
    y = tokens @ weight if bias is None else torch.addmm(bias, tokens, weight)
    return y.view(*x.shape[:-1], weight.shape[1])


def flat(x: Tensor) -> Tensor:
    """(..., features) as (tokens, features); no -1, which nothing says where there is no feature."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def slice_of(
    x: Tensor,  # (..., in)
    needed: Tensor,  # (k,) block columns
    size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The needed column blocks of x, in storage of their own: (tokens, k · size)."""
    return reference.to_blocks(flat(x), size).index_select(1, needed).flatten(1).to(dtype)


class SharedSlice:
    """One slice for all layers of blocks that are given the very same input: the first makes it, the others take it.

    Neither the input nor the slice is kept alive by this: graphs that have saved the slice do that.

    Args:
        columns: block columns that any of the layers needs, ascending, on the CPU.
    """

    def __init__(self, columns: Tensor) -> None:
        self.columns = columns
        # The input, its version, and the slice, as one value: threads may call the layers at the same time.
        self._last: tuple[weakref.ref[Tensor], int, weakref.ref[Tensor]] | None = None

    def take(self, x: Tensor, needed: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """As `slice_of`, with `needed` being `columns` on the device of x."""
        if torch.compiler.is_compiling():  # the compiler finds by itself what is computed twice
            return slice_of(x, needed, size, dtype)
        if x.is_inference():  # inference tensors have no version counter
            return slice_of(x, needed, size, dtype)
        if (last := self._last) is not None and last[0]() is x and last[1] == x._version:
            known = last[2]()
            if known is not None and known.dtype == dtype:
                return known
        version = x._version
        made = slice_of(x, needed, size, dtype)
        self._last = weakref.ref(x), version, weakref.ref(made)
        return made

    def __reduce__(self) -> Any:
        return SharedSlice, (self.columns,)  # copied layers share a new, empty one

"""The dense product whose weight gradient is the pattern's only, and what it saves of its input for that.

Rows need all of the input, which siblings that read the same one share; columns need a slice of it, and so do blocks,
unless the input is kept anyway (`layers/saved_inputs.py` settles that for a whole model).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparseft.errors import UserError
from sparseft.kernels import dispatch, reference
from sparseft.kernels.grid import Grids
from sparseft.kernels.reference import flat

# Of each kind: how it is trained, what its product keeps of x (…, in) for the backward pass, and what that makes of it
# and of grad_output (…, out) for the delta.


class Rows(NamedTuple):
    """How rows are trained: `at` (k,) in the stored weight, (start, length) where they are consecutive."""

    transposed: bool
    at: Tensor | reference.Run

    def kept(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x itself, which siblings that read it share."""
        return x

    def gradient(self, grad_output: Tensor, kept: Tensor) -> Tensor:
        """(k, in)."""
        return dispatch.rows_gradient(flat(grad_output), as_dtype(flat(kept), grad_output.dtype), self.at)


class Columns(NamedTuple):
    """How columns are trained: `count` ones, at (start, count), or at a `reference.padded` index."""

    transposed: bool
    at: Tensor | reference.Run
    count: int

    def kept(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The columns (…, count)."""
        return reference.aligned_columns(x, self.at, self.count, dtype)

    def gradient(self, grad_output: Tensor, kept: Tensor) -> Tensor:
        """(out, count)."""
        return dispatch.columns_gradient(flat(grad_output), as_dtype(flat(kept), grad_output.dtype))


class Blocks(NamedTuple):
    """How blocks are trained: `rows` and `columns` (n,) are each one's place in y and in what is saved of x.

    `needed` (m,) are the block columns that are saved, made by `take`; None: x itself is.
    """

    transposed: bool
    rows: Tensor
    columns: Tensor
    size: int
    needed: Tensor | None
    take: Callable[[Tensor, Tensor, int, torch.dtype], Tensor]
    joint_tokens: int  # below so many tokens, other weights' gradients are waited for

    def kept(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x itself or the block columns that are needed."""
        return x if self.needed is None else self.take(x, self.needed, self.size, dtype)

    def gradient(self, grad_output: Tensor, kept: Tensor) -> Tensor:
        """(n, B, B)."""
        kept = as_dtype(flat(kept), grad_output.dtype)
        return dispatch.blocks_gradient(flat(grad_output), kept, self.rows, self.columns, self.size)


class Grid(NamedTuple):
    """How grids are trained."""

    transposed: bool
    grids: Grids

    def kept(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The columns that any grid needs, (…, count)."""
        return reference.aligned_columns(x, self.grids.needed, self.grids.count, dtype)

    def gradient(self, grad_output: Tensor, kept: Tensor) -> Tensor:
        """(entries,)."""
        return dispatch.grid_gradient(flat(grad_output), as_dtype(flat(kept), grad_output.dtype), self.grids)


Plan = Rows | Columns | Blocks | Grid


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that cannot be differentiated itself: what was saved has no history, so a second derivative
    would be wrong without a word. torch's own guard costs as much as a small product: only where one may be asked."""
    guarded = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, grad_output: Tensor) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, grad_output)

    return run


class RowsProduct(torch.autograd.Function):
    """y = x Wᵀ + b of a frozen W (stored `transposed` or not) with the gradient of some rows, which `delta` takes: its
    values are in the weight already. x (…, in), delta (k, in)."""

    @staticmethod
    def forward(ctx, x, weight, bias, delta, plan):
        ctx.save_for_backward(weight, x)
        ctx.plan, ctx.weight = plan, weight
        return dense_product(x, weight, bias, plan.transposed)

    @staticmethod
    @once
    def backward(ctx, grad_output):
        weight, x = ctx.saved_tensors
        grad_x, bias_grad = _dense_gradients(ctx, grad_output, weight, ctx.plan.transposed)
        return grad_x, None, bias_grad, ctx.plan.gradient(grad_output, x), None


class ColumnsProduct(RowsProduct):
    """As `RowsProduct` for columns, delta (out, k), and for grids, delta (entries,)."""

    @staticmethod
    def forward(ctx, x, weight, bias, delta, plan):
        y = dense_product(x, weight, bias, plan.transposed)
        ctx.save_for_backward(weight, plan.kept(x, y.dtype))
        ctx.plan, ctx.weight = plan, weight
        return y


class BlocksProduct(torch.autograd.Function):
    """As `RowsProduct` for blocks, delta (n, B, B).

    With a node of `layers/joint_gradients.py`, where the linear has its place, the gradient is made by that node, and
    what is taken in place of the delta has none.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, delta, plan, node=None, place=0):
        y = dense_product(x, weight, bias, plan.transposed)
        ctx.save_for_backward(weight, plan.kept(x, y.dtype))
        ctx.plan, ctx.weight, ctx.node, ctx.place = plan, weight, node, place
        return y

    @staticmethod
    @once
    def backward(ctx, grad_output):
        weight, x = ctx.saved_tensors
        plan = ctx.plan
        grad_x, bias_grad = _dense_gradients(ctx, grad_output, weight, plan.transposed)
        if ctx.node is None:
            return grad_x, None, bias_grad, plan.gradient(grad_output, x), None, None, None
        left = left_at(ctx.node)
        if left is not None:
            if grad_output.numel() < plan.joint_tokens * grad_output.shape[-1]:
                left.uses.append((ctx.place, plan, grad_output, as_dtype(x, grad_output.dtype)))
            else:
                left.made.append((ctx.place, plan.gradient(grad_output, x)))
        return grad_x, None, bias_grad, None, None, None, None


class PatternsProduct(torch.autograd.Function):
    """As `RowsProduct` for any patterns of one weight, which may overlap: a delta and a plan each, or None."""

    @staticmethod
    def forward(ctx, x, weight, bias, rows_delta, columns_delta, blocks_delta, grid_delta, transposed, rows, columns,
                blocks, grid):  # fmt: skip
        y = dense_product(x, weight, bias, transposed)
        sliced = blocks is not None and blocks.needed is not None
        x_columns = None if columns is None else columns.kept(x, y.dtype)
        x_blocks = blocks.kept(x, y.dtype) if sliced else None
        whole = rows is not None or (blocks is not None and not sliced)
        x_grid = None if grid is None else grid.kept(x, y.dtype)
        ctx.save_for_backward(weight, x if whole else None, x_columns, x_blocks, x_grid)
        ctx.transposed, ctx.rows, ctx.columns, ctx.blocks, ctx.grid = transposed, rows, columns, blocks, grid
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        weight, x, x_columns, x_blocks, x_grid = ctx.saved_tensors
        grad_x, bias_grad = _dense_gradients(ctx, grad_output, weight, ctx.transposed)
        rows_grad = columns_grad = blocks_grad = grid_grad = None
        if ctx.rows is not None:
            rows_grad = ctx.rows.gradient(grad_output, x)
        if ctx.columns is not None:
            columns_grad = ctx.columns.gradient(grad_output, x_columns)
        if ctx.blocks is not None:
            blocks_grad = ctx.blocks.gradient(grad_output, x if x_blocks is None else x_blocks)
        if ctx.grid is not None:
            grid_grad = ctx.grid.gradient(grad_output, x_grid)
        return grad_x, None, bias_grad, rows_grad, columns_grad, blocks_grad, grid_grad, None, None, None, None, None


class Left:
    """What uses of linears leave for their gradients: the linear's place and plan, grad_output (…, out), and x (…, in)
    or its slice, of one dtype. `made` are gradients (n, B, B) by place, of operands that are too large to be kept until
    those of other linears are there."""

    __slots__ = ("made", "uses")

    def __init__(self) -> None:
        self.uses: list[tuple[int, Blocks, Tensor, Tensor]] = []
        self.made: list[tuple[int, Tensor]] = []


def left_at(node: Any) -> Left | None:
    """What was left at a node by the pass that runs, to add to; None where that pass does not come to the node, as only
    gradients of activations are asked for. By passes (torch's graph tasks), as another may have failed, or run at the
    same time."""
    task = torch._C._current_graph_task_id()
    left = node.left.get(task)
    if left is None and torch._C._will_engine_execute_node(node):
        left = node.left[task] = Left()
    return left


def applied(function: type[torch.autograd.Function]) -> Callable[..., Tensor]:
    """`function.apply` without what torch's Python does ahead of it for `torch.func`, which takes as long again. Its
    callers `refuse_transforms`: what is below does so as well, but asks to report a bug."""
    return super(torch.autograd.Function, function).apply


def refuse_transforms() -> None:
    """Raises `UserError` inside a transform of `torch.func`."""
    if torch._C._are_functorch_transforms_active():
        raise UserError(
            "sparse layers cannot be differentiated or mapped by torch.func (grad, vjp, jvp, vmap): use "
            "loss.backward() or torch.autograd.grad, also of a torch.func.functional_call."
        ) from None


# Their nodes say what made y again would take: `weight`, and `plan` with its order.
SINGLE_PATTERN = (RowsProduct, ColumnsProduct, BlocksProduct)
FUNCTIONS = (*SINGLE_PATTERN, PatternsProduct)


def _dense_gradients(
    ctx: Any, grad_output: Tensor, weight: Tensor, transposed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Those of x and of the bias, where they are needed."""
    grad_x = bias_grad = None
    needed = ctx.needs_input_grad
    if needed[0]:
        w = as_dtype(weight, grad_output.dtype)
        grad_x = grad_output @ (w.t() if transposed else w)
    if needed[2]:  # frozen unless the caller thawed it; autograd casts to the bias's own dtype
        bias_grad = flat(grad_output).sum(0)
    return grad_x, bias_grad


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which takes its time even where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def dense_product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """x (…, in) times a weight stored as (out, in) or, `transposed`, as (in, out), plus the bias -> (…, out)."""
    if not transposed:
        return F.linear(x, weight, bias)
    tokens = x.reshape(-1, x.shape[-1])  # as Conv1D computes it, so that a fresh attach changes no bit
    y = tokens @ weight if bias is None else torch.addmm(bias, tokens, weight)
    return y.view(*x.shape[:-1], weight.shape[1])


def slice_of(
    x: Tensor,  # (..., in)
    needed: Tensor,  # (k,) block columns
    size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The needed column blocks of x, in storage of their own: (tokens, k · size)."""
    features = x.shape[-1]
    if features % size == 0 and x.numel():  # no -1 without a token
        blocks = x.reshape(-1, features // size, size)
    else:
        blocks = reference.to_blocks(flat(x), size)
    return as_dtype(blocks.index_select(1, needed).flatten(1), dtype)


class SharedSlice:
    """One slice for all layers of blocks that are given the very same input: the first makes it, the others take it.

    The input is not kept alive by this, and the slice only as long as the input is: under hooks on saved tensors, as
    `training/recomputing.py` has them, a graph keeps another tensor than the one that it was given.

    Args:
        columns: block columns that any of the layers needs, ascending, on the CPU.
    """

    def __init__(self, columns: Tensor) -> None:
        self.columns = columns
        # The input, its version, and the slice, as one value: threads may call the layers at the same time.
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def take(self, x: Tensor, needed: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """As `slice_of`, with `needed` being `columns` on the device of x."""
        if x.is_inference():  # inference tensors have no version counter
            return slice_of(x, needed, size, dtype)
        last = self._last
        if last is not None and last[0]() is x and last[1] == x._version and last[2].dtype == dtype:
            return last[2]
        version, me = x._version, weakref.ref(self)

        def forget(input: weakref.ref[Tensor]) -> None:
            slices = me()
            if slices is not None and (last := slices._last) is not None and last[0] is input:
                slices._last = None

        made = slice_of(x, needed, size, dtype)
        self._last = weakref.ref(x, forget), version, made
        return made

    def __reduce__(self) -> Any:
        return SharedSlice, (self.columns,)  # copied layers share a new, empty one

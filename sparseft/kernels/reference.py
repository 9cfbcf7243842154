"""The pattern arithmetic in plain torch: reading and writing a weight's entries, and their gradients.

Which patterns there are of a logical weight W (out, in), with their indices and values, stands in `kernels/kinds.py`.
Weights stored transposed (Conv1D) are passed as their transposed view, so everything here sees (out, in).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseft.kernels.features import select
from sparseft.kernels.grid import Grids
from sparseft.kernels.kind import Run
from sparseft.kernels.kinds import KINDS

# From so many entries on, a block's operands are worth a product of their own on the CPU, without gathering them first.
OWN_PRODUCT = 2**15
# Entries of one operand that are gathered, or cast to fp32, at once: on the CPU what fits in the cache, elsewhere what
# bounds the memory.
GATHERED_CPU, GATHERED = 2**20, 2**26
# Whether a product of fp16 or bf16 can be had in fp32, as it was summed: in torch's builds for CUDA, since 2.8.
FP32_PRODUCTS = "dtype" in torch.ops.aten.mm.overloads() and not torch.version.hip

# Fast products of halves want rows that begin at multiples of 16 bytes.
ALIGNED = 8

At = Tensor | Run | Grids  # where the entries of a pattern lie


def padded(index: Tensor) -> Tensor:
    """An index (k,) with its last entry repeated until its length is a multiple of `ALIGNED`."""
    missing = -len(index) % ALIGNED
    return torch.cat([index, index[-1:].expand(missing)]) if missing else index


def aligned_columns(x: Tensor, at: Tensor | Run, count: int, dtype: torch.dtype) -> Tensor:
    """`count` columns of x (…, in) in `dtype`, (…, count), in storage of their own, each row of which begins at a
    multiple of `ALIGNED` entries. `at` is (start, count), or an index as `padded` makes it."""
    if not isinstance(at, tuple):
        columns = x.index_select(-1, at)
        columns = columns if columns.dtype == dtype else columns.to(dtype)
        return columns if len(at) == count else columns.narrow(-1, 0, count)
    wide = x.new_empty(*x.shape[:-1], count + -count % ALIGNED, dtype=dtype)
    return wide.narrow(-1, 0, count).copy_(x.narrow(-1, *at))


def flat(x: Tensor) -> Tensor:
    """(..., features) as (tokens, features)."""
    dims = x.dim()
    return x if dims == 2 else x.flatten(0, -2) if dims > 2 else x.unsqueeze(0)


def values_shape(kind: str, index: Tensor, shape: tuple[int, int], block_size: int | None) -> tuple[int, ...]:
    """The shape of a pattern's values on a weight of `shape` (out, in)."""
    return KINDS[kind].values_shape(index, shape, block_size)


def trainable_entries(kind: str, index: Tensor, shape: tuple[int, int], block_size: int | None) -> int:
    """How many entries of the weight the pattern covers: edge blocks count only what lies inside."""
    return KINDS[kind].entries(index, shape, block_size)


def gather(weight: Tensor, kind: str, index: At, block_size: int | None = None) -> Tensor:
    """A copy of the pattern's entries of `weight` (out, in), in its dtype."""
    return KINDS[kind].gather(weight, index, block_size)


def scatter_(weight: Tensor, kind: str, index: At, values: Tensor, block_size: int | None = None) -> None:
    """Writes the pattern's entries of `weight` (out, in) in place; `values` in the weight's dtype."""
    KINDS[kind].scatter_(weight, index, values, block_size)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what sums of products of `dtype` are taken and kept: fp32 at least.

    Kept in half precision, a sum over tokens leaves the range of fp16, and in bf16 each micro-step's gradient is
    rounded to 8 bits before it is accumulated.
    """
    return torch.float32 if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float64


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left (m, n) times right (n, k), or a batch of such (b, …), in `sum_dtype`."""
    multiply, dtype = (torch.mm if left.dim() == 2 else torch.bmm), sum_dtype(left.dtype)
    if out is None:
        if left.dtype == dtype and not (left.is_meta or torch.is_autocast_enabled(left.device.type)):
            return multiply(left, right)
        out = left.new_empty(*left.shape[:-1], right.shape[-1], dtype=dtype)
    if out.is_meta:
        return out  # nothing to compute; torch 2.11 does not know all of these products there
    # With `out` no product is autocast: one of fp32 within a backward pass under autocast would be rounded too.
    if left.dtype == dtype:
        return multiply(left, right, out=out)
    if _fp32_products(left):
        return multiply(left, right, out_dtype=dtype, out=out)
    return multiply(left.to(dtype), right.to(dtype), out=out)


def token_product(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right (a, b), the sum over the tokens of left (tokens, a) and right (tokens, b), in `sum_dtype`.

    Where halves have to be cast for that, a piece at a time: a copy of a whole activation would double its memory.
    """
    dtype = sum_dtype(left.dtype)
    if left.dtype == dtype or (len(left) and _fp32_products(left)):
        return product(left.t(), right)
    widest = max(left.shape[1], right.shape[1], 1)
    at_once = max(1, (GATHERED_CPU if left.device.type == "cpu" else GATHERED) // widest)
    if len(left) <= at_once:
        return product(left.to(dtype).t(), right.to(dtype))
    result = left.new_zeros(left.shape[1], right.shape[1], dtype=dtype)
    for one, other in zip(left.split(at_once), right.split(at_once), strict=True):
        result.addmm_(one.to(dtype).t(), other.to(dtype))
    return result


def _fp32_products(half: Tensor) -> bool:
    return FP32_PRODUCTS and (half.is_cuda or half.is_meta)


def rows_gradient(grad_output: Tensor, x: Tensor, rows: Tensor | Run) -> Tensor:
    """dW[rows, :] (k, in) in `sum_dtype`, from grad_output (tokens, out) and x (tokens, in)."""
    return token_product(select(grad_output, 1, rows), x)


def columns_gradient(grad_output: Tensor, x_columns: Tensor) -> Tensor:
    """dW[:, columns] (out, k) in `sum_dtype`, from grad_output (tokens, out) and x[:, columns] (tokens, k)."""
    return token_product(grad_output, x_columns)


def to_blocks(matrix: Tensor, block_size: int) -> Tensor:
    """(tokens, features) -> (tokens, blocks, B), the last block padded with zeros."""
    missing = -matrix.shape[1] % block_size
    if missing:
        matrix = F.pad(matrix, (0, missing))
    return matrix.reshape(matrix.shape[0], matrix.shape[1] // block_size, block_size)  # no -1: there may be no token


def blocks_gradient(grad_output: Tensor, x: Tensor, block_rows: Tensor, block_columns: Tensor, size: int) -> Tensor:
    """dW of the blocks (n, B, B) in `sum_dtype`, from grad_output (tokens, out) and x (tokens, in).

    Block b is `grad_output[:, block_rows[b]]ᵀ x[:, block_columns[b]]`; columns may count within a slice of x. On the
    CPU, large blocks take a product each, which looks at the indices' values: for those a GPU would have to wait.
    """
    # An edge block's part outside the weight stays zero.
    result = x.new_zeros(len(block_rows), size, size, dtype=sum_dtype(x.dtype))
    if len(x) == 0:
        return result
    if x.device.type == "cpu" and len(x) * size >= OWN_PRODUCT:
        _own_products(result, grad_output.t(), x, block_rows.tolist(), block_columns.tolist())
        return result
    # Each block's operands in one piece, (n, tokens, B): a batch over blocks that lie between each other in memory
    # takes 2 to 8 times as long.
    left, right = (to_blocks(one, size).transpose(0, 1) for one in (grad_output, x))
    at_once = max(1, (GATHERED_CPU if x.device.type == "cpu" else GATHERED) // (len(x) * size))
    for part, rows, columns in zip(*(t.split(at_once) for t in (result, block_rows, block_columns)), strict=True):
        product(left.index_select(0, rows).mT, right.index_select(0, columns), out=part)
    return result


def group_gradient(
    grads: Sequence[Tensor], xs: Sequence[Tensor], block_rows: Tensor, block_columns: Tensor, size: int
) -> Tensor:
    """dW of the blocks (n, B, B) of several weights in `sum_dtype`, from grads (tokens, out) and xs (tokens, in).

    `block_rows` and `block_columns` count on from weight to weight, as if their operands lay beside each other.
    """
    left, right = _strips(grads, block_rows, size), _strips(xs, block_columns, size)
    return product(left.mT, right)


def _strips(matrices: Sequence[Tensor], places: Tensor, size: int) -> Tensor:
    """Column blocks of matrices (tokens, …) that lie beside each other: (n, tokens, B)."""
    if any(matrix.shape[1] % size for matrix in matrices):
        matrices = [F.pad(matrix, (0, -matrix.shape[1] % size)) for matrix in matrices]
    joined = torch.cat(matrices, 1)
    return joined.view(len(joined), joined.shape[1] // size, size).transpose(0, 1).index_select(0, places)


def _own_products(result: Tensor, left: Tensor, right: Tensor, rows: list[int], columns: list[int]) -> None:
    """result[b] = left[block row b] @ right[:, block column b]: (n, B, B) from (out, tokens) and (tokens, in).

    As few operations a block as can be: each takes about as long as the product of a small one.
    """
    size = result.shape[1]
    for block, row, column in zip(result.unbind(), rows, columns, strict=True):
        height = min(size, left.shape[0] - row * size)
        width = min(size, right.shape[1] - column * size)
        inside = block if height == width == size else block[:height, :width]
        product(left.narrow(0, row * size, height), right.narrow(1, column * size, width), out=inside)


def take_columns(matrix: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """Of each row of a matrix (tokens, features) the entries that `columns` (lists, k) has for it, as `rows` (tokens,)
    says: (tokens, k). A piece at a time, since what is taken is named by 8 bytes an entry."""
    at_once = max(1, (GATHERED_CPU if matrix.device.type == "cpu" else GATHERED) // columns.shape[1])
    pieces = [
        part.gather(1, columns.index_select(0, row))
        for part, row in zip(matrix.split(at_once), rows.split(at_once), strict=True)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def experts_gradient(
    grad_output: Tensor, x: Tensor, offs: Tensor, parts: Tensor, total: int, block_size: int
) -> Tensor:
    """The weight gradients of experts' parts, one after another in one tensor (total,), in `sum_dtype`.

    grad_output (tokens, out) and x (tokens, in) are sorted by expert: expert e's tokens end at `offs[e]`. Each of
    `parts` (n, 6), those of one expert beside each other, is (expert, block row, block column, height, width, place of
    its first entry). With a `block_size` it is a block; with 0, the first columns of both operands, `height` and
    `width` of them. An expert without a token has a gradient of zeros. Looks at the values of `offs` and `parts`.
    """
    result = grad_output.new_zeros(total, dtype=sum_dtype(grad_output.dtype))
    if result.is_meta:
        return result
    ends = offs.tolist()
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    grads, inputs = grad_output[: ends[-1]].split(lengths), x[: ends[-1]].split(lengths)
    experts, counts = parts[:, 0].unique_consecutive(return_counts=True)
    heads = parts[counts.cumsum(0) - counts].tolist()
    for (expert, _, _, height, width, place), own in zip(heads, parts.split(counts.tolist()), strict=True):
        if not lengths[expert]:
            continue
        left, right = grads[expert], inputs[expert]
        if block_size:
            found = blocks_gradient(left, right, own[:, 1], own[:, 2], block_size)
        else:
            left = left if left.shape[1] == height else left[:, :height]
            found = token_product(left, right if right.shape[1] == width else right[:, :width])
        result[place : place + found.numel()] = found.view(-1)
    return result

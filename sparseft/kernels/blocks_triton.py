"""The weight gradient of chosen blocks by one Triton kernel: each program sums one tile over one run of the tokens.

Block b of the result is `grad_output[:, rows of b]ᵀ @ x[:, columns of b]`, accumulated and returned in fp32. Nothing is
gathered or padded beforehand: a program reads its two strips of the operands where they lie, by their strides.

Where blocks are few, their programs would leave most of the GPU idle (4096×4096 at 98.4 % sparsity has 66 blocks of
64×64, an H200 132 multiprocessors), so the tokens are split too. Each split writes its own partial sum and a second
launch adds them up in a fixed order: the result is the same bit for bit in every run, which atomic adds would not give.

Importing this needs triton. With TRITON_INTERPRET=1 set before, the kernel runs on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as triton itself read it, on import

# tl.dot takes no side below 16: smaller blocks are padded with masked, zero entries.
SMALLEST_TILE, LARGEST_TILE = 16, 128
LARGEST_TILE_FP32 = 64  # twice the registers and shared memory an entry
FEWEST_TOKENS = 512  # a split's; with less, its partial sum costs more memory traffic than the strips it reads
SPLIT_FROM = 2048  # tokens; with less, the second launch takes longer than what the idle multiprocessors would save
MOST_SPLITS = 65535  # the launch grid's second side
PROGRAMS_A_PROCESSOR = 2  # that many should be in flight before splitting stops


def _interpreted_steps(first, last, step):
    """`range` over the interpreter's numbers: triton 3.6 cannot turn them into Python's from numpy 2.4 on."""
    at = first
    while at < last:
        yield at
        at += step


steps = _interpreted_steps if INTERPRETED else tl.range  # compiled, a `while` would not be pipelined


@triton.jit
def sum_of_tokens(
    total, grad_strip, x_strip, row_inside, column_inside, grad_token, x_token, first, last,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`total` (rows, columns) fp32 plus, for the tokens from `first` to before `last`, the products of their entries in
    two strips: pointers (rows, 1) and (1, columns) to the first token's, the others' following by a stride. Rows and
    columns that are not inside are zero."""
    for start in steps(first, last, CHUNK):
        token = start + tl.arange(0, CHUNK)
        there = token < last
        at = token.to(tl.int64)
        left = tl.load(grad_strip + at[None, :] * grad_token, mask=row_inside[:, None] & there[None, :], other=0.0)
        right = tl.load(x_strip + at[:, None] * x_token, mask=there[:, None] & column_inside[None, :], other=0.0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["tokens", "split"])
def _blocks_kernel(
    grad_output, x, block_rows, block_columns, out,
    tokens, split, out_features, in_features,
    grad_token, grad_feature, x_token, x_feature, rows_stride, columns_stride, out_split,
    SIZE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (tile of a block, split): a TILE×TILE part of one block over the tokens of one split.

    `out` is (splits, n, SIZE, SIZE) fp32. What lies outside the block, the weight or the split is masked to zero.
    """
    program = tl.program_id(0)
    block = program // (TILES * TILES)
    tile = program % (TILES * TILES)
    down = tile // TILES * TILE + tl.arange(0, TILE)  # row and column inside the block
    across = tile % TILES * TILE + tl.arange(0, TILE)
    # int64 wherever a product with a stride may pass 2³¹ elements.
    row = tl.load(block_rows + block.to(tl.int64) * rows_stride) * SIZE + down
    column = tl.load(block_columns + block.to(tl.int64) * columns_stride) * SIZE + across
    row_inside = (down < SIZE) & (row < out_features)
    column_inside = (across < SIZE) & (column < in_features)
    grad_strip = grad_output + row[:, None].to(tl.int64) * grad_feature
    x_strip = x + column[None, :].to(tl.int64) * x_feature
    first = tl.program_id(1) * split
    last = tl.minimum(first + split, tokens)
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    total = sum_of_tokens(
        total, grad_strip, x_strip, row_inside, column_inside, grad_token, x_token, first, last,
        CHUNK, PRECISION, UPCAST,
    )  # fmt: skip
    place = tl.program_id(1).to(tl.int64) * out_split + block.to(tl.int64) * SIZE * SIZE
    inside = (down < SIZE)[:, None] & (across < SIZE)[None, :]
    tl.store(out + place + down[:, None] * SIZE + across[None, :], total, mask=inside)


@functools.cache
def tile_of(size: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(tile's side, tokens a step, warps, pipeline stages) for blocks of `size` in `dtype`."""
    largest = LARGEST_TILE_FP32 if dtype == torch.float32 else LARGEST_TILE
    tile = min(max(triton.next_power_of_2(size), SMALLEST_TILE), largest)
    chunk = 16 if dtype == torch.float32 else 32 if tile >= 128 else 64  # with more, registers do not suffice
    return tile, chunk, (8 if tile >= 128 else 4 if tile >= 32 else 2), 3


def splits_of(tokens: int, programs: int, processors: int) -> int:
    """In how many runs to split the tokens, where `programs` tiles are to keep `processors` busy."""
    wanted = triton.cdiv(PROGRAMS_A_PROCESSOR * processors, programs)
    return max(1, min(wanted, tokens // FEWEST_TOKENS, MOST_SPLITS)) if tokens >= SPLIT_FROM else 1


@functools.cache  # asking the device takes as long as a small product
def processors_of(device: torch.device) -> int:
    """Its multiprocessors; 1 where Triton's interpreter stands for a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Inside, `device` is the current one, on which Triton launches; nothing to do for the CPU."""
    there = device.type != "cuda" or device.index == torch.cuda.current_device()
    return contextlib.nullcontext() if there else torch.cuda.device(device)


def tf32_allowed() -> bool:
    """Whether torch's own fp32 products may round their operands to TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"  # asking by its old name can be an error


def blocks_gradient(
    grad_output: Tensor, x: Tensor, block_rows: Tensor, block_columns: Tensor, size: int, *, splits: int | None = None
) -> Tensor:
    """dW of the blocks, (n, B, B) in fp32, from grad_output (tokens, out) and x (tokens, in) of any strides.

    Args:
        grad_output, x: bf16, fp16 or fp32, the same for both. `x` may be the needed column blocks of it alone.
        block_rows, block_columns: (n,) int64: each block's place among those of `grad_output` and of `x`.
        size: B, any size. The part of an edge block outside the operands is zero.
        splits: runs the tokens are split into; None: by the number of multiprocessors.

    fp32 products are IEEE's unless `torch.backends.cuda.matmul.allow_tf32` is set, as torch's own are.
    """
    tokens, count = len(grad_output), len(block_rows)
    if not tokens or not count:
        return torch.zeros(count, size, size, dtype=torch.float32, device=x.device)
    tile, chunk, warps, stages = tile_of(size, x.dtype)
    tiles = triton.cdiv(size, tile)
    programs = count * tiles * tiles
    if splits is None:
        splits = splits_of(tokens, programs, processors_of(x.device))
    split = triton.cdiv(triton.cdiv(tokens, splits), chunk) * chunk  # whole steps
    splits = triton.cdiv(tokens, split)
    out = torch.empty(splits, count, size, size, dtype=torch.float32, device=x.device)
    with current(x.device):
        _blocks_kernel[(programs, splits)](
            grad_output, x, block_rows, block_columns, out,
            tokens, split, grad_output.shape[1], x.shape[1],
            *grad_output.stride(), *x.stride(), block_rows.stride(0), block_columns.stride(0), out.stride(0),
            SIZE=size, TILE=tile, TILES=tiles, CHUNK=chunk,
            PRECISION="tf32" if tf32_allowed() else "ieee",
            # The interpreter holds bf16 as integers, of which its dot would take the product. Compiled, this is false.
            UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0)

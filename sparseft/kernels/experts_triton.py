"""The weight gradients of all experts that train a pattern by one Triton launch, whoever gets how many tokens.

Each program sums one tile of one part of the result over the tokens of the part's expert, which it finds in `offs` on
the device: the host waits for nothing, and launches no more for many experts than for few. Sums are taken and kept in
fp32 (torch's own grouped product rounds them to the operands' dtype), in one certain order.

Importing this needs triton; with TRITON_INTERPRET=1 set before, the kernel runs on CPU tensors, as in
`kernels/blocks_triton.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft.kernels.blocks_triton import (
    INTERPRETED,
    LARGEST_TILE,
    LARGEST_TILE_FP32,
    SMALLEST_TILE,
    current,
    sum_of_tokens,
    tf32_allowed,
)

FIELDS = 6  # of a part: expert, block row, block column, height, width, place in the result
EDGE = 16  # what a place counts in where there are no blocks: all are 0 then


@triton.jit
def _experts_kernel(
    grad_output, x, offs, parts, out,
    out_features, in_features, grad_token, grad_feature, x_token, x_feature, tiles_across,
    UNIT: tl.constexpr, FIELDS: tl.constexpr, TILES: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (tile of a part): DOWN×ACROSS entries. What lies outside the operands is masked to zero."""
    part = parts + (tl.program_id(0) // TILES).to(tl.int64) * FIELDS
    tile = tl.program_id(0) % TILES
    expert = tl.load(part)
    height = tl.load(part + 3)
    width = tl.load(part + 4)
    down = tile // tiles_across * DOWN + tl.arange(0, DOWN)  # row and column inside the part
    across = tile % tiles_across * ACROSS + tl.arange(0, ACROSS)
    row = tl.load(part + 1) * UNIT + down
    column = tl.load(part + 2) * UNIT + across
    # Not by the part's own sides, of which nothing is known when this is compiled: loads would be an entry each.
    row_inside = row < out_features
    column_inside = column < in_features
    # int64 wherever a product with a stride may pass 2³¹ elements, as what `parts` holds is.
    grad_strip = grad_output + row[:, None] * grad_feature
    x_strip = x + column[None, :] * x_feature
    first = tl.load(offs + expert - 1, mask=expert > 0, other=0).to(tl.int32)
    last = tl.load(offs + expert).to(tl.int32)
    total = tl.zeros((DOWN, ACROSS), dtype=tl.float32)
    total = sum_of_tokens(
        total, grad_strip, x_strip, row_inside, column_inside, grad_token, x_token, first, last,
        CHUNK, PRECISION, UPCAST,
    )  # fmt: skip
    inside = (down < height)[:, None] & (across < width)[None, :]
    tl.store(out + tl.load(part + 5) + down[:, None] * width + across[None, :], total, mask=inside)


def tiles_of(height: int, width: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """(tile's height, its width, tokens a step, warps, pipeline stages) for parts of at most height × width."""
    largest = LARGEST_TILE_FP32 if dtype == torch.float32 else LARGEST_TILE
    down, across = (min(max(triton.next_power_of_2(side), SMALLEST_TILE), largest) for side in (height, width))
    area = down * across
    chunk = 32 if area > 128 * 64 or dtype == torch.float32 else 64
    return down, across, chunk, (8 if area >= 128 * 64 else 4 if area >= 64 * 16 else 2), 3


def experts_gradient(
    grad_output: Tensor, x: Tensor, offs: Tensor, parts: Tensor, sizes: tuple[int, int], total: int, block_size: int
) -> Tensor:
    """As `reference.experts_gradient`, for bf16, fp16 or fp32 of any strides; sums are fp32's.

    fp32 products are IEEE's unless `torch.backends.cuda.matmul.allow_tf32` is set, as torch's own are.
    """
    height, width = sizes
    out = torch.empty(total, dtype=torch.float32, device=x.device)
    if not total:
        return out
    down, across, chunk, warps, stages = tiles_of(height, width, x.dtype)
    tiles_across = triton.cdiv(width, across)
    tiles = triton.cdiv(height, down) * tiles_across
    with current(x.device):
        _experts_kernel[(len(parts) * tiles,)](
            grad_output, x, offs, parts, out,
            grad_output.shape[1], x.shape[1], *grad_output.stride(), *x.stride(), tiles_across,
            UNIT=block_size or EDGE, FIELDS=FIELDS, TILES=tiles, DOWN=down, ACROSS=across, CHUNK=chunk,
            PRECISION="tf32" if tf32_allowed() else "ieee",
            # The interpreter holds bf16 as integers, of which its dot would take the product. Compiled, this is false.
            UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out

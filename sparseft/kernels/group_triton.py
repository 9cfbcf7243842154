"""The weight gradients of chosen blocks of several weights by one Triton kernel, in one launch without splits.

Its programs are those of `blocks_triton`, a tile of a block each. Which weight a block is of, and where, stands in a
table that is made once; where the operands lie (addresses, strides), which autograd allocates anew for each pass, in a
small one that is made again where one of them lies elsewhere than the last time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft.kernels.blocks_triton import INTERPRETED, current, steps, tf32_allowed, tile_of

FIELDS = 9  # int64 numbers that describe the operands of one weight: `_describe`
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _group_kernel(
    blocks, table, out,
    SIZE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, CHUNK: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, FIELDS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program: a TILE×TILE part of one block, summed over all tokens.

    blocks (n, 3) int32: weight, block row, block column; table (weights, FIELDS) int64; out (n, SIZE, SIZE) fp32.
    ALIGNED: addresses, tokens' strides and features are multiples of 16, and features lie beside each other.
    """
    program = tl.program_id(0)
    block = program // (TILES * TILES)
    tile = program % (TILES * TILES)
    down = tile // TILES * TILE + tl.arange(0, TILE)
    across = tile % TILES * TILE + tl.arange(0, TILE)
    line = table + tl.load(blocks + 3 * block) * FIELDS
    grad_output = tl.load(line).to(tl.pointer_type(DTYPE))
    x = tl.load(line + 1).to(tl.pointer_type(DTYPE))
    grad_token = tl.load(line + 2)
    x_token = tl.load(line + 4)
    height = tl.load(line + 7)
    width = tl.load(line + 8)
    if ALIGNED:
        height = tl.multiple_of(height, 16)
        width = tl.multiple_of(width, 16)
        grad_output = tl.multiple_of(grad_output, 16)
        x = tl.multiple_of(x, 16)
        grad_token = tl.multiple_of(grad_token, 16)
        x_token = tl.multiple_of(x_token, 16)
        grad_feature = 1
        x_feature = 1
    else:
        grad_feature = tl.load(line + 3)
        x_feature = tl.load(line + 5)
    tokens = tl.load(line + 6).to(tl.int32)
    row = tl.load(blocks + 3 * block + 1) * SIZE + down
    column = tl.load(blocks + 3 * block + 2) * SIZE + across
    row_inside = (down < SIZE) & (row < height)
    column_inside = (across < SIZE) & (column < width)
    grad_strip = grad_output + row[:, None].to(tl.int64) * grad_feature
    x_strip = x + column[None, :].to(tl.int64) * x_feature
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in steps(0, tokens, CHUNK):
        token = start + tl.arange(0, CHUNK)
        there = token < tokens
        at = token.to(tl.int64)
        left = tl.load(grad_strip + at[None, :] * grad_token, mask=row_inside[:, None] & there[None, :], other=0.0)
        right = tl.load(x_strip + at[:, None] * x_token, mask=there[:, None] & column_inside[None, :], other=0.0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    place = out + block.to(tl.int64) * SIZE * SIZE
    inside = (down < SIZE)[:, None] & (across < SIZE)[None, :]
    tl.store(place + down[:, None] * SIZE + across[None, :], total, mask=inside)


def _describe(grad_output: Tensor, x: Tensor) -> list[int]:
    """The FIELDS of one weight's operands."""
    addresses = (grad_output.data_ptr(), x.data_ptr())
    return [*addresses, *grad_output.stride(), *x.stride(), len(x), grad_output.shape[1], x.shape[1]]


def is_aligned(fields: Sequence[int]) -> bool:
    grad_output, x, grad_token, grad_feature, x_token, x_feature, _, height, width = fields
    return grad_feature == x_feature == 1 and not any(
        number % 16 for number in (grad_output, x, grad_token, x_token, height, width)
    )


class Launch:
    """The gradients of blocks of `size` of several weights; places as in `block_group.BlockGroup`."""

    def __init__(self, places: Sequence[tuple[Tensor, Tensor]], size: int) -> None:
        self.size = size
        numbered = [
            torch.stack([torch.full_like(rows, number), rows, columns], dim=1)
            for number, (rows, columns) in enumerate(places)
        ]
        self.blocks = torch.cat(numbered).to(torch.int32)
        self._fields: list[list[int]] = []
        self._table: Tensor | None = None
        self._aligned = False

    def run(self, grads: Sequence[Tensor], xs: Sequence[Tensor]) -> Tensor:
        """All blocks (n, B, B) in fp32, from operands (tokens, …) of any strides, of one dtype on one device."""
        dtype, device = grads[0].dtype, self.blocks.device
        fields = [_describe(grad, x) for grad, x in zip(grads, xs, strict=True)]
        if fields != self._fields:
            self._fields, self._aligned = fields, all(is_aligned(line) for line in fields)
            # From pinned memory, so that nothing waits for the device.
            pinned = torch.tensor(fields, dtype=torch.int64, pin_memory=device.type == "cuda")
            self._table = pinned.to(device, non_blocking=True)
        tile, chunk, warps, stages = tile_of(self.size, dtype)
        tiles = triton.cdiv(self.size, tile)
        count = len(self.blocks)
        out = torch.empty(count, self.size, self.size, dtype=torch.float32, device=device)
        with current(device):
            _group_kernel[(count * tiles * tiles,)](
                self.blocks, self._table, out,
                SIZE=self.size, TILE=tile, TILES=tiles, CHUNK=chunk, DTYPE=DTYPES[dtype], ALIGNED=self._aligned,
                FIELDS=FIELDS, PRECISION="tf32" if tf32_allowed() else "ieee",
                UPCAST=INTERPRETED and dtype == torch.bfloat16, num_warps=warps, num_stages=stages,
            )  # fmt: skip
        return out

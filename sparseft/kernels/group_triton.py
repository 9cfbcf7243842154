"""The weight gradients of chosen blocks of several weights by one Triton kernel, in one launch without splits.

Its programs are those of `blocks_triton`, a tile of a block each. Which weight a block is of, and where, stands in a
table that is made once; where the operands lie (addresses, strides), which autograd allocates anew for each pass, in a
small one that is made again where one of them lies elsewhere than the last time.
"""

from __future__ import annotations

import array
import functools
import operator
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft.kernels.blocks_triton import INTERPRETED, current, sum_of_tokens, tf32_allowed, tile_of
from sparseft.kernels.reference import flat

FIELDS = 9  # int64 numbers that describe the operands of one weight: their addresses, and `_layout`
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
    total = sum_of_tokens(
        total, grad_strip, x_strip, row_inside, column_inside, grad_token, x_token, 0, tokens,
        CHUNK, PRECISION, UPCAST,
    )  # fmt: skip
    place = out + block.to(tl.int64) * SIZE * SIZE
    inside = (down < SIZE)[:, None] & (across < SIZE)[None, :]
    tl.store(place + down[:, None] * SIZE + across[None, :], total, mask=inside)


def _layout(grad_output: Tensor, x: Tensor) -> tuple[int, ...]:
    """The FIELDS of one weight's operands (tokens, …) that follow their two addresses."""
    return (*grad_output.stride(), *x.stride(), x.shape[0], grad_output.shape[1], x.shape[1])


def _is_regular(layout: Sequence[int]) -> bool:
    grad_token, grad_feature, x_token, x_feature, _, height, width = layout
    return grad_feature == x_feature == 1 and not (grad_token | x_token | height | width) % 16


def is_aligned(addresses: Sequence[int], regular: bool) -> bool:
    """What the kernel calls ALIGNED; `regular`: all layouts are as it needs them."""
    return regular and functools.reduce(operator.or_, addresses) % 16 == 0


class Launch:
    """The gradients of blocks of `size` of several weights; places as in `block_group.BlockGroup`."""

    def __init__(self, places: Sequence[tuple[Tensor, Tensor]], size: int) -> None:
        self.size = size
        numbered = [
            torch.stack([torch.full_like(rows, number), rows, columns], dim=1)
            for number, (rows, columns) in enumerate(places)
        ]
        self.blocks = torch.cat(numbered).to(torch.int32)
        self._count, self._device = len(self.blocks), self.blocks.device
        self._shapes: list[torch.Size] = []  # of contiguous operands, by which their layouts are known
        self._layouts: list[tuple[int, ...]] = []
        self._addresses: list[int] = []
        self._regular = self._aligned = False
        self._table: Tensor | None = None

    def run(self, grads: Sequence[Tensor], xs: Sequence[Tensor]) -> Tensor:
        """All blocks (n, B, B) in fp32, from operands (…, features) of any strides, of one dtype on one device."""
        operands = [*grads, *xs]
        if not all(map(Tensor.is_contiguous, operands)):
            operands = [*map(flat, operands)]  # held until the launch is queued: it may have copied
            self._shapes = []
            self._take_layouts(operands)
        elif (shapes := [operand.shape for operand in operands]) != self._shapes:
            self._shapes = shapes
            self._take_layouts([*map(flat, operands)])
        addresses = [*map(Tensor.data_ptr, operands)]
        if addresses != self._addresses:
            self._send(addresses)
        dtype, device, count = grads[0].dtype, self._device, self._count
        tile, chunk, warps, stages = tile_of(self.size, dtype)
        tiles = -(-self.size // tile)
        out = torch.empty(count, self.size, self.size, dtype=torch.float32, device=device)
        with current(device):
            _group_kernel[(count * tiles * tiles,)](
                self.blocks, self._table, out,
                SIZE=self.size, TILE=tile, TILES=tiles, CHUNK=chunk, DTYPE=DTYPES[dtype], ALIGNED=self._aligned,
                FIELDS=FIELDS, PRECISION="tf32" if tf32_allowed() else "ieee",
                UPCAST=INTERPRETED and dtype == torch.bfloat16, num_warps=warps, num_stages=stages,
            )  # fmt: skip
        return out

    def _take_layouts(self, operands: Sequence[Tensor]) -> None:
        half = len(operands) // 2
        self._layouts = [*map(_layout, operands[:half], operands[half:])]
        self._regular = all(map(_is_regular, self._layouts))
        self._addresses = []  # sent with layouts

    def _send(self, addresses: list[int]) -> None:
        self._addresses, self._aligned = addresses, is_aligned(addresses, self._regular)
        fields = array.array("q")
        half = len(addresses) // 2
        for line in zip(addresses[:half], addresses[half:], self._layouts, strict=True):
            fields.extend((line[0], line[1], *line[2]))
        sent = torch.frombuffer(fields, dtype=torch.int64)  # which takes a fifth of torch.tensor's time
        if self._device.type == "cuda":  # from pinned memory, so that nothing waits for the device
            sent = sent.pin_memory().to(self._device, non_blocking=True)
        self._table = sent

"""The gradients of blocks of several weights in one product: what a launch costs is paid once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseft.kernels import dispatch, reference

if TYPE_CHECKING:
    from sparseft.kernels.group_triton import Launch

# Below so many tokens operands are worth keeping for one product: with more, products outlast their launches, and the
# kernel of one weight splits its tokens.
JOINT_TOKENS = 2048
# Tokens times the side of a block, likewise, on the CPU, where operands are copied beside each other: with more, copies
# would take memory that counts, and products take the time anyway.
JOINT_CPU = 2**10


def joint_tokens(size: int, device: torch.device) -> int:
    """Below how many tokens blocks of `size` are worth a product with those of other weights; 0: never."""
    if size % 2:  # gradients would begin off 16 bytes, where the optimizer's kernel is slow
        return 0
    return min(JOINT_TOKENS, JOINT_CPU // size) if device.type == "cpu" else JOINT_TOKENS


class BlockGroup:
    """Blocks of several weights, of one size; their operands are always given in the same order.

    Args:
        places: of each weight the block rows and block columns (n,) int64 of its blocks.
        size: B.
    """

    def __init__(self, places: Sequence[tuple[Tensor, Tensor]], size: int) -> None:
        self.places, self.size = list(places), size
        self._counts = [len(rows) for rows, _ in places]
        self._widths: list[tuple[int, int]] = []
        self._joined: tuple[Tensor, Tensor] | None = None
        self._launch: Launch | None = None

    def gradients(self, grads: Sequence[Tensor], xs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Of each weight what `dispatch.blocks_gradient` gives, of operands (…, features); where it is one product,
        views of one tensor."""
        first = grads[0]
        dtype, device = first.dtype, first.device
        before = [grad.shape[:-1] for grad in grads]
        if before.count(before[0]) < len(before) and len({shape.numel() for shape in before}) > 1:
            return self._one_by_one(grads, xs)
        for grad in grads:
            if grad.dtype != dtype or grad.device != device:
                return self._one_by_one(grads, xs)
        kernel = dispatch.kernel_for(first)
        if kernel is not None and not (first.is_cuda and torch.cuda.is_current_stream_capturing()):
            if self._launch is None:
                from sparseft.kernels.group_triton import Launch

                self._launch = Launch(self.places, self.size)
            joint = self._launch.run(grads, xs)
        elif kernel is None and device.type == "cpu":
            grads, xs = [*map(reference.flat, grads)], [*map(reference.flat, xs)]
            joint = reference.group_gradient(grads, xs, *self._in_one(grads, xs), self.size)
            joint = joint if joint.dtype == torch.float32 else joint.float()
        else:  # a captured launch reads its table later; and copies side by side are for small memories of fast access
            return self._one_by_one(grads, xs)
        return joint.split_with_sizes(self._counts)

    def _one_by_one(self, grads: Sequence[Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
        return [
            dispatch.blocks_gradient(reference.flat(grad), reference.flat(x), rows, columns, self.size)
            for grad, x, (rows, columns) in zip(grads, xs, self.places, strict=True)
        ]

    def _in_one(self, grads: Sequence[Tensor], xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The block rows and columns as they are where the operands lie beside each other."""
        widths = [(grad.shape[1], x.shape[1]) for grad, x in zip(grads, xs, strict=True)]
        if self._joined is None or widths != self._widths:
            rows, columns, down, across = [], [], 0, 0
            for (row, column), (height, width) in zip(self.places, widths, strict=True):
                rows.append(row + down)
                columns.append(column + across)
                down, across = down - (-height // self.size), across - (-width // self.size)
            self._widths, self._joined = widths, (torch.cat(rows), torch.cat(columns))
        return self._joined

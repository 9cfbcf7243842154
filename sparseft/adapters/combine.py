"""Weighted sums of sparse deltas whose patterns differ: the patterns are united."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Values(NamedTuple):
    """One pattern's content: index (k,) or (n, 2), int64; delta in the shapes of `kernels/reference.py`, fp32."""

    index: Tensor
    delta: Tensor
    block_size: int | None = None


def split_blocks(value: Values, size: int, shape: tuple[int, int]) -> Values:
    """The same blocks cut into size×size ones; those wholly outside a weight of `shape` (out, in) are dropped."""
    assert value.block_size is not None and value.block_size % size == 0
    per_side = value.block_size // size
    if per_side == 1:
        return value
    n = len(value.index)
    parts = value.delta.reshape(n, per_side, size, per_side, size).permute(0, 1, 3, 2, 4).reshape(-1, size, size)
    offsets = torch.cartesian_prod(torch.arange(per_side), torch.arange(per_side))
    index = (value.index[:, None, :] * per_side + offsets[None]).reshape(-1, 2)
    inside = (index[:, 0] * size < shape[0]) & (index[:, 1] * size < shape[1])
    return Values(index[inside], parts[inside], size)


def unite(
    parts: Sequence[tuple[float, dict[str, Values]]], shape: tuple[int, int], size: int | None = None
) -> dict[str, Values]:
    """Σ weight × delta of one module, by kind, over the union of the indices.

    Blocks of different sizes are cut to their greatest common divisor, or to `size`. Different kinds stay apart:
    the layer adds them up.
    """
    united: dict[str, Values] = {}
    for kind in dict.fromkeys(kind for _, kinds in parts for kind in kinds):
        items = [(weight, kinds[kind]) for weight, kinds in parts if kind in kinds]
        block_size = None
        if kind == "blocks":
            block_size = math.gcd(*(value.block_size or 0 for _, value in items), size or 0)
            items = [(weight, split_blocks(value, block_size, shape)) for weight, value in items]
        index, position = torch.unique(torch.cat([v.index for _, v in items]), dim=0, return_inverse=True)
        deltas = [weight * value.delta.float() for weight, value in items]
        if kind == "columns":
            total = deltas[0].new_zeros(shape[0], len(index)).index_add_(1, position, torch.cat(deltas, dim=1))
        else:
            joined = torch.cat(deltas)
            total = joined.new_zeros(len(index), *joined.shape[1:]).index_add_(0, position, joined)
        united[kind] = Values(index, total, block_size)
    return united

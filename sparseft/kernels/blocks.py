"""Blocks: squares of `size` × `size` entries, on a lattice over the weight."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from sparseft.errors import UserError
from sparseft.kernels.features import check_places
from sparseft.kernels.kind import Kind, Shape


def is_size(size: Any) -> bool:
    """Whether blocks can have it: a whole number of at least 1."""
    return isinstance(size, Integral) and not isinstance(size, bool) and size >= 1


class Blocks(Kind):
    """Index (n, 2), block row and block column; values (n, size, size), zero where an edge block is outside."""

    name = "blocks"

    def check(self, index: Tensor, shape: Shape, size: int | None) -> None:
        if not is_size(size):
            raise UserError(f"blocks: expected a block_size of at least 1, a whole number, got {size!r}.")
        if index.dim() != 2 or index.shape[1] != 2:
            raise UserError(f"blocks: expected pairs (block row, block column), got shape {tuple(index.shape)}.")
        check_places("blocks", index, [math.ceil(side / size) for side in shape])

    def values_shape(self, index: Tensor, shape: Shape, size: int | None) -> tuple[int, ...]:
        assert size is not None
        return (len(index), size, size)

    def entries(self, index: Tensor, shape: Shape, size: int | None) -> int:
        """Edge blocks count only what lies inside."""
        assert size is not None
        height = (shape[0] - index[:, 0] * size).clamp(max=size)
        width = (shape[1] - index[:, 1] * size).clamp(max=size)
        return int((height * width).sum())

    def gather(self, weight: Tensor, at: Any, size: int | None) -> Tensor:
        assert size is not None
        out_features, in_features = weight.shape
        if out_features % size == 0 and in_features % size == 0:
            return _view(weight, size)[at[:, 0], at[:, 1]].contiguous()
        values = weight.new_zeros(len(at), size, size)
        view, whole = _whole(weight, at, size)
        if view is not None:
            values[whole] = view[at[whole, 0], at[whole, 1]]
        for position in (~whole).nonzero().flatten().tolist():
            row, column = (at[position] * size).tolist()
            part = weight[row : row + size, column : column + size]
            values[position, : part.shape[0], : part.shape[1]] = part
        return values

    def scatter_(self, weight: Tensor, at: Any, values: Tensor, size: int | None) -> None:
        assert size is not None
        out_features, in_features = weight.shape
        if out_features % size == 0 and in_features % size == 0:
            _view(weight, size)[at[:, 0], at[:, 1]] = values
            return
        view, whole = _whole(weight, at, size)
        if view is not None:
            view[at[whole, 0], at[whole, 1]] = values[whole]
        for position in (~whole).nonzero().flatten().tolist():
            row, column = (at[position] * size).tolist()
            part = weight[row : row + size, column : column + size]
            part.copy_(values[position, : part.shape[0], : part.shape[1]])

    def keys(self, index: Tensor) -> Tensor:
        index = index.cpu()
        return (index[:, 0] << 32) + index[:, 1]

    def of_keys(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        return torch.stack([keys >> 32, keys & 0xFFFFFFFF], dim=1), torch.arange(len(keys))

    def rectangles(self, index: Tensor, shape: Shape, size: int | None) -> Tensor:
        assert size is not None
        top, left = (index * size).unbind(1)
        return torch.stack([top, top + size, left, left + size], dim=1)


def _whole(weight: Tensor, at: Tensor, size: int) -> tuple[Tensor | None, Tensor]:
    """The whole blocks (`_view`; None: there are none), and which of `at` are whole."""
    out_features, in_features = weight.shape
    whole = (at[:, 0] < out_features // size) & (at[:, 1] < in_features // size)
    if out_features < size or in_features < size:
        return None, whole
    return _view(weight, size), whole


def _view(weight: Tensor, size: int) -> Tensor:
    """A (rows of blocks, columns of blocks, size, size) view over the whole blocks."""
    return weight.unfold(0, size, size).unfold(1, size, size)

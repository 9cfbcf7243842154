"""Rows and columns: whole output features or whole input features of a weight."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sparseft.errors import UserError
from sparseft.kernels.kind import Kind, Run, Shape


def select(tensor: Tensor, dim: int, at: Tensor | Run) -> Tensor:
    """The entries `at` of one dimension: a view of a run, a copy otherwise."""
    return tensor.narrow(dim, *at) if isinstance(at, tuple) else tensor.index_select(dim, at)


class Features(Kind):
    """Whole features of one side; index (k,), `at` an index or a run."""

    side: ClassVar[int]

    def check(self, index: Tensor, shape: Shape, size: int | None) -> None:
        if index.dim() != 1:
            raise UserError(f"{self.name}: expected a list of indices, got shape {tuple(index.shape)}.")
        check_places(self.name, index[:, None], [shape[self.side]])

    def values_shape(self, index: Tensor, shape: Shape, size: int | None) -> tuple[int, ...]:
        return (len(index), shape[1]) if self.side == 0 else (shape[0], len(index))

    def entries(self, index: Tensor, shape: Shape, size: int | None) -> int:
        return len(index) * shape[1 - self.side]

    def gather(self, weight: Tensor, at: Any, size: int | None) -> Tensor:
        if isinstance(at, tuple):
            return select(weight, self.side, at).clone(memory_format=torch.contiguous_format)
        return weight.index_select(self.side, at)

    def scatter_(self, weight: Tensor, at: Any, values: Tensor, size: int | None) -> None:
        if isinstance(at, tuple):
            select(weight, self.side, at).copy_(values)
        else:
            weight.index_copy_(self.side, at, values)

    def rectangles(self, index: Tensor, shape: Shape, size: int | None) -> Tensor:
        start = torch.zeros_like(index)
        whole = start, start + shape[1 - self.side]
        own = index, index + 1
        return torch.stack([*own, *whole] if self.side == 0 else [*whole, *own], dim=1)


class Rows(Features):
    """Output features; values (k, in)."""

    name = "rows"
    side = 0


class Columns(Features):
    """Input features; values (out, k)."""

    name = "columns"
    dim = side = 1


def check_places(kind: str, places: Tensor, limits: list[int]) -> None:
    """`UserError` where places (n, sides) are none, occur twice, or lie beyond the `limits` of the sides."""
    if len(places) == 0:
        raise UserError(f"{kind}: expected at least one index.")
    if places.is_meta:
        return
    places = places.cpu()
    if (places < 0).any() or (places >= torch.tensor(limits, device="cpu")).any():
        raise UserError(f"{kind}: an index lies outside 0 … {', '.join(str(limit - 1) for limit in limits)}.")
    if len(torch.unique(places, dim=0)) != len(places):
        raise UserError(f"{kind}: an index occurs twice.")

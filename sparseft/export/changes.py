"""What an adapter changes of a model, linear by linear: exact differences of its logical (out, in) weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sparseft.adapters.description import read_config
from sparseft.adapters.sparse import SparseDelta, read_sparse
from sparseft.errors import UserError
from sparseft.kernels import reference


class Change(Protocol):
    """What is added to one linear's weight: ΔW (out, in), in fp32."""

    shape: tuple[int, int]

    def dense(self) -> Tensor:
        """ΔW (out, in)."""
        ...

    def entries(self) -> Tensor:
        """Flat indices (row · in + column) of the entries that may differ from the base's: sorted, unique, int64."""
        ...


@dataclass
class SparseChange:
    """Deltas on rows, columns and blocks of one weight (out, in); where kinds overlap they add up."""

    shape: tuple[int, int]
    kinds: dict[str, SparseDelta]

    def dense(self) -> Tensor:
        total = torch.zeros(self.shape)
        for kind, value in self.kinds.items():
            old = reference.gather(total, kind, value.index, value.block_size)
            reference.scatter_(total, kind, value.index, old + value.delta, value.block_size)
        return total

    def entries(self) -> Tensor:
        touched = torch.zeros(self.shape, dtype=torch.bool)
        for kind, value in self.kinds.items():
            ones = torch.ones(value.delta.shape, dtype=torch.bool)
            reference.scatter_(touched, kind, value.index, ones, value.block_size)
        return touched.flatten().nonzero().flatten()


@dataclass
class LowRankChange:
    """A LoRA's scale · B A: a (r, in), b (out, r)."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return len(self.b), self.a.shape[1]

    def dense(self) -> Tensor:
        return self.scale * (self.b.float() @ self.a.float())

    def entries(self) -> Tensor:
        return torch.arange(self.shape[0] * self.shape[1])


def sparse_changes(folder: Path) -> dict[str, SparseChange]:
    """The changes of a sparse adapter's folder, by linear; files that are damaged or altered are a `UserError`."""
    content = read_config(folder)
    modules = content.get("modules")
    values = read_sparse(folder, content)
    assert isinstance(modules, dict)  # read_sparse has checked it
    changes = {}
    for module, kinds in values.items():
        shape = modules[module].get("shape")
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(side) is int and side > 0 for side in shape)):
            raise UserError(f"{folder}: {module} needs a shape, [out, in].")
        changes[module] = SparseChange((shape[0], shape[1]), kinds)
    return changes

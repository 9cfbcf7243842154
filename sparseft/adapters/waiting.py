"""A sparse adapter, and where its deltas wait while it is not the active one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparseft.errors import RunError
from sparseft.layers import Pattern
from sparseft.layers.convert import layer_at
from sparseft.layers.inactive import union
from sparseft.layers.pattern import updates, version_of

KEEP = ("device", "host", "disk")


class SparseDelta(NamedTuple):
    """One pattern's content: index (k,) or (n, 2), int64; delta in the shapes of `kernels/reference.py`, fp32."""

    index: Tensor
    delta: Tensor
    block_size: int | None = None


Values = dict[str, dict[str, SparseDelta]]  # by module and kind
Patterns = dict[str, dict[str, Pattern]]


class Source(NamedTuple):
    """A file that tensors are mapped from, as it was when its hash was checked."""

    path: Path
    state: tuple[int, int, int, int]

    @staticmethod
    def of(path: Path) -> Source:
        return Source(path, _state(path))

    def check(self) -> None:
        """Raises `RunError` where the file was written to since. One that was deleted or replaced stays mapped."""
        try:
            now = _state(self.path)
        except OSError:
            return
        if now[:2] == self.state[:2] and now != self.state:
            raise RunError(f"{self.path} was altered after the adapter was loaded from it: load it again.")


def _state(path: Path) -> tuple[int, int, int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(eq=False)
class Adapter:
    """A named adapter: what it changes, and what its description says of it.

    keep: where the deltas lie while another adapter is active. `device`: beside the weights. `host`: in host memory,
        pinned where the weights are on a CUDA device. `disk`: in the file, mapped into memory, so that the system reads
        it when it is wanted and takes the memory back when it is short; what is trained is then kept on the host.
    waiting: the deltas as they wait (on the host or in the file), each beside its index.
    patterns: made when the adapter first becomes active. The deltas are the same parameters from then on, which an
        optimizer may hold, wherever their values lie.
    source: the file of `disk`.
    """

    method: str
    method_config: dict[str, Any]
    waiting: Values = field(default_factory=dict)
    patterns: Patterns = field(default_factory=dict)
    keep: str = "device"
    source: Source | None = None
    versions: dict[int, int] = field(default_factory=dict)  # of deltas by their pattern's `id`: as `waiting` has them
    updates: int = -1  # the count when `waiting` had them

    @property
    def residual(self) -> bool:
        """Whether what it trains starts at the checkpoint's full precision (`method.residual`)."""
        return bool(self.method_config.get("residual"))

    @property
    def modules(self) -> list[str]:
        """The names of the linears that it changes."""
        return list(self.patterns or self.waiting)

    @property
    def version(self) -> tuple[int, int]:
        """Other numbers after any of its deltas may have been changed in place."""
        return updates.count, sum(version_of(pattern.delta) for pattern in self.live())

    def values(self) -> Values:
        """All that it has trained: entries that re-selection has put aside too. Shares memory with the adapter."""
        if not self.patterns:
            self._check_source()
            return self.waiting
        return {
            module: {kind: SparseDelta(*union(pattern), pattern.block_size) for kind, pattern in kinds.items()}
            for module, kinds in self.patterns.items()
        }

    def live(self) -> Iterator[Pattern]:
        """Its patterns, where they are made."""
        return (pattern for kinds in self.patterns.values() for pattern in kinds.values())

    @torch.no_grad()
    def fetch(self, model: nn.Module) -> Patterns:
        """The patterns, with the deltas on the devices of the weights that they are of."""
        self._check_source()
        if not self.patterns:
            self.patterns = self._made(model)
            if self.keep == "device":
                self.waiting = {}
        elif self.keep != "device":
            for pattern in self.live():
                device = pattern.index.device  # which stays with the weight
                if pattern.delta.device != device:
                    pattern.delta.data = pattern.delta.data.to(device, non_blocking=True)
        self.versions = {id(pattern): version_of(pattern.delta) for pattern in self.live()}
        self.updates = updates.count
        return self.patterns

    @torch.no_grad()
    def park(self) -> None:
        """The deltas go where they wait; those that may have been changed since `fetch` are copied there."""
        updated = self.updates != updates.count
        for module, kinds in self.patterns.items():
            for kind, pattern in kinds.items():
                pattern.base_values = pattern.base_values.new_empty(0)  # read anew when it becomes active again
                waiting = self.waiting.get(module, {}).get(kind)
                if waiting is None or pattern.delta.device == waiting.delta.device:
                    continue
                same = self.versions.get(id(pattern)) == version_of(pattern.delta)
                if same and (not updated or torch.equal(pattern.delta.cpu(), waiting.delta)):
                    pattern.delta.data = waiting.delta
                else:
                    pattern.delta.data = on_host(pattern.delta.data, pattern.delta.device)
                    self.waiting[module][kind] = waiting._replace(delta=pattern.delta.data)

    def _made(self, model: nn.Module) -> Patterns:
        made: Patterns = {}
        for module, kinds in self.waiting.items():
            made[module] = {}
            for kind, value in kinds.items():
                pattern = layer_at(model, module).new_pattern(kind, value.index, value.block_size)
                pattern.residual = self.residual
                pattern.delta.data = value.delta.to(pattern.delta.device, non_blocking=True)
                made[module][kind] = pattern
        return made

    def _check_source(self) -> None:
        if self.source is not None:
            self.source.check()


def on_host(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor in host memory, from where it can be copied to `device` without waiting."""
    pinned = device.type == "cuda"
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned).copy_(tensor)

"""How much memory is in use: by CUDA's allocator, by the process on the CPU, by the tensors that live."""

from __future__ import annotations

import contextlib
import os
import resource
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MEMBERSHIPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # cgroups(7)


def memory_bytes(device: torch.device, *, peak: bool) -> int:
    """Bytes in use now, or at their peak since `reset_peak_memory` (on the CPU of the whole process, Python too)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    if not peak:
        return psutil.Process().memory_info().rss
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if os.uname().sysname == "Darwin" else usage * 1024


def available_bytes() -> int:
    """Host memory that this process may still take: what the machine has left, or the control groups that it is in
    (those of a container, of a batch system's job), where they allow less."""
    return min([psutil.virtual_memory().available, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """Bytes that each control group of this process with a limit still allows (Linux, both versions of them)."""
    with contextlib.suppress(OSError):
        for line in MEMBERSHIPS.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds == "":
                root, limit, used, cached = GROUPS, "memory.max", "memory.current", "inactive_file"
            elif "memory" in kinds.split(","):
                root, limit, used = GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
                cached = "total_inactive_file"
            else:
                continue
            group = root / path.lstrip("/")
            # In a container the path is often the host's, and what is mounted is the container's group alone.
            for folder in {root, *(parent for parent in (group, *group.parents) if parent.is_relative_to(root))}:
                with contextlib.suppress(OSError, ValueError):  # no limit: "max", or no such file
                    taken = int((folder / used).read_text())
                    counts = dict(count.split() for count in (folder / "memory.stat").read_text().splitlines())
                    # files that were read count, and make room when it is wanted
                    yield max(0, int((folder / limit).read_text()) - taken + int(counts.get(cached, 0)))


def free_device_bytes(device: torch.device) -> int:
    """An accelerator's memory that this process may still take, what its allocator holds unused included; 0 of a
    device that does not tell."""
    if device.type != "cuda":
        return 0
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def reset_peak_memory(device: torch.device) -> None:
    """Lets the peak start again from what is in use, so that a run does not report an earlier run's.

    Where the system has no such thing for a process (not Linux), the CPU's peak stays the process's since it started.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


class AllocationCounter(TorchDispatchMode):
    """Bytes of the storages that operations make inside, now and at their peak.

    For the CPU, where no allocator keeps count and a process's high-water mark never falls. A storage counts from the
    operation that returns it until it is freed; scratch space inside an operation is not seen, nor is a mapped file,
    whose pages the system takes back where memory is short.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.from_file.default:
            return result
        seen = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if _is_dense(leaf)}
        for leaf in tree_leaves(result):
            if _is_dense(leaf) and id(leaf.untyped_storage()) not in seen:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _is_dense(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided


class SavedBytes:
    """Bytes of the distinct storages saved for backward, the model's own parameters and buffers not counted."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self._seen: dict[int, int] = {}
        self._kept: list[Tensor] = []

    @contextlib.contextmanager
    def counting(self) -> Iterator[SavedBytes]:
        """Counts what the forward pass inside saves."""

        def pack(tensor: Tensor) -> Tensor:
            if tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._own:
                    self._seen[storage.data_ptr()] = storage.nbytes()
                    self._kept.append(
                        tensor
                    )  # alive until all are counted: its address is not reused, and layers may share it
            return tensor.detach()  # an operation's own result would hold its node, and the node it: never freed

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                yield self
        finally:
            self._kept.clear()

    @property
    def total(self) -> int:
        return sum(self._seen.values())


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of tensors, on the meta device too, where all have the same address."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())

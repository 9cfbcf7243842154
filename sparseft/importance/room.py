"""Where large tensors of a calibration lie: on the device, in host memory, or in memory-mapped files; and how they come
to the device ahead of the work."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from sparseft.distributed import env
from sparseft.errors import RunError
from sparseft.files.mapped import mapped_zeros
from sparseft.memory import available_bytes, free_device_bytes

# What is kept takes at most so much of the memory that is free: on an accelerator the rest is for activations, on the
# host for all else that runs there.
DEVICE_SHARE = 0.5
HOST_SHARE = 0.25

DEVICE, HOST, DISK = "on the device", "in host memory", "on disk"


class Room:
    """Makes zeros of `total_bytes` in all, where they do not crowd what is free, which is asked once: on the device,
    else in host memory (locked, beside an accelerator), else in mapped files in `folder` (None: the system's folder
    for temporary files).

    spare: not in host memory where the device itself works in it.
    """

    def __init__(
        self, total_bytes: int, device: torch.device, what: str, folder: Path | None = None, *, spare: bool = False
    ) -> None:
        self.total_bytes, self.device, self.what, self.folder = total_bytes, device, what, folder
        self.place = DISK
        allowed = HOST_SHARE * available_bytes() / env.local_world()
        if total_bytes <= allowed and not (spare and device.type == "cpu"):
            self.place = HOST
        if device.type != "cpu" and total_bytes <= DEVICE_SHARE * free_device_bytes(device):
            self.place = DEVICE

    @property
    def in_memory(self) -> bool:
        """Whether what the device works on lies in its own memory: the host's, where that is the device."""
        return self.place == (HOST if self.device.type == "cpu" else DEVICE)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """RunError where the disk has no room for it."""
        if self.place == DEVICE:
            return torch.zeros(shape, dtype=dtype, device=self.device)
        if self.place == HOST:
            return torch.zeros(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        folder = self.folder or Path(tempfile.gettempdir())
        try:
            return mapped_zeros(folder, shape, dtype)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            reason = "the disk has no room left" if full else f"the file cannot be written ({error.strerror})"
            raise RunError(
                f"{folder}: {self.what} need {self.total_bytes / 2**30:.1f} GiB, which go to disk so as not to crowd "
                f"the memory, but {reason}."
            ) from error


def ahead(loads: Iterable[Callable[[], tuple[Tensor, ...]]], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """What each of `loads` gives, in their order, each called while the one before is being worked on.

    On CUDA in a stream of its own: copies out of locked memory (`non_blocking`) then run beside the work, after all
    that was under way when they were asked for.
    """
    beside = torch.cuda.Stream(device) if device.type == "cuda" else None

    def loaded(load: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if beside is None:
            return load()
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            return load()

    def handed(tensors: tuple[Tensor, ...], copied: torch.cuda.Event | None) -> tuple[Tensor, ...]:
        if copied is not None:
            working = torch.cuda.current_stream(device)
            working.wait_event(copied)
            for tensor in tensors:  # made in the other stream, so its allocator has to be told who uses them
                tensor.record_stream(working)
        return tensors

    waiting = None
    for load in loads:
        upcoming = loaded(load), beside.record_event() if beside is not None else None
        if waiting is not None:
            yield handed(*waiting)
        waiting = upcoming
    if waiting is not None:
        yield handed(*waiting)

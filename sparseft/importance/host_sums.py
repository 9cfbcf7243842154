"""Sums as large as the model, in host memory or, where they would crowd it, in memory-mapped files."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from sparseft.distributed import env
from sparseft.errors import RunError
from sparseft.memory import available_bytes

# Sums that take more than this share of the memory that is free go to disk.
MEMORY_SHARE = 0.25


class HostSums:
    """Makes float32 zeros of `total_bytes` in all: plain tensors, or mapped files in `folder` (None: the system's
    folder for temporary files) where the total exceeds a quarter of this process's share of the available memory.

    A file loses its name as soon as it is mapped, so its space is freed with the tensor, however the process ends.
    """

    def __init__(self, total_bytes: int, folder: Path | None = None) -> None:
        self.mapped = total_bytes > MEMORY_SHARE * available_bytes() / env.local_world()
        self.total_bytes, self.folder = total_bytes, folder

    def zeros(self, rows: int, columns: int) -> Tensor:
        """(rows, columns) float32. RunError where the disk has no room for it."""
        if not self.mapped:
            return torch.zeros(rows, columns)
        folder = self.folder or Path(tempfile.gettempdir())
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(prefix=".sparseft-sums-", dir=folder) as file:
                # A sparse file would end the process by a signal at the first page that finds no room.
                os.posix_fallocate(file.fileno(), 0, rows * columns * 4)
                return torch.from_file(file.name, shared=True, size=rows * columns).view(rows, columns)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            reason = "the disk has no room left" if full else f"the file cannot be written ({error.strerror})"
            raise RunError(
                f"{folder}: the summed gradients need {self.total_bytes / 2**30:.1f} GiB, more than a quarter of the "
                f"free memory, so they go to disk, but {reason}."
            ) from error

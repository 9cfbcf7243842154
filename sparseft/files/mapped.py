"""Tensors in files that are mapped into memory, whose pages the system takes back when it needs them."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sparseft.errors import RunError


def mapped_zeros(folder: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in a new file in `folder`, which is made. OSError where the disk has no room for them.

    The file loses its name as soon as it is mapped, so its space is freed with the tensor, however the process ends.
    """
    size = math.prod(shape)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix=".sparseft-mapped-", dir=folder) as file:
        # A sparse file would end the process by a signal at the first page that finds no room.
        os.posix_fallocate(file.fileno(), 0, max(1, size) * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(tuple(shape))


def move_to_file(parameter: nn.Parameter, folder: Path) -> None:
    """Gives a parameter on the CPU zeros in a file of its own in `folder` for its values. RunError where the disk has
    no room for them."""
    try:
        parameter.data = mapped_zeros(folder, parameter.shape, parameter.dtype)
    except OSError as error:
        raise RunError(f"{folder}: no room for the unpacked weights ({error.strerror}).") from error

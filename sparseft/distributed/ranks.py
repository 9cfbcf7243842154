"""The processes of a run: which of them this is, and what they say to each other. Without `torch.distributed` one."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """(this rank, ranks)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def add_up(tensor: Tensor) -> None:
    """Sums a contiguous tensor in place over the ranks; where NCCL needs it on a device, by way of the current one."""
    if rank_and_world()[1] == 1:
        return
    if tensor.device.type == "cpu" and dist.get_backend() == "nccl":
        there = tensor.to(torch.device("cuda", torch.cuda.current_device()))
        dist.all_reduce(there)
        tensor.copy_(there)
    else:
        dist.all_reduce(tensor)


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean over the ranks, as a tensor of its own."""
    total = tensor.clone()
    add_up(total)
    return total / rank_and_world()[1]


def from_all(value: Any) -> list[Any]:
    """Every rank's `value`, by rank."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """Rank 0's `value`."""
    if rank_and_world()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def is_first() -> bool:
    """Whether this process writes files and speaks."""
    return rank_and_world()[0] == 0


def barrier() -> None:
    """Waits until all processes are here. By an object, which travels between the hosts: no device has to be idle."""
    from_first(None)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in any process. All ask at the same point, or they would wait for each other."""
    if rank_and_world()[1] == 1:
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value)


@contextlib.contextmanager
def shared_folder(parent: Path) -> Iterator[Path]:
    """A new folder below `parent` that all processes see, gone afterwards unless it was renamed."""
    made = None
    if is_first():
        parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(prefix=".partial-", dir=parent)
    folder = Path(from_first(made))
    try:
        yield folder
    finally:
        if is_first():
            shutil.rmtree(folder, ignore_errors=True)

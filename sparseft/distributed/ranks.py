"""The processes of a run: which of them this is, and what they say to each other. Without `torch.distributed` one."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparseft.distributed import env
from sparseft.errors import UserError
from sparseft.files.atomic import new_aside


def is_distributed() -> bool:
    """Whether this process is one of a process group."""
    return dist.is_available() and dist.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """(this rank, ranks) of those that can speak to each other."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def is_main() -> bool:
    """Whether this process writes files and speaks; by what its launcher says while it has not joined the others."""
    return (dist.get_rank() if is_distributed() else env.rank()) == 0


def all_reduce_sum(tensor: Tensor) -> None:
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
    all_reduce_sum(total)
    return total / rank_and_world()[1]


def all_gather_object(value: Any) -> list[Any]:
    """Every rank's `value`, by rank."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value`."""
    if rank_and_world()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def from_main(work: Callable[[], Any]) -> Any:
    """What `work` returns in rank 0, which alone does it; a UserError of it is raised in every rank."""
    refusal, value = None, None
    if is_main():
        try:
            value = work()
        except UserError as error:
            refusal = error
    said, value = broadcast_object((None if refusal is None else str(refusal), value))
    if said is not None:
        raise refusal or UserError(said)
    return value


def main_first(work: Callable[[], Any], known: dict[Any, Any]) -> Any:
    """What `work` returns in each process: each machine's first one does it before the others, which find in files what
    that has left (tokens, downloads), and in `known` what it has put there. A UserError in any process is raised in
    every one."""
    refusal, value = None, None
    rank, world = rank_and_world()
    local = env.local_rank()
    for first in (True, False) if world > 1 else (local == 0,):
        if first == (local == 0):
            try:
                value = work()
            except UserError as error:
                refusal = error
        told = all_gather_object((None if refusal is None else str(refusal), known if first and local == 0 else {}))
        said = next((each for each, _ in told if each), None)
        if said is not None:
            raise refusal or UserError(said)
        if first and local != 0:
            known.update(told[max(0, rank - local)][1])
    return value


def barrier() -> None:
    """Waits until all processes are here. By an object, which travels between the hosts: no device has to be idle."""
    broadcast_object(None)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in any process. All ask at the same point, or they would wait for each other."""
    if rank_and_world()[1] == 1:
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value)


@contextlib.contextmanager
def each_for_itself(accelerator: Any) -> Iterator[None]:
    """Inside, accelerate's `gather` and `gather_for_metrics` give a process what it has itself: libraries gather what
    they note of a micro-step value by value, and wait for ever where the processes' batches differ in size."""
    accelerator.gather = accelerator.gather_for_metrics = lambda value, **_: value
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics


@contextlib.contextmanager
def shared_aside(path: Path) -> Iterator[Path]:
    """A new folder beside `path` that all processes see, gone afterwards unless it was renamed (`atomic.publish`)."""
    folder = broadcast_object(new_aside(path) if is_main() else None)
    try:
        yield folder
    finally:
        if is_main():
            shutil.rmtree(folder, ignore_errors=True)

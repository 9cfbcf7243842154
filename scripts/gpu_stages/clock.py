"""Seconds of a call: on the host alone, with the device's work, and by replaying a CUDA graph of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def waited(call: Callable[[], object], repeats: int, inner: int = 1) -> float:
    """The median seconds of a call with the device's work, over rounds of `inner` calls; two more before them."""
    return _median(call, repeats, inner, to_the_end=True)


def enqueued(call: Callable[[], object], repeats: int, inner: int = 1) -> float:
    """The same, of what the host takes to queue a call, without waiting for what it has queued."""
    return _median(call, repeats, inner, to_the_end=False)


def _median(call: Callable[[], object], repeats: int, inner: int, *, to_the_end: bool) -> float:
    found = []
    for _ in range(repeats + 2):
        wait()
        start = time.perf_counter()
        for _ in range(inner):
            call()
        if to_the_end:
            wait()
        found.append((time.perf_counter() - start) / inner)
    wait()
    return statistics.median(found[2:])


def replayed(call: Callable[[], object], repeats: int, inner: int = 20) -> float:
    """The median seconds of a call on the device alone: `inner` of them captured in one CUDA graph, replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels compile, libraries choose
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            call()
    found = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / inner)
    return statistics.median(found[2:])

"""A benchmark's trainings several at once, in processes of their own: `bench.jobs`.

What is small leaves most of a device to others. The benchmark itself runs as ever, and finds done what has been done
ahead; a worker that fails ends it with what the training would have said.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from sparseft.errors import RunError

_shared: Any = None  # in a worker


# Does `work(shared, item)` of each item, in any order; yields after each. work: a module's function, whose files the
# benchmark finds.
Ahead = Callable[[Callable[[Any, Any], object], Sequence[Any]], Iterable[None]]


@contextlib.contextmanager
def workers(jobs: int, shared: Any) -> Iterator[Ahead]:
    """jobs: 1: nothing is done ahead, all in this process. shared: what `work` is given, sent to each process once."""
    if jobs == 1:
        yield lambda work, items: ()
        return
    # Not forked: this process may have used the device, which a fork cannot.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sparseft.commands.bench"])
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, context, _begin, (threads, list(warnings.filters), shared)) as pool:

        def ahead(work: Callable[[Any, Any], object], items: Sequence[Any]) -> Iterator[None]:
            try:
                for each in as_completed([pool.submit(_work, work, item) for item in items]):
                    each.result()
                    yield
            except BrokenProcessPool:
                raise RunError(
                    "a process of bench.jobs was killed, which most often is for want of memory: give fewer of them; "
                    "what is done is kept."
                ) from None

        try:
            yield ahead
        except BaseException:  # an interrupt too: what is waiting is not begun, what runs ends as if interrupted
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _begin(threads: int, filters: list[Any], shared: Any) -> None:
    global _shared
    torch.set_num_threads(threads)
    warnings.resetwarnings()
    warnings.filters[:] = filters  # type: ignore[index]  # what this process warns of, and no more
    _shared = shared


def _work(work: Callable[[Any, Any], object], item: Any) -> None:
    work(_shared, item)

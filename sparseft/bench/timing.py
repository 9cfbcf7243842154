"""Measuring contenders side by side: seconds of each in turn, the most that one allocates, and who falls out.

A row of a result says `{"missing": reason}` where something cannot be had here (a package, a compiler), and
`{"failed": reason, "where": place}` where it raised.
"""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparseft import console
from sparseft.config import BenchConfig
from sparseft.errors import UserError
from sparseft.memory import AllocationCounter

PACKAGE = Path(__file__).resolve().parents[1]


def synchronize(device: torch.device) -> None:
    """Waits for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    calls: Mapping[str, Callable[[], Any]],
    settings: BenchConfig,
    device: torch.device,
    failed: Callable[[str, Exception], None] | None = None,
    seconds: dict[str, list[Any]] | None = None,
    clock: Callable[[Callable[[], Any], torch.device], Any] | None = None,
    prepare: Callable[[str], Any] | None = None,
) -> dict[str, list[Any]]:
    """Seconds of every call in `steps` rounds after `warmup_steps`.

    They take turns, so that a machine's slow moments meet all of them, in an order that changes from round to round
    (`orders`), so that none always runs in what the same neighbour leaves of caches and allocators.

    failed: told of a call that raised, which then takes no further turns and has no times; None: that ends them all. A
    `UserError` always does. seconds: filled as the rounds go, for what an interrupt leaves of them; None: a new one.
    clock: calls, and returns what is put into the list; None: `seconds_of`. prepare: what a turn needs ahead of its
    call, which takes no time of it.
    """
    clock = seconds_of if clock is None else clock
    seconds = {} if seconds is None else seconds
    seconds |= {name: [] for name in calls}
    names = list(calls)
    if not names:
        return seconds
    cycle = orders(len(names))
    rounds = settings.warmup_steps + settings.steps

    with console.Progress(rounds, "bench", unit="round") as progress:
        for turn in range(rounds):
            timed = turn >= settings.warmup_steps

            def take(name: str, timed: bool = timed) -> None:
                if prepare is not None:
                    prepare(name)
                spent = clock(calls[name], device)
                if timed:
                    seconds[name].append(spent)

            order = [names[place] for place in cycle[(turn - settings.warmup_steps) % len(cycle)]]
            order = [name for name in order if name in seconds]
            for name in set(order).difference(attempt_each(order, take, failed, device)):
                del seconds[name]
            progress.update(turn + 1)
    return seconds


def attempt_each(
    names: Iterable[str],
    work: Callable[[str], Any],
    failed: Callable[[str, Exception], None] | None,
    device: torch.device,
) -> list[str]:
    """Does `work(name)` for one contender after another; returns those with which it went well.

    What it raises is that one's own row's business. failed: told of it, and forgets the contender, whose memory is then
    given back; None: it is raised. A `UserError` always is: there is nothing to measure by wrong settings.
    """
    return [name for name in names if _attempt(name, work, failed, device)]


def _attempt(
    name: str, work: Callable[[str], Any], failed: Callable[[str, Exception], None] | None, device: torch.device
) -> bool:
    try:
        work(name)
    except UserError:
        raise
    except Exception as error:
        if failed is None:
            raise
        # What its frames hold (activations) goes first: `failed` may need memory itself, to put weights back.
        traceback.clear_frames(error.__traceback__)
        failed(name, error)
    else:
        return True
    reclaim(device)  # only here: the error's frames, which held the contender, are gone
    return False


def reclaim(device: torch.device) -> None:
    """Frees what nothing holds any more, models in cycles of references too, and empties CUDA's cache of blocks."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, with the device's work that it starts and without what was under way before."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def orders(count: int) -> list[list[int]]:
    """The orders of `count` contenders over a cycle of rounds, each a permutation: Williams' design.

    Over the cycle (`count` rounds, twice as many of an odd count) each stands equally often in each place and right
    after each other one within a round. With three or more, none follows itself from one round to the next.
    """
    first = [(index + 1) // 2 if index % 2 else (count - index // 2) % count for index in range(count)]
    rounds = [[(shift + place) % count for place in first] for shift in range(count)]
    if count % 2:
        mirrored = [order[::-1] for order in rounds]
        rounds += [mirrored[0], *mirrored[:0:-1]]  # this way round no one ends a round and begins the next
    return rounds


def spread(name: str, times: Sequence[float]) -> dict[str, float]:
    """The median under `name`, and the quantiles beside it, as many times below the one as above the other."""
    ordered = sorted(times)
    median, outside = statistics.median(ordered), int(0.2 * (len(ordered) - 1))
    return {name: median, f"{name}_p20": ordered[outside], f"{name}_p50": median, f"{name}_p80": ordered[-1 - outside]}


def comparable(row: Mapping[str, Any], quantity: str = "step_seconds") -> float:
    """A time of a row as it would have been among the others, whose machine may have been faster or slower by then."""
    return row[quantity] / row.get("pace", 1.0)


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most that `call` has allocated at once, on top of what is there before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with AllocationCounter() as counter:
        call()
    return counter.peak


def held_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """What `call` has allocated and its result keeps alive."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        kept = call()
        synchronize(device)
        held = torch.cuda.memory_allocated(device) - before
        del kept
        return held
    with AllocationCounter() as counter:
        kept = call()
        held = counter.live
        del kept
    return held


def absent(row: Mapping[str, Any]) -> str | None:
    """Why a row has no figures; None where it has."""
    return row.get("missing") or row.get("failed")


def kind(row: Mapping[str, Any]) -> str:
    """`missing` or `failed`, of a row without figures."""
    return next(iter(row))


def measured(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The rows that have figures."""
    return {name: row for name, row in rows.items() if absent(row) is None}


def failed_row(error: Exception) -> dict[str, str]:
    """The row of a contender that raised: what, and the innermost line of this package that it went through."""
    message = " ".join(str(error).split())
    row = {"failed": f"{type(error).__name__}: {message}" if message else type(error).__name__}
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    if ours:  # below the package, so that no user's folder is named
        row["where"] = f"{Path(ours[-1].filename).relative_to(PACKAGE.parent).as_posix()}:{ours[-1].lineno}"
    return row

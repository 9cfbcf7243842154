"""Interrupts that let the work end where nothing is half done."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from sparseft.errors import Interrupted

HANGUP = getattr(signal, "SIGHUP", None)  # the terminal or the connection is gone; unknown to Windows
# Seconds within which signals are one: what ends a whole control group, as systemd does, signals the processes of a run
# themselves, and so does their parent, which passes on what it gets.
TOGETHER = 1.0
GATHER = 0.2  # seconds to wait for those that come with the first


def ending() -> tuple[int, ...]:
    """The signals that end the work once it has saved. Not SIGHUP where it is ignored, as under nohup."""
    hangup = () if HANGUP is None or signal.getsignal(HANGUP) is signal.SIG_IGN else (HANGUP,)
    return (signal.SIGINT, signal.SIGTERM, *hangup)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM (a cluster's warning) and SIGHUP interrupt as Ctrl-C does, by `Interrupted`. In another thread
    than the main one they stay with whoever runs it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _frame: Any) -> None:
        raise Interrupted(signal.Signals(number).name)

    before = {number: signal.signal(number, interrupt) for number in ending() if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def noted(first: Callable[[str], None]) -> Iterator[None]:
    """Inside, the first signal of `ending` is given to `first` by its name and nothing more happens; a second one, not
    `TOGETHER` with it, interrupts at once. In another thread than the main one signals stay with whoever runs it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    since: float | None = None

    def note(number: int, _frame: Any) -> None:
        nonlocal since
        if since is None:
            since = time.monotonic()
            first(signal.Signals(number).name)
            # Handlers run between Python's instructions: one that comes during a long operation would be seen late.
            time.sleep(GATHER)
        elif time.monotonic() - since >= TOGETHER:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in ending()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

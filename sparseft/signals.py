"""Interrupts that let the work end where nothing is half done."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from sparseft.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds within which signals are one: what ends a whole control group, as systemd does, signals the processes of a run
# themselves, and so does their parent, which passes on what it gets.
TOGETHER = 1.0
GATHER = 0.2  # seconds to wait for those that come with the first


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM (a cluster's warning) interrupts as Ctrl-C does, by `Interrupted`. In another thread than the
    main one it stays with whoever runs it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: Any) -> None:
        raise Interrupted(signal.SIGTERM.name)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def noted(first: Callable[[str], None]) -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM is given to `first` by its name and nothing more happens; a second one, not
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

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Interrupts that let the work end where nothing is half done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from sparseft.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
    """Inside, the first SIGINT or SIGTERM is given to `first` by its name and nothing more happens; a second one
    interrupts at once. In another thread than the main one signals stay with whoever runs it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen = False

    def note(number: int, _frame: Any) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True
        first(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

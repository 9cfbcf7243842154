"""How long a run has trained, and how far it is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass


class Clock:
    """Seconds of training: stands still while the run evaluates and saves."""

    def __init__(self) -> None:
        self._before = 0.0  # seconds up to the last stop
        self._since: float | None = None  # null: stopped

    @property
    def seconds(self) -> float:
        return self._before + (time.monotonic() - self._since if self._since is not None else 0.0)

    def start(self, seconds: float = 0.0) -> None:
        """Runs on from `seconds`, which a resumed run spent before."""
        self._before, self._since = seconds, time.monotonic()

    def stop(self) -> None:
        self._before, self._since = self.seconds, None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        running = self._since is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start(self._before)


@dataclass
class Mark:
    """How far a run is: what a line of metrics is the difference of two of."""

    step: int = 0
    loss: float = 0.0  # sum of the steps' losses
    tokens: int = 0
    seconds: float = 0.0  # of training
    bad: int = 0  # steps whose loss or gradient was not finite: `loss` is the sum over the others

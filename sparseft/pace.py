"""How long a loop still takes, judged by what it did so far."""

from __future__ import annotations

import time

RECENT = 64  # marks that are kept of the later half of the way, about
TOGETHER = 0.05  # seconds: units done within so many were one piece of work, such as a batch


class Pace:
    """The time left of a loop of `total` units, of which `initial` were done before it started.

    Judged by the later half of the units done here, since the first ones load, compile and warm up. Pauses
    (evaluations, checkpoints) do not count as work; where they came regularly, as many are expected to come.
    """

    def __init__(self, total: int | None, initial: int = 0) -> None:
        self.total, self.initial, self.completed = total, initial, initial
        self._since: float | None = time.monotonic()  # None: paused
        self._before = 0.0  # seconds of work up to the last pause
        self._paused_at = 0.0
        self._pauses = 0
        self._pause_seconds = 0.0
        self._last_pause = initial  # units done at the last pause
        self.marks: list[tuple[int, float]] = []  # units done, seconds of work
        self._marked_at = 0.0  # the seconds of work at which the last mark was first made

    @property
    def seconds(self) -> float:
        """Of work so far, without pauses."""
        return self._before + (0.0 if self._since is None else time.monotonic() - self._since)

    def update(self, completed: int) -> None:
        """`completed` units are done in all."""
        self.completed = completed
        marks, here, now = self.marks, completed - self.initial, self.seconds
        if marks and now - self._marked_at < TOGETHER:
            marks[-1] = (completed, now)
            return
        if marks and completed - marks[-1][0] < max(1, here // (2 * RECENT)):
            return
        marks.append((completed, now))
        self._marked_at = now
        while len(marks) > 2 and marks[1][0] - self.initial <= here / 2:
            del marks[0]

    def pause(self) -> None:
        """Stands still until `go_on`."""
        self._before, self._since = self.seconds, None
        self._paused_at = time.monotonic()

    def go_on(self) -> None:
        """Ends a pause."""
        if self._since is not None:
            return
        self._since = time.monotonic()
        if self.completed > self.initial:
            self._pauses += 1
            self._pause_seconds += self._since - self._paused_at
            self._last_pause = self.completed

    def left(self) -> float | None:
        """Seconds, pauses to come included; None where it cannot be said yet: after the first units at the earliest, as
        these say little."""
        if not self.total or len(self.marks) < 2:
            return None
        (first, begin), (last, end) = self.marks[0], self.marks[-1]
        unit = (end - begin) / (last - first)
        coming = unit * (last - self.marks[-2][0])  # seconds of what is being done: as much as came last
        left = min(
            unit * (self.total - last) - min(self.seconds - end, coming),
            unit * (self.total - self.completed),
        )
        return max(0.0, left) + self._pauses_to_come()

    def _pauses_to_come(self) -> float:
        if not self._pauses or self.total is None:
            return 0.0
        every = (self._last_pause - self.initial) / self._pauses
        count = int((self.total - self.initial) / every) - self._pauses
        return max(0, count) * self._pause_seconds / self._pauses

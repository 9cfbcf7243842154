"""The two kinds of failure a user can meet."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """The input was wrong: one sentence saying what, where and what was expected (exit code 2)."""


class RunError(RuntimeError):
    """The work failed while running: what happened and what is safe (exit code 1).

    last_checkpoint: the last good one's folder, None where there is none, left out where that is not known here.
    """

    def __init__(self, message: str, last_checkpoint: Any = ...) -> None:
        super().__init__(message)
        if last_checkpoint is not ...:
            self.last_checkpoint = last_checkpoint


class Interrupted(KeyboardInterrupt):
    """The user, or the system, has ended the work, which saved first: with the last good checkpoint's folder."""

    def __init__(self, name: str, last_checkpoint: str | None = None) -> None:
        super().__init__(name)
        self.last_checkpoint = last_checkpoint


class LayoutWarning(UserWarning):
    """A part of the model cannot be laid out as asked for, and is trained as it is: the result is the same."""


def shown(value: object, limit: int = 80) -> str:
    """What a file says, as a message may repeat it: on one line, printable, of at most `limit` characters and `…`.

    Text stands without quotes. A file may hold a text of any length, with what a terminal would obey.
    """
    text = value if isinstance(value, str) else repr(value)
    kept = text if len(text) <= limit else f"{text[:limit]}…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in kept)


def reason_of(error: BaseException) -> str:
    """What an exception of a library says, on one line: its first line, with the next where that only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return shown(" ".join(lines[:2]) if lines[0].endswith(":") else lines[0], 300)


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the candidate nearest to `name`, or the list of them if none is near."""
    names = list(dict.fromkeys(str(candidate) for candidate in candidates))
    lowered = {candidate.lower(): candidate for candidate in reversed(names)}
    close = difflib.get_close_matches(str(name).lower(), list(lowered), n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{lowered[close[0]]}'?"
    return f" Available: {', '.join(sorted(names))}." if names else ""

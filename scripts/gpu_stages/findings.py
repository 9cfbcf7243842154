"""What a stage finds: rows, each with what was expected of it, kept as they come, so that a kill loses none."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OK, OFF, FAILED, SKIPPED, UNJUDGED = "ok", "off", "failed", "skipped", ""


@dataclass(frozen=True)
class Expected:
    """What a number should be: a range, either end of which may be open, and how it is said."""

    said: str
    low: float = float("-inf")
    high: float = float("inf")

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def at_most(high: float) -> Expected:
    return Expected(f"≤ {high:g}", high=high)


def at_least(low: float) -> Expected:
    return Expected(f"≥ {low:g}", low=low)


def between(low: float, high: float) -> Expected:
    return Expected(f"{low:g} to {high:g}", low, high)


def near(value: float, share: float) -> Expected:
    """Within a share of `value`: `near(40, 0.1)` is 36 to 44."""
    return Expected(f"{value:g} ± {share:.0%}", value * (1 - share), value * (1 + share))


class Skip(Exception):
    """Ends a stage that cannot run here; says why."""


class Findings:
    """A stage's rows, written line by line, and what it may use.

    dry: sizes are cut down, on the CPU; numbers are then found without being judged, facts are judged as ever.
    files: a folder whose content is kept beside the session. scratch: one that is not.
    """

    def __init__(self, path: Path, *, dry: bool, files: Path, scratch: Path, earlier: dict[str, Any], end: float):
        self._path, self.dry, self.files, self.scratch, self._end = path, dry, files, scratch, end
        self.device = "cpu" if dry else "cuda"
        self._earlier = earlier

    def number(self, what: str, value: float, unit: str = "", expected: Expected | None = None) -> float:
        """A measured number, judged by what was expected unless this is a dry session."""
        judged = expected is not None and not self.dry
        self._write(
            what=what,
            expected=" ".join(filter(None, (expected.said, unit))) if expected is not None and judged else "",
            found=f"{_shown(value)} {unit}".rstrip(),
            value=value,
            verdict=(OK if expected.holds(value) else OFF) if expected is not None and judged else UNJUDGED,
        )
        return value

    def fact(self, what: str, holds: bool, found: str, expected: str = "") -> None:
        """Something that must be so on any device."""
        self._write(what=what, expected=expected, found=found, verdict=OK if holds else OFF)

    def note(self, what: str, found: Any) -> None:
        """Something to know that nothing was expected of."""
        self._write(what=what, expected="", found=str(found), verdict=UNJUDGED)

    def skip(self, what: str, why: str) -> None:
        """A part of the stage that cannot be had here."""
        self._write(what=what, expected="", found=why, verdict=SKIPPED)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Lets what is inside fail alone: its row says so, and the stage goes on."""
        import traceback

        try:
            yield
        except Skip as reason:
            self.skip(what, str(reason))
        except Exception as error:
            traceback.print_exc()
            self._write(what=what, expected="", found=told(error), verdict=FAILED)

    def earlier(self, stage: str) -> dict[str, float]:
        """The numbers of a stage that has run before, in this session or in one whose folder is used again."""
        rows = self._earlier.get(stage, {}).get("rows", ())
        return {row["what"]: row["value"] for row in rows if row.get("value") is not None}

    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def cuda_alone(self, what: str, work: Callable[[], None]) -> None:
        """Does what only a CUDA device can; a dry session says so in its place."""
        if self.dry:
            self.skip(what, "needs CUDA")
            return
        with self.attempt(what):
            work()

    def _write(self, **row: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(" | ".join(str(row[key]) for key in ("what", "expected", "found", "verdict")), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows so far; a last line that a kill has cut off is none."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def told(error: BaseException) -> str:
    """An error on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:300]}" if message else type(error).__name__


def _shown(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

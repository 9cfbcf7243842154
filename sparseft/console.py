"""What the user sees: logs, warnings and progress on stderr, tables of results on stdout.

On a terminal through rich, otherwise as plain lines without escape codes, never cut to a width. rich is imported only
when something is printed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

QUIET = "SPARSEFT_QUIET"  # the environment variable; 1: logs and progress are silent

PLAIN_LINE_SECONDS = 10.0  # at most so long between two plain progress lines
PLAIN_LINE_PAUSE = 2.0  # at least so long, so that quick loops do not fill the log
PLAIN_BOX = "    \n    \n -  \n" + 5 * "    \n"  # a table in a pipe or a file: dashes below the head, nothing else
WIDE = 1_000_000  # columns: of a pipe or a file, which is never too narrow

_warnings: list[str] = []


def log(message: str) -> None:
    """One line to stderr; nothing with `SPARSEFT_QUIET=1`."""
    if not is_quiet():
        _write(message)


def warn(message: str) -> None:
    """A line starting with `warning:` to stderr, also when quiet; kept for `recorded_warnings`."""
    _warnings.append(message)
    _write(f"warning: {message}", style="yellow")


@contextlib.contextmanager
def showing(category: type[Warning]) -> Iterator[None]:
    """Inside, Python's warnings of `category` are shown as `warn` shows its own; others as they are anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", category)
        show = warnings.showwarning

        def showwarning(message, raised, *where, **options) -> None:
            warn(str(message)) if issubclass(raised, category) else show(message, raised, *where, **options)

        warnings.showwarning = showwarning
        yield


def error(message: str) -> None:
    """A line starting with `error:` to stderr, also when quiet."""
    _write(f"error: {message}", style="red")


def recorded_warnings() -> list[str]:
    """The messages of `warn` since the process started or `clear_warnings`, in order."""
    return list(_warnings)


def clear_warnings() -> None:
    """Forgets the recorded warnings, at the start of a run."""
    _warnings.clear()


def is_quiet() -> bool:
    """Whether `SPARSEFT_QUIET=1` silences logs and progress."""
    return os.environ.get(QUIET) == "1"


def be_quiet() -> None:
    """Silences logs and progress of this process from now on."""
    os.environ[QUIET] = "1"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, logs and progress are silent, as with `SPARSEFT_QUIET=1`; warnings and errors are not."""
    before = os.environ.get(QUIET)
    be_quiet()
    try:
        yield
    finally:
        if before is None:
            del os.environ[QUIET]
        else:
            os.environ[QUIET] = before


def is_terminal(stream: TextIO) -> bool:
    """Whether escape codes are welcome on a stream."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout; columns of numbers are aligned right. Floats show four significant digits, None a dash."""
    cells = [[_cell(value) for value in row] for row in rows]
    for row in cells:
        if len(row) != len(columns):
            raise ValueError(f"table '{title}': a row of {len(row)} cells for {len(columns)} columns: {row}")
    right = [
        all(row[position] is None or _is_number(row[position]) for row in rows) and bool(rows)
        for position in range(len(columns))
    ]
    from rich.box import SIMPLE_HEAD, Box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    on_terminal = is_terminal(sys.stdout)
    made = Table(
        box=SIMPLE_HEAD if on_terminal else Box(PLAIN_BOX, ascii=True),
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for position, (name, number) in enumerate(zip(columns, right, strict=True)):
        words = [word for text in (name, *(row[position] for row in cells)) for word in text.split()]
        longest = max((Text(word).cell_len for word in words), default=None)  # where it is narrow, no word is broken
        made.add_column(Text(name), justify="right" if number else "left", min_width=longest)
    for row in cells:
        made.add_row(*map(Text, row))
    console = _console(stderr=False) if on_terminal else Console(width=WIDE, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(made, crop=False)
    print(title)
    for line in captured.get().splitlines():
        print(line.rstrip())


class Progress:
    """The progress of a loop, on stderr: a bar on a terminal, otherwise plain lines: every tenth of the way
    (not more often than every 2 seconds), every 10 seconds, and the last.

        with Progress(100, "train") as progress:
            progress.update(1, loss=2.31, tokens_per_second=812.0)

    total: units in all, None if unknown. initial: units done before (a resumed run); the time left is judged by the
    units done here.
    """

    def __init__(
        self,
        total: int | None,
        description: str,
        unit: str = "step",
        initial: int = 0,
        plain_line_seconds: float = PLAIN_LINE_SECONDS,
        plain_line_pause: float = PLAIN_LINE_PAUSE,
    ) -> None:
        self.total = total
        self.description = description
        self.unit = unit
        self.initial = initial
        self.completed = initial
        self.fields: dict[str, Any] = {}
        self._plain_line_seconds = plain_line_seconds
        self._plain_line_pause = plain_line_pause
        self._bar: RichProgress | None = None
        self._task: Any = None
        self._printed: int | None = None  # units done at the last plain line
        self._started_at = self._printed_at = time.monotonic()

    def __enter__(self) -> Progress:
        self._started_at = self._printed_at = time.monotonic()
        if not is_quiet() and is_terminal(sys.stderr):
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn(f"{self.unit}s"),
                TextColumn("{task.fields[details]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=_console(stderr=True),
            )
            self._task = self._bar.add_task(self.description, total=self.total, completed=self.initial, details="")
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.completed > self.initial and self._printed != self.completed:
            self._print_line()

    def update(self, completed: int, **fields: Any) -> None:
        """`completed` units are done in all (not since the last call); the fields stay until they are given again."""
        self.completed = completed
        self.fields |= fields
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, details=self._details())
            return
        last = self._printed if self._printed is not None else self.initial
        tenth_passed = bool(self.total) and completed * 10 // self.total > last * 10 // self.total
        waited = time.monotonic() - self._printed_at
        if (tenth_passed and waited >= self._plain_line_pause) or waited >= self._plain_line_seconds:
            self._print_line()

    def _details(self) -> str:
        return ", ".join(_field(name, value) for name, value in self.fields.items())

    def _print_line(self) -> None:
        self._printed, self._printed_at = self.completed, time.monotonic()
        if self.total:
            parts = [f"{self.completed}/{self.total} {self.unit}s ({100 * self.completed // self.total} %)"]
        else:
            parts = [f"{self.completed} {self.unit}s"]
        if self.fields:
            parts.append(self._details())
        here = self.completed - self.initial
        if self.total and here > 0 and self.completed < self.total:
            left = (time.monotonic() - self._started_at) / here * (self.total - self.completed)
            parts.append(f"{duration(left)} left")
        log(f"{self.description}: {', '.join(parts)}")


def duration(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _field(name: str, value: Any) -> str:
    if name == "tokens_per_second":
        return f"{value:,.0f} tokens/s"
    return f"{name.replace('_', ' ')} {_cell(value)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@functools.cache
def _console(stderr: bool) -> Console:
    """One rich console per stream, so that a log line goes above a running progress bar instead of through it."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False)


def _write(message: str, style: str | None = None) -> None:
    try:
        if is_terminal(sys.stderr):
            _console(stderr=True).print(message, style=style, soft_wrap=True)
        else:
            print(message, file=sys.stderr, flush=True)
    except BrokenPipeError:
        # Whoever read the log went away; the run itself must not die of it, nor what libraries and children print.
        nowhere = open(os.devnull, "w")
        with contextlib.suppress(OSError, ValueError):  # a stream that has no file
            os.dup2(nowhere.fileno(), sys.stderr.fileno())
        sys.stderr = nowhere

"""What the user sees: logs, warnings and progress on stderr, tables of results on stdout.

On a terminal through rich, otherwise as plain lines without escape codes, never cut to a width. rich is imported only
when something is printed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from sparseft.pace import Pace
from sparseft.replaced import variables

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

QUIET = "SPARSEFT_QUIET"  # the environment variable; 1: logs and progress are silent

PLAIN_LINE_SECONDS = 10.0  # at most so long between two plain progress lines in the first minutes
PLAIN_LINE_MOST = 60.0  # and later
PLAIN_LINE_PAUSE = 5.0  # at least so long, so that quick loops do not fill the log
PLAIN_BOX = "    \n    \n -  \n" + 5 * "    \n"  # a table in a pipe or a file: dashes below the head, nothing else
BAR_LEAST, BAR_MOST = 8, 30  # columns of a live line's bar
ECHO = 3  # columns that a live line leaves free: what a terminal echoes of a Ctrl-C must not break into the next line
WIDE = 1_000_000  # columns: of a pipe or a file, which is never too narrow

_warnings: list[str] = []
_once: tuple[str, ...] = ()  # inside `once`: how the lines begin that are logged once
_logged: set[str] = set()  # those that were


def log(message: str) -> None:
    """One line to stderr; nothing with `SPARSEFT_QUIET=1`."""
    if not is_quiet() and message not in _logged:
        _write(message)
        if message.startswith(_once):
            _logged.add(message)


@contextlib.contextmanager
def once(*begins: str) -> Iterator[None]:
    """Inside, a line that begins so is not logged again: what several runs or commands, one after another, share."""
    global _once, _logged
    before = _once, _logged
    _once, _logged = begins, set()
    try:
        yield
    finally:
        _once, _logged = before


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
    with variables(**{QUIET: "1"}):
        yield


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
    least = []
    for position, (name, number) in enumerate(zip(columns, right, strict=True)):
        # Where it is narrow, no word and no short value ("+0.01 ± 0.02") is broken.
        values = [row[position] for row in cells]
        kept = [part for value in values for part in ([value] if position and len(value) <= 24 else value.split())]
        least.append(max((Text(part).cell_len for part in (*name.split(), *kept)), default=0))
        made.add_column(Text(name), justify="right" if number else "left", min_width=least[-1] or None)
    for row in cells:
        made.add_row(*map(Text, row))
    console = _console(stderr=False) if on_terminal else Console(width=WIDE, color_system=None, force_terminal=False)
    if on_terminal and sum(least) + 2 * (len(least) - 1) > console.width:
        _stacked(title, columns, cells, console.width)
        return
    with console.capture() as captured:
        console.print(made, crop=False)
    print(title)
    for line in captured.get().splitlines():
        print(line.rstrip())


def _stacked(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> None:
    """A table that is too wide for a terminal: of each row the first cell, and below it the others with their names."""
    print(title)
    for row in cells:
        print(row[0])
        line = ""
        for name, cell in zip(columns[1:], row[1:], strict=True):
            part = f"  {name} {cell}"
            if line and len(line) + len(part) > width:
                print(line)
                line = ""
            line += part
        if line:
            print(line)


class Progress:
    """The progress of a loop, on stderr: one live line on a terminal, otherwise plain lines: every tenth of the way
    (not more often than every 5 seconds), every 10 seconds, later every minute. Its last line stays.

        with Progress(100, "train") as progress:
            progress.update(1, loss=2.31, tokens_per_second=812.0)

    total: units in all, None if unknown. initial: units done before (a resumed run). keeps: whether a last line stays;
    without it one that was over before its first plain line leaves nothing. The time left is judged by the units done
    here; while another progress or `working` is shown inside this one, its own clock stands still.
    """

    def __init__(
        self,
        total: int | None,
        description: str,
        unit: str = "step",
        initial: int = 0,
        plain_line_seconds: float = PLAIN_LINE_SECONDS,
        plain_line_pause: float = PLAIN_LINE_PAUSE,
        keeps: bool = True,
    ) -> None:
        self.total = total
        self.description = description
        self.unit = unit
        self.initial = initial
        self.completed = initial
        self.keeps = keeps
        self.fields: dict[str, Any] = {}
        self.pace = Pace(total, initial)
        self._plain_line_seconds = plain_line_seconds
        self._plain_line_pause = plain_line_pause
        self._printed: int | None = None  # units done at the last plain line
        self._heard = not is_quiet()  # whether it began where logs are; what goes on inside may be `quiet`
        self._started_at = self._printed_at = time.monotonic()
        self._around: Progress | None = None

    def __enter__(self) -> Progress:
        self.pace = Pace(self.total, self.initial)
        self._started_at = self._printed_at = time.monotonic()
        self._heard = not is_quiet()
        if self._heard:
            self._around = _open[-1] if _open else None
            if self._around is not None:
                self._around.pace.pause()
            _open.append(self)
            _show()
        return self

    def __exit__(self, *exception: object) -> None:
        if self in _open:
            _open.remove(self)
            _show()
        if self._around is not None:
            self._around.pace.go_on()
        if self.completed > self.initial and self._printed != self.completed:
            if self.keeps or self._printed is not None:
                self._print_line(last=True)

    def update(self, completed: int, **fields: Any) -> None:
        """`completed` units are done in all (not since the last call); the fields stay until they are given again."""
        self.completed = completed
        self.fields |= fields
        self.pace.update(completed)
        if is_terminal(sys.stderr) or completed == self.total:  # `__exit__` says the last
            return
        last = self._printed if self._printed is not None else self.initial
        tenth_passed = bool(self.total) and completed * 10 // self.total > last * 10 // self.total
        now = time.monotonic()
        waited = now - self._printed_at
        seconds = max(self._plain_line_seconds, min(PLAIN_LINE_MOST, (now - self._started_at) / 20))
        if (tenth_passed and waited >= self._plain_line_pause) or waited >= seconds:
            self._print_line()

    def live_line(self, width: int, ascii_only: bool) -> Text:
        """What a terminal of `width` columns shows while it runs: less of it where that is narrow, never two lines."""
        from rich.text import Text

        if not self.unit:  # `working`
            return Text(_fitted([f"{self.description} …", duration(self.pace.seconds)], width))
        count = f"{self.completed}/{self.total}" if self.total else str(self.completed)
        shown = [f"{count} {self.unit}s", *([self._details()] if self.fields else []), *self._left()]
        room = width - len(self.description) - sum(len(part) + 2 for part in shown) - 2
        if room < 0 and self.fields:
            shown = [f"{count} {self.unit}s", *self._left()]
            room = width - len(self.description) - sum(len(part) + 2 for part in shown) - 2
        if not self.total or room < BAR_LEAST:
            return Text(_fitted([self.description, *shown], width))
        bar = min(BAR_MOST, room)
        full = min(bar, bar * self.completed // self.total)
        done, open = ("-", " ") if ascii_only else ("━", "━")
        return Text.assemble(
            f"{self.description}  ",
            (done * full, "green"),
            (open * (bar - full), "bright_black"),
            "  ",
            "  ".join(shown),
        )

    def _details(self) -> str:
        return ", ".join(_field(name, value) for name, value in self.fields.items())

    def _left(self) -> list[str]:
        left = self.pace.left() if self.total and self.completed < self.total else None
        return [] if left is None else [f"{duration(left)} left"]

    def _print_line(self, last: bool = False) -> None:
        self._printed, self._printed_at = self.completed, time.monotonic()
        if not self.total:
            parts = [f"{self.completed} {self.unit}s"]
        elif self.completed < self.total:
            parts = [f"{self.completed}/{self.total} {self.unit}s ({100 * self.completed // self.total} %)"]
        else:
            parts = [f"{self.completed}/{self.total} {self.unit}s"]
        if self.fields:
            parts.append(self._details())
        parts += [f"in {duration(self.pace.seconds)}"] if last else self._left()
        if self._heard:
            _write(f"{self.description}: {', '.join(parts)}")


@contextlib.contextmanager
def working(what: str, logged: bool = True) -> Iterator[None]:
    """Shows that a step without a count is being done: on a terminal as a live line with its time, which goes when it
    is over; otherwise as a line, once it takes longer than 10 seconds, and again after 20, 40, … seconds (not
    `logged`: never)."""
    over = threading.Event()

    def say() -> None:
        seconds = PLAIN_LINE_SECONDS
        while not over.wait(seconds - shown.pace.seconds):
            log(f"{what}: {duration(seconds)} so far")
            seconds += min(seconds, 600.0)

    with Progress(None, what, unit="") as shown:
        if not logged or is_quiet() or is_terminal(sys.stderr):
            yield
            return
        thread = threading.Thread(target=say, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


_open: list[Progress] = []  # what runs now, outermost first
_live: list[Live] = []  # the one display of what runs, on a terminal


def _show() -> None:
    """Starts, refreshes or ends the live lines on a terminal, of what runs innermost and what that is a part of."""
    with _lost_where_it_must():
        if not _open:
            while _live:
                _live.pop().stop()
            return
        if not _live and not is_terminal(sys.stderr):
            return
        if not _live:
            from rich.live import Live

            live = Live(get_renderable=_lines, console=_console(stderr=True), refresh_per_second=4, transient=True)
            _live.append(live)
            live.start()
        _live[0].refresh()


def _lines() -> Text:
    from rich.text import Text

    console = _console(stderr=True)
    ascii_only = not console.encoding.lower().startswith("utf")
    lines = [progress.live_line(console.width - ECHO, ascii_only) for progress in _open[-2:]]
    return Text("\n", no_wrap=True, overflow="crop").join(lines)


def _fitted(parts: list[str], width: int) -> str:
    """The parts in one line; where they do not fit, the first one is cut."""
    rest = "".join(f"  {part}" for part in parts[1:])
    first = parts[0]
    if len(first) + len(rest) > width:
        first = first[: max(0, width - len(rest) - 1)] + "…"
    return first + rest


def duration(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(count: int) -> str:
    """Bytes as `12.3 kB`, `32.4 MB` or `1.5 GB`: what a disk's space is said in."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count / 1e3:,.1f} kB"


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
    with _lost_where_it_must():
        if is_terminal(sys.stderr):
            _console(stderr=True).print(message, style=style, soft_wrap=True)
        else:
            print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _lost_where_it_must() -> Iterator[None]:
    """Inside, stderr that can no longer be written (its reader or the terminal went away, its disk is full) leads
    nowhere from then on: the run itself must not die of it, nor what libraries and children print."""
    try:
        yield
    except BlockingIOError:
        pass  # a slow reader, where writing does not wait: this line is lost, the next one may not be
    except OSError:
        nowhere = open(os.devnull, "w")
        with contextlib.suppress(OSError, ValueError):  # a stream that has no file
            os.dup2(nowhere.fileno(), sys.stderr.fileno())
        sys.stderr = nowhere


def visible(text: str) -> str:
    """Without what a terminal would obey: a model, or a data set, may say anything."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")

"""What the one who asks sees: answers as they come, on a terminal or through a pipe, and what is said about the talk.

Through a pipe stdout has the answers and nothing else; the rest goes where logs go.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from sparseft import console
from sparseft.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Say = Callable[[str], None]

COLUMNS_FROM = 80  # columns of a terminal that has two answers side by side
STYLES = ("bold cyan", "bold green")  # of the names above two answers


class Pipe:
    """Lines in, answers out."""

    interactive = False

    def ask(self, name: str) -> str:
        """The next line, without its end; EOFError after the last."""
        try:
            line = sys.stdin.readline()
            line.encode()  # in some locales Python takes bytes that are no text for halves of surrogate pairs
        except UnicodeError as error:
            encoding = getattr(sys.stdin, "encoding", None) or "utf-8"
            raise UserError(f"stdin is not text in {encoding}: {getattr(error, 'reason', error)}.") from error
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def note(self, text: str) -> None:
        console.log(text)

    error = note

    def listing(self, rows: dict[str, str]) -> None:
        """Names with what is said of each."""
        for name, text in rows.items():
            self.note(f"{name:<{max(map(len, rows))}}  {text}")

    def say(self, text: str) -> None:
        """The very text into a pipe or a file; lines may come through a pipe though answers go to a terminal."""
        _write(console.visible(text) if sys.stdout.isatty() else text)

    @contextlib.contextmanager
    def answer(self) -> Iterator[Say]:
        yield self.say
        self.say("\n")

    @contextlib.contextmanager
    def answers(self, names: Sequence[str]) -> Iterator[dict[str, Say]]:
        """One below the other, each under its name, in this order."""

        def head(name: str, index: int) -> None:
            self.say("\n" * bool(index) + f"{name}:\n")

        yield _below(head, names, self.say)
        self.say("\n")


class Silent(Pipe):
    """Lines in, nothing out: for a result that comes at the end."""

    def say(self, text: str) -> None:
        pass


class Terminal:
    """A prompt with line editing and history; answers wrapped at words, two side by side where there is room."""

    interactive = True

    def __init__(self) -> None:
        from rich.console import Console

        with contextlib.suppress(ImportError):  # not on every system; `input` does without
            import readline  # noqa: F401  # by being there it gives `input` line editing and history

        self.console: Console = Console(markup=False, highlight=False, emoji=False)
        self.fancy = console.is_terminal(sys.stdout)
        self.answered = False  # since the last line was typed

    def ask(self, name: str) -> str:
        """The line that is typed; EOFError for Ctrl-D."""
        _write("\n" * self.answered)
        self.answered = False
        # What stands between \1 and \2 takes no room, as readline has to know, which edits on the true stdout alone.
        edits = self.fancy and sys.stdout is sys.__stdout__
        prompt = f"\1\x1b[1m\2{name}>\1\x1b[0m\2 " if edits else f"{name}> "
        try:
            return input(prompt)
        except (EOFError, KeyboardInterrupt):
            _write("\n")
            raise

    def note(self, text: str) -> None:
        self.console.print(text, style="dim")

    def error(self, text: str) -> None:
        self.console.print(text, style="red")

    def listing(self, rows: dict[str, str]) -> None:
        from rich.table import Table

        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        for row in rows.items():
            table.add_row(*row)
        self.console.print(table, style="dim")

    @contextlib.contextmanager
    def answer(self) -> Iterator[Say]:
        line = Wrapped(self.console.width if self.fancy else 0)
        try:
            yield line.say
        finally:
            self._end()

    @contextlib.contextmanager
    def answers(self, names: Sequence[str]) -> Iterator[dict[str, Say]]:
        """Side by side, or one below the other where that would be too narrow."""
        if self.fancy and self.console.width >= COLUMNS_FROM:
            with self._columns(names) as says:
                yield says
            return
        line = Wrapped(self.console.width if self.fancy else 0)

        def head(name: str, index: int) -> None:
            line.say("\n\n" * bool(index))
            self.console.print(f"{name}:", style=STYLES[index % 2])
            line.column = 0

        try:
            yield _below(head, names, line.say)
        finally:
            self._end()

    def _end(self) -> None:
        _write("\n")
        self.answered = True

    @contextlib.contextmanager
    def _columns(self, names: Sequence[str]) -> Iterator[dict[str, Say]]:
        from rich.live import Live

        texts = dict.fromkeys(names, "")
        # While they grow, as many of their last lines as fit; in the end all of it stays, above what comes next.
        with Live(console=self.console, transient=True, refresh_per_second=10) as live:

            def say(name: str) -> Say:
                def more(text: str) -> None:
                    texts[name] += console.visible(text)
                    live.update(self._table(texts, self.console.height - 3))

                return more

            try:
                yield {name: say(name) for name in names}
            finally:
                live.update("")
                live.stop()
                self.console.print(self._table(texts, None))
                self.answered = True

    def _table(self, texts: dict[str, str], height: int | None) -> Table:
        from rich.table import Table
        from rich.text import Text

        whole = self.console.width - console.ECHO
        table = Table(box=None, width=whole, padding=(0, 2, 0, 0), pad_edge=False)
        width = whole // len(texts) - 2
        cells = []
        for index, (name, text) in enumerate(texts.items()):
            table.add_column(Text(name, style=STYLES[index % 2]), ratio=1)
            lines = Text(text).wrap(self.console, width)
            cells.append(Text("\n").join(lines if height is None else lines[-height:]))
        table.add_row(*cells)
        return table


class Wrapped:
    """Writes text as it comes and moves a word to the next line once it turns out not to fit.

    width: of the terminal, in columns; 0: the terminal breaks lines.
    """

    def __init__(self, width: int) -> None:
        self.width = width - 1  # in the last column a terminal waits before it breaks the line
        self.column = 0
        self.word = ""  # what of the present word stands on this line

    def say(self, text: str) -> None:
        text = console.visible(text)
        _write(text if self.width < 2 else "".join(map(self._place, text)))

    def _place(self, letter: str) -> str:
        from rich.cells import cell_len

        if letter == "\n":
            self.column, self.word = 0, ""
            return letter
        letter = " " if letter == "\t" else letter
        size, before = cell_len(letter), ""
        if self.column + size > self.width:
            if letter == " ":  # the break takes its place
                self.column, self.word = 0, ""
                return "\n"
            moved, taken = self.word, cell_len(self.word)
            if taken and taken < self.column and taken + size <= self.width:
                before = f"\x1b[{taken}D\x1b[K\n{moved}"
                self.column = taken
            else:  # a word longer than a line
                before = "\n"
                self.column, self.word = 0, ""
        self.column += size
        self.word = "" if letter == " " else self.word + letter
        return before + letter


def _below(head: Callable[[str, int], None], names: Sequence[str], say: Say) -> dict[str, Say]:
    """What says each one's text by `say`; ahead of its first piece `head(name, place)`."""
    begun: set[str] = set()

    def under(name: str, index: int, text: str) -> None:
        if name not in begun:
            begun.add(name)
            head(name, index)
        say(text)

    return {name: functools.partial(under, name, index) for index, name in enumerate(names)}


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

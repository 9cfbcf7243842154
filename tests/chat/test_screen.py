"""What stands on a terminal in the end, and what a pipe gets."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from sparseft import console
from sparseft.chat.screen import Pipe, Terminal, Wrapped
from sparseft.errors import UserError

LETTERS = "abcdefg hijk  lmn\n日\N{PILE OF POO}é"


def screen_of(written: str) -> list[str]:
    """The lines of an endless terminal that knows two codes: so many cells back, and clear to the end of the line."""
    lines = [""]
    for code, count, letter in re.findall(r"\x1b\[(?:(\d+)(D)|K)|(.|\n)", written):
        if count:
            back = int(code)
            while back > 0:
                back -= cell_len(lines[-1][-1])
                lines[-1] = lines[-1][:-1]
            assert back == 0
        elif letter == "\n":
            lines.append("")
        else:
            lines[-1] += letter
    return lines


@given(pieces=st.lists(st.text(LETTERS, max_size=12), max_size=12), width=st.integers(6, 20))
def test_words_are_kept_whole_however_they_come(pieces: list[str], width: int) -> None:
    text = "".join(pieces)
    written = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", written)
        line = Wrapped(width)
        for piece in pieces:
            line.say(piece)
    found = screen_of(written.getvalue())
    assert all(cell_len(line) < width for line in found)
    assert re.sub(r"\s", "", "".join(found)) == re.sub(r"\s", "", text)
    for word in text.split():
        if cell_len(word) < width:
            assert any(word in line for line in found), (word, found)
    if all(cell_len(word) < width for word in text.split()):
        # Broken where it must be only: the first word of a line would not have fitted on the one before.
        expected = [line.split() for part in text.split("\n") for line in [part]]
        flat = [line.split() for line in found]
        assert [word for line in flat for word in line] == [word for line in expected for word in line]


def test_a_terminal_obeys_nothing_that_a_model_says() -> None:
    assert console.visible("a\x1b[2Jb\x07\r\n\tc\N{ZERO WIDTH JOINER}") == "a[2Jb\n\tc\N{ZERO WIDTH JOINER}"


class Screenlike(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stdout", "found"), [(io.StringIO, "a\x1b[2Jb\n"), (Screenlike, "a[2Jb\n")])
def test_a_pipe_gets_the_very_text(stdout: type, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", stdout())
    with Pipe().answer() as say:
        say("a\x1b[2J")
        say("b")
    assert sys.stdout.getvalue() == found  # type: ignore[attr-defined]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the latter in the C locale
def test_bytes_that_are_no_text_are_refused(errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi\xff\n"), "utf-8", errors=errors))
    with pytest.raises(UserError, match="stdin is not text in utf-8"):
        Pipe().ask("base")


def terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, io.StringIO]:
    file = io.StringIO()
    monkeypatch.setattr("sys.stdout", file)
    made = Terminal()
    made.console = Console(file=file, width=width, height=12, force_terminal=True, color_system=None, markup=False)
    made.fancy = True
    return made, file


def plain(text: str) -> list[str]:
    """The lines that are there at the end, without codes; what was live is cleared before the last of it."""
    bare = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text.rsplit("\x1b[2K", 1)[-1])
    return [line.rstrip() for line in bare.replace("\r", "").split("\n") if line.strip()]


def test_two_answers_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    made, file = terminal(90, monkeypatch)
    with made.answers(["base", "mine"]) as says:
        for _ in range(30):
            says["base"]("the raven is black and ")
        says["mine"]("\x1b[2J[bold]\nshort")
    lines = plain(file.getvalue())
    whole = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", file.getvalue()).splitlines()
    assert max(map(len, whole)) <= 90 - len("^C") - 1  # what a Ctrl-C echoes fits beside it
    assert re.fullmatch(r"base +mine", lines[0])
    assert lines[1].startswith("the raven is black") and lines[1].endswith("[2J[bold]")
    assert lines[2].endswith("short") and lines[1].index("[2J") == lines[0].index("mine") == lines[2].index("short")
    assert len(lines) > 12  # all of it, though it is higher than the terminal
    assert " ".join(line[: lines[0].index("mine")].strip() for line in lines[1:]).count("raven") == 30


def test_or_one_below_the_other_where_it_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    made, file = terminal(60, monkeypatch)
    with made.answers(["base", "mine"]) as says:
        says["base"]("the raven is black and " * 4)
        says["mine"]("short")
    lines = plain(file.getvalue())
    assert lines[0] == "base:" and lines[-2:] == ["mine:", "short"] and max(map(len, lines)) < 60


def test_a_list_keeps_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    made, file = terminal(30, monkeypatch)
    made.listing({"/adapter [NAME|FOLDER]": "one two three four", "/base": "five"})
    assert plain(file.getvalue()) == [
        "/adapter [NAME|FOLDER]  one",
        " " * 24 + "two",
        " " * 24 + "three",
        " " * 24 + "four",
        "/base                   five",
    ]

"""What README.md and docs/ tell a reader to type: the commands and Python of their fenced blocks, with what they need.

A comment right above a block says what a machine without it cannot do:

    <!-- needs: a GPU -->          its commands are composed, not run
    <!-- shape -->                 its commands have placeholders: their options and keys must exist
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.places import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```", re.DOTALL | re.MULTILINE
)
SHELL = ("", "sh", "bash")
OURS = re.compile(r"(?:sparseft|make|scripts/\w+\.sh|python scripts/\w+\.py|python docs/\S+\.py)\b")
STARTED = re.compile(r"^(?:srun|torchrun|deepspeed)\b.*?\bsparseft (?=[a-z])")  # by another program
PIPED = re.compile(r"^(?:echo|printf) '(.*)' \| (?=sparseft )")
OPTIONAL = re.compile(r" \[[^\]]*\]")  # of a command's shape: [--engine ENGINE]


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    mark: str
    body: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command; `text` as it stands there, on one line and without its comment."""

    page: Path
    place: str
    mark: str
    text: str
    stdin: str = ""

    @property
    def words(self) -> list[str]:
        """Without what is optional and the dots that stand for more."""
        return [word for word in shlex.split(OPTIONAL.sub("", self.text)) if word not in ("…", "...")]

    @property
    def offered(self) -> list[str]:
        """The words with what is optional, one of several where there is a choice."""
        text = re.sub(r"[\[\]]", " ", self.text)
        return [word.partition("|")[0] for word in shlex.split(text) if word not in ("…", "...", "|")]

    def __str__(self) -> str:
        return f"{self.place} {self.text[:50]}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start("language")) + 1,
            found["language"],
            found["mark"] or "",
            found["body"],
        )
        for found in BLOCK.finditer(text)
    ]


def commands(pages: list[Path] = PAGES) -> list[Command]:
    """In the order of the pages. What other programs start of ours counts as ours."""
    found = []
    for block in (block for page in pages for block in blocks(page) if block.language in SHELL):
        for line in re.sub(r"\\\n\s*", "", block.body).splitlines():
            line = re.sub(r"\s+#\s.*", "", line.strip())
            started = STARTED.match(line)
            piped = PIPED.match(line)
            stdin, line = (piped[1].replace(r"\n", "\n") + "\n", line[piped.end() :]) if piped else ("", line)
            text = f"sparseft {line[started.end() :]}" if started else line
            if OURS.match(text):
                mark = block.mark or ("needs: others" if started else "")
                found.append(Command(block.page, block.place, mark, text, stdin))
    return found


def python_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language == "python"]


def inline_commands() -> list[Command]:
    """`sparseft …` within text and tables: the shape of a command, or one."""
    found = []
    for page in PAGES:
        text = re.sub(
            r"^```.*?^```", lambda it: "\n" * it[0].count("\n"), page.read_text(), flags=re.DOTALL | re.MULTILINE
        )
        for code in re.finditer(r"`(sparseft [a-z][^`]*)`", text):
            place = f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, code.start()) + 1}"
            words = " ".join(code[1].replace(r"\|", "|").split())
            found.append(Command(page, place, "shape", words))
    return found


def named(items: list[Command] | list[Block]) -> list[pytest.param]:
    return [pytest.param(item, id=item.place if isinstance(item, Block) else str(item)) for item in items]

"""Data files to records, a bounded number of bytes at a time: JSON lines, JSON arrays, plain text (tables: tables.py).

Files may be compressed (`unpacking.py`); lines, columns and bytes in messages are those of the content.
Each reader yields `(number, record, bytes)`: the record's place in the file from 1, as messages name it, and about how
much memory it takes. One record must fit into memory, the file need not; of a text not even a document.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sparseft.data.sections import LONGEST, sections
from sparseft.data.unpacking import BLOCK, unpacked
from sparseft.errors import UserError, shown
from sparseft.files.untrusted import KeyTwice, unique_keys

WHOLE = 2**26  # bytes of a file that may be read at once to say better what is wrong with it

Item = tuple[int, Any, int]

_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


def json_lines(file: Path, source: str) -> Iterator[Item]:
    """One JSON value a line; blank lines count, but hold nothing."""
    first = True
    for number, line in _lines(file, source):
        # Lines end at "\n" alone: str.splitlines would also cut at U+2028 and friends, which JSON allows in a string.
        if not line.strip():
            continue
        try:
            yield number, _DECODER.decode(line), len(line)
        except KeyTwice as error:
            raise _key_twice(f"{source}, line {number}", error) from error
        except ValueError as error:
            if first:
                _refuse_single_object(file, source)
            where, reason = f"{source}, line {number}", str(error)
            if isinstance(error, json.JSONDecodeError):  # else a number with thousands of digits
                where, reason = f"{where}, column {error.colno}", error.msg
            raise UserError(f"{where}: broken JSON ({reason}); expected one JSON object a line.") from error
        except RecursionError as error:
            raise UserError(f"{source}, line {number}: the JSON is nested too deep to be read.") from error
        first = False


def _refuse_single_object(file: Path, source: str) -> None:
    """A file that is one object over many lines is valid JSON, so "broken JSON" would be the wrong complaint."""
    with unpacked(file, source) as content:
        whole = content.read(WHOLE + 1)
    if len(whole) > WHOLE:
        return
    try:
        value = json.loads(whole)
    except (ValueError, RecursionError):
        return
    if not isinstance(value, dict):
        return
    keys = shown(", ".join(list(value)[:5]), 300)
    raise UserError(f"{source} is one JSON object (keys: {keys}); expected a JSON array of records or JSON lines.")


def json_array(file: Path, source: str) -> Iterator[Item]:
    """The values of one JSON array, decoded one after another."""
    with unpacked(file, source) as content, io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as text:
        try:
            yield from _Array(text, source).values()
        except UnicodeDecodeError:
            refuse_encoding(file, source)
            raise


class _Array:
    """A JSON array in a window that moves over the file."""

    def __init__(self, text: IO[str], source: str) -> None:
        self.text, self.source = text, source
        self.window, self.position, self.ended = "", 0, False
        self.line, self.column = 1, 1  # of the window's first character

    def values(self) -> Iterator[Item]:
        self._expect("[", "Expecting value")
        number = 0
        while True:
            if number == 0 and self._next() == "]":
                self.position += 1
                break
            self._next()
            value, length = self._value()
            number += 1
            yield number, value, length
            if self._expect(",]", "Expecting ',' delimiter") == "]":
                break
        if self._next():
            raise self._broken("Extra data", self.position)

    def _value(self) -> tuple[Any, int]:
        """The value that begins at the position, and how many characters it takes."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.window, self.position)
            except json.JSONDecodeError as error:
                # A value cut by the window fails near its end or as an unclosed string; anything else is broken JSON.
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.window) - 16
                if self.ended or not cut:
                    raise self._broken(error.msg, error.pos) from error
            except KeyTwice as error:
                raise _key_twice(self._where(self.position), error) from error
            except ValueError as error:  # a number with thousands of digits
                raise self._broken(str(error), self.position) from error
            except RecursionError as error:
                raise UserError(f"{self._where(self.position)}: the JSON is nested too deep to be read.") from error
            else:
                # A number may continue behind the window, but not for more than 32 characters.
                whole = isinstance(value, dict | list | str) or self.window[end : end + 1] in tuple(" \t\r\n,]")
                if self.ended or whole or len(self.window) - end > 32:
                    length, self.position = end - self.position, end
                    return value, length
            self._more()

    def _next(self) -> str:
        """The next character that is not white space, which stays where it is; empty at the end."""
        while True:
            while self.position < len(self.window) and self.window[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.window):
                return self.window[self.position]
            if self.ended:
                return ""
            self._more()

    def _expect(self, characters: str, message: str) -> str:
        found = self._next()
        if not found or found not in characters:
            raise self._broken(message, self.position)
        self.position += 1
        return found

    def _more(self) -> None:
        done = self.window[: self.position]
        newlines = done.count("\n")
        self.line += newlines
        self.column = len(done) - done.rfind("\n") if newlines else self.column + len(done)
        # As much again as there is: a long record is decoded a few times, not once a block.
        block = self.text.read(max(BLOCK, len(self.window) - self.position))
        self.ended = not block
        self.window = self.window[self.position :] + block
        self.position = 0

    def _where(self, position: int) -> str:
        before = self.window[:position]
        newlines = before.count("\n")
        column = position - before.rfind("\n") if newlines else self.column + position
        return f"{self.source}, line {self.line + newlines}, column {column}"

    def _broken(self, message: str, position: int) -> UserError:
        where = self._where(position)
        return UserError(f"{where}: broken JSON ({message}); expected a JSON array of records.")


def _key_twice(where: str, error: KeyTwice) -> UserError:
    return UserError(f"{where}: the key '{shown(error.key)}' stands twice in one object; which of both is meant?")


def plain_text(file: Path, source: str) -> Iterator[Item]:
    """One record {"text": …} for each run of lines between blank lines, its number that of its first line; a long one
    comes in sections, which are records of their own."""
    with unpacked(file, source) as content, io.TextIOWrapper(content, encoding="utf-8-sig", newline="\n") as text:
        try:
            for number, parts in itertools.groupby(_document_parts(text), key=operator.itemgetter(0)):
                for section in sections(part for _, part in parts):
                    yield number, section, len(section["text"])
                    number += section["text"].count("\n")
        except UnicodeDecodeError:
            refuse_encoding(file, source)
            raise


def _document_parts(lines: IO[str]) -> Iterator[tuple[int, str]]:
    """The number of a document's first line, and a line of it with the line's end before it; of a long line a part."""
    number = start = 0
    ended = True
    while part := lines.readline(LONGEST):
        begins, short = ended, len(part) < LONGEST
        while part.endswith("\r") and (more := lines.readline(1)):  # the end of a line is not parted
            part += more
        ended = part.endswith("\n")
        number += begins
        text = part.removesuffix("\n").removesuffix("\r")
        if begins and (ended or short) and not text.strip():
            start = 0
            continue
        yield start or number, "\n" + text if start and begins else text
        start = start or number


def _lines(file: Path, source: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line, with its end, without a byte order mark."""
    with unpacked(file, source) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                refuse_encoding(file, source)
                raise


def refuse_encoding(file: Path, source: str) -> None:
    """Names the first byte of a file that is no UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, read, block = 1, 0, b" "
    with unpacked(file, source) as content:
        while block:
            block = content.read(BLOCK)
            try:
                line += decoder.decode(block, final=not block).count("\n")
            except UnicodeDecodeError as error:
                held = len(error.object) - len(block)  # the start of a character that the block before ends with
                line += error.object[: error.start].count(b"\n")
                raise UserError(
                    f"{source}, line {line}: not UTF-8 text (byte {read - held + error.start}); save the file as UTF-8."
                ) from error
            read += len(block)


def first_character(file: Path, source: str) -> str:
    """The first character that is neither white space nor a byte order mark; empty where there is none."""
    with unpacked(file, source) as content:
        rest = content.read(BLOCK).removeprefix(b"\xef\xbb\xbf")
        while rest and not (found := rest.strip()):
            rest = content.read(BLOCK)
    return found[:1].decode("latin-1") if rest else ""

"""Long texts in sections, so that no text is read or tokenised whole, however long it is.

A text is cut where tokenizers cut it too, wherever there is such a place: behind a line's end, else before a space,
else anywhere. What stands before a cut goes with the section as its context: it is tokenised as it is in the text, but
that a token which would span a cut comes in two.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

LONGEST = 2**22  # characters of a section, at most: about as much as there is of records in memory (`records.py`)
CONTEXT = 2**8  # characters before a cut, on which the tokens behind it may depend
CANDIDATES = 16  # places of a kind where a text may be cut


class Section(dict[str, Any]):
    """A record `{"text": …}` that may be a part of a longer text: right after `before`, empty where the text begins;
    `more`: whether the text goes on behind it."""

    def __init__(self, text: str, before: str, more: bool) -> None:
        super().__init__(text=text)
        self.before, self.more = before, more


def sections(parts: Iterable[str]) -> Iterator[Section]:
    """A text that comes in parts, in sections of at most `LONGEST` characters; one that is no longer is one section."""
    held: list[str] = []
    size, before = 0, ""
    for part in parts:
        held.append(part)
        size += len(part)
        while size > LONGEST:
            text = "".join(held)
            end = next(cuts(text, LONGEST))
            yield Section(text[:end], before, more=True)
            before = (before + text[max(0, end - CONTEXT) : end])[-CONTEXT:]
            held, size = [text[end:]], size - end
    yield Section("".join(held), before, more=False)


def sections_of(item: dict[str, Any]) -> Iterator[Section]:
    """The sections of a record's `text`; a section is its own."""
    if isinstance(item, Section):
        yield item
        return
    text = item["text"]
    yield from sections(text[start : start + LONGEST] for start in range(0, len(text), LONGEST))


def cuts(text: str, limit: int) -> Iterator[int]:
    """Places in the second half of `text[:limit]` where `text`, which is longer, may be cut, best first."""
    yield from itertools.islice(_line_starts(text, limit), CANDIDATES)
    yield from itertools.islice(_word_ends(text, limit), CANDIDATES)
    yield from itertools.islice(range(limit, limit // 2, -1), CANDIDATES)


def _line_starts(text: str, limit: int) -> Iterator[int]:
    place = text.rfind("\n", limit // 2, limit)
    while place != -1:
        if not text[place + 1].isspace():  # white space over several lines may be one token
            yield place + 1
        place = text.rfind("\n", limit // 2, place)


def _word_ends(text: str, limit: int) -> Iterator[int]:
    place = text.rfind(" ", limit // 2 + 1, limit)
    while place != -1:
        if not text[place - 1].isspace():  # a word's token has the one space before it
            yield place
        place = text.rfind(" ", limit // 2 + 1, place)

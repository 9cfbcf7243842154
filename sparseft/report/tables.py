"""Tables of the page: cells of text, and what they are sorted by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


def listed(names: Sequence[str], most: int = 8) -> str:
    """`a, b and 3 more`: at most that many of the names, each shortened where it is very long."""
    shown = [name if len(name) <= 60 else f"{name[:59]}…" for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass
class Table:
    """Cells of text; columns in `numeric` are set right, cells (row, column) in `best` stand out.

    keys: by column the number of each row that the table sorts by, None where there is none; other columns sort by
    their texts. A table with `sorts` does so by a click on a head; its rows are read in the order given without.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[int] = ()
    best: set[tuple[int, int]] = field(default_factory=set)
    keys: dict[int, Sequence[float | None]] = field(default_factory=dict)
    sorts: bool = False

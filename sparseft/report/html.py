"""From a template of this folder to one self-contained page, and what its tables hold. Jinja2 is imported when a page
is made, not before."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseft.files.atomic import write_text
from sparseft.report.charts import DARK, LIGHT, clean, with_ids


def write_page(out: Path, template: str, **values: Any) -> Path:
    """Writes the page that a template of `base.html.j2` makes of the values to `out`, and returns it."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_text),
        autoescape=True,
        finalize=clean,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    script, numbers = _text("sort.js"), itertools.count()
    environment.globals |= {
        "light": LIGHT,
        "dark": DARK,
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "drawing": lambda svg: with_ids(svg, f"d{next(numbers)}"),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    return write_text(out, environment.get_template(template).render(**values))


def _text(name: str) -> str:
    return importlib.resources.files("sparseft.report").joinpath(name).read_text(encoding="utf-8")


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

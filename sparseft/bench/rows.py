"""What a row of a benchmark says where there is nothing to measure: what is missing, or what went wrong.

`{"missing": reason}`: it cannot be had here (a package, a compiler). `{"failed": reason, "where": place}`: it raised.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]


def absent(row: Mapping[str, Any]) -> str | None:
    """Why a row has no figures; null where it has."""
    return row.get("missing") or row.get("failed")


def kind(row: Mapping[str, Any]) -> str:
    """`missing` or `failed`, of a row without figures."""
    return next(iter(row))


def measured(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The rows that have figures."""
    return {name: row for name, row in rows.items() if absent(row) is None}


def failed(error: Exception) -> dict[str, str]:
    """The row of a contender that raised: what, and the innermost line of this package that it went through."""
    message = " ".join(str(error).split())
    row = {"failed": f"{type(error).__name__}: {message}" if message else type(error).__name__}
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    if ours:  # below the package, so that no user's folder is named
        row["where"] = f"{Path(ours[-1].filename).relative_to(PACKAGE.parent).as_posix()}:{ours[-1].lineno}"
    return row

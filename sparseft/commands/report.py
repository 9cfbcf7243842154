"""`sparseft report [RUN…]`: one HTML page of a run, or of several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparseft.errors import UserError
from sparseft.report.page import build_report
from sparseft.runs.folder import OUTPUTS, REPORT, find_run, latest_run, timestamp


def run(runs: list[str]) -> dict[str, Any]:
    """Writes the page of the named runs, of the latest when none is named, and returns `{"report", "runs"}`.

    One run's page lies in its folder as `report.html`; that of several is `outputs/report-<date>-<time>.html`.
    Raises UserError when a folder holds no run, is named twice, or cannot be written.
    """
    folders = [find_run(name) for name in runs] if runs else [latest_run()]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(f"the run '{folder}' is named more than once: name each run of a comparison once.")
    out = folders[0] / REPORT if len(folders) == 1 else _free(OUTPUTS / f"report-{timestamp()}.html")
    try:
        build_report(folders, out)
    except OSError as error:
        raise UserError(f"cannot write the report '{out}': {error.strerror or error}.") from error
    return {"report": str(out), "runs": [str(folder) for folder in folders]}


def _free(path: Path) -> Path:
    """`path`, or with a number before its suffix where a report of the same second has taken it."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


def render(result: dict[str, Any]) -> None:
    """Prints where the page lies and of what."""
    print(f"report of {', '.join(result['runs'])}")
    print(f"written to {result['report']}: open it in a browser")

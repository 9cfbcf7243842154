"""`metrics.jsonl` of a run folder: it grows by whole lines, and a line torn by a crash is dropped by whoever opens it
next. No torch here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sparseft.errors import UserError
from sparseft.files.atomic import dumps, write_text
from sparseft.files.untrusted import parse_json, read_bytes
from sparseft.runs.folder import METRICS, SUMMARY, load_summary

LARGEST = 1 << 34  # bytes


def append_metrics(path: str | Path, *records: dict[str, Any]) -> None:
    """Appends lines of strict JSON, handed to the operating system at once, so that a crash loses no earlier line.

    A last line that a crash tore is cut off first: the new one would run into it.
    """
    lines = b"".join(dumps(record).encode() + b"\n" for record in records)
    with open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(lines)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All records of `metrics.jsonl` in order; none if the file is not there. A torn last line is left out.

    Raises UserError naming file and line for any other line that is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        return []
    *lines, _ = read_bytes(path, limit=LARGEST).split(b"\n")  # what follows the last newline is no whole line
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:  # broken JSON or broken UTF-8
            raise UserError(f"'{path}', line {number}: not JSON.") from error
        if not isinstance(record, dict):
            raise UserError(f"'{path}', line {number}: expected one JSON object a line.")
        records.append(record)
    return records


def step_of(record: dict[str, Any]) -> int:
    """The optimizer step of a line of metrics, 0 where it names none."""
    return step if isinstance(step := record.get("step"), int) else 0


def truncate_metrics(path: str | Path, step: int) -> None:
    """Drops the lines of steps after `step`, and a torn last line: what a run resumed at `step` will write again."""
    path = Path(path)
    if not path.is_file():
        return
    kept = [record for record in read_metrics(path) if step_of(record) <= step]
    write_text(path, "".join(dumps(record) + "\n" for record in kept))


def went_on_from(run: Path) -> int | None:
    """The step that the summary of a run is of, where the run was continued past it and has not finished: its adapter
    is of that step too. None of any other run."""
    steps = load_summary(run).get("steps") if (run / SUMMARY).is_file() else None
    if not isinstance(steps, int) or not (run / METRICS).is_file():
        return None
    seen = [step for line in read_metrics(run / METRICS) if isinstance(step := line.get("step"), (int, float))]
    return steps if max(seen, default=0) > steps else None

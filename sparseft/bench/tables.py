"""The tables of `sparseft bench train`, from what `bench.json` holds, and what makes a benchmark a failed one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sparseft.bench import targets
from sparseft.bench.machine import measured_on
from sparseft.bench.rows import absent, kind, measured
from sparseft.bench.ways import EAGER

NOTHING = "-"
SPACING = 3  # characters between two columns on a terminal, and four at the sides


def title(result: dict[str, Any]) -> str:
    """What was measured, in one line."""
    return (
        f"Training step: {result['model']}, {result['parameters']:,} parameters, {result['dtype']} on "
        f"{measured_on(result)}, {result['batch_size']} x {result['length']} tokens"
        + (f" x {result['accumulation']}" if result["accumulation"] > 1 else "")
        + ("" if next(iter(result["ways"])) == EAGER else f", {next(iter(result['ways']))}")
        + f", median of {result['steps']}"
    )


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: the first way in full, of every further one the time, against the floor and the first."""
    methods = result["methods"]
    known = measured(methods)
    references = list(next(iter(known.values()))["ratio_to"]) if known else []
    columns = ["method", "step ms", "p20-p80", *(f"÷ {other}" for other in references)]
    columns += ["tokens/s", "peak MiB", "saved MiB", "trainable"]
    rows = []
    for name, entry in methods.items():
        if name not in known:
            rows.append([name, kind(entry), *[NOTHING] * (len(columns) - 2)])
            continue
        rows.append(
            [
                name,
                f"{1000 * entry['step_seconds']:.1f}",
                f"{1000 * entry['step_seconds_p20']:.1f}-{1000 * entry['step_seconds_p80']:.1f}",
                *(f"{entry['ratio_to'][other]:.2f}" for other in references),
                f"{entry['tokens_per_second']:,.0f}",
                _mebibytes(entry["peak_memory_bytes"]),
                _mebibytes(entry["saved_bytes"]),
                f"{entry['trainable_parameters']:,}",
            ]
        )
    first, *others = result["ways"].items()
    for way, entries in others:
        more, cells = _further(way, entries, first[0], methods)
        columns += more
        rows = [row + cells[row[0]] for row in rows]
    return columns, rows


def _further(
    way: str, entries: dict[str, Any], first: str, methods: dict[str, Any]
) -> tuple[list[str], dict[str, list[str]]]:
    """A further way's columns, and its cells by method."""
    known = measured(entries)
    floor = next((other for entry in known.values() for other in entry["ratio_to"] if other.startswith("floor")), None)
    compiled = "compile" in way.split("+")
    columns = [f"{way} ms", f"÷ {first}", *([f"÷ {way} {floor}"] if floor else [])]
    columns.append("graph breaks" if compiled else f"{way} peak MiB")
    cells = {}
    for name, entry in entries.items():
        if name not in known:
            cells[name] = [kind(entry), *[NOTHING] * (len(columns) - 1)]
            continue
        before = methods[name].get("step_seconds")
        cells[name] = [
            f"{1000 * entry['step_seconds']:.1f}",
            f"{entry['step_seconds'] / before:.2f}" if before else NOTHING,
            *([f"{entry['ratio_to'][floor]:.2f}"] if floor else []),
            str(entry["graph_breaks"]) if compiled else _mebibytes(entry["peak_memory_bytes"]),
        ]
    return columns, cells


def _mebibytes(count: int | None) -> str:
    return NOTHING if count is None else f"{count / 2**20:,.1f}"


def fitting(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Iterator[tuple[list[str], list[Any]]]:
    """The table, or several that are no wider than `width` characters: each begins with the first column again.

    A single column that is too wide stays whole.
    """
    sizes = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    part, used = [0], sizes[0]
    parts = [part]
    for index in range(1, len(columns)):
        if used + SPACING + sizes[index] > width and len(part) > 1:
            part, used = [0], sizes[0]
            parts.append(part)
        part.append(index)
        used += SPACING + sizes[index]
    for part in parts:
        yield [columns[index] for index in part], [[row[index] for index in part] for row in rows]


def notes(result: dict[str, Any]) -> list[str]:
    """Lines below the table: what is missing or failed and why, why graphs broke, and which targets hold."""
    lines = []
    for way, entries in result["ways"].items():
        where = "" if way == EAGER else f"{way}: "
        without = {name: entry for name, entry in entries.items() if absent(entry)}
        said = {name: f"{where}{name}: {absent(entry)}" for name, entry in without.items()}
        if len({absent(entry) for entry in without.values()}) == 1 and len(without) == len(entries) > 1:
            name, entry = next(iter(without.items()))
            said = {name: f"{where}every method: {absent(entry)}"}
        lines += [f"{kind(without[name])}: {text}" for name, text in said.items()]
        for name, entry in entries.items():
            if "profile" in entry and (why := absent(entry["profile"])):
                lines.append(f"failed: {where}{name}, under the profiler: {why}")
            lines += [f"graph break: {name}: {reason}" for reason in entry.get("graph_break_reasons", ())]
    return lines + targets.lines(result["targets"])


def failure(result: dict[str, Any]) -> str | None:
    """What makes a benchmark a failed one: contenders that raised, nothing to measure at all, and targets that do not
    hold or were not measured."""
    groups = {"" if way == EAGER else f"{way}: ": rows for way, rows in result.get("ways", {}).items()}
    groups |= {f"{at['axis']} {at['value']:g}: ": at["methods"] for at in result.get("points", ())}
    without = {f"{where}{name}": row for where, rows in groups.items() for name, row in rows.items() if absent(row)}
    sentences = []
    if groups and not any(measured(rows) for rows in groups.values()):
        reasons = "; ".join(f"{name}: {absent(row)}" for name, row in without.items())
        sentences.append(f"Nothing was measured: every method is missing or has failed ({reasons}).")
    else:
        raised = [f"{name} ({row['failed']})" for name, row in without.items() if "failed" in row]
        raised += [
            f"{where}{name} under the profiler ({why})"
            for where, rows in groups.items()
            for name, row in rows.items()
            if (why := absent(row.get("profile", {})))
        ]
        sentences += [f"Failed while measured: {'; '.join(raised)}."] if raised else []
    judged = result.get("targets", ())
    for met, said in ((False, "missed"), (None, "not measured")):
        named = [entry["target"] for entry in judged if entry["met"] is met]
        if named:
            sentences.append(f"{len(named)} of {len(judged)} targets {said}: {'; '.join(named)}.")
    stages = result.get("stages", {})  # of the loader
    if slow := [name for name, stage in stages.items() if not stage["met"]]:
        sentences.append(f"{len(slow)} of {len(stages)} stages below the target: {'; '.join(slow)}.")
    return " ".join(sentences) or None

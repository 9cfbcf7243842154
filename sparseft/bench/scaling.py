"""How time and memory of a training step grow: with width, length, batch, density and depth, one at a time.

Each axis has values of its own (`bench.widths`, …); all else stays as in the base point: `bench.width` (256),
`bench.depth` (2), `bench.length`, `bench.batch_size` and `sparsity`. At every point the methods take turns, as in
`bench train`; what a method costs is best read as a ratio to the floor, which saw the same moments of the machine.
Times are p20 of the steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparseft import console
from sparseft.bench import train
from sparseft.bench.contenders import FLOOR, check_steps
from sparseft.bench.models import CONTEXT
from sparseft.bench.output import Output, measured_on
from sparseft.bench.timing import absent, comparable, kind, measured
from sparseft.config import RunConfig
from sparseft.errors import UserError, nearest
from sparseft.files.atomic import write_text
from sparseft.methods.base import DEFAULT_SPARSITY
from sparseft.report.charts import Panel, Series, line_chart, standalone

AXES = ("width", "length", "batch", "density", "depth")
STEP = "step_seconds_p20"  # other work on the machine lengthens a step, never shortens it
FIELDS = {"width": "widths", "length": "lengths", "batch": "batches", "density": "densities", "depth": "depths"}
LABELS = {"width": "width (features)", "length": "length (tokens)", "batch": "batch (sequences)",
          "density": "density (% of the linear weights)", "depth": "depth (layers)"}  # fmt: skip
BASE_WIDTH, BASE_DEPTH = 256, 2


def run(config: RunConfig, output: Output | None = None) -> dict[str, Any]:
    """Measures every point of `bench.axes`, draws a chart of each axis, and returns what `bench.json` holds.

    output: takes the charts, and what there is after each point but the last; where something ends the benchmark, what
    there is then, with charts of it. Null: nothing is written.
    """
    base = base_point(config)
    plan = points(config, base)
    found: dict[tuple[Any, ...], dict[str, Any]] = {}

    def so_far() -> dict[str, Any]:
        one = next(iter(found.values()))
        return {
            "benchmark": "scaling",
            "base": base,
            "dtype": one["dtype"],
            "device": one["device"],
            "steps": config.bench.steps,
            "points": [
                {"axis": axis, "value": value, "methods": found[key]["methods"]}
                for axis, value in plan
                if (key := key_of(base | {axis: value})) in found
            ],
            "charts": [],
        }

    try:
        with console.Progress(len(plan), "bench scaling", unit="point", plain_line_pause=0) as progress:
            # The largest density first: what a method has no room for is said before anything has been measured.
            for done, (axis, value) in enumerate(sorted(plan, key=lambda at: -at[1] if at[0] == "density" else 0), 1):
                point = base | {axis: value}
                if key_of(point) not in found:  # the base point lies on every axis
                    with console.quiet():
                        found[key_of(point)] = train.run(at(config, point))
                    if output is not None and done < len(plan):
                        output.leave(so_far(), complete=False)
                progress.update(done)
    except BaseException:  # an interrupt too: hours may lie in what there is
        if output is not None and found:
            output.leave(drawn(so_far(), output, complete=False), complete=False)
        raise
    return drawn(so_far(), output)


def key_of(point: Mapping[str, Any]) -> tuple[Any, ...]:
    """By what a point is known again."""
    return tuple(point[name] for name in AXES)


def drawn(result: dict[str, Any], output: Output | None, complete: bool = True) -> dict[str, Any]:
    """The result with a chart of each axis on which the floor was measured, where there is somewhere to put it."""
    for axis in dict.fromkeys(point["axis"] for point in result["points"]) if output is not None else ():
        lines = series(result, axis)
        if FLOOR in lines:
            path = output.place(f"scaling-{axis}.svg", complete)
            write_text(path, chart(LABELS[axis], lines))
            result["charts"].append(path.name)
    return result


def chart(x_label: str, lines: Mapping[str, Sequence[tuple[float, float, float]]]) -> str:
    """Step time and peak memory along an axis, and beside each its ratio to the floor's, as an SVG file.

    lines: of each method (x, milliseconds, MiB), in order of x; where the floor has no such x, there is no ratio.
    """
    reference = {x: values for x, *values in lines[FLOOR]}
    rows = []
    for column, label in enumerate(("step, ms", "peak, MiB")):
        absolute, relative = [], []
        for index, (name, points) in enumerate(lines.items()):
            mine = [(x, values[column]) for x, *values in points]
            ratios = [(x, y / reference[x][column]) for x, y in mine if x in reference]
            absolute.append(Series(name, mine, index, markers=True))
            relative.append(Series(name, ratios, index, markers=True))
        ratio = f"{label.split(',')[0]} ÷ floor"
        rows.append([Panel(label, absolute, zero=True), Panel(ratio, relative, zero=True)])
    return standalone(line_chart(rows, x_label, height=240, width=440))


def base_point(config: RunConfig) -> dict[str, Any]:
    """What stays while one of them grows."""
    bench = config.bench
    if bench.shape is not None:
        raise UserError(
            f"bench.shape={bench.shape}: bench scaling makes its own models, by bench.width and bench.depth."
        )
    if FLOOR not in bench.methods:
        raise UserError("bench.methods: bench scaling needs the floor, to which it compares.")
    if bench.targets or bench.profile or bench.ways != ["eager"]:
        raise UserError("bench.targets, bench.profile and bench.ways belong to 'sparseft bench train'.")
    check_steps(config, choosable=False)
    sparsity = DEFAULT_SPARSITY if config.sparsity is None else config.sparsity
    return {
        "width": BASE_WIDTH if bench.width is None else bench.width,
        "length": bench.length,
        "batch": bench.batch_size,
        "density": round(1 - sparsity, 12),
        "depth": BASE_DEPTH if bench.depth is None else bench.depth,
    }


def points(config: RunConfig, base: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(axis, value) of every point, all checked before the first is measured."""
    found = []
    if not config.bench.axes:
        raise UserError(f"bench.axes is empty: name at least one of {', '.join(AXES)}.")
    if len(set(config.bench.axes)) != len(config.bench.axes):
        raise UserError("bench.axes: an axis is named twice.")
    for axis in config.bench.axes:
        if axis not in AXES:
            raise UserError(f"bench.axes: unknown axis '{axis}': expected {', '.join(AXES)}.{nearest(axis, AXES)}")
        values = sorted(set(getattr(config.bench, FIELDS[axis])))
        if len(values) < 2:
            raise UserError(f"bench.{FIELDS[axis]}: expected at least two different values to see a growth.")
        least = {"density": 0, "width": 64, "length": 2}.get(axis, 1)
        for value in values:
            if axis == "density" and not 0 < value < 1:
                raise UserError(f"bench.densities: {value} is no share: expected more than 0, less than 1.")
            if value < least or (axis == "width" and value % 64):
                expected = "a multiple of 64" if axis == "width" else f"at least {least}"
                raise UserError(f"bench.{FIELDS[axis]}: {value}: expected {expected}.")
            if axis == "length" and value > CONTEXT:
                raise UserError(f"bench.lengths: {value}: the models' context is {CONTEXT} tokens.")
        found += [(axis, value) for value in values]
    return found


def at(config: RunConfig, point: Mapping[str, Any]) -> RunConfig:
    """The run's settings at one point."""
    names = {"width": "width", "length": "length", "batch": "batch_size", "depth": "depth"}
    bench = dataclasses.replace(config.bench, **{field: point[axis] for axis, field in names.items()})
    return dataclasses.replace(config, bench=bench, sparsity=1 - point["density"])


def series(result: Mapping[str, Any], axis: str) -> dict[str, list[tuple[float, float, float]]]:
    """Of each method (x, milliseconds, MiB at the peak) along an axis; a density as a percentage."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for point in result["points"]:
        if point["axis"] != axis:
            continue
        x = point["value"] * (100 if axis == "density" else 1)
        for name, entry in measured(point["methods"]).items():
            peak = entry["peak_memory_bytes"]
            values = (x, 1000 * comparable(entry, STEP), math.nan if peak is None else peak / 2**20)
            lines.setdefault(name, []).append(values)
    return lines


def title(result: Mapping[str, Any]) -> str:
    """What was measured, in one line."""
    base = ", ".join(f"{axis} {value:g}" for axis, value in result["base"].items())
    return (
        f"Growth of a training step: {result['dtype']} on {measured_on(result)}, {base}, p20 of {result['steps']} steps"
    )


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and a row for each point: the floor's time and peak memory, the others' against it."""
    names = [name for name in result["points"][0]["methods"] if name != FLOOR]
    columns = ["axis", "value", "floor ms", *(f"{name} ÷ floor" for name in names)]
    columns += ["floor MiB", *(f"{name} + MiB" for name in names)]
    rows = []
    for point in result["points"]:
        methods = point["methods"]
        floor = methods[FLOOR]
        others = [entry for name, entry in methods.items() if name != FLOOR]
        rows.append([point["axis"], f"{point['value']:g}"])
        for key, scale, shown in (
            (STEP, 1000, lambda a, b: f"{a / b:.2f}"),
            ("peak_memory_bytes", 2**-20, lambda a, b: f"{a - b:+,.1f}"),
        ):
            of_floor = floor.get(key)  # None: no figures, or its memory could not be counted
            rows[-1].append(kind(floor) if absent(floor) else "-" if of_floor is None else f"{of_floor * scale:,.1f}")
            for entry in others:
                if absent(entry):
                    rows[-1].append(kind(entry))
                elif of_floor is None or entry[key] is None:
                    rows[-1].append("-")
                else:
                    value = comparable(entry, key) if key == STEP else entry[key]
                    rows[-1].append(shown(value * scale, of_floor * scale))
    return columns, rows

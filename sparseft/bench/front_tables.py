"""What `sparseft bench front` has found, for readers: tables, notes, charts and one self-contained HTML page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparseft.bench.intervals import shown
from sparseft.bench.output import as_markdown, markdown_table, measured_on
from sparseft.bench.pareto import bootstrap, read_off
from sparseft.bench.trials import shown_rates
from sparseft.data.formats import counted
from sparseft.report.charts import NARROW, WIDTH, Band, Panel, Series, drawn, line_chart
from sparseft.report.html import Table, write_page
from sparseft.report.numbers import when

FORGOTTEN = "forgotten (nats of the source)"
DRAWN = 40  # steps of a curve of differences
EQUAL = 0.02  # share by which trained weights may differ and count as equal


def title(result: dict[str, Any]) -> str:
    """What was compared, in one line."""
    return (
        f"Learnt against forgotten: {result['model']} to {result['dataset']}, source {', '.join(result['sources'])}, "
        f"{counted(len(result['seeds']), 'seed')}, on {measured_on(result)}"
    )


def level_name(level: float | None, result: Mapping[str, Any]) -> str:
    """`0.05`, or the first variant's own forgetting: `LoRA's 0.94`."""
    if level is not None:
        return f"{level:g}"
    first, reference = next(iter(result["variants"].items()))
    return f"{first}'s {statistics.fmean(reference['forgetting']):.3f}"


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row for the base and each variant at its chosen rate."""
    tasks = result["base"].get("accuracy", {})
    columns = ["variant", "trainable", "rate", "target loss", "source loss", "forgotten"]
    columns += [f"{task}, %" for task in tasks]
    loss, source = shown(result["base"]["target"], 1, ".4f"), statistics.fmean(result["base"]["sources"].values())
    rows = [["base", "", "", loss, f"{source:.4f}", "", *(f"{100 * share:.1f}" for share in tasks.values())]]
    for name, entry in result["variants"].items():
        rows.append(
            [
                name,
                f"{entry['trainable_parameters']:,}",
                shown_rates(entry),
                shown(entry["target"], 1, ".4f"),
                shown(entry["source"], 1, ".4f"),
                shown(entry["forgetting"], 1, ".4f"),
                *(shown(entry["accuracy"][task], 100, ".1f") for task in tasks),
            ]
        )
    return columns, rows


def more_tables(result: dict[str, Any]) -> list[tuple[str, tuple[list[str], list[list[str]]]]]:
    """What follows the table: by its title."""
    return [("At equal forgetting", at_equal_forgetting(result))]


def at_equal_forgetting(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row for each forgetting and variant that reaches it, with the interval of its difference."""
    first = next(iter(result["variants"]))
    rows = []
    for position, level in enumerate([*result["levels"], None]):
        for name, entry in result["variants"].items():
            at = entry["at"][position]
            if all(loss is None for loss in at["losses"]):
                continue
            known = "interval" in at
            rows.append(
                [
                    level_name(level, result),
                    name,
                    shown(at["losses"], 1, ".4f"),
                    f"{statistics.fmean(at['differences']):+.4f}" if known else "",
                    "[{:+.4f}, {:+.4f}]".format(*at["interval"]) if known else "",
                    at["verdict"],
                ]
            )
    return ["forgotten", "variant", "target loss", f"− {first}", "95 %", ""], rows


def all_points(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row for each variant and rate, on the test split."""
    several = len(result["sources"]) > 1
    columns = ["variant", "rate", "target loss", "forgotten", *(result["sources"] if several else []), ""]
    rows = []
    for name, entry in result["variants"].items():
        for point in entry["points"]:
            what = f"dropped after {counted(point['dropped'], 'seed')}" if point["dropped"] else ""
            if point["learning_rate"] == entry["learning_rate"]:
                what = "chosen"
            elif not (what or point["front"]):
                what = "not on the front"
            rows.append(
                [
                    name,
                    shown_rates(point),
                    shown(point["target"], 1, ".4f"),
                    shown(point["forgetting"], 1, ".4f"),
                    *(shown(losses, 1, ".4f") for losses in point["sources"].values() if several),
                    what,
                ]
            )
    return columns, rows


def notes(result: dict[str, Any]) -> list[str]:
    """What the numbers are, whose weights are not as many, and rates that may not be the best."""
    first = next(iter(result["variants"]))
    lines = [
        "target loss and forgotten (the source's loss minus the base's, nats) are of the test split, rates chosen on "
        "the validation split; ± 95 % intervals over seeds (Student's t)",
        f"at a forgetting: the target loss on the variant's front, against {first}'s; ahead or behind where the "
        "bootstrap interval over seeds and Student's t both leave out 0; below the least that a front forgets it is "
        "not reached, beyond the most the loss of its strongest rate stands",
    ]
    for name, entry in result["variants"].items():
        ratio, parts = entry["weights_over_first"], []
        if abs(ratio - 1) > EQUAL:
            parts.append(f"trains {ratio:.3g} times as many weights as {first}, which is not of equal size")
        reach = [statistics.fmean(point["forgetting"]) for point in entry["points"] if point["front"]]
        if reach:
            parts.append(f"its front forgets {min(reach):.3f} to {max(reach):.3f}")
        if entry["at_edge"]:
            parts.append(f"its rate {entry['learning_rate']:g} is at the edge: a better one may lie beyond")
        gone = [
            f"{p['learning_rate']:g} (after {counted(p['dropped'], 'seed')})" for p in entry["points"] if p["dropped"]
        ]
        if gone:
            parts.append(f"dropped, as another rate beats them in both validation losses: {', '.join(gone)}")
        lines.append(f"{name}: {'; '.join(parts)}")
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The tables as Markdown, with the command and the versions that made them, and the notes."""
    lines = "".join(f"- {note}\n" for note in notes(result))
    parts = [as_markdown(result, counted(len(result["seeds"]), "seed"), *table(result)), lines]
    for columns, rows in (at_equal_forgetting(result), all_points(result)):
        parts.append(markdown_table(columns, rows))
    return "\n".join(parts)


def drawing(result: Mapping[str, Any], width: int = WIDTH) -> str:
    """The fronts: means over seeds of the test split, as an SVG."""
    lines = []
    for index, (name, entry) in enumerate(result["variants"].items()):
        points = [(statistics.fmean(p["forgetting"]), statistics.fmean(p["target"]))
                  for p in entry["points"] if p["front"]]  # fmt: skip
        lines.append(Series(name, sorted(points), index, markers=True))
    return line_chart([[Panel("target loss", lines)]], FORGOTTEN, height=420, width=width, whole=False)


def differences(result: Mapping[str, Any], columns: int, width: int) -> str:
    """Each variant's target loss minus the first one's over the forgetting that both reach, with its bootstrap
    interval; empty text where there is no such forgetting."""
    first, reference = next(iter(result["variants"].items()))
    seeds, panels = range(len(result["seeds"])), []
    for index, (name, entry) in enumerate(result["variants"].items()):
        reach = _reach(entry, seeds), _reach(reference, seeds)
        low, high = max(least for least, _ in reach), min(most for _, most in reach)
        if entry is reference or not low < high:
            continue
        points: list[tuple[float, float]] = []
        band: list[tuple[float, float | None, float | None]] = []
        for at in (low + (high - low) * step / DRAWN for step in range(DRAWN + 1)):
            pairs = [(read_off(entry, seed, at), read_off(reference, seed, at)) for seed in seeds]
            known = [mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None]
            points.append((at, statistics.fmean(known)))
            band.append((at, *bootstrap(known)))
        zero = Series(first, [(low, 0.0), (high, 0.0)], None)
        lines, bands = [zero, Series(name, points, index)], [Band("95 %", band, 0.25)]
        panels.append(Panel(f"− {first}", lines, title=name, bands=bands))
    rows = [panels[at : at + columns] for at in range(0, len(panels), columns)]
    return line_chart(rows, FORGOTTEN, height=240, width=width, legend=False, whole=False) if rows else ""


def _reach(entry: Mapping[str, Any], seeds: Iterable[int]) -> tuple[float, float]:
    """From the least forgetting that its front has with all seeds to the most."""
    by_seed = [[point["forgetting"][seed] for point in entry["points"] if point["front"]] for seed in seeds]
    return max(min(each, default=math.inf) for each in by_seed), min(max(each, default=-math.inf) for each in by_seed)


def page(result: dict[str, Any], out: Path, settings: str) -> Path:
    """Writes all of it as one self-contained HTML page. settings: the benchmark's, as YAML."""
    environment = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    return write_page(
        out,
        "front.html.j2",
        wide=True,
        kicker="sparseft bench front",
        title=f"{result['model']} to {result['dataset']}: learnt against forgotten",
        lead=f"{', '.join(result['variants'])}: the target loss at what they have forgotten of "
        f"{', '.join(result['sources'])}, with {counted(len(result['seeds']), 'seed')}.",
        notes=notes(result),
        fronts=drawn(lambda width: drawing(result, width)),
        differences={"wide": differences(result, 2, WIDTH // 2), "narrow": differences(result, 1, NARROW)},
        first=next(iter(result["variants"])),
        tables={
            name: Table(columns, rows, numeric=numeric)
            for name, (columns, rows), numeric in (
                ("levels", at_equal_forgetting(result), (2, 3, 4)),
                ("chosen", table(result), range(1, len(table(result)[0]))),
                ("points", all_points(result), range(1, len(all_points(result)[0]) - 1)),
            )
        },
        facts=[
            ("command", environment["command_line"]),
            ("versions", versions),
            ("machine", measured_on(result)),
            ("started", when(environment["started"])),
        ],
        settings=settings,
    )

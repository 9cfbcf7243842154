"""Charts of a benchmark as SVG files that stand alone: drawn as the report's, with their colours inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparseft.report.charts import Series, colour, escape, line_chart
from sparseft.report.page import DARK, LIGHT

WIDTH, HEIGHT, TOP, GAP = 440, 240, 40, 24  # of one chart, of the legend, between charts; in CSS pixels
STYLE = (
    f"svg {{ {LIGHT} }} @media (prefers-color-scheme: dark) {{ svg {{ {DARK} }} }} "
    "text { font: 12px system-ui, sans-serif; fill: var(--muted); } text.label { fill: var(--ink); } "
    ".paper { fill: var(--paper); } .grid { stroke: var(--grid); fill: none; } "
    ".axis { stroke: var(--rule); fill: none; } "
    ".line { fill: none; stroke-width: 2; } .dot { stroke: var(--paper); stroke-width: 2; }"
)


def scaling_chart(x_label: str, lines: Mapping[str, Sequence[tuple[float, float, float]]], floor: str) -> str:
    """Step time and peak memory along an axis, and beside each its ratio to the floor's.

    lines: of each method (x, milliseconds, MiB), in order of x; where the floor has no such x, there is no ratio.
    """
    reference = {x: values for x, *values in lines[floor]}
    names = list(lines)
    parts = []
    for row, (column, label) in enumerate(((0, "step, ms"), (1, "peak, MiB"))):
        absolute, relative = [], []
        for index, name in enumerate(names):
            points = [(x, values[column]) for x, *values in lines[name]]
            ratios = [(x, y / reference[x][column]) for x, y in points if x in reference]
            absolute.append(Series(name, points, index, markers=True))
            relative.append(Series(name, ratios, index, markers=True))
        for side, (drawn, y_label) in enumerate(((absolute, label), (relative, f"{label.split(',')[0]} ÷ floor"))):
            chart = line_chart(drawn, x_label, y_label, height=HEIGHT, width=WIDTH, zero=True)
            x, y = GAP + side * (WIDTH + GAP), TOP + row * (HEIGHT + GAP)
            parts.append(chart.replace("<svg ", f'<svg x="{x}" y="{y}" ', 1))
    width, height = 3 * GAP + 2 * WIDTH, TOP + 2 * (HEIGHT + GAP)
    legend, x = [], 2 * GAP
    for index, name in enumerate(names):
        legend.append(f'<rect x="{x}" y="14" width="14" height="4" fill="{colour(index)}"/>')
        legend.append(f'<text class="label" x="{x + 20}" y="20">{escape(name)}</text>')
        x += 44 + 7 * len(name)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(f"Training step against {x_label}")}"><style>{STYLE}</style>'
        f'<rect class="paper" width="{width}" height="{height}"/>{"".join(legend)}{"".join(parts)}</svg>\n'
    )

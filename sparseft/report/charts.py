"""Charts as inline SVG text: lines, bars with error bars, heat maps. No library, no script.

Colours come from the page's CSS variables (`--series-1` …, `--ink`, `--muted`, `--grid`), so that one drawing serves
light, dark and print. All text is escaped here; numbers are formatted, never pasted.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SERIES_COLOURS = 6  # distinct ones in the style sheet; more series repeat them with another dash
WIDTH = 892  # of the drawings, in CSS pixels at full size
MAX_MARKERS = 40  # of a line: more would hide it
MAX_POINTS = 500  # of a line: more would only overlap


@dataclass
class Series:
    """One line: `points` are (x, y) in order of x; a y of None interrupts it."""

    name: str
    points: list[tuple[float, float | None]]
    colour: int = 0  # index of the colour
    markers: bool = False
    faint: bool = False


@dataclass
class Bar:
    """One bar of a group, in [0, 1]; `colour` None is the neutral one."""

    name: str
    value: float
    stderr: float | None = None
    colour: int | None = 0


def escape(value: object) -> str:
    """Text made safe for HTML and SVG, in elements and attributes; lone surrogates and control characters replaced."""
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    text = "".join(char if char in "\n\t" or ord(char) >= 32 else "\ufffd" for char in text)
    return html.escape(text, quote=True)


def colour(index: int | None) -> str:
    return "var(--neutral)" if index is None else f"var(--series-{index % SERIES_COLOURS + 1})"


def dash(index: int | None) -> str:
    """Series beyond the number of colours are told apart by their dash."""
    lap = (index or 0) // SERIES_COLOURS
    return f' stroke-dasharray="{("", "7 4", "2 4", "9 3 2 3")[lap % 4]}"' if lap else ""


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values (1, 2, 2.5 or 5 times a power of ten) that span [low, high] from outside."""
    low, high = min(low, high), max(low, high)
    if low == high:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def tick_text(value: float, step: float) -> str:
    """A tick's label with as many decimals as its neighbours need; very small and large ones in powers of ten."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step, decimals) != round(step, decimals + 2):  # steps of 2.5
        decimals += 1
    return f"{value:,.{min(decimals, 8)}f}"


def thin(points: Sequence[tuple[float, float | None]]) -> tuple[list[tuple[float, float | None]], int]:
    """At most MAX_POINTS points, each the mean of a group of neighbours, and the size of the groups."""
    size = math.ceil(len(points) / MAX_POINTS) or 1
    if size == 1:
        return list(points), 1
    thinned: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        known = [y for _, y in group if y is not None]
        thinned.append((sum(x for x, _ in group) / len(group), sum(known) / len(known) if known else None))
    return thinned, size


def line_chart(
    series: Sequence[Series], x_label: str, y_label: str, *, height: int = 300, width: int = WIDTH, zero: bool = False
) -> str:
    """Lines over a common x axis that begins at 0; the y axis spans the values (from 0 with `zero`).

    Empty text when there is nothing to draw.
    """
    values = [y for one in series for _, y in one.points if y is not None]
    if not values:
        return ""
    left, right, top, bottom = 66, 14, 10, 44
    ys = nice_ticks(min(0.0, *values) if zero else min(values), max(values), 5 if height > 200 else 3)
    longest = max(x for one in series for x, _ in one.points)
    xs = [tick for tick in nice_ticks(0.0, longest or 1.0, 8 if width > 500 else 5) if tick == int(tick)]
    end = max(longest, 1.0)
    xs = [tick for tick in xs if tick <= end * 1.001]

    def x_at(x: float) -> float:
        return left + (width - left - right) * x / end

    def y_at(y: float) -> float:
        return top + (height - top - bottom) * (ys[-1] - y) / (ys[-1] - ys[0])

    parts = [_open(width, height, f"{y_label} over {x_label}")]
    for tick in ys:
        parts.append(f'<path class="grid" d="M{left} {y_at(tick):.1f}H{width - right}"/>')
        parts.append(_text(left - 8, y_at(tick) + 4, tick_text(tick, ys[1] - ys[0]), "end"))
    for tick in xs:
        parts.append(f'<path class="axis" d="M{x_at(tick):.1f} {height - bottom}v4"/>')
        parts.append(_text(x_at(tick), height - bottom + 18, f"{tick:,.0f}", "middle"))
    parts.append(f'<path class="axis" d="M{left} {height - bottom}H{width - right}"/>')
    parts.append(_text((left + width - right) / 2, height - 6, x_label, "middle", "label"))
    middle = (top + height - bottom) / 2
    parts.append(
        f'<text class="label" text-anchor="middle" transform="translate(14 {middle:.1f}) rotate(-90)">'
        f"{escape(y_label)}</text>"
    )
    for one in series:
        points, _ = thin(one.points)
        path, pen = [], "M"
        for x, y in points:
            if y is None:
                pen = "M"
                continue
            path.append(f"{pen}{x_at(x):.1f} {y_at(y):.1f}")
            pen = "L"
        style = f'stroke="{colour(one.colour)}"{dash(one.colour)}' + (' opacity="0.45"' if one.faint else "")
        drawn = sum(y is not None for _, y in points)
        parts.append(f'<path class="line" d="{"".join(path)}" {style}><title>{escape(one.name)}</title></path>')
        if (one.markers and drawn <= MAX_MARKERS) or drawn == 1:
            for x, y in points:
                if y is not None:
                    parts.append(
                        f'<circle class="dot" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="4" fill="{colour(one.colour)}">'
                        f"<title>{escape(one.name)}, {escape(x_label)} {x:,.0f}: {y:.4g}</title></circle>"
                    )
    return "".join([*parts, "</svg>"])


def bar_chart(groups: Sequence[tuple[str, Sequence[Bar]]], x_label: str) -> str:
    """Horizontal bars of shares in [0, 1], grouped, with their values, and a whisker of one standard error each way."""
    if not groups:
        return ""
    thick, gap, between, top, bottom, right = 18, 4, 16, 6, 44, 96
    left = min(260, 24 + 7 * max(len(name) for name, _ in groups))
    rows = sum(len(bars) * (thick + gap) + between for _, bars in groups)
    height = top + rows + bottom
    highest = max((bar.value + (bar.stderr or 0) for _, bars in groups for bar in bars), default=0.0)
    ticks = nice_ticks(0.0, min(1.0, max(highest, 0.01)), 5)

    def x_at(value: float) -> float:
        return left + (WIDTH - left - right) * min(max(value, 0.0), ticks[-1]) / ticks[-1]

    parts = [_open(WIDTH, height, x_label)]
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{x_at(tick):.1f} {top}V{height - bottom}"/>')
        label = f"{tick_text(tick * 100, (ticks[1] - ticks[0]) * 100)}\u00a0%"
        parts.append(_text(x_at(tick), height - bottom + 18, label, "middle"))
    y = top + between / 2
    for name, bars in groups:
        middle = y + (len(bars) * (thick + gap) - gap) / 2
        shown = name if len(name) <= 34 else name[:33] + "…"
        parts.append(f"<g>{_text(left - 10, middle + 4, shown, 'end', 'label')}<title>{escape(name)}</title></g>")
        for bar in bars:
            tip = f"{name}, {bar.name}: {100 * bar.value:.2f} %"
            if bar.stderr is not None:
                tip += f" ± {100 * bar.stderr:.2f} (standard error)"
            length = max(x_at(bar.value) - left, 1.0)
            parts.append(
                f'<rect x="{left}" y="{y:.1f}" width="{length:.1f}" height="{thick}" fill="{colour(bar.colour)}">'
                f"<title>{escape(tip)}</title></rect>"
            )
            after = x_at(bar.value)
            if bar.stderr:
                low, after = x_at(bar.value - bar.stderr), x_at(bar.value + bar.stderr)
                centre = y + thick / 2
                parts.append(
                    f'<path class="whisker" d="M{low:.1f} {centre}H{after:.1f}'
                    f'M{low:.1f} {centre - 4}v8M{after:.1f} {centre - 4}v8"/>'
                )
            parts.append(_text(after + 7, y + thick / 2 + 4, f"{100 * bar.value:.1f} %", "start", "value"))
            y += thick + gap
        y += between
    parts.append(f'<path class="axis" d="M{left} {top}V{height - bottom}"/>')
    parts.append(_text((left + WIDTH - right) / 2, height - 6, x_label, "middle", "label"))
    return "".join([*parts, "</svg>"])


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    value: Callable[[str, str], tuple[float, str] | None],
    x_label: str,
) -> str:
    """Shares as shades of one colour, from nothing to the largest; `value(row, column)` is (share, text) or None.

    The text stands in the cell where there is room for it, else in its tooltip.
    """
    largest = max((cell[0] for row in rows for column in columns if (cell := value(row, column))), default=0.0)
    left, top, bottom = min(240, 24 + 7 * max((len(row) for row in rows), default=0)), 6, 44
    side = max(9.0, min(84.0, (WIDTH - left - 10) / max(len(columns), 1)))
    tall = 26
    width, height = max(WIDTH, int(left + side * len(columns) + 10)), top + tall * len(rows) + bottom
    roomy = side >= 46
    every = max(1, math.ceil(26 / side))
    parts = [_open(width, height, x_label)]
    for line, row in enumerate(rows):
        y = top + line * tall
        shown = row if len(row) <= 30 else "…" + row[-29:]
        parts.append(f"<g>{_text(left - 10, y + tall / 2 + 4, shown, 'end', 'label')}<title>{escape(row)}</title></g>")
        for number, column in enumerate(columns):
            x = left + number * side
            cell = value(row, column)
            place = f'x="{x + 1:.1f}" y="{y + 1}" width="{side - 2:.1f}" height="{tall - 2}"'
            if cell is None:
                tip = escape(f"{row}, {x_label} {column}: nothing")
                parts.append(f'<rect class="void" {place}><title>{tip}</title></rect>')
                continue
            share, text = cell
            shade = 0.08 + 0.92 * share / largest if largest > 0 else 0.08
            parts.append(
                f'<rect fill="var(--heat)" fill-opacity="{shade:.3f}" {place}>'
                f"<title>{escape(f'{row}, {x_label} {column}: {text}')}</title></rect>"
            )
            if roomy:
                kind = "on-heat" if shade > 0.75 else "value"
                parts.append(_text(x + side / 2, y + tall / 2 + 4, text, "middle", kind))
    for number, column in enumerate(columns):
        if number % every == 0:
            parts.append(_text(left + (number + 0.5) * side, height - bottom + 18, column, "middle"))
    parts.append(_text(left + side * len(columns) / 2, height - 6, x_label, "middle", "label"))
    return "".join([*parts, "</svg>"])


def _open(width: int, height: float, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height:.0f}" width="{width}" height="{height:.0f}" role="img" '
        f'aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">'
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'

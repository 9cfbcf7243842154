"""Every chart there is, drawn by matplotlib as SVG text: lines with bands, bars with error bars, heat maps.

Text stays text, nothing is fetched, and the same values give the same bytes. Drawn in the light colours of `PALETTE`, a
drawing names them as CSS variables in the end and so serves light, dark and print: the page around it says what they
are, or the drawing itself once it is `standalone`. matplotlib is imported when something is drawn, not before.
"""

from __future__ import annotations

import contextlib
import html
import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparseft.report.numbers import signed

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

PALETTE = {  # by name: the colour on light paper, all different, and on dark
    "paper": ("#ffffff", "#14171b"),
    "card": ("#f6f7f8", "#1d2126"),
    "ink": ("#1b1f24", "#e7eaee"),
    "muted": ("#5b6570", "#9aa4af"),
    "grid": ("#e3e6ea", "#2a3038"),
    "rule": ("#cdd3da", "#3a424c"),
    "neutral": ("#858e99", "#727c88"),
    "warn": ("#8a5300", "#f0c169"),
    "warn-paper": ("#fdf4e3", "#2b2415"),
    "heat": ("#1558c4", "#3273d6"),
    "on-heat": ("#fefefe", "#fefefe"),
    "map": ("#1457c3", "#6aa4fd"),
    "series-1": ("#1f6feb", "#6ea8fe"),
    "series-2": ("#d1570b", "#f2935a"),
    "series-3": ("#14866d", "#4cc2a5"),
    "series-4": ("#a83291", "#dd83cb"),
    "series-5": ("#8f6b00", "#d6b04a"),
    "series-6": ("#5b6ad0", "#a3adf5"),
}
LIGHT, DARK = (" ".join(f"--{name}: {pair[shade]};" for name, pair in PALETTE.items()) for shade in (0, 1))
COLOURS = {name: light for name, (light, _) in PALETTE.items()}
VARIABLES = {light: f"var(--{name})" for name, light in COLOURS.items()}
FONT = "system-ui, sans-serif"
STYLE = {  # over matplotlib's own defaults, whatever the user's matplotlibrc says
    "svg.fonttype": "none",
    "svg.hashsalt": "sparseft",
    "text.parse_math": False,
    "font.sans-serif": "DejaVu Sans",  # which comes with matplotlib, to measure text by
    "font.size": 12,
    "axes.facecolor": "none",
    "axes.edgecolor": COLOURS["rule"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "grid.color": COLOURS["grid"],
    "text.color": COLOURS["ink"],
    "legend.frameon": False,
    "legend.borderpad": 0,
    **{f"{axis}tick.{field}": value for axis in "xy" for field, value in (
        ("color", COLOURS["rule"]), ("labelcolor", COLOURS["muted"]), ("labelsize", 12))},
    **{f"axes.spines.{side}": side == "bottom" for side in ("left", "right", "top", "bottom")},
}  # fmt: skip

SERIES_COLOURS = 6  # more series repeat them with another dash
DASHES = ("-", (0, (7, 4)), (0, (2, 4)), (0, (9, 3, 2, 3)))
WIDTH = 892  # of the drawings, in CSS pixels at full size
NARROW = 350  # of those for a phone
MAX_MARKERS = 40  # of a line: more would hide it
MAX_POINTS = 500  # of a line: more would only overlap


@dataclass
class Series:
    """One line: `points` are (x, y) in order of x; a y of None interrupts it."""

    name: str
    points: Sequence[tuple[float, float | None]]
    colour: int | None = 0  # index of the colour, None the neutral one
    markers: bool = False
    faint: bool = False


@dataclass
class Band:
    """The room between two lines: `points` are (x, lower y, upper y) in order of x; a None interrupts it."""

    name: str
    points: Sequence[tuple[float, float | None, float | None]]
    opacity: float


@dataclass
class Panel:
    """One line chart of a drawing, its bands behind its lines."""

    y_label: str
    series: Sequence[Series]
    zero: bool = False  # whether the y axis begins at 0
    title: str = ""  # above it
    bands: Sequence[Band] = ()
    log: bool = False  # whether the y axis is logarithmic: values up to 0 are then left out
    log_x: bool = False  # whether the x axis is, from its lowest value on


@dataclass
class Bar:
    """One bar of a group, a share; `colour` None is the neutral one."""

    name: str
    value: float
    stderr: float | None = None
    colour: int | None = 0


def clean(value: Any) -> Any:
    """Text without what neither HTML nor SVG can hold: lone surrogates and control characters are replaced."""
    if not isinstance(value, str) or hasattr(value, "__html__"):  # markup was made from clean text
        return value
    text = value.encode("utf-8", "replace").decode("utf-8")
    return "".join(char if char in "\n\t" or ord(char) >= 32 else "\ufffd" for char in text)


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
    panels: Sequence[Sequence[Panel]],
    x_label: str,
    *,
    height: int = 300,
    width: int = WIDTH,
    legend: bool = True,
    whole: bool = True,
) -> str:
    """Rows of line charts over one kind of x axis, which begins at 0; empty text when there is nothing to draw.

    height, width: of each panel, in CSS pixels. legend: above them, of the first panel's series.
    whole: x counts something, and its ticks are whole numbers.
    """
    if not any(y is not None for row in panels for panel in row for one in panel.series for _, y in one.points):
        return ""
    rows, columns = len(panels), len(panels[0])
    first = panels[0][0]
    named = [one.name for one in first.series if one.colour is not None]
    title = f"{first.y_label} over {x_label}: {', '.join(named)}"
    with _drawing(width * columns, height * rows, title, rows, columns) as drawing:
        every = [panel for row in panels for panel in row]
        for axes in drawing.axes[len(every) :]:  # the last row may be shorter
            axes.set_axis_off()
        for axes, panel in zip(drawing.axes, every, strict=False):
            _lines(drawing, axes, panel, x_label, whole)
        if legend:
            drawing.legend([*named, *(band.name for band in first.bands)])
        drawing.figure.align_ylabels()
    return drawing.svg


def _lines(drawing: Drawing, axes: Axes, panel: Panel, x_label: str, whole: bool) -> None:
    axes.set(xlabel=clean(x_label), ylabel=clean(panel.y_label))
    axes.set_title(clean(panel.title), fontsize=12, loc="left")
    axes.grid(False, axis="x")
    axes.tick_params(left=False)
    if panel.log:
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
    for band in panel.bands:
        lows, highs = ([_drawn(point[side], panel) for point in band.points] for side in (1, 2))
        look = {"color": _colour(None), "alpha": band.opacity, "linewidth": 0}
        drawing.tip(axes.fill_between([point[0] for point in band.points], lows, highs, **look), band.name)
        drawing.keys[band.name] = axes.fill_between([], [], [], **look)
    for one in panel.series:
        points, _ = thin(one.points)
        xs, ys = [x for x, _ in points], [_drawn(y, panel) for _, y in points]
        known = [(x, y) for x, y in zip(xs, ys, strict=True) if not math.isnan(y)]
        colour = _colour(one.colour)
        dots = (one.markers and len(known) <= MAX_MARKERS) or len(known) == 1
        dash = DASHES[(one.colour or 0) // SERIES_COLOURS % len(DASHES)]
        look = {
            "color": colour,
            "linewidth": 1 if one.colour is None else 2,
            "zorder": 2 if one.colour is None else 3,
            "linestyle": dash,
            "alpha": 0.45 if one.faint else None,
        }
        (line,) = axes.plot(xs, ys, **look)
        drawing.tip(line, one.name)
        (drawing.keys[one.name],) = axes.plot([], [], marker="o" if one.markers else "", markersize=7, **look)
        for x, y in known if dots else ():
            (dot,) = axes.plot(x, y, "o", color=colour, markersize=8, markeredgecolor=COLOURS["paper"], clip_on=False)
            drawing.tip(dot, f"{one.name}, {x_label} {x:,.4g}: {y:.4g}")
    xs = [x for one in panel.series for x, _ in one.points]
    if panel.log_x:
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xlim(min(xs), max(xs))
    else:
        axes.set_xlim(min(0.0, *xs), max(1.0, *xs) if whole else max(0.0, *xs) or 1.0)
    if panel.zero and all(y is None or y >= 0 for one in panel.series for _, y in one.points):
        axes.set_ylim(bottom=0.0)
    if whole:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}" if whole else "{x:g}")


def _drawn(y: float | None, panel: Panel) -> float:
    """What of a value can be drawn: not a number where there is none, or none on a logarithmic axis."""
    return math.nan if y is None or (panel.log and y <= 0) else y


def drawn(draw: Callable[[int], str]) -> dict[str, str]:
    """A chart for wide pages and one for a phone's, of a function of the width; empty where it draws nothing."""
    wide = draw(WIDTH)
    return {"wide": wide, "narrow": draw(NARROW)} if wide else {}


def bar_chart(
    groups: Sequence[tuple[str, Sequence[Bar]]], x_label: str, *, width: int = WIDTH, change: bool = False
) -> str:
    """Horizontal bars of shares in [0, 1], grouped, with their values, and a whisker of one standard error each way.

    change: they are differences of shares in [-1, 1], in percentage points, and keep their sign.
    """
    if not groups:
        return ""
    thick, step, between = 18, 22, 16
    rows = sum(len(bars) * step + between for _, bars in groups)
    with _drawing(width, rows + 80, x_label) as drawing:
        (axes,) = drawing.axes
        axes.set(xlabel=clean(x_label))
        axes.grid(False, axis="y")
        axes.tick_params(left=False, bottom=False)
        axes.spines["bottom"].set_visible(False)
        axes.axvline(0, color=COLOURS["rule"], linewidth=1)
        middles, y = [], between / 2
        for name, bars in groups:
            middles.append(y + (len(bars) * step - step + thick) / 2)
            for bar in bars:
                tip = f"{name}, {bar.name}: " + (
                    f"{100 * bar.value:+.2f} points" if change else f"{100 * bar.value:.2f} %"
                )
                if bar.stderr is not None:
                    tip += f" ± {100 * bar.stderr:.2f} (standard error)"
                side = -1 if bar.value < 0 else 1  # on which the value stands
                centre, end = y + thick / 2, bar.value + side * (bar.stderr or 0)
                (drawn,) = axes.barh(centre, bar.value, thick, color=_colour(bar.colour))
                drawing.tip(drawn, tip)
                drawing.keys.setdefault(bar.name, drawn)
                if bar.stderr:
                    axes.errorbar(bar.value, centre, xerr=bar.stderr, ecolor=COLOURS["ink"], elinewidth=1.25, capsize=4)
                axes.annotate(
                    signed(100 * bar.value) if change else f"{100 * bar.value:.1f} %",
                    **{"xy": (end, centre), "xytext": (7 * side, 0), "textcoords": "offset points"},
                    **{"va": "center", "ha": "left" if side > 0 else "right"},
                )
                y += step
            y += between
        axes.set_ylim(y - between / 2, 0)
        reach = [bar.value + sign * (bar.stderr or 0) for _, bars in groups for bar in bars for sign in (-1, 1)]
        left, right = max(-1.0, min(0.0, *reach)) if change else 0.0, min(1.0, max(0.01, *reach))
        if left < 0:  # room for the values to the left of the bars, which would stand on the names
            left -= 55 / (width / 2) * (right - left)
        axes.set_xlim(left, right)
        unit = "" if change else "\u00a0%"
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.6g}{unit}".replace("-", "\u2212"))
        if width < 500:
            axes.locator_params(axis="x", nbins=4)
        drawing.names(axes.yaxis, middles, [name for name, _ in groups], lambda name: _short(name, width // 26))
        drawing.legend(list(drawing.keys))
    return drawing.svg


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    value: Callable[[str, str], tuple[float, str] | None],
    x_label: str,
    *,
    width: int = WIDTH,
) -> str:
    """Shares as shades of one colour, from nothing to the largest; `value(row, column)` is (share, text) or None.

    The text stands in the cell where there is room for it, and in its tooltip.
    """
    cells = {(row, column): value(row, column) for row in rows for column in columns}
    largest = max((cell[0] for cell in cells.values() if cell), default=0.0)
    named = min(240, 24 + 7 * max((len(row) for row in rows), default=0))
    wide = max(len(columns), 10 if width >= 500 else 4)  # few columns do not fill the page
    side = max(9.0, (width - named) / wide)
    upright = 7 * max((len(column) for column in columns), default=0) if width < 500 else 0  # names too long to lie
    upright = upright if upright > side else 0
    title = f"shares that train, by {x_label or 'part'}"
    with _drawing(round(named + side * wide), 26 * len(rows) + 50 + upright, title) as drawing:
        (axes,) = drawing.axes
        axes.grid(False)
        axes.tick_params(left=False, bottom=False)
        axes.spines["bottom"].set_visible(False)
        for y, row in enumerate(rows):
            for x, column in enumerate(columns):
                cell = cells[row, column]
                where = f"{row}, {x_label} {column}" if x_label else f"{row}, {column}"
                place = {"clip_on": False, "y": y, "left": x + 1 / side - 0.5, "width": 1 - 2 / side, "height": 24 / 26}
                if cell is None:
                    (drawn,) = axes.barh(**place, facecolor="none", edgecolor=COLOURS["grid"])
                    drawing.tip(drawn, f"{where}: nothing")
                    continue
                share, text = cell
                shade = 0.08 + 0.92 * share / largest if largest > 0 else 0.08
                (drawn,) = axes.barh(**place, facecolor=(COLOURS["heat"], round(shade, 3)))
                drawing.tip(drawn, f"{where}: {text}")
                if side >= 46:
                    colour = COLOURS["on-heat" if shade > 0.75 else "ink"]
                    axes.text(x, y, text, color=colour, ha="center", va="center")
        axes.set(xlim=(-0.5, wide - 0.5), ylim=(len(rows) - 0.5, -0.5))
        shown = range(0, len(columns), 1 if upright else max(1, math.ceil(26 / side)))
        drawing.names(axes.xaxis, list(shown), [columns[index] for index in shown], str)
        drawing.names(axes.yaxis, list(range(len(rows))), rows, lambda row: _short(row, 30, end=True))
        axes.set_xlabel(clean(x_label), x=len(columns) / wide / 2)
        if upright:
            axes.tick_params(axis="x", labelrotation=90)
    return drawing.svg


def with_ids(svg: str, prefix: str) -> str:
    """A drawing whose ids begin with `prefix`: drawings alike have the same ids, and a page may have each once."""
    ids = re.compile(r"""((?: id=| href=| xlink:href=)"#?|url\(#)""")
    return re.sub(r"<[^>]*>", lambda tag: ids.sub(rf"\g<1>{prefix}-", tag[0]), svg)


def standalone(svg: str) -> str:
    """A drawing as an SVG file of its own, on paper, with its colours inside."""
    style = f"svg {{ {LIGHT} }} @media (prefers-color-scheme: dark) {{ svg {{ {DARK} }} }}"
    root, _, content = svg.partition(">")
    paper = '<rect width="100%" height="100%" style="fill: var(--paper)"/>'
    return f"{root}><style>{style}</style>{paper}{content}\n"


def _colour(index: int | None) -> str:
    return COLOURS["neutral" if index is None else f"series-{index % SERIES_COLOURS + 1}"]


def _short(text: str, length: int, end: bool = False) -> str:
    """`text`, or its beginning (or end) with an ellipsis where it is longer than `length`."""
    if len(text) <= length:
        return text
    return f"…{text[1 - length :]}" if end else f"{text[: length - 1]}…"


class Drawing:
    """A figure and its axes while they are drawn, then its `svg`."""

    def __init__(self, figure: Any, axes: Sequence[Axes]) -> None:
        self.figure = figure
        self.axes = axes
        self.keys: dict[str, Artist] = {}  # what the legend may show, by name
        self.svg = ""
        self._tips: dict[str, str] = {}

    def tip(self, artist: Artist, text: str) -> None:
        """Shows `text` where the pointer rests on what `artist` draws."""
        artist.set_gid(f"tip-{len(self._tips)}")
        self._tips[artist.get_gid()] = html.escape(clean(text))

    def names(self, axis: Any, places: Sequence[float], texts: Sequence[str], short: Callable[[str], str]) -> None:
        """Labels an axis by names, shortened; the whole one is the label's tip."""
        axis.set_ticks(places, labels=[clean(short(text)).replace("\n", " ") for text in texts])
        for label, text in zip(axis.get_ticklabels(), texts, strict=True):
            self.tip(label, text)

    def legend(self, names: Sequence[str]) -> None:
        """What the colours mean, above the charts, in as many columns as there is room for."""
        texts = [clean(_short(name, 100)).replace("\n", " ") for name in names]
        if texts:
            columns = max(1, int(self.figure.bbox.width) // (60 + 7 * max(map(len, texts))))
            keys = [self.keys[name] for name in names]
            self.figure.legend(keys, texts, loc="outside upper left", ncols=min(columns, len(texts)))

    def finish(self, title: str) -> None:
        """Draws: no date, no ids of groups, which would not be the only ones of a page, colours by their variables."""
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        self.figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        width, height = (round(side) for side in self.figure.bbox.size)
        root = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{width}" '
            f'height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(clean(title))}">'
        )
        content = re.split("<svg[^>]*>", buffer.getvalue(), maxsplit=1)[1].rstrip()
        content = re.sub(r'<g id="([^"]*)">', lambda group: f"<g>{self._title(group[1])}", content)
        content = re.sub(r"'DejaVu Sans'[^;\"]*", FONT, content)
        content = re.sub(
            r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), content
        )  # a hundredth of a pixel
        self.svg = root + re.sub(r"(?<=: )#\w{6}", lambda found: VARIABLES.get(found[0], found[0]), content)

    def _title(self, gid: str) -> str:
        return f"<title>{self._tips[gid]}</title>" if gid in self._tips else ""


@contextlib.contextmanager
def _drawing(width: int, height: int, title: str, rows: int = 1, columns: int = 1) -> Iterator[Drawing]:
    """A drawing of that many CSS pixels, with axes in rows and columns, in the style of all of them."""
    import matplotlib
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where it keeps its list of fonts is not worth a line
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the font for measuring lacks, and the like
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")  # 72: a point is a pixel
        drawing = Drawing(figure, list(figure.subplots(rows, columns, squeeze=False).flat))
        yield drawing
        drawing.finish(title)

"""The page around a report: its style sheet, tables, tiles, and numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sparseft.report.charts import colour, dash, escape

SPACE = "\u00a0"  # between a number and its unit, where no line may end

# Nothing may be fetched and no script may run, whatever a run's files say.
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
"""

LIGHT = """--paper: #ffffff; --card: #f6f7f8; --ink: #1b1f24; --muted: #5b6570; --grid: #e3e6ea; --rule: #cdd3da;
--neutral: #a9b1ba; --warn: #8a5300; --warn-paper: #fdf4e3; --heat: #1558c4; --on-heat: #ffffff;
--series-1: #1f6feb; --series-2: #d1570b; --series-3: #14866d; --series-4: #a83291; --series-5: #8f6b00;
--series-6: #5b6ad0;"""

DARK = """--paper: #14171b; --card: #1d2126; --ink: #e7eaee; --muted: #9aa4af; --grid: #2a3038; --rule: #3a424c;
--neutral: #66707c; --warn: #f0c169; --warn-paper: #2b2415; --heat: #3273d6; --on-heat: #ffffff;
--series-1: #6ea8fe; --series-2: #f2935a; --series-3: #4cc2a5; --series-4: #dd83cb; --series-5: #d6b04a;
--series-6: #a3adf5;"""

_STYLE = f"""
:root {{ {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
@page {{ margin: 16mm; }}
* {{ box-sizing: border-box; }}
body {{
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}}
main {{ max-width: 940px; margin: 0 auto; padding: 40px 24px 72px; }}
header p {{ margin: 0; }}
.kicker {{ color: var(--muted); font-size: 14px; }}
h1 {{ font-size: 28px; line-height: 1.2; margin: 4px 0 12px; overflow-wrap: anywhere; }}
h2 {{ font-size: 19px; margin: 44px 0 4px; }}
h3 {{ font-size: 15px; margin: 22px 0 6px; }}
.lead {{ font-size: 18px; max-width: 46em; overflow-wrap: anywhere; }}
.note {{ color: var(--muted); font-size: 14px; margin: 4px 0 12px; max-width: 54em; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 10px; margin: 26px 0 0; }}
.tile {{ background: var(--card); border-radius: 6px; padding: 12px 14px; }}
.tile .name {{ color: var(--muted); font-size: 13px; }}
.tile .figure {{ font-size: 24px; line-height: 1.25; margin: 2px 0; font-variant-numeric: tabular-nums; }}
.tile .detail {{ color: var(--muted); font-size: 13px; line-height: 1.35; }}
figure {{ margin: 12px 0 0; overflow-x: auto; }}
@media screen {{ figure.wide svg {{ min-width: 620px; }} }}
.scroll {{ overflow-x: auto; }}
.pair {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 12px; }}
svg {{ max-width: 100%; height: auto; display: block; }}
.legend {{ display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 14px; margin: 8px 0 4px; }}
.legend span {{ display: inline-flex; align-items: center; gap: 7px; }}
.legend svg {{ flex: none; }}
svg text {{ font-size: 12px; fill: var(--muted); font-family: inherit; font-variant-numeric: tabular-nums; }}
svg text.label, svg text.value {{ fill: var(--ink); }}
svg text.on-heat {{ fill: var(--on-heat); }}
svg .grid {{ stroke: var(--grid); fill: none; }}
svg .axis {{ stroke: var(--rule); fill: none; }}
svg .line {{ fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }}
svg .dot {{ stroke: var(--paper); stroke-width: 2; }}
svg .whisker {{ stroke: var(--ink); stroke-width: 1.25; fill: none; }}
svg .void {{ fill: none; stroke: var(--grid); }}
table {{ border-collapse: collapse; font-size: 14px; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--grid); vertical-align: top; }}
th {{ color: var(--muted); font-weight: 500; }}
td {{ overflow-wrap: break-word; min-width: 5em; }}
table.facts td {{ overflow-wrap: anywhere; }}
th.number, td.number {{ text-align: right; white-space: nowrap; min-width: 0; }}
td.best {{ font-weight: 650; }}
table.facts td:first-child {{ color: var(--muted); width: 30%; }}
.warnings {{
  background: var(--warn-paper); color: var(--warn); border-radius: 6px; padding: 10px 16px; margin: 24px 0 0;
  font-size: 14px; overflow-wrap: anywhere;
}}
.warnings ul {{ margin: 4px 0 0; padding-left: 20px; }}
details {{ margin: 10px 0 0; }}
summary {{ cursor: pointer; color: var(--muted); font-size: 14px; }}
pre {{
  background: var(--card); border-radius: 6px; padding: 12px 14px; margin: 8px 0 0; overflow-x: auto;
  font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere;
}}
code {{ font: 0.9em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
footer {{ margin-top: 56px; color: var(--muted); font-size: 13px; }}
@media print {{
  :root {{ {LIGHT} }}
  main {{ max-width: none; padding: 0; }}
  table {{ font-size: 10.5px; }}
  th, td {{ padding-right: 8px; }}
  figure, tr, .tile {{ break-inside: avoid; }}
  h2 {{ break-after: avoid; }}
  * {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
}}
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole HTML page; `title` is text, `parts` are HTML."""
    return _HEAD.format(title=escape(title), style=_STYLE) + "\n".join(part for part in parts if part) + _FOOT


_FOOT = "\n<footer>Made by sparseft from the files of the run folder; this page loads nothing else.</footer>\n"
_FOOT += "</main>\n</body>\n</html>\n"


def number(value: Any) -> float | None:
    """`value` as a float where it is a finite number that can be drawn, else None; text is never taken for one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) and abs(value) < 1e30 else None


def count(value: Any) -> str:
    """`1049344` -> `1,049,344`."""
    known = number(value)
    return "–" if known is None else f"{known:,.0f}"


def short_count(value: Any) -> str:
    """`1049344` -> `1.05 M`: three digits that matter."""
    known = number(value)
    if known is None:
        return "–"
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(known) >= limit * 0.9995:
            return f"{_three(known / limit)}{SPACE}{unit}"
    return f"{known:,.0f}"


def _three(value: float) -> str:
    """Three significant digits, without scientific notation."""
    value = float(f"{value:.3g}")  # first, so that 0.9996 is 1.00 and not 1.000
    decimals = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(decimals, 6)}f}"


def percent(share: float | None, stderr: float | None = None) -> str:
    """A share in [0, 1] in percent: `61.5 %`, with its standard error `61.5 ± 4.9 %`; tiny ones keep two digits."""
    if share is None:
        return "–"
    value = 100 * share
    if stderr is not None:
        return f"{value:.1f} ± {100 * stderr:.1f}{SPACE}%"
    if value in (0.0, 100.0):
        return f"{value:.0f}{SPACE}%"
    decimals = 1 if abs(value) >= 9.95 else min(6, 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}{SPACE}%"


def fixed(value: Any, decimals: int = 3) -> str:
    known = number(value)
    return "–" if known is None else f"{known:,.{decimals}f}"


def signed(value: float) -> str:
    """`+62.0` or `−3.0`, with a true minus."""
    return f"{value:+.1f}".replace("-", "\u2212")


def when(moment: Any) -> str:
    """`2026-01-31T23:59:59+00:00` -> `2026-01-31 23:59 UTC`; anything else as it is."""
    try:
        known = datetime.fromisoformat(str(moment))
    except ValueError:
        return str(moment)
    return known.strftime("%Y-%m-%d %H:%M ") + (known.tzname() or "")


def rate(value: Any) -> str:
    """Tokens per second and the like: three digits that matter, thousands separated."""
    known = number(value)
    return "–" if known is None else (f"{known:,.0f}" if abs(known) >= 100 else _three(known))


def memory(size: Any) -> str:
    """Bytes -> `1.23 GiB` or `45.6 MiB`."""
    known = number(size)
    if known is None:
        return "–"
    return f"{_three(known / 2**30)}{SPACE}GiB" if known >= 2**30 else f"{_three(known / 2**20)}{SPACE}MiB"


def duration(seconds: Any) -> str:
    """`48.2 s`, `3 min 20 s`, `1 h 5 min`."""
    known = number(seconds)
    if known is None:
        return "–"
    if known < 59.95:
        return f"{known:.1f}{SPACE}s"
    whole = round(known)
    if whole < 3600:
        return f"{whole // 60}{SPACE}min {whole % 60}{SPACE}s"
    return f"{whole // 3600}{SPACE}h {whole % 3600 // 60}{SPACE}min"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = (), best: Any = ()) -> str:
    """A table of text cells; columns in `numeric` are set right, cells (row, column) in `best` stand out."""

    def cell(tag: str, text: str, column: int, row: int = -1) -> str:
        kinds = " ".join(["number"] * (column in numeric) + ["best"] * ((row, column) in best))
        attribute = f' class="{kinds}"' if kinds else ""
        return f"<{tag}{attribute}>{escape(text)}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", text, column) for column, text in enumerate(head)) + "</tr>"]
    for index, row in enumerate(rows):
        lines.append("<tr>" + "".join(cell("td", text, column, index) for column, text in enumerate(row)) + "</tr>")
    return '<div class="scroll"><table>' + "".join(lines) + "</table></div>"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values, without a heading row."""
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in pairs)
    return f'<table class="facts">{rows}</table>'


def tiles(entries: Sequence[tuple[str, str, str]]) -> str:
    """The figures one looks for first: name, figure, detail."""
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><div class="name">{escape(name)}</div><div class="figure">{escape(figure)}</div>'
        f'<div class="detail">{escape(detail)}</div></div>'
        for name, figure, detail in entries
    ) + "</div>"  # fmt: skip


def legend(entries: Sequence[tuple[str, int | None, str]]) -> str:
    """What the colours mean; an entry is (name, colour, kind), kind `line`, `dots`, `faint` or `bar`."""
    keys = []
    for name, index, kind in entries:
        paint = colour(index)
        if kind == "bar":
            mark = f'<rect width="14" height="12" y="1" fill="{paint}"/>'
        else:
            faded = ' opacity="0.45"' if kind == "faint" else ""
            mark = f'<path d="M0 7H26" stroke="{paint}" stroke-width="2" fill="none"{dash(index)}{faded}/>'
            if kind == "dots":
                mark += f'<circle cx="13" cy="7" r="4" fill="{paint}"/>'
        width = 14 if kind == "bar" else 26
        keys.append(f'<span><svg width="{width}" height="14" aria-hidden="true">{mark}</svg>{escape(name)}</span>')
    return f'<div class="legend">{"".join(keys)}</div>'


def warnings(texts: Sequence[str]) -> str:
    """Each warning once, in order; nothing when there are none."""
    unique = list(dict.fromkeys(texts))
    if not unique:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in unique)
    return (
        f'<div class="warnings"><strong>{"Warning" if len(unique) == 1 else "Warnings"}</strong><ul>{items}</ul></div>'
    )

"""Numbers, sizes, times and shares as people read them; what is no number is a dash."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

SPACE = "\u00a0"  # between a number and its unit, where no line may end


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

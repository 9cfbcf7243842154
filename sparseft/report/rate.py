"""The learning rates that ramps found: the loss over the rate, and the one that was taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparseft.report.charts import Panel, Series, drawn, line_chart
from sparseft.report.numbers import duration, number
from sparseft.report.run_data import Run


def found_rates(runs: Sequence[Run]) -> dict[str, Any] | None:
    """A note and a chart; None where no run has looked for its rate."""
    series, notes = [], []
    for index, run in enumerate(runs):
        curve, rate = _curve(run), number(run.rate.get("learning_rate"))
        if not curve or rate is None:
            continue
        series.append(Series("loss" if len(runs) == 1 else run.label, curve, index))
        near = min(curve, key=lambda point: abs(point[0] - rate))
        series.append(Series(f"taken, {rate:g}", [(rate, near[1])], index + len(runs), markers=True))
        whose = "" if len(runs) == 1 else f"{run.label}: "
        notes.append(f"{whose}{rate:g}, found in {duration(run.rate.get('seconds'))}.")
    if not series:
        return None
    panel = Panel("loss (nats per token)", series, log_x=True)
    return {
        "note": " ".join(notes),
        "chart": drawn(lambda width: line_chart([[panel]], "learning rate", width=width, whole=False)),
    }


def _curve(run: Run) -> list[tuple[float, float | None]]:
    """Rate and loss of each step of the ramp, as far as they are numbers."""
    points = run.rate.get("curve")
    found = []
    for point in points if isinstance(points, list) else []:
        if isinstance(point, list) and len(point) == 2 and (rate := number(point[0])) is not None and rate > 0:
            found.append((rate, number(point[1])))
    return sorted(found, key=lambda point: point[0])

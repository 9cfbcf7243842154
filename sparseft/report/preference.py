"""What a preference objective moved: the reward of the better answers over that of the worse ones, and how often it is
the higher one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparseft.report.charts import Panel, Series, drawn, line_chart
from sparseft.report.numbers import fixed, number, percent
from sparseft.report.run_data import Run

FIGURES = (("rewards/margins", "margin"), ("rewards/accuracies", "accuracy"))


def preference(runs: Sequence[Run]) -> dict[str, Any] | None:
    """A note and the charts of margin and accuracy, in training and on held-out data; None where no run has any."""
    own = [run for run in runs if run.curve("rewards/margins") or run.curve("eval_rewards/margins")]
    if not own:
        return None
    single, charts = len(runs) == 1, []
    for name, label in FIGURES:
        lines = []
        for index, run in enumerate(own):
            before = "" if single else f"{run.label} "
            if points := run.curve(name):
                lines.append(Series(f"{before}training", points, index, faint=not single))
            if points := run.curve(f"eval_{name}"):
                lines.append(Series(f"{before}evaluation", points, index + single, markers=True))
        panel = Panel(label, lines, zero=name.endswith("accuracies"))
        charts.append(
            drawn(lambda width, panel=panel: line_chart([[panel]], "optimizer step", height=260, width=width))
        )
    said = [outcome(run) for run in own if outcome(run)] if single else []
    return {"note": " ".join(said), "charts": [chart for chart in charts if chart.get("wide")]}


def outcome(run: Run) -> str:
    """What came of it on held-out data, in one sentence; empty where nothing was measured."""
    margin, accuracy = (number(run.get(f"eval_{name}_after")) for name in ("margin", "accuracy"))
    if margin is None:
        return ""
    text = f"On held-out data the margin went from {fixed(run.get('eval_margin_before'))} to {fixed(margin)}"
    if accuracy is not None:
        text += f", and {percent(accuracy)} of the pairs are in the right order"
    return f"{text}."

"""Learnt and forgotten: what training changed in the tasks it is for, beside the tasks it is not for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparseft.report.charts import Bar, bar_chart, drawn
from sparseft.report.numbers import fixed
from sparseft.report.run_data import Run


def learnt_and_forgotten(runs: Sequence[Run], most: int) -> dict[str, Any]:
    """Notes and a chart of the changes of all tasks that were measured before and after, of the first `most` runs."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.headline))
    learns = set().union(*(run.learns for run in runs))
    tasks.sort(key=lambda task: task not in learns)
    single, groups, measured, pairs = len(runs) == 1, [], set(), set()
    for task in tasks:
        bars = []
        for index, run in enumerate(runs[:most]):
            change = run.change(task)
            if change is None:
                continue
            pairs.add(change.paired)
            kind = "not trained for" if learns else "change"
            kind = "trained for" if task in run.learns else kind
            name, colour = (kind, 0 if kind == "trained for" else 1) if single else (run.label, index)
            bars.append(Bar(name, change.value, change.stderr, colour))
        if bars:
            name = (
                task if single or not learns else f"{task} ({'trained for' if task in learns else 'not trained for'})"
            )
            groups.append((name, bars))
            measured.add(task)
    notes = []
    if groups:
        notes.append("Accuracy after training less the base's, in percentage points, ± one standard error.")
        if pairs == {True}:
            notes.append("Both answered the same questions and are compared question by question.")
        elif False in pairs:
            notes.append(
                "Where the two were not compared question by question, the error is that of two separate measurements, "
                "mostly too large."
            )
        if not learns:
            notes.append("Which of these tasks the data train for is not known: trainer.eval_task names none of them.")
        if len(runs) > most:
            notes.append(f"The first {most} runs; the table above has all.")
    if single:
        before, after = runs[0].losses
        if before is not None and after is not None:
            notes.append(
                f"On held-out examples of its own data the loss went from {fixed(before)} to {fixed(after)}; no "
                "standard error is kept of it."
            )
    return {
        "notes": notes,
        "unknown": not measured - learns,
        "chart": drawn(lambda width: bar_chart(groups, "change in points", width=width, change=True)),
    }

"""Several runs side by side: a row a run, a column for each thing they may differ in; and the settings that differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from sparseft.config import flatten
from sparseft.report.html import Table
from sparseft.report.numbers import count, duration, fixed, memory, number, percent, rate, short_count, signed
from sparseft.report.run_data import Run

ACROSS = 12  # runs at most beside each other as columns of the settings; more are rows
FEW = 8  # settings: up to so many are columns of the comparison itself
ASIDE = ("bench.", "output_dir", "cache_dir", "overwrite")  # settings that do not bear on what is learnt
SOME = 4  # runs: of more, what is the same for all is no column

ABSENT = object()


class Columns:
    """Columns as they are gathered, left to right."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.table = Table([], [[] for _ in runs], [], sorts=True)
        self.shared: list[str] = []  # what is the same for all

    def text(self, name: str, texts: Sequence[str]) -> None:
        self.table.head = [*self.table.head, name]
        self.table.rows = [[*row, text] for row, text in zip(self.table.rows, texts, strict=True)]

    def setting(self, name: str, values: Sequence[Any]) -> None:
        """A column of a setting: of numbers where all that is known are numbers."""
        numbers = [number(value) for value in values]
        if all(found is not None for found, value in zip(numbers, values, strict=True) if value is not ABSENT):
            self.number(name, numbers, [_shown(value) for value in values])
        else:
            self.text(name, [_shown(value) for value in values])

    def number(
        self, name: str, values: Sequence[float | None], texts: Sequence[str], best: Callable[..., float] | None = None
    ) -> None:
        """A column of numbers as `texts`; left out where no run has one, or many runs have the same."""
        if all(value is None for value in values):
            return
        if len(self.runs) > SOME and len(set(texts)) == 1:
            self.shared.append(f"{name} {texts[0]}")
            return
        column = len(self.table.head)
        self.table.numeric = [*self.table.numeric, column]
        self.table.keys[column] = values
        known = [value for value in values if value is not None]
        if best is not None and len(set(known)) > 1:
            self.table.best |= {(row, column) for row, value in enumerate(values) if value == best(known)}
        self.text(name, texts)


def comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """One row a run; what is the same for all is said once, above the table."""
    columns = Columns(runs)
    columns.text("run", [run.label for run in runs])
    for name, texts in (
        ("method", [run.method for run in runs]),
        ("model", [run.model_name for run in runs]),
        ("data", [run.dataset_name for run in runs]),
    ):
        if texts == [run.label for run in runs]:
            continue
        if len(set(texts)) > 1:
            columns.text(name, texts)
        else:
            columns.shared.append(f"{name} {texts[0]}")
    settings = differing(runs)
    beside = {} if len(runs) < 3 else {name: values for name, values in settings.items() if name != "method.name"}
    if len(beside) <= FEW:
        for name, values in beside.items():
            columns.setting(name, values)
    if not all(run.finished for run in runs):
        columns.text("state", ["finished" if run.finished else "not finished" for run in runs])
    for name, place, best in (("loss before", 0, None), ("loss after", -1, min)):
        losses = [run.losses[place] for run in runs]
        columns.number(name, losses, [fixed(loss) for loss in losses], best)
    for task in dict.fromkeys(task for run in runs for task in run.headline):
        scores = [run.after.get(task) for run in runs]
        known = [score for score in scores if score]
        best = max if all(score.asked == known[0].asked for score in known) else None
        shown_scores = [percent(score.accuracy, score.stderr) if score else "–" for score in scores]
        columns.number(task, [score.accuracy if score else None for score in scores], shown_scores, best)
        changes = [run.change(task) for run in runs]
        shown_changes = [signed(100 * change.value) if change else "–" for change in changes]
        columns.number(f"{task}, change", [change.value if change else None for change in changes], shown_changes, best)
    trainable = [number(run.get("trainable_parameters")) for run in runs]
    columns.number("trainable", trainable, [short_count(value) for value in trainable])
    columns.number("share", [run.share for run in runs], [percent(run.share) for run in runs])
    columns.number("steps", [run.last_step for run in runs], [count(run.last_step) for run in runs])
    for name, key, shown in (
        ("tokens/s", "tokens_per_second", rate),
        ("memory", "peak_memory_bytes", memory),
        ("time", "train_seconds", duration),
    ):
        columns.number(name, [number(run.get(key)) for run in runs], [shown(run.get(key)) for run in runs])
    note = f"The same for all: {', '.join(columns.shared)}. " if columns.shared else ""
    note += "Losses are of the examples held out of each run's data; of a run that has not finished, the last so far. "
    note += "Accuracies are ± one standard error, changes in points against the base. The best of a column stands out, "
    note += "of a task where all were asked as many questions with as many shots."
    table = Table([], []) if beside and len(beside) <= FEW else differences(runs)
    return {"note": note, "table": columns.table, "settings": table, "differ": len(settings)}


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings in which the runs differ, from their configs: a value a run, ABSENT where it has no such setting.

    Not that a method lacks another's setting that is unset, nor what says nothing of the training.
    """
    settings = [flatten(run.config) for run in runs]
    names = dict.fromkeys(name for one in settings for name in one)
    found = {name: [one.get(name, ABSENT) for one in settings] for name in names if not name.startswith(ASIDE)}
    found = {name: values for name, values in found.items() if any(value not in (ABSENT, None) for value in values)}
    return {name: values for name, values in found.items() if len({_shown(value) for value in values}) > 1}


def _shown(value: Any) -> str:
    return "–" if value is ABSENT else json.dumps(value, ensure_ascii=False, default=str)


def differences(runs: Sequence[Run]) -> Table:
    """The settings in which the runs differ: a row a setting, or with many runs a row a run."""
    rows = [[name, *map(_shown, values)] for name, values in differing(runs).items()]
    labels = [run.label for run in runs]
    if len(runs) <= ACROSS or not rows:
        return Table(["setting", *labels], rows)
    head, *columns = zip(*rows, strict=True)
    return Table(["run", *head], [[label, *values] for label, values in zip(labels, columns, strict=True)], sorts=True)

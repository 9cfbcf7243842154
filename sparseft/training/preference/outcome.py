"""What a run by preferences says of itself in its summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparseft.runs.folder import METRICS
from sparseft.runs.metrics import read_metrics, step_of

NAMES = {"accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins"}


def outcome(folder: Path, before: int | None, after: int | None) -> dict[str, Any]:
    """Accuracy and margin on held-out data at two steps, as the last evaluations there have them; None where there are
    none (of `kto` there is no accuracy: its answers are no pairs)."""
    lines = read_metrics(folder / METRICS)
    found: dict[str, Any] = {}
    for when, step in (("before", before), ("after", after)):
        there = [line for line in lines if step is not None and step_of(line) == step and "eval_loss" in line]
        for name, key in NAMES.items():
            found[f"eval_{name}_{when}"] = there[-1].get(key) if there else None
    return found

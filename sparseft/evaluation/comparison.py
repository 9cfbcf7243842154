"""A trained model against its base on the same questions: the difference, its standard error, and an exact test.

Both answered the very same prompts, so everything here is paired: the standard error is that of the mean of the
differences question by question, which is smaller than what two separate standard errors would give wherever the two
agree on most questions.

The test is the exact sign test over the questions on which they differ; for answers that are right or wrong that is
McNemar's. Of a group it takes the questions of all its tasks together.
"""

from __future__ import annotations

import math
from typing import Any

_OF_BASE = ("answer", "correct", "response", "loglikelihoods", "metrics")  # what a record keeps of the base's


def sign_test(improved: int, worsened: int) -> float:
    """The two-sided p of `improved` against `worsened` under equal odds, exact; 1.0 where none differ."""
    count = improved + worsened
    term = total = 1  # binomial(count, k) for k = 0, 1, …, in whole numbers: no rounding however many questions
    for k in range(1, min(improved, worsened) + 1):
        term = term * (count - k + 1) // k
        total += term
    # The two tails overlap where both counts are equal.
    return min(1.0, (2 * total) / (1 << count))


def mean_and_error(differences: list[float]) -> tuple[float, float | None]:
    """The mean and its standard error (None for a single value)."""
    count = len(differences)
    mean = sum(differences) / count
    if count < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in differences) / (count - 1)
    return mean, math.sqrt(variance / count)


def weighted_error(errors: list[float | None], weights: list[float]) -> float | None:
    """The standard error of Σ weight × mean over independent tasks; None where one of them has none."""
    known = [error for error in errors if error is not None]
    if len(known) < len(errors) or not errors:
        return None
    return math.sqrt(sum((weight * error) ** 2 for weight, error in zip(weights, known, strict=True)))


def shares(entries: list[dict[str, Any]], weighting: str) -> list[float]:
    """What each task of a group weighs: alike (`tasks`) or by its number of questions (`questions`); they sum to 1."""
    if weighting == "tasks":
        return [1 / len(entries)] * len(entries)
    total = sum(entry["samples"] for entry in entries)
    return [entry["samples"] / total for entry in entries]


def compare(outcome: dict[str, Any], base: dict[str, Any]) -> None:
    """Sets the results of the same tasks by the base model beside `outcome` (both as `evaluate` returns them).

    Each entry of `outcome["tasks"]` that has an accuracy gets `base`, `base_stderr`, `difference` (accuracy − base),
    `difference_stderr`, `improved` and `worsened` (questions), and `p_value`, any other `base_metrics`; each record of
    `outcome["samples"]` gets `base`: the base's `answer`, `correct` and what led to them.
    """
    tasks = outcome["tasks"]
    pairs = {name: _differences(outcome, base, name) for name in outcome["samples"]}
    for name, records in outcome["samples"].items():
        for record, other in zip(records, base["samples"][name], strict=True):
            record["base"] = {key: other[key] for key in _OF_BASE if key in other}
    errors: dict[str, float | None] = {}
    for name, differences in pairs.items():
        errors[name] = mean_and_error(differences)[1] if differences else None
    for name, entry in tasks.items():
        other = base["tasks"][name]
        if entry["accuracy"] is None or other["accuracy"] is None:
            if other.get("metrics"):
                entry["base_metrics"] = other["metrics"]
            continue
        members = [leaf for leaf in outcome["members"][name] if tasks[leaf]["accuracy"] is not None]
        differences = [value for leaf in members for value in pairs[leaf]]
        weights = shares([tasks[leaf] for leaf in members], entry.get("weighting", "questions"))
        improved = sum(value > 0 for value in differences)
        worsened = sum(value < 0 for value in differences)
        entry |= {
            "base": other["accuracy"],
            "base_stderr": other["stderr"],
            "difference": entry["accuracy"] - other["accuracy"],
            "difference_stderr": weighted_error([errors[leaf] for leaf in members], weights),
            "improved": improved,
            "worsened": worsened,
            "p_value": sign_test(improved, worsened) if differences else None,
        }


def _differences(outcome: dict[str, Any], base: dict[str, Any], task: str) -> list[float]:
    """Trained minus base of the task's accuracy metric, question by question; empty for a task without one."""
    metric = outcome["tasks"][task]["metric"]
    if metric is None:
        return []
    name = metric.partition(",")[0]
    differences = []
    for record, other in zip(outcome["samples"][task], base["samples"][task], strict=True):
        assert (record["doc_id"], record["prompt"]) == (other["doc_id"], other["prompt"])
        after, before = record["metrics"].get(name), other["metrics"].get(name)
        if not isinstance(after, int | float) or not isinstance(before, int | float):
            return []  # a metric of the whole set, which no single question has
        differences.append(float(after) - float(before))
    return differences

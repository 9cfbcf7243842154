"""From lm-eval's results to ours, and both to files."""

from __future__ import annotations

import math
import platform
import re
from pathlib import Path
from typing import Any

from sparseft.evaluation.comparison import shares, weighted_error
from sparseft.evaluation.tasks import HARNESS, own_names
from sparseft.files.atomic import dumps, plain, write_json, write_text
from sparseft.runs.environment import version_of
from sparseft.runs.folder import EVAL

PACKAGES = ("sparseft", "lm_eval", "torch", "transformers", "datasets", "peft")
# The metric that `accuracy` is, the first that a task has.
ACCURACY = ("acc", "exact_match", "em")
# The parts of lm-eval's results that hold one entry a task or group.
NAMED = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
# What a logged sample of lm-eval holds besides its metrics.
_SAMPLE_KEYS = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"}


def assemble(
    parts: list[tuple[dict[str, Any], bool]],
    requested: list[str],
    facts: dict[str, dict[str, Any]],
    truncated: set[str],
    max_length: int,
    alike: set[str],
) -> dict[str, Any]:
    """The outcome of `evaluate` from lm-eval's results.

    `parts` are lm-eval's results dicts and whether their tasks are lm-eval's own (then a name that is also ours gets
    the prefix `lm_eval:`); `truncated` the prompts that were cut; `max_length` the context in tokens; `alike` the
    groups whose tasks weigh alike, whatever their size.
    """
    ours = set(own_names())
    raw: dict[str, Any] = {key: {} for key in NAMED}
    samples: dict[str, list[dict[str, Any]]] = {}
    for part, is_harness in parts:

        def shown(name: str, is_harness: bool = is_harness) -> str:
            return HARNESS + name if is_harness and name in ours else name

        for key in NAMED:
            for name, value in part.get(key, {}).items():
                if key == "group_subtasks":
                    value = [shown(child) for child in value]
                raw[key][shown(name)] = value
        for name, logged in part["samples"].items():
            samples[shown(name)] = _records(shown(name), logged, truncated)

    members = {name: _leaves(name, raw["group_subtasks"]) for name in raw["results"]}
    tasks = {name: _task_entry(name, raw, samples[name]) | facts.get(name, {}) for name in samples}
    for name, leaves in members.items():
        if name not in tasks:
            tasks[name] = _group_entry(name, raw, {leaf: tasks[leaf] for leaf in leaves}, name in alike)
            tasks[name] |= facts.get(name, {})
    warnings = [
        f"{name}: {entry['truncated']} of {entry['samples']} prompts were longer than the context of {max_length} "
        "tokens and lost their beginning."
        for name, entry in tasks.items()
        if name in requested and entry["truncated"]
    ]
    # The requested ones first: they are what a table shows.
    order = [*requested, *sorted(name for name in tasks if name not in requested)]
    return {
        "requested": requested,
        "tasks": {name: as_json(tasks[name]) for name in order},
        "members": members,
        "raw": as_json(raw),
        "samples": {name: as_json(records) for name, records in samples.items()},
        "versions": package_versions(),
        "warnings": warnings,
        "max_length": max_length,
    }


def arrange(outcome: dict[str, Any], requested: list[str]) -> None:
    """Puts the tasks asked for in front of their members, in the order in which they were asked for."""
    tasks = outcome["tasks"]
    outcome["tasks"] = {name: tasks[name] for name in [*requested, *(name for name in tasks if name not in requested)]}
    outcome["requested"] = requested


def package_versions() -> dict[str, str | None]:
    """Versions of what an evaluation depends on; None for a package that is not installed."""
    return {"python": platform.python_version()} | {package: version_of(package) for package in PACKAGES}


def _leaves(name: str, children: dict[str, list[str]]) -> list[str]:
    """The tasks below a group, each once; a task's own name for a task."""
    if name not in children:
        return [name]
    return list(dict.fromkeys(leaf for child in children[name] for leaf in _leaves(child, children)))


def _number(value: Any) -> float | None:
    """A finite float, or None for lm-eval's "N/A" and for NaN."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


def _accuracy(metrics: dict[str, Any]) -> tuple[str | None, float | None, float | None]:
    """`(key, value, standard error)` of the metric that counts as accuracy; `metrics` as lm-eval keys them,
    "name,filter"."""
    for wanted in ACCURACY:
        for key in metrics:
            name, _, filter_name = key.partition(",")
            if name == wanted and filter_name:
                return key, _number(metrics[key]), _number(metrics.get(f"{name}_stderr,{filter_name}"))
    return None, None, None


def _metrics(metrics: dict[str, Any]) -> dict[str, float | None]:
    return {key: _number(value) for key, value in metrics.items() if "," in key}


def _task_entry(name: str, raw: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    metric, accuracy, stderr = _accuracy(raw["results"][name])
    entry = {
        "accuracy": accuracy,
        "stderr": stderr,
        "samples": raw["n-samples"][name]["effective"],
        "shots": raw["n-shot"].get(name),
        "truncated": sum(record["truncated"] for record in records),
        "metric": metric,
        "metrics": _metrics(raw["results"][name]),
    }
    if any("no_answer" in record["metrics"] for record in records):
        entry["no_answer"] = int(sum(record["metrics"]["no_answer"] for record in records))
    return entry


def _group_entry(name: str, raw: dict[str, Any], members: dict[str, dict[str, Any]], alike: bool) -> dict[str, Any]:
    metric, accuracy, stderr = _accuracy(raw["results"][name])
    scored = [entry for entry in members.values() if entry["accuracy"] is not None]
    if alike and scored:
        # lm-eval's own pools the questions of all tasks, which is not the error of the mean over tasks.
        stderr = weighted_error([entry["stderr"] for entry in scored], shares(scored, "tasks"))
    count = sum(entry["samples"] for entry in scored)
    shots = {entry["shots"] for entry in members.values()}
    entry = {
        "accuracy": accuracy,
        "stderr": stderr,
        "samples": sum(entry["samples"] for entry in members.values()),
        "shots": shots.pop() if len(shots) == 1 else None,
        "truncated": sum(entry["truncated"] for entry in members.values()),
        "accuracy_macro": sum(entry["accuracy"] for entry in scored) / len(scored) if scored else None,
        "weighting": "tasks" if alike else "questions",
        "accuracy_micro": sum(entry["accuracy"] * entry["samples"] for entry in scored) / count if count else None,
        "metric": metric,
        "metrics": _metrics(raw["results"][name]),
        "tasks": list(members),
    }
    if any("no_answer" in member for member in members.values()):
        entry["no_answer"] = sum(member.get("no_answer", 0) for member in members.values())
    return entry


def _records(task: str, logged: list[dict[str, Any]], truncated: set[str]) -> list[dict[str, Any]]:
    """One record a question, in the order of the data. A task with several filters (lm-eval's gsm8k) is logged once a
    filter; the first one's answer counts and the others stand under `other_filters`."""
    records: dict[int, dict[str, Any]] = {}
    for sample in logged:
        record = _record(task, sample, truncated)
        first = records.setdefault(sample["doc_id"], record)
        if first is not record:
            first.setdefault("other_filters", {})[sample["filter"]] = {
                key: record[key] for key in ("answer", "correct", "metrics")
            }
    return [records[number] for number in sorted(records)]


def _record(task: str, sample: dict[str, Any], truncated: set[str]) -> dict[str, Any]:
    arguments = [list(item) for item in sample["arguments"]]
    metrics = {name: sample[name] for name in sample["metrics"] if name not in _SAMPLE_KEYS}
    answer: Any = sample["filtered_resps"][0] if len(sample["filtered_resps"]) == 1 else sample["filtered_resps"]
    target: Any = sample["target"]
    scores = _scores(sample["filtered_resps"])
    extra: dict[str, Any] = {}
    if len(arguments) > 1 and scores is not None:  # multiple choice: one scored continuation a choice
        choices: list[Any] = [str(item[1]).strip() for item in arguments]
        if len(set(choices)) < len(choices):  # the choices stand in the prompts
            choices = list(range(len(choices)))
        answer = choices[max(range(len(choices)), key=lambda index: scores[index])]
        if isinstance(target, int) and 0 <= target < len(choices):
            target = choices[target]
        extra["loglikelihoods"] = scores
    elif len(arguments) == 1 and scores is None:
        extra["response"] = sample["resps"][0][0]
    key = next((name for name in ACCURACY if name in metrics), None)
    value = metrics.get(key) if key else None
    return {
        "task": task,
        "doc_id": sample["doc_id"],
        "prompt": arguments[0][0],
        "answer": answer,
        "target": target,
        "correct": bool(value) if isinstance(value, (bool, int, float)) else None,
        "truncated": any(item[0] in truncated for item in arguments if isinstance(item[0], str)),
        "metrics": metrics,
        **extra,
        "prompt_hash": sample["prompt_hash"],
        "doc_hash": sample["doc_hash"],
    }


def _scores(responses: list[Any]) -> list[float] | None:
    """The log-likelihoods of lm-eval's `(log-likelihood, is greedy)` responses; None for any other kind."""
    if all(isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[1], bool) for item in responses):
        return [float(item[0]) for item in responses]
    return None


def as_json(value: Any) -> Any:
    """`value` as strict JSON can hold it (`atomic.plain`): functions by their names, anything else by its text."""
    return plain(value, _named)


def _named(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return [as_json(item) for item in value]
    if not callable(value):
        return str(value)
    function = getattr(value, "func", value)  # of a functools.partial
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"


def file_stem(task: str) -> str:
    """A task's name as a file name: `lm_eval:boolq` becomes `lm_eval_boolq`."""
    return re.sub(r"[^\w.-]", "_", task)


def write_results(folder: Path, outcome: dict[str, Any], header: dict[str, Any]) -> list[Path]:
    """Writes `eval/<task>.json` and `eval/<task>.samples.jsonl` under `folder` for each requested task or group.

    The JSON file holds `task`, `tasks` (its entry and its members'), `sparseft` (`header`: what was evaluated, commit
    and so on; with `versions` and `warnings`), and lm-eval's results of it; the samples file one line a question with
    prompt, answer, target and verdict. Each file is written aside and renamed. Returns the paths written.
    """
    target = Path(folder) / EVAL
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for name in outcome["requested"]:
        leaves = outcome["members"][name]
        names = {name, *leaves, *outcome["raw"]["group_subtasks"].get(name, [])}
        content = {
            "task": name,
            "tasks": {item: outcome["tasks"][item] for item in outcome["tasks"] if item in names},
            "sparseft": {
                **as_json(header),
                "versions": outcome["versions"],
                "warnings": outcome["warnings"],
                "max_length": outcome["max_length"],
            },
            **{key: {item: value for item, value in outcome["raw"][key].items() if item in names} for key in NAMED},
        }
        lines = (dumps(record) + "\n" for leaf in leaves for record in outcome["samples"][leaf])
        written.append(write_json(target / f"{file_stem(name)}.json", content))
        written.append(write_text(target / f"{file_stem(name)}.samples.jsonl", lines))
    return written

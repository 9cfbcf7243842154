"""What a report is made from: a run folder read as far as it can be, each gap a warning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseft.errors import UserError
from sparseft.files.tensors import SELECTION_CONFIG
from sparseft.files.untrusted import parse_yaml, read_bytes, read_json_object, why
from sparseft.report.numbers import number
from sparseft.runs.folder import BEFORE, CONFIG, ENVIRONMENT, EVAL, METRICS, SELECTION, SUMMARY, load_summary
from sparseft.runs.metrics import read_metrics


@dataclass
class Score:
    """One task's result, in shares."""

    accuracy: float
    stderr: float | None
    samples: Any
    shots: Any


@dataclass
class Run:
    """What a run folder holds, as far as it can be read."""

    path: Path
    label: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    selection: dict[str, Any] | None = None
    before: dict[str, Score] = field(default_factory=dict)
    after: dict[str, Score] = field(default_factory=dict)
    headline: list[str] = field(default_factory=list)  # the tasks asked for; the others are their members
    warnings: list[str] = field(default_factory=list)

    def get(self, name: str) -> Any:
        """A field of the summary, None where there is none."""
        return (self.summary or {}).get(name)

    @property
    def method(self) -> str:
        """As the summary says, else the config, else unknown."""
        known = self.get("method") or self._configured("method", "name")
        return str(known or "unknown method")

    @property
    def model(self) -> str:
        return str(self.get("model") or self._configured("model", "path") or "unknown model")

    @property
    def dataset(self) -> str:
        return str(self.get("dataset") or self._configured("dataset", "name") or "unknown data")

    def _configured(self, group: str, name: str) -> Any:
        section = self.config.get(group)
        return section.get(name) if isinstance(section, dict) else None

    @property
    def share(self) -> float | None:
        """Trainable parameters as a share of all."""
        part, whole = number(self.get("trainable_parameters")), number(self.get("total_parameters"))
        return part / whole if part is not None and whole else None

    def curve(self, name: str) -> list[tuple[float, float | None]]:
        """(step, value) of every metrics line that has the field; a value that is not finite is None."""
        points = []
        for record in self.metrics:
            step = number(record.get("step"))
            if name in record and step is not None:
                points.append((step, number(record[name])))
        return sorted(points, key=lambda point: point[0])

    def eval_curve(self) -> list[tuple[float, float | None]]:
        """The evaluation losses; the summary's before and after stand in where metrics.jsonl has no such line."""
        points = self.curve("eval_loss")
        before, after = number(self.get("eval_loss_before")), number(self.get("eval_loss_after"))
        last = number(self.get("steps"))
        if before is not None and not (points and points[0][0] == 0):
            points.insert(0, (0.0, before))
        if after is not None and last and not (points and points[-1][0] >= last):
            points.append((last, after))
        return points


def read_run(path: Path) -> Run:
    """Reads what is there; each file that is missing where it matters, or broken, becomes a warning of the run."""
    run = Run(path)

    def attempt(read: Callable[[], Any], name: str, otherwise: Any) -> Any:
        try:
            return read()
        except (ValueError, OSError) as error:  # UserError among them
            message = why(error)
            run.warnings.append(f"{name} could not be read: {message}")
            return otherwise

    def optional(name: str, otherwise: Any) -> Any:
        if not (path / name).exists():
            return otherwise
        return attempt(lambda: read_json_object(path / name), name, otherwise)

    if (path / CONFIG).exists():
        run.config_text = attempt(lambda: read_bytes(path / CONFIG).decode("utf-8", "replace"), CONFIG, "")
        run.config = attempt(lambda: _parse_yaml(run.config_text), CONFIG, {})
    run.environment = optional(ENVIRONMENT, {})
    run.metrics = attempt(lambda: read_metrics(path / METRICS), METRICS, [])
    if (path / SUMMARY).exists():
        run.summary = attempt(lambda: load_summary(path), SUMMARY, None)
    else:
        last = max((step for record in run.metrics if (step := number(record.get("step"))) is not None), default=None)
        reached = f"; its last logged step is {last:.0f}" if last is not None else ""
        run.warnings.append(f"The run did not finish: it has no summary.json{reached}.")
    run.selection = optional(f"{SELECTION}/{SELECTION_CONFIG}", None)
    for name, scores in ((BEFORE, run.before), (EVAL, run.after)):
        for file in sorted((path / name).glob("*.json")):
            _read_scores(run, optional(f"{name}/{file.name}", {}), scores, f"{name}/{file.name}")
    said = run.get("warnings")
    run.warnings += [str(text) for text in said] if isinstance(said, list) else []
    broken = sum(value is None for value in (y for _, y in run.curve("loss")))
    if broken:
        run.warnings.append(f"The training loss was not finite in {broken} of the logged steps.")
    commit = run.environment.get("commit")
    if isinstance(commit, str) and commit.endswith("-dirty"):
        run.warnings.append("The run was made with uncommitted changes to sparseft: the commit alone cannot repeat it.")
    return run


def _parse_yaml(text: str) -> dict[str, Any]:
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"not YAML: {why(error)}") from error
    if not isinstance(content, dict):
        raise UserError("expected groups and their fields.")
    return content


def _read_scores(run: Run, content: dict[str, Any], scores: dict[str, Score], name: str) -> None:
    """Adds the tasks of one `eval/<task>.json` to `scores`."""
    tasks = content.get("tasks")
    if not isinstance(tasks, dict):
        if content:
            run.warnings.append(f"{name} holds no results under `tasks`.")
        return
    for task, entry in tasks.items():
        accuracy = number(entry.get("accuracy")) if isinstance(entry, dict) else None
        if accuracy is not None:
            scores[task] = Score(accuracy, number(entry.get("stderr")), entry.get("samples"), entry.get("shots"))
    asked = content.get("task")
    for task in [asked] if isinstance(asked, str) else list(tasks):
        if task not in run.headline and task in scores:
            run.headline.append(task)
    header = content.get("sparseft")
    said = header.get("warnings") if isinstance(header, dict) else None
    run.warnings += [str(text) for text in said] if isinstance(said, list) else []


def name_runs(runs: list[Run]) -> None:
    """Gives each run the shortest name that tells it from the others: its method, else its folder, else a number."""
    for names in (
        [run.method for run in runs],
        [run.path.name for run in runs],
        [f"{place}: {run.path.name}" for place, run in enumerate(runs, 1)],
    ):
        if len(set(names)) == len(runs):
            for run, name in zip(runs, names, strict=True):
                run.label = name
            return

"""What a report is made from: a run folder read as far as it can be, each gap a warning."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseft.errors import UserError
from sparseft.evaluation.trained_on import trained_for
from sparseft.files.hashing import adapter_hash
from sparseft.files.tensors import SELECTION_CONFIG, SELECTION_TENSORS, opened, split_name
from sparseft.files.untrusted import parse_yaml, read_bytes, read_json_object, why
from sparseft.report.numbers import number
from sparseft.runs import folder as runs
from sparseft.runs.metrics import read_metrics

MODELS = ("base", "adapter")  # who answers, in samples.jsonl


@dataclass
class Score:
    """One task's result, in shares."""

    accuracy: float
    stderr: float | None
    samples: Any
    shots: Any
    members: list[str] = field(default_factory=list)  # of a group
    paired: float | None = None  # the standard error of its difference to the base, question by question
    split: Any = None

    @property
    def asked(self) -> tuple[Any, Any, Any]:
        """What must be alike for two accuracies to be compared."""
        return self.samples, self.shots, self.split


@dataclass
class Answer:
    """One line of samples.jsonl: what a prompt got at a step, of the base (step 0) or the adapter."""

    step: float
    base: bool
    prompt: str
    text: str
    prompt_id: str = ""  # tells it from others that ask the same last

    @property
    def asked(self) -> tuple[str, str]:
        """What was asked, to be compared."""
        return self.prompt, self.prompt_id


@dataclass
class Change:
    """What a task's accuracy gained or lost by training, in shares."""

    value: float
    stderr: float | None
    paired: bool  # whether that error is the one of the differences question by question


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
    rate: dict[str, Any] = field(default_factory=dict)  # how the learning rate was found
    before: dict[str, Score] = field(default_factory=dict)
    after: dict[str, Score] = field(default_factory=dict)
    headline: list[str] = field(default_factory=list)  # the tasks asked for; the others are their members
    answers: list[Answer] = field(default_factory=list)
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
    def objective(self) -> str:
        """sft where nothing else is said."""
        return str(self.get("objective") or self.config.get("objective") or "sft")

    @property
    def model(self) -> str:
        return str(self.get("model") or self._configured("model", "path") or "unknown model")

    @property
    def dataset(self) -> str:
        return str(self.get("dataset") or self._configured("dataset", "name") or "unknown data")

    @property
    def learns(self) -> set[str]:
        """The evaluated tasks that the run trains for. Empty where none of them is known to be."""
        scores = {name: score.members for name, score in (self.before | self.after).items()}
        return trained_for(self.config, self.environment, self.summary or {}, scores)

    @property
    def model_name(self) -> str:
        """The model's id, or the last part of its folder's path."""
        return self.model.rstrip("/").rpartition("/")[2] if _is_path(self.model) else self.model

    @property
    def dataset_name(self) -> str:
        """The data set's name, or the last two parts of its file's path."""
        return "/".join(self.dataset.split("/")[-2:]) if _is_path(self.dataset) else self.dataset

    @property
    def losses(self) -> tuple[float | None, float | None]:
        """The evaluation loss before training and at the end, or the last one so far."""
        curve = [(step, loss) for step, loss in self.eval_curve() if loss is not None]
        before = next((loss for step, loss in curve if step == 0), None)
        last = curve[-1][1] if curve and curve[-1][0] > 0 else None
        said = number(self.get("eval_loss_after"))  # with the best adapter kept it is not the last one's
        return before, last if said is None else said

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def last_step(self) -> float | None:
        """The steps of a finished run, else the last one that was logged."""
        if (steps := number(self.get("steps"))) is not None:
            return steps
        return max((step for record in self.metrics if (step := number(record.get("step"))) is not None), default=None)

    def change(self, task: str) -> Change | None:
        """What training changed in a task; None where one side is missing, or the questions were not the same."""
        old, new = self.before.get(task), self.after.get(task)
        if old is None or new is None or old.asked != new.asked:
            return None
        error = new.paired
        if error is None and old.stderr is not None and new.stderr is not None:
            error = math.hypot(old.stderr, new.stderr)
        return Change(new.accuracy - old.accuracy, error, new.paired is not None)

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
            run.warnings.append(f"{name} could not be read: {why(error)}")
            return otherwise

    def optional(name: str, otherwise: Any) -> Any:
        if not (path / name).exists():
            return otherwise
        return attempt(lambda: read_json_object(path / name), name, otherwise)

    if (path / runs.CONFIG).exists():
        run.config_text = attempt(lambda: read_bytes(path / runs.CONFIG).decode("utf-8", "replace"), runs.CONFIG, "")
        run.config = attempt(lambda: _parse_yaml(run.config_text), runs.CONFIG, {})
    run.environment = optional(runs.ENVIRONMENT, {})
    run.metrics = attempt(lambda: read_metrics(path / runs.METRICS), runs.METRICS, [])
    if (path / runs.SUMMARY).exists():
        run.summary = attempt(lambda: runs.load_summary(path), runs.SUMMARY, None)
    else:
        reached = f"; its last logged step is {run.last_step:.0f}" if run.last_step is not None else ""
        run.warnings.append(f"The run has not finished, it is still running or it failed: no summary.json{reached}.")
    run.rate = optional(runs.RATE, {})
    run.selection = optional(f"{runs.SELECTION}/{SELECTION_CONFIG}", None)
    for record in attempt(lambda: read_metrics(path / runs.SAMPLES), runs.SAMPLES, []):
        step, texts = number(record.get("step")), (record.get("prompt"), record.get("answer"))
        if step is not None and all(isinstance(text, str) for text in texts) and record.get("model") in MODELS:
            run.answers.append(Answer(step, record["model"] == MODELS[0], *texts, str(record.get("prompt_id") or "")))
    present = None
    if any((path / runs.EVAL).glob("*.json")):  # it reads the whole adapter
        present = attempt(lambda: adapter_hash(path / runs.ADAPTER), runs.ADAPTER, None)
    for name, scores in ((runs.BEFORE, run.before), (runs.EVAL, run.after)):
        found = []
        for file in sorted((path / name).glob("*.json")):
            content = optional(f"{name}/{file.name}", {})
            if scores is run.after and runs.is_of_another(content, present):
                run.warnings.append(
                    f"{name}/{file.name} is of another adapter than the run has now, so its scores are left out: the "
                    "run went on or was trimmed since; evaluate it again."
                )
            else:
                found.append((file, content))
        chosen = runs.chosen_results(found)
        for file, content in found:
            _read_scores(run, content, scores, f"{name}/{file.name}", {task for task in chosen if chosen[task] == file})
    said = run.get("warnings")
    run.warnings += [str(text) for text in said] if isinstance(said, list) else []
    broken = sum(value is None for value in (y for _, y in run.curve("loss")))
    if broken:
        run.warnings.append(f"The training loss was not finite in {broken} of the logged steps.")
    commit = run.environment.get("commit")
    if isinstance(commit, str) and commit.endswith("-dirty"):
        run.warnings.append("The run was made with uncommitted changes to sparseft: the commit alone cannot repeat it.")
    return run


def _is_path(name: str) -> bool:
    return name.startswith(("/", "~", "./", "../")) and bool(name.strip("/."))


def read_indices(path: Path) -> dict[str, dict[str, Any]]:
    """What a run trains, by module and kind: rows or columns (k,), blocks (n, 2), as numpy's integers.

    UserError where selection.safetensors is missing, damaged or holds anything else.
    """
    found: dict[str, dict[str, Any]] = {}
    with opened(path / runs.SELECTION / SELECTION_TENSORS, "selection", "np") as file:
        for name in file.keys():
            module, kind, last = split_name(name, path)
            index = file.get_tensor(name)
            wanted = 2 if kind == "blocks" else 1
            if (
                last != "index"
                or index.dtype.kind not in "iu"
                or index.ndim != wanted
                or index.shape[1:] not in ((), (2,))
            ):
                raise UserError(f"{path}: '{name}' is no index of a selection.")
            found.setdefault(module, {})[kind] = index.astype("int64")
    return found


def _parse_yaml(text: str) -> dict[str, Any]:
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"not YAML: {why(error)}") from error
    if not isinstance(content, dict):
        raise UserError("expected groups and their fields.")
    return content


def _read_scores(run: Run, content: dict[str, Any], scores: dict[str, Score], name: str, own: Collection[str]) -> None:
    """Adds the tasks of one `eval/<task>.json` to `scores`: those in `own`, as others are taken from other files."""
    tasks = content.get("tasks")
    if not isinstance(tasks, dict):
        if content:
            run.warnings.append(f"{name} holds no results under `tasks`.")
        return
    for task, entry in tasks.items():
        accuracy = number(entry.get("accuracy")) if isinstance(entry, dict) else None
        if accuracy is None or task not in own:
            continue
        members = entry.get("tasks")
        members = [name for name in members if isinstance(name, str)] if isinstance(members, list) else []
        asked_of = (entry.get("samples"), entry.get("shots"), members)
        split = entry.get("split")
        score = scores[task] = Score(accuracy, _error(entry.get("stderr")), *asked_of, split=split)
        base = number(entry.get("base"))
        if base is not None and scores is run.after:  # they were compared on the same questions
            score.paired = _error(entry.get("difference_stderr"))
            run.before[task] = Score(base, _error(entry.get("base_stderr")), *asked_of, split=split)
    asked = content.get("task")
    for task in [asked] if isinstance(asked, str) else list(tasks):
        if task not in run.headline and task in scores:
            run.headline.append(task)
    header = content.get("sparseft")
    said = header.get("warnings") if isinstance(header, dict) else None
    run.warnings += [str(text) for text in said] if isinstance(said, list) else []


def _error(value: Any) -> float | None:
    """A standard error, None where it is no number or less than 0."""
    known = number(value)
    return known if known is not None and known >= 0 else None


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

"""`sparseft eval`: lm-eval tasks on a run, an adapter or the base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.config import RunConfig
from sparseft.errors import UserError
from sparseft.evaluation import contamination, preference
from sparseft.evaluation.progress import Answers
from sparseft.evaluation.run import conclude, evaluate, prepare
from sparseft.evaluation.target import Target, find_target, prompt_format, score_both
from sparseft.evaluation.tasks import data_folder, expand_tasks
from sparseft.files.atomic import explained
from sparseft.runs import folder as runs
from sparseft.training import checks


def run(
    config: RunConfig,
    *,
    tasks: Sequence[str],
    run: str | None = None,
    adapter: str | None = None,
    base: bool = False,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluates and writes `eval/<task>.json` and its samples; returns accuracies by task and group."""
    console.clear_warnings()
    if not tasks:
        raise UserError("no task given: name mmlu, commonsense, arithmetic, one of their members or an lm-eval task.")
    checks.check_one_process(config, "eval")
    checks.check_tests(config)
    target = find_target(config, run=run, adapter=adapter, base=base, overrides=overrides)
    # What would be refused after the answers, which may take hours, is refused before them.
    _check_writable(config, target)
    data_dir = data_folder(config.eval, (target.base or target.model).path)  # a whole model lies in its run
    beside = target.base is not None and config.eval.compare_base
    first = ", and its base on the same questions (eval.compare_base=false leaves it out)" if beside else ""
    console.log(f"evaluating {target.what} on {', '.join(tasks)}{first}")

    # Tasks and data first: a wrong name or folder should not wait for the model to load.
    names = expand_tasks(list(tasks), data_dir=data_dir)
    with console.working("reading the questions"):
        plan = prepare(names, config.eval, data_dir=data_dir)
    plan.pairs, plan.pairs_of = preference.settings(config, target.folder, overrides)
    plan.prompt = prompt_format(config.eval.prompt, target.told)
    with Answers() as answers:

        def score(model: Any, tokenizer: Any) -> dict[str, Any]:
            return evaluate(model, tokenizer, plan, progress=answers)

        outcome, of_base = score_both(target, config, score, answers.prepare)
    for warning in outcome["warnings"]:
        console.warn(warning)
    folder = target.folder or new_folder(config)
    with explained(f"the results in '{folder / runs.EVAL}'", lambda: None):
        written = conclude(outcome, plan, target, folder, of_base)
    return {
        "evaluated": target.what,
        "tasks": outcome["tasks"],
        "seconds": outcome["seconds"],
        "files": [str(path) for path in written],
        "warnings": outcome["warnings"],
    }


def _check_writable(config: RunConfig, target: Target) -> None:
    """Refuses a folder that the results could not be written into; makes nothing."""
    if target.folder is None and not config.output_dir:
        runs.check_writable(runs.OUTPUTS, "folder")
        return
    folder = target.folder or new_folder(config)
    what = "the run's folder" if target.folder else "output_dir"
    if target.folder is None and runs.is_run(folder):
        raise UserError(
            f"output_dir={config.output_dir}: the folder of a run, whose {runs.EVAL}/ holds what the run itself has "
            "answered; name another folder, or leave it out."
        )
    runs.check_writable(folder, what)
    runs.check_writable(folder / runs.EVAL, what)


def new_folder(config: RunConfig) -> Path:
    """Where results of a base or an adapter lie: `output_dir`, or a new folder under outputs/."""
    if config.output_dir:
        return Path(config.output_dir).expanduser()
    return runs.new_folder(f"eval-{runs.timestamp()}")


def render(result: dict[str, Any]) -> None:
    """Accuracies as a table, beside the base's where it was compared, then where the files lie."""
    entries = result["tasks"].items()
    if any("difference" in entry or "base_metrics" in entry for _, entry in entries):
        columns = ["task", "base", "adapter", "difference", "p", "samples", "shots"]
        rows = [
            [name, _score(entry.get("base"), entry.get("base_metrics")), _score(entry.get("accuracy"),
             entry.get("metrics")), _difference(entry),
             _probability(entry.get("p_value")), entry.get("samples"), entry.get("shots")]
            for name, entry in entries
        ]  # fmt: skip
    else:
        columns = ["task", "accuracy", "stderr", "samples", "shots"]
        rows = [
            [name, _score(entry.get("accuracy"), entry.get("metrics")), _share(entry.get("stderr")),
             entry.get("samples"), entry.get("shots")]
            for name, entry in entries
        ]  # fmt: skip
    console.table(f"Evaluated: {result['evaluated']}", columns, rows)
    if "p" in columns:
        print("difference: adapter - base ± standard error, paired by question; p: exact sign test (McNemar)")
    if trained_on := contamination.rows(result["tasks"]):
        columns = contamination.OF_BOTH if contamination.compared(result["tasks"]) else contamination.COLUMNS
        console.table("Test questions that were training questions", columns, trained_on)
    print(f"files: {Path(result['files'][0]).parent}")


def _score(accuracy: float | None, metrics: dict[str, float | None] | None) -> str:
    """The accuracy; of a task without one its first metric by name, such as `word_perplexity 23.1000`."""
    if accuracy is not None:
        return _share(accuracy)
    known = {name.partition(",")[0]: value for name, value in (metrics or {}).items() if value is not None}
    return next((f"{name} {value:.4f}" for name, value in known.items() if not name.endswith("_stderr")), "-")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _difference(entry: dict[str, Any]) -> str:
    if entry.get("difference") is None:
        return "-"
    error = entry["difference_stderr"]
    return f"{entry['difference']:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _probability(value: float | None) -> str:
    """`0.0312`; below that four places show nothing, so `3e-07`."""
    if value is None:
        return "-"
    return f"{value:.4f}" if value >= 0.0001 else f"{value:.0e}"

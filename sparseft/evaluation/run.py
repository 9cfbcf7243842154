"""One evaluation: names and data become lm-eval tasks (`prepare`), lm-eval runs them on a model (`evaluate`)."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseft.config import BUNDLED_ROOT, EvalConfig
from sparseft.errors import RunError, UserError, nearest
from sparseft.evaluation import llm_adapters, mmlu, mt_bench, results
from sparseft.evaluation import llm_adapters_hub as hub
from sparseft.evaluation.tasks import (
    ARITHMETIC,
    COMMONSENSE,
    GROUPS,
    HARNESS,
    MMLU,
    MMLU_CATEGORIES,
    MT_BENCH,
    expand_tasks,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

log = logging.getLogger(__name__)

BUNDLED_DATA = str(BUNDLED_ROOT / "data")
ARITHMETIC_TOKENS = 256  # the reasoning comes before the number
FEWSHOT_SEED = 1234  # lm-eval's own default
BOOTSTRAP = 1000  # resamplings for metrics without a closed standard error (accuracy has one)


@dataclass
class Plan:
    """Tasks with their data read and checked, before any model is there; serves any number of evaluations."""

    requested: list[str]
    tasks: dict[str, Task] = field(default_factory=dict)  # ours
    groups: dict[str, Group] = field(default_factory=dict)
    harness_tasks: dict[str, Task] = field(default_factory=dict)  # lm-eval's own, by lm-eval's names
    harness_groups: dict[str, Group] = field(default_factory=dict)
    questions: list[dict[str, Any]] = field(default_factory=list)  # of MT-Bench
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)  # to put beside the results of a task or group
    warnings: list[str] = field(default_factory=list)

    @property
    def macro(self) -> set[str]:
        """Groups whose score is the mean over their tasks, whatever the tasks' sizes."""
        return {
            name
            for name, group in (self.groups | self.harness_groups).items()
            if group.aggregate_metric_list and not group.aggregate_metric_list[0].weight_by_size
        }


def prepare(
    tasks: list[str], config: EvalConfig, *, data_dir: str | None, progress: Any = None, debug: bool = False
) -> Plan:
    """Checks the settings, reads the data of every task and builds the lm-eval tasks.

    Raises UserError for settings out of range, unknown names, and data that is missing or bad.
    """
    _check(config)
    requested = expand_tasks(tasks, data_dir=data_dir)
    from sparseft.evaluation import harness

    plan = Plan(requested)
    with harness.seeded([]), harness.quiet(progress, debug):
        _add_mmlu(plan, [name for name in requested if _is_mmlu(name, data_dir)], config, data_dir)
        generated = [name for name in requested if name in (*GROUPS, *COMMONSENSE, *ARITHMETIC)]
        _add_generated(plan, generated, config, data_dir)
        if MT_BENCH in requested:
            plan.questions = mt_bench.read_questions(data_dir)[: config.limit]
        ours = {*plan.tasks, *plan.groups, MT_BENCH}
        _add_harness(plan, [name for name in requested if name not in ours], config)
    _check_shots(plan, config)
    return plan


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: list[str],
    config: EvalConfig,
    *,
    data_dir: str | None,
    max_length: int | None = None,
    plan: Plan | None = None,
    progress: Callable[[str, int, int | None], None] | None = None,
    debug: bool = False,
) -> dict[str, Any]:
    """Runs the tasks on `model` through lm-eval and returns what came of it.

    `model` is a loaded causal LM of transformers, on its device, plain or with sparse or PEFT layers attached; its
    modes, settings and the random states are left as they were. `max_length` (tokens) bounds the context below the
    model's own. `plan` is what `prepare` returned for the same arguments (made here otherwise). `progress(what, done,
    total)` is called as requests are answered.

    Returns a dict of plain values:

    - `tasks`: `{name: {"accuracy", "stderr" (float or None), "samples", "shots", "truncated" (prompts that lost their
      beginning to the context), "metrics", …}}`, groups among them: `accuracy` of `mmlu` weights subjects by size, of
      `commonsense` and `arithmetic` it is the mean over the tasks found (`weighting` says which: `questions` or
      `tasks`); `accuracy_macro` and `accuracy_micro` give both; `missing` names members without data.
    - `raw`: lm-eval's results; `samples`: `{task: [one record a question]}`; `versions`, `warnings`, `seconds`.
    """
    plan = plan or prepare(tasks, config, data_dir=data_dir, progress=progress, debug=debug)
    from sparseft.evaluation import harness

    start = time.perf_counter()
    if plan.questions:
        mt_bench.prompt_of(config.prompt, tokenizer)  # refused now, not after hours of other tasks
    parts = []
    with harness.undisturbed(model), harness.quiet(progress, debug):
        lm = harness.LanguageModel(model, tokenizer, config.batch_size, max_length)
        for tasks_of, groups_of, prefixed in (
            (plan.tasks, plan.groups, False),
            (plan.harness_tasks, plan.harness_groups, True),
        ):
            if tasks_of:
                parts.append((_run(lm, tasks_of, groups_of, config.limit), prefixed))
        if plan.questions:
            tokens = _tokens(config, mt_bench.MAX_NEW_TOKENS)
            conversations = mt_bench.answer(lm, plan.questions, config.prompt, tokens)
    scored = [name for name in plan.requested if name != MT_BENCH]
    outcome = results.assemble(parts, scored, plan.facts, lm.truncated, lm.max_length, plan.macro)
    if plan.questions:
        mt_bench.add_to(outcome, results.as_json(conversations), plan.requested)
    outcome["warnings"] = [*plan.warnings, *outcome["warnings"]]
    outcome["seconds"] = time.perf_counter() - start
    return outcome


def _run(lm: Any, tasks: dict[str, Task], groups: dict[str, Group], limit: int | None) -> dict[str, Any]:
    """lm-eval's results for these tasks, samples included."""
    # Not simple_evaluate: it indexes all of lm-eval's tasks and inspects the machine, ten seconds for nothing here.
    from lm_eval.evaluator import evaluate as run_tasks

    raw = run_tasks(
        lm=lm,
        task_dict={"tasks": tasks, "groups": groups},
        limit=limit,
        bootstrap_iters=BOOTSTRAP,
        log_samples=True,
    )
    assert raw is not None  # only ranks other than 0 get None, and there is one process
    return raw


def _check(config: EvalConfig) -> None:
    if config.split not in llm_adapters.FILES:
        raise UserError(f"eval.split='{config.split}' is no split.{nearest(config.split, llm_adapters.FILES)}")
    least = {"shots": 0, "limit": 1, "num_beams": 1, "max_new_tokens": 1}
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or value < bound):
            raise UserError(f"eval.{name}={value}: expected a whole number of at least {bound}.")
    size = config.batch_size
    if size != "auto" and not (isinstance(size, int) and size > 0):
        raise UserError(f"eval.batch_size={size}: expected a whole number of at least 1, or auto.")


def _tokens(config: EvalConfig, own: int) -> int:
    """Tokens of a generated answer: what a task takes by itself, unless the setting was changed."""
    return own if config.max_new_tokens == EvalConfig.max_new_tokens else config.max_new_tokens


def _is_mmlu(name: str, data_dir: str | None) -> bool:
    if name == MMLU:
        return True
    part = name.removeprefix(f"{MMLU}_")
    if part == name:
        return False
    # lm-eval has other names that start so (mmlu_pro); a subject of the folder counts as ours.
    known = {*MMLU_CATEGORIES, *mmlu.MMLU_SUBJECTS, *(mmlu.local_subjects(data_dir) if data_dir else ())}
    return part in known


def _group(name: str, members: list[Task], by_size: bool) -> Group:
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig

    group = Group(
        name,
        aggregate_metric_list=[AggMetricConfig(metric="acc", weight_by_size=by_size)],
        metadata={"version": "1.0"},
    )
    for member in members:
        group.add(member)
    return group


def _add_mmlu(plan: Plan, requested: list[str], config: EvalConfig, data_dir: str | None) -> None:
    if not requested:
        return
    shots = mmlu.DEFAULT_SHOTS if config.shots is None else config.shots
    split = mmlu.resolve_split(config.split, data_dir)
    selected = mmlu.select_subjects(requested, split, data_dir)
    where = mmlu.HUB if data_dir is None else str(mmlu.find_folder(data_dir))
    for subject in sorted({subject for subjects in selected.values() for subject in subjects}):
        name = f"{MMLU}_{subject}"
        plan.tasks[name] = mmlu.build_task(subject, split, shots, data_dir)
        plan.facts[name] = {"data": where, "split": split}
    for name, subjects in selected.items():
        if name in plan.tasks:
            continue
        _add_mmlu_group(plan, name, subjects)
        plan.facts[name] = {"data": where, "split": split}
        part = name.removeprefix(MMLU).removeprefix("_")
        expected = MMLU_CATEGORIES.get(part, mmlu.MMLU_SUBJECTS)
        absent = sorted(set(expected) - set(subjects))
        if absent and set(subjects) <= set(expected):  # a folder with subjects of its own is no incomplete MMLU
            plan.facts[name]["missing"] = absent
            plan.warnings.append(f"{name}: {len(subjects)} of {len(expected)} subjects found in '{where}'.")
    if MMLU in selected:
        for category, members in MMLU_CATEGORIES.items():
            subjects = [subject for subject in selected[MMLU] if subject in members]
            if subjects:
                _add_mmlu_group(plan, f"{MMLU}_{category}", subjects)
                plan.facts[f"{MMLU}_{category}"] = {"data": where, "split": split}


def _add_mmlu_group(plan: Plan, name: str, subjects: list[str]) -> None:
    plan.groups[name] = _group(name, [plan.tasks[f"{MMLU}_{subject}"] for subject in subjects], by_size=True)


def _add_generated(plan: Plan, requested: list[str], config: EvalConfig, data_dir: str | None) -> None:
    if not requested:
        return
    selected: dict[str, dict[str, Any]]  # a file or a hub id of each task
    if data_dir is None:
        selected, missing = hub.select(requested, config.split)
    else:
        selected, missing = llm_adapters.select_files(requested, config.split, data_dir)
    for task, path in {task: path for files in selected.values() for task, path in files.items()}.items():
        tokens = _tokens(config, ARITHMETIC_TOKENS if task in ARITHMETIC else EvalConfig.max_new_tokens)
        file = path if isinstance(path, Path) else None
        plan.tasks[task] = llm_adapters.build_task(task, file, config.num_beams, tokens)
        split = "test" if file is None or file.name in llm_adapters.FILES["test"] else "validation"
        plan.facts[task] = {"data": str(path), "split": split}
    for name, files in selected.items():
        if name not in GROUPS:
            continue
        plan.groups[name] = _group(name, [plan.tasks[task] for task in files], by_size=False)
        where = "hub" if data_dir is None else data_dir
        plan.facts[name] = {"data": where, "split": config.split}
        if name in missing:
            plan.facts[name]["missing"] = missing[name]
            if data_dir != BUNDLED_DATA:  # that some members are not bundled is known
                kind = "" if config.split == "any" else f"{config.split} "
                plan.warnings.append(f"{name}: no {kind}data of {', '.join(missing[name])} in '{where}'.")


def _add_harness(plan: Plan, requested: list[str], config: EvalConfig) -> None:
    """lm-eval's own tasks, set up as its `simple_evaluate` does."""
    if not requested:
        return
    from sparseft.evaluation.tasks import task_manager

    for name in requested:
        try:
            loaded = task_manager().load([name.removeprefix(HARNESS)])
        except Exception as error:  # a task file may run anything: data sets, imports, its own code
            raise RunError(
                f"lm-eval's task '{name}' could not be loaded ({type(error).__name__}: {error}). "
                "Its data comes from the Hugging Face hub: is it cached, or the network there?"
            ) from error
        plan.harness_tasks |= loaded["tasks"]
        plan.harness_groups |= loaded.get("groups", {})
    for name, task in plan.harness_tasks.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            what = "runs code that the model writes" if getattr(task, "UNSAFE_CODE", False) else "needs images or audio"
            raise UserError(f"lm-eval's task '{name}' {what}; sparseft does not evaluate such tasks.")
        default = task.get_config("num_fewshot")
        if config.shots is not None and default != 0:  # 0 in the task file means: never with shots
            task.set_config(key="num_fewshot", value=config.shots)
        elif default is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    if config.split == "validation":
        plan.warnings.append(f"eval.split=validation does not apply to lm-eval's own tasks: {', '.join(requested)}.")


def _check_shots(plan: Plan, config: EvalConfig) -> None:
    """Shots that no task takes are the user's mistake; shots that some do not take deserve a word."""
    if not config.shots:
        return
    every = plan.tasks | plan.harness_tasks
    without = [name for name, task in every.items() if task.get_config("num_fewshot") != config.shots]
    if len(without) == len(every):
        raise UserError(f"eval.shots={config.shots}, but {', '.join(plan.requested)} is defined without shots.")
    if without:
        names = ", ".join(without)
        plan.warnings.append(f"eval.shots={config.shots} does not apply to {names}: defined without shots.")

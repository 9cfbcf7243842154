"""One evaluation: names and data become lm-eval tasks (`prepare`), lm-eval runs them on a model (`evaluate`), and what
came of it is completed and written (`conclude`).

    plan = prepare(expand_tasks(["mmlu", "boolq"]), config, data_dir="data")  # reads and checks the data; no model yet
    outcome = evaluate(model, tokenizer, plan)
    conclude(outcome, plan, target, folder)                                   # adapters, runs: `target.find_target`
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from sparseft.config import EvalConfig
from sparseft.errors import RunError, UserError
from sparseft.evaluation import harness, llm_adapters, mmlu, mt_bench, preference, results
from sparseft.evaluation.comparison import compare
from sparseft.evaluation.contamination import annotate
from sparseft.evaluation.llm_adapters import ARITHMETIC, COMMONSENSE, GROUPS
from sparseft.evaluation.mmlu import MMLU, MMLU_CATEGORIES
from sparseft.evaluation.mt_bench import MT_BENCH
from sparseft.evaluation.target import Target
from sparseft.evaluation.tasks import BUNDLED_DATA, HARNESS, PREFERENCE, Plan, expand_tasks, task_manager
from sparseft.files.hashing import adapter_hash
from sparseft.rules import check_fields
from sparseft.runs.environment import package_commit
from sparseft.runs.folder import ADAPTER

APART = (MT_BENCH, PREFERENCE)  # tasks of ours that lm-eval does not run


def prepare(
    tasks: list[str], config: EvalConfig, *, data_dir: str | None, progress: harness.Progress | None = None
) -> Plan:
    """Checks the settings, reads the data of every task and builds the lm-eval tasks.

    Raises UserError for settings out of range, unknown names, and data that is missing or bad.
    """
    check_fields(config, lambda name: f"eval.{name}", typed=True)
    plan = Plan(expand_tasks(tasks, data_dir=data_dir), config, config.prompt)
    with harness.seeded([]), harness.quiet(progress):
        _add_mmlu(plan, [name for name in plan.requested if mmlu.is_mmlu(name, data_dir)], data_dir)
        _add_generated(
            plan, [name for name in plan.requested if name in (*GROUPS, *COMMONSENSE, *ARITHMETIC)], data_dir
        )
        if MT_BENCH in plan.requested:
            plan.questions = mt_bench.read_questions(data_dir)[: config.limit]
        ours = {*plan.tasks, *plan.groups, *APART}
        _add_harness(plan, [name for name in plan.requested if name not in ours])
    _check_shots(plan)
    return plan


def evaluate(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    *,
    max_length: int | None = None,
    progress: harness.Progress | None = None,
) -> dict[str, Any]:
    """Runs the tasks on `model` through lm-eval and returns what came of it.

    `model` is a loaded causal LM of transformers, on its device, plain or with sparse or PEFT layers attached; its
    modes, settings and the random states are left as they were. `plan` is what `prepare` returned, which serves any
    number of evaluations. `max_length` (tokens) bounds the context below the model's own. `progress(what, done, total)`
    is called as requests are answered.

    Returns a dict of plain values:

    - `tasks`: `{name: {"accuracy", "stderr" (float or None), "samples", "shots", "truncated" (prompts that lost their
      beginning to the context), "metrics", …}}`, groups among them: `accuracy` of `mmlu` weights subjects by size, of
      `commonsense` and `arithmetic` it is the mean over the tasks found (`weighting` says which: `questions` or
      `tasks`); `accuracy_macro` and `accuracy_micro` give both; `missing` names members without data.
    - `raw`: lm-eval's results; `samples`: `{task: [one record a question]}`; `versions`, `warnings`, `seconds`.
    """
    config = plan.config
    start = time.perf_counter()
    if plan.questions:
        mt_bench.prompt_of(plan.prompt, tokenizer)  # refused now, not after hours of other tasks
    if PREFERENCE in plan.requested:
        assert plan.pairs is not None
        pairs = preference.held_out(plan.pairs, tokenizer, model, plan.pairs_of)  # likewise
    parts = []
    with harness.undisturbed(model), harness.quiet(progress):
        lm = harness.LanguageModel(model, tokenizer, config.batch_size, max_length)
        for tasks, groups, prefixed in (
            (plan.tasks, plan.groups, False),
            (plan.harness_tasks, plan.harness_groups, True),
        ):
            if tasks:
                lm.plain = not prefixed  # lm-eval's own tasks are asked as lm-eval asks them
                parts.append((harness.run_tasks(lm, tasks, groups, config.limit), prefixed))
        if plan.questions:
            lm.plain = True
            tokens = config.max_new_tokens or mt_bench.MAX_NEW_TOKENS
            conversations = mt_bench.answer(lm, plan.questions, plan.prompt, tokens)
        if PREFERENCE in plan.requested:
            longest = plan.pairs.trainer.max_length
            answered = preference.answer(model, tokenizer, pairs, longest, config.batch_size, config.limit)
    scored = [name for name in plan.requested if name not in APART]
    outcome = results.assemble(parts, scored, plan.facts, lm.truncated, lm.max_length, plan.macro)
    if plan.questions:
        mt_bench.add_to(outcome, results.as_json(conversations))
    if PREFERENCE in plan.requested:
        preference.add_to(outcome, answered, pairs, longest)
    results.arrange(outcome, plan.requested)
    outcome["warnings"] = [*plan.warnings, *outcome["warnings"]]
    outcome["seconds"] = time.perf_counter() - start
    return outcome


def conclude(
    outcome: dict[str, Any], plan: Plan, target: Target, folder: Path, of_base: dict[str, Any] | None = None
) -> list[Path]:
    """Completes an outcome of `evaluate` by the base's results (where it answered too) and by which questions the
    target was trained on, and writes it below `folder`: `eval/<task>.json` and its samples, MT-Bench's answers.

    Returns the paths written.
    """
    if of_base is not None:
        compare(outcome, of_base)
        outcome["seconds"] += of_base["seconds"]
    annotate(outcome, plan, target.seen)
    header = {
        "evaluated": target.what,
        "model": target.model.path,
        "adapter": str(target.adapter) if target.adapter else None,
        "adapter_sha256": adapter_hash(target.adapter or Path(target.model.path)),
        "base": target.base.path if of_base is not None and target.base is not None else None,
        "data_dir": plan.config.data_dir,
        "split": plan.config.split,
        "commit": package_commit(),
        "settings": dataclasses.asdict(plan.config),
    }
    written = results.write_results(folder, outcome, header)
    if MT_BENCH in outcome["samples"]:
        written += _write_conversations(outcome, plan, target, folder, of_base)
    return written


def _write_conversations(
    outcome: dict[str, Any], plan: Plan, target: Target, folder: Path, of_base: dict[str, Any] | None
) -> list[Path]:
    """MT-Bench's answers in FastChat's format, one file a model."""
    place = target.folder or target.adapter
    if place is not None and place.name == ADAPTER:
        place = place.absolute().parent  # every run has an `adapter`: the run folder's name tells them apart
    name = plan.config.model_id or (place.absolute().name if place is not None else Path(target.model.path).name)
    answers = {results.file_stem(name): outcome}
    if of_base is not None and target.base is not None:
        base = results.file_stem(Path(target.base.path).name)
        answers[base if base not in answers else f"{base}-base"] = of_base
    return [
        mt_bench.write_answers(folder, answered["samples"][MT_BENCH], model_id)
        for model_id, answered in answers.items()
    ]


def _add_mmlu(plan: Plan, requested: list[str], data_dir: str | None) -> None:
    if not requested:
        return
    config = plan.config
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
    plan.groups[name] = harness.group_of(name, [plan.tasks[f"{MMLU}_{subject}"] for subject in subjects], by_size=True)


def _add_generated(plan: Plan, requested: list[str], data_dir: str | None) -> None:
    if not requested:
        return
    config = plan.config
    selected: dict[str, dict[str, Any]]  # a file or a hub id of each task
    if data_dir is None:
        selected, missing = llm_adapters.select_sources(requested, config.split)
    else:
        selected, missing = llm_adapters.select_files(requested, config.split, data_dir)
    for task, path in {task: path for files in selected.values() for task, path in files.items()}.items():
        tokens = config.max_new_tokens or llm_adapters.max_new_tokens(task)
        file = path if isinstance(path, Path) else None
        plan.tasks[task] = llm_adapters.build_task(task, file, config.num_beams, tokens)
        split = "test" if file is None or file.name in llm_adapters.FILES["test"] else "validation"
        plan.facts[task] = {"data": str(path), "split": split}
    for name, files in selected.items():
        if name not in GROUPS:
            continue
        plan.groups[name] = harness.group_of(name, [plan.tasks[task] for task in files], by_size=False)
        plan.macro.add(name)
        where = "hub" if data_dir is None else data_dir
        plan.facts[name] = {"data": where, "split": config.split}
        if name in missing:
            plan.facts[name]["missing"] = missing[name]
            if data_dir != BUNDLED_DATA:  # that some members are not bundled is known
                kind = "" if config.split == "any" else f"{config.split} "
                plan.warnings.append(f"{name}: no {kind}data of {', '.join(missing[name])} in '{where}'.")


def _add_harness(plan: Plan, requested: list[str]) -> None:
    """lm-eval's own tasks, set up as its `simple_evaluate` does."""
    if not requested:
        return
    config = plan.config
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
    plan.macro |= {name for name, group in plan.harness_groups.items() if harness.weighs_alike(group)}
    for name, task in plan.harness_tasks.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            what = "runs code that the model writes" if getattr(task, "UNSAFE_CODE", False) else "needs images or audio"
            raise UserError(f"lm-eval's task '{name}' {what}; sparseft does not evaluate such tasks.")
        default = task.get_config("num_fewshot")
        if config.shots is not None and default != 0:  # 0 in the task file means: never with shots
            task.set_config(key="num_fewshot", value=config.shots)
        elif default is None:
            task.set_config(key="num_fewshot", value=0)
    if config.split == "validation":
        plan.warnings.append(f"eval.split=validation does not apply to lm-eval's own tasks: {', '.join(requested)}.")


def _check_shots(plan: Plan) -> None:
    """Shots that no task takes are the user's mistake; shots that some do not take deserve a word."""
    config = plan.config
    if not config.shots:
        return
    every = plan.tasks | plan.harness_tasks
    without = [name for name, task in every.items() if task.get_config("num_fewshot") != config.shots]
    if len(without) == len(every):
        raise UserError(f"eval.shots={config.shots}, but {', '.join(plan.requested)} is defined without shots.")
    if without:
        names = ", ".join(without)
        plan.warnings.append(f"eval.shots={config.shots} does not apply to {names}: defined without shots.")

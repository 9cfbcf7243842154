"""Which test questions were training questions, and the scores without them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sparseft.data.question_hashes import QuestionHashes, test_questions
from sparseft.evaluation.llm_adapters import find_file, read_records
from sparseft.evaluation.run import Plan
from sparseft.evaluation.tasks import ARITHMETIC, COMMONSENSE, HARNESS

COLUMNS = ["task", "questions", "trained on", "accuracy", "accuracy without them"]
OF_BOTH = ["task", "questions", "trained on", "base", "adapter", "base without them", "adapter without them"]


def overlap_of_plan(plan: Plan, seen: QuestionHashes) -> dict[str, tuple[int, int]]:
    """Per task of the plan, the number of its questions that are in `seen`, and of all."""
    found = {}
    for name, task in (plan.tasks | plan.harness_tasks).items():
        questions = [wordings for _, wordings in _questions(task)]
        found[name] = (len(seen.overlap(questions)), len(questions))
    return found


def overlap_of_folder(data_dir: str, seen: QuestionHashes) -> dict[str, tuple[int, int]]:
    """The same of every LLM-Adapters set whose test file is below `data_dir`; nothing of lm-eval is needed for that."""
    found = {}
    for task in (*COMMONSENSE, *ARITHMETIC):
        if (path := find_file(task, "test", data_dir)) is not None:
            questions = [test_questions(record) for record in read_records(path, task)]
            found[task] = (len(seen.overlap(questions)), len(questions))
    return found


def annotate(outcome: dict[str, Any], plan: Plan, seen: QuestionHashes | None) -> None:
    """Adds to an outcome of `evaluate` which questions had been trained on.

    Tasks and groups get `train_overlap` (questions) and `accuracy_without_overlap` (null where no question is left),
    where the base was compared also `base_without_overlap`; samples `train_overlap` (true or false). Nothing is added
    where the training questions are not known.
    """
    if seen is None:
        return
    tasks = outcome["tasks"]
    named = dict(plan.tasks)
    for name, task in plan.harness_tasks.items():
        named[HARNESS + name if HARNESS + name in outcome["samples"] else name] = task
    counted: dict[str, int] = {}  # questions that are left
    for name, records in outcome["samples"].items():
        if name not in named:  # MT-Bench: conversations, without a score
            continue
        trained = set(seen.overlap(wordings for _, wordings in _questions(named[name])))
        metric = (tasks[name]["metric"] or "").partition(",")[0]
        for record in records:
            record["train_overlap"] = record["doc_id"] in trained
        left = [record for record in records if not record["train_overlap"]]
        counted[name] = len(left)
        tasks[name]["train_overlap"] = len(records) - len(left)
        tasks[name]["accuracy_without_overlap"] = _mean([record["metrics"].get(metric) for record in left])
        if "base" in tasks[name]:
            of_base = [record["base"]["metrics"].get(metric) for record in left]
            tasks[name]["base_without_overlap"] = _mean(of_base)
    macro = plan.macro
    for name, leaves in outcome["members"].items():
        if name not in counted and set(leaves) <= counted.keys():
            tasks[name]["train_overlap"] = sum(tasks[leaf]["train_overlap"] for leaf in leaves)
            for key in ("accuracy_without_overlap", "base_without_overlap"):
                scored = [leaf for leaf in leaves if tasks[leaf].get(key) is not None]
                weights = {leaf: 1 if name in macro else counted[leaf] for leaf in scored}
                if key == "accuracy_without_overlap" or "base" in tasks[name]:
                    score = sum(weight * tasks[leaf][key] for leaf, weight in weights.items())
                    tasks[name][key] = score / sum(weights.values()) if weights else None


def _mean(values: list[Any]) -> float | None:
    """The mean; null of nothing, and where a question has no number of its own (a metric of the whole set)."""
    if not values or not all(isinstance(value, int | float) for value in values):
        return None
    return sum(values) / len(values)


def rows(tasks: dict[str, dict[str, Any]]) -> list[list[Any]]:
    """Under COLUMNS, or OF_BOTH where the base was compared, the tasks and groups with questions trained on."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    names = ("base", "accuracy", "base_without_overlap", "accuracy_without_overlap")
    wanted = names if compared(tasks) else names[1::2]
    return [
        [name, entry["samples"], entry["train_overlap"], *(share(entry.get(key)) for key in wanted)]
        for name, entry in tasks.items()
        if entry.get("train_overlap")
    ]


def compared(tasks: dict[str, dict[str, Any]]) -> bool:
    """Whether the base answered the same questions."""
    return any("base_without_overlap" in entry for entry in tasks.values())


def _questions(task: Any) -> Iterator[tuple[int, list[str]]]:
    """Number and wordings of each question of an lm-eval task."""
    for number, doc in enumerate(task.eval_docs):
        yield number, test_questions(doc, task.doc_to_text(doc))

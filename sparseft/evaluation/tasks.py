"""Which tasks there are: our names, how a name is checked, and what an evaluation is made of.

Our `boolq`, `gsm8k`, … are the tasks of the LLM-Adapters protocol (Alpaca prompt, generated answer), not lm-eval's of
the same name; those are reached as `lm_eval:boolq`. Every other name of lm-eval works as it is.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseft.config import BUNDLED, BUNDLED_ROOT, EvalConfig, RunConfig, in_bundle
from sparseft.errors import UserError, nearest
from sparseft.evaluation.llm_adapters import ARITHMETIC, COMMONSENSE, GROUPS
from sparseft.evaluation.mmlu import MMLU, MMLU_CATEGORIES, MMLU_SUBJECTS, is_mmlu, local_subjects
from sparseft.evaluation.mt_bench import MT_BENCH

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

BUNDLED_DATA = str(BUNDLED_ROOT / "data")

PREFERENCE = "preference"  # which answer of a pair is more probable (`preference.py`)
FIXED_BATCH = 8  # for `eval.batch_size=auto` where it cannot be tried out
HARNESS = "lm_eval:"  # before a name: lm-eval's own task, where ours has the same name


def own_names() -> list[str]:
    """Every task and group name that is ours, whatever the data: MMLU's subjects and categories included."""
    names = [MMLU, MT_BENCH, PREFERENCE, *GROUPS, *COMMONSENSE, *ARITHMETIC]
    names += [f"{MMLU}_{category}" for category in MMLU_CATEGORIES]
    return names + [f"{MMLU}_{subject}" for subject in MMLU_SUBJECTS]


@functools.cache
def task_manager() -> Any:
    """lm-eval's index of its own tasks (some seconds, so it is built once, and only when a name needs it)."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def expand_tasks(names: list[str], *, data_dir: str | None = None) -> list[str]:
    """The task names to evaluate, checked, without repetitions, in the order given.

    A comma separates names as well (`boolq,piqa`). Groups stay groups; a tag of lm-eval, which has no result of its
    own, becomes its tasks. `lm_eval:x` loses its prefix where no task of ours has that name. With `data_dir`,
    `mmlu_<subject>` may also be a subject that only this folder has.

    Raises UserError for a name that neither we nor lm-eval have, with the nearest one. Our own names need no import
    of lm-eval.
    """
    words = [word.strip() for name in names for word in str(name).split(",")]
    words = [word for word in words if word]
    if not words:
        raise UserError(f"No task to evaluate was named. {_available()}")
    ours = set(own_names())
    if data_dir is not None and any(word.startswith(f"{MMLU}_") and word not in ours for word in words):
        ours |= {f"{MMLU}_{subject}" for subject in local_subjects(data_dir)}
    expanded: list[str] = []
    for word in words:
        expanded += [word] if word in ours else _from_harness(word, ours)
    return list(dict.fromkeys(expanded))


def judging_task(name: str, data_dir: str | None) -> str:
    """The task of ours that `trainer.eval_task` names, checked. Raises UserError for what cannot choose."""
    asked = f"trainer.eval_task={name}"
    expanded = expand_tasks([name], data_dir=data_dir)
    if len(expanded) != 1:
        raise UserError(f"{asked}: expected one task or group of tasks.")
    task = expanded[0]
    if task == PREFERENCE:
        raise UserError(f"{asked}: a run by preferences (objective=dpo, say) measures margin and accuracy anyway.")
    if task == MT_BENCH:
        raise UserError(f"{asked}: a judge scores its answers elsewhere, so it cannot choose.")
    if task not in (*GROUPS, *COMMONSENSE, *ARITHMETIC) and not is_mmlu(task, data_dir):
        raise UserError(
            f"{asked}: lm-eval's own tasks have no validation split of their own here, and the split that chooses must "
            "not be the one that reports; use mmlu, commonsense, arithmetic or one of their members."
        )
    return task


def _from_harness(word: str, ours: set[str]) -> list[str]:
    name = word.removeprefix(HARNESS)
    manager = task_manager()
    known = manager.task_index
    if name not in known:
        candidates = list(known) if word.startswith(HARNESS) else [*ours, *known]
        hint = nearest(name, candidates)
        # Without a near name `nearest` lists all of them, and lm-eval has more than ten thousand.
        raise UserError(f"Unknown task '{word}'.{hint if 'Did you mean' in hint else ' ' + _available()}")
    found = sorted(known[name].tags) if name in manager.all_tags else [name]
    return [HARNESS + task if task in ours else task for task in found]


def _available() -> str:
    return (
        f"Available: {', '.join([MMLU, *GROUPS])}, their members ({', '.join([*COMMONSENSE, *ARITHMETIC])}, "
        f"{MMLU}_<subject>), {MT_BENCH}, {PREFERENCE}, and every task of lm-eval."
    )


def data_folder(config: EvalConfig, model_path: str) -> str | None:
    """Where the test data are: `eval.data_dir`, for the bundled model the bundled ones; None: on the hub."""
    if config.data_dir is None and model_path.startswith(BUNDLED):
        return BUNDLED_DATA
    if config.data_dir is not None and config.data_dir.startswith(BUNDLED):
        return str(in_bundle(config.data_dir) or config.data_dir)
    return config.data_dir


@dataclass
class Plan:
    """Tasks with their data read and checked, before any model is there; serves any number of evaluations."""

    requested: list[str]
    config: EvalConfig
    prompt: str = "auto"  # how MT-Bench's questions are put: `eval.prompt`, or what a run was trained on
    tasks: dict[str, Task] = field(default_factory=dict)  # ours
    groups: dict[str, Group] = field(default_factory=dict)
    harness_tasks: dict[str, Task] = field(default_factory=dict)  # lm-eval's own, by lm-eval's names
    harness_groups: dict[str, Group] = field(default_factory=dict)
    pairs: RunConfig | None = None  # what says which pairs `preference` asks for
    pairs_of: Path | None = None  # the run whose own training data hold them
    questions: list[dict[str, Any]] = field(default_factory=list)  # of MT-Bench
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)  # to put beside the results of a task or group
    warnings: list[str] = field(default_factory=list)
    macro: set[str] = field(default_factory=set)  # groups whose tasks weigh alike, whatever their sizes

    def digest(self) -> str:
        """What is asked, and what is right, as a hash: of data files that have changed since it is another one."""
        asked = {name: list(task.eval_docs) for name, task in (self.tasks | self.harness_tasks).items()}
        content = json.dumps([asked, self.questions], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:20]

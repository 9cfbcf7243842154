"""`trainer.eval_task`: a task that judges the model while it trains (validation split) and at the end (test split)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.config import BUNDLED, RunConfig
from sparseft.distributed.ranks import is_main
from sparseft.errors import UserError
from sparseft.runs.folder import ADAPTER


class Scorer:
    """Tasks of both splits, read and checked before anything is trained. One split chooses, the other one reports."""

    def __init__(self, config: RunConfig) -> None:
        from sparseft import evaluation

        self.config = config
        self.data_dir = config.eval.data_dir
        if self.data_dir is None and config.model.path.startswith(BUNDLED):
            self.data_dir = evaluation.BUNDLED_DATA
        names = evaluation.expand_tasks([config.trainer.eval_task or ""], data_dir=self.data_dir)
        if len(names) != 1:
            raise UserError(f"trainer.eval_task={config.trainer.eval_task}: expected one task or group of tasks.")
        self.name = names[0]
        if self.name == evaluation.MT_BENCH:
            raise UserError(
                f"trainer.eval_task={self.name}: a judge scores its answers elsewhere, so it cannot choose."
            )
        self.settings = {split: dataclasses.replace(config.eval, split=split) for split in ("validation", "test")}
        self.plans = {
            split: evaluation.prepare([self.name], settings, data_dir=self.data_dir)
            for split, settings in self.settings.items()
        }
        if self.plans["validation"].harness_tasks:
            raise UserError(
                f"trainer.eval_task={self.name}: lm-eval's own tasks have no validation split of their own here, and "
                "the split that chooses must not be the one that reports; use mmlu, commonsense, arithmetic or one of "
                "their members."
            )
        for warning in self.plans["validation"].warnings:
            console.warn(warning)

    def _evaluate(self, model: Any, tokenizer: Any, split: str) -> dict[str, Any]:
        from sparseft import evaluation
        from sparseft.models.decoder import runnable

        with runnable(model):  # before DeepSpeed's engine has it, and where an ended run is only judged
            return evaluation.evaluate(
                model, tokenizer, [self.name], self.settings[split], data_dir=self.data_dir, plan=self.plans[split]
            )

    def on_validation(self, model: Any, tokenizer: Any) -> Callable[[], float]:
        """Measures the accuracy on the validation split, whenever it is called."""
        return lambda: self._evaluate(model, tokenizer, "validation")["tasks"][self.name]["accuracy"]

    def on_test(self, model: Any, tokenizer: Any, folder: Path, what: str) -> float:
        """The accuracy on the test split; writes `eval/<task>.json` into the run's folder, as `sparseft eval` does."""
        from sparseft import evaluation
        from sparseft.adapters.description import adapter_hash
        from sparseft.data.question_hashes import QuestionHashes
        from sparseft.evaluation.contamination import annotate
        from sparseft.runs.environment import package_commit

        outcome = self._evaluate(model, tokenizer, "test")
        score = outcome["tasks"][self.name]["accuracy"]
        if not is_main():  # of a model in shards, which all run
            return score
        annotate(outcome, self.plans["test"], QuestionHashes.load(folder))
        header = {
            "evaluated": what,
            "model": self.config.model.path,
            "adapter": str(folder / ADAPTER),
            "adapter_sha256": adapter_hash(folder / ADAPTER),
            "data_dir": self.config.eval.data_dir,
            "split": "test",
            "commit": package_commit(),
            "settings": dataclasses.asdict(self.settings["test"]),
        }
        evaluation.write_results(folder, outcome, header)
        return score


def contamination(config: RunConfig, data: Any, scorer: Scorer | None) -> dict[str, Any] | None:
    """How many questions of the evaluation data, and of the test sets that the run names, are training questions: those
    of `trainer.eval_task`, else the LLM-Adapters sets in `eval.data_dir`. Warns of the latter, as loading did of the
    former. Null where there is nothing to compare."""
    found: dict[str, Any] = {} if data.eval is None else {"eval_data": data.eval_overlap}
    counted: dict[str, dict[str, tuple[int, int]]] = {}  # by split and task: overlapping, all
    if scorer is not None or config.eval.data_dir is not None:
        from sparseft.evaluation.contamination import overlap_of_folder, overlap_of_plan

        if scorer is not None:
            counted = {split: overlap_of_plan(plan, data.questions) for split, plan in scorer.plans.items()}
        else:
            counted = {"test": overlap_of_folder(str(config.eval.data_dir), data.questions)}
    for split, tasks in counted.items():
        for task, (overlapping, questions) in tasks.items():
            found.setdefault("tasks", {}).setdefault(task, {})[split] = overlapping
            if overlapping:
                console.warn(
                    f"{task}: {overlapping} of {questions} questions of its {split} split are training questions; its "
                    "score says less about new ones"
                )
    return found or None

"""`trainer.eval_task`: a task that judges the model while it trains (validation split) and at the end (test split)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.config import RunConfig
from sparseft.data.question_hashes import QuestionHashes
from sparseft.distributed.ranks import is_main
from sparseft.evaluation.progress import Answers
from sparseft.evaluation.run import conclude, evaluate, prepare
from sparseft.evaluation.target import Target
from sparseft.evaluation.tasks import data_folder, judging_task
from sparseft.models.decoder import runnable
from sparseft.runs.folder import ADAPTER

Score = tuple[float, float | None]  # an accuracy and its standard error, None where there is none


class Scorer:
    """A task of both splits, read and checked before anything is trained. One split chooses, the other one reports."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        data_dir = data_folder(config.eval, config.model.path)
        self.name = judging_task(config.trainer.eval_task or "", data_dir)
        self.plans = {
            split: prepare([self.name], dataclasses.replace(config.eval, split=split), data_dir=data_dir)
            for split in ("validation", "test")
        }
        for warning in self.plans["validation"].warnings:
            console.warn(warning)

    def _evaluate(
        self, model: Any, tokenizer: Any, split: str, leave: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        # Runnable: before DeepSpeed's engine has it, and where an ended run is only judged.
        with Answers(self.name) as answers, runnable(model):

            def progress(what: str, done: int, total: int | None) -> None:
                answers(what, done, total)
                leave()

            return evaluate(model, tokenizer, self.plans[split], progress=progress)

    def _score(self, outcome: dict[str, Any]) -> Score:
        found = outcome["tasks"][self.name]
        return found["accuracy"], found["stderr"]

    def on_validation(self, model: Any, tokenizer: Any) -> Callable[[Callable[[], None]], Score]:
        """Measures the accuracy on the validation split, whenever it is called. What it is called with is called after
        each answer, and may end the measurement by an exception."""
        return lambda leave: self._score(self._evaluate(model, tokenizer, "validation", leave))

    def on_test(self, model: Any, tokenizer: Any, folder: Path) -> Score:
        """The accuracy on the test split; writes `eval/<task>.json` into the run's folder, as `sparseft eval` does."""
        outcome = self._evaluate(model, tokenizer, "test")
        if is_main():  # a model in shards answers in all of them
            seen = QuestionHashes.load(folder)
            target = Target(f"the run {folder}", self.config.model, folder / ADAPTER, folder, seen=seen)
            conclude(outcome, self.plans["test"], target, folder)
        return self._score(outcome)

"""The best evaluation of a run: its adapter is kept in `checkpoints/.best/` and is the one that is left at the end.

Checkpoints carry a copy, so that a resumed run knows the best up to where it goes on, not one from its lost future.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers

from sparseft import console
from sparseft.distributed.ranks import broadcast_object, is_main, shared_aside
from sparseft.errors import UserError
from sparseft.files.atomic import publish, write_json
from sparseft.files.untrusted import read_json_object
from sparseft.runs.folder import ADAPTER, BEST, BEST_NOTE, METRICS
from sparseft.runs.metrics import read_metrics
from sparseft.training.checkpoints import load_trained


@dataclass
class Evaluation:
    """One evaluation: by score (the higher the better) where there is one, else by loss (the lower the better)."""

    step: int
    eval_loss: float
    eval_score: float | None = None

    def better_than(self, other: Evaluation | None) -> bool:
        """Of two that are equal the earlier one stays."""
        if other is None:
            return True
        if self.eval_score is not None and other.eval_score is not None:
            return self.eval_score > other.eval_score
        return self.eval_loss < other.eval_loss or (math.isnan(other.eval_loss) and not math.isnan(self.eval_loss))


def evaluations(folder: Path, steps: range, averaged: bool = False) -> list[Evaluation]:
    """Those in `metrics.jsonl` at `steps`, in order: of what trained, or of its mean (`averaged`)."""
    found: dict[int, Evaluation] = {}  # a run that was continued may have evaluated a step twice
    for line in read_metrics(folder / METRICS):
        if bool(line.get("averaged")) is not averaged:
            continue
        if line.get("step") in steps and isinstance(line.get("eval_loss"), (int, float)):
            found[line["step"]] = Evaluation(line["step"], line["eval_loss"], line.get("eval_score"))
    return list(found.values())


def without_a_better(seen: Sequence[Evaluation]) -> int:
    """How many evaluations there were since the best one."""
    best, since = None, 0
    for evaluation in seen:
        better = evaluation.better_than(best)
        best, since = (evaluation, 0) if better else (best, since + 1)
    return since


def read_best(folder: Path) -> Evaluation | None:
    """What the folder of a best adapter says of its evaluation; None where there is none."""
    path = folder / BEST / BEST_NOTE
    if not path.is_file():
        return None
    content = read_json_object(path)
    step, loss, score = (content.get(name) for name in ("step", "eval_loss", "eval_score"))
    if type(step) is not int or not isinstance(loss, (int, float)) or not isinstance(score, (int, float, type(None))):
        raise UserError(f"'{path}' is no note of an evaluation: expected step, eval_loss and eval_score.")
    return Evaluation(step, loss, score)


def copy_best(source: Path, target: Path) -> None:
    """Makes `target/.best` what `source/.best` is, also where that is nothing; files are linked where they can be."""
    shutil.rmtree(target / BEST, ignore_errors=True)
    if (source / BEST).is_dir():
        shutil.copytree(source / BEST, target / BEST, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)  # adapters are written aside and renamed, never changed in place
    except OSError:
        shutil.copy2(source, target)


class Best(transformers.TrainerCallback):
    """Keeps the adapter of the best evaluation, and ends the training once one reaches `target_score`, or `patience` of
    them in a row were no better than the best before.

    folder: the run's `checkpoints/`. save(path): writes what is trained as it is now; None: the best is not kept.
    from_step: evaluations of earlier steps do not count.
    """

    def __init__(
        self,
        folder: Path,
        save: Callable[[Path], None] | None,
        *,
        from_step: int = 1,
        target_score: float | None = None,
        patience: int | None = None,
    ) -> None:
        self.folder, self.save, self.from_step = folder, save, max(1, from_step)
        self.target_score, self.patience = target_score, patience
        self.seen: list[Evaluation] = []  # that count

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        before = range(self.from_step, state.global_step + 1)
        self.seen = broadcast_object(evaluations(self.folder.parent, before) if is_main() else [])

    def on_step_end(self, args, state, control, **kwargs) -> None:
        # An evaluation that ends the training comes after the step's line of metrics, and before the checkpoint.
        if control.should_evaluate and (self.target_score is not None or self.patience is not None):
            control.should_log = True

    def on_evaluate(self, args, state, control, metrics: Any = None, **kwargs) -> None:
        seen = Evaluation(state.global_step, metrics["eval_loss"], metrics.get("eval_score"))
        if seen.step == 0:
            return
        counts = self.save is not None and seen.step >= self.from_step
        if counts and broadcast_object(is_main() and seen.better_than(self._kept())):
            self._keep(seen)
        if reached(self.target_score, seen.eval_score) and seen.step < state.max_steps:
            console.log(f"step {seen.step}: score {seen.eval_score:.4f} reaches trainer.target_score, so training ends")
            control.should_save = control.should_training_stop = True
        if seen.step >= self.from_step:
            self.seen.append(seen)
        if self.patience is not None and without_a_better(self.seen) >= self.patience and seen.step < state.max_steps:
            console.log(f"step {seen.step}: no better evaluation in the last {self.patience}, so training ends")
            control.should_save = control.should_training_stop = True

    def _kept(self) -> Evaluation | None:
        """The best so far, if it counts: that of a run that was shorter may be of too early a step."""
        best = read_best(self.folder)
        return best if best is not None and best.step >= self.from_step else None

    def _keep(self, seen: Evaluation) -> None:
        with shared_aside(self.folder / BEST) as aside:
            self.save(aside)
            if is_main():
                write_json(aside / BEST_NOTE, asdict(seen))
                publish(aside, self.folder / BEST)

    def take(self, model: Any) -> Evaluation | None:
        """Puts the best adapter into the model; None (and nothing done) where none was kept."""
        best = broadcast_object(self._kept() if is_main() else None) if self.save is not None else None
        if best is not None:
            load_trained(model, self.folder / BEST / ADAPTER)
        return best


def reached(target: float | None, score: float | None) -> bool:
    """Whether a score is what `trainer.target_score` asks for."""
    return target is not None and score is not None and score >= target

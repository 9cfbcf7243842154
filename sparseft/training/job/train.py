"""The fourth step of a run: measuring, and training in the run's folder."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import transformers

from sparseft import console
from sparseft.data.packing import Collator
from sparseft.distributed import ranks
from sparseft.selection.picture import draw_shares, trained_shares
from sparseft.training.average import Average
from sparseft.training.best import Best, Evaluation, evaluations, reached, without_a_better
from sparseft.training.checkpoints import CHECKPOINTS
from sparseft.training.job.attach import loss_options
from sparseft.training.job.job import Job, Trained
from sparseft.training.reselection.way import reselecting
from sparseft.training.sample_answers import SampleAnswers
from sparseft.training.trackers import Trackers
from sparseft.training.trainer import Trainer
from sparseft.training.trainer import train as run_loop


def train(job: Job, folder: Path, trackers: Trackers) -> Trained:
    """Measures, and trains in the run's folder."""
    config, prepared = job.config, job.prepared
    picture(job, trackers, job.previous.step if job.previous else 0, trackers.new)
    trainer = _trainer(job, folder, trackers)
    average = None
    if config.trainer.average is not None:
        average = Average(config.trainer.average, prepared.model, job.total_steps, job.resumed_from)
        trainer.add_callback(average)
    if config.method.reselect_steps:
        job.reselection = reselecting(
            config.method, prepared, job.spec, trainer,
            ended_at=job.previous.ended_at if job.previous else None, resumed=job.resumed_from,
        )  # fmt: skip
        trainer.add_callback(job.reselection)
    best = Best(
        folder / CHECKPOINTS,
        (lambda path: trainer.save_model(str(path))) if config.trainer.keep_best else None,
        from_step=best_from(job),
        target_score=config.trainer.target_score,
        patience=config.trainer.patience,
    )
    trainer.add_callback(best)
    samples = None
    if job.asked is not None:
        samples = SampleAnswers(
            job.asked, trainer, prepared.model, prepared.pad, config.trainer.sample_steps,
            lambda rows, step: trackers.table("samples", rows, step),
        )  # fmt: skip
        trainer.add_callback(samples)
        samples.base()
    before = evaluation(job, trainer, 0, "before")
    if job.resumed_from is not None and _is_evaluated_late(job, folder):
        trainer.make_up(job.resumed_from)
    transformers.set_seed(config.seed)  # whatever was drawn before, as by an evaluation, training starts the same
    totals = run_loop(trainer, job.resumed_from, _last_step(job, folder))
    if average is not None:
        trainer.run_state.averaged = average.take()
    if samples is not None:
        samples.adapter(totals.step, anew=average is not None)  # one that ended early has asked too soon
    return Trained(trainer, best, before, totals)


def _trainer(job: Job, folder: Path, trackers: Trackers) -> Trainer:
    config, prepared = job.config, job.prepared
    options: dict[str, Any] = {
        "run": folder,
        "save_total_limit": config.trainer.save_total_limit,
        "max_bad_steps": config.trainer.max_bad_steps,
        "score": job.scorer.on_validation(prepared.model, prepared.tokenizer) if job.scorer else None,
        "report": trackers.log,
    }
    if config.by_preference:
        from sparseft.training.preference.trainer import make_trainer  # brings TRL, seconds that others need not wait

        return make_trainer(
            config, prepared.model, job.arguments, prepared.data, prepared.tokenizer, prepared.pad, **options
        )
    return Trainer(
        prepared.model,
        job.arguments,
        train_dataset=prepared.rows,
        eval_dataset=prepared.data.eval,
        compile_layers=config.trainer.compile == "layers",
        data_collator=Collator(prepared.pad, config.trainer.max_length if config.trainer.pad_to == "max_length" else 0),
        processing_class=None,
        **loss_options(job),
        **options,
    )


def picture(job: Job, trackers: Trackers, step: int, only: Collection[str] | None = None) -> None:
    """Shows trackers (None: all) what trains; where nothing is chosen there is nothing to see."""
    if (trackers.opened if only is None else only) and not job.method.trains_all:
        trackers.picture("selection", draw_shares(trained_shares(job.prepared.model, job.spec)), step, only)


def best_from(job: Job) -> int:
    """The first step whose evaluation may be the best."""
    return max(1, math.ceil(job.config.trainer.best_after * job.total_steps))


def _is_evaluated_late(job: Job, folder: Path) -> bool:
    """Whether the step that is gone on from was to be evaluated, but for an interrupt."""
    step, every = job.previous.step, job.config.trainer.eval_steps
    return bool(every) and 0 < step < job.total_steps and step % every == 0 and first_recorded(folder, step) is None


def _last_step(job: Job, folder: Path) -> int:
    """Where training ends: also where a run that is continued has reached its target, or lost its patience, before."""
    settings = job.config.trainer
    step = job.previous.step if job.previous else -1
    seen = first_recorded(folder, step) if step > 0 else None
    if seen is None:
        return job.total_steps
    counted = ranks.broadcast_object(evaluations(folder, range(best_from(job), step + 1)) if ranks.is_main() else [])
    impatient = settings.patience is not None and without_a_better(counted) >= settings.patience
    return step if impatient or reached(settings.target_score, seen.eval_score) else job.total_steps


def evaluation(job: Job, trainer: Trainer, step: int, when: str) -> Evaluation | None:
    """The evaluation of the model as it is, at the present step: as recorded where it was measured there, else measured
    now, and said. None where there is nothing held out, or none is asked for."""
    if job.prepared.data.eval is None or job.config.trainer.eval_steps == 0:
        return None
    folder, averaged = trainer.run_state.folder, trainer.run_state.averaged
    seen = first_recorded(folder, step, averaged)
    if seen is None:
        trainer.evaluate()
        seen = first_recorded(folder, step, averaged)
        _say(job, when, seen)
    return seen


def first_recorded(folder: Path, step: int, averaged: bool = False) -> Evaluation | None:
    """The last evaluation at `step` of `evaluations`, None where there was none; as the process finds it that writes
    the file."""
    there = evaluations(folder, range(step, step + 1), averaged) if ranks.is_main() else []
    return ranks.broadcast_object(there[0] if there else None)


def _say(job: Job, when: str, seen: Evaluation | None) -> None:
    if seen is not None:
        where = f", on {job.prepared.data.eval_source}" if when == "before" else ""
        console.log(f"eval loss {when}: {seen.eval_loss:.4f}{where}")
        if job.scorer is not None:
            console.log(f"{job.scorer.name} {when}: {seen.eval_score:.4f} on the validation split")

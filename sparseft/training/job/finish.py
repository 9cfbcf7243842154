"""The last step of a run: measured again, with its adapter and its summary left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.distributed import ranks
from sparseft.files.atomic import remove, write_json
from sparseft.memory import memory_bytes
from sparseft.runs.folder import ADAPTER, METRICS, SUMMARY, UNTRIMMED
from sparseft.runs.metrics import read_metrics, step_of
from sparseft.training.best import Evaluation
from sparseft.training.job.job import Job, Trained
from sparseft.training.job.train import evaluation, picture
from sparseft.training.trackers import Trackers

# What a run by preferences says of itself, and what TRL calls it.
PREFERENCES = {"accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins"}


def finish(job: Job, trained: Trained, trackers: Trackers) -> dict[str, Any]:
    """Measures again, leaves the adapter (the best one where it was kept) and the summary, which it returns."""
    config, prepared, trainer = job.config, job.prepared, trained.trainer
    folder = trainer.run_state.folder
    after = evaluation(job, trainer, trained.totals.step, "after")
    kept = trained.best.take(prepared.model)
    if kept is not None:
        console.log(f"best: the evaluation at step {kept.step}, whose adapter is kept")
        after = kept
    trainer.save_trained(folder / ADAPTER)
    first = ranks.is_main()
    if first and (folder / UNTRIMMED).is_dir():  # of a run that was trimmed and then went on: what it was cut from
        remove(folder / UNTRIMMED)
    if job.method.trains_all and first:
        prepared.tokenizer.save_pretrained(folder / ADAPTER)
    scores: dict[str, Any] = {}
    if job.scorer is not None:
        measured = None
        if first or config.hardware.in_shards:
            measured = job.scorer.on_test(prepared.model, prepared.tokenizer, folder)
        test_score, stderr = ranks.broadcast_object(measured)  # each machine says what came of the run
        scores = {
            "eval_task": job.scorer.name,
            "eval_score_before": trained.before.eval_score,
            "eval_score_after": after.eval_score,
            "test_score": test_score,
            "test_score_stderr": stderr,
        }
    summary = _summary(job, trained, after) | ({"best_step": kept.step} if kept else {})
    if config.by_preference and first:
        steps = (each.step if each else None for each in (trained.before, after))
        summary |= _of_preferences(folder, *steps)
    summary |= ({"bad_steps": trained.totals.bad} if trained.totals.bad else {}) | scores
    if spikes := trainer.run_state.spikes.count:
        summary["loss_spikes"] = spikes
    if first:
        write_json(folder / SUMMARY, summary)
    if config.method.reselect_steps:
        picture(job, trackers, trained.totals.step)
    trackers.summary(summary)
    return summary


def _of_preferences(folder: Path, before: int | None, after: int | None) -> dict[str, Any]:
    """Accuracy and margin on held-out data at two steps, as the last evaluations there have them; None where there are
    none (of `kto` there is no accuracy: its answers are no pairs)."""
    lines = read_metrics(folder / METRICS)
    found: dict[str, Any] = {}
    for when, step in (("before", before), ("after", after)):
        there = [line for line in lines if step is not None and step_of(line) == step and "eval_loss" in line]
        for name, key in PREFERENCES.items():
            found[f"eval_{name}_{when}"] = there[-1].get(key) if there else None
    return found


def _summary(job: Job, trained: Trained, after: Evaluation | None) -> dict[str, Any]:
    config, done, before = job.config, trained.totals, trained.before
    scope = job.spec.weights_in(config.method.scope)
    return {
        "method": config.method_name,
        "model": config.model.path,
        "dataset": config.dataset.title,
        "objective": config.objective,
        "sparsity": None if job.method.trains_all else 1 - job.trainable / scope,
        "scope": config.method.scope,
        "trainable_parameters": job.trainable,
        "scope_parameters": scope,
        "total_parameters": job.spec.total_parameters,
        "predicted_floors": job.floors,
        "export_rank": None if config.method.reselect_steps else job.export_rank,
        "steps": done.step,
        "tokens": done.tokens,
        "train_seconds": done.seconds,
        "tokens_per_second": done.tokens / done.seconds if done.seconds > 0 else None,
        "peak_memory_bytes": memory_bytes(job.prepared.device, peak=True),
        "train_loss": done.loss / (done.step - done.bad) if done.bad < done.step else None,
        "eval_loss_before": before.eval_loss if before else None,
        "eval_loss_after": after.eval_loss if after else None,
        "seed": config.seed,
        "learning_rate": job.learning_rate,
        "learning_rate_seconds": job.found.seconds if job.found else None,
        "selection_cached": job.selection_cached,
        "selection_seconds": job.selection_seconds,
        "reselection_seconds": job.reselection.seconds if job.reselection else None,
        "method_config": job.method_config,
        "contamination": job.contamination,
        "warnings": console.recorded_warnings(),
    }

"""A run's folder, as it is when training begins."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from sparseft import console
from sparseft.compose.run_config import to_yaml
from sparseft.distributed import ranks
from sparseft.errors import UserError
from sparseft.files.atomic import explained, write_json, write_text
from sparseft.runs.environment import environment
from sparseft.runs.folder import (
    CONFIG,
    ENVIRONMENT,
    METRICS,
    RATE,
    SAMPLES,
    SELECTION,
    is_run,
    link_latest,
    prepare_run_folder,
)
from sparseft.runs.lock import Lock
from sparseft.runs.metrics import truncate_metrics
from sparseft.training import resume as resuming
from sparseft.training.checkpoints import last_checkpoint
from sparseft.training.job.job import Job


def open_folder(job: Job, lock: Lock) -> Path:
    """The run's folder, locked, which says what the run is; of one that is continued, without what its last checkpoint
    does not know of."""
    return ranks.from_main(lambda: _open(job, lock))


def _open(job: Job, lock: Lock) -> Path:
    config, previous = job.config, job.previous
    resume = config.trainer.resume is not None

    def hold(run: Path) -> None:
        lock.take(run)
        if resume and previous is None and is_run(run):
            raise UserError(
                f"another job has begun a run in output_dir '{run}' meanwhile: give the same command again to go on "
                "with it."
            )

    folder = prepare_run_folder(
        config.output_dir,
        config.method_name,
        config.dataset.name,
        overwrite=config.overwrite,
        resume=resume,
        hold=hold,
    )
    config.output_dir = str(folder)
    link_latest(folder)
    with explained(f"the run in '{folder}'", lambda: last_checkpoint(folder)):
        _describe(job, folder)
    console.log(f"run: {folder}")
    if previous is not None:
        resuming.clean(previous, config.trainer.save_total_limit)
        truncate_metrics(folder / METRICS, previous.step)
        truncate_metrics(folder / SAMPLES, previous.step)
        console.log(f"resume: {previous.describe(job.total_steps)}")
    return folder


def _describe(job: Job, folder: Path) -> None:
    """Writes what the run is into its folder: `config.yaml`, `environment.json`, `selection/`, its questions."""
    data = job.prepared.data
    facts = {
        "train": data.train_source,
        "sources": data.sources,
        "eval": data.eval_source or None,
        "format": data.format,
        "examples": len(data.preferences or data.train),
        "rows": len(job.prepared.rows),
        "tokens": sum(part.num_tokens for part in data.trained),
        "fingerprint": data.fingerprint,
    }
    dtype, world = str(job.dtype).removeprefix("torch."), ranks.rank_and_world()[1]
    known = environment(str(job.prepared.device), dtype, world)
    if job.prepared.device.type == "cuda":
        known["device_name"] = torch.cuda.get_device_name(job.prepared.device)
    # As an experiment it is to make a run of its own, not to replace this one or to go on with it.
    trainer = dataclasses.replace(job.config.trainer, resume=None)
    repeated = dataclasses.replace(job.config, overwrite=False, trainer=trainer)
    # One right after the other: by both together a run that is continued knows in how many processes it was started.
    write_text(folder / CONFIG, to_yaml(repeated))
    write_json(folder / ENVIRONMENT, known | {"data": facts})
    if job.selection is not None and job.resumed_from is None:
        job.selection.save(folder / SELECTION)
    data.questions.save(folder)
    if job.found is not None:
        write_json(folder / RATE, dataclasses.asdict(job.found))

"""One training run, in five steps over one `Job`: set up, select, attach, train, finish.

Nothing is written before all is checked, loaded and attached, so that a wrong setting leaves nothing behind. Of several
processes each does its part, and the first one writes the run's folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparseft.config import RunConfig
from sparseft.distributed import ranks
from sparseft.distributed.deepspeed import forget_zero
from sparseft.files.atomic import explained
from sparseft.runs.folder import is_run
from sparseft.runs.lock import Lock
from sparseft.training import resume as resuming
from sparseft.training.checkpoints import last_checkpoint
from sparseft.training.job.attach import attach, select
from sparseft.training.job.finish import finish
from sparseft.training.job.folder import open_folder
from sparseft.training.job.set_up import set_up
from sparseft.training.job.train import train
from sparseft.training.trackers import tracked


def run(config: RunConfig, lock: Lock) -> dict[str, Any]:
    """The run, in this process; returns its summary and its folder, which `lock` holds from then on."""
    forget_zero()  # of an earlier run

    def look() -> resuming.Previous | None:
        if config.output_dir is not None and is_run(there := Path(config.output_dir).expanduser()):
            lock.take(there)  # before its checkpoints are judged: one that another job goes on from, or writes
        return resuming.previous_run(config)

    previous = ranks.from_main(look)
    job = set_up(config, previous)
    select(job)
    attach(job)
    folder = open_folder(job, lock)
    with explained(f"the run in '{folder}'", lambda: last_checkpoint(folder)):
        step = max(0, job.previous.step) if job.previous else None
        with tracked(config, job.arguments, job.prepared.model, folder, step) as trackers:
            summary = finish(job, train(job, folder, trackers), trackers)
    return summary | {"run": str(folder)}

"""One of the processes that `launch.run` starts, in which something fails: in `sparseft.cli.worker`'s place.

    SPARSEFT_FAILING='{"what": …, "rank": 0 | 1 | null for all, …}' python -m support.failing_worker FOLDER

Leaves its process id as `pid-RANK` in the working directory.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sparseft.cli import worker as cli_worker
from sparseft.distributed import ranks
from sparseft.selection import selection
from sparseft.training import trainer


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Inside, no file grows beyond `limit` bytes: the kernel's limit stands for the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def within(owner: Any, name: str, limit: int, when: Callable[..., bool] = lambda *_: True) -> None:
    """The disk is full while `owner.name` runs, where `when` says so of its arguments."""
    plain = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        with small_files(limit) if when(*args) else contextlib.nullcontext():
            return plain(*args, **options)

    setattr(owner, name, call)


def checkpoint(limit: int) -> None:
    """The disk is full when the second checkpoint is written."""
    within(trainer.Trainer, "_save_aside", limit, lambda self, *_: self.state.global_step > 2)


def adapter(limit: int) -> None:
    """The disk is full when the finished adapter is written."""
    within(trainer.Trainer, "save_trained", limit, lambda self, folder: folder == self.run_state.folder / "adapter")


def cached(limit: int) -> None:
    """The disk is full when the selection is cached."""
    within(selection.Selection, "save", limit)


def read_only() -> None:
    """The folder of the checkpoints cannot be written any more."""

    def refused(path: Path) -> Path:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path.parent))

    plain, writable = trainer.Trainer._save_aside, ranks.new_aside

    def save(self: Any, *args: Any) -> None:
        ranks.new_aside = refused if self.state.global_step > 2 else writable
        plain(self, *args)

    trainer.Trainer._save_aside = save  # type: ignore[method-assign]


def memory() -> None:
    """The device has no room for the fourth step."""
    plain = trainer.Trainer.compute_loss

    def compute_loss(self: Any, *args: Any, **options: Any) -> Any:
        if self.state.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return plain(self, *args, **options)

    trainer.Trainer.compute_loss = compute_loss  # type: ignore[method-assign]


def nan() -> None:
    """The loss is no number from the fourth step on."""
    plain = trainer.Trainer.compute_loss

    def compute_loss(self: Any, model: Any, *args: Any, **options: Any) -> Any:
        loss = plain(self, model, *args, **options)
        return loss * float("nan") if self.state.global_step >= 3 and model.training else loss

    trainer.Trainer.compute_loss = compute_loss  # type: ignore[method-assign]


def slow() -> None:
    """Calibration saves its state after every sample and every linear, says where it is, and takes its time."""
    from sparseft.importance import calibration as resuming
    from sparseft.importance import scores

    resuming.SAVE_SECONDS = resuming.SAVE_COST = 0.0
    scores.TOKENS_TOGETHER = 1
    saved, written, count = resuming.CalibrationState.save, selection.Selection.save, {"statistics": 0, "scores": 0}

    def say(text: str) -> None:
        print(f"{text} in {os.environ['RANK']}", file=sys.stderr, flush=True)
        time.sleep(0.4)

    def save(self: Any, name: str, *args: Any) -> None:
        saved(self, name, *args)
        count[name] += 1
        say(f"{name} {count[name]}")

    def write(self: Any, *args: Any) -> None:
        say("writing")
        written(self, *args)

    resuming.CalibrationState.save = save  # type: ignore[method-assign]
    selection.Selection.save = write  # type: ignore[method-assign]


if __name__ == "__main__":
    failing = json.loads(os.environ["SPARSEFT_FAILING"])
    what, at = failing.pop("what"), failing.pop("rank")
    rank = int(os.environ["RANK"])
    Path(f"pid-{rank}").write_text(str(os.getpid()))
    if at in (rank, None):
        globals()[what](**failing)
    raise SystemExit(cli_worker.main(Path(sys.argv[1])))

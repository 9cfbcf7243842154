"""Continuing a run: what must be as it was, and where to go on."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseft.compose.run_config import from_dict
from sparseft.config import RunConfig, TrainerConfig, flatten
from sparseft.distributed.env import processes
from sparseft.errors import UserError
from sparseft.files.atomic import publish
from sparseft.files.untrusted import read_json, read_json_object, read_yaml_object
from sparseft.rules import show
from sparseft.runs.folder import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    DAMAGED,
    ENVIRONMENT,
    SUMMARY,
    check_own,
    check_trained_on,
    checkpoint_name,
    delete_leftovers,
    is_run,
)
from sparseft.training.checkpoints import STATE, checkpoint_steps, good_checkpoint, prune, step_of

# Settings that a run may be continued with other values of; all others decide what it trains, on what and how, and
# a checkpoint would silently keep the old ones or mix both. With more steps the learning rate goes on as a run of that
# many steps has it there; of a run's rates nothing else can change (learning_rate, scheduler, warmup_steps, …).
FREE = {
    *("output_dir", "overwrite", "cache_dir", "hardware", "eval", "chat", "bench"),
    *(f"trainer.{name}" for name in "max_steps num_epochs logging_steps eval_steps save_steps max_bad_steps".split()),
    *(f"trainer.{name}" for name in "save_total_limit resume target_score patience".split()),
    *(f"trainer.{name}" for name in "compile pad_to checkpointing".split()),
    *(f"trainer.{name}" for name in "report_to sample_prompts sample_steps forget_budget forget_source".split()),
}

PROCESSES = "hardware.num_processes"  # in what is compared here: all processes, of all machines
PIECES = ("trainer.batch_size", "trainer.gradient_accumulation", PROCESSES)  # what counts is their product


@dataclass
class Previous:
    """The run that is continued."""

    folder: Path
    checkpoint: str | None  # None: none was written, so the run starts anew in its folder

    @property
    def step(self) -> int:
        """The optimizer step to go on from; -1: none, so that all lines of metrics are dropped."""
        return step_of(self.checkpoint)

    @property
    def total_steps(self) -> int | None:
        """The steps that the run was to have in all when its checkpoint was saved."""
        if self.checkpoint is None:
            return None
        return read_json(Path(self.checkpoint) / STATE, numbers=False).get("max_steps")

    @property
    def ended_at(self) -> int | None:
        """The checkpoint's step if that was to be the run's last one, else None."""
        return self.step if self.total_steps == self.step else None

    def check_steps(self, trainer: TrainerConfig, total_steps: int) -> None:
        """Refuses to go on with fewer steps than are trained already."""
        if self.step > total_steps:
            name = "max_steps" if trainer.max_steps > 0 else "num_epochs"
            raise UserError(
                f"trainer.{name}={show(getattr(trainer, name))}: the run in '{self.folder}' has already trained "
                f"{self.step} steps, more than {total_steps}; give trainer.max_steps={self.step} to end it there, "
                "more to go on, or another output_dir."
            )

    def describe(self, total_steps: int) -> str:
        """Where a run of so many steps goes on."""
        if self.checkpoint is None:
            return "no checkpoint yet, so from the beginning"
        if self.step == total_steps:
            return f"{self.checkpoint}, already trained {total_steps} of {total_steps} steps: nothing is left to train"
        if self.total_steps == total_steps:
            return self.checkpoint
        return (
            f"{self.checkpoint}, to {total_steps} steps instead of {self.total_steps}: the learning rate goes on as a "
            f"run of {total_steps} steps has it there"
        )

    def check_data(self, fingerprint: str, source: str) -> None:
        """Refuses other training examples, read from `source`, than the run's own."""
        if self.checkpoint:
            otherwise = "Give the same data, or start anew in another output_dir."
            check_trained_on(self.folder, fingerprint, source, otherwise)


def previous_run(config: RunConfig) -> Previous | None:
    """The run that `trainer.resume=auto` continues, or None where none is asked for or the folder holds none yet.

    Raises UserError where the run was started with other settings than `config`'s.
    """
    if config.trainer.resume is None or config.output_dir is None:
        return None
    folder = Path(config.output_dir).expanduser()
    if not is_run(folder):
        return None
    check_own(folder)
    previous = Previous(folder, good_checkpoint(folder))
    if previous.checkpoint is None and (folder / SUMMARY).is_file():
        raise UserError(
            f"the run in '{folder}' has finished, and left no checkpoint to go on from: give another output_dir, or "
            "overwrite=true without trainer.resume to replace it."
        )
    if previous.checkpoint is not None:
        own = _settings_of(config, folder)
        if config.dataset.chat_date is None:
            config.dataset.chat_date = own.dataset.chat_date  # the day that its examples were written on
        _check_same(config, own, folder)
        if config.trainer.max_steps > 0:  # else the data say how many; `job.set_up` asks again
            previous.check_steps(config.trainer, config.trainer.max_steps)
    return previous


def clean(previous: Previous, save_total_limit: int | None) -> None:
    """Removes what a crash left: files that were being written, checkpoints beyond the limit, and a best adapter that
    none of them knows. The damaged checkpoints that were passed over are moved aside: no message names them as good."""
    folder = previous.folder / CHECKPOINTS
    if previous.checkpoint is None:
        shutil.rmtree(folder / BEST, ignore_errors=True)
    delete_leftovers(previous.folder)
    for step in checkpoint_steps(folder):
        if step > previous.step:
            name = checkpoint_name(step)
            publish(folder / name, folder / f"{DAMAGED}{name}", sync=False)
    prune(folder, save_total_limit, previous.step)


def _settings_of(config: RunConfig, folder: Path) -> RunConfig:
    """Those that the run was started with."""
    content = read_yaml_object(folder / CONFIG)
    method = content.get("method")
    if isinstance(method, dict) and method.get("reselect_steps"):
        content["method"] = config.method.unnamed | method
    return from_dict(content)


def _check_same(config: RunConfig, own: RunConfig, folder: Path) -> None:
    old = own.to_dict()
    then, now = flatten(old), flatten(config.to_dict())
    then[PROCESSES], now[PROCESSES] = _processes(folder, old), processes(config.hardware)
    # What DeepSpeed has sharded, only as many processes at the same stage can put together again.
    fixed = {"hardware.zero_stage"} | ({PROCESSES} if config.hardware.zero_stage else set())
    if _examples(then) == _examples(now):  # cut into other pieces, as after running out of memory
        then |= {key: now[key] for key in PIECES if key not in fixed}
    elif then[PROCESSES] != now[PROCESSES]:
        raise UserError(
            f"a step would be {_examples(now)} examples in {now[PROCESSES]} processes, and the run in '{folder}' was "
            f"started with {_examples(then)} in {then[PROCESSES]}: give as many processes, or a "
            "trainer.gradient_accumulation that makes up for them."
        )
    labels = {"dataset.name"} if now["dataset.train_path"] or now["dataset.mix"] else set()  # else it says which data
    once = {f"method.{name}": value for name, value in config.method.once_default.items()}
    for key in [*then, *(key for key in now if key not in then)]:
        free = key in FREE | labels or key.split(".")[0] in FREE
        if (free and key not in fixed) or then.get(key) == now.get(key):
            continue
        if now.get(key) is None and key in once and then.get(key) == once[key]:
            continue
        raise UserError(
            f"{key}={show(now.get(key))}: the run in '{folder}' was started with {show(then.get(key))}, and a run "
            "is continued with the settings that it was started with; give that, or another output_dir."
        )


def _processes(folder: Path, old: dict[str, Any]) -> int:
    """In how many processes a run was started: a launcher may have started more than its settings say."""
    path = folder / ENVIRONMENT
    known = read_json_object(path).get("world_size") if path.is_file() else None
    return known if type(known) is int else old["hardware"]["num_processes"] * old["hardware"]["num_machines"]


def _examples(flat: dict[str, Any]) -> int:
    """Examples of an optimizer step."""
    return math.prod(flat[key] for key in PIECES)

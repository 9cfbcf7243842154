"""A run's checkpoints: which there are, which are whole, how one is put in its place, and how an attached model takes
up what one of them trained.

A checkpoint is written into a folder aside, described there (`manifest.json`: every file's size and hash), and renamed.
"""

from __future__ import annotations

import contextlib
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparseft import console
from sparseft.adapters import lifecycle
from sparseft.distributed.shards import shard_of
from sparseft.errors import UserError, reason_of, shown
from sparseft.files.atomic import remove, write_json
from sparseft.files.hashing import file_hash
from sparseft.files.untrusted import read_json, read_json_object, why
from sparseft.runs.folder import CHECKPOINT, CHECKPOINTS, checkpoint_name
from sparseft.training.failures import out_of_memory
from sparseft.training.reselection.swap import load_active

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
OWN_STATE = "RunCallback"  # the key of our callback's state in it: its class's name
LATEST = "latest"  # DeepSpeed's file: the name of the folder beside it that holds its part
FORMAT_VERSION = 1
# Files that transformers silently does without where they are missing; DeepSpeed keeps its own beside LATEST.
PARTS = ("optimizer.pt", "scheduler.pt")


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    numbers = [item.name.removeprefix(CHECKPOINT) for item in folder.iterdir() if item.name.startswith(CHECKPOINT)]
    return sorted(int(number) for number in numbers if number.isdecimal() and number.isascii())


def last_checkpoint(run: Path, until: int | None = None) -> str | None:
    """The newest checkpoint's folder of a run (of those up to the step `until`, where given), or None."""
    steps = [step for step in checkpoint_steps(run / CHECKPOINTS) if until is None or step <= until]
    return str(run / CHECKPOINTS / checkpoint_name(steps[-1])) if steps else None


def good_checkpoint(run: Path) -> str | None:
    """The newest checkpoint's folder of a run that is whole, or None; damaged ones are passed over with a warning."""
    for step in reversed(checkpoint_steps(run / CHECKPOINTS)):
        folder = run / CHECKPOINTS / checkpoint_name(step)
        try:
            check(folder)
        except UserError as error:
            console.warn(f"a damaged checkpoint is passed over: {error}")
        else:
            return str(folder)
    return None


def write_manifest(folder: Path) -> None:
    """Describes a checkpoint's files in its manifest."""
    described = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            described[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, "step": step_of(str(folder)), "files": described})


def check_moments(optimizer: Any) -> None:
    """ValueError where what torch's own optimizers, and SparseAdamW, keep of a parameter has not its shape, or is not
    finite: they would only notice in the next step, or never."""
    own = "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "step"
    if type(optimizer).__module__.partition(".")[0] not in ("torch", "sparseft"):
        return  # others keep factors or packed numbers under these names
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, Tensor) or name not in own:
                continue
            if value.shape != (parameter.shape if name != "step" else ()) or not shard_of(value).isfinite().all():
                raise ValueError(f"'{name}' of shape {tuple(value.shape)} does not belong to {tuple(parameter.shape)}")


def prune(folder: Path, limit: int | None, step: int) -> None:
    """Deletes all but the newest `limit` checkpoints (None: none) of those up to `step`."""
    for number in [each for each in checkpoint_steps(folder) if each <= step][: -limit if limit else 0]:
        remove(folder / checkpoint_name(number))


def check(folder: Path) -> None:
    """Raises `UserError` where a checkpoint is not, file by file, what its manifest says, or leads out of itself."""
    content = read_json_object(folder / MANIFEST, "checkpoint")
    if content.get("format_version") != FORMAT_VERSION:
        known = shown(content.get("format_version"))
        raise UserError(f"{folder}: checkpoint format {known}, this version reads {FORMAT_VERSION}.")
    described = content.get("files")
    if content.get("step") != step_of(str(folder)) or not isinstance(described, dict):
        raise UserError(f"{folder}: {MANIFEST} describes another checkpoint.")
    there = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not stat.S_ISDIR(_mode(path))}
    there.pop(MANIFEST)
    for name in sorted(there.keys() ^ described.keys()):
        raise UserError(f"{folder}: '{shown(name)}' is {'not ' if name in there else 'only '}in {MANIFEST}.")
    for name, path in there.items():
        known = described[name] if isinstance(described[name], dict) else {}
        if not stat.S_ISREG(_mode(path)):
            raise UserError(f"{folder}: '{name}' is a link or a device, not a file.")
        if path.stat().st_size != known.get("bytes") or file_hash(path) != known.get("sha256"):
            raise UserError(f"{folder}: '{name}' is not the file that was saved (altered or truncated).")
    if LATEST in there:  # DeepSpeed reads what it names, wherever that is
        path = there[LATEST]
        part = path.read_text(errors="replace").strip() if path.stat().st_size < 1000 else ""
        if not any(name.startswith(f"{part}/") for name in there):
            raise UserError(f"{folder}: '{LATEST}' names no folder of the checkpoint.")
    for name in (STATE, *(() if LATEST in there else PARTS)):
        if name not in there:
            raise UserError(f"{folder}: {name} is missing.")
    read_state(folder)


def _mode(path: Path) -> int:
    return path.lstat().st_mode


def read_state(folder: Path) -> dict[str, Any]:
    """`trainer_state.json`, with what sparseft keeps there checked: {"now": …, "logged": …, "health": …,
    "spikes": … (older runs have none)}."""
    path = folder / STATE
    try:
        content = read_json(path, numbers=False)
        own = content["stateful_callbacks"][OWN_STATE]["attributes"]
        numbers = [content["global_step"], content["num_input_tokens_seen"], *(own["health"].values())]
        for mark in (own["now"], own["logged"]):
            numbers += [mark["step"], mark["tokens"]]
            if not all(isinstance(mark[name], (int, float)) for name in ("loss", "seconds")):
                raise ValueError("its totals are no numbers")
        spikes = own.get("spikes", {"count": 0, "recent": []})
        if spikes.keys() != {"count", "recent"} or not all(isinstance(loss, float) for loss, _ in spikes["recent"]):
            raise ValueError("its losses are no numbers")
        numbers += [spikes["count"], *(tokens for _, tokens in spikes["recent"])]
        if not all(type(number) is int for number in numbers) or content["global_step"] != step_of(str(folder)):
            raise ValueError("its counts are not those of the step")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else why(error)
        raise UserError(f"{path}: cannot be continued from ({reason}).") from error
    return own


@contextlib.contextmanager
def fitting(folder: str | None, what: str) -> Iterator[None]:
    """Inside, what torch and transformers raise over a part of a checkpoint becomes a `UserError` that names it."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, OSError, EOFError, AssertionError,
            pickle.UnpicklingError) as error:  # fmt: skip
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        raise UserError(f"{folder}: {what} cannot be taken up: {reason_of(error)}") from error


def step_of(checkpoint: str | None) -> int:
    """The optimizer step of a checkpoint's folder; -1 for none."""
    return int(Path(checkpoint).name.removeprefix(CHECKPOINT)) if checkpoint else -1


def load_trained(model: nn.Module, folder: Path) -> None:
    """Fills the attached model's trained parameters from a checkpoint's adapter folder, in place; after a re-selection
    also what else was trained before."""
    if not load_active(model, folder.parent):
        lifecycle.load_trained(model, folder)

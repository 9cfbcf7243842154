"""Run folders: where they lie and what they hold. No torch here.

Every file but `metrics.jsonl` (`metrics.py`) is written aside and renamed, so a reader never meets half of one.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from sparseft.errors import UserError, nearest
from sparseft.files.paths import where_looked
from sparseft.files.untrusted import read_json, why

OUTPUTS = Path("outputs")  # below the working directory

LATEST = OUTPUTS / "latest"

MAKE_ONE = "`sparseft train` makes one"  # said where one is missing

# A folder with any of these holds a run.
MARKS = ("config.yaml", "summary.json", "metrics.jsonl", "adapter")

# All that a run writes, as patterns below its folder: what `overwrite=true` may delete, and nothing else.
# `adapter/` may hold an adapter or, after full fine-tuning, a Hugging Face model with its tokenizer.
OWN_FILES = (
    "config.yaml environment.json metrics.jsonl summary.json report.html bench.json "
    "selection/selection.json selection/selection.safetensors "
    "adapter/adapter_config.json adapter/sparseft_config.json adapter/adapter_model.safetensors adapter/README.md "
    "adapter/config.json adapter/generation_config.json adapter/chat_template.jinja adapter/special_tokens_map.json "
    "adapter/tokenizer* adapter/vocab.* adapter/merges.txt adapter/model.safetensors adapter/model-*.safetensors "
    "adapter/model.safetensors.index.json "
    "train_questions.safetensors eval/mt_bench/model_answer/*.jsonl "
    "eval/*.json eval/*.samples.jsonl eval/before/*.json eval/before/*.samples.jsonl "
    ".*.partial selection/.*.partial adapter/.*.partial eval/.*.partial eval/before/.*.partial"
).split()

# Whole, as they are: checkpoints, and what a crash left of a folder being replaced.
OWN_FOLDERS = ("checkpoints/checkpoint-*", ".selection.*", ".adapter.*", "checkpoints/.partial-*", "checkpoints/.best")

INSIDE = re.compile(r"adapter|selection|eval|before|checkpoints|checkpoint-\d+")  # folders inside a run

# Removed once empty.
CONTAINERS = "selection adapter eval/before eval/mt_bench/model_answer eval/mt_bench eval checkpoints".split()


def timestamp() -> str:
    """Local date and time for folder names, sortable: `20260131-235959`."""
    return datetime.now().strftime("%Y%m%d-%H%M%S")


def new_folder(name: str, parent: str | Path = OUTPUTS) -> Path:
    """Creates `<parent>/<name>`, or `<name>-2`, `-3`, … when others have taken it within the same second."""
    parent = Path(parent)
    name = re.sub(r"[^\w.-]+", "_", name).strip("._") or "run"
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
        except FileExistsError as error:
            if not parent.is_dir():
                raise UserError(f"cannot make a folder in '{parent}': it is a file.") from error
            number += 1
        except OSError as error:
            raise UserError(f"cannot make the folder '{folder}': {error.strerror}.") from error


def is_run(path: str | Path) -> bool:
    """Whether the folder holds a run, finished or not."""
    return any((Path(path) / mark).exists() for mark in MARKS)


def check_writable(folder: Path, what: str) -> None:
    """Refuses a folder that neither exists nor could be made, or that cannot be written; makes nothing.

    `what` is how the message calls it.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{what} '{folder}' is a file: expected a folder, or a path where one can be made.")
    above = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not above.is_dir():
        raise UserError(f"cannot write to {what} '{folder}': Not a directory, '{above}' is a file.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {what} '{folder}': Permission denied in '{above}'.")


def check_run_folder(output_dir: str | None, *, overwrite: bool = False, resume: bool = False) -> None:
    """Refuses, before anything is loaded or made, an `output_dir` that a run cannot use; makes nothing.

    Raises UserError saying why and what would help.
    """
    if overwrite and resume:
        raise UserError("overwrite=true and trainer.resume=auto exclude each other: replace the run or continue it.")
    if output_dir is None:
        if resume:
            raise UserError("trainer.resume needs output_dir=FOLDER: the folder of the run to continue.")
        return
    if not str(output_dir).strip():
        raise UserError("output_dir is empty: expected a folder's path, or null for one of its own under outputs/.")
    run = Path(output_dir).expanduser()
    check_writable(run, "output_dir")
    if is_run(run) and not resume and not overwrite:
        raise UserError(
            f"output_dir '{run}' already holds a run: give another folder, continue it with trainer.resume=auto, "
            "or replace it with overwrite=true."
        )


def prepare_run_folder(
    output_dir: str | None, method: str, dataset: str, *, overwrite: bool = False, resume: bool = False
) -> Path:
    """The folder of a new run, made if it is not there; call it only once the whole config is known to be valid.

    Without `output_dir`: `outputs/<date>-<time>-<method>-<dataset>`. A folder that already holds a run is refused
    unless `resume` (left as it is) or `overwrite` (the old run's own files are deleted, any others stay).
    Raises UserError when it cannot be used, as `check_run_folder` does.
    """
    check_run_folder(output_dir, overwrite=overwrite, resume=resume)
    if output_dir is None:
        return new_folder(f"{timestamp()}-{method}-{dataset}")
    run = Path(output_dir).expanduser()
    try:
        run.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run):  # the only reliable answer to "can I write here?"
            pass
    except OSError as error:
        raise UserError(f"cannot write to output_dir '{run}': {error.strerror or error}.") from error
    if is_run(run) and not resume:
        _delete_run(run)
    return run


def _delete_run(run: Path) -> None:
    """Deletes the files of a run and what folders that leaves empty. Links are unlinked, never followed."""
    # An own folder that someone moved elsewhere: what it points to is not ours to empty. Outer ones first, or what lies
    # behind their links would be taken for the run's.
    for part in reversed(CONTAINERS):
        if (run / part).is_symlink():
            (run / part).unlink()
    for pattern in OWN_FILES:
        for path in run.glob(pattern):
            if path.is_file() or path.is_symlink():
                path.unlink()
    for pattern in OWN_FOLDERS:
        for path in run.glob(pattern):
            if path.is_symlink():
                path.unlink()
            elif path.is_dir() and re.fullmatch(
                r"checkpoint-\d+|\.best|\.partial-.+|\.(selection|adapter)\..+", path.name
            ):
                shutil.rmtree(path)
    for part in CONTAINERS:
        with contextlib.suppress(OSError):  # not there, or not empty: someone else's files stay
            (run / part).rmdir()


def link_latest(run: str | Path) -> None:
    """Makes `outputs/latest` link to `run`, replacing the former link in one step.

    The link is a convenience, so what stands in its way is warned about and left alone, and the run goes on.
    """
    from sparseft.console import warn

    run = Path(run).resolve()
    here = Path.cwd()
    # A relative link survives moving the whole working directory, an absolute one moving only `outputs/`.
    target = os.path.relpath(run, here / OUTPUTS) if run.is_relative_to(here) else str(run)
    aside = OUTPUTS / f".latest.{os.getpid()}-{secrets.token_hex(4)}.partial"
    try:
        OUTPUTS.mkdir(exist_ok=True)
        if LATEST.exists() and not LATEST.is_symlink():
            warn(f"'{LATEST}' is not a link, so it was left alone and does not point to this run.")
            return
        aside.symlink_to(target, target_is_directory=True)
        os.replace(aside, LATEST)
    except OSError as error:
        aside.unlink(missing_ok=True)
        warn(f"could not link '{LATEST}' to this run: {error.strerror or error}.")


def latest_run() -> Path:
    """The run started last, by `outputs/latest` below the working directory, the link resolved.

    Raises UserError when there is none, saying how to make one.
    """
    if not LATEST.is_symlink():
        if LATEST.exists():
            raise UserError(f"'{LATEST}' is not a link, so the latest run is unknown: name the run's folder.")
        raise UserError(f"no run yet in '{Path.cwd() / OUTPUTS}': {MAKE_ONE}, or name a run's folder.")
    run = LATEST.resolve()
    if not run.is_dir():
        raise UserError(f"the latest run, '{run}', is no longer there: name a run's folder; {MAKE_ONE}.")
    if not is_run(run):
        raise UserError(f"the latest run, '{run}', left nothing: name another run's folder; {MAKE_ONE}.")
    return _shown(run)


def check_own(run: str | Path) -> None:
    """Refuses a run folder whose parts are links that lead out of it: what is written or removed there would be
    somebody else's. Raises UserError naming the link."""
    run = Path(run)
    for part in ("metrics.jsonl", *CONTAINERS):
        if (run / part).is_symlink() and not (run / part).resolve().is_relative_to(run.resolve()):
            raise UserError(
                f"'{run / part}' is a link that leads out of the run's folder: put what it names in its place."
            )


def find_run(path: str | Path) -> Path:
    """The run folder that the user means by `path`: the folder itself, a link to it, or a folder or file inside it.

    Raises UserError naming what is there instead, and the nearest run beside it.
    """
    given = Path(path).expanduser()
    folder = given.resolve()
    if folder.is_file():
        folder = folder.parent
    above = folder
    while INSIDE.fullmatch(above.name):
        above = above.parent
    for candidate in (above, folder):
        if candidate.is_dir() and is_run(candidate):
            return _shown(candidate)
    beside = [item.name for item in given.parent.iterdir() if is_run(item)] if given.parent.is_dir() else []
    hint = nearest(given.name, beside) or f" {MAKE_ONE}."
    if not given.exists():
        raise UserError(f"no run '{given}'{where_looked(given)}: there is nothing of that name.{hint}")
    raise UserError(f"'{given}' holds no run: expected a folder with {', '.join(MARKS)} in it.{hint}")


def _shown(run: Path) -> Path:
    """`run` relative to the working directory where it lies below it, for short messages."""
    here = Path.cwd().resolve()
    return run.relative_to(here) if run.is_relative_to(here) and run != here else run


def load_summary(run: str | Path) -> dict[str, Any]:
    """The run's `summary.json`. Raises UserError when the run has none (it did not finish) or it is not JSON."""
    path = Path(run) / "summary.json"
    if not path.is_file():
        raise UserError(f"the run '{run}' has no summary.json: it did not finish.")
    return read_json_object(path)


def read_json_object(path: Path) -> dict[str, Any]:
    """A file holding one JSON object. Raises UserError naming the file and the place."""
    try:
        content = read_json(path)
    except ValueError as error:
        what = "UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"JSON: {why(error)}"
        raise UserError(f"'{path}' is not {what}.") from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' should hold one JSON object, not a {type(content).__name__}.")
    return content

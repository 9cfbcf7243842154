"""Run folders: where they lie, what they hold, how their files are written. No torch here.

Every file but `metrics.jsonl` (`runs_metrics.py`) is written aside and renamed, so a reader never meets half of one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from sparseft.errors import UserError, nearest, where_looked
from sparseft.reading import read_json, why

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

PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "lm_eval", "deepspeed", "triton", "safetensors")


def write_text(path: str | Path, text: str) -> Path:
    """Writes `text` (UTF-8) aside in the same folder, syncs it and renames it to `path`: all of it or nothing."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with open(aside, "x", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return path


def write_json(path: str | Path, content: Any) -> Path:
    """Writes `content` as strict, indented JSON (NaN and infinities become null), as `write_text` does."""
    return write_text(path, dumps(content, indent=2) + "\n")


def dumps(content: Any, indent: int | None = None) -> str:
    """Strict JSON that any UTF-8 file can hold: half a surrogate pair (an argument that was no text) stays escaped."""
    text = json.dumps(_strict(content), indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _strict(value: Any) -> Any:
    """`value` with what JSON lacks replaced: NaN and infinities by null, paths by strings, 0-d arrays by numbers."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float):  # numpy's float64 too
        return float(value) if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a scalar of numpy or torch
        return _strict(value.item())
    return value


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


def environment(device: str, dtype: str, world_size: int) -> dict[str, Any]:
    """What the run ran on, for `environment.json`: versions (null: not installed), commit, machine, command line.

    Read from the packages' metadata, so nothing is imported. Neither the user nor the host is named.
    """
    return {
        "versions": {"sparseft": _version("sparseft"), "python": platform.python_version()}
        | {package: _version(package) for package in PACKAGES},
        "commit": package_commit(),
        "device": str(device),
        "dtype": str(dtype),
        "world_size": int(world_size),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "command_line": _command_line(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _command_line() -> str:
    """The command as it would be typed again: the program's name without the folders it happens to lie in."""
    arguments = list(sys.orig_argv) or list(sys.argv)
    if arguments[0] != sys.argv[0] and len(arguments) > 1 and Path(arguments[1]).name == Path(sys.argv[0]).name:
        arguments = arguments[1:]  # python /…/bin/sparseft train -> sparseft train
    return shlex.join([Path(arguments[0]).name, *arguments[1:]])


def package_commit() -> str | None:
    """The git commit of the checkout that the package lies in, `-dirty` after it when tracked files are changed.

    None for an installed package, also where its environment lies inside some other repository.
    """
    package = Path(__file__).resolve().parent
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(package), *arguments],
                env=clean | {"GIT_OPTIONAL_LOCKS": "0"},
                capture_output=True,
                text=True,
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):  # no git here, or a file system too slow to wait for
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:  # not a tracked file: not our repository
        return None
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit

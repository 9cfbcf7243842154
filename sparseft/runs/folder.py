"""Run folders: where they lie, the names of all that they hold, how one is found, checked and deleted. No torch here.

Every file is written aside and renamed, so a reader never meets half of one, but `metrics.jsonl` and `samples.jsonl`,
which grow by lines (`metrics.py`), and the lock.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sparseft.console import warn
from sparseft.errors import UserError, nearest, where_looked
from sparseft.files.atomic import PARTIAL, check_ours, replace_link, try_writing
from sparseft.files.hub import REPLACED, TEMPLATES
from sparseft.files.tensors import (
    ADAPTER_CONFIG,
    ADAPTER_TENSORS,
    DESCRIPTIONS,
    SELECTION_CONFIG,
    SELECTION_TENSORS,
    WHOLE_CONFIG,
)
from sparseft.files.untrusted import read_json_object

OUTPUTS = Path("outputs")  # below the working directory

LATEST = OUTPUTS / "latest"

MAKE_ONE = "`sparseft train` makes one"  # said where one is missing

# ---- the names of what a run holds ----

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
SAMPLES = "samples.jsonl"  # what base and adapter answered on the way
REPORT = "report.html"
BENCH = "bench.json"
QUESTIONS = "train_questions.safetensors"
SELECTION = "selection"
SENSITIVITY = "sensitivity.safetensors"  # in a checkpoint: what re-selection in turn has seen of its layer
AVERAGE = "average.safetensors"  # there too: the mean of what trains so far (trainer.average)
RUNNING = "running.safetensors"  # there too: what re-selection by running gradients has seen of all layers
ADAPTER = "adapter"  # an adapter or, after full fine-tuning, a Hugging Face model with its tokenizer
UNTRIMMED = "adapter-untrimmed"  # as it was trained, where `adapter` was cut back to a budget of forgetting
TRIM = "trim.json"  # in a trimmed adapter's folder: what was done, and what came of it
EVAL = "eval"
BEFORE = "eval/before"  # the base model's results
ANSWERS = "eval/mt_bench/model_answer"
CHECKPOINTS = "checkpoints"
CHECKPOINT = "checkpoint-"  # below `checkpoints/`, before the step
DAMAGED = "damaged-"  # before the name of a checkpoint that was passed over when the run went on
BEST = ".best"  # there too, and in each checkpoint
BEST_NOTE = "best.json"
RATE = "learning_rate.json"  # how the rate was found, where trainer.learning_rate=auto
LOCK = ".lock"  # held while a job trains there; stays, and holds nothing of the run's
TRACKERS = "trackers.json"  # by which a run that is continued is found again
TENSORBOARD = "tensorboard"  # the folders that trackers fill as they like
WANDB = "wandb"
MLFLOW = "mlflow"
TRACKIO = "trackio"
TRACKED = (TENSORBOARD, WANDB, MLFLOW, TRACKIO)

# A folder with any of these holds a run.
MARKS = (CONFIG, SUMMARY, METRICS, ADAPTER)

# The folders, which are removed once empty; the inner ones first.
FOLDERS = (
    *(SELECTION, f"{ADAPTER}/{TEMPLATES}", ADAPTER, f"{UNTRIMMED}/{TEMPLATES}", UNTRIMMED),
    *(BEFORE, ANSWERS, "eval/mt_bench", EVAL, CHECKPOINTS),
)

_OF_AN_ADAPTER = (
    *(ADAPTER_CONFIG, WHOLE_CONFIG, ADAPTER_TENSORS, "README.md", TRIM),
    *("config.json", "generation_config.json", "chat_template.jinja", "special_tokens_map.json"),
    *("tokenizer*", "vocab.*", "merges.txt"),
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
)

# All files that a run writes, as patterns, by folder: what `overwrite=true` may delete, and nothing else.
OWN_FILES = {
    "": (CONFIG, ENVIRONMENT, METRICS, SUMMARY, REPORT, BENCH, QUESTIONS, SAMPLES, RATE, TRACKERS),
    SELECTION: (SELECTION_CONFIG, SELECTION_TENSORS),
    ADAPTER: _OF_AN_ADAPTER,
    UNTRIMMED: _OF_AN_ADAPTER,
    f"{ADAPTER}/{TEMPLATES}": ("*.jinja",),
    f"{UNTRIMMED}/{TEMPLATES}": ("*.jinja",),
    EVAL: ("*.json", "*.samples.jsonl"),
    BEFORE: ("*.json", "*.samples.jsonl"),
    ANSWERS: ("*.jsonl",),
}

# What a crash leaves of a file or folder that was being written; the last three have the names of earlier versions.
LEFT = re.compile(rf"{re.escape(PARTIAL)}.+|\..+\.partial|\.adapter\..+|\.selection\..+")

INSIDE = re.compile(
    rf"adapter|adapter-untrimmed|selection|eval|before|checkpoints|{CHECKPOINT}\d+"
)  # folders inside a run


def checkpoint_name(step: int) -> str:
    """The name of a checkpoint's folder below `checkpoints/`."""
    return f"{CHECKPOINT}{step}"


def timestamp() -> str:
    """Local date and time for folder names, sortable: `20260131-235959`."""
    return datetime.now().strftime("%Y%m%d-%H%M%S")


def new_folder(name: str) -> Path:
    """Creates `outputs/<name>`, or `<name>-2`, `-3`, … when others have taken it within the same second."""
    name = re.sub(r"[^\w.-]+", "_", name).strip("._") or "run"
    number = 1
    while True:
        folder = OUTPUTS / (name if number == 1 else f"{name}-{number}")
        try:
            OUTPUTS.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
        except FileExistsError as error:
            if not OUTPUTS.is_dir():
                raise UserError(f"cannot make a folder in '{OUTPUTS}': it is a file.") from error
            number += 1
        except OSError as error:
            raise UserError(f"cannot make the folder '{folder}': {error.strerror}.") from error


def is_run(path: str | Path) -> bool:
    """Whether the folder holds a run, finished or not."""
    return any((Path(path) / mark).exists() for mark in MARKS)


def _checkpoints(run: Path) -> Iterator[Path]:
    """The folders of checkpoints in a run, or links in their places, whole or not."""
    for path in (run / CHECKPOINTS).glob("*"):
        if re.fullmatch(rf"({DAMAGED})?{CHECKPOINT}\d+", path.name) and (path.is_symlink() or path.is_dir()):
            yield path


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
        check_writable(OUTPUTS, "the folder of runs")
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
    if overwrite and is_run(run):
        _check_left(run)
        return
    check_own(run)  # what goes on from it would refuse its links only then
    check_ours(run / ADAPTER, DESCRIPTIONS, REPLACED)
    check_ours(run / SELECTION, (SELECTION_CONFIG,), (SELECTION_TENSORS,))
    if not is_run(run) and not overwrite and (first := next(_checkpoints(run), None)):
        raise UserError(
            f"output_dir '{run}' holds '{first.relative_to(run)}' of a run that is not there, which this one would go "
            "on from after an interrupt: give another folder, or remove it with overwrite=true."
        )


def _check_left(run: Path) -> None:
    """Refuses files that an overwrite would leave in `adapter/`: the new run's adapter is a folder in its place."""
    adapter = run / ADAPTER
    if adapter.is_symlink() or not adapter.is_dir():
        return
    for path in sorted(adapter.iterdir()):
        file = path.is_file() or path.is_symlink()
        own = (TEMPLATES,) if not file else _OF_AN_ADAPTER
        if not LEFT.fullmatch(path.name) and not any(fnmatchcase(path.name, pattern) for pattern in own):
            raise UserError(
                f"'{path}' is no file of the run's, and would be in the way of the new adapter: move it elsewhere."
            )


def prepare_run_folder(
    output_dir: str | None,
    method: str,
    dataset: str,
    *,
    overwrite: bool = False,
    resume: bool = False,
    hold: Callable[[Path], None] = lambda run: None,
) -> Path:
    """The folder of a new run, made if it is not there; call it only once the whole config is known to be valid.

    Without `output_dir`: `outputs/<date>-<time>-<method>-<dataset>`. A folder that already holds a run is refused
    unless `resume` (left as it is) or `overwrite` (the old run's own files are deleted, any others stay).
    `hold(run)` keeps others out of it (`lock.Lock.take`), as soon as it is there.
    Raises UserError when it cannot be used, as `check_run_folder` does.
    """
    check_run_folder(output_dir, overwrite=overwrite, resume=resume)
    if output_dir is None:
        run = new_folder(f"{timestamp()}-{method}-{dataset}")
        hold(run)
        return run
    run = Path(output_dir).expanduser()
    try:
        run.mkdir(parents=True, exist_ok=True)
        try_writing(run)
    except OSError as error:
        raise UserError(f"cannot write to output_dir '{run}': {error.strerror or error}.") from error
    hold(run)
    check_run_folder(output_dir, overwrite=overwrite, resume=resume)  # another job may have been quicker
    if is_run(run) and not resume:
        _delete_run(run)
    elif overwrite:
        _delete_checkpoints(run)
    return run


def _delete_run(run: Path) -> None:
    """Deletes the files of a run and what folders that leaves empty. Links are unlinked, never followed.

    The checkpoints go first and `config.yaml` last: what an interrupt leaves is still the old run, so that a new one
    never goes on from its checkpoints.
    """
    # An own folder that someone moved elsewhere: what it points to is not ours to empty. Outer ones first, or what lies
    # behind their links would be taken for the run's.
    for part in reversed(FOLDERS):
        if (run / part).is_symlink():
            (run / part).unlink()
    _delete_checkpoints(run)
    _delete_tracked(run)
    for part, patterns in OWN_FILES.items():
        for path in (path for pattern in patterns for path in (run / part).glob(pattern)):
            if path != run / CONFIG and (path.is_file() or path.is_symlink()):
                path.unlink()
    delete_leftovers(run)
    for part in FOLDERS:
        with contextlib.suppress(OSError):  # not there, or not empty: someone else's files stay
            (run / part).rmdir()
    (run / CONFIG).unlink(missing_ok=True)


def _delete_checkpoints(run: Path) -> None:
    for path in (run / CHECKPOINTS / BEST, *_checkpoints(run)):
        _delete(path)


def _delete_tracked(run: Path) -> None:
    """Deletes the folders that trackers filled, of those that the run says it had: others are somebody else's."""
    try:
        had = read_json_object(run / TRACKERS)
    except UserError:  # none, or what nobody wrote
        return
    for path in (run / name for name in TRACKED if name in had):
        _delete(path)


def _delete(folder: Path) -> None:
    """Deletes a folder that may not be there, of a link the link alone."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        shutil.rmtree(folder)


def delete_leftovers(run: Path) -> None:
    """Deletes what a crash left in a run of what was being written."""
    for part in ("", *FOLDERS):
        for path in [path for path in (run / part).glob(".*") if LEFT.fullmatch(path.name)]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def link_latest(run: str | Path) -> None:
    """Makes `outputs/latest` link to `run`, replacing the former link in one step.

    The link is a convenience, so what stands in its way is warned about and left alone, and the run goes on.
    """
    run = Path(run).resolve()
    here, place = Path.cwd(), OUTPUTS.resolve()  # which may be a link to another disk
    # A relative link survives moving the whole working directory, an absolute one moving only `outputs/`.
    together = run.is_relative_to(here) and place.is_relative_to(here) or run.is_relative_to(place)
    target = os.path.relpath(run, place) if together else str(run)
    try:
        OUTPUTS.mkdir(exist_ok=True)
        if LATEST.exists() and not LATEST.is_symlink():
            warn(f"'{LATEST}' is not a link, so it was left alone and does not point to this run.")
            return
        replace_link(LATEST, target)
    except OSError as error:
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
    for part in (METRICS, SAMPLES, *FOLDERS, *TRACKED):
        if (run / part).is_symlink() and not (run / part).resolve().is_relative_to(run.resolve()):
            raise UserError(
                f"'{run / part}' is a link that leads out of the run's folder: put what it names in its place."
            )


def check_trained_on(run: Path, fingerprint: str, source: str, otherwise: str) -> None:
    """Refuses other training examples, read from `source`, than the run's own, say from a file that has changed since;
    `otherwise` says what to do."""
    path = run / ENVIRONMENT
    data = read_json_object(path).get("data") if path.is_file() else None
    known = data.get("fingerprint") if isinstance(data, dict) else None
    if known not in (None, fingerprint):
        raise UserError(
            f"the training examples are not those that the run in '{run}' was trained on: did {source}, the "
            f"tokenizer or the version of sparseft change? {otherwise}"
        )


def is_checkpoint(path: str | Path) -> bool:
    """Whether a folder is a checkpoint of a run, which holds an adapter as a run does."""
    path = Path(path).resolve()
    named = path.parent.name == CHECKPOINTS and re.fullmatch(rf"{CHECKPOINT}\d+", path.name) is not None
    return named and is_run(path.parent.parent)


def find_run(path: str | Path, *, for_adapter: bool = False) -> Path:
    """The run folder that the user means by `path`: the folder itself, a link to it, or a folder or file inside it.

    for_adapter: of which the adapter is wanted; a path to another one inside the run is then refused.

    Raises UserError naming what is there instead, and the nearest run beside it.
    """
    given = Path(path).expanduser()
    folder = given.resolve()
    if folder.is_file():
        folder = folder.parent
    above = folder
    while INSIDE.fullmatch(above.name):
        if for_adapter and (is_checkpoint(above) or (above.name == UNTRIMMED and is_run(above.parent))):
            raise UserError(
                f"'{given}' is of another adapter than the one that its run has left: name the run, or that adapter "
                f"for itself (eval, chat: --adapter {_shown(above)})."
            )
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


def is_of_another(results: dict[str, Any], present: str | None) -> bool:
    """Whether results (an `eval/<task>.json`) are of another adapter than the run has, whose hash is `present`: the run
    went on, or was cut back, after they were measured. Where either does not say, they are taken for the run's."""
    header = results.get("sparseft")
    known = header.get("adapter_sha256") if isinstance(header, dict) else None
    return present is not None and known is not None and known != present


def chosen_results(files: Iterable[tuple[Path, dict[str, Any]]]) -> dict[str, Path]:
    """Of each task the file that its result is taken from, of several that hold one: that which it was asked for in,
    before those that have it as a group's member, then the newer one."""
    found: dict[str, tuple[bool, int, Path]] = {}
    for path, content in files:
        tasks = content.get("tasks")
        for name in tasks if isinstance(tasks, dict) else ():
            one = (content.get("task") == name, path.stat().st_mtime_ns, path)
            found[name] = max(found.get(name, one), one)
    return {name: path for name, (_, _, path) in found.items()}


def load_summary(run: str | Path) -> dict[str, Any]:
    """The run's `summary.json`. Raises UserError when the run has none (it did not finish) or it is not JSON."""
    path = Path(run) / SUMMARY
    if not path.is_file():
        raise UserError(f"the run '{run}' has no {SUMMARY}: it did not finish.")
    return read_json_object(path)

"""The cached selection: found by a key of all that it depends on, else computed, in a way that can be interrupted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sparseft import __version__, console, signals
from sparseft.data.loaded import LoadedData
from sparseft.data.sampling import calibration_batches
from sparseft.distributed import ranks
from sparseft.distributed.shards import any_sharded
from sparseft.errors import UserError
from sparseft.files.atomic import explained
from sparseft.files.tensors import SELECTION_CONFIG
from sparseft.importance.calibration import Watch, saved_samples
from sparseft.models.fingerprint import base_fingerprints
from sparseft.models.packed.unquantized import Unquantized
from sparseft.selection.compute import Request, Settings, compute
from sparseft.selection.exclude import Excluded
from sparseft.selection.selection import Selection


def selection_key(
    fingerprint: str, data_fingerprint: str, settings: Settings, excluded: Sequence[Excluded] = ()
) -> str:
    """What a cached selection depends on: base weights, training examples, method, its settings and seed, what it
    leaves to other adapters (wherever they lie), and the version of the code that chose."""
    others = sorted(each.selection.digest() for each in excluded)
    content = [__version__, fingerprint, data_fingerprint, settings.name, asdict(settings) | {"exclude": others}]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


@dataclass
class Selected:
    """A selection with where it lies and how it came about."""

    selection: Selection
    path: Path
    cached: bool
    seconds: float
    fingerprints: list[str]  # the base model's


def select(model: nn.Module, request: Request, data: LoadedData, pad: int, cache_dir: str) -> Selected:
    """The cached selection of what is asked for, or a new one, which is then cached.

    `pad` is the id to pad calibration examples with. All processes take part and get the same.
    """
    settings = request.settings
    fingerprints = base_fingerprints(model)
    unquantized = Unquantized.of(model)
    base = fingerprints[0] if unquantized is None else f"{fingerprints[0]} {unquantized.quantize}"
    key = selection_key(base, data.fingerprint, settings, request.excluded)
    path = Path(cache_dir) / "selections" / key
    start = time.perf_counter()
    first = ranks.is_main()
    found = ranks.from_main(lambda: _cached(cache_dir, path))  # all processes train the same
    partial = path.with_name(f"{key}.partial")
    if found is not None:
        if first:  # of a process that was killed when it had saved the selection
            shutil.rmtree(partial, ignore_errors=True)
        return Selected(found, path, True, time.perf_counter() - start, fingerprints)
    batches = None
    if settings.needs_data:
        batches = calibration_batches(data.train, settings.num_samples, settings.seed, pad)
        console.log(f"selection: scoring by {settings.importance} on {len(batches)} calibration examples")
    stopped: list[str] = []  # the signal's name; the work stops at the next consistent point
    with signals.noted(stopped.append):
        selection = _computed(model, request, batches, partial, stopped)
        selection.meta["key"] = key
        if first:
            with explained(f"the selection {path}", lambda: None):
                selection.save(path, {name: request.spec.linears[name] for name in selection.modules})
        ranks.broadcast_object(None)  # wait for all ranks: one still computing could write its part after the deletion
        if first:
            shutil.rmtree(partial, ignore_errors=True)
    if stopped:
        raise KeyboardInterrupt
    seconds = time.perf_counter() - start
    console.log(f"selection: computed in {seconds:.1f} s, kept in {path}")
    return Selected(selection, path, False, seconds, fingerprints)


def _cached(cache_dir: str, path: Path) -> Selection | None:
    """The selection that lies at `path`; None where there is none and one can be put there."""
    if (path / SELECTION_CONFIG).is_file():
        try:
            selection = Selection.load(path)
        except UserError as error:
            console.warn(f"the cached selection is unusable and is computed anew: {error}")
        else:
            console.log(f"selection: cached, {path}")
            return selection
    _check_writable(cache_dir, path)
    return None


def _check_writable(cache_dir: str, path: Path) -> None:
    """Refuses a cache folder that could not be made or written, before the work whose result belongs there."""
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        reason = "cannot be written" if there.is_dir() else "is no folder"
        raise UserError(f"cache_dir={cache_dir}: {there} {reason}.")


def _computed(
    model: nn.Module, request: Request, batches: list[Any] | None, partial: Path, stopped: list[str]
) -> Selection:
    """`compute` with its progress and the time left: a bar for the samples, and one for scoring the linears where that
    follows. As soon as a signal's name is in `stopped`, it ends and leaves in `partial` what is done."""
    total = len(batches) if batches is not None else 0
    bars: dict[str, console.Progress] = {}

    def show(name: str, done: int, total: int, unit: str, initial: int = 0, ends: Sequence[str] = ()) -> None:
        if name not in bars:
            stack.pop_all().close()  # the bar before is done
            bars[name] = stack.enter_context(console.Progress(total, name, unit, initial))
        bars[name].update(done)
        if ends:
            console.log(f"{ends[0]}: what is done is kept in {partial}; the same command goes on from there")
            raise KeyboardInterrupt

    in_step = any_sharded(model)  # with shards all processes work in step: none may stop alone

    def sampled(done: int) -> None:
        # In step, all processes stop together, also when a signal has reached only one of them.
        ends = [name for theirs in ranks.all_gather_object(stopped) for name in theirs] if in_step else stopped
        show("calibrate", min(done, total), total, "sample", ends=ends)

    def scored(done: int, count: int) -> None:
        show("score", done, count, "linear", ends=stopped)

    with contextlib.ExitStack() as stack:
        if batches is not None:
            before = min(saved_samples(partial), total)
            show("calibrate", before, total, "sample", before, ends=() if in_step else stopped)
        return compute(model, request, batches, Watch(sampled, scored, partial))

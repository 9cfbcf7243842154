"""What `preprocess`, `train` and `eval` share: model, data, and the cached selection."""

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

import torch
from torch import nn

from sparseft import __version__, console, signals
from sparseft.config import BUNDLED, RunConfig
from sparseft.data import calibration_batches, load_datasets
from sparseft.data.collating import padding_id
from sparseft.data.loading import check_tokens
from sparseft.distributed import ranks
from sparseft.distributed.zero3 import any_sharded
from sparseft.errors import UserError
from sparseft.files.atomic import explained
from sparseft.importance.calibration_state import saved_samples
from sparseft.kernels.dispatch import kernel_for
from sparseft.methods import get_method
from sparseft.methods.base import TOLERANCE
from sparseft.methods.selecting import compute_selection
from sparseft.models.decoder import base_parameter_count
from sparseft.models.fingerprint import base_fingerprint
from sparseft.models.loading import load_tokenizer, resolve_device, vocabulary_rows
from sparseft.models.spec import ModelSpec
from sparseft.selection.selection import Selection
from sparseft.training.checks import check_data, check_model

HEAD_ROLES = ("q", "k", "v", "o")  # their units are heads, every other role's channels


@dataclass
class Prepared:
    """A loaded model with its tokenizer and data."""

    model: nn.Module
    tokenizer: Any
    data: Any  # data.LoadedData
    device: Any
    sharding: Any = None  # transformers' settings of ZeRO-3, to live as long as a model in shards does

    @property
    def pad(self) -> int:
        """The id to pad with."""
        return padding_id(self.tokenizer, vocabulary_rows(self.model)[0])


def prepare(config: RunConfig) -> Prepared:
    """Loads tokenizer, data and model, the cheapest to check first, and says what they are."""
    check_data(config)
    check_model(config)
    import transformers

    from sparseft.training.loading import load

    transformers.logging.disable_progress_bar()
    device = resolve_device(config.hardware.device)
    kernel_for(torch.empty(0, device=device))  # an unusable SPARSEFT_KERNELS is said before anything is computed
    tokenizer = load_tokenizer(config.model)
    data = load_datasets(
        config.dataset,
        tokenizer,
        max_length=config.trainer.max_length,
        seed=config.seed,
        bundled=config.model.path.startswith(BUNDLED),
        cache_dir=config.cache_dir,
    )
    for note in data.notes:
        console.log(f"data: {note}")
    for warning in data.warnings:
        console.warn(f"data: {warning}")
    model, sharding = load(config.model, config.hardware, device)
    check_tokens(data, tokenizer, *vocabulary_rows(model))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    total = base_parameter_count(model)
    console.log(f"model: {config.model.path}, {total:,} parameters, {dtype} on {device}")
    return Prepared(model, tokenizer, data, device, sharding)


def selection_key(fingerprint: str, data_fingerprint: str, method: str, method_config: Any) -> str:
    """What a cached selection depends on: base weights, training examples, method, its settings and seed, and the
    version of the code that chose."""
    content = [__version__, fingerprint, data_fingerprint, method, asdict(method_config)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


@dataclass
class Selected:
    """A selection with where it lies and how it came about."""

    selection: Selection
    path: Path
    cached: bool
    seconds: float


def select(config: RunConfig, prepared: Prepared) -> Selected:
    """The cached selection with this run's key, or a new one, which is then cached."""
    from sparseft.training.distributed_trainer import check_zero

    spec = ModelSpec.of(prepared.model)
    method = get_method(config.method_name).settled(spec, config.method)
    key = selection_key(base_fingerprint(prepared.model), prepared.data.fingerprint, config.method_name, method)
    path = Path(config.cache_dir) / "selections" / key
    start = time.perf_counter()
    first = ranks.is_main()
    check_zero(spec, config.method_name, method, config.hardware)
    found = ranks.broadcast_object(_cached(config.cache_dir, path) if first else None)  # all processes train the same
    partial = path.with_name(f"{key}.partial")
    if found is not None:
        if first:  # of a process that was killed when it had saved the selection
            shutil.rmtree(partial, ignore_errors=True)
        return Selected(found, path, True, time.perf_counter() - start)
    batches = None
    total = None
    if method.needs_data:
        batches = calibration_batches(prepared.data.train, method.num_samples, method.seed, prepared.pad)
        total = len(batches)
        console.log(f"selection: scoring by {method.importance} on {total} calibration examples")
    stopped: list[str] = []  # the signal's name, for the work to end at the next point where nothing is half done
    with signals.noted(stopped.append):
        selection = resumable_selection(prepared.model, method, batches, total, partial, stopped)
        selection.meta["key"] = key
        if first:
            with explained(f"the selection {path}", lambda: None):
                selection.save(path, {name: spec.linears[name] for name in selection.modules})
        ranks.broadcast_object(None)  # a rank that is still computing could leave its part behind
        if first:
            shutil.rmtree(partial, ignore_errors=True)
    if stopped:
        raise KeyboardInterrupt
    seconds = time.perf_counter() - start
    console.log(f"selection: computed in {seconds:.1f} s, kept in {path}")
    return Selected(selection, path, False, seconds)


def _cached(cache_dir: str, path: Path) -> Selection | None:
    """The selection that lies at `path`; null where there is none and one can be put there."""
    if (path / "selection.json").is_file():
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


def resumable_selection(
    model: nn.Module, method: Any, batches: list[Any] | None, total: int | None, partial: Path, stopped: list[str]
) -> Selection:
    """`compute_selection` with its progress and the time left: a bar for the samples, and one for scoring the linears
    where that follows. As soon as a signal's name is in `stopped`, it ends and leaves in `partial` what is done."""
    bars: dict[str, console.Progress] = {}

    def show(name: str, done: int, total: int, unit: str, initial: int = 0, ends: Sequence[str] = ()) -> None:
        if name not in bars:
            stack.pop_all().close()  # the bar before is done
            bars[name] = stack.enter_context(console.Progress(total, name, unit, initial))
        bars[name].update(done)
        if ends:
            console.log(f"{ends[0]}: what is done is kept in {partial}; the same command goes on from there")
            raise KeyboardInterrupt

    in_step = any_sharded(model)  # all processes are here at once, and none may leave the others alone

    def sampled(done: int) -> None:
        assert total is not None
        # In step, only what all have heard of counts: a signal that has reached one alone would end it alone.
        ends = [name for theirs in ranks.all_gather_object(stopped) for name in theirs] if in_step else stopped
        show("calibrate", min(done, total), total, "sample", ends=ends)

    def scored(done: int, count: int) -> None:
        show("score", done, count, "linear", ends=stopped)

    with contextlib.ExitStack() as stack:
        if total is not None and (before := min(saved_samples(partial), total)):
            show("calibrate", before, total, "sample", before, ends=() if in_step else stopped)
        return compute_selection(model, method, batches, progress=sampled, scoring=scored, resume=partial)


def describe_trainable(trainable: int, spec: ModelSpec, config: RunConfig, unit: str) -> None:
    """Says how much trains, in which `unit`, and warns where it is off by more than a tenth from the share asked for:
    what a method trains whole cannot meet every share. Linears in scope that cannot train are named."""
    if note := spec.frozen_note(config.method.scope):
        console.warn(note)
    scope = scope_parameters(spec, config)
    console.log(
        f"trainable: {trainable:,} of {scope:,} weights in scope (sparsity {1 - trainable / scope:.2%} in scope, "
        f"{1 - trainable / spec.total_parameters:.2%} of the whole model), in {unit}"
    )
    sparsity = config.method.wanted_sparsity
    if sparsity is not None:
        wanted = (1 - sparsity) * scope
        if abs(trainable - wanted) > TOLERANCE * wanted:
            console.warn(
                f"sparsity {sparsity} asks for {wanted:,.0f} trainable weights; with {unit} it is {trainable:,} "
                f"(sparsity {1 - trainable / scope:.4f})"
            )


def describe_selection(selection: Selection, spec: ModelSpec, config: RunConfig) -> None:
    """`describe_trainable` of a sparse method's selection, and what trains of each role."""
    unit = f"blocks of {selection.block_size}" if selection.has_blocks else "heads and channels"
    describe_trainable(selection.meta["trainable_parameters"], spec, config, unit)
    roles = [
        f"{role} {chosen:,} of {there:,} {'heads' if role in HEAD_ROLES else 'channels'} ({entries:,} weights)"
        for role, (chosen, there, entries) in units_by_role(selection, spec).items()
    ]
    if roles:
        console.log(f"trainable by role: {', '.join(roles)}")


def units_by_role(selection: Selection, spec: ModelSpec) -> dict[str, tuple[int, int, int]]:
    """Of each role that trains: its units chosen, its units in all layers, and the weights that the chosen ones have.

    Empty of a selection of blocks, or of linears whose roles are not known.
    """
    totals: dict[str, list[int]] = {}
    for slot in spec.slots:
        index = selection.modules.get(slot.module, {}).get(slot.side)
        features = 0
        if index is not None:
            features = int(((index >= slot.start) & (index < slot.start + slot.unit * slot.count)).sum())
        total = totals.setdefault(slot.role, [0, 0, 0])
        for position, value in enumerate((features // slot.unit, slot.count, features * slot.other)):
            total[position] += value
    return {role: (chosen, there, entries) for role, (chosen, there, entries) in totals.items() if entries}


def scope_parameters(spec: ModelSpec, config: RunConfig) -> int:
    """Linear weights in the method's scope."""
    return sum(rows * columns for rows, columns in spec.linears_in(getattr(config.method, "scope", None)).values())

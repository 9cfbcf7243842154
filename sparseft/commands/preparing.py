"""What `preprocess`, `train` and `eval` share: model, data, and the cached selection."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sparseft import console
from sparseft.config import BUNDLED, RunConfig
from sparseft.data import calibration_batches, load_datasets
from sparseft.data.batches import padding_id
from sparseft.errors import UserError
from sparseft.methods import get_method
from sparseft.methods.selecting import compute_selection
from sparseft.modeling import (
    ModelSpec,
    base_fingerprint,
    check_model_path,
    load_model,
    load_tokenizer,
    resolve_device,
)
from sparseft.selection import Selection


@dataclass
class Prepared:
    """A loaded model with its tokenizer and data."""

    model: nn.Module
    tokenizer: Any
    data: Any  # data.LoadedData
    device: Any


def check_hardware(config: RunConfig) -> None:
    """Refuses what this version cannot do yet, before anything is loaded."""
    if config.hardware.num_processes != 1 or config.hardware.zero_stage != 0:
        raise UserError(
            f"hardware.num_processes={config.hardware.num_processes}, hardware.zero_stage="
            f"{config.hardware.zero_stage}: several processes are not available yet; use 1 and 0."
        )


def prepare(config: RunConfig) -> Prepared:
    """Loads tokenizer, data and model, the cheapest to check first, and says what they are."""
    import transformers

    check_hardware(config)
    device = resolve_device(config.hardware.device)
    check_model_path(config.model.path)
    transformers.logging.disable_progress_bar()
    tokenizer = load_tokenizer(config.model)
    data = load_datasets(
        config.dataset,
        tokenizer,
        max_length=config.trainer.max_length,
        seed=config.seed,
        bundled=config.model.path.startswith(BUNDLED),
    )
    for note in data.notes:
        console.log(f"data: {note}")
    model = load_model(config.model, device)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    total = sum(p.numel() for p in model.parameters())
    console.log(f"model: {config.model.path}, {total:,} parameters, {dtype} on {device}")
    return Prepared(model, tokenizer, data, device)


def selection_key(fingerprint: str, data_fingerprint: str, method: str, method_config: Any) -> str:
    """What a cached selection depends on: base weights, training examples, method, its settings and seed."""
    content = [fingerprint, data_fingerprint, method, asdict(method_config)]
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
    key = selection_key(base_fingerprint(prepared.model), prepared.data.fingerprint, config.method_name, config.method)
    path = Path(config.cache_dir) / "selections" / key
    start = time.perf_counter()
    if (path / "selection.json").is_file():
        try:
            selection = Selection.load(path)
        except UserError as error:
            console.warn(f"the cached selection is unusable and is computed anew: {error}")
        else:
            console.log(f"selection: cached, {path}")
            return Selected(selection, path, True, time.perf_counter() - start)
    method = config.method
    batches = None
    total = None
    if method.needs_data:
        pad = padding_id(prepared.tokenizer)
        batches = calibration_batches(prepared.data.train, method.num_samples, method.seed, pad)
        total = len(batches)
        console.log(f"selection: scoring by {method.importance} on {total} calibration examples")
    with console.Progress(total, "calibrate", unit="sample") as progress:
        selection = compute_selection(prepared.model, method, batches, progress=progress.update)
    selection.meta["key"] = key
    spec = ModelSpec.of(prepared.model)
    selection.save(path, {name: spec.linears[name] for name in selection.modules})
    seconds = time.perf_counter() - start
    console.log(f"selection: computed in {seconds:.1f} s, kept in {path}")
    return Selected(selection, path, False, seconds)


def describe_selection(selection: Selection, config: RunConfig) -> None:
    """Says what trains, and warns where it is off by more than a tenth from the share asked for."""
    trainable = selection.meta["trainable_parameters"]
    scope, total = selection.meta["scope_parameters"], selection.meta["total_parameters"]
    console.log(
        f"trainable: {trainable:,} of {scope:,} weights in scope (sparsity {1 - trainable / scope:.2%} in scope, "
        f"{1 - trainable / total:.2%} of the whole model)"
    )
    sparsity = getattr(config.method, "sparsity", None)
    if sparsity is not None:
        wanted = (1 - sparsity) * scope
        if abs(trainable - wanted) > 0.1 * wanted:
            unit = f"blocks of {selection.block_size}" if selection.has_blocks else "heads and channels"
            console.warn(
                f"sparsity {sparsity} asks for {wanted:,.0f} trainable weights; with {unit} it is {trainable:,} "
                f"(sparsity {1 - trainable / scope:.4f})"
            )


def is_sparse(config: RunConfig) -> bool:
    """Whether the run's method needs a selection."""
    return get_method(config.method_name).sparse

"""What choosing costs: the calibration and scoring of each importance, against plain forward and backward passes.

The reference is what computing every weight gradient of the same samples takes, in batches of `bench.batch_size`. All
take turns, so that a machine's slow moments meet all of them. An importance that keeps sums as large as the model is
measured a second time, a decoder layer at a time; on the CPU the kept hidden states lie in a file, which is no part of
its memory.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sparseft import console
from sparseft.bench.models import base_model, check_length, model_name, random_tokens
from sparseft.bench.output import Output, device_name, measured_on
from sparseft.bench.timing import peak_bytes, spread, take_turns
from sparseft.config import RunConfig
from sparseft.errors import UserError, nearest
from sparseft.importance.scores import LARGE
from sparseft.methods import sparse_methods
from sparseft.methods.base import IMPORTANCES
from sparseft.models.loading import resolve_device
from sparseft.models.spec import ModelSpec
from sparseft.selection.compute import compute_selection

REFERENCE = "forward+backward"


def forward_backward(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    """The loss of every batch and its gradient by every weight, which is dropped again."""
    for batch in batches:
        model(**batch, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)


def run(config: RunConfig, output: Output | None = None) -> dict[str, Any]:
    """Measures `bench.importances` with the run's method and returns what `bench.json` holds."""
    settings = config.bench
    if not config.method.sparse:
        raise UserError(
            f"bench preprocess: method={config.method_name} selects nothing; use method={sparse_methods()}."
        )
    if not settings.importances:
        raise UserError(f"bench.importances is empty: name at least one of {', '.join(IMPORTANCES)}.")
    if len(set(settings.importances)) != len(settings.importances):
        raise UserError("bench.importances: an importance is named twice.")
    for name in settings.importances:
        if name not in IMPORTANCES:
            raise UserError(f"bench.importances: unknown importance '{name}'.{nearest(name, IMPORTANCES)}")
    device = resolve_device(config.hardware.device)
    model = base_model(config, device)
    check_length(config, model)
    chosen = config.method.settled(ModelSpec.of(model).narrowed(config.method.layers))
    ids = random_tokens(model, settings.samples, settings.length, config.seed, device)
    batches = [{"input_ids": part, "labels": part} for part in ids.split(settings.batch_size)]

    work: dict[str, Callable[[], Any]] = {REFERENCE: lambda: forward_backward(model, batches)}
    for name in settings.importances:
        method = dataclasses.replace(chosen, importance=name, num_samples=settings.samples)
        work[name] = lambda method=method: compute_selection(model, method, batches, by_layer=False)
        if name in LARGE:
            work[f"{name}, layer by layer"] = lambda method=method: compute_selection(
                model, method, batches, by_layer=True
            )
    parameters = sum(p.numel() for p in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    console.log(
        f"bench: {parameters:,} parameters, {dtype} on {device}, {settings.samples} samples of {settings.length} tokens"
    )
    seconds = take_turns(work, settings, device)
    peaks = {name: peak_bytes(call, device) for name, call in work.items()}
    reference = statistics.median(seconds[REFERENCE])
    return {
        "benchmark": "preprocess",
        "model": model_name(config),
        "parameters": parameters,
        "dtype": dtype,
        "device": device_name(device),
        "method": config.method_name,
        "method_config": dataclasses.asdict(chosen),
        "samples": settings.samples,
        "batch_size": settings.batch_size,
        "length": settings.length,
        "steps": settings.steps,
        "importances": {
            name: {
                **spread("seconds", times),
                "ratio": statistics.median(times) / reference,
                "peak_memory_bytes": peaks[name],  # on top of the model
            }
            for name, times in seconds.items()
        },
    }


def title(result: dict[str, Any]) -> str:
    """What was measured, in one line."""
    return (
        f"Selection: {result['model']}, {result['parameters']:,} parameters, {result['dtype']} on "
        f"{measured_on(result)}, {result['samples']} samples of {result['length']} tokens, median of {result['steps']}"
    )


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row for each importance."""
    columns = ["importance", "seconds", "÷ forward+backward", "peak MiB on top of the model"]
    return columns, [
        [name, f"{row['seconds']:.2f}", f"{row['ratio']:.2f}", f"{row['peak_memory_bytes'] / 2**20:,.1f}"]
        for name, row in result["importances"].items()
    ]

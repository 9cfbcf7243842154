"""One training step of every method, side by side.

The methods take turns, so that a machine's slow moments meet all of them. The ways of `bench.ways` follow one after
another, so that the models of one way only are in memory at once: compare methods within a way, and ways by their
ratios to the floor.
"""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseft import console
from sparseft.bench import profiling, rows, targets, ways
from sparseft.bench.contenders import FLOOR, Contender, contender, measure_memory, step
from sparseft.bench.machine import device_name
from sparseft.bench.shapes import base_model, check_length, model_name
from sparseft.bench.timing import attempt, spread, take_turns
from sparseft.config import RunConfig
from sparseft.errors import UserError
from sparseft.memory import tensor_bytes
from sparseft.models.loading import resolve_device


def run(
    config: RunConfig,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    place: Callable[[str], Path] | None = None,
    keep: Callable[[dict[str, Any]], Any] | None = None,
) -> dict[str, Any]:
    """Measures `bench.methods` in every way of `bench.ways` and returns what `bench.json` holds.

    A method whose package is missing, and a way that cannot be had, is named with the reason (`missing`), not dropped;
    so is a method that raises (`failed`), and the others go on.

    own: settings of single entries of `bench.methods`, by entry. place: where a file of the given name belongs, asked
    when there is one to write: the traces of `bench.profile`. keep: given what there is after each way but the last,
    before anything is profiled, and where an interrupt ends a way, with the rounds that it has finished.
    """
    settings = config.bench
    if len(set(settings.methods)) != len(settings.methods) or not settings.methods:
        raise UserError("bench.methods: expected one or more different methods.")
    for target in settings.targets:
        targets.parse(target, settings.methods)
    ways.check(settings.ways)
    ways.check_hardware(config.hardware)
    if settings.profile and "compile" in ways.parts(settings.ways[0]):
        raise UserError(f"bench.profile: the first of bench.ways is '{settings.ways[0]}': only eager steps show parts.")
    device = resolve_device(config.hardware.device)
    base = base_model(config, device)
    check_length(config, base)
    vocabulary = base.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(config.seed)
    ids = torch.randint(vocabulary, (settings.batch_size, settings.length), generator=generator).to(device)
    batch = {"input_ids": ids, "labels": ids}
    parameters = sum(p.numel() for p in base.parameters())
    dtype = str(base.dtype).removeprefix("torch.")
    shape = f"{settings.batch_size} x {settings.length} tokens" + (
        f" x {settings.accumulation}" if settings.accumulation > 1 else ""
    )
    console.log(f"bench: {parameters:,} parameters, {dtype} on {device}, {shape}")
    weights = tensor_bytes([*base.parameters(), *base.buffers()])
    measured: dict[str, dict[str, dict[str, Any]]] = {}

    def so_far() -> dict[str, Any]:
        methods = measured[settings.ways[0]]
        return {
            "benchmark": "train",
            "model": model_name(config),
            "parameters": parameters,
            "weights_bytes": weights,
            "dtype": dtype,
            "device": device_name(device),
            "batch_size": settings.batch_size,
            "length": settings.length,
            "accumulation": settings.accumulation,
            "steps": settings.steps,
            "methods": methods,
            "ways": measured,
            "targets": targets.judge(settings.targets, methods, weights),
        }

    def kept(way: str, rows_so_far: dict[str, dict[str, Any]]) -> None:
        if keep is not None:
            measured[way] = rows_so_far
            keep(so_far())

    for position, way in enumerate(settings.ways):
        traces = place if settings.profile and position == 0 else None
        measured[way] = measure(way, base, batch, config, own or {}, device, traces, functools.partial(kept, way))
        gc.collect()  # its models hold themselves in cycles, and the next are made at once
        if keep is not None and len(measured) < len(settings.ways):
            keep(so_far())
    return so_far()


def measure(
    way: str,
    base: nn.Module,
    batch: dict[str, Tensor],
    config: RunConfig,
    own: Mapping[str, Mapping[str, Any]],
    device: torch.device,
    traces: Callable[[str], Path] | None = None,
    keep: Callable[[dict[str, dict[str, Any]]], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """The rows of all contenders in one way; of one that cannot be had or raises, why (`bench.rows`).

    traces: where the profiler's traces belong; null: nothing is profiled. keep: given the rows before they are
    profiled, and where an interrupt ends it sooner, rows of the rounds that all have finished (`rounds` of each).
    """
    settings = config.bench
    found: dict[str, dict[str, Any]] = {entry: {} for entry in settings.methods}  # in the order asked for
    contenders: dict[str, Contender] = {}
    calls: dict[str, Callable[[], None]] = {}

    def failed(entry: str, error: Exception) -> None:
        found[entry] = rows.failed(error)
        console.log(f"bench: {entry} failed: {found[entry]['failed']}")
        contenders.pop(entry, None)  # nothing holds its memory any more: the others may need it
        calls.pop(entry, None)

    def make(entry: str) -> None:
        try:
            made = contender(entry, base, config, own.get(entry))
            ways.apply(way, made, functools.partial(step, made, batch))
        except ModuleNotFoundError as error:
            found[entry] = {"missing": f"{error.name} is not installed"}
        except ways.NotAvailable as error:
            found[entry] = {"missing": str(error)}
        else:
            contenders[entry] = made
            calls[entry] = functools.partial(step, made, batch, settings.accumulation)

    compiled = "compile" in ways.parts(way)
    recomputes = "checkpointing" in ways.parts(way)

    def count(entry: str) -> None:
        measure_memory(contenders[entry], batch, device, settings.accumulation, recomputes)

    def fill(rounds: int | None = None) -> None:
        for entry, c in contenders.items():
            c.seconds = seconds[entry][:rounds]
        for entry, c in contenders.items():
            found[entry] = row(c, list(contenders.values()), tokens)
            if rounds is not None:
                found[entry]["rounds"] = rounds

    def profile_failed(entry: str, error: Exception) -> None:
        found[entry]["profile"] = rows.failed(error)  # beside its figures, which hold
        console.log(f"bench: {entry} failed under the profiler: {found[entry]['profile']['failed']}")

    tokens = settings.batch_size * settings.length * settings.accumulation
    for entry in settings.methods:
        attempt(entry, functools.partial(make, entry), failed, device)
    seconds: dict[str, list[float]] = {}
    try:
        take_turns(calls, settings, device, failed, seconds)
        for entry in list(contenders):
            if not compiled:  # the counters do not see inside compiled code
                attempt(entry, functools.partial(count, entry), failed, device)
    except BaseException:  # an interrupt
        rounds = min((len(seconds[entry]) for entry in contenders), default=0)
        if rounds and keep is not None:
            fill(rounds)
            keep(found)
        raise
    fill()
    if traces is not None and calls:
        if keep is not None:
            keep(found)
        profiled = profiling.profile(calls, batch["input_ids"].numel(), device, traces, profile_failed)
        for entry, profile in profiled.items():
            found[entry]["profile"] = profile
    if compiled:
        ways.release()
    return found


def row(c: Contender, contenders: Sequence[Contender], tokens: int) -> dict[str, Any]:
    """One method's figures; ratios are of median step times."""
    median = statistics.median(c.seconds)
    ratios = {}
    for other in contenders:
        if other.name.split()[0] in (FLOOR, "lora", "full"):
            ratios[other.name] = median / statistics.median(other.seconds)
    return {
        **spread("step_seconds", c.seconds),
        "tokens_per_second": tokens / median,
        "peak_memory_bytes": c.peak_bytes,
        "saved_bytes": c.saved_bytes,
        "trainable_parameters": c.trainable,
        "ratio_to": ratios,
        **c.facts,
    }

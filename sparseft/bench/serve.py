"""Serving many adapters on one base: the time of a switch, and batches in which each row has an adapter of its own.

A switch is from one adapter to another, both in memory. Beside ours stand the ways of others: PEFT's hot swap, which
copies a LoRA over another (every forward pass then pays for the low-rank product); merge and unmerge, after which it
does not; and loading a state dict of the whole model. All have as many trained weights. Bytes are what a switch writes
into the model's tensors.

In a mixed batch row i has adapter i; a forward pass without a cache is timed. With `bench.adapters` the adapters are
the user's own, on their base, with nothing beside them (`own_adapters.py`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseft import console
from sparseft.adapters.lifecycle import attach, detach, load_adapter, save_adapter, set_adapter
from sparseft.bench import own_adapters, targets
from sparseft.bench.contenders import FLOOR, check_methods, check_run_as, method_config, own_settings, owns_weights
from sparseft.bench.models import CONTEXT, DTYPES, random_llama, random_tokens, square_shape
from sparseft.bench.output import Output, device_name, measured_on
from sparseft.bench.sharing import SharedWeights
from sparseft.bench.timing import (
    absent,
    attempt_each,
    failed_row,
    kind,
    measured,
    reclaim,
    seconds_of,
    spread,
    take_turns,
)
from sparseft.config import RunConfig
from sparseft.data.formats import counted
from sparseft.errors import UserError
from sparseft.layers import sparse_layers
from sparseft.memory import tensor_bytes
from sparseft.methods import get_method
from sparseft.models.loading import resolve_device
from sparseft.models.spec import ModelSpec
from sparseft.report.charts import Panel, Series, line_chart, standalone

MERGE, STATE, BASE = "merge and unmerge", "state dict", "base"
LORA = "lora"  # whose adapters are merged
NOTHING = "-"
WIDTH, ADAPTERS, OWN = "width", "adapters", "own"
Timed = Callable[[], float]  # does what is measured, and returns its seconds


def run(config: RunConfig, output: Output | None = None) -> dict[str, Any]:
    """Measures switches on a layer of each of `bench.widths`, and, on the narrowest, forward passes of mixed batches of
    each of `bench.batches` adapters by each of `bench.lengths` tokens; draws both, and returns what `bench.json` holds.

    `bench.width` is where a target of switches is judged.

    output: takes the charts; None: nothing is written.
    """
    settings = config.bench
    check(config)
    own = own_settings(settings.methods)
    device = resolve_device(config.hardware.device)
    said = {
        "benchmark": "serve",
        "dtype": str(DTYPES[config.model.dtype]).removeprefix("torch."),
        "device": device_name(device),
        "steps": settings.steps,
        "width": settings.width,
        "depth": settings.depth,
    }
    if settings.adapters:
        return said | {"width": None, "depth": None} | _own(config, device)
    points: list[dict[str, Any]] = []
    judged: list[dict[str, Any]] = []

    def add(axis: str, value: int, rows: dict[str, dict[str, Any]], **more: Any) -> None:
        points.append({"axis": axis, "value": value, **more, "methods": rows})
        quantity = "switch" if axis == WIDTH else "mixed"
        if axis == WIDTH and value != settings.width:
            return
        lines = [line for line in settings.targets if parsed(line, config).quantity == quantity]
        where = f" ({label(points[-1])})"
        judged.extend(
            entry | {"target": entry["target"] + where} for entry in targets.judge(lines, rows, 0, targets.SERVE)
        )

    for width in settings.widths:
        console.log(f"bench: switches at width {width:,}")
        add(WIDTH, width, switches(config, own, width, device))
        reclaim(device)
    base = random_llama(min(settings.widths), settings.depth, DTYPES[config.model.dtype], config.seed).to(device).eval()
    for length in settings.lengths:
        for count in settings.batches:
            console.log(f"bench: a mixed batch: {count} adapters, {length} tokens a row")
            add(ADAPTERS, count, mixed(config, own, base, count, length, device), length=length)
    result = said | {"points": points, "targets": judged, "charts": []}
    return result if output is None else drawn(result, output)


def check(config: RunConfig) -> None:
    """Refuses settings by which there is nothing to measure."""
    settings = config.bench
    own_adapters.folders(config)
    check_methods(settings.methods)
    check_run_as(config, choosable=False)
    if settings.profile or settings.ways != ["eager"]:
        raise UserError("bench.profile and bench.ways belong to 'sparseft bench train'.")
    if settings.shape is not None or settings.width is None or settings.depth is None:
        raise UserError("bench serve makes its own models: give bench.width and bench.depth, not bench.shape.")
    for entry in settings.methods:
        if entry.split()[0] == FLOOR or owns_weights(entry):
            raise UserError(
                f"bench.methods: '{entry}' has no adapter that could be switched: expected sparse methods, lora."
            )
    for name in ("widths", "batches", "lengths"):
        values = getattr(settings, name)
        if not values or min(values) < 1 or len(set(values)) != len(values):
            raise UserError(f"bench.{name}: expected one or more different numbers, at least 1.")
    if max(settings.lengths) > CONTEXT:
        raise UserError(f"bench.lengths: {max(settings.lengths)}: the models' context is {CONTEXT} tokens.")
    for width in (*settings.widths, settings.width):
        square_shape(width, settings.depth)
    for line in settings.targets:
        parsed(line, config)


def _own(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """The points of `bench.adapters`, of which no target speaks."""
    console.log(f"bench: {len(config.bench.adapters)} adapters of {config.model.path}")
    switch, mixed = own_adapters.measure(config, device)
    count = len(config.bench.adapters)
    points = [{"axis": OWN, "value": count, "methods": switch}]
    points += [{"axis": ADAPTERS, "value": count, "length": n, "methods": rows} for n, rows in mixed.items()]
    return {
        "model": config.model.path,
        "adapters": config.bench.adapters,
        "points": points,
        "targets": [],
        "charts": [],
    }


def parsed(line: str, config: RunConfig) -> targets.Target:
    """A line of `bench.targets`, which may name a method, a way of others, or the base."""
    return targets.parse(line, [*config.bench.methods, MERGE, STATE, BASE], targets.SERVE)


# ---- adapters ----


def sparse_adapters(
    model: nn.Module, config: RunConfig, entry: str, own: Mapping[str, Any], count: int
) -> tuple[nn.Module, int]:
    """The model with adapters "0", "1", … of random selections and deltas, none of them active, and the weights that
    each trains."""
    name = entry.split()[0]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            settings = method_config(name, config, own)
            settings.seed = number
            model = attach(model, settings, spec=ModelSpec.of(model))
            trained = randomised(model, number)
            save_adapter(model, Path(folder) / str(number))
            model = detach(model)
        for number in range(count):
            load_adapter(model, Path(folder) / str(number), str(number))
    return set_adapter(model, None).eval(), trained


@torch.no_grad()
def randomised(model: nn.Module, seed: int) -> int:
    """Gives the deltas random values and returns how many weights train."""
    generator = torch.Generator().manual_seed(seed)
    for layer in sparse_layers(model).values():
        for pattern in layer.patterns.values():
            pattern.delta.copy_(torch.randn(pattern.delta.shape, generator=generator) * 1e-3)
    return sum(layer.trainable_entries for layer in sparse_layers(model).values())


def lora_adapters(
    model: nn.Module, config: RunConfig, entry: str, own: Mapping[str, Any], count: int
) -> tuple[Any, int]:
    """peft's model with adapters "default", "1", … of random values, the first active, and the weights of each."""
    wrapped: Any = attach(model, method_config(entry.split()[0], config, own))
    for number in range(1, count):
        wrapped.add_adapter(str(number), wrapped.peft_config["default"])
    generator = torch.Generator().manual_seed(config.seed)
    lora = {name: p for name, p in wrapped.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        for parameter in lora.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1e-2)
    return wrapped.eval(), sum(p.numel() for name, p in lora.items() if ".default." in name)


# ---- switches ----


def switches(
    config: RunConfig, own: Mapping[str, Mapping[str, Any]], width: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """A row for each method and each way of others, with `switch_seconds`, `bytes` and `trainable_parameters`."""
    weights = SharedWeights(random_llama(width, 1, DTYPES[config.model.dtype], config.seed).to(device).eval())
    names = [*config.bench.methods, MERGE, STATE]
    rows: dict[str, dict[str, Any]] = {name: {} for name in names}
    calls: dict[str, Timed] = {}

    def make(name: str) -> None:
        entry = name if name not in (MERGE, STATE) else LORA
        if name == STATE:
            calls[name], facts = state_dict_switch(weights.copy(own=True), device)
        elif get_method(entry.split()[0]).sparse:
            model = weights.copy()
            weights.claim(model)
            calls[name], facts = sparse_switch(*sparse_adapters(model, config, entry, own.get(entry, {}), 2), device)
            weights.give(None)
        elif name == MERGE:
            made = lora_adapters(weights.copy(own=True), config, entry, {}, 2)
            calls[name], facts = merge_switch(*made, device)
        else:
            made = lora_adapters(weights.copy(), config, entry, own.get(entry, {}), 1)
            calls[name], facts = hot_swap(*made, device)
        rows[name] = facts

    def failed(name: str, error: Exception) -> None:
        rows[name] = failed_row(error)
        console.log(f"bench: {name} failed: {rows[name]['failed']}")
        calls.pop(name, None)

    attempt_each(names, make, failed, device)
    seconds = take_turns(dict(calls), config.bench, device, failed, clock=lambda call, _device: call())
    for name, times in seconds.items():
        rows[name] |= spread("switch_seconds", times)
    return rows


def sparse_switch(model: nn.Module, trained: int, device: torch.device) -> tuple[Timed, dict[str, Any]]:
    """From adapter "0" to "1", as `set_adapter` does it; the base's weights before and after."""

    def turn() -> float:
        set_adapter(model, "0")
        seconds = seconds_of(lambda: set_adapter(model, "1"), device)
        set_adapter(model, None)
        return seconds

    element = next(model.parameters()).element_size()
    return turn, {"trainable_parameters": trained, "bytes": 2 * trained * element}  # one put back, one written


def hot_swap(model: Any, trained: int, device: torch.device) -> tuple[Timed, dict[str, Any]]:
    """peft's hot swap between two LoRAs of which the model holds one."""
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    config = model.peft_config["default"]
    first = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}
    both = (first, {name: value.flip(0) for name, value in first.items()})

    def turn() -> float:
        hotswap_adapter_from_state_dict(model, both[0], "default", config)
        return seconds_of(lambda: hotswap_adapter_from_state_dict(model, both[1], "default", config), device)

    return turn, {"trainable_parameters": trained, "bytes": tensor_bytes(first.values())}


def merge_switch(model: Any, trained: int, device: torch.device) -> tuple[Timed, dict[str, Any]]:
    """peft's unmerge of one LoRA and merge of another, of which the weights are its own: unmerging rounds."""

    def switch() -> None:
        model.unmerge_adapter()
        model.set_adapter("1")
        model.merge_adapter()

    def turn() -> float:
        model.set_adapter("default")
        model.merge_adapter()
        seconds = seconds_of(switch, device)
        model.unmerge_adapter()
        return seconds

    merged = [module.base_layer.weight for module in model.modules() if hasattr(module, "base_layer")]
    return turn, {"trainable_parameters": trained, "bytes": 2 * tensor_bytes(merged)}


def state_dict_switch(model: nn.Module, device: torch.device) -> tuple[Timed, dict[str, Any]]:
    """Another whole model's weights, from the device's own memory."""
    both = [{name: value.clone() for name, value in model.state_dict().items()} for _ in range(2)]

    def turn() -> float:
        model.load_state_dict(both[0])
        return seconds_of(lambda: model.load_state_dict(both[1]), device)

    return turn, {"bytes": tensor_bytes(both[0].values())}


# ---- mixed batches ----


def mixed(
    config: RunConfig,
    own: Mapping[str, Mapping[str, Any]],
    base: nn.Module,
    count: int,
    length: int,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """A row for each method with `mixed_seconds` of a forward pass of `count` rows, each with another adapter, and
    `tokens_per_second`; and one for the base alone. Missing are those of which no batch has several (DoRA)."""
    weights = SharedWeights(base)
    ids = random_tokens(base, count, length, config.seed, device)
    rows: dict[str, dict[str, Any]] = {name: {} for name in (BASE, *config.bench.methods)}
    calls: dict[str, Callable[[], Any]] = {}
    plain: list[Tensor] = []  # the base's answers, (rows, tokens, vocabulary)

    def make(name: str) -> None:
        model, trained, names = weights.copy(), 0, None
        if name == BASE:
            calls[name] = lambda: base(ids, use_cache=False)
        elif get_method(name.split()[0]).sparse:
            weights.claim(model)
            model, trained = sparse_adapters(model, config, name, own.get(name, {}), count)
            weights.give(None)
            names = [str(number) for number in range(count)]
            calls[name] = lambda: model(ids, adapter_names=names, use_cache=False)
        else:
            model, trained = lora_adapters(model, config, name, own.get(name, {}), count)
            names = ["default", *(str(number) for number in range(1, count))]
            calls[name] = lambda: model(ids, adapter_names=names, use_cache=False)
        rows[name] = {"trainable_parameters": trained}
        try:
            with torch.inference_mode():
                answers = calls[name]().logits
        except UserError as error:  # DoRA
            rows[name] = {"missing": str(error)}
            console.log(f"bench: {name} is missing: {error}")
            del calls[name]
            return
        for before in plain:
            unlike = [not torch.equal(row, other) for row, other in zip(answers, before, strict=True)]
            assert all(unlike), "it answers as the base does"
        if name == BASE:
            plain.append(answers)

    def failed(name: str, error: Exception) -> None:
        rows[name] = failed_row(error)
        console.log(f"bench: {name} failed: {rows[name]['failed']}")
        calls.pop(name, None)
        weights.give(None)

    attempt_each(rows, make, failed, device)
    plain.clear()
    with torch.inference_mode():
        seconds = take_turns(calls, config.bench, device, failed)
    for name, times in seconds.items():
        rows[name] |= spread("mixed_seconds", times)
        rows[name]["tokens_per_second"] = count * length / rows[name]["mixed_seconds"]
    return rows


# ---- what is shown ----


def label(point: Mapping[str, Any]) -> str:
    """What a point is, in a few words."""
    if point["axis"] == WIDTH:
        return f"width {point['value']}"
    if point["axis"] == OWN:
        return "a switch"
    return f"{counted(point['value'], 'adapter')}, {counted(point['length'], 'token')} a row"


def drawn(result: dict[str, Any], output: Output) -> dict[str, Any]:
    """The result with two charts: milliseconds of a switch over the width, tokens a second over the adapters."""
    switch = Panel("switch, ms", series(result, "switch_seconds", WIDTH, scale=1000), zero=True)
    lengths = dict.fromkeys(point["length"] for point in result["points"] if point["axis"] == ADAPTERS)
    mixed = [
        Panel(f"tokens a second, rows of {length}", series(result, "tokens_per_second", ADAPTERS, length), zero=True)
        for length in lengths
    ]
    charts = {
        "serve-switch.svg": line_chart([[switch]], "width (features)"),
        "serve-mixed.svg": line_chart([mixed], "adapters in a batch", width=440),
    }
    for name, svg in charts.items():
        output.write(name, standalone(svg))
    return result | {"charts": list(charts)}


def series(
    result: Mapping[str, Any], field: str, axis: str, length: int | None = None, scale: float = 1
) -> list[Series]:
    """A line for each method that has the field on an axis."""
    lines: dict[str, list[tuple[float, float | None]]] = {}
    for point in result["points"]:
        if point["axis"] == axis and point.get("length") == length:
            for name, row in measured(point["methods"]).items():
                if field in row:
                    lines.setdefault(name, []).append((point["value"], scale * row[field]))
    return [Series(name, points, number, markers=True) for number, (name, points) in enumerate(lines.items())]


def title(result: Mapping[str, Any]) -> str:
    """What was measured, in one line."""
    return f"Serving many adapters: {result['dtype']} on {measured_on(result)}, medians of {result['steps']}"


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row for each point and method."""
    columns = ["what", "method", "trained weights", "ms", "p20", "p80", "MiB written", "tokens/s", "÷ base"]
    rows = []
    for point in result["points"]:
        base = point["methods"].get(BASE, {})
        for name, row in point["methods"].items():
            if absent(row):
                rows.append([label(point), name, kind(row), *[NOTHING] * 6])
                continue
            field = "mixed_seconds" if point["axis"] == ADAPTERS else "switch_seconds"
            trained, written, speed = (row.get(key) for key in ("trainable_parameters", "bytes", "tokens_per_second"))
            rows.append(
                [
                    label(point),
                    name,
                    f"{trained:,}" if trained else NOTHING,
                    *(f"{1000 * row[key]:.2f}" for key in (field, f"{field}_p20", f"{field}_p80")),
                    NOTHING if written is None else f"{written / 2**20:,.2f}",
                    NOTHING if speed is None else f"{speed:,.0f}",
                    f"{row[field] / base[field]:.2f}" if field in base else NOTHING,
                ]
            )
    return columns, rows


def notes(result: Mapping[str, Any]) -> list[str]:
    """A line for each target."""
    return targets.lines(result["targets"])

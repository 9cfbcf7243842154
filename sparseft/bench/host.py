"""The host's part of a training step: what Python and torch's dispatch take, beside which a GPU has to be busy.

Measured in a model so small that arithmetic takes no time. On CUDA it is the time until a step is queued, without
waiting for the device; a device that falls a thousand launches behind makes the host wait nevertheless. On a CPU, where
nothing can be queued, it is the CPU time of the one thread: sparse layers and their optimizer go the way that they go
on CUDA up to their kernels' launches, which are left out. `reference` is the time with plain torch's products instead
of the blocks' kernel.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparseft import console
from sparseft.bench import targets
from sparseft.bench.contenders import FLOOR, Contender, check_methods, check_steps, contender, loss_of, settings_of
from sparseft.bench.models import measured_model
from sparseft.bench.output import Output, measured_on
from sparseft.bench.sharing import SharedWeights
from sparseft.bench.timing import absent, attempt_each, failed_row, kind, measured, spread, synchronize, take_turns
from sparseft.config import RunConfig
from sparseft.errors import UserError
from sparseft.kernels import dispatch
from sparseft.layers import sparse_layers
from sparseft.replaced import replaced, variables
from sparseft.training.optimizer import SparseAdamW

NOTHING = "-"
Spent = dict[str, float]  # seconds by quantity: `passes`, and where there are such `update` and `reference`


def run(config: RunConfig, output: Output | None = None) -> dict[str, Any]:
    """Measures `bench.methods` and returns what `bench.json` holds.

    A method whose package is missing is named with the reason (`missing`), so is one that raises (`failed`).
    """
    settings = config.bench
    check(config)
    own = settings_of(config)
    base, batch, facts = measured_model(config)
    device = batch["input_ids"].device
    said = {"benchmark": "host", **facts, "threads": 1}
    console.log(f"bench: {said['parameters']:,} parameters, {said['dtype']} on {device}")
    weights = SharedWeights(base)
    contenders: dict[str, Contender] = {}
    rows: dict[str, dict[str, Any]] = {entry: {} for entry in settings.methods}

    def make(entry: str) -> None:
        try:
            contenders[entry] = contender(entry, weights, config, own.get(entry))
        except ModuleNotFoundError as error:
            rows[entry] = {"missing": f"{error.name} is not installed"}

    def failed(entry: str, error: Exception) -> None:
        rows[entry] = failed_row(error)
        console.log(f"bench: {entry} failed: {rows[entry]['failed']}")
        weights.give(None)
        contenders.pop(entry, None)
        calls.pop(entry, None)

    calls: dict[str, Callable[[], Spent]] = {}
    with one_thread():
        attempt_each(settings.methods, make, failed, device)
        calls |= {entry: functools.partial(turn, made, batch, device) for entry, made in contenders.items()}
        seconds = take_turns(
            calls,
            settings,
            device,
            failed,
            clock=lambda call, _device: call(),
            prepare=lambda entry: contenders[entry].take_turn(),
        )
    weights.give(None)
    floor = seconds.get(FLOOR)
    rows |= {entry: row(made, seconds[entry], floor) for entry, made in contenders.items()}
    judged = targets.judge(settings.targets, rows, 0, targets.HOST)
    return said | {"methods": rows, "targets": judged}


def check(config: RunConfig) -> None:
    """Refuses settings by which there is nothing to measure."""
    settings = config.bench
    check_methods(settings.methods)
    for target in settings.targets:
        targets.parse(target, settings.methods, targets.HOST)
    if settings.profile or settings.ways != ["eager"]:
        raise UserError("bench.profile and bench.ways belong to 'sparseft bench train'.")
    check_steps(config, choosable=False)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def turn(c: Contender, batch: Mapping[str, Tensor], device: torch.device) -> Spent:
    """What one contender takes in one round, each time after a step that does not count: in training, too, it finds the
    caches as its own last step has left them."""
    without_launches(c, batch, device)
    spent = without_launches(c, batch, device)
    if any("blocks" in layer.patterns for layer in sparse_layers(c.model).values()):
        with_reference(c, batch, device)
        spent["reference"] = with_reference(c, batch, device)
    return spent


def without_launches(c: Contender, batch: Mapping[str, Tensor], device: torch.device) -> Spent:
    """A step that waits for no kernel: on CUDA as it is, on a CPU without launching any."""
    with contextlib.nullcontext() if device.type == "cuda" else launches_left_out():
        spent = {"passes": seconds_of(lambda: passes(c, batch), device)}
        if c.optimizer is not None:
            spent["update"] = seconds_of(c.optimizer.step, device)
            c.optimizer.zero_grad(set_to_none=True)
    return spent


def with_reference(c: Contender, batch: Mapping[str, Tensor], device: torch.device) -> float:
    """A forward and a backward pass with plain torch's products."""
    try:
        with variables(**{dispatch.VARIABLE: "reference"}):
            return seconds_of(lambda: passes(c, batch), device)
    finally:
        c.model.zero_grad(set_to_none=True)


def passes(c: Contender, batch: Mapping[str, Tensor]) -> None:
    """One forward and one backward pass."""
    loss_of(c, dict(batch)).backward()


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """The host's seconds in a call; the device has nothing to do before it, and is waited for afterwards."""
    # Of a thread alone, other work on the machine takes nothing; with CUDA another thread queues the backward pass.
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    synchronize(device)
    start = clock()
    call()
    seconds = clock() - start
    synchronize(device)
    return seconds


@contextlib.contextmanager
def launches_left_out() -> Iterator[None]:
    """Inside, tensors on the CPU go the way of those on CUDA up to the launches of our kernels, which do nothing.

    The gradients of blocks are allocated and left as they are, and the optimizer changes nothing: this is for timing.
    Without triton a GPU would go the reference's way too, and nothing is left out.
    """
    places: list[tuple[Any, str, Any]] = []
    with contextlib.suppress(ImportError):
        from triton.runtime.interpreter import InterpretedFunction  # in a JITFunction's place: TRITON_INTERPRET=1
        from triton.runtime.jit import JITFunction

        from sparseft.kernels import blocks_triton

        def kernel_for(tensor: Tensor) -> ModuleType | None:
            return blocks_triton if tensor.dtype in dispatch.KERNEL_DTYPES else None

        places = [(kernel, "run", no_launch) for kernel in (JITFunction, InterpretedFunction)]
        places += [(dispatch, "kernel_for", kernel_for), (SparseAdamW, "kernel_devices", frozenset({"cpu", "cuda"}))]
    with replaced(*places):
        yield


def no_launch(_kernel: Any, *_arguments: Any, **_options: Any) -> None:
    """In place of a Triton kernel's `run`, through which every `kernel[grid](…)` goes."""


def row(c: Contender, turns: Sequence[Spent], floor: Sequence[Spent] | None) -> dict[str, Any]:
    """One method's figures; ratios are of medians. None: the floor was not measured.

    Of a contender without blocks there is no kernel to be left out, and `reference_seconds` are `passes_seconds`.
    """
    times = {quantity: [spent[quantity] for spent in turns] for quantity in turns[0]}
    times.setdefault("reference", times["passes"])
    found: dict[str, Any] = {}
    for quantity in ("passes", "reference", "update"):
        found |= spread(f"{quantity}_seconds", times[quantity]) if quantity in times else {}
    beside = statistics.median(spent["passes"] for spent in floor) if floor else None
    return found | {
        "trainable_parameters": c.trainable,
        "trained_tensors": sum(len(g["params"]) for g in c.optimizer.param_groups) if c.optimizer is not None else 0,
        "ratio_to": {FLOOR: found["passes_seconds"] / beside} if beside else {},
        "reference_ratio_to": {FLOOR: found["reference_seconds"] / beside} if beside else {},
    }


# -- what is printed --------------------------------------------------------------------------------------------------


def title(result: dict[str, Any]) -> str:
    """What was measured, in one line."""
    environment = result["environment"] | {"threads": result["threads"]}
    left_out = "" if result["device"] != "cpu" else ", our kernels' launches left out"
    return (
        f"Host's part of a step: {result['model']}, {result['dtype']} on "
        f"{measured_on(result | {'environment': environment})}, {result['batch_size']} x {result['length']} tokens"
        f"{left_out}, medians of {result['steps']}"
    )


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows; `reference`: forward and backward with plain torch's products of blocks."""
    known = measured(result["methods"])
    floor = any(entry["ratio_to"] for entry in known.values())
    columns = ["method", "passes ms", "p20-p80", *(["÷ floor"] if floor else [])]
    columns += ["reference ms", "p20-p80", *(["÷ floor"] if floor else [])]
    columns += ["update ms", "p20-p80", "trained tensors"]
    rows = []
    for name, entry in result["methods"].items():
        if name not in known:
            rows.append([name, kind(entry), *[NOTHING] * (len(columns) - 2)])
            continue
        cells = [name]
        for quantity, ratios in (("passes", "ratio_to"), ("reference", "reference_ratio_to"), ("update", None)):
            cells += _figures(entry, quantity)
            if ratios and floor:
                cells.append(f"{entry[ratios][FLOOR]:.2f}")
        rows.append([*cells, str(entry["trained_tensors"])])
    return columns, rows


def _figures(entry: Mapping[str, Any], quantity: str) -> list[str]:
    """The median and the spread, in milliseconds."""
    field = f"{quantity}_seconds"
    if field not in entry:
        return [NOTHING, NOTHING]
    low, median, high = (1000 * entry[f"{field}{suffix}"] for suffix in ("_p20", "", "_p80"))
    return [f"{median:.2f}", f"{low:.2f}-{high:.2f}"]


def notes(result: dict[str, Any]) -> list[str]:
    """Lines below the table: what is missing or failed and why, and which targets hold."""
    without = {name: entry for name, entry in result["methods"].items() if absent(entry)}
    return [f"{kind(entry)}: {name}: {absent(entry)}" for name, entry in without.items()] + targets.lines(
        result["targets"]
    )

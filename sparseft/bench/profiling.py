"""Where a step's time goes, by torch's profiler: a trace to look at, and seconds by kind of work.

On a CPU the parts are the times of the operations themselves, without those they call, within the step; on CUDA those
of the kernels that they launch. What is left of the step's wall time is Python and dispatch (on CUDA: waiting for it).
So the parts add up to the step.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as profiler

from sparseft.bench.contenders import FLOOR
from sparseft.bench.timing import absent, attempt_each, synchronize
from sparseft.files.atomic import replaced_file
from sparseft.layers.joint_gradients import JointGradients
from sparseft.layers.product import FUNCTIONS

STEP = "sparseft::step"
ROUNDS = 3  # after one that does not count
MATMUL, ATTENTION, ELEMENTWISE = "matrix products", "attention", "norms, elementwise"
WEIGHT_GRADIENT, OPTIMIZER, COPIES, REST = "weight gradients", "optimizer", "copies", "python, dispatch"
PARTS = (MATMUL, ATTENTION, ELEMENTWISE, WEIGHT_GRADIENT, OPTIMIZER, COPIES, REST)

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "dot", "mkldnn_linear", "_linear_pointwise"}
MEMORY = {
    "copy_", "clone", "contiguous", "cat", "index_select", "index", "gather", "index_put_", "_index_put_impl_",
    "scatter_", "fill_", "zero_", "zeros", "zeros_like", "ones_like", "empty", "empty_like", "empty_strided",
    "new_empty", "resize_", "embedding",
}  # fmt: skip
# Operations that compute nothing: what they take is dispatch.
VIEWS = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "transpose", "t", "permute", "expand", "slice", "select",
    "unsqueeze", "squeeze", "as_strided", "detach", "alias", "narrow", "split", "unbind", "numpy_T", "to", "_to_copy",
    "linear", "matmul", "result_type", "item", "_local_scalar_dense", "expand_as", "flatten", "unflatten", "view_as",
    "lift_fresh", "chunk", "movedim", "set_", "resolve_conj", "resolve_neg",
}  # fmt: skip
_ATTENTION = re.compile(r"scaled_dot_product|flash_attn|flash_attention|efficient_attention|^_softmax")
_BACKWARD = re.compile(r"^autograd::engine::evaluate_function|Backward\d*$")
# Forward: the slices they save; backward: everything but the product for the input's gradient.
_JOINT = JointGradients.__name__
_OURS = (*(function.__name__ for function in FUNCTIONS), _JOINT)


def profile(
    calls: Mapping[str, Callable[[], Any]],
    tokens: int,
    device: torch.device,
    place: Callable[[str], Path],
    failed: Callable[[str, Exception], None],
    prepare: Callable[[str], Any],
) -> dict[str, dict[str, Any]]:
    """Profiles a step of every method in `ROUNDS` turns; of each method's the one of median length counts.

    Writes its Chrome trace, and returns its seconds by part and by operation. tokens: of a forward pass; by a sum over
    them a weight's gradient is told from other products. place: where a trace of the given file name belongs. failed:
    told of a call that raised, which then has no profile; a `UserError` ends them all. prepare: what a turn needs ahead
    of its call.
    """
    seen: dict[str, list[tuple[float, Any]]] = {name: [] for name in calls}
    profiled: dict[str, dict[str, Any]] = {}

    def record(name: str) -> None:
        prepare(name)
        seen[name].append(_record(calls[name], device))

    def summarise(name: str) -> None:
        records = seen[name][1:]  # a profiler does some things once
        total, recorded = sorted(records, key=lambda record: record[0])[len(records) // 2]
        path = place(f"trace-{re.sub(r'[^a-z0-9.=]+', '-', name.lower()).strip('-')}.json.gz")
        with replaced_file(path) as aside:
            recorded.export_chrome_trace(str(aside))
        parts, operations = split(recorded.events(), tokens, device.type == "cuda")
        parts[REST] = total - sum(seconds for part, seconds in parts.items() if part != REST)
        profiled[name] = {"step_seconds": total, "parts": parts, "operations": operations, "trace": path.name}

    left = list(calls)
    for work in (*[record] * (ROUNDS + 1), summarise):
        left = attempt_each(left, work, failed, device)
    return profiled


def _record(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of a call, and the profiler that has seen it."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with _without_probe_lines(), profiler(activities=activities, record_shapes=True) as recorded:
        with record_function(STEP):
            call()
            synchronize(device)
    return sum(event.cpu_time_total for event in recorded.events() if event.name == STEP) / 1e6, recorded


@contextlib.contextmanager
def _without_probe_lines() -> Iterator[None]:
    """Drops the two lines (`USDT:…`) that torch's profiler writes to stderr whenever it is used, and nothing else."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            caught.seek(0)
            for line in caught:
                if not line.startswith(b"USDT:"):
                    os.write(2, line)


def split(events: Iterable[Any], tokens: int, on_device: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by part, and by operation the twelve that take longest, of one profiled step."""
    parts = dict.fromkeys(PARTS, 0.0)
    operations: dict[str, float] = defaultdict(float)
    first_product: set[int] = set()  # nodes of the backward pass whose first product has been seen
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    for event in sorted(on_host, key=lambda event: event.time_range.start):
        above = _ancestors(event)
        if STEP not in [parent.name for parent in above]:
            continue
        seconds = (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6
        part = part_of(event, above, tokens, first_product)
        parts[part] += seconds
        if part != REST:
            operations[event.name] += seconds
    longest = sorted(operations.items(), key=lambda item: -item[1])[:12]
    return parts, dict(longest)


def _ancestors(event: Any) -> list[Any]:
    """The events around this one, the nearest first."""
    found, parent = [], event.cpu_parent
    while parent is not None:
        found.append(parent)
        parent = parent.cpu_parent
    return found


def part_of(event: Any, above: list[Any], tokens: int, first_product: set[int]) -> str:
    """The part that an event's own time belongs to."""
    names = [parent.name for parent in above]
    namespace, _, operation = event.name.rpartition("::")
    if any(name.startswith("Optimizer.") for name in (event.name, *names)):
        return OPTIMIZER
    if any(_ATTENTION.search(name.removeprefix("aten::")) for name in (event.name, *names)):
        return ATTENTION
    ours = any(name.rpartition(": ")[2].startswith(_OURS) for name in (event.name, *names))
    if operation in PRODUCTS:
        node = next((parent for parent in above if _BACKWARD.search(parent.name)), None)
        if node is None:
            return MATMUL
        if node.name.startswith(_JOINT):  # that one has no input's gradient
            return WEIGHT_GRADIENT
        first = id(node) not in first_product
        first_product.add(id(node))
        return WEIGHT_GRADIENT if sums_over_tokens(event.input_shapes, tokens, first) else MATMUL
    if namespace.startswith(("aten", "mkldnn", "sparseft")) and event.name != STEP and operation not in VIEWS:
        if ours:
            return WEIGHT_GRADIENT
        return COPIES if operation in MEMORY else ELEMENTWISE
    # Our own node's kernels are launched by it, not by an operation.
    return WEIGHT_GRADIENT if ours and event.name.startswith(_OURS) and event.self_device_time_total else REST


def sums_over_tokens(shapes: list[Any], tokens: int, first: bool) -> bool:
    """Whether a product (…, m, k) x (…, k, n) of the backward pass sums over the tokens: a weight's gradient.

    first: the node's first product. With as many features as tokens the shapes leave it open; the input's gradient
    comes first.
    """
    matrices = [shape for shape in shapes if isinstance(shape, (list, tuple)) and len(shape) >= 2]
    if len(matrices) < 2:
        return False
    m, k = matrices[-2][-2:]  # addmm names the bias first
    return k == tokens and not (first and m == tokens)


def table(methods: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Milliseconds by part, one column a method, beside each the difference to the floor."""
    names = [name for name, entry in methods.items() if "profile" in entry and not absent(entry["profile"])]
    rows = []
    for part in (*PARTS, "step"):
        cells = [part]
        for name in names:
            milliseconds = _milliseconds(methods[name], part)
            cells.append(f"{milliseconds:.1f}")
            if FLOOR in names and name != FLOOR:
                cells.append(f"{milliseconds - _milliseconds(methods[FLOOR], part):+.1f}")
        rows.append(cells)
    columns = ["ms a step"]
    for name in names:
        columns += [name] if FLOOR not in names or name == FLOOR else [name, "- floor"]
    return columns, rows


def _milliseconds(entry: dict[str, Any], part: str) -> float:
    profiled = entry["profile"]
    return 1000 * (profiled["step_seconds"] if part == "step" else profiled["parts"][part])

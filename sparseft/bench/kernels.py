"""The weight gradient of chosen blocks, timed against the dense one and against what memory allows.

`bound` is the time the device needs to move what any way of computing must move: the strips of the gradient and of the
input that the blocks touch, read once, and the result, written once, at the bandwidth of a large copy on that device.
On CUDA the caches are overwritten before each call, so that nothing is read from them, and times are the device's.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparseft.bench.models import DTYPES
from sparseft.bench.output import Output, device_name, measured_on
from sparseft.config import RunConfig
from sparseft.errors import UserError
from sparseft.kernels import dispatch
from sparseft.models.loading import resolve_device

LLAMA_7B = ((4096, 4096), (11008, 4096), (4096, 11008))  # (out, in): attention, gate and up, down
BLOCK_SIZES = (16, 64, 128)
DENSITIES = (0.016, 0.05)
SPIN, LONGEST_SPIN = 2_000_000, 2**8 * 1_000_000  # cycles of a GPU: about 1 ms, 130 ms
TRANSFER = {"cuda": 2**29, "cpu": 2**26}  # bytes of the copy that measures the bandwidth: far more than any cache


def run(config: RunConfig, output: Output | None = None) -> dict[str, Any]:
    """Measures LLaMA-7B's linears, or one of `bench.width` squared, and returns what `bench.json` holds.

    In `model.dtype` (auto: bf16 on CUDA, else fp32), for `bench.batch_size` × `bench.length` tokens, `bench.steps`
    times.
    """
    settings = config.bench
    if settings.width is not None and settings.width < BLOCK_SIZES[-1]:
        raise UserError(f"bench.width={settings.width}: expected at least {BLOCK_SIZES[-1]}, the largest block.")
    device = resolve_device(config.hardware.device)
    dtype = torch.bfloat16 if config.model.dtype == "auto" and device.type == "cuda" else DTYPES[config.model.dtype]
    shapes = LLAMA_7B if settings.width is None else ((settings.width, settings.width),)
    tokens = settings.batch_size * settings.length
    return {
        "benchmark": "kernels",
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(device),
        "steps": settings.steps,
        "rows": measure(device, shapes, tokens, dtype, settings.steps, config.seed),
    }


def title(result: dict[str, Any]) -> str:
    """What was measured, in one line."""
    return (
        f"Weight gradient of blocks: {result['dtype']} on {measured_on(result)}, medians of {result['steps']}; "
        "bound: the bytes that must be moved, at the bandwidth of a copy"
    )


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row for each product."""
    columns = ["out x in", "tokens", "block", "density", "way", "kernel us", "dense us", "bound us", "÷ dense",
               "÷ bound"]  # fmt: skip
    return columns, [
        [
            f"{row['shape'][0]} x {row['shape'][1]}",
            f"{row['tokens']:,}",
            str(row["block_size"]),
            f"{row['density']:.3f}",
            row["way"],
            *(f"{row[name]:.1f}" for name in ("kernel_us", "dense_us", "bound_us")),
            f"{row['kernel_us'] / row['dense_us']:.2f}",
            f"{row['kernel_us'] / row['bound_us']:.1f}",
        ]
        for row in result["rows"]
    ]


def measure(
    device: torch.device, shapes: Sequence[tuple[int, int]], tokens: int, dtype: torch.dtype, repeats: int, seed: int
) -> list[dict[str, Any]]:
    """Measures every shape (out, in) with every block size and density, blocks drawn at random; kernel and dense
    product take turns. Of each the density as reached, and medians in microseconds."""
    generator = torch.Generator().manual_seed(seed)
    timer = Timer(device)
    bandwidth = measured_bandwidth(timer)
    rows = []
    for shape in shapes:
        grad_output, x = (torch.randn(tokens, n, generator=generator).to(device, dtype) for n in shape)
        for size, density in itertools.product(BLOCK_SIZES, DENSITIES):
            index = some_blocks(shape, size, density, generator).to(device)
            rows.append(_measure(timer, grad_output, x, index, size, bandwidth, repeats))
    return rows


def _measure(
    timer: Timer, grad_output: Tensor, x: Tensor, index: Tensor, size: int, bandwidth: float, repeats: int
) -> dict[str, Any]:
    shape = (grad_output.shape[1], x.shape[1])
    rows, columns = index.unbind(1)
    kernel, dense = timer.medians(
        [lambda: dispatch.blocks_gradient(grad_output, x, rows, columns, size), lambda: grad_output.t() @ x], repeats
    )
    return {
        "shape": shape,
        "tokens": len(x),
        "dtype": str(x.dtype).removeprefix("torch."),
        "block_size": size,
        "density": len(index) * size * size / (shape[0] * shape[1]),
        "blocks": len(index),
        "way": "reference" if dispatch.kernel_for(x) is None else "triton",
        "timed": timer.timed,
        "kernel_us": kernel * 1e6,
        "dense_us": dense * 1e6,
        "bound_us": moved_bytes(index, size, len(x), x.element_size()) / bandwidth * 1e6,
    }


def some_blocks(shape: tuple[int, int], size: int, density: float, generator: torch.Generator) -> Tensor:
    """Whole blocks (n, 2) of a weight (out, in), sorted, at random, at least one."""
    down, across = shape[0] // size, shape[1] // size
    count = max(1, round(density * down * across))
    chosen = torch.randperm(down * across, generator=generator)[:count].sort().values
    return torch.stack([chosen // across, chosen % across], dim=1)


def moved_bytes(index: Tensor, size: int, tokens: int, element: int) -> int:
    """Bytes that must be moved at least: each strip that a block touches once, and the blocks in fp32."""
    strips = sum(len(side.unique()) for side in index.unbind(1))
    return strips * size * tokens * element + len(index) * size * size * 4


def measured_bandwidth(timer: Timer) -> float:
    """Bytes a second, reading and writing, of a large copy."""
    source = torch.zeros(TRANSFER.get(timer.device.type, TRANSFER["cpu"]), dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    return 2 * len(source) / timer.medians([lambda: target.copy_(source)], 10)[0]


class Timer:
    """Seconds of a call on a device: between CUDA's own events there, by the clock elsewhere.

    On CUDA a graph of the call is replayed, so that its launches follow each other as fast as the device takes them;
    one that cannot be captured is called (`timed`). Either way the device is kept busy until the host has sent all of
    it: else the time between the events would be the host's, which takes longer over a kernel than the device does.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spin = SPIN
        self.timed = "clock"  # how the last ones were: clock | graph | launches
        self._cache = torch.empty(2**27, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def medians(self, calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
        """The median of each call's times; they take turns, after two rounds that do not count, all timed alike."""
        if self._cache is not None:
            with torch.cuda.device(self.device):
                for call in calls:  # kernels are compiled, and libraries choose theirs
                    call()
                graphs = [replay_of(call) for call in calls]
            self.timed = "launches" if None in graphs else "graph"
            calls = calls if None in graphs else [graph for graph in graphs if graph is not None]
        found = [[self.once(call) for call in calls] for _ in range(repeats + 2)][2:]
        return [statistics.median(times) for times in zip(*found, strict=True)]

    def once(self, call: Callable[[], object]) -> float:
        """Seconds of one call. RuntimeError where the host waits for the device in the middle of it."""
        if self._cache is None:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        while True:
            self._cache.zero_()
            torch.cuda._sleep(self.spin)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.device(self.device):
                begin.record()
                call()
                end.record()
                idle = begin.query()  # the device has come to the call before the host has sent all of it
                end.synchronize()
            if not idle:
                return begin.elapsed_time(end) / 1e3
            if self.spin >= LONGEST_SPIN:
                raise RuntimeError("a call waits for the device: between two events its time is the host's too")
            self.spin *= 2


def replay_of(call: Callable[[], object]) -> Callable[[], object] | None:
    """What replays a CUDA graph of a call that has been made before; None where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:  # it waits for the device, or asks for something else that a stream under capture refuses
        return None
    return graph.replay

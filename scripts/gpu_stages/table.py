"""The stages in their order, each with its limit in seconds. Their modules are imported where they run."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from gpu_stages.findings import Findings
from gpu_stages.runner import Stage


def _of(module: str, name: str = "work") -> Callable[[Findings], None]:
    def work(findings: Findings) -> None:
        getattr(importlib.import_module(f"gpu_stages.{module}"), name)(findings)

    return work


STAGES = (
    Stage("machine", 15, "what device and host can do", _of("machine")),
    Stage("kernels", 100, "the kernels' own tests", _of("tests", "kernels")),
    Stage("syncs", 15, "no step of sparse layers waits for the device", _of("syncs")),
    Stage("numerics", 90, "layers, models and runs against nn.Linear, float64 and the CPU", _of("tests", "numerics")),
    Stage("commands", 110, "preprocess, train, kill and resume, too large a batch", _of("commands")),
    Stage("step", 130, "a step of LLaMA-2 7B, 512 tokens", _of("steps", "seven")),
    Stage("host", 50, "queueing a step, and its kernels", _of("host")),
    Stage("products", 30, "small kernels by graph replay", _of("products")),
    Stage("loss", 25, "head and loss of 128,256 words", _of("losses")),
    Stage("preprocess", 50, "choosing: time, and the same units as on the CPU", _of("choosing")),
    Stage("plan", 15, "train --plan against the steps' peaks", _of("plan")),
    Stage("step-8b", 70, "a step of LLaMA-3 8B, 4 x 2048 tokens", _of("steps", "eight")),
    Stage("sanitizer", 80, "kernels under compute-sanitizer", _of("tests", "sanitizer"), needs_cuda=True),
)

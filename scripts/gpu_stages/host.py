"""Where a step's time is: the host's, which queues it, or the device's; and how many kernels a layer costs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gpu_stages.clock import enqueued, wait, waited
from gpu_stages.findings import Findings, at_most, between
from gpu_stages.models import METHODS, batch_of, floor_step, made, shape_of, trained_by

# Milliseconds to queue a step, and kernels beyond the floor's a layer: by count, and by a CPU's host (a proxy).
ENQUEUE = {
    "floor": between(15, 40),
    "s2ft, down 0.03": at_most(36),
    "s2ft, o and down": at_most(38),
    "sylva": at_most(42),
    "lora, adapters in fp32": between(35, 75),
}
KERNELS = {"s2ft, down 0.03": at_most(4), "s2ft, o and down": at_most(7), "sylva": at_most(15)}


FEW = 8  # tokens, over which a step is the host's alone: a queue that is full would make it wait for the device


def work(findings: Findings) -> None:
    shape = shape_of("llama2-7b", findings.dry)
    model = made(shape, findings.device)
    few, many = (batch_of(model, 1, length) for length in (FEW, 32 if findings.dry else 512))
    layers = shape["num_hidden_layers"]
    _host(findings, "floor", floor_step(model, few))
    floor = _device(findings, "floor", floor_step(model, many))
    for name in METHODS:
        with findings.attempt(name):
            with trained_by(name, model, few) as step:
                _host(findings, name, step)
            with trained_by(name, model, many) as step:
                launched = _device(findings, name, step)
            if floor and launched:
                more = (launched - floor) / layers
                findings.number(f"{name}: kernels beyond the floor's, a layer", more, "", KERNELS.get(name))


def _host(findings: Findings, name: str, step: Callable[[], None]) -> None:
    seconds = enqueued(step, 1 if findings.dry else 5)
    findings.number(f"{name}: to queue a step of {FEW} tokens", 1000 * seconds, "ms", ENQUEUE.get(name))


def _device(findings: Findings, name: str, step: Callable[[], None]) -> int:
    """Kernels of a step; 0 where there is nothing to count them by."""
    findings.number(f"{name}: a step", 1000 * waited(step, 1 if findings.dry else 5), "ms")
    if findings.dry:
        findings.skip(f"{name}: kernels a step", "needs CUDA")
        return 0
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        wait()
    on_device = torch.autograd.DeviceType.CUDA
    launched = sum(event.device_type == on_device for event in recorded.events())
    findings.number(f"{name}: kernels a step", launched, "", between(3000, 4200) if name == "floor" else None)
    return launched

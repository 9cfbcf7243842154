"""Where a step's time is: the host's, which queues it, or the device's; and how many kernels a layer costs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gpu_stages.clock import enqueued, wait, waited
from gpu_stages.findings import Expected, Findings, at_most, between
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


def work(findings: Findings) -> None:
    shape = shape_of("llama2-7b", findings.dry)
    model = made(shape, findings.device)
    batch = batch_of(model, 1, 32 if findings.dry else 512)
    layers = shape["num_hidden_layers"]
    floor = _measure(findings, "floor", floor_step(model, batch), ENQUEUE["floor"])
    for name in METHODS:
        with findings.attempt(name), trained_by(name, model, batch) as step:
            launched = _measure(findings, name, step, ENQUEUE.get(name))
            if floor and launched:
                more = (launched - floor) / layers
                findings.number(f"{name}: kernels beyond the floor's, a layer", more, "", KERNELS.get(name))


def _measure(findings: Findings, name: str, step: Callable[[], None], expected: Expected | None) -> int:
    rounds = 1 if findings.dry else 5
    findings.number(f"{name}: to queue a step", 1000 * enqueued(step, rounds), "ms", expected)
    findings.number(f"{name}: a step", 1000 * waited(step, rounds), "ms")
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

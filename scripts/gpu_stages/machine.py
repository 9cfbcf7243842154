"""What the device and its host can do, by which all other numbers are read."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from gpu_stages.clock import enqueued, waited
from gpu_stages.findings import Findings, at_least, between, near
from sparseft.bench.output import device_name, machine


class _Nothing(torch.autograd.Function):
    """An autograd Function that computes nothing: what calling one costs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def work(findings: Findings) -> None:
    dry, device = findings.dry, torch.device(findings.device)
    findings.note("device", device_name(device))
    host = machine()
    findings.note("host", f"{host['cpu']}, {host['cores']} cores")
    if not dry:
        findings.note("memory", f"{torch.cuda.get_device_properties(device).total_memory / 1e9:.1f} GB")

    findings.number("copy, bytes read and written", _copied(2**20 if dry else 2**32, device) / 1e12, "TB/s",
                    between(2.7, 4.6))  # fmt: skip
    products = [
        ("bf16 product 8192 x 8192 x 8192", torch.bfloat16, (8192, 8192, 8192), between(700, 900)),
        ("bf16 product 512 x 4096 x 11008", torch.bfloat16, (512, 4096, 11008), between(450, 650)),
        ("fp32 product 4096 x 4096 x 4096", torch.float32, (4096, 4096, 4096), near(50, 0.25)),
    ]
    for what, dtype, shape, expected in products:
        m, k, n = (max(1, length // 64) for length in shape) if dry else shape
        # In turns through several weights, as a model's layers are: one alone would stay in the cache.
        x = torch.randn(m, k, device=device).to(dtype)
        weights = [torch.randn(n, k, device=device).to(dtype) for _ in range(4)]

        def products_of(x: torch.Tensor = x, weights: list[torch.Tensor] = weights) -> None:
            for weight in weights:
                F.linear(x, weight)

        seconds = waited(products_of, 5) / len(weights)
        findings.number(what, 2 * m * k * n / seconds / 1e12, "TFLOP/s", expected)

    few = 20 if dry else 1000
    x, weight = (torch.randn(8, 8, device=device) for _ in range(2))
    findings.cuda_alone("host: an empty Triton launch", lambda: _triton(findings, few))
    findings.number("host: F.linear", 1e6 * enqueued(lambda: F.linear(x, weight), 5, few), "µs", between(3, 12))
    asks = x.clone().requires_grad_()
    seconds = enqueued(lambda: _Nothing.apply(asks), 5, few)
    findings.number("host: an autograd Function, forward", 1e6 * seconds, "µs", between(3, 25))
    if not dry:
        findings.number("free memory", torch.cuda.mem_get_info()[0] / 1e9, "GB", at_least(75))


def _copied(size: int, device: torch.device) -> float:
    """Bytes a second, reading and writing, of a copy of `size` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / waited(lambda: target.copy_(source), 5)


def _triton(findings: Findings, few: int) -> None:
    from gpu_stages.empty_kernel import launch

    findings.number("host: an empty Triton launch", 1e6 * enqueued(launch, 5, few), "µs", between(10, 40))

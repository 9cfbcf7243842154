"""The small kernels of sparse layers alone, on the device's own time: a CUDA graph of each is replayed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gpu_stages.clock import replayed, waited
from gpu_stages.findings import Findings, at_least, between
from sparseft.bench.kernels import some_blocks
from sparseft.kernels import dispatch, reference
from sparseft.layers import S2RowLinear


def work(findings: Findings) -> None:
    dry, device = findings.dry, findings.device
    out, width = (96, 128) if dry else (4096, 4096)
    generator = torch.Generator().manual_seed(0)

    def operands(tokens: int, *features: int) -> list[torch.Tensor]:
        return [torch.randn(tokens, n, generator=generator).to(device, torch.bfloat16) for n in features]

    for tokens, size in itertools.product((32,) if dry else (512, 2048, 8192), (4, 16) if dry else (4, 16, 64, 128)):
        grad, x = operands(tokens, out, width)
        rows, columns = some_blocks((out, width), size, 0.016, generator).to(device).unbind(1)
        expected = between(4, 12) if (tokens, size) == (512, 64) else None
        _timed(
            findings,
            f"blocks of {size}, {tokens} tokens",
            lambda grad=grad, x=x, rows=rows, columns=columns, size=size: dispatch.blocks_gradient(
                grad, x, rows, columns, size
            ),
            expected,
        )
    _columns(findings, operands)
    _write_back(findings)


def _columns(findings: Findings, operands: Callable[..., list[torch.Tensor]]) -> None:
    """A product with k columns: 535 leaves rows that begin at no multiple of 16 bytes."""
    tokens, out, counts = (32, 96, (35, 36)) if findings.dry else (512, 4096, (256, 330, 535, 536))
    found: dict[tuple[int, str], float | None] = {}
    for count in counts:
        grad, x = operands(tokens, out, count)
        narrow: Callable[[], Any] = lambda grad=grad, x=x: grad.t() @ x  # noqa: E731
        found[count, "bf16"] = _timed(findings, f"product with {count} columns, bf16 result", narrow)
        if not findings.dry:
            wide: Callable[[], Any] = lambda grad=grad, x=x: torch.mm(grad.t(), x, out_dtype=torch.float32)  # noqa: E731
            found[count, "fp32"] = _timed(findings, f"product with {count} columns, fp32 result", wide)
        kept = reference.aligned_columns(x, (0, count), count, x.dtype)
        ours: Callable[[], Any] = lambda grad=grad, x=kept: dispatch.columns_gradient(grad, x)  # noqa: E731
        _timed(findings, f"product with {count} columns, as the layer computes it", ours)
    odd, even = (found.get((count, "bf16")) for count in counts[-2:])
    if odd and even:
        findings.number(f"{counts[-2]} ÷ {counts[-1]} columns", odd / even, "", at_least(2))


def _write_back(findings: Findings) -> None:
    out, width, count = (96, 128, 9) if findings.dry else (4096, 11008, 535)
    with torch.device(findings.device):
        linear = nn.Linear(width, out, bias=False, dtype=torch.bfloat16)
    scattered = torch.randperm(width, generator=torch.Generator().manual_seed(0))[:count]
    for what, index in (("scattered", scattered), ("consecutive", torch.arange(count))):
        layer = S2RowLinear.from_linear(linear, index)
        _timed(findings, f"write-back of {count} columns, {what}", layer.write_back)
        layer.restore_base()


def _timed(findings: Findings, what: str, call: Callable[[], Any], expected: Any = None) -> float | None:
    """µs of a call; None where it failed."""
    found = []
    with findings.attempt(what), torch.no_grad():
        seconds = waited(call, 2) if findings.dry else replayed(call, 10)
        found.append(findings.number(what, 1e6 * seconds, "µs", expected))
    return found[0] if found else None

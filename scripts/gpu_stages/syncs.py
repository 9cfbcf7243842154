"""That a step of sparse layers never waits for the device: forward, backward, optimizer, gradients dropped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from gpu_stages.findings import Findings, told
from sparseft.layers import BlockSparseLinear, S2ColumnLinear, S2RowLinear, SparseLinear, put_beside
from sparseft.training.optimizer import SparseAdamW
from support.syncs import Audit, waiting_is_an_error


@contextlib.contextmanager
def no_waiting(dry: bool) -> Iterator[None]:
    """Inside, an operation that waits for the device raises."""
    if dry:
        audit = Audit()
        audit.start()
        try:
            yield
        finally:
            audit.stop()
        if audit.found:
            raise RuntimeError("waits for the device: " + "; ".join(sorted(set(audit.found))))
        return
    with waiting_is_an_error():
        yield


def work(findings: Findings) -> None:
    width = 128 if findings.dry else 4096
    device = findings.device
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> torch.Tensor:
        return torch.randperm(width, generator=generator)[:count]

    def blocks(size: int) -> list[SparseLinear]:
        across = width // size
        chosen = torch.randperm(across * across, generator=generator)[: max(2, across * across // 60)]
        index = torch.stack([chosen // across, chosen % across], dim=1)
        options = {"blocks": index, "block_size": size, "bias": False, "dtype": torch.bfloat16}
        return [BlockSparseLinear(width, width, **options) for _ in range(2)]

    def features(chosen: Callable[[int], torch.Tensor]) -> list[SparseLinear]:
        options: dict[str, Any] = {"bias": False, "dtype": torch.bfloat16}
        rows = S2ColumnLinear(width, width, rows=chosen(width // 16), **options)
        return [rows, S2RowLinear(width, width, columns=chosen(width // 16), **options)]

    def beside(layers: list[SparseLinear]) -> list[nn.Module]:
        model = nn.Sequential()
        for layer in layers:
            wrapped = SparseLinear.wrap(nn.Linear(width, width, bias=False, dtype=torch.bfloat16))
            for pattern in layer.patterns.values():
                wrapped.add_pattern(pattern.kind, pattern.index, pattern.block_size)
            model.append(wrapped)
        put_beside(model)
        return list(model)

    made: dict[str, Callable[[], Sequence[nn.Module]]] = {
        "rows and columns, gathered": lambda: features(some),
        "rows and columns, consecutive": lambda: features(lambda count: torch.arange(3, 3 + count)),
        "blocks of 64": lambda: blocks(64),
        "blocks of 16": lambda: blocks(16),
        "blocks of 4": lambda: blocks(4),
        "rows and columns, beside": lambda: beside(features(some)),
        "blocks of 16, beside": lambda: beside(blocks(16)),
    }
    for name, layers in made.items():
        with findings.attempt(name):
            _audit(findings, name, nn.Sequential(*layers()).to(device), width)


def _audit(findings: Findings, name: str, model: nn.Module, width: int) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = SparseAdamW(parameters, lr=1e-3)
    x = torch.randn(64, width, device=findings.device, dtype=torch.bfloat16)

    def passes() -> None:
        model(x).float().square().mean().backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(2):  # tables, caches and kernels are made
        passes()
        update()
    # torch's AdamW for the CPU reads its step counts, which lie there: nothing of the kernel's path is to be seen.
    parts = [("forward and backward", passes)] if findings.dry else [("step", lambda: (passes(), update()))]
    for part, call in parts:
        try:
            with no_waiting(findings.dry):
                call()
        except RuntimeError as error:
            findings.fact(f"{name}: {part}", False, told(error), "no wait")
        else:
            findings.fact(f"{name}: {part}", True, "no wait", "no wait")

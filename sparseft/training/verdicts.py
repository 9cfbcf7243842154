"""Whether a step was good: decided on the device, read by the host once the device has long gone on.

The optimizer is told by a flag on the device, `found_inf`, torch's own convention for loss scaling: where it is 1, the
update leaves weights, moments and counts of steps as they are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseft.training.optimizer import SparseAdamW


def takes_flag(optimizer: Any) -> bool:
    """Whether an optimizer updates nothing where its `found_inf` is 1: SparseAdamW, and torch's fused ones."""
    if isinstance(optimizer, SparseAdamW):
        return True
    # By its groups too: a checkpoint of an unfused one makes them unfused again.
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and getattr(optimizer, "_step_supports_amp_scaling", False)


@dataclass
class Verdict:
    """What decides over an optimizer step, on its way to the host."""

    step: int
    # float64 (2 or 3,) on the host, pinned where it comes from a GPU: the loss, the tokens that it is the mean of, the
    # gradient's norm
    numbers: Tensor
    arrived: torch.cuda.Event | None  # None: from the CPU itself

    def read(self) -> list[float]:
        """The numbers; waits for the device where it is not there yet."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.numbers.tolist()


class Verdicts:
    """The verdicts that the host has not read yet, oldest first."""

    def __init__(self, device: torch.device) -> None:
        self.bad = torch.zeros((), device=device)  # float32: 1 where the present step's loss or gradient is not finite
        self._waiting: deque[Verdict] = deque()

    def add(self, step: int, loss: Tensor, norm: Tensor | float | None, tokens: Tensor) -> Tensor:
        """Decides on the device over the step number `step` (1-based): the flag `bad`, the same tensor each time.

        loss, tokens: float64 (). norm: of the gradient; None where there is none.
        """
        known = [loss.detach(), tokens]
        if norm is not None:
            norm = norm if isinstance(norm, Tensor) else torch.full((), norm, device=loss.device)
            known.append(norm.detach().double())
        numbers = torch.stack(known)
        self.bad.copy_(numbers.isfinite().all().logical_not())
        on_gpu = numbers.device.type == "cuda"
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=on_gpu)
        host.copy_(numbers, non_blocking=True)
        arrived = None
        if on_gpu:
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(numbers.device))
        self._waiting.append(Verdict(step, host, arrived))
        return self.bad

    def settled(self, until: int | None = None) -> Iterator[tuple[int, float, float | None, float]]:
        """(step, loss, norm, tokens) of the verdicts up to the step `until`, or of all: nowhere else does the host
        read."""
        while self._waiting and (until is None or self._waiting[0].step <= until):
            verdict = self._waiting.popleft()
            loss, tokens, *norm = verdict.read()
            yield verdict.step, loss, (norm[0] if norm else None), tokens

"""Full fine-tuning of a checkpoint in 16 bits: fp32 weights, so that small updates count, and products in bf16.

Not by the Trainer's `bf16`, which begins with the training: what is measured before would be computed otherwise than
what is measured after. DeepSpeed takes that word for its own mixed precision, which trains weights in bf16; and it
leaves autocast around its engine out, so that this has to be within.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

HALF_IS_FAST = ("cuda",)  # kinds of devices; a CPU multiplies the weights as they are
AUTOCAST = "sparseft_autocast"  # of a forward pass: the kind of device whose products it makes in bf16


def multiply_as_trained(model: nn.Module, method: Any, stored: torch.dtype, device: torch.device) -> None:
    """Has a model that `method` trains whole, of a checkpoint in 16 bits (`stored`), multiply in bf16 where the device
    is fast at it."""
    if method.trains_all and device.type in HALF_IS_FAST and stored.itemsize == 2:
        multiply_in_bf16(model, device)


def multiply_in_bf16(model: nn.Module, device: torch.device) -> None:
    """From here on the model's forward passes are autocast to bf16, whoever calls them; losses and logits are
    fp32."""
    model.forward = _autocast(device.type, model.forward)  # type: ignore[method-assign]


def as_before(before: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, autocast as that whose place it takes."""
    device = getattr(before, AUTOCAST, None)
    return forward if device is None else _autocast(device, forward)


def _autocast(device: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def inside(*args: Any, **given: Any) -> Any:
        with torch.autocast(device, torch.bfloat16):
            output = forward(*args, **given)
        for name in ("loss", "logits"):
            if output.get(name) is not None:
                output[name] = output[name].float()
        return output

    setattr(inside, AUTOCAST, device)
    return inside

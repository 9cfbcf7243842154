"""Weights follow their deltas: after each optimizer step, base + delta is written into every layer that it changed.

Layers enrol themselves; torch's global step hook finds those whose deltas the optimizer holds. So a bare PyTorch loop
works as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparseft.layers.pattern import Pattern, changes, updates


class FollowsDeltas(Protocol):
    """What can be enrolled: `SparseLinear`."""

    @property
    def patterns(self) -> dict[str, Pattern]: ...

    def write_back(self) -> None: ...


class WritesWeights:
    """An optimizer whose own step leaves base + delta in the weights: the hook has nothing left to write."""


_enrolled: weakref.WeakSet[Any] = weakref.WeakSet()


def enrol(layer: FollowsDeltas) -> None:
    """The layer's weight is written after the steps of any optimizer that holds one of its deltas, as long as it
    lives."""
    _enrolled.add(layer)
    _count_change()
    weakref.finalize(layer, _count_change).atexit = False


def _count_change() -> None:
    changes.count += 1


def layers_of(parameters: Iterable[Tensor]) -> dict[int, tuple[Any, Pattern]]:
    """The enrolled layer and the pattern of each of `parameters` that is a delta, by the delta's `id`."""
    held = {id(parameter) for parameter in parameters}
    return {
        id(pattern.delta): (layer, pattern)
        for layer in list(_enrolled)
        for pattern in layer.patterns.values()
        if id(pattern.delta) in held
    }


def write_back(layers: Iterable[FollowsDeltas]) -> None:
    """Writes every layer's base + delta into its weight."""
    for layer in layers:
        layer.write_back()


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    updates.count += 1
    if _enrolled and not isinstance(optimizer, WritesWeights):
        found = layers_of(parameter for group in optimizer.param_groups for parameter in group["params"])
        write_back({layer: None for layer, _ in found.values()})


register_optimizer_step_post_hook(_after_step)

"""The base under an attached model as a model of its own: what preference tuning holds the trained one to.

It has no weights beyond the model's. While it computes, the entries that train hold the base's values; afterwards base
+ delta again, bit for bit, so that a backward pass of what the model has computed before is still right.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.adapters.state import state_of
from sparseft.distributed.shards import is_sharded
from sparseft.errors import UserError
from sparseft.layers import SparseLinear, sparse_layers

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
          "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks")  # fmt: skip


def reference_model(model: nn.Module) -> Any:
    """The base under `model`, for the `ref_model` of TRL's trainers; None for LoRA and DoRA, of which TRL itself turns
    the adapter off.

    A module of the model's class and with its configuration, without a weight of its own; it gives no gradient.

    Raises:
        UserError: nothing is attached; all of the model trains, so that no base is left; it is in shards.
    """
    state = state_of(model)
    if state is None:
        raise UserError("reference_model: nothing is attached to this model; it is its own reference.")
    if hasattr(model, "peft_config"):
        return None
    layers = sparse_layers(model)
    if not layers:
        raise UserError(
            "reference_model: all weights of this model train, so that its base is gone; load a second one, or use "
            "precompute_ref_log_probs=True."
        )
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise UserError(
            "reference_model: this model is in several processes' shards (ZeRO-3 or FSDP2); load a second one."
        )
    twin: Any = copy.copy(model)
    twin.__dict__ = model.__dict__ | {name: OrderedDict() for name in _HOOKS}
    twin.__class__ = type(type(model).__name__, (type(model),), {"train": _as_it_is, "__module__": __name__})
    inside: list[contextlib.ExitStack] = []

    def enter(*_: Any) -> None:
        inside.append(contextlib.ExitStack())
        inside[-1].enter_context(torch.no_grad())
        inside[-1].enter_context(base_in_place(list(layers.values())))

    def leave(*_: Any) -> None:
        inside.pop().close()

    twin.register_forward_pre_hook(enter)
    twin.register_forward_hook(leave, always_call=True)
    return twin


def _as_it_is(self: nn.Module, mode: bool = True) -> nn.Module:
    """The modules are the model's, whose mode is its own to say."""
    return self


@contextlib.contextmanager
def base_in_place(layers: list[SparseLinear]) -> Iterator[None]:
    """Inside, the layers compute as the base does. What autograd has kept of their weights counts as unchanged, which
    it is again afterwards."""
    written = tuple(tensor for layer in layers for tensor in _written(layer))
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(written):
        for layer in layers:
            layer.restore_base()
            if layer.beside:
                for pattern in layer.patterns.values():
                    pattern.compact.copy_(pattern.base_values)
    try:
        yield
    finally:
        with torch.autograd._unsafe_preserve_version_counter(written):
            for layer in layers:
                layer.write_inactive()
                layer.write_back()


def _written(layer: SparseLinear) -> list[Tensor]:
    """What holds base + delta: the weight, or the parts beside one."""
    return [pattern.compact for pattern in layer.patterns.values()] if layer.beside else [layer.weight]

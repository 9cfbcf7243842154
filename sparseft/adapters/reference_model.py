"""The base under an attached model as a model of its own: what preference tuning holds the trained one to.

It has no weights beyond the model's. While it computes, the entries that train hold the base's values, or peft's
adapter is off; afterwards base + delta again, bit for bit, so that a backward pass of what the model has computed
before is still right.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.adapters.by_row import ARGUMENT
from sparseft.adapters.peft import Peft
from sparseft.adapters.state import State, state_of
from sparseft.distributed.shards import is_sharded
from sparseft.errors import UserError
from sparseft.layers import SparseLinear, sparse_layers
from sparseft.models.decoder import STATE
from sparseft.replaced import replaced

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
          "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks")  # fmt: skip
_OF_THE_MODEL = (STATE, "generate", "save_pretrained")  # what attaching has put on the model itself


def reference_model(model: nn.Module) -> Any:
    """The base under `model`, for the `ref_model` of TRL's trainers, whatever the adapter has learnt before. (Given
    None, TRL compares a LoRA or DoRA with a copy of the adapter "default" as it is then.)

    A module of the model's class (of the class inside peft's wrapper) and with its configuration, without a weight of
    its own: `parameters()` is empty, so that nothing moves it (TRL's `sync_ref_model` fails). Calling it and its
    `generate` are the base, without dropout, and give no gradient; its inner modules and `state_dict()` are the
    model's.

    Raises:
        UserError: nothing is attached; all of the model trains, so that no base is left; it is in shards.
    """
    state = state_of(model)
    if state is None:
        raise UserError("reference_model: nothing is attached to this model; it is its own reference.")
    layers = sparse_layers(model)
    if not layers and not isinstance(state.kind, Peft):
        raise UserError(
            "reference_model: all weights of this model train, so that its base is gone; load a second one, or use "
            "precompute_ref_log_probs=True."
        )
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise UserError(
            "reference_model: this model is in several processes' shards (ZeRO-3 or FSDP2); load a second one."
        )
    if isinstance(state.kind, Peft):
        peft: Any = model
        return _twin(peft.get_base_model(), lambda: adapter_off(peft, state))
    return _twin(model, lambda: base_in_place(list(layers.values())))


def _twin(model: nn.Module, in_place: Callable[[], contextlib.AbstractContextManager[None]]) -> Any:
    """`model` once more, which computes inside `in_place()`."""
    twin: Any = copy.copy(model)
    own = {key: value for key, value in vars(model).items() if key not in _OF_THE_MODEL}
    twin.__dict__ = (
        own | {name: OrderedDict() for name in _HOOKS} | {"training": False, "_model": model, "_in_place": in_place}
    )
    twin.__class__ = type(type(model).__name__, (_Twin, type(model)), {"__module__": __name__})
    return twin


class _Twin:
    """What a twin does otherwise than its model, whose class comes next."""

    _model: Any
    _in_place: Callable[[], contextlib.AbstractContextManager[None]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if ARGUMENT in kwargs:
            raise UserError(f"{ARGUMENT}: this is the base of all rows (`reference_model`): ask the model itself.")
        with torch.no_grad(), self._in_place(), _evaluating(self._model):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """None: all are the model's, which trains them."""
        return iter(())

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        return self._model.dtype

    def train(self, mode: bool = True) -> Any:
        """The modules are the model's, whose mode is its own to say; the twin computes in evaluation mode always."""
        return self

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        raise UserError("reference_model: it has no weights of its own to save: save the model, or load the base.")


def _evaluating(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside, the modules are in evaluation mode; the weights, which `SparseLinear.train` would write, stay as they
    are."""
    return replaced(*((module, "training", False) for module in model.modules() if module.training))


@contextlib.contextmanager
def base_in_place(layers: list[SparseLinear]) -> Iterator[None]:
    """Inside, the layers compute as the base does. What autograd has kept of their weights counts as unchanged, which
    it is again afterwards."""
    written = tuple(tensor for layer in layers for tensor in _written(layer))
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(written):
        for layer in layers:
            layer.write_if_stale()  # what was loaded or copied: else the next look at the layer would write it
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


@contextlib.contextmanager
def adapter_off(model: nn.Module, state: State) -> Iterator[None]:
    """Inside, peft's wrapper computes as the base does, also where an adapter has values of the base's own parameters.
    What autograd has kept of those counts as unchanged, as above."""
    active, written = state.active, tuple(state.kind.kept.parameters.values())
    with torch.autograd._unsafe_preserve_version_counter(written):
        state.kind.switch(model, state, None)
    state.active = None
    try:
        yield
    finally:
        with torch.autograd._unsafe_preserve_version_counter(written):
            state.kind.switch(model, state, active)
        state.active = active


def _written(layer: SparseLinear) -> list[Tensor]:
    """What holds base + delta: the weight, or the parts beside one."""
    return [pattern.compact for pattern in layer.patterns.values()] if layer.beside else [layer.weight]

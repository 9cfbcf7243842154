"""`load_state_dict` of a model with sparse adapters, as any loop calls it: what it may bring, and what follows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from sparseft.adapters.reference_model import base_in_place
from sparseft.adapters.state import state_of
from sparseft.errors import UserError
from sparseft.files.tensors import KINDS
from sparseft.layers import sparse_layers
from sparseft.models.decoder import base_parameters
from sparseft.models.fingerprint import STANDS_FOR, fingerprints_of


def listen(model: nn.Module) -> None:
    """Lets a model refuse deltas that it has no place for, and know the base that a state dict brings."""
    model.register_load_state_dict_pre_hook(_check_deltas)
    model.register_load_state_dict_post_hook(_renew_fingerprints)


def ignore(model: nn.Module) -> None:
    """Takes back `listen`."""
    for hooks in (model._load_state_dict_pre_hooks, model._load_state_dict_post_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) in _OWN]:
            del hooks[key]


def _check_deltas(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before anything is loaded: weights that hold deltas would become the base where the deltas have no place."""
    own = {f"{prefix}{name}" for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in state_dict:
        *module, kind, last = name.split(".")
        if last == "delta" and kind in KINDS and name.startswith(prefix) and name not in own:
            raise UserError(
                f"load_state_dict: '{name}' has no place here, and the base would take on what it has learnt: make the "
                "adapter active first that the state was taken of (set_adapter), or attach as it was attached."
            )


def _renew_fingerprints(model: nn.Module, keys: Any) -> None:
    """The weights that were loaded may be of another base. Packed ones, and those in shards, come by no state dict."""
    state, layers = state_of(model), list(sparse_layers(model).values())
    missing = set(keys.missing_keys)
    if state is None or STANDS_FOR in vars(model) or any(layer.beside for layer in layers):
        return
    if any(name not in missing for name, _ in base_parameters(model)):
        with base_in_place(layers):
            found = fingerprints_of(_in_original_order(model))
        if not set(found) & set(state.fingerprints):  # else it is the base as it was, maybe in another dtype
            state.fingerprints = found


def _in_original_order(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base's parameters by their names' order, also those that are stored permuted as a checkpoint has them."""
    for name, parameter in sorted(base_parameters(model), key=lambda item: item[0]):
        module, _, last = name.rpartition(".")
        layer = model.get_submodule(module)
        yield name, layer.state_dict()[last] if getattr(layer, "is_permuted", False) else parameter


_OWN = (_check_deltas, _renew_fingerprints)

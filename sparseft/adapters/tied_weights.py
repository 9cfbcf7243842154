"""Tied weights (a head and its embeddings) that a PEFT adapter changes apart: untied before merging, for good."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn


def _shared(model: nn.Module) -> list[list[tuple[nn.Module, str, list[nn.Module]]]]:
    """The base's parameters that several modules hold: for each its owners, the parameter's name there, and peft's
    layers around the owner.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    owners: dict[int, list[tuple[nn.Module, str, list[nn.Module]]]] = defaultdict(list)

    def visit(module: nn.Module, around: list[nn.Module]) -> None:
        if isinstance(module, AuxiliaryTrainingWrapper):
            visit(module.original_module, [*around, module])
        elif isinstance(module, BaseTunerLayer):
            visit(module.base_layer, [*around, module])
        else:
            for parameter_name, parameter in module._parameters.items():
                if parameter is not None and all(owner is not module for owner, _, _ in owners[id(parameter)]):
                    owners[id(parameter)].append((module, parameter_name, around))
            for child in module.children():
                visit(child, [])

    visit(model, [])
    return [group for group in owners.values() if len(group) > 1]


def _changes(layers: list[nn.Module], name: str) -> set[str]:
    """How the adapter `name` changes what lies inside these layers of peft's: `weights`, `module`, `tokens` (with the
    number of their values, which tied layers may share).
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    found = set()
    for layer in layers:
        if isinstance(layer, ModulesToSaveWrapper) and name in layer.modules_to_save:
            found.add("module")
        elif isinstance(layer, TrainableTokensWrapper) and name in layer.token_adapter.trainable_tokens_delta:
            found.add(f"tokens {id(layer.token_adapter.trainable_tokens_delta[name])}")
        elif isinstance(layer, LoraLayer) and name in layer.r:
            found.add("weights")
    return found


def changed_apart(model: nn.Module, name: str) -> list[list[tuple[nn.Module, str, set[str]]]]:
    """The tied parameters whose owners the adapter changes differently, with how; the same tokens in all of them go
    together.
    """
    groups = [[(owner, p, _changes(around, name)) for owner, p, around in group] for group in _shared(model)]
    return [g for g in groups if any(how != g[0][2] or how & {"weights", "module"} for _, _, how in g)]


def untie(model: nn.Module, name: str) -> None:
    """Gives each owner of a tied parameter that the adapter changes a copy of its own to be changed."""
    for group in changed_apart(model, name):
        for owner, parameter_name, how in group:
            if how - {"module"}:
                value = owner._parameters[parameter_name]
                owner._parameters[parameter_name] = nn.Parameter(value.detach().clone(), value.requires_grad)


def _configs(model: Any) -> list[Any]:
    return list({id(c): c for c in (model.config, model.config.get_text_config())}.values())


def always_tied(model: Any) -> tuple[str, str] | None:
    """A pair that the model ties whatever its config says, so that it would be tied again when it is loaded."""
    if not hasattr(model, "get_expanded_tied_weights_keys"):
        return None
    configs = _configs(model)
    before = [getattr(config, "tie_word_embeddings", None) for config in configs]
    try:
        for config in configs:
            config.tie_word_embeddings = False
        return next(iter(model.get_expanded_tied_weights_keys(all_submodels=True).items()), None)
    finally:
        for config, value in zip(configs, before, strict=True):
            if value is None:
                del config.tie_word_embeddings
            else:
                config.tie_word_embeddings = value


def tell_untied(model: Any) -> None:
    """Where a tied pair came apart, says so in the model and its config: else it would be tied again when loaded."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if all(model.get_parameter(target) is model.get_parameter(source) for target, source in tied.items()):
        return
    for target, source in tied.items():  # the config ties all pairs or none
        owner, _, parameter_name = target.rpartition(".")
        value = model.get_parameter(target)
        if value is model.get_parameter(source):
            model.get_submodule(owner)._parameters[parameter_name] = nn.Parameter(value.detach().clone())
    model.all_tied_weights_keys = {}
    for config in _configs(model):
        config.tie_word_embeddings = False

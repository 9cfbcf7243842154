"""The exact weighted sum of LoRA adapters, as one more adapter of peft's wrapper."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sparseft.adapters.peft.base_values import Overwritten, choose, quiet, set_modes, switch, without_biases
from sparseft.errors import UserError
from sparseft.methods.exact_targets import exact_targets


def fuse(model: Any, kept: Overwritten, active: str | None, weights: dict[str, float], name: str) -> None:
    """Adds the LoRA adapter `name` to peft's wrapper: the exact weighted sum of others, their ranks added up.

    Biases and whole modules that they trained are summed by what they differ from the base.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils.other import ModulesToSaveWrapper

    for known in weights:
        config = model.peft_config[known]
        if config.use_dora:
            raise UserError(f"fuse: '{known}' is a DoRA adapter, whose magnitudes do not add up: merge it instead.")
        if config.trainable_token_indices:
            reason = "has trainable_token_indices, which peft does not add up"
            raise UserError(f"fuse: '{known}' {reason}: merge it instead.")
    if name in weights:
        raise UserError(f"fuse: '{name}' cannot be made of itself: name the sum differently.")
    switch(model, kept, active, None)  # the base's own values, which differences are taken from
    base = model.get_base_model()
    layers = {
        layer_name: (layer, [known for known in weights if known in layer.r])
        for layer_name, layer in base.named_modules()
        if isinstance(layer, LoraLayer)
    }
    targets = sorted(n for n, (layer, parts) in layers.items() if parts and not isinstance(layer, ParamWrapper))
    rank = max(sum(layer.r[known] for known in parts) for layer, parts in layers.values() if parts)
    configs = [model.peft_config[known] for known in weights]
    parameters = next((c.target_parameters for c in configs if c.target_parameters), None)  # peft wants one spelling
    config = dataclasses.replace(
        configs[0], r=rank, lora_alpha=rank, use_rslora=False, rank_pattern={}, alpha_pattern={},
        target_modules=targets, target_parameters=parameters, exclude_modules=None, layers_to_transform=None,
        layers_pattern=None, bias="none", lora_bias=any(c.lora_bias for c in configs), inference_mode=False,
        modules_to_save=sorted({module for c in configs for module in c.modules_to_save or ()}) or None,
    )  # fmt: skip
    if parameters:
        config.lora_dropout = 0.0  # peft's condition
    modes = {id(module): module.training for module in model.modules()}
    with quiet(), without_biases(model), exact_targets():
        if name in model.peft_config:
            model.delete_adapter(name)  # peft would leave the old one as it is
            kept.own.pop(name, None)
        model.add_adapter(name, config)
    with torch.no_grad():
        for layer, parts in layers.values():
            if parts:
                _add_up(layer, {known: weights[known] for known in parts}, name)
        for module in base.modules():
            if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
                start = dict(module.original_module.named_parameters())
                for parameter_name, total in module.modules_to_save[name].named_parameters():
                    parts = {k: module.modules_to_save[k] for k in weights if k in module.modules_to_save}
                    values = {k: part.get_parameter(parameter_name) for k, part in parts.items()}
                    total.copy_(_weighted(start[parameter_name], values, weights))
        own = {
            parameter: _weighted(kept.base[parameter], {k: v[parameter] for k, v in known.items()}, weights)
            for parameter in kept.base
            if (known := {k: v for k, v in kept.own.items() if k in weights and parameter in v})
        }
    if own:
        kept.own[name] = own
    biases = {c.bias for c in configs} - {"none"}
    model.peft_config[name].bias = "all" if biases else "none"
    set_modes(model, modes)
    with quiet():
        choose(model, kept, None)


def _weighted(base: Tensor, values: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """base + Σ weight × (value − base), in fp32 at least, in the base's dtype."""
    start = base.to(torch.promote_types(base.dtype, torch.float32))
    total = start.clone()
    for known, value in values.items():
        total += weights[known] * (value.to(start) - start)
    return total.to(base.dtype)


def _add_up(layer: Any, weights: dict[str, float], name: str) -> None:
    """Fills the adapter `name` of one LoRA layer: the others' factors side by side, zeros in the ranks left over."""
    layer.scaling[name] = 1.0
    embedding = name in layer.lora_embedding_A
    experts = getattr(layer, "num_experts", 1)

    def factors(known: str) -> tuple[Tensor, Tensor]:
        """(experts, rank, in) and (out, rank, experts), as peft keeps those of experts in one parameter."""
        left = layer.lora_embedding_A[known] if embedding else layer.lora_A[known].weight
        right = layer.lora_embedding_B[known] if embedding else layer.lora_B[known].weight
        return left.view(experts, -1, left.shape[1]), right.view(len(right), -1, experts)

    first, second = factors(name)
    first.zero_()
    second.zero_()
    bias = None if embedding else layer.lora_B[name].bias
    if bias is not None:
        bias.zero_()
    start = 0
    for known, weight in weights.items():
        scale = weight * layer.scaling[known]
        left, right = factors(known)
        stop = start + left.shape[1]
        first[:, start:stop] = left
        second[:, start:stop] = scale * right
        start = stop
        if bias is not None and layer.lora_B[known].bias is not None:
            bias += scale * layer.lora_B[known].bias

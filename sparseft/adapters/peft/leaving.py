"""The plain model out of peft's wrapper, with an adapter merged into it or without."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparseft.adapters.peft.base_values import HOOKS, Overwritten
from sparseft.adapters.tied_weights import always_tied, changed_apart


def unmergeable(model: Any, name: str) -> str | None:
    """Why the adapter `name` cannot become weights of the plain model; None: it can."""
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    for module_name, module in base.named_modules():
        if isinstance(module, LoraLayer) and module.lora_bias.get(name):
            if getattr(module.get_base_layer(), "bias", None) is None:
                return f"it adds a bias (lora_bias) to {module_name}, which has none"
    if changed_apart(base, name) and (always := always_tied(base)):
        return f"it changes {always[0]} apart from {always[1]}, which this model always ties to it"
    return None


def drop_hooks(model: nn.Module, kept: Overwritten) -> None:
    """Takes away the hooks on the embeddings that were added since; peft adds one for gradient checkpointing."""
    known = list(kept.hooks.get("_require_grads_hooks") or kept.hooks.values())
    for hook in getattr(model, "_require_grads_hooks", None) or ():
        if all(hook is not other for other in known):
            hook.remove()
    for attribute in HOOKS:
        vars(model).pop(attribute, None)
    vars(model).update(kept.hooks)


def unwrap(model: nn.Module, name: str | None) -> None:
    """Takes peft's layers out of a model, merging the adapter `name` into what they wrap (None: nothing)."""
    visited: set[int] = set()

    def visit(parent: nn.Module) -> None:
        if id(parent) in visited:
            return
        visited.add(id(parent))
        for child_name, child in list(parent._modules.items()):
            if child is not None:
                inner = _inside(child, name)
                parent._modules[child_name] = inner
                visit(inner)

    visit(model)
    if hasattr(model, "peft_config"):
        del model.peft_config


def _inside(module: nn.Module, name: str | None) -> nn.Module:
    """What a layer of peft's stands for; with `name` merged in where it is not None. Any other module is itself."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    while True:
        if isinstance(module, ModulesToSaveWrapper):
            chosen = module.modules_to_save
            module = chosen[name] if name is not None and name in chosen else module.original_module
        elif isinstance(module, TrainableTokensWrapper):
            tokens = module.token_adapter
            if name is not None and name in tokens.trainable_tokens_delta:
                tokens.merge(adapter_names=[name])
            module = tokens.base_layer
        elif hasattr(module, "unload_and_optionally_merge_module"):  # nested, or of more than one weight
            merge, names = name is not None, None if name is None else [name]
            module = module.unload_and_optionally_merge_module(merge=merge, safe_merge=False, adapter_names=names)
        elif isinstance(module, BaseTunerLayer):
            if name is not None:
                module.merge(adapter_names=[name])
            module = module.base_layer
        else:
            return module

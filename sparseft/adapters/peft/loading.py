"""An adapter folder that peft reads, onto a plain model or beside others in peft's wrapper, whole or not at all."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.adapters.description import TENSORS, check_peft, is_bounded, largest_rank
from sparseft.adapters.peft.base_values import Overwritten, quiet, set_modes, switch, trained_biases, without_biases
from sparseft.errors import UserError, shown
from sparseft.methods.exact_targets import as_written, lora_modules
from sparseft.replaced import replaced

WRAPPED = "base_model.model."  # what peft's wrapper puts before the base's names
INSIDE = ("token_adapter", "base_layer", "original_module")  # and into them, where it put a layer around a module
PEFT_PARTS = {*WRAPPED.split("."), *INSIDE, "modules_to_save", "weight", "bias"}  # of the names of its weights


def load(
    model: nn.Module, folder: Path, content: dict[str, Any], name: str, kept: Overwritten, active: str | None
) -> nn.Module:
    """Loads a LoRA (or DoRA) folder that peft reads, onto a plain model or peft's wrapper, whole or not at all.

    Returns the wrapper with `name` active and every module's training mode kept; `active` is what was active before.
    """
    import peft

    if not (folder / TENSORS).is_file():
        raise UserError(f"{folder}: no {TENSORS}; weights in another format (pickle) are not loaded.")
    tensors = check_peft(folder, content)
    plain = not isinstance(model, peft.PeftModel)
    modes = {id(module): module.training for module in model.modules()}
    put_back = _structure(model)
    wrapper: Any = model
    try:
        with quiet(), as_written(content):
            config = peft.PeftConfig.from_pretrained(str(folder))
            config.inference_mode = False
            # One that no linear has, beside `rank_pattern`: peft takes memory for it before it misses the tensors.
            config.r = min(config.r, largest_rank(tensors))
            if isinstance(config.target_modules, str) and not is_bounded(config.target_modules):
                config.target_modules = {key.removeprefix(WRAPPED).split(".lora_")[0] for key in tensors}
            if plain:
                wrapper = peft.get_peft_model(model, dataclasses.replace(config, bias="none"), adapter_name=name)
                own = _fill(wrapper, kept, tensors, name)
            else:
                _check_beside(model, config, name)
                if name in model.peft_config:
                    model.delete_adapter(name)
                own = _add(model, kept, tensors, name, config)
                kept.own.pop(name, None)
                active = active if active != name else None
    except Exception as error:  # peft raises many kinds for a folder that does not fit; all of them are the folder's
        put_back()  # peft leaves what it had put in place by then
        lines = (str(error).strip() or type(error).__name__).splitlines()
        reason = " ".join(line.strip() for line in lines[:2])  # torch's first line of misfits only introduces them
        raise UserError(f"{folder}: peft cannot load it on this model: {shown(reason, 300)}") from error
    wrapper.peft_config[name].bias = config.bias
    trained = trained_biases(wrapper, kept, name)
    base = kept.values((own.keys() | trained) - kept.base.keys()) | kept.base  # never written yet, or kept
    own = {n: own.get(n, base[n].clone()) for n in own.keys() | trained}
    own = {n: value for n, value in own.items() if n in trained or not torch.equal(value, base[n])}
    kept.base = {n: value for n, value in base.items() if n in own or n in kept.base}
    if own:
        kept.own[name] = own
    switch(wrapper, kept, active, name)
    set_modes(wrapper, modes)  # peft's new modules would drop out in evaluation mode too
    return wrapper


def check_telling(kept: Overwritten, name: str) -> None:
    """Refuses an adapter's name that peft would take for a part of a weight's name, where it would save and load other
    weights than the adapter's, or that is no folder's."""
    parts = {part for known in kept.names for part in known.split(".")}
    if name in parts | PEFT_PARTS or name.startswith("lora_") or any(letter in name for letter in "./\\"):
        raise UserError(
            f"a peft adapter cannot be called {name!r}: expected no dots and slashes, and no part of a weight's name."
        )


def _structure(model: nn.Module) -> Callable[[], None]:
    """Notes which modules, parameters and settings a model and all in it hold (no values); returns what puts them back.

    The containers stay the same ones, as tied layers share them.
    """
    attributes = [vars(module) for module in model.modules()]
    boxes = [value for each in attributes for value in each.values() if isinstance(value, dict | list | set)]
    before = [(box, copy.copy(box)) for box in (*attributes, *boxes)]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def put_back() -> None:
        for box, content in before:
            box.clear()
            box.extend(content) if isinstance(box, list) else box.update(content)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    return put_back


def _check_beside(model: Any, config: Any, name: str) -> None:
    """Refuses what peft cannot hold beside the adapters that are there: it looks for the tokens of one in all."""
    others = {known: other for known, other in model.peft_config.items() if known != name}
    for known, other in others.items():
        if bool(other.trainable_token_indices) != bool(config.trainable_token_indices):
            raise ValueError(f"only one of it and '{known}' trains single tokens, and peft cannot hold both at once")


def _add(model: Any, kept: Overwritten, tensors: dict[str, Tensor], name: str, config: Any) -> dict[str, Tensor]:
    """Adds one more adapter to peft's wrapper; returns what it gives the base's own parameters."""
    with without_biases(model):
        model.add_adapter(name, dataclasses.replace(config, bias="none"))
        return _fill(model, kept, tensors, name)


def _fill(model: Any, kept: Overwritten, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Fills peft's layers from a file's tensors; returns those for the base's own parameters, which stay as they are.

    Raises whatever peft does, `ValueError` where tensors are missing, unknown or of another shape.
    """
    import peft
    from peft.utils import transformers_weight_conversion as conversion
    from peft.utils.other import ModulesToSaveWrapper

    modules = tuple(
        f"{module_name}."
        for module_name, module in model.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save
    )
    own: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, value in tensors.items():
        inner = key.removeprefix(WRAPPED)
        plain = inner
        for part in INSIDE:
            plain = plain.replace(f".{part}.", ".")
        if plain in kept.buffers:
            raise ValueError(f"it would overwrite the base's {plain}")
        if inner.endswith(".modules_to_save.bias"):
            continue  # with bias: all, peft writes the biases of whole modules a second time
        if plain not in kept.names or (inner.startswith(modules) and ".original_module." not in inner):
            rest[key] = value
            continue
        parameter = kept.parameters[kept.names[plain]]
        if value.shape != parameter.shape:
            raise ValueError(
                f"size mismatch for {plain}: {tuple(value.shape)} in the file, {tuple(parameter.shape)} here"
            )
        own[kept.names[plain]] = value.to(parameter)
    own_names = set(lora_modules(model, name))
    fits = all(key.removeprefix(WRAPPED).partition(".lora_")[0] in own_names for key in rest if ".lora_" in key)
    # peft renames as transformers does a checkpoint's, and its patterns match names of the model too (Laguna).
    kept_names = [(conversion, "convert_peft_adapter_state_dict_for_transformers", _as_given)]
    try:
        with replaced(*kept_names if fits else ()):
            result = peft.set_peft_model_state_dict(model, rest, adapter_name=name)
    except KeyError as error:  # of a whole module or single tokens
        raise ValueError(f"the file lacks tensors: {error.args[0]}") from error
    missing = [key for key in result.missing_keys if ".lora_" in key and name in key.split(".")]
    for problem, keys in (("lacks", missing), ("has unknown", result.unexpected_keys)):
        if keys:
            raise ValueError(f"the file {problem} tensors: {', '.join(map(shown, keys[:3]))}")
    return own


def _as_given(adapter_state_dict: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
    return adapter_state_dict

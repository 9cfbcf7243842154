"""LoRA on exactly the linears that are named, whatever peft makes of the names.

peft takes a name for an ending of names. In mixtures of experts that transformers 5 fuses it takes `up_proj` and the
like for the fused experts (`convert_peft_config_for_transformers`), so that adapters of transformers 4 fit; dense and
shared MLPs beside the experts can no longer be named. Their weights can, as `target_parameters`: saved adapters do so
for plain peft to load them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

WEIGHT = ".weight"


@contextlib.contextmanager
def exact_targets(dropout: float | None = None) -> Iterator[None]:
    """Inside, peft puts LoRA on what a config names and on nothing else; linears named by their weights are modules.

    dropout: theirs, in place of the 0 that peft asks for where weights are named; None: as the config has it.
    """

    def named(config: Any, model: nn.Module, conversions: Any) -> None:
        modules = {f"{name}{WEIGHT}": name for name, _ in model.named_modules()}
        linears = [modules[weight] for weight in config.target_parameters or [] if weight in modules]
        if linears:
            config.target_modules = {*(config.target_modules or []), *linears}
            config.target_parameters = [w for w in config.target_parameters if w not in modules] or None
            config.lora_dropout = config.lora_dropout if dropout is None else dropout

    from peft.utils import transformers_weight_conversion as conversion

    usual = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = named
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = usual


def as_written(content: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Inside, an adapter that sparseft wrote is put exactly where it trained; others as peft puts them.

    content: the folder's `adapter_config.json`.
    """
    own = content.get("sparseft")
    if not isinstance(own, dict):
        return contextlib.nullcontext()
    settings = own.get("method_config")
    return exact_targets(settings.get("dropout") if isinstance(settings, dict) else None)


def others(model: nn.Module, targets: Iterable[str]) -> list[str] | None:
    """The modules that are not meant but end in a target's name; None: none."""
    targets = set(targets)
    endings = tuple(f".{target}" for target in targets)
    return [name for name, _ in model.named_modules() if name.endswith(endings) and name not in targets] or None


def lora_modules(model: nn.Module, adapter: str) -> list[str]:
    """The linears of peft's wrapper that have a LoRA of this adapter, by their names in the base."""
    from peft.tuners.lora import LoraLayer

    return [
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    ]


def portable(content: dict[str, Any], model: nn.Module, adapter: str) -> dict[str, Any]:
    """An adapter's `adapter_config.json` so that plain peft puts the tensors where this model has them.

    DoRA can only be loaded by sparseft there: peft has none for weights that are named.
    """
    if content.get("target_parameters") or not isinstance(content.get("target_modules"), list):
        return content
    names = sorted(lora_modules(model, adapter))
    taken = [name for name in names if _taken(model, adapter, name)]
    if not taken:
        return content
    if content.get("use_dora"):
        return content | {"target_modules": names}
    return content | {
        "target_modules": [name for name in names if name not in taken],
        "target_parameters": [name + WEIGHT for name in taken],
        "lora_dropout": 0.0,  # peft's condition
    }


def _taken(model: Any, adapter: str, name: str) -> bool:
    """Whether peft would take the linear's name for fused experts."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = copy.copy(model.peft_config[adapter])
    config.target_modules, config.target_parameters = {name}, None
    config.rank_pattern, config.alpha_pattern = {}, {}
    try:
        convert_peft_config_for_transformers(config, model.get_base_model(), None)
    except ValueError:  # a part of what is fused alone
        return True
    return set(config.target_modules or []) != {name}

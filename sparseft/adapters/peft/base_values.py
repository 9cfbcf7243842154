"""The base under peft's wrapper: which of its values an adapter overwrites, and switching between adapters and it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.replaced import replaced

HOOKS = ("_require_grads_hooks", "_require_grads_hook")


@dataclass
class Overwritten:
    """The base's parameters that some adapter gives other values: the active one's are in the model.

    `parameters`: the base's own, by their names before it was wrapped, each once; `names`: every name that one has
    there (a tied one has two) with the name in `parameters`. `base` and `own` hold values by those names: the base's,
    and those of each adapter (of the active one: as they were when it became active).
    """

    parameters: dict[str, nn.Parameter]
    names: dict[str, str]
    buffers: frozenset[str]
    hooks: dict[str, Any]  # transformers' on the embeddings, for gradient checkpointing
    base: dict[str, Tensor] = field(default_factory=dict)
    own: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module) -> Overwritten:
        """Nothing overwritten yet, of a model before peft wraps it."""
        parameters = dict(model.named_parameters())
        name_of = {id(parameter): name for name, parameter in parameters.items()}
        names = {name: name_of[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        buffers = frozenset(name for name, _ in model.named_buffers())
        return Overwritten(parameters, names, buffers, {k: v for k, v in vars(model).items() if k in HOOKS})

    def values(self, names: Any) -> dict[str, Tensor]:
        """Copies of the present values."""
        return {name: self.parameters[name].detach().clone() for name in names}

    @torch.no_grad()
    def write(self, values: dict[str, Tensor]) -> None:
        """Puts values into the model."""
        for name, value in values.items():
            self.parameters[name].copy_(value)


def switch(model: Any, kept: Overwritten, active: str | None, name: str | None) -> None:
    """Makes the adapter `name` of peft's wrapper the active one instead of `active`; None: the base, bit for bit."""
    if active in kept.own:  # it may have been trained since
        kept.own[active] = kept.values(kept.own[active])
    kept.write(kept.base | kept.own.get(name, {}) if name is not None else kept.base)
    with quiet():
        choose(model, kept, name)


def choose(model: Any, kept: Overwritten, name: str | None) -> None:
    """Tells peft which adapter computes, and which of the base's biases train with it."""
    if name is None:
        model.base_model.disable_adapter_layers()
    else:
        model.base_model.enable_adapter_layers()
        model.set_adapter(name)
    trained = trained_biases(model, kept, name) if name is not None else set()
    for parameter in kept.base:
        kept.parameters[parameter].requires_grad_(parameter in trained)


def trained_biases(model: Any, kept: Overwritten, name: str) -> set[str]:
    """The base's biases that peft trains as part of the adapter `name`."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    bias = model.peft_config[name].bias
    if bias == "none":
        return set()
    if bias == "all":
        wrappers = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper) and name in m.modules_to_save]
        inside = {id(parameter) for wrapper in wrappers for parameter in wrapper.original_module.parameters()}
        return {
            n for n, parameter in kept.parameters.items() if f".{n}".endswith(".bias") and id(parameter) not in inside
        }
    layers = [m.get_base_layer() for m in model.modules() if isinstance(m, LoraLayer) and name in m.r]
    chosen = {id(layer.bias) for layer in layers if getattr(layer, "bias", None) is not None}
    return {parameter for parameter, value in kept.parameters.items() if id(value) in chosen}


def without_biases(model: Any) -> contextlib.AbstractContextManager[None]:
    """Inside, peft knows of no adapter with biases: it refuses a second one, having no place for its values."""
    return replaced(*((config, "bias", "none") for config in model.peft_config.values()))


def set_modes(model: nn.Module, modes: dict[int, bool]) -> None:
    """Gives known modules back their training mode, and new ones that of the module they lie in."""

    def visit(module: nn.Module, inherited: bool) -> None:
        module.training = modes.get(id(module), inherited)
        for child in module.children():
            visit(child, module.training)

    root = model.get_base_model() if hasattr(model, "get_base_model") else model
    visit(model, modes.get(id(root), root.training))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences peft's warnings of what is taken care of here."""
    with warnings.catch_warnings():
        for message in (
            "Unexpected keyword arguments",  # `sparseft`, our own key
            "The PEFT config's `base_model_name_or_path`",  # a base kept elsewhere
            "Careful, disabling adapter layers with bias",
            "Model has `tie_word_embeddings=True`",
            "Model with `tie_word_embeddings=True`",
            "Setting `save_embedding_layers` to `True`",
            "Could not find a config file in",
            ".*was active which is now deleted",
            "fan_in_fan_out is set to",
            "`is_gradient_checkpointing` is deprecated",  # of transformers, by peft
        ):
            warnings.filterwarnings("ignore", message=message)
        yield

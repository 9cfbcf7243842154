"""The decoder's layers and linears, however a model stores them: plain, transposed, or as slices of a 3-D parameter.

Of experts kept as one parameter (experts, out, in), as transformers 5 keeps them, each expert's matrix is a linear of
its own, named by the parameter's path and its number: `model.layers.0.mlp.experts.down_proj.3`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sparseft.distributed.shards import full_shape, running
from sparseft.errors import UserError
from sparseft.models.packed.quantized import dequantized, is_packed, is_plain
from sparseft.replaced import replaced

# Subclasses of `nn.Linear` with a forward pass of their own: the product, to which, once rounded, the bias is added.
BIAS_APART = ("FalconLinear",)


def is_linear(module: nn.Module) -> bool:
    """Whether sparseft can train the module's weight: it is the one matrix of plain numbers by which the module
    multiplies. `nn.Linear` and transformers' `Conv1D` are, and what was converted already; their subclasses only where
    they compute the same product (a router or a grouped linear does not) and hold nothing beside weight and bias.
    So is a linear with a packed weight, beside which deltas are trained.
    """
    if getattr(module, "sparseft_linear", False) or is_packed(module):
        return True
    own = {name: t for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
    weight = module._parameters.get("weight")  # not what parametrizations and weight norm compute in its place
    if weight is None or not own.keys() <= {"weight", "bias"} or not all(map(is_plain, own.values())):
        return False
    if len(full_shape(weight)) != 2:
        return False
    kind = type(module)
    if kind.__name__ == "Conv1D" and hasattr(module, "nf"):
        return True
    if not isinstance(module, nn.Linear) or kind is NonDynamicallyQuantizableLinear:  # read by nn.MultiheadAttention
        return False
    same = kind.forward is nn.Linear.forward or kind.__name__ in BIAS_APART
    return same and ("forward" not in vars(module) or hasattr(module, "_hf_hook"))  # accelerate's moves inputs only


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored as (in, out)."""
    return type(module).__name__ == "Conv1D" or bool(getattr(module, "transposed", False))


def logical_weight(module: nn.Module) -> Tensor:
    """The weight as (out, in), however it is stored, without gradient: a view, or of a packed one its values."""
    if is_packed(module):
        return dequantized(module)
    weight = module.weight.detach()
    return weight.t() if is_transposed(module) else weight


def logical_shape(module: nn.Module) -> tuple[int, int]:
    """(out features, in features), however the weight is stored."""
    if getattr(module, "sparseft_linear", False) or is_packed(module):
        return module.out_features, module.in_features
    rows, columns = full_shape(module.weight)
    return (columns, rows) if is_transposed(module) else (rows, columns)


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its name: of the config's length, the one with the most parameters, of the text
    decoder's where the model says which part that is, so that no tower for images or audio is taken for it. None,
    several stacks of such layers (HRM's two) and layers whose parts lie in several lists (XLM's) are a `UserError`."""
    text = model.config.get_text_config()
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of decoder layers (nn.ModuleList).")
    decoder = _decoder(model)
    inside = {id(module) for module in decoder.modules()} if decoder is not None else set()
    lists = [item for item in lists if len(item[1]) == getattr(text, "num_hidden_layers", None)] or lists
    lists = [item for item in lists if id(item[1]) in inside] or lists
    lists = [item for item in lists if type(_config_around(model, item[0])) is type(text)] or lists
    name, layers = max(lists, key=lambda item: sum(full_shape(p).numel() for p in item[1].parameters()))
    alike = [other for other, m in lists if m is layers or (type(m[0]) is type(layers[0]) and m[0] is not layers[0])]
    if len(alike) > 1:
        raise UserError(
            f"{type(model).__name__} has more than one stack of decoder layers ({', '.join(alike)}), of which only one "
            "would train: sparseft cannot train it."
        )
    beside = [other for other, m in lists if other.rpartition(".")[0] == name.rpartition(".")[0] and _holds_linears(m)]
    if len(beside) > 1:
        raise UserError(
            f"{type(model).__name__} has the parts of its decoder layers in several lists ({', '.join(beside)}), of "
            "which only one would train: sparseft cannot train it."
        )
    return name, layers


def _holds_linears(parts: nn.ModuleList) -> bool:
    """Whether linears lie below the modules of a list."""
    return any(is_linear(module) for part in parts for module in part.modules() if module is not part)


def _config_around(model: nn.Module, name: str) -> Any:
    """The config of the innermost module around the module `name` that has one: a tower within the decoder, as Phi-4's
    for audio, has its own."""
    config = None
    while name and config is None:
        name = name.rpartition(".")[0]
        config = getattr(model.get_submodule(name), "config", None)
    return config


def _decoder(model: nn.Module) -> nn.Module | None:
    """The part of the model that reads text; None where a model's own code does not say which it is."""
    try:
        found = model.get_decoder()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def backbone(model: nn.Module) -> nn.Module | None:
    """The model below the head, whose output makes the logits; None of one without a head."""
    found = getattr(model, "base_model", model)
    if found is model:  # Llama 4 says another name than it has
        found = getattr(model, "model", None)
    return found if isinstance(found, nn.Module) else None


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The table of the tokens' embeddings; None where a model's own code does not say which it is."""
    try:
        return model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def has_other_head(model: nn.Module) -> bool:
    """Whether a model of transformers has a head that predicts no tokens, as for classes or rewards. A backbone
    (`AutoModel`) has none at all."""
    if getattr(model, "can_generate", lambda: True)() or getattr(model, "base_model", model) is model:
        return False
    return getattr(model, "get_output_embeddings", lambda: None)() is None


def context_length(config: Any) -> int | None:
    """The tokens that a model's config says it takes at most; None where it names no bound (XLNet says -1, others what
    no sequence reaches)."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    bounded = isinstance(length, int | float) and 0 < length < 1e9
    return int(length) if bounded else None


def language_model(model: nn.Module) -> nn.Module:
    """The model whose forward pass takes labels: inside what trains in several processes, and inside peft's."""
    inner = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # type: ignore[operator]


def last_logits(model: nn.Module, count: int) -> dict[str, int]:
    """The argument with which a forward pass makes the logits of the last `count` tokens of its rows alone; none where
    the model knows none and makes all."""
    inner = language_model(getattr(model, "_orig_mod", model))  # what was compiled takes anything
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}


def keeps_cache(config: Any) -> bool:
    """Whether `generate` can keep what was read: transformers counts the tokens of a cache by its attention layers, and
    fails where all are recurrent."""
    text = config.get_text_config(decoder=True)
    if not getattr(text, "layer_types", None):  # some do not even say how many layers they have, which a cache asks
        return True
    try:
        transformers.DynamicCache(config=text).get_seq_length()
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def plain_generation(model: nn.Module) -> Iterator[None]:
    """Inside, `generate` takes nothing from the model's own generation settings, not even which ids end an answer:
    what a call does not say, transformers would take from there. They are as before afterwards."""
    models = [each for each in {model, language_model(model)} if "generation_config" in vars(each)]
    with replaced(*((each, "generation_config", transformers.GenerationConfig()) for each in models)):
        yield


def runnable(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside, a model in shards can be run, a decoder layer at a time (`shards.running`); any other as it is."""
    return running(model, lambda: decoder_layers(model)[1])


def base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base model's own parameters, tied ones once: without the deltas that sparse layers add."""
    deltas = {id(module.delta) for module in model.modules() if getattr(module, "sparseft_pattern", False)}
    return ((name, p) for name, p in model.named_parameters() if id(p) not in deltas)


def base_parameter_count(model: nn.Module) -> int:
    """Parameters of the base model, tied ones once; packed ones as many as they stand for."""
    held = (m for m in model.modules() if is_packed(m) or getattr(m, "beside", False))
    packed = {id(m._parameters.get("weight")): math.prod(logical_shape(m)) for m in held}
    return sum(packed.get(id(p), full_shape(p).numel()) for _, p in base_parameters(model))


STATE = "_sparseft"  # the attribute of an attached model that holds `adapters.state.State`


def inside_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets `function(model, …)` take what `torch.compile` made of a model: it works on the model inside, by whose
    names adapters are kept. A model that stays attached is returned as it was given, compiled."""

    @functools.wraps(function)
    def call(model: nn.Module, *args: Any, **options: Any) -> Any:
        inner = getattr(model, "_orig_mod", model)
        result = function(inner, *args, **options)
        return model if result is inner and hasattr(inner, STATE) else result

    return call


@dataclass(frozen=True)
class Expert:
    """One expert's matrix: `experts._parameters[parameter][number]`."""

    experts: nn.Module
    parameter: str
    number: int

    @property
    def weight(self) -> Tensor:
        """The expert's (out, in) weight: a view, without gradient."""
        return stack_parameter(self.experts, self.parameter).detach()[self.number]


def stack_parameter(experts: nn.Module, name: str) -> nn.Parameter:
    """The 3-D parameter itself, also where a module of the same name stands before it."""
    parameter = experts._parameters[name]
    assert parameter is not None
    return parameter


def stacks(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """A module's own 3-D parameters that hold one linear weight (out, in) for each expert, with their shapes.

    transformers marks such modules (`use_experts_implementation`), and says whether they are stored transposed or
    with biases; those are left out, as is every 3-D parameter of an unmarked module.
    """
    marked = hasattr(getattr(module, "config", None), "_experts_implementation")
    if not marked or getattr(module, "is_transposed", True) or getattr(module, "has_bias", True):
        return {}
    return {
        name: (int(shape[0]), int(shape[1]), int(shape[2]))
        for name, p in module._parameters.items()
        if p is not None and len(shape := full_shape(p)) == 3 and is_plain(p)
    }


def other_stacks(module: nn.Module) -> list[str]:
    """A module's own 3-D parameters that nothing here can train: transposed, biased, or of a kind unknown."""
    if isinstance(module, _ConvNd) or getattr(module, "sparseft_pattern", False):  # a kernel; blocks that train
        return []
    known = stacks(module)
    stacked = [name for name, p in module._parameters.items() if p is not None and len(full_shape(p)) == 3]
    return [name for name in stacked if name not in known]


def find_expert(model: nn.Module, name: str) -> Expert | None:
    """The expert that `<path of the parameter>.<number>` names, or None where it names none."""
    path, _, number = name.rpartition(".")
    owner, _, parameter = path.rpartition(".")
    if not number.isdecimal() or not owner:
        return None
    module: nn.Module | None = model
    for part in owner.split("."):
        module = module._modules.get(part) if module is not None else None
    if module is None:
        return None
    shape = stacks(module).get(parameter)
    return Expert(module, parameter, int(number)) if shape is not None and int(number) < shape[0] else None


def is_router(parent: nn.Module, name: str) -> bool:
    """Whether a child of `parent`, by its name in the layer, weighs experts (a router, a part of one, or a shared
    expert's gate): never trained.

    Such a child stands beside the experts, where a gate projection stands beside up and down, or below a module that
    is called so.
    """
    *above, leaf = name.split(".")
    if {"router", "gate"} & set(above):
        return True
    has_experts = any("expert" in name and not name.endswith("gate") for name in parent._modules)
    return has_experts and (leaf in ("gate", "router", "classifier") or leaf.endswith("expert_gate"))


def in_experts(name: str) -> bool:
    """Whether a linear or parameter of this name belongs to routed experts, which a batch's tokens may pass by."""
    return "experts" in name.split(".")

"""The decoder's layers and linears, however a model stores them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sparseft.distributed.zero3 import full_shape, running
from sparseft.errors import UserError
from sparseft.models.quantized import is_plain

# Subclasses of `nn.Linear` with a forward pass of their own that computes the very same product.
SAME_PRODUCT = ("FalconLinear",)


def is_linear(module: nn.Module) -> bool:
    """Whether sparseft can train the module's weight: it is the one matrix of plain numbers by which the module
    multiplies. `nn.Linear` and transformers' `Conv1D` are, and what was converted already; their subclasses only where
    they compute the same product (a router or a grouped linear does not) and hold nothing beside weight and bias.
    """
    if getattr(module, "sparseft_linear", False):
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
    same = kind.forward is nn.Linear.forward or kind.__name__ in SAME_PRODUCT
    return same and ("forward" not in vars(module) or hasattr(module, "_hf_hook"))  # accelerate's moves inputs only


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored as (in, out)."""
    return type(module).__name__ == "Conv1D" or bool(getattr(module, "transposed", False))


def logical_weight(module: nn.Module) -> Tensor:
    """The weight as (out, in), however it is stored: a view, without gradient."""
    weight = module.weight.detach()
    return weight.t() if is_transposed(module) else weight


def logical_shape(module: nn.Module) -> tuple[int, int]:
    """(out features, in features), however the weight is stored."""
    rows, columns = full_shape(module.weight)
    return (columns, rows) if is_transposed(module) else (rows, columns)


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its name: of the config's length, the one with the most parameters."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    fitting = [item for item in lists if len(item[1]) == count] or lists
    if not fitting:
        raise UserError(f"{type(model).__name__} has no list of decoder layers (nn.ModuleList).")
    return max(fitting, key=lambda item: sum(full_shape(p).numel() for p in item[1].parameters()))


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The table of the tokens' embeddings; None where a model's own code does not say which it is."""
    try:
        return model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def context_length(config: Any) -> int | None:
    """The tokens that a model's config says it takes at most; None where it names no bound (XLNet says -1, others what
    no sequence reaches)."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    bounded = isinstance(length, int | float) and 0 < length < 1e9
    return int(length) if bounded else None


def runnable(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside, a model in shards can be run, a decoder layer at a time (`sharding.running`); any other as it is."""
    return running(model, lambda: decoder_layers(model)[1])


def base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base model's own parameters, tied ones once: without the deltas that sparse layers add."""
    deltas = {id(module.delta) for module in model.modules() if getattr(module, "sparseft_pattern", False)}
    return ((name, p) for name, p in model.named_parameters() if id(p) not in deltas)


def base_parameter_count(model: nn.Module) -> int:
    """Parameters of the base model, tied ones once."""
    return sum(full_shape(p).numel() for _, p in base_parameters(model))

"""Quantised models: which weights are plain numbers, which linears hold packed ones beside which deltas can be trained,
and the refusal of all others."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import UninitializedTensorMixin

from sparseft.distributed.fsdp import is_dtensor
from sparseft.errors import UserError

PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # `is_floating_point` is true of 8 bits too
ADVICE = "quantized models of this kind cannot be trained or evaluated yet: use the unquantized checkpoint"
PACKAGES = ("bitsandbytes", "torchao")  # whose linears hold packed weights and give their input's gradient
LOADED = ("bitsandbytes", "torchao")  # methods of quantized checkpoints that transformers loads as such linears


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's entries are its values: 16 bits or more, and no class of its own that packs or scales them."""
    return tensor.dtype in PLAIN and (type(tensor) in (nn.Parameter, Tensor) or is_dtensor(tensor))


def is_packed(module: nn.Module) -> bool:
    """Whether a module is a linear with a quantized weight that can be called and differentiated by its input: one of
    `PACKAGES`, or any with `in_features`, `out_features` and `dequantize()` -> (out, in)."""
    if not all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features")):
        return False
    if getattr(module, "sparseft_linear", False):
        return False
    weight = module._parameters.get("weight")
    if weight is not None and type(weight).__module__.partition(".")[0] in PACKAGES:
        return True
    return callable(getattr(module, "dequantize", None))


def is_int8(weight: Any) -> bool:
    """Whether a weight is torchao's in eight bits, with a scale a row."""
    kind = type(weight)
    if kind.__module__.partition(".")[0] != "torchao" or kind.__name__ != "Int8Tensor":
        return False
    return weight.qdata.dim() == 2 and weight.scale.shape == (len(weight.qdata), 1)


def numbers_of(tensor: Tensor) -> Tensor:
    """A tensor as torch's own: of one of torchao's, which knows few operations, the values that it stands for."""
    packed = type(tensor).__module__.partition(".")[0] == "torchao"
    return tensor.dequantize() if packed else tensor


def dequantized(module: nn.Module) -> Tensor:
    """The weight (out, in) by which a module that `is_packed` multiplies, in the dtype its class computes it in."""
    weight: Any = module._parameters.get("weight")
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if kind == "Int8Params":
        scales = weight.SCB if weight.SCB is not None else module.state.SCB  # type: ignore[union-attr]
        return weight.data * (scales.view(-1, 1) / 127)
    if type(weight).__module__.partition(".")[0] == "torchao":
        return weight.dequantize()
    return module.dequantize()  # type: ignore[operator]


class _UnpackedAgain(torch.autograd.Function):
    """The product of an `Int8Linear`, whose codes are unpacked anew in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, module: nn.Linear) -> Tensor:
        ctx.module = module
        return F.linear(x, module.weight, module.bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        weight = ctx.module.weight
        return (grad * weight.scale.view(-1).to(grad.dtype)) @ weight.qdata.to(grad.dtype), None


class Int8Linear(nn.Linear):
    """A linear with torchao's int8 weight. As torchao computes it, each keeps its weight in 16 bits from its forward to
    its backward pass: then a step takes three bytes a weight, more than it does on the checkpoint itself."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and input.requires_grad:
            return _UnpackedAgain.apply(input, self)
        return super().forward(input)


def keep_differentiable(module: nn.Module) -> None:
    """Has a packed linear give its input's gradient always, and keep nothing for it but what it holds anyway.

    One of bitsandbytes on a CPU with AVX512-BF16 repacks its weight in its first pass for inference, and from then on
    has none, without a word; one of torchao's int8 keeps its unpacked weight.
    """
    if type(module) is nn.Linear and is_int8(module.weight):
        module.__class__ = Int8Linear
    if not getattr(module, "support_avx512bf16_for_cpu", False):
        return
    module.state_dict()  # packs the weight back where that has happened: what it saves is in the usual order
    module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def keep_savable(model: nn.Module) -> None:
    """Has a model that was read from a packed checkpoint be saved again: transformers would reverse the conversions it
    was read by, and has no reverse of those that put packed weights together. Without them it takes the architecture's
    own."""
    model._weight_conversions = None  # type: ignore[assignment]


def quantized_by(content: Any) -> str | None:
    """The method by which a config.json (as transformers reads it) says that its weights are quantised; None: plain."""
    settings = getattr(content, "quantization_config", None)
    return _method(settings) if settings else None


def check_config(content: Any, what: str, *, packed: bool = False) -> None:
    """Refuses the config.json (as transformers reads it) of a checkpoint whose weights are quantised.

    what: how the user named the model, for the message. packed: those that transformers loads as linears which can be
    trained beside are let through.
    """
    for name in ("quantization_config", "compression_config"):  # the second is what compressed-tensors once wrote
        settings = content.get(name) if isinstance(content, dict) else getattr(content, name, None)
        if settings and not (packed and _method(settings) in LOADED):
            raise UserError(f"{what}: the weights are quantized ({_method(settings)}); {ADVICE}.")
    parts = content if isinstance(content, dict) else vars(content)
    for name, part in parts.items():  # the parts of a model for several media have their own
        if hasattr(part, "to_dict") or (isinstance(part, dict) and name.endswith("_config")):
            check_config(part, what, packed=packed)


def _method(settings: Any) -> str:
    get = settings.get if isinstance(settings, dict) else lambda key: getattr(settings, key, None)
    method = get("quant_method")
    if method is None and (get("load_in_4bit") or get("load_in_8bit")):
        method = "bitsandbytes"
    return str(getattr(method, "value", method) or "by an unnamed method")


def check_plain(model: nn.Module) -> None:
    """Refuses a model of which a module holds quantised weights, by the module's name and class."""
    for name, module in model.named_modules():
        if not is_packed(module) and (problem := _problem(module)):
            raise UserError(f"'{name}' is a {type(module).__name__} {problem}; {ADVICE}.")
    quantizer = getattr(model, "hf_quantizer", None)
    method = _method(getattr(quantizer, "quantization_config", {}))
    if quantizer is not None and method not in LOADED:
        raise UserError(f"{type(model).__name__} was loaded quantized ({method}); {ADVICE}.")


def _problem(module: nn.Module) -> str | None:
    """What is quantised in a module itself, as the end of a sentence; None where nothing is."""
    for name, tensor in module._parameters.items():
        if tensor is None or isinstance(tensor, UninitializedTensorMixin) or is_plain(tensor) or tensor.dim() == 0:
            continue
        if type(tensor) is not nn.Parameter:
            return f"whose {name} is a {type(tensor).__name__}"
        if not (tensor.dtype.is_complex or tensor.dtype == torch.bool):
            return f"whose {name} is {_dtype(tensor)}"
    for name, tensor in module._buffers.items():
        # Whole numbers in buffers are positions and indices mostly.
        packed = tensor is not None and tensor.dim() > 1 and re.search("weight|codes|packed", name)
        if packed and not (tensor.dtype in PLAIN or tensor.dtype.is_complex or tensor.dtype == torch.bool):
            return f"whose {name} is {_dtype(tensor)}"
    if isinstance(module, nn.Linear):
        for name in (*module._parameters, *module._buffers):
            if "scale" in name:
                return f"with {name} beside its weight"
    return None


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

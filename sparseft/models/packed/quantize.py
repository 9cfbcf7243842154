"""`model.quantize`: a checkpoint of full precision, quantized while it is loaded, by the packages that others use.

transformers reads one tensor after another and packs it at once, so that the model is never whole in memory at full
precision.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from sparseft.config import ModelConfig
from sparseft.errors import UserError
from sparseft.models.packed.quantized import is_packed, quantized_by

PACKAGE = {"nf4": "bitsandbytes", "int8": "torchao", "int4": "torchao"}
GROUP = 128  # weights of an int4 row that share a scale


def check_quantize(config: ModelConfig, content: Any, device: torch.device | str) -> None:
    """UserError where a checkpoint of this config.json cannot be packed by `model.quantize`, or is packed by what is
    not here: said before anything is loaded."""
    method = quantized_by(content)
    if config.quantize == "none" and method is None:
        return
    if config.quantize != "none" and method is not None:
        raise UserError(f"model.quantize={config.quantize}: {config.path} is quantized already; leave it at none.")
    package = method or PACKAGE[config.quantize]
    if importlib.util.find_spec(package) is None:
        who = f"model.path={config.path}" if method else f"model.quantize={config.quantize}"
        raise UserError(
            f"{who} needs the package {package}, which is not installed: pip install 'sparseft[quantized]', or use "
            "a checkpoint that is not quantized, with model.quantize=none."
        )
    if config.quantize == "int4" and torch.device(device).type != "cuda":
        raise UserError("model.quantize=int4: torchao's kernels for it need a CUDA device; use nf4 or int8.")


def check_packed(model: nn.Module, config: ModelConfig) -> None:
    """UserError where a package has packed what it does not unpack again: on a CPU bitsandbytes 0.50 begins its groups
    of 64 anew in each row, and so mistakes the scales where 64 does not divide the row."""
    for name, module in model.named_modules():
        weight: Any = module._parameters.get("weight")
        group = getattr(getattr(weight, "quant_state", None), "blocksize", 1)
        if weight is not None and weight.device.type == "cpu" and is_packed(module) and module.in_features % group:
            raise UserError(
                f"model.path={config.path}: '{name}' has {module.in_features} input features, and bitsandbytes unpacks "
                f"rows of no multiple of {group} wrongly on a CPU; use model.quantize=int8 or none."
            )


def quantization(config: ModelConfig, dtype: torch.dtype) -> Any:
    """transformers' settings for `model.quantize`; dtype: in which the model computes."""
    import transformers

    if config.quantize == "nf4":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    own = Int8WeightOnlyConfig() if config.quantize == "int8" else Int4WeightOnlyConfig(group_size=GROUP)
    return transformers.TorchAoConfig(own)

"""Loading a model in shards: with ZeRO-3 no process ever holds more of it than its shard and one gathered module.

transformers does it where it finds a DeepSpeed configuration of stage 3: it builds the model under
`deepspeed.zero.Init`, which shards each module as soon as it is made, and rank 0 hands on the checkpoint's tensors,
mapped from the files, one module after another.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from sparseft.config import HardwareConfig, ModelConfig
from sparseft.distributed.deepspeed import no_shared_memory, own_dtypes, zero_config
from sparseft.errors import UserError
from sparseft.models.loading import load_config, load_model


def in_shards(hardware: HardwareConfig) -> bool:
    """Whether models are loaded in shards. Not from a disk: what offloads there holds tensors of one dtype only."""
    return hardware.zero_stage == 3 and hardware.offload != "nvme"


def load(config: ModelConfig, hardware: HardwareConfig, device: torch.device) -> tuple[nn.Module, Any]:
    """`load_model`, in shards where the hardware asks for them (then a call of all processes).

    Returns the model and what has to live as long as it does: transformers' settings of ZeRO-3, null without it.
    Weights, dtypes and buffers are those of a model that was loaded whole.
    """
    if not in_shards(hardware):
        return load_model(config, device), None
    from transformers.integrations import HfDeepSpeedConfig

    if hardware.device == "cpu":
        no_shared_memory()
    stored = getattr(load_config(config), "dtype", None) if config.dtype == "auto" else config.dtype
    kind = {"bfloat16": "bf16", "float16": "fp16"}.get(str(stored).removeprefix("torch."))
    settings = {key: value for key, value in zero_config(hardware).items() if value != "auto"}
    settings |= {"train_micro_batch_size_per_gpu": 1}  # asked for, and of no meaning here
    alive = HfDeepSpeedConfig(settings | ({kind: {"enabled": True}} if kind else {}))
    with own_dtypes():
        model = load_model(config, device)
    _check_precision(config, model)
    return model, alive


def _check_precision(config: ModelConfig, model: nn.Module) -> None:
    """Refuses a model of which a part should be fp32 and is not: in shards all weights are loaded in one dtype."""
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    kept = [*strict, *((getattr(model, "_keep_in_fp32_modules", None) or ()) if model.dtype == torch.float16 else ())]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.dtype in (torch.float16, torch.bfloat16) and any(re.search(rf"\b{part}\b", name) for part in kept):
            raise UserError(
                f"hardware.zero_stage=3: {type(model).__name__} keeps '{name}' in float32, which loading in shards "
                f"cannot; use hardware.zero_stage=2 or less, or model.dtype=float32 (now {config.dtype})."
            )

"""Tiny models whose experts are kept as one 3-D parameter, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

SIZES = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "num_experts_per_tok": 2,
}  # fmt: skip


MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, moe_intermediate_size=56, head_dim=12, decoder_sparse_step=1
    ),
}


def build(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, config: Any = None) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config or MODELS[kind](), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    return model.to(dtype).eval()


def batch(seed: int = 0, size: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(3, 96, (size, 10), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

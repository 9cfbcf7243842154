"""Shapes of models that many know, so that planning and benchmarks need no download, nor leave to make one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.config import ModelConfig

# Published ones as in the checkpoints' config.json; heads are 128 wide in those of 7B and more, 64 in the others.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048},
    "llama2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096},
    "llama2-13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
                   "num_key_value_heads": 40, "vocab_size": 32000, "max_position_embeddings": 4096},
    "llama3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192},
    "llama3-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
                   "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
                     "tie_word_embeddings": True},
    # As deep as a 7B and so narrow that only the host's work counts.
    "llama-64x32": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 32, "num_attention_heads": 4,
                    "num_key_value_heads": 4, "vocab_size": 2048, "max_position_embeddings": 2048},
}  # fmt: skip
# The gated ones, which a plan is made of without an account.
GATED = {
    "meta-llama/Llama-2-7b-hf": "llama2-7b",
    "meta-llama/Llama-2-13b-hf": "llama2-13b",
    "meta-llama/Meta-Llama-3-8B": "llama3-8b",
    "meta-llama/Meta-Llama-3-70B": "llama3-70b",
}


def published(model: ModelConfig) -> Any:
    """The config of a gated model of the hub, in what makes its memory; None of any other."""
    shape = GATED.get(model.path)
    if shape is None or Path(model.path).exists():
        return None
    import transformers

    console.log(f"plan: {model.path} by its published shape")
    return transformers.LlamaConfig(**SHAPES[shape], dtype="bfloat16")

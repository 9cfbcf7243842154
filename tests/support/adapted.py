"""Small bases on disk and adapters of every kind on them, as training leaves them but quickly made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

import sparseft
from sparseft.adapters.lifecycle import trainable_parameters
from sparseft.layers import sparse_layers
from sparseft.selection.selection import Selection
from support import experts
from support.models import build_model, build_tokenizer

BASES = ("llama", "qwen2", "gpt2", "phi3", "mixtral")
# A linear of each kind that a base has: read by rows, by columns and by blocks of 32, which divide no side.
LINEARS = {
    "llama": ("self_attn.v_proj", "mlp.down_proj", "mlp.up_proj"),
    "qwen2": ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj"),
    "gpt2": ("attn.c_attn", "mlp.c_proj", "mlp.c_fc"),
    "phi3": ("self_attn.qkv_proj", "mlp.down_proj", "mlp.gate_up_proj"),
    "mixtral": ("mlp.experts.gate_up_proj.3", "mlp.experts.down_proj.1", "mlp.experts.gate_up_proj.0"),
}
METHODS = ("rows", "columns", "blocks", "grid", "fused", "lora", "dora", "full")


def build(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A tiny model of the kind with the vocabulary of `build_tokenizer`."""
    size = len(build_tokenizer())
    if kind in ("llama", "qwen2", "gpt2"):
        return build_model(kind, dtype, seed, vocab_size=size)
    if kind == "mixtral":
        config = experts.MODELS["mixtral"]()
        config.vocab_size = size
        return experts.build("mixtral", dtype, seed, config)
    config = transformers.Phi3Config(
        vocab_size=size, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return experts.build("phi3", dtype, seed, config)


def base(kind: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, shard: str = "5GB") -> Path:
    """A model folder with tokenizer."""
    build(kind, dtype, seed).save_pretrained(folder, max_shard_size=shard)
    build_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, dtype: Any = "auto") -> Any:
    """The model of a folder, as transformers loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def modules(kind: str) -> tuple[str, str, str]:
    prefix = "transformer.h" if kind == "gpt2" else "model.layers"
    first, second, third = LINEARS[kind]
    return f"{prefix}.0.{first}", f"{prefix}.1.{second}", f"{prefix}.0.{third}"


def attached(kind: str, method: str, model: Any, seed: int = 0) -> Any:
    """The model with random deltas of a method, not too small to see in bf16."""
    by_rows, by_columns, by_blocks = modules(kind)
    chosen: dict[str, Any] = {
        "rows": {by_rows: {"rows": [7, 0, 23]}},
        "columns": {by_columns: {"columns": [5, 2, 47]}},
        "blocks": {by_blocks: {"blocks": [[1, 1], [0, 0], [2, 0]]}},
        "grid": {by_rows: {"grid": ([7, 0, 23], [5, 2, 47, 1])}},
    }
    chosen["fused"] = chosen["blocks"] | {by_rows: {"rows": [7, 0]}, by_columns: {"columns": [5, 1], "rows": [2]}}
    if method in chosen:
        config = sparseft.SylvaConfig(block_size=32)
        model = sparseft.attach(model, config, Selection(chosen[method], block_size=32))
    elif method == "full":
        model = sparseft.attach(model, sparseft.FullConfig())
    else:
        targets = ["c_attn", "c_fc"] if kind == "gpt2" else ["o_proj"] if kind == "phi3" else ["q_proj", "o_proj"]
        settings = sparseft.DoraConfig if method == "dora" else sparseft.LoraConfig
        model = sparseft.attach(model, settings(rank=2, targets=targets))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if method in chosen:
            for layer in sparse_layers(model).values():
                for pattern in layer.patterns.values():
                    pattern.delta.copy_(torch.randn(pattern.delta.shape, generator=generator) * 0.3)
                    for n, (r, c) in enumerate(pattern.index.tolist() if pattern.kind == "blocks" else ()):
                        pattern.delta[n, max(0, layer.out_features - r * 32) :] = 0
                        pattern.delta[n, :, max(0, layer.in_features - c * 32) :] = 0
                layer.write_back()
        else:
            for name, p in trainable_parameters(model).items():
                p += torch.randn(p.shape, generator=generator).to(p) * (0.02 if "magnitude" in name else 0.2)
    return model


def adapter(kind: str, method: str, base: Path, folder: Path, seed: int = 0) -> Path:
    """An adapter folder made on the base in `base`."""
    sparseft.save_adapter(attached(kind, method, load(base), seed), folder)
    return folder

"""Tiny models on disk and adapters that look trained, for what is exported of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import sparseft
from sparseft.kernels import reference
from sparseft.layers import sparse_layers
from sparseft.models.spec import ModelSpec
from support.models import build_model, build_tokenizer

SIZES = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
OTHERS = {
    "phi3": lambda vocabulary: transformers.Phi3Config(vocab_size=vocabulary, **SIZES),
    "mixtral": lambda vocabulary: transformers.MixtralConfig(vocab_size=vocabulary, num_local_experts=3, **SIZES),
    "qwen3_moe": lambda vocabulary: transformers.Qwen3MoeConfig(
        vocab_size=vocabulary, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=56, head_dim=12,
        decoder_sparse_step=1, **SIZES,
    ),
    "qwen3_moe_dense": lambda vocabulary: transformers.Qwen3MoeConfig(  # its second layer has no experts
        vocab_size=vocabulary, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=56, head_dim=12,
        decoder_sparse_step=1, mlp_only_layers=[1], **SIZES,
    ),
    "laguna": lambda vocabulary: transformers.LagunaConfig(
        vocab_size=vocabulary, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=56, head_dim=12,
        shared_expert_intermediate_size=64, **SIZES,
    ),
    "qwen2_moe": lambda vocabulary: transformers.Qwen2MoeConfig(
        vocab_size=vocabulary, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=56,
        shared_expert_intermediate_size=64, decoder_sparse_step=1, **SIZES,
    ),
}  # fmt: skip


def saved_model(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model of `kind` with a tokenizer, as a Hugging Face folder."""
    tokenizer = build_tokenizer()
    if kind in OTHERS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(OTHERS[kind](len(tokenizer)))
            for parameter in model.parameters():
                parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    else:
        model = build_model(kind, vocab_size=len(tokenizer))
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def patterns(model: Any, layers: tuple[int, ...] = (0, 1)) -> dict[str, dict[str, Any]]:
    """Rows, columns, grids and blocks of 32, which divide no side, on linears of some layers, some on one together."""
    spec = ModelSpec.of(model)
    chosen: dict[str, dict[str, Any]] = {}
    for name, (rows, columns) in spec.linears.items():
        leaf = spec.path_of(name).rpartition(".")[2]
        if spec.layer_of[name] not in layers or name.endswith(".1"):
            continue
        if leaf in ("q_proj", "qkv_proj", "c_attn", "gate_up_proj"):
            chosen[name] = {"rows": [1, rows - 2, 5]}
        elif leaf in ("o_proj", "down_proj"):
            chosen[name] = {"columns": [columns - 1, 0], "rows": [3], "grid": ([rows - 1, 4], [columns - 1, 2, 7])}
        elif leaf in ("up_proj", "c_fc"):
            chosen[name] = {"blocks": [[0, 1], [(rows - 1) // 32, 0], [1, 1]], "columns": [2]}
    return chosen


def adapter(
    model: Path, folder: Path, chosen: dict[str, dict[str, Any]] | None = None, scale: float = 0.3, **settings: Any
) -> Path:
    """An adapter on the model in `model` with random deltas; settings: of its method."""
    attached = load(model)
    selection = sparseft.Selection(patterns(attached) if chosen is None else chosen, block_size=32)
    attached = sparseft.attach(attached, sparseft.SylvaConfig(block_size=32, **settings), selection)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in sparse_layers(attached).values():
            dense = scale * torch.randn(layer.out_features, layer.in_features, generator=generator)
            for kind, pattern in layer.patterns.items():
                pattern.delta.copy_(reference.gather(dense, kind, pattern.index, pattern.block_size))
    sparseft.save_adapter(attached, folder)
    return folder


def lora(model: Path, folder: Path, targets: list[str], scale: float = 0.3, **settings: Any) -> Any:
    """A LoRA of PEFT on the model in `model` with random factors, saved; returns the model with it."""
    import peft

    attached = peft.get_peft_model(load(model), peft.LoraConfig(target_modules=targets, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in attached.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, scale, generator=generator)
    attached.peft_config["default"].base_model_name_or_path = str(model)
    attached.save_pretrained(folder)
    return attached


def maker(tmp_path_factory: Any) -> Callable[[str], tuple[Path, Path]]:
    """What gives the folders of a tiny model of some kind and of an adapter on it, made once."""
    folders: dict[str, tuple[Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in folders:
            root = tmp_path_factory.mktemp(kind)
            model = saved_model(kind, root / "model")
            folders[kind] = (model, adapter(model, root / "adapter"))
        return folders[kind]

    return make

"""A Hugging Face model as a GGUF file in fp32, exact, for tests that run llama.cpp: by its converter's rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ARCHITECTURES = {
    "llama": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3_moe": "qwen3moe", "phi3": "phi3", "gpt2": "gpt2",
}  # fmt: skip


def write_base(model: torch.nn.Module, path: Path, kind: str = "F32", tokenizer: Any = None) -> Path:
    """Writes the model's weights, widened to fp32, without a vocabulary: llama.cpp is asked by token ids.

    kind: how matrices are stored, vectors stay in fp32; tokenizer: a byte-level BPE one, to be written too.
    """
    import gguf

    config: Any = model.config
    name = ARCHITECTURES[config.model_type]
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    blocks = config.num_hidden_layers
    writer = gguf.GGUFWriter(path, name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(config.vocab_size)
    else:
        _add_tokenizer(writer, tokenizer, config.vocab_size)
    writer.add_block_count(blocks)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if name == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_rope_dimension_count(head)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if name == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_sliding_window(config.sliding_window or 0)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if config.model_type in ("mixtral", "qwen3_moe"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if config.model_type == "qwen3_moe":
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    names = gguf.get_tensor_name_map(arch, blocks)
    for hf_name, tensor in _tensors(model):
        place = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert place is not None, hf_name
        values = np.ascontiguousarray(tensor.detach().float().numpy())
        if kind == "F32" or values.ndim == 1:
            writer.add_tensor(place, values)
        else:
            stored = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(place, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    """As llama.cpp's converter writes a byte-level BPE tokenizer; what the model has beyond it are unused tokens."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([words.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types([3 if n in special else 1 if n in words else 5 for n in range(size)])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)


def _tensors(model: torch.nn.Module) -> Any:
    """The parameters by the names of llama.cpp's table, in its layout."""
    config: Any = model.config
    llama = config.model_type in ("llama", "mixtral")
    for name, value in model.named_parameters():
        if name.endswith(".experts.gate_up_proj"):
            gate, up = value.chunk(2, dim=1)
            stem = name.removesuffix("gate_up_proj")
            yield f"{stem}gate_proj.weight", gate
            yield f"{stem}up_proj.weight", up
        elif name.endswith(".experts.down_proj"):
            yield f"{name}.weight", value
        elif llama and name.endswith("q_proj.weight"):
            yield name, interleaved(value, config.num_attention_heads)
        elif llama and name.endswith("k_proj.weight"):
            yield name, interleaved(value, config.num_key_value_heads)
        elif name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):  # Conv1D: stored (in, out)
            yield name, value.T
        else:
            yield name, value


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)

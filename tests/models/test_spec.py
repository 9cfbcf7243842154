"""Roles, heads and fingerprints of the architectures that sparseft knows, and the errors of loading a model."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import sparseft
from sparseft.config import ModelConfig
from sparseft.errors import UserError
from sparseft.models.decoder import base_parameter_count, decoder_layers, is_linear
from sparseft.models.fingerprint import base_fingerprint
from sparseft.models.loading import check_model_path, load_model, load_tokenizer, resolve_device
from sparseft.models.spec import ModelSpec

SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


def meta(config: Any) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


# name: (config, heads, kv heads, head_dim, {leaf: {role: (side, start, unit, count, other side)}})
GATED = {
    "gate_proj": {"gate": ("rows", 0, 1, 80, 48)},
    "up_proj": {"up": ("rows", 0, 1, 80, 48)},
    "down_proj": {"down": ("columns", 0, 1, 80, 48)},
}


def attention(heads: int, kv: int, dim: int) -> dict[str, dict[str, tuple]]:
    return {
        "q_proj": {"q": ("rows", 0, dim, heads, 48)},
        "k_proj": {"k": ("rows", 0, dim, kv, 48)},
        "v_proj": {"v": ("rows", 0, dim, kv, 48)},
        "o_proj": {"o": ("columns", 0, dim, heads, 48)},
    }


ARCHITECTURES: dict[str, tuple[Any, int, int, int, dict[str, dict[str, tuple]]]] = {
    "llama": (transformers.LlamaConfig(**SIZES), 4, 4, 12, attention(4, 4, 12) | GATED),
    "llama_head_dim": (
        transformers.LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=20), 4, 2, 20, attention(4, 2, 20) | GATED
    ),
    "qwen2": (transformers.Qwen2Config(**SIZES, num_key_value_heads=2), 4, 2, 12, attention(4, 2, 12) | GATED),
    "qwen3": (
        transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16), 4, 2, 16, attention(4, 2, 16) | GATED
    ),
    "mistral": (transformers.MistralConfig(**SIZES, num_key_value_heads=1), 4, 1, 12, attention(4, 1, 12) | GATED),
    "gemma2": (
        transformers.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8), 4, 2, 8, attention(4, 2, 8) | GATED
    ),
    "phi3": (
        transformers.Phi3Config(**SIZES, num_key_value_heads=2, bos_token_id=1, eos_token_id=2), 4, 2, 12,
        {
            "qkv_proj": {"q": ("rows", 0, 12, 4, 48), "k": ("rows", 48, 12, 2, 48), "v": ("rows", 72, 12, 2, 48)},
            "o_proj": {"o": ("columns", 0, 12, 4, 48)},
            "gate_up_proj": {"gate": ("rows", 0, 1, 80, 48), "up": ("rows", 80, 1, 80, 48)},
            "down_proj": {"down": ("columns", 0, 1, 80, 48)},
        },
    ),
    "gpt2": (
        transformers.GPT2Config(vocab_size=64, n_embd=48, n_inner=80, n_layer=2, n_head=4), 4, 4, 12,
        {
            "c_attn": {"q": ("rows", 0, 12, 4, 48), "k": ("rows", 48, 12, 4, 48), "v": ("rows", 96, 12, 4, 48)},
            "attn.c_proj": {"o": ("columns", 0, 12, 4, 48)},
            "c_fc": {"up": ("rows", 0, 1, 80, 48)},
            "mlp.c_proj": {"down": ("columns", 0, 1, 80, 48)},
        },
    ),
    "opt": (
        transformers.OPTConfig(
            vocab_size=64, hidden_size=48, ffn_dim=80, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=48, pad_token_id=0,
        ), 4, 4, 12,
        {
            "q_proj": {"q": ("rows", 0, 12, 4, 48)},
            "k_proj": {"k": ("rows", 0, 12, 4, 48)},
            "v_proj": {"v": ("rows", 0, 12, 4, 48)},
            "out_proj": {"o": ("columns", 0, 12, 4, 48)},
            "fc1": {"up": ("rows", 0, 1, 80, 48)},
            "fc2": {"down": ("columns", 0, 1, 80, 48)},
        },
    ),
    "phi": (
        transformers.PhiConfig(**SIZES), 4, 4, 12,
        {leaf: role for leaf, role in attention(4, 4, 12).items() if leaf != "o_proj"}
        | {
            "dense": {"o": ("columns", 0, 12, 4, 48)},
            "fc1": {"up": ("rows", 0, 1, 80, 48)},
            "fc2": {"down": ("columns", 0, 1, 80, 48)},
        },
    ),
    "gptj": (
        transformers.GPTJConfig(vocab_size=64, n_embd=48, n_inner=80, n_layer=2, n_head=4, rotary_dim=4), 4, 4, 12,
        {leaf: role for leaf, role in attention(4, 4, 12).items() if leaf != "o_proj"}
        | {
            "out_proj": {"o": ("columns", 0, 12, 4, 48)},
            "fc_in": {"up": ("rows", 0, 1, 80, 48)},
            "fc_out": {"down": ("columns", 0, 1, 80, 48)},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_roles_and_heads(name: str) -> None:
    config, heads, kv_heads, head_dim, roles = ARCHITECTURES[name]
    model = meta(config)
    spec = ModelSpec.of(model)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (heads, kv_heads, head_dim)
    assert spec.experts == [] and spec.transposed == (set(spec.linears) if name == "gpt2" else set())
    assert spec.total_parameters == sum(p.numel() for p in model.parameters())
    for layer in range(2):
        found: dict[str, dict[str, tuple]] = {}
        for slot in (s for s in spec.slots if s.layer == layer):
            leaf = next(leaf for leaf in sorted(roles, key=len, reverse=True) if slot.module.endswith(leaf))
            place = (slot.side, slot.start, slot.unit, slot.count, slot.other)
            found.setdefault(leaf, {})[slot.role] = place
        assert found == roles
    for module, (rows, columns) in spec.linears.items():  # the slots of a module never overlap nor leave it
        slots = [s for s in spec.slots if s.module == module]
        used = Counter(f for s in slots for f in range(s.start, s.start + s.unit * s.count))
        side = rows if slots[0].side == "rows" else columns
        assert set(used.values()) == {1} and set(used) == set(range(side))
    assert not any("head" in n or "embed" in n for n in spec.linears)


T = transformers
SMALL = {**SIZES, "num_key_value_heads": 2, "head_dim": 10}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 14}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
BOTH = {"layer_types": ["linear_attention", "full_attention"]}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 8, "linear_value_head_dim": 16}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}

# Heads of another width than the config's head_dim. name: (config, {end of the linear's name: (unit, count)})
WIDTHS: dict[str, Callable[[], tuple[Any, dict[str, tuple[int, int]]]]] = {
    "latent attention": lambda: (
        T.DeepseekV3Config(
            **SIZES, **LATENT, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
            topk_group=1, moe_intermediate_size=16, first_k_dense_replace=2,
        ),
        {"o_proj": (14, 4)},
    ),
    "latent attention, q whole": lambda: (
        T.DeepseekV2Config(
            **SIZES, **LATENT | {"q_lora_rank": None}, num_key_value_heads=4, n_routed_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=2,
        ),
        {"q_proj": (10, 4), "o_proj": (14, 4)},
    ),
    "each side its own": lambda: (
        T.MiMoV2FlashConfig(
            **SMALL, v_head_dim=6, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            layer_types=["full_attention"] * 2,
        ),
        {"q_proj": (10, 4), "k_proj": (10, 2), "v_proj": (6, 2), "o_proj": (6, 4)},
    ),
    "gated": lambda: (
        T.Qwen3_5TextConfig(**SMALL, **LINEAR, **BOTH),
        {
            "linear_attn.out_proj": (16, 6), "q_proj": (20, 4), "k_proj": (10, 2), "v_proj": (10, 2),
            "self_attn.o_proj": (10, 4),
        },
    ),
    "linear": lambda: (
        T.OlmoHybridConfig(**SIZES, **LINEAR | {"linear_num_value_heads": 2}, **BOTH),
        {
            "linear_attn.q_proj": (8, 2), "linear_attn.k_proj": (8, 2), "linear_attn.v_proj": (16, 2),
            "linear_attn.o_proj": (16, 2), "self_attn.q_proj": (12, 4), "self_attn.k_proj": (12, 4),
            "self_attn.v_proj": (12, 4), "self_attn.o_proj": (12, 4),
        },
    ),
    "by layer": lambda: (
        T.Gemma4TextConfig(
            **SMALL, **ALTERNATING, global_head_dim=24, attention_k_eq_v=True, num_global_key_value_heads=1,
            hidden_size_per_layer_input=8, vocab_size_per_layer_input=64,
        ),
        {
            "0.self_attn.q_proj": (10, 4), "0.self_attn.k_proj": (10, 2), "0.self_attn.v_proj": (10, 2),
            "0.self_attn.o_proj": (10, 4), "1.self_attn.q_proj": (24, 4), "1.self_attn.k_proj": (24, 1),
            "1.self_attn.o_proj": (24, 4),
        },
    ),
    "a parent that is not called attention": lambda: (
        T.RecurrentGemmaConfig(**SIZES, num_key_value_heads=2, lru_width=48, block_types=["recurrent", "attention"]),
        {"q_proj": (12, 4), "k_proj": (12, 2), "v_proj": (12, 2), "o_proj": (12, 4)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WIDTHS))
def test_units_are_whole_heads(name: str) -> None:
    config, widths = WIDTHS[name]()
    spec = ModelSpec.of(meta(config), tried=False)
    found = {}
    for slot in (s for s in spec.slots if s.role in ("q", "k", "v", "o")):
        end = next(end for end in widths if slot.module.endswith(end))
        found[end] = (slot.unit, slot.count)
        assert slot.unit * slot.count == spec.linears[slot.module][slot.side == "columns"]
    assert found == widths


@pytest.mark.parametrize(("new", "multi_query", "kv_heads"), [(False, True, 1), (False, False, 4), (True, True, 2)])
def test_falcon_names_its_key_value_heads_otherwise(new: bool, multi_query: bool, kv_heads: int) -> None:
    config = T.FalconConfig(
        vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
        new_decoder_architecture=new, multi_query=multi_query,
    )  # fmt: skip
    model = meta(config)
    assert ModelSpec.of(model).num_kv_heads == kv_heads
    leaves = {
        name.rpartition(".")[2] for name in sparseft.compute_selection(model, sparseft.S2FTConfig(sparsity=0.9)).modules
    }
    assert leaves == ({"dense", "dense_4h_to_h"} if kv_heads == 4 else {"dense_4h_to_h"})  # down alone, where grouped


# name: (config, ends of the names of its routers' linears)
ROUTERS: dict[str, Callable[[], tuple[Any, tuple[str, ...]]]] = {
    "afmoe": lambda: (
        T.AfmoeConfig(**SMALL, **EXPERTS, num_shared_experts=1, num_dense_layers=0, layer_types=["full_attention"] * 2),
        ("mlp.router.gate",),
    ),
    "hunyuan": lambda: (T.HunYuanMoEV1Config(**SMALL, num_experts=4, moe_topk=2), ("mlp.gate.wg",)),
    "jetmoe": lambda: (
        T.JetMoeConfig(
            vocab_size=64, hidden_size=48, intermediate_size=16, num_hidden_layers=2, num_key_value_heads=2,
            kv_channels=12, num_local_experts=4, num_experts_per_tok=2,
        ),
        ("mlp.router.layer", "experts.router.layer"),
    ),
    "mixtral": lambda: (T.MixtralConfig(**SMALL, num_local_experts=4), ()),  # its router is no linear
    "zaya": lambda: (
        T.ZayaConfig(vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                     head_dim=12),
        ("gate.down_proj", "router_mlp.fc1", "router_mlp.fc2", "router_mlp.out_proj"),
    ),
}  # fmt: skip


# Linears with names of their own. name: (config, {end of the linear's name in a layer: {role: first row or column}})
NAMES: dict[str, Callable[[], tuple[Any, dict[str, dict[str, int]]]]] = {
    "Granite 4": lambda: (
        T.GraniteMoeHybridConfig(
            **SIZES, num_key_value_heads=2, num_local_experts=0, shared_intermediate_size=40,
            layer_types=["mamba", "attention"], mamba_n_heads=4, mamba_d_head=24, mamba_n_groups=1,
        ),
        {"shared_mlp.input_linear": {"gate": 0, "up": 40}, "shared_mlp.output_linear": {"down": 0}},
    ),
    "MPT": lambda: (
        T.MptConfig(vocab_size=64, d_model=48, n_heads=4, n_layers=2, expansion_ratio=2),
        {"attn.Wqkv": {"q": 0, "k": 48, "v": 96}, "attn.out_proj": {"o": 0}},
    ),
    "DBRX": lambda: (
        T.DbrxConfig(
            vocab_size=64, d_model=48, n_heads=4, n_layers=2, ffn_config={"ffn_hidden_size": 16},
            attn_config={"kv_n_heads": 2, "rope_theta": 10000.0},
        ),
        {"attn.Wqkv": {"q": 0, "k": 48, "v": 72}, "attn.out_proj": {"o": 0}},
    ),
    "ModernBERT": lambda: (
        T.ModernBertDecoderConfig(**SIZES, layer_types=["full_attention"] * 2),
        {"mlp.Wi": {"gate": 0, "up": 80}, "mlp.Wo": {"down": 0}, "attn.Wo": {"o": 0}},
    ),
    "gates within attention": lambda: (
        T.DeepseekV4Config(
            **SIZES, head_dim=16, q_lora_rank=24, o_lora_rank=24, o_groups=2, index_n_heads=2, index_head_dim=16,
            num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            layer_types=["compressed_sparse_attention", "heavily_compressed_attention"],
        ),
        {"self_attn.compressor.gate_proj": {}, "self_attn.compressor.indexer.gate_proj": {}},
    ),
    "gates within norms": lambda: (
        T.AXK2Config(
            **SIZES, **LATENT, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
            topk_group=1, moe_intermediate_size=16, first_k_dense_replace=2, index_n_heads=2, index_head_dim=16,
            index_topk=8,
        ),
        {"input_layernorm.mlp.fc1": {}, "input_layernorm.mlp.fc2": {}, "0.mlp.down_proj": {"down": 0}},
    ),
    "gate and up under the name of one": lambda: (
        T.MoshiConfig(vocab_size=64, hidden_size=48, ffn_dim=80, num_hidden_layers=2, num_attention_heads=4),
        {"mlp.fc1": {}, "mlp.fc2": {"down": 0}},  # (80, 48) and (48, 40)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(NAMES))
def test_roles_by_other_names(name: str) -> None:
    config, expected = NAMES[name]()
    spec = ModelSpec.of(meta(config), tried=False)
    found: dict[str, dict[str, int]] = {}
    for linear in spec.known:
        if end := next((end for end in expected if linear.endswith(f".{end}")), None):
            found[end] = {slot.role: slot.start for slot in spec.slots if slot.module == linear}
    assert found == expected


@pytest.mark.parametrize("name", list(ROUTERS))
def test_routers_are_never_trained(name: str) -> None:
    config, routers = ROUTERS[name]()
    model = meta(config)
    there = {n for n, module in model.named_modules() if is_linear(module) and n.endswith(routers or ("router",))}
    assert bool(there) == bool(routers)
    spec = ModelSpec.of(model, tried=False)
    assert spec.linears and there.isdisjoint(spec.linears)
    assert not any("router" in n.split(".") or "gate" in n.split(".") for n in spec.linears)


def test_unknown_roles_leave_blocks_to_train() -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4
    )
    spec = ModelSpec.of(meta(config))
    assert len(spec.linears) == 8 and not [s for s in spec.slots if s.role in ("q", "k", "v")]
    selection = sparseft.compute_selection(meta(config), sparseft.SylvaConfig(importance="random", block_size=16))
    assert selection.modules.keys() == spec.linears.keys()


FUSED: dict[str, Any] = {
    "neox": transformers.GPTNeoXConfig(**SIZES),
    "bloom": transformers.BloomConfig(vocab_size=64, hidden_size=48, n_layer=2, n_head=4),
    "falcon": transformers.FalconConfig(
        vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, multi_query=False
    ),
    "codegen": transformers.CodeGenConfig(vocab_size=64, n_embd=48, n_layer=2, n_head=4, rotary_dim=4),
    "bigcode": transformers.GPTBigCodeConfig(vocab_size=64, n_embd=48, n_layer=2, n_head=4, multi_query=False),
}


def test_interleaved_projections_beside_plain_ones() -> None:
    config = T.MiniMaxConfig(**SMALL, **BOTH, num_local_experts=2)
    slots = [slot for slot in ModelSpec.of(meta(config), tried=False).slots if slot.role in ("q", "k", "v", "o")]
    assert {slot.module.rpartition(".")[2] for slot in slots if slot.layer == 0} == {"out_proj"}
    assert {slot.role for slot in slots if slot.layer == 1} == {"q", "k", "v", "o"}


@pytest.mark.parametrize("name", list(FUSED))
def test_fused_projections_of_another_order_are_left_alone(name: str) -> None:
    # Their q, k and v lie interleaved: o, up and down can be chosen, rows of q, k and v cannot.
    model = meta(FUSED[name])
    spec = ModelSpec.of(model)
    assert {slot.role for slot in spec.slots} == {"o", "up", "down"}
    assert all(slot.count == 4 for slot in spec.slots if slot.role == "o")
    selection = sparseft.compute_selection(model, sparseft.S2FTConfig(sparsity=0.9))
    assert all("columns" in kinds for kinds in selection.modules.values()) and len(selection.modules) == 4
    fused = next(iter(spec.linears.keys() - {slot.module for slot in spec.slots})).rpartition(".")[2]
    with pytest.raises(UserError, match=rf"no 'q' projection in scope .* {fused} can train .* method.rows=\[{fused}\]"):
        sparseft.compute_selection(model, sparseft.S2FTConfig(q_ratio=0.5))


def test_without_any_role_s2ft_is_refused() -> None:
    with pytest.raises(UserError, match="no module in scope has a role that s2ft knows"):
        sparseft.compute_selection(meta(FUSED["neox"]), sparseft.S2FTConfig(scope="query_key_value"))


def test_a_model_without_attention_is_refused() -> None:
    config = transformers.MambaConfig(vocab_size=64, hidden_size=48, num_hidden_layers=2, state_size=4)
    for method in (sparseft.S2FTConfig(), sparseft.SylvaConfig(importance="random", block_size=8)):
        with pytest.raises(UserError, match="MambaForCausalLM has no single number of attention heads"):
            sparseft.attach(meta(config), method)


def test_experts_are_seen(make_model: Callable[..., Any]) -> None:
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3)
    spec = ModelSpec.of(meta(config))
    assert spec.num_kv_heads == 2 and all(spec.linears[n] for n in spec.linears)
    assert spec.experts == [] and spec.frozen_experts(True) == []
    assert len(spec.frozen_experts(False)) == 4 and len(spec.stacked) == 4 * 3
    assert all("experts" in name for name in spec.stacked) and spec.stacked < spec.linears.keys()


SHARES: dict[str, Callable[[], Any]] = {
    "hunyuan, by layer": lambda: T.HunYuanMoEV1Config(**SMALL, num_experts=4, moe_topk=[1, 1]),
    "hunyuan, layers differ": lambda: T.HunYuanMoEV1Config(**SMALL, num_experts=8, moe_topk=[1, 3]),
    "aria": lambda: T.AriaTextConfig(**SMALL, moe_num_experts=4, moe_topk=1),
    "gemma4": lambda: T.Gemma4TextConfig(
        **SMALL, **ALTERNATING, global_head_dim=24, hidden_size_per_layer_input=8, vocab_size_per_layer_input=64,
        enable_moe_block=True, num_experts=4, top_k_experts=1, moe_intermediate_size=16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SHARES))
def test_the_share_of_the_experts_that_a_token_goes_through(name: str) -> None:
    spec = ModelSpec.of(meta(SHARES[name]()), tried=False)
    assert spec.active_experts == 0.25


def test_the_spec_of_an_attached_model_is_the_plain_one(make_model: Callable[..., Any]) -> None:
    for kind in ("llama", "qwen2", "gpt2"):
        model = make_model(kind)
        plain = ModelSpec.of(model)
        sparseft.attach(model, sparseft.S2FTConfig(o_ratio=0.5, d_ratio=0.2))
        assert ModelSpec.of(model) == plain


def test_decoder_layers(make_model: Callable[..., Any]) -> None:
    assert decoder_layers(make_model("llama"))[0] == "model.layers"
    assert decoder_layers(make_model("gpt2"))[0] == "transformer.h"
    with pytest.raises(UserError, match="no list of decoder layers"):
        bare = torch.nn.Linear(2, 2)
        bare.config = transformers.LlamaConfig()
        decoder_layers(bare)


def test_decoder_layers_are_those_of_the_text() -> None:
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = T.Gemma3Config(
        text_config=SMALL | ALTERNATING, vision_config=tower | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )  # fmt: skip
    model = meta(config)
    assert sum(p.numel() for p in model.model.vision_tower.parameters()) > 60_000  # more than the text's layers
    assert decoder_layers(model) == ("model.language_model.layers", model.model.language_model.layers)


def test_a_tower_within_the_decoder_is_none_of_its_layers() -> None:
    tower = {"intermediate_size": 80, "num_attention_heads": 4}
    audio = {"hidden_size": 64, "num_blocks": 2, "nemo_conv_channels": 16, "input_size": 16, "ext_pw_out_channel": 64}
    image = {"hidden_size": 48, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
    config = T.Phi4MultimodalConfig(
        **SIZES, num_key_value_heads=2, audio_config=tower | audio, vision_config=tower | image, bos_token_id=1,
        eos_token_id=2, original_max_position_embeddings=4096,
    )  # fmt: skip
    model = meta(config)
    tower = model.model.embed_tokens_extend.audio_embed.encoder.encoders
    layers = model.model.layers
    assert len(tower) == len(layers) and sum(p.numel() for p in tower.parameters()) > 70_000  # more than the text's
    assert decoder_layers(model) == ("model.layers", layers)


def test_two_stacks_of_decoder_layers_are_refused() -> None:
    model = meta(T.HrmTextConfig(**SMALL))
    with pytest.raises(UserError, match=r"HrmTextForCausalLM has more than one .*model.L_module.layers, model.H"):
        ModelSpec.of(model)
    model.model.L_module.layers = torch.nn.ModuleList(model.model.H_module.layers)  # by another name the same layers
    assert decoder_layers(model)[1][0] is model.model.H_module.layers[0]


def test_layers_whose_parts_lie_in_several_lists_are_refused() -> None:
    model = meta(T.XLMConfig(vocab_size=64, emb_dim=48, n_layers=2, n_heads=4, causal=True))
    with pytest.raises(UserError, match=r"XLM.* in several lists \(transformer.attentions, transformer.ffns\)"):
        ModelSpec.of(model)


def test_quantised_linears_are_no_linears() -> None:
    linear = torch.nn.Linear(4, 4)
    assert is_linear(linear) and not is_linear(torch.nn.Embedding(4, 4))
    linear.weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    assert not is_linear(linear)


# ---- fingerprints ----


def test_fingerprint_does_not_depend_on_the_load_dtype(model_folder: Callable[..., Path]) -> None:
    for stored in (torch.bfloat16, torch.float32, torch.float16):
        folder = str(model_folder("llama", stored))
        loads = ["float32", "bfloat16", "auto"] + (["float16"] if stored != torch.float32 else [])
        prints = {base_fingerprint(load_model(ModelConfig(path=folder, dtype=dtype))) for dtype in loads}
        assert len(prints) == 1


def test_fingerprint_sees_small_values_alike_in_half_precision(make_model: Callable[..., Any]) -> None:
    model = make_model("llama", torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.logspace(-9, 0, model.lm_head.weight.numel()).view_as(model.lm_head.weight))
    expected = base_fingerprint(model)
    assert base_fingerprint(model.float()) == expected and base_fingerprint(model.half()) == expected


def test_fingerprint_sees_the_base_and_not_the_deltas(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    expected = base_fingerprint(model)
    assert base_fingerprint(make_model("llama")) == expected != base_fingerprint(make_model("llama", seed=1))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1.0  # the first entry is always sampled
    assert base_fingerprint(model) != expected
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] -= 1.0
    sparseft.attach(model, sparseft.SylvaConfig(importance="random", block_size=8))
    assert base_fingerprint(model) == expected
    assert base_parameter_count(model) == sum(p.numel() for p in make_model("llama").parameters())
    renamed = make_model("llama")
    renamed.model.layers[0].mlp.other = renamed.model.layers[0].mlp.up_proj
    del renamed.model.layers[0].mlp.up_proj
    assert base_fingerprint(renamed) != expected


def test_fingerprint_counts_tied_weights_once(make_model: Callable[..., Any]) -> None:
    model = make_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert base_parameter_count(model) == sum(p.numel() for p in model.parameters())


# ---- loading ----


def test_load_model(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("llama", torch.bfloat16)
    model = load_model(ModelConfig(path=str(folder)))
    assert model.dtype == torch.bfloat16 and not model.training and model.name_or_path == str(folder)
    assert (
        load_model(ModelConfig(path=str(folder), dtype="float32", attn_implementation="eager")).dtype == torch.float32
    )
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    assert tokenizer.decode(tokenizer("the answer is").input_ids) == "the answer is"
    assert load_tokenizer(ModelConfig(path="/nowhere/at/all", tokenizer=str(folder))).pad_token == "<pad>"


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: halve(f / "model.safetensors"), "could not be loaded"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "could not be loaded"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "could not be loaded"),
    "a weight missing": (drop_a_weight, "1 weights are missing, model.layers.0.self_attn.q_proj.weight for one"),
    "a layer missing": (lambda f: edit(f, num_hidden_layers=3), "9 weights are missing"),
    "another width": (
        lambda f: edit(f, intermediate_size=64),
        r"6 weights are mismatched, model.layers.0.mlp.down_proj.weight of shape \(48, \d+\) instead of \(48, 64\)",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "could not be loaded"),
    "impossible config": (lambda f: edit(f, num_attention_heads=5), "could not be loaded"),
    "unknown type": (lambda f: edit(f, model_type="nonsense"), "nonsense"),
}


@pytest.mark.parametrize("case", list(DAMAGE))
def test_damaged_folders_are_refused(model_folder: Callable[..., Path], tmp_path: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama"), folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_model(ModelConfig(path=str(folder)))


def test_paths(tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    (tmp_path / "llama-tiny").mkdir()
    (tmp_path / "file.bin").write_text("x")
    for path, message in {
        str(tmp_path / "lama-tiny"): "no such folder. Did you mean 'llama-tiny'",
        str(tmp_path / "llama-tiny"): "has no config.json",
        str(tmp_path / "file.bin"): "this is a file",
        "./nowhere": "no such folder",
        "~/nowhere/to/be/found": "no such folder",
        "bundled:huge": "nothing of that name is bundled",
    }.items():
        with pytest.raises(UserError, match=message):
            check_model_path(path)
    assert check_model_path("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    with pytest.raises(UserError, match=r"no such folder \(looked in .*\), and the model could not be loaded"):
        load_model(ModelConfig(path="nobody/nothing"))  # offline
    with pytest.raises(UserError, match="the tokenizer could not be loaded"):
        load_tokenizer(ModelConfig(path="nobody/nothing"))
    with pytest.raises(UserError, match="model.dtype=float31.*Did you mean 'float32'"):
        load_model(ModelConfig(path=str(model_folder()), dtype="float31"))


def test_a_model_that_is_gone_is_not_looked_up_on_the_hub(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (in_tmp / "models" / "qwen").mkdir(parents=True)
    looked = rf"no such folder \(looked in {in_tmp}\)\."
    for path, message in {
        "models/qwn": f"{looked} Did you mean 'qwen'",
        "modls/qwen/": f"{looked} Did you mean 'models/qwen'",
        "./qwen": looked,
        "../gone/qwen": looked,
        "nowhere/model.safetensors": looked,
        "one/two/three": looked,
        str(in_tmp / "models" / "qwn"): "qwn: no such folder. Did you mean 'qwen'",
    }.items():
        with pytest.raises(UserError, match=message):
            check_model_path(path)
    assert check_model_path("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    # A folder of the owner's name makes no path of a model that the hub's cache has.
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    assert check_model_path("models/qwn") == "models/qwn"


def test_devices() -> None:
    assert resolve_device("cpu").type == "cpu"
    if torch.cuda.is_available():
        assert resolve_device("auto").type == resolve_device("cuda").type == "cuda"
    else:
        assert resolve_device("auto").type == "cpu"
        with pytest.raises(UserError, match="no CUDA device"):
            resolve_device("cuda")

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
    "falcon": transformers.FalconConfig(vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=4),
    "codegen": transformers.CodeGenConfig(vocab_size=64, n_embd=48, n_layer=2, n_head=4, rotary_dim=4),
    "bigcode": transformers.GPTBigCodeConfig(vocab_size=64, n_embd=48, n_layer=2, n_head=4, multi_query=False),
}


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

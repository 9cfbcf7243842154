"""`sparseft export --format peft-lora`: exact, in the form that every engine takes, and never a wrong file.

The oracles are peft, transformers and the rules of vLLM's loader, written down again here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import sparseft
from sparseft.cli.app import main
from sparseft.export.formats.peft_lora import PeftLora
from support.exported import adapter, load, maker, patterns, saved_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
]
DENSE = ("llama", "qwen2", "phi3", "gpt2")
EXPERTS = ("mixtral", "qwen3_moe")
PROMPT = torch.tensor([[5, 77, 130, 9, 40, 8]])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    return maker(tmp_path_factory)


def export(source: Path, out: Path, *words: str) -> int:
    return main(["export", str(source), "--format", "peft-lora", "--out", str(out), "--json", *words])


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(PROMPT).logits


# ---- what it holds ----


@pytest.mark.parametrize("kind", DENSE + EXPERTS)
def test_peft_and_transformers_load_what_was_trained(made: Any, kind: str, tmp_path: Path, capsys: Any) -> None:
    model, source = made(kind)
    capsys.readouterr()
    assert export(source, tmp_path / "out") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["format"] == "peft-lora" and result["rank"] >= result["needed"] > 0
    assert result["proof"]["largest_difference"] <= result["proof"]["allowed"] < result["proof"]["largest_change"]
    wanted = logits(sparseft.merge(sparseft.load_adapter(load(model), source)))
    by_peft = peft.PeftModel.from_pretrained(load(model), str(tmp_path / "out"))
    torch.testing.assert_close(logits(by_peft), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(by_peft.merge_and_unload()), wanted, rtol=1e-4, atol=1e-4)
    plain = load(model)
    assert (logits(plain) - wanted).abs().max() > 0.01
    plain.load_adapter(str(tmp_path / "out"))
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", DENSE)
def test_each_product_is_the_change_itself(made: Any, kind: str, tmp_path: Path) -> None:
    model, source = made(kind)
    assert export(source, tmp_path / "out") == 0
    base, merged = load(model), sparseft.merge(sparseft.load_adapter(load(model), source))
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, module in merged.named_modules():
        if f"base_model.model.{name}.lora_A.weight" in tensors:
            b, a = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA")
            before = base.get_submodule(name).weight
            delta = (b @ a).t() if kind == "gpt2" else b @ a
            torch.testing.assert_close(before + delta, module.weight, rtol=0, atol=5e-7)
        elif hasattr(module, "weight"):
            assert torch.equal(module.weight, base.get_submodule(name).weight)


def vllm_loads(folder: Path, suffixes: set[str], layers: int) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """What vLLM's loader makes of a folder, and what it or another engine raises or drops."""
    config, tensors = config_of(folder), load_file(folder / "adapter_model.safetensors")
    assert not config["modules_to_save"] and config["bias"] == "none" and not config["use_dora"]
    assert config["r"] in (8, 16, 32, 64, 128, 256, 320, 512)
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    assert isinstance(config["target_modules"], list)
    loras: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        assert name.startswith("base_model.model.") and parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B")
        loras.setdefault(".".join(parts[2:-2]), {})[parts[-2]] = tensor
    by_kind: dict[str, set[int]] = {}
    for name, pair in loras.items():
        assert name.rpartition(".")[2] in suffixes
        assert pair["lora_A"].shape[0] == pair["lora_B"].shape[1] == config["r"]  # SGLang: of every module
        match = re.search(r"\.(\d+)\.", name)
        assert match is not None
        by_kind.setdefault(name.replace(match[0], ".*.", 1), set()).add(int(match[1]))
    assert all(found == set(range(layers)) for found in by_kind.values())  # TGI drops a kind that a layer lacks
    ends = {kind.rpartition(".")[2] for kind in by_kind}
    for group in ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}):
        assert not ends & group or group <= ends
    return {n: (p["lora_A"], p["lora_B"], config["lora_alpha"] / config["r"]) for n, p in loras.items()}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("layers", [(0, 1), (1,)])
def test_the_form_that_every_engine_takes(made: Any, kind: str, layers: tuple[int, ...], tmp_path: Path) -> None:
    model, _ = made(kind)
    chosen = {name: kinds for name, kinds in patterns(load(model), layers).items() if "q" in name or "up" in name}
    source = adapter(model, tmp_path / "adapter", chosen)
    assert export(source, tmp_path / "out", "--engine", "vllm") == 0
    suffixes = (
        {"qkv_proj", "gate_up_proj"} if kind == "phi3" else {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    )
    loras = vllm_loads(tmp_path / "out", suffixes, 2)
    assert len(loras) == 2 * len(suffixes) and {scale for _, _, scale in loras.values()} == {1.0}
    for name, (a, b, _) in loras.items():
        assert bool((b @ a).any()) == (name in chosen), name
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "sparseft_export.json", "README.md"
    }  # fmt: skip


def test_ends_of_names_that_others_share_are_longer(made: Any, tmp_path: Path) -> None:
    """GPT-2 has a c_proj in its attention and in its MLP."""
    model, _ = made("gpt2")
    source = adapter(model, tmp_path / "adapter", {"transformer.h.1.attn.c_proj": {"columns": [3]}})
    assert export(source, tmp_path / "out") == 0
    assert config_of(tmp_path / "out")["target_modules"] == ["attn.c_proj"]
    assert config_of(tmp_path / "out")["fan_in_fan_out"] is True


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_files_round_each_value_once(made: Any, dtype: str, tmp_path: Path) -> None:
    model, source = made("llama")
    assert export(source, tmp_path / "wide") == 0
    assert export(source, tmp_path / "out", "--dtype", dtype) == 0
    wide, narrow = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("wide", "out"))
    assert all(torch.equal(tensor.to(getattr(torch, dtype)), narrow[name]) for name, tensor in wide.items())


def test_a_bf16_base_computes_with_it(tmp_path: Path) -> None:
    """Not only in the fp32 of the proof."""
    model = saved_model("llama", tmp_path / "model", torch.bfloat16)
    source = adapter(model, tmp_path / "adapter")
    assert export(source, tmp_path / "out", "--dtype", "bfloat16") == 0
    loaded = peft.PeftModel.from_pretrained(load(model), str(tmp_path / "out"))
    wanted = sparseft.merge(sparseft.load_adapter(load(model), source))
    assert (logits(loaded) - logits(wanted)).abs().max() < 0.05 * (logits(load(model)) - logits(wanted)).abs().max()


def test_fused_adapters(made: Any, tmp_path: Path) -> None:
    model, source = made("llama")
    up = "model.layers.1.mlp.up_proj"
    other = adapter(model, tmp_path / "other", {up: {"rows": [4, 70], "columns": [9]}})
    attached = sparseft.load_adapter(sparseft.load_adapter(load(model), source, "a"), other, "b")
    sparseft.save_adapter(sparseft.fuse(attached, {"a": 0.5, "b": -2.0}), tmp_path / "fused")
    assert export(tmp_path / "fused", tmp_path / "out") == 0


# ---- LoRA ----

FORMS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 7},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "ranks": {"r": 3, "rank_pattern": {"q_proj": 2, r"layers\.1\..*o_proj": 20}, "alpha_pattern": {"o_proj": 32}},
    "one layer": {"r": 2, "layers_to_transform": [1], "layers_pattern": "layers"},
}


def lora(model: Path, folder: Path, targets: Any = ("q_proj", "o_proj"), **options: Any) -> Path:
    """A folder that peft made, its values random."""
    wrapped = peft.get_peft_model(load(model), peft.LoraConfig(target_modules=list(targets), **options))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    wrapped.save_pretrained(folder)
    config = config_of(folder) | {"base_model_name_or_path": str(model)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_loras_become_the_form_that_every_engine_takes(made: Any, form: str, tmp_path: Path) -> None:
    model, _ = made("llama")
    source = lora(model, tmp_path / "lora", **FORMS[form])
    assert export(source, tmp_path / "out", "--engine", "sglang") == 0
    vllm_loads(tmp_path / "out", {"q_proj", "k_proj", "v_proj", "o_proj"}, 2)
    assert (
        config_of(tmp_path / "out")["r"] == config_of(tmp_path / "out")["lora_alpha"] == (32 if form == "ranks" else 8)
    )
    wanted, found = (peft.PeftModel.from_pretrained(load(model), str(f)) for f in (source, tmp_path / "out"))
    torch.testing.assert_close(logits(found), logits(wanted), rtol=1e-4, atol=1e-4)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "DoRA"),
    "biases": ({"bias": "lora_only"}, "bias"),
    "embeddings": ({"targets": ["q_proj", "embed_tokens"]}, "embed_tokens"),
    "head": ({"targets": ["q_proj", "lm_head"]}, "lm_head"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, "lm_head"),
    "tokens": ({"trainable_token_indices": [3, 5]}, "tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_low_rank_change_is_refused_by_name(made: Any, case: str, tmp_path: Path, capsys: Any) -> None:
    model, _ = made("qwen2")
    options, said = REFUSED[case]
    source = lora(model, tmp_path / "lora", **{"r": 2, **options})
    assert export(source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert said in error and "merged" in error and not (tmp_path / "out").exists()


def test_a_whole_model_is_refused(made: Any, tmp_path: Path, capsys: Any) -> None:
    model, _ = made("llama")
    attached = sparseft.attach(load(model), sparseft.FullConfig())
    sparseft.save_adapter(attached, tmp_path / "full")
    (tmp_path / "full" / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    assert export(tmp_path / "full", tmp_path / "out") == 2
    assert "--format merged" in capsys.readouterr().err


# ---- engines ----


def test_ranks_above_every_engines(made: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """As 40 of 80 rows are where 32 is the most: the numbers, and what helps, before anything is written."""
    from sparseft.export import engines
    from sparseft.selection import engine_ranks

    model, _ = made("llama")
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1)]
    source = adapter(model, tmp_path / "adapter", {names[0]: {"rows": list(range(40))}, names[1]: {"rows": [0]}})
    for module in (engines, engine_ranks):
        monkeypatch.setattr(module, "RANKS", (8, 16, 32))
    monkeypatch.setitem(engines.HIGHEST, "vllm", 32)
    for words in ((), ("--engine", "vllm")):
        assert export(source, tmp_path / "out", *words) == 2
        error = capsys.readouterr().err
        assert "1 of 2 linears need more than 32" in error and f"{names[0]} 40" in error
        assert "train with method.max_rank=32, or use --format patch or merged" in error
        assert not (tmp_path / "out").exists()
    assert export(source, tmp_path / "out", "--engine", "peft") == 0
    assert config_of(tmp_path / "out")["r"] == 48
    anew = adapter(model, tmp_path / "anew", {names[0]: {"rows": list(range(40))}}, reselect_steps=5)
    assert export(anew, tmp_path / "other") == 2
    assert "train with method.max_rank=32 method.reselect_steps=0, or use" in capsys.readouterr().err
    assert export(lora(model, tmp_path / "lora", r=40), tmp_path / "other") == 2
    assert "train with method.rank=32, or use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "engine", "said"),
    [
        ("mixtral", "sglang", "experts"),
        ("mixtral", "tgi", "experts"),
        ("gpt2", "vllm", "Conv1D"),
        ("gpt2", "llama.cpp", "Conv1D"),
        ("phi3", "tgi", "gate_up_proj"),
        ("llama", "mlx", "does not read --format peft-lora, but mlx or merged"),
        ("llama", "vlm", "vllm"),
    ],
)
def test_what_an_engine_would_refuse_is_said_first(
    made: Any, kind: str, engine: str, said: str, tmp_path: Path, capsys: Any
) -> None:
    _, source = made(kind)
    capsys.readouterr()  # of making it
    assert export(source, tmp_path / "out", "--engine", engine) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") <= 2 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "engine"),
    [("llama", "tgi"), ("phi3", "lorax"), ("gpt2", "lorax"), ("phi3", "vllm"), ("mixtral", "vllm"), ("gpt2", "peft")],
)
def test_what_an_engine_takes(made: Any, kind: str, engine: str, tmp_path: Path) -> None:
    _, source = made(kind)
    assert export(source, tmp_path / "out", "--engine", engine) == 0


def test_mixtrals_experts_have_their_checkpoints_names(made: Any, tmp_path: Path) -> None:
    _, source = made("mixtral")
    assert export(source, tmp_path / "out") == 0
    names = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    start = "base_model.model.model.layers."
    wanted = {
        f"{start}{layer}.block_sparse_moe.experts.{expert}.{leaf}.lora_A.weight"
        for layer in (0, 1) for expert in range(3) for leaf in ("w1", "w2", "w3")
    }  # fmt: skip
    assert {n for n in names if "experts" in n and "lora_A" in n} == wanted
    assert {"w1", "w2", "w3"} <= set(config_of(tmp_path / "out")["target_modules"])


# ---- faults put in on purpose ----


def wrong_alpha(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    config["lora_alpha"] *= 2


def a_missing_layer(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


def a_dropped_module(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    for side in "AB":
        del tensors[f"base_model.model.model.layers.0.mlp.up_proj.lora_{side}.weight"]


def a_dropped_module_of_zeros(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    for side in "AB":
        del tensors[f"base_model.model.model.layers.0.self_attn.k_proj.lora_{side}.weight"]


def one_value(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    tensor = tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    tensor[0, 5] *= 1.001


def one_value_where_nothing_was_trained(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    for side in "AB":
        tensors[f"base_model.model.model.layers.1.self_attn.v_proj.lora_{side}.weight"][0, 0] = 1e-3


def swapped_layers(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    for side in "AB":
        names = [f"base_model.model.model.layers.{layer}.self_attn.o_proj.lora_{side}.weight" for layer in (0, 1)]
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]


def not_a_number(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"][-1, 0] = float("nan")


def one_target_less(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    config["target_modules"].remove("o_proj")


def a_pattern(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    config["alpha_pattern"] = {"q_proj": 1}


FAULTS = (
    wrong_alpha, a_missing_layer, a_dropped_module, a_dropped_module_of_zeros, one_value,
    one_value_where_nothing_was_trained, swapped_layers, not_a_number, one_target_less, a_pattern,
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught_and_nothing_kept(
    made: Any, fault: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    _, source = made("llama")
    write = PeftLora.write

    def damaged(self: Any, source: Any, options: Any, folder: Path) -> dict[str, Any]:
        facts = write(self, source, options, folder)
        tensors, config = load_file(folder / "adapter_model.safetensors"), config_of(folder)
        fault(tensors, config)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return facts

    monkeypatch.setattr(PeftLora, "write", damaged)
    assert export(source, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "the export is not what was trained" in error and "Nothing was kept" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", [wrong_alpha, a_missing_layer, one_target_less])
def test_the_proof_alone_catches_it(made: Any, fault: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(PeftLora, "verify", lambda *_: None)
    test_a_fault_is_caught_and_nothing_kept(made, fault, tmp_path, monkeypatch, capsys)


def test_an_adapter_of_zeros_is_refused(made: Any, tmp_path: Path, capsys: Any) -> None:
    model, _ = made("llama")
    source = adapter(model, tmp_path / "adapter", scale=0.0)
    assert export(source, tmp_path / "out") == 1
    assert "the export is the base model" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "linear", "said"),
    [
        ("qwen3_moe_dense", "layers.1.mlp.down_proj", "takes the name for the routed experts'"),
        ("qwen2_moe", "layers.1.mlp.experts.down_proj.2", "routed experts of qwen2_moe cannot be LoRA"),
        ("laguna", "layers.1.mlp.shared_experts.up_proj", "takes the name for another one of the checkpoint's"),
    ],
)
def test_what_peft_would_put_elsewhere(kind: str, linear: str, said: str, tmp_path: Path, capsys: Any) -> None:
    """In architectures with experts PEFT takes `down_proj` for theirs, wherever it stands; of some it knows none. It
    renames what a file has as a checkpoint's tensors, and the pattern for Laguna's shared experts matches their new
    names too."""
    model = saved_model(kind, tmp_path / "model")
    source = adapter(model, tmp_path / "adapter", {f"model.{linear}": {"columns": [1]}})
    assert export(source, tmp_path / "out") == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_shared_expert_is_a_linear_like_others(tmp_path: Path) -> None:
    model = saved_model("qwen2_moe", tmp_path / "model")
    source = adapter(model, tmp_path / "adapter", {"model.layers.1.mlp.shared_expert.down_proj": {"columns": [1]}})
    assert export(source, tmp_path / "out") == 0

"""`mlx`: the weights in the file, faults put in on purpose, and mlx-lm itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import sparseft as library
from sparseft.export import mlx_lora
from sparseft.export.formats import mlx as mlx_file
from sparseft.export.formats.mlx import Mlx
from sparseft.export.mlx_lora import CONFIG, TENSORS
from sparseft.publish.listing import listing_of
from support import exported
from support.running import refused, sparseft

HERE = importlib.util.find_spec("mlx_lm") is not None
KINDS = ("llama", "qwen2", "phi3", "gpt2", "mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base in bf16 and an adapter on it, made once a kind: `.../base`, `.../adapter`."""

    def make(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            exported.saved_model(kind, folder / "base", torch.bfloat16)
            if kind == "gpt2":  # mlx-lm reads the names and the sides of the original checkpoint alone
                config = transformers.AutoConfig.from_pretrained(folder / "base", n_inner=None)
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
                model.save_pretrained(folder / "base")
                path = folder / "base" / "model.safetensors"
                named = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
                save_file(named, path, {"format": "pt"})
            add_to_config(folder / "base")
            exported.adapter(folder / "base", folder / "adapter")
        return folder

    root = tmp_path_factory.mktemp("made")
    return make


def add_to_config(base: Path) -> None:
    """What mlx-lm reads in the configs on the hub, and transformers 5 no longer writes."""
    path = base / "config.json"
    config = json.loads(path.read_text())
    config |= {"n_ctx": 128, "num_experts": 3, **config.get("rope_parameters", {})}
    path.write_text(json.dumps(config))


@pytest.fixture
def without_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, *more: Any) -> Any:
        return None if name == "mlx_lm" else real(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def export(folder: Path, out: Path, *words: str, code: int = 0) -> Any:
    done = sparseft(folder, "export", "adapter", "--format", "mlx", "--out", out, "--json", *words, code=code)
    return done.json if code == 0 else done.err


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_holds_the_touched_weights(made, kind, tmp_path, without_mlx):
    folder = made(kind)
    proof = export(folder, tmp_path / "out")["proof"]
    assert proof["loader"] == "an independent reader of safetensors" and proof["largest_difference"] == 0
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["fine_tune_type"] == "full"
    found = load_file(tmp_path / "out" / TENSORS)
    merged = library.merge(library.load_adapter(exported.load(folder / "base"), folder / "adapter")).state_dict()
    plain = exported.load(folder / "base").state_dict()
    wanted: dict[str, torch.Tensor] = {}
    for name, value in merged.items():
        if torch.equal(value, plain[name]):
            continue
        if name.endswith("experts.gate_up_proj"):
            owner = name.replace("mlp.experts.gate_up_proj", "block_sparse_moe" if kind == "mixtral" else "mlp")
            gate, up = value.chunk(2, dim=1)
            wanted |= {f"{owner}.switch_mlp.gate_proj.weight": gate, f"{owner}.switch_mlp.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            owner = name.replace("mlp.experts.down_proj", "block_sparse_moe" if kind == "mixtral" else "mlp")
            wanted[f"{owner}.switch_mlp.down_proj.weight"] = value
        elif kind == "gpt2":
            wanted[name.replace("transformer.", "model.")] = value.T
        else:
            wanted[name] = value
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.skipif(not HERE, reason="mlx-lm is not installed")
@pytest.mark.parametrize("kind", KINDS)
def test_mlx_lm_answers_as_the_attached_model(made, kind, tmp_path):
    proof = export(made(kind), tmp_path / "out")["proof"]
    assert proof["loader"].startswith("mlx-lm") and proof["same_answers"] == 8
    assert proof["largest_difference"] < 1e-3 * proof["largest_change"]


def missing_layer(values: dict[str, torch.Tensor]) -> None:
    for name in [name for name in values if ".layers.1." in name]:
        del values[name]


def dropped_module(values: dict[str, torch.Tensor]) -> None:
    del values["model.layers.0.mlp.down_proj.weight"]


def changed_value(values: dict[str, torch.Tensor]) -> None:
    values["model.layers.1.mlp.down_proj.weight"].view(torch.int16)[3, 4] += 1


def added_module(values: dict[str, torch.Tensor]) -> None:
    values["lm_head.weight"] = torch.zeros(2, 2)


def damaging(fault: Any) -> Any:
    write = Mlx.write

    def write_and_damage(self: Mlx, source: Any, options: Any, folder: Path) -> Any:
        facts = write(self, source, options, folder)
        values = {name: value.clone() for name, value in load_file(folder / TENSORS).items()}
        fault(values)
        save_file(values, folder / TENSORS)
        return facts

    return write_and_damage


def test_weights_keep_the_checkpoints_dtype_and_no_path_is_published(made, tmp_path, without_mlx):
    """Whatever the run trained in."""
    folder = made("llama")
    out = tmp_path / "out"
    sparseft(tmp_path, "export", folder / "adapter", "--format", "mlx", "--out", out, "model.dtype=float32")
    assert {value.dtype for value in load_file(out / TENSORS).values()} == {torch.bfloat16}
    assert json.loads((out / CONFIG).read_text())["model"] == str(folder / "base")
    sent = {file.name: file.content for file in listing_of(str(out), "me/mine", base="me/base").files}
    assert json.loads(sent[CONFIG])["model"] == "me/base"


@pytest.mark.parametrize("verified", [True, False])
@pytest.mark.parametrize("fault", [missing_layer, dropped_module, changed_value, added_module])
def test_faults_are_found(made, fault, verified, tmp_path, monkeypatch, without_mlx):
    monkeypatch.setattr(Mlx, "write", damaging(fault))
    if not verified:  # the answers alone
        if fault not in (missing_layer, dropped_module):
            pytest.skip("one value shows in no answer")
        monkeypatch.setattr(Mlx, "verify", lambda *_: None)
    text = export(made("llama"), tmp_path / "out", code=1)
    assert len([line for line in text.splitlines() if line.startswith("error: ")]) == 1, text
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".partial-*"))


TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"], "phi3": ["qkv_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"],
    "mixtral": ["k_proj", "o_proj"],
}  # fmt: skip


@pytest.mark.parametrize("kind", TARGETS)
def test_a_lora_stays_one(made, kind, tmp_path, without_mlx):
    settings = {"r": 6, "lora_alpha": 10, "rank_pattern": {TARGETS[kind][1]: 3}, "fan_in_fan_out": kind == "gpt2"}
    model = exported.lora(made(kind) / "base", tmp_path / "adapter", TARGETS[kind], **settings)
    result = export(tmp_path, tmp_path / "out")
    assert result["rank"] == 6 and result["proof"]["largest_difference"] < 1e-3 * result["proof"]["largest_change"]
    found = load_file(tmp_path / "out" / TENSORS)
    said = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert said["fine_tune_type"] == "lora" and len(said["lora_parameters"]["keys"]) == 2 * len(TARGETS[kind])
    for name in said["lora_parameters"]["keys"]:  # the oracle: PEFT's own product
        a, b = found.pop(f"{name}.lora_a"), found.pop(f"{name}.lora_b")
        ours = name.replace("model.", "transformer.", 1) if kind == "gpt2" else name
        wanted = model.base_model.model.get_submodule(ours).get_delta_weight("default")
        product = said["lora_parameters"]["scale"] * (a @ b)
        torch.testing.assert_close(product, wanted if kind == "gpt2" else wanted.T, rtol=1e-4, atol=1e-5)
    assert not found


@pytest.mark.skipif(not HERE, reason="mlx-lm is not installed")
@pytest.mark.parametrize("kind", TARGETS)
def test_mlx_lm_answers_as_the_attached_lora(made, kind, tmp_path):
    exported.lora(made(kind) / "base", tmp_path / "adapter", TARGETS[kind], r=6, fan_in_fan_out=kind == "gpt2")
    proof = export(tmp_path, tmp_path / "out")["proof"]
    assert proof["loader"].startswith("mlx-lm") and proof["same_answers"] == 8
    assert proof["largest_difference"] < 1e-3 * proof["largest_change"]


def wrong_scale(folder: Path) -> None:
    said = json.loads((folder / CONFIG).read_text())
    said["lora_parameters"]["scale"] *= 2
    (folder / CONFIG).write_text(json.dumps(said))


def swapped_layers(folder: Path) -> None:
    values = load_file(folder / TENSORS)
    for side in "ab":
        names = [f"model.layers.{number}.self_attn.q_proj.lora_{side}" for number in (0, 1)]
        values[names[0]], values[names[1]] = values[names[1]], values[names[0]]
    save_file(values, folder / TENSORS)


def dropped_linear(folder: Path) -> None:
    values = load_file(folder / TENSORS)
    save_file({name: value for name, value in values.items() if ".1.mlp." not in name}, folder / TENSORS)


@pytest.mark.parametrize("verified", [True, False])
@pytest.mark.parametrize("fault", [wrong_scale, swapped_layers, dropped_linear])
def test_faults_of_a_lora_are_found(made, fault, verified, tmp_path, monkeypatch, without_mlx):
    exported.lora(made("llama") / "base", tmp_path / "adapter", TARGETS["llama"], r=6)
    write = mlx_lora.write
    monkeypatch.setattr(mlx_lora, "write", lambda *given: [write(*given), fault(given[2])][0])
    if not verified:
        monkeypatch.setattr(mlx_lora, "verify", lambda *_: None)
    export(tmp_path, tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()


def test_a_lora_in_fewer_bits_and_one_that_it_cannot_hold(made, tmp_path, without_mlx):
    base = made("llama") / "base"
    exported.lora(base, tmp_path / "adapter", TARGETS["llama"], r=6)
    export(tmp_path, tmp_path / "out", "--dtype", "bfloat16")
    assert {value.dtype for value in load_file(tmp_path / "out" / TENSORS).values()} == {torch.bfloat16}
    exported.lora(base, tmp_path / "dora", TARGETS["llama"], r=6, use_dora=True)
    exported.lora(base, tmp_path / "head", ["q_proj", "lm_head"], r=6)
    for name, words in (("dora", "DoRA"), ("head", "lm_head")):
        assert words in refused(tmp_path, "export", name, "--format", "mlx", "--out", "no")


def test_a_rotary_base_that_mlx_lm_would_not_see_is_said(made, tmp_path):
    folder = made("llama")
    path = folder / "base" / "config.json"
    kept = path.read_text()
    config = json.loads(kept)
    del config["rope_theta"]
    path.write_text(json.dumps(config))
    try:
        assert any('"rope_theta": 10000.0' in note for note in export(folder, tmp_path / "out")["notes"])
    finally:
        path.write_text(kept)


def test_a_rotary_base_of_a_base_on_the_hub_is_said(made, monkeypatch):
    """Its config lies in the cache, under no folder of its name; transformers writes infinities into one."""
    file = made("llama") / "own.json"
    file.write_text('{"rope_parameters": {"rope_theta": 5.0}, "limit": Infinity}')
    monkeypatch.setattr(mlx_file, "file_beside", lambda *asked: str(file) if asked[0] == "owner/name" else None)
    model = SimpleNamespace(path="owner/name", revision=None)
    (note,) = mlx_file._rope_note(SimpleNamespace(target=SimpleNamespace(model=model)))
    assert '"rope_theta": 5.0' in note


def test_what_it_cannot_hold_is_refused(made, tmp_path):
    folder = made("llama")
    words = ("export", "adapter", "--format", "mlx", "--out", tmp_path / "out")
    assert "vLLM" in refused(folder, *words, "--engine", "vllm")
    assert "keep the base's" in refused(folder, *words, "--dtype", "float32")
    assert not (tmp_path / "out").exists()

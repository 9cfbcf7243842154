"""`gguf-lora`: the values in the file, every fault put in on purpose, and llama.cpp itself where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseft.export.changes import sparse_changes
from sparseft.export.formats.gguf_lora import FILE, GgufLora
from support import exported
from support.gguf_base import interleaved, write_base
from support.running import refused, sparseft

gguf = pytest.importorskip("gguf")
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
KINDS = ("llama", "qwen2", "phi3", "gpt2", "mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base and an adapter on it, made once a kind: `.../base`, `.../adapter`."""

    def make(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            exported.saved_model(kind, folder / "base")
            exported.adapter(folder / "base", folder / "adapter")
        return folder

    root = tmp_path_factory.mktemp("made")
    return make


def export(folder: Path, out: Path, *words: str, code: int = 0) -> Any:
    done = sparseft(folder, "export", "adapter", "--format", "gguf-lora", "--out", out, "--json", *words, code=code)
    return done.json if code == 0 else done.err


def tensors(path: Path) -> dict[str, torch.Tensor]:
    file = gguf.GGUFReader(path)
    found = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in file.tensors}
    alpha = file.fields["adapter.lora.alpha"].contents()
    names = {name.rpartition(".lora_")[0] for name in found}
    return {n: alpha / found[f"{n}.lora_b"].shape[-1] * found[f"{n}.lora_b"] @ found[f"{n}.lora_a"] for n in names}


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, "float32") for kind in KINDS), ("llama", "float16"), ("mixtral", "bfloat16")]
)
def test_its_products_are_the_differences(made, kind, dtype, tmp_path):
    folder = made(kind)
    result = export(folder, tmp_path / "out", "--dtype", dtype)
    assert result["proof"]["same_answers"] == 8 or dtype != "float32"
    found = tensors(tmp_path / "out" / FILE)
    changes = {name: change.dense() for name, change in sparse_changes(folder / "adapter").items()}
    wanted = expected(kind, changes)
    assert found.keys() == wanted.keys()
    rtol, atol = {"float32": (0.0, 0.0), "float16": (2.0**-10, 2.0**-24), "bfloat16": (2.0**-7, 0.0)}[dtype]
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol)


def expected(kind: str, changes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The differences as llama.cpp's converter would name and order the weights, spelt out."""
    llama = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up",
        "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    }  # fmt: skip
    wanted: dict[str, torch.Tensor] = {}
    for module, change in changes.items():
        _, _, layer, name = module.split(".", 3)
        if ".experts." in module:
            _, _, parameter, number = name.split(".")
            parts = {"ffn_down_exps": change}
            if parameter == "gate_up_proj":
                parts = dict(zip(("ffn_gate_exps", "ffn_up_exps"), change.chunk(2), strict=True))
            for leaf, value in parts.items():
                place = wanted.setdefault(f"blk.{layer}.{leaf}.weight", torch.zeros(3, *value.shape))
                place[int(number)] = value
            continue
        if kind in ("llama", "mixtral") and name.endswith("q_proj"):
            change = interleaved(change, 6 if kind == "llama" else 4)
        if kind in ("llama", "mixtral") and name.endswith("k_proj"):
            change = interleaved(change, 2)
        wanted[f"blk.{layer}.{llama[name]}.weight"] = change
    return wanted


def test_keys_are_reordered_by_their_own_heads(made, tmp_path):
    folder = made("llama")
    keys, queries = "model.layers.1.self_attn.k_proj", "model.layers.0.self_attn.q_proj"
    chosen = {keys: {"rows": [0, 1, 7, 20]}, queries: {"rows": [3]}}
    exported.adapter(folder / "base", tmp_path / "adapter", chosen)
    export(tmp_path, tmp_path / "out")
    found = tensors(tmp_path / "out" / FILE)
    rows = found["blk.1.attn_k.weight"].any(dim=1).nonzero().flatten().tolist()
    assert rows == [0, 2, 3, 17]  # rows 0, 1, 7 = 1 + 6 of head 0 are its 0, 2, 3; row 8 = 2 + 6 of head 1 is its 5


def test_a_lora_of_the_head_is_refused_by_name(made, tmp_path):
    exported.lora(made("llama") / "base", tmp_path / "adapter", ["q_proj", "lm_head"], r=6)
    path = tmp_path / "adapter" / "adapter_model.safetensors"  # without the weights that peft saves beside the pair
    save_file({name: tensor for name, tensor in load_file(path).items() if "base_layer" not in name}, path)
    text = refused(tmp_path, "export", "adapter", "--format", "gguf-lora", "--out", "out")
    assert "lm_head lies outside the layers" in text and "--format merged" in text and not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_loras_of_odd_ranks_and_scales(made, method, tmp_path):
    folder = made("llama")
    settings = {"rank_pattern": {"v_proj": 3}, "use_rslora": method == "rslora", "use_dora": method == "dora"}
    targets = ["q_proj", "v_proj", "down_proj"]
    model = exported.lora(folder / "base", tmp_path / "adapter", targets, r=6, lora_alpha=10, **settings)
    if method == "dora":
        text = refused(tmp_path, "export", "adapter", "--format", "gguf-lora", "--out", "out")
        assert "DoRA" in text and not (tmp_path / "out").exists()
        return
    result = export(tmp_path, tmp_path / "out")
    assert (result["rank"], result["tensors"]) == (8, 6)
    found = tensors(tmp_path / "out" / FILE)
    layer = model.base_model.model.model.layers[1]
    torch.testing.assert_close(
        found["blk.1.attn_v.weight"], layer.self_attn.v_proj.get_delta_weight("default"), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        found["blk.1.attn_q.weight"],
        interleaved(layer.self_attn.q_proj.get_delta_weight("default"), 6), rtol=1e-5, atol=1e-6,
    )  # fmt: skip


Tensors = dict[str, torch.Tensor]


def doubled_alpha(text: dict[str, Any], _: Tensors) -> None:
    text["adapter.lora.alpha"] *= 2


def missing_layer(_: dict[str, Any], values: Tensors) -> None:
    for name in [name for name in values if name.startswith("blk.1.")]:
        del values[name]


def dropped_module(_: dict[str, Any], values: Tensors) -> None:
    del values["blk.0.ffn_down.weight.lora_a"], values["blk.0.ffn_down.weight.lora_b"]


def plain_queries(_: dict[str, Any], values: Tensors) -> None:
    b = values["blk.0.attn_q.weight.lora_b"]
    values["blk.0.attn_q.weight.lora_b"] = b.reshape(6, -1, 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape)


def changed_value(_: dict[str, Any], values: Tensors) -> None:
    a = values["blk.1.ffn_down.weight.lora_a"]
    row, column = (a != 0).nonzero()[3].tolist()
    a[row, column] *= 1.0001


def added_value(_: dict[str, Any], values: Tensors) -> None:
    a = values["blk.1.ffn_down.weight.lora_a"]
    row, column = (a == 0).nonzero()[3].tolist()
    a[row, column] = 1e-6


def half_a_pair(_: dict[str, Any], values: Tensors) -> None:
    del values["blk.1.ffn_down.weight.lora_a"]


def other_model(text: dict[str, Any], _: Tensors) -> None:
    text["general.architecture"] = "qwen2"


Fault = Callable[[dict[str, Any], Tensors], None]
FAULTS: list[Fault] = [
    doubled_alpha, missing_layer, dropped_module, plain_queries, changed_value, added_value, half_a_pair, other_model,
]  # fmt: skip


def damaging(fault: Fault) -> Any:
    """`GgufLora.write` with a fault in its file."""
    write = GgufLora.write

    def write_and_damage(self: GgufLora, source: Any, options: Any, folder: Path) -> Any:
        facts = write(self, source, options, folder)
        file = gguf.GGUFReader(folder / FILE)
        names = ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")
        text = {name: file.fields[name].contents() for name in names}
        values = {t.name: torch.from_numpy(t.data.copy()) for t in file.tensors}
        del file
        fault(text, values)
        writer = gguf.GGUFWriter(folder / FILE, text["general.architecture"])
        writer.add_type(text["general.type"])
        writer.add_string("adapter.type", text["adapter.type"])
        writer.add_float32("adapter.lora.alpha", text["adapter.lora.alpha"])
        for name, value in values.items():
            writer.add_tensor(name, value.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return facts

    return write_and_damage


def failed(text: str, out: Path) -> str:
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, text
    assert not out.exists() and not list(out.parent.glob(".partial-*")), "something was kept"
    return errors[0]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_in_the_file_are_found(made, fault, tmp_path, monkeypatch):
    monkeypatch.setattr(GgufLora, "write", damaging(fault))
    failed(export(made("llama"), tmp_path / "out", code=1), tmp_path / "out")


@pytest.mark.parametrize("fault", FAULTS[:4], ids=lambda fault: fault.__name__)
def test_faults_show_in_the_answers_too(made, fault, tmp_path, monkeypatch):
    monkeypatch.setattr(GgufLora, "write", damaging(fault))
    monkeypatch.setattr(GgufLora, "verify", lambda *_: None)
    assert "logits differ" in failed(export(made("llama"), tmp_path / "out", code=1), tmp_path / "out")


def test_what_changes_nothing_is_no_export(made, tmp_path):
    exported.adapter(made("llama") / "base", tmp_path / "adapter", scale=0.0)
    assert "changes nothing" in failed(export(tmp_path, tmp_path / "out", code=1), tmp_path / "out")


def test_what_it_cannot_hold_is_refused(made, tmp_path, monkeypatch):
    folder = made("llama")
    words = ("export", "adapter", "--format", "gguf-lora", "--out", tmp_path / "out")
    assert "vLLM" in refused(folder, *words, "--engine", "vllm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'sparseft[export]'" in refused(folder, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("length", [4, 9, 1000, -40])
def test_a_damaged_base_is_refused(made, length, tmp_path, monkeypatch):
    """Before llama.cpp sees it, which may crash; it need not be installed here."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    write_base(exported.load(made("llama") / "base"), tmp_path / "whole.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:length])
    words = ("export", "adapter", "--format", "gguf-lora", "--out", tmp_path / "out", "--base-gguf")
    assert "cut.gguf: truncated or damaged" in refused(made("llama"), *words, tmp_path / "cut.gguf")
    assert not (tmp_path / "out").exists()


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3", "gpt2", "mixtral"])
def test_llama_cpp_answers_as_the_attached_model(made, kind, tmp_path):
    folder = made(kind)
    write_base(exported.load(folder / "base"), tmp_path / "base.gguf")
    proof = export(folder, tmp_path / "out", "--base-gguf", tmp_path / "base.gguf")["proof"]
    assert proof["loader"].startswith("llama-cpp-python") and proof["same_answers"] == 8
    assert proof["largest_difference"] < 1e-2 * proof["largest_change"]  # GPT-2's GELU is a table of fp16 there


@needs_llama_cpp
@pytest.mark.parametrize("fault", FAULTS[:4], ids=lambda fault: fault.__name__)
def test_llama_cpp_finds_faults_by_itself(made, fault, tmp_path, monkeypatch):
    folder = made("llama")
    write_base(exported.load(folder / "base"), tmp_path / "base.gguf")
    monkeypatch.setattr(GgufLora, "write", damaging(fault))
    monkeypatch.setattr(GgufLora, "verify", lambda *_: None)
    failed(export(folder, tmp_path / "out", "--base-gguf", tmp_path / "base.gguf", code=1), tmp_path / "out")


@needs_llama_cpp
def test_a_base_of_another_model_is_refused(made, tmp_path):
    folder = made("llama")
    words = ("export", "adapter", "--format", "gguf-lora", "--out", tmp_path / "out", "--base-gguf")
    assert "expected a GGUF file" in refused(folder, *words, folder / "base" / "config.json")
    write_base(exported.load(made("qwen2") / "base"), tmp_path / "qwen2.gguf")
    assert "of 'qwen2'" in refused(folder, *words, tmp_path / "qwen2.gguf")
    write_base(exported.load(made("mixtral") / "base"), tmp_path / "mixtral.gguf")
    assert "ffn_down.weight is not there and (80, 48) in the base" in refused(folder, *words, tmp_path / "mixtral.gguf")
    assert not (tmp_path / "out").exists()

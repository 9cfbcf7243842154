"""Whole models out of checkpoints that were packed already: unpacked values with deltas, and the packed form again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer

import sparseft
from sparseft.config import ModelConfig
from sparseft.layers import sparse_layers
from sparseft.models.loading import load_model
from sparseft.models.packed.checkpoint import PackedCheckpoint
from sparseft.models.packed.quantized import dequantized, is_packed
from support.models import wide_base
from support.running import on, refused, write_data
from support.running import sparseft as run

GROUP = {"nf4": 64, "int8": None}
METHODS = {
    "s2ft": ["method=s2ft", "sparsity=0.9", "method.roles=[o,down]"],
    "sylva": ["method=sylva", "sparsity=0.9", "method.block_size=16", "method.importance=random"],
    "lora": ["method=lora"],
}


@pytest.fixture(params=["nf4", "int8"])
def quantize(request: Any) -> str:
    pytest.importorskip({"nf4": "bitsandbytes", "int8": "torchao"}[request.param])
    return request.param


@pytest.fixture
def base(quantize: str, tmp_path: Path) -> Path:
    """A folder as transformers writes packed models, with its tokenizer."""
    plain = wide_base(tmp_path / "plain")
    load_model(ModelConfig(path=str(plain), quantize=quantize)).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(plain).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def train(base: Path, tmp_path: Path, method: str) -> None:
    words = [*on(base, write_data(tmp_path)["json"]), "trainer.learning_rate=3e-2", "trainer.max_steps=4"]
    run(tmp_path, "train", *words, *METHODS[method], "output_dir=run")


def export(tmp_path: Path, format: str) -> Any:
    return run(tmp_path, "export", "run", "--format", format, "--out", "out", "hardware=cpu", "--json").json


@pytest.mark.parametrize("method", METHODS)
def test_merged_is_unpacked_with_deltas(method: str, quantize: str, base: Path, tmp_path: Path) -> None:
    train(base, tmp_path, method)
    told = export(tmp_path, "merged")
    assert told["gain"]["survived"] == pytest.approx(1, abs=0.05)
    assert told["gain"]["quantize"] == {"nf4": "bitsandbytes", "int8": "torchao"}[quantize]
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    whole, packed = load_model(ModelConfig(path=str(tmp_path / "out"))), load_model(ModelConfig(path=str(base)))
    names = {name for name, module in packed.named_modules() if is_packed(module)}
    assert names and not any(is_packed(module) for module in whole.modules())
    plain = {name: dequantized(packed.get_submodule(name)).detach().float() for name in names}
    rest = {name: value for name, value in packed.state_dict().items() if name in dict(whole.named_parameters())}
    model = sparseft.load_adapter(packed, tmp_path / "run" / "adapter")
    for name, value in whole.state_dict().items():
        module = name.removesuffix(".weight")
        if module not in names:
            assert torch.equal(value, rest[name]), name
            continue
        delta = torch.zeros_like(plain[module])
        if method == "lora":
            layer = model.get_submodule(f"base_model.model.{module}")
            delta = layer.get_delta_weight("default").float()
        elif module in (layers := sparse_layers(model)):
            for kind, pattern in layers[module].patterns.items():
                change = pattern.delta.detach()
                if kind == "blocks":
                    for (row, column), block in zip(pattern.index.tolist(), change, strict=True):
                        delta[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = block
                else:
                    delta[(pattern.index,) if kind == "rows" else (slice(None), pattern.index)] = change
        want = plain[module] + delta
        assert value.dtype == torch.bfloat16
        assert ((value.float() - want).abs() <= 2**-8 * want.abs() + 1e-6).all(), name
        if method != "lora":
            assert torch.equal(value, want.bfloat16())


def test_the_plain_model_lies_in_files(base: Path, tmp_path: Path) -> None:
    """On a CPU, beside the packed one in memory: nothing of it stays when it goes."""
    room = tmp_path / "room"
    held = PackedCheckpoint.of_base(ModelConfig(path=str(base)), torch.device("cpu"), room)
    plain, packed = held.unpacked(), load_model(ModelConfig(path=str(base)))
    for name, parameter in plain.named_parameters():
        place, module = parameter.untyped_storage().filename, packed.get_submodule(name.rpartition(".")[0])
        assert place is not None and Path(place).parent == room, name
        assert torch.equal(parameter, dequantized(module) if is_packed(module) else packed.get_parameter(name)), name
    assert not list(room.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_packed_touches_only_what_was_trained(method: str, quantize: str, base: Path, tmp_path: Path) -> None:
    train(base, tmp_path, method)
    told = export(tmp_path, "packed")
    assert told["gain"]["survived"] == pytest.approx(1, abs=0.5)
    before, after = load_model(ModelConfig(path=str(base))), load_model(ModelConfig(path=str(tmp_path / "out")))
    wanted = sparseft.load_adapter(load_model(ModelConfig(path=str(base))), tmp_path / "run/adapter")
    layers = {} if method == "lora" else sparse_layers(wanted)
    moved = 0
    for name, module in before.named_modules():
        if not is_packed(module):
            continue
        old, new = (dequantized(each).detach().float() for each in (module, after.get_submodule(name)))
        mask = torch.full(old.shape, method == "lora")
        for kind, pattern in layers[name].patterns.items() if name in layers else ():
            for at in pattern.index.tolist():
                if kind == "blocks":
                    mask[16 * at[0] : 16 * at[0] + 16, 16 * at[1] : 16 * at[1] + 16] = True
                else:
                    mask[(at,) if kind == "rows" else (slice(None), at)] = True
        size = GROUP[quantize] or old.shape[1]
        groups = mask.view(-1, size).any(1, keepdim=True).expand(-1, size).reshape(old.shape)
        assert torch.equal(new[~groups], old[~groups]), name
        moved += int((new != old).any())
    assert moved >= 4
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]


def test_float8_by_torchao(tmp_path: Path) -> None:
    """Works as it is: its values and gradients, a run, exact undo, merged; only writing into it does not."""
    pytest.importorskip("torchao")
    from torchao.quantization import Float8WeightOnlyConfig

    plain = wide_base(tmp_path / "plain")
    base, settings = tmp_path / "base", transformers.TorchAoConfig(Float8WeightOnlyConfig())
    transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=settings
    ).save_pretrained(base)
    AutoTokenizer.from_pretrained(plain).save_pretrained(base)
    model, dense = load_model(ModelConfig(path=str(base))), load_model(ModelConfig(path=str(plain)))
    packed = {name: module for name, module in model.named_modules() if is_packed(module)}
    assert len(packed) == 14
    for name, linear in packed.items():
        values, own = dequantized(linear).float(), dense.get_submodule(name).weight.float()
        assert ((values - own).abs() <= 2**-4 * own.abs() + 2**-9 * own.abs().amax(1, keepdim=True)).all()
        x = torch.randn(2, 5, linear.in_features).bfloat16()
        with torch.no_grad():
            linear(x)
        x.requires_grad_()
        y = linear(x)
        y.float().sum().backward()
        assert (y.float() - x.float() @ values.t()).abs().max() <= 2**-6 * y.abs().max()
        assert (x.grad.float() - values.sum(0)).abs().max() <= 2**-6 * values.sum(0).abs().max()
    tokens = torch.arange(12).reshape(2, 6)
    before = model(tokens).logits
    train(base, tmp_path, "sylva")
    model = sparseft.load_adapter(model, tmp_path / "run" / "adapter")
    assert not torch.equal(model(tokens).logits, before)
    assert torch.equal(sparseft.detach(model)(tokens).logits, before)
    assert export(tmp_path, "merged")["gain"]["survived"] == pytest.approx(1, abs=0.05)
    said = refused(tmp_path, "export", "run", "--format", "packed", "--out", "other", "hardware=cpu")
    assert "is packed as Float8Tensor; values can be written back into NF4" in said
    assert not (tmp_path / "other").exists()


def test_what_it_has_not_is_refused(base: Path, tmp_path: Path) -> None:
    """There is no other checkpoint, and adapters of other packed weights do not fit."""
    train(base, tmp_path, "s2ft")
    words = ["export", "run", "--format", "merged", "--out", "out", "hardware=cpu"]
    assert "that model.quantize packed." in refused(tmp_path, *words, "--base", "checkpoint")
    for format in ("peft-lora", "peft-shira", "patch", "gguf-lora", "mlx"):
        said = refused(tmp_path, "export", "run", "--format", format, "--out", "out", "hardware=cpu")
        assert "whole models are written alone: use --format merged or packed." in said
        assert not (tmp_path / "out").exists()
    model = load_model(ModelConfig(path=str(base)))
    model.model.norm.weight.data.mul_(2)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "other")
    for format in ("merged", "packed"):
        words = ["export", "run/adapter", "--format", format, "--out", "out", "hardware=cpu"]
        assert "fingerprints differ" in refused(tmp_path, *words, f"model.path={tmp_path / 'other'}")
        assert not (tmp_path / "out").exists()

"""`--format packed`: what was trained, back in the quantized form, and all beside it as it was, bit for bit."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import sparseft
from sparseft.config import ModelConfig
from sparseft.export.formats import packed as format_file
from sparseft.layers import sparse_layers
from sparseft.models import loading
from sparseft.models.loading import load_model
from sparseft.models.packed.quantized import dequantized, is_packed
from support.models import wide_base
from support.running import on, refused, write_data
from support.running import sparseft as run

GROUP = {"nf4": 64, "int8": None}


@pytest.fixture(params=["nf4", "int8"])
def quantize(request: Any) -> str:
    pytest.importorskip({"nf4": "bitsandbytes", "int8": "torchao"}[request.param])
    return request.param


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return wide_base(tmp_path / "base")


def bits(module: torch.nn.Module) -> torch.Tensor:
    return dequantized(module).detach().float()


@pytest.mark.parametrize("residual", [False, True])
def test_only_touched_groups_change(quantize: str, residual: bool, base: Path, tmp_path: Path) -> None:
    words = [*on(base, write_data(tmp_path)["json"]), f"model.quantize={quantize}", "trainer.learning_rate=3e-2"]
    method = "method=sylva", "method.block_size=16", f"method.residual={residual}", "method.importance=random"
    run(tmp_path, "train", *words, *method, "trainer.max_steps=4", "output_dir=run", "sparsity=0.9")
    out = run(tmp_path, "export", "run", "--format", "packed", "--out", "out", "hardware=cpu", "--json").json
    assert out["gain"]["survived"] == pytest.approx(1.0, abs=0.5)
    before = load_model(ModelConfig(path=str(base), quantize=quantize))
    after = load_model(ModelConfig(path=str(tmp_path / "out")))
    wanted = sparseft.load_adapter(load_model(ModelConfig(path=str(base), quantize=quantize)), tmp_path / "run/adapter")
    layers, some, seen = sparse_layers(wanted), False, 0
    for name, module in before.named_modules():
        if not is_packed(module):
            continue
        old, new = bits(module), bits(after.get_submodule(name))
        mask = torch.zeros(old.shape, dtype=torch.bool)
        delta = torch.zeros_like(old)
        for pattern in layers[name].patterns.values() if name in layers else ():
            for number, (row, column) in enumerate(pattern.index.tolist()):
                place = slice(16 * row, 16 * row + 16), slice(16 * column, 16 * column + 16)
                mask[place] = True
                delta[place] = pattern.delta[number].detach() + pattern.base_values[number].float()
        size = GROUP[quantize] or old.shape[1]
        groups = mask.view(-1, size).any(1, keepdim=True).expand(-1, size).reshape(old.shape)
        assert torch.equal(new[~groups], old[~groups])
        some |= bool((new != old).any())
        if mask.any():  # a level from the checkpoint's value, as the base's is
            gap = 0.16 if quantize == "nf4" else 1 / 250
            scales = torch.maximum(new, old + delta).abs().view(-1, size).amax(1, keepdim=True)
            scales = scales.expand(-1, size).reshape(old.shape)
            far = (new - old - delta).abs() > 2.2 * gap * scales + 2**-8 * old.abs()
            assert far[mask].float().mean() < 0.02
            seen += 1
    assert some and seen > 4
    told = json.loads((tmp_path / "out" / "sparseft_export.json").read_text())
    assert told["touched"] == out["touched"] and 0.05 < told["touched"] <= 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (
        " of their groups" in run(tmp_path, "export", "run", "--format", "packed", "--out", "out", "hardware=cpu").out
    )


def test_lora_is_written_too(quantize: str, base: Path, tmp_path: Path) -> None:
    words = [*on(base, write_data(tmp_path)["json"]), f"model.quantize={quantize}", "trainer.learning_rate=3e-2"]
    run(tmp_path, "train", *words, "method=lora", "trainer.max_steps=4", "output_dir=run")
    out = run(tmp_path, "export", "run", "--format", "packed", "--out", "out", "hardware=cpu", "--json").json
    assert out["touched"] == 1.0 and out["gain"]["loss_written"] < out["gain"]["loss_packed_base"]


def test_a_change_beside_the_groups_is_an_error(
    quantize: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*on(base, write_data(tmp_path)["json"]), f"model.quantize={quantize}", "trainer.learning_rate=3e-2"]
    run(tmp_path, "train", *words, "method=s2ft", "trainer.max_steps=2", "output_dir=run", "sparsity=0.9")
    write = format_file.write_packed

    def sloppy(module: Any, values: Any, entries: Any) -> Any:
        touched = write(module, values, entries)
        return touched & (torch.arange(touched.numel()).view(touched.shape) % 2 == 0)

    monkeypatch.setattr(format_file, "write_packed", sloppy)
    done = run(tmp_path, "export", "run", "--format", "packed", "--out", "out", "hardware=cpu", code=1)
    assert "beside the trained groups have changed" in done.err
    assert not (tmp_path / "out").exists()


def test_what_is_not_packed_is_refused(base: Path, tmp_path: Path) -> None:
    words = [*on(base, write_data(tmp_path)["json"]), "method=s2ft", "trainer.max_steps=1"]
    run(tmp_path, "train", *words, "output_dir=run")
    said = refused(tmp_path, "export", "run", "--format", "packed", "--out", "out", "hardware=cpu")
    assert "was not packed by model.quantize" in said


@pytest.mark.parametrize("format", [["packed"], ["merged"], ["merged", "--base", "checkpoint"]])
def test_one_packed_model_is_in_memory_at_a_time(
    quantize: str, format: list[str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one is written, checked, proven and measured: a model refers to itself, and is not gone with its last
    name."""
    words = [*on(base, write_data(tmp_path)["json"]), f"model.quantize={quantize}", "trainer.learning_rate=3e-2"]
    run(tmp_path, "train", *words, "method=s2ft", "trainer.max_steps=2", "output_dir=run", "sparsity=0.9")
    loaded: list[Any] = []
    load = loading._load

    def alone(what: str, path: str, loader: Any, **options: Any) -> Any:
        if "output_loading_info" not in options:  # a config
            return load(what, path, loader, **options)
        assert not any(is_packed(linear) for linear in (known() for known in loaded) if linear is not None)
        model, report = load(what, path, loader, **options)
        loaded.extend(weakref.ref(module) for module in model.modules() if isinstance(module, torch.nn.Linear))
        return model, report

    monkeypatch.setattr(loading, "_load", alone)
    run(tmp_path, "export", "run", "--format", *format, "--out", "out", "hardware=cpu")
    assert loaded

"""Bases that are packed on loading: the packages' own linears, their values and gradients, and what is refused."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import sparseft
from sparseft.compose.run_config import compose
from sparseft.config import ModelConfig
from sparseft.errors import UserError
from sparseft.layers import sparse_layers
from sparseft.models.fingerprint import base_fingerprints
from sparseft.models.loading import load_model
from sparseft.models.packed.quantize import check_quantize
from sparseft.models.packed.quantized import dequantized, is_packed
from sparseft.models.packed.unquantized import Unquantized
from sparseft.models.spec import ModelSpec
from sparseft.training import checks
from support import nf4
from support.models import wide_base
from support.running import on, refused, write_data
from support.running import sparseft as run

PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao"}
# What rounding to 16 levels, or to 255, may move a weight by, as a share of the largest of its group (its row).
STEPS = {"nf4": 0.16, "int8": 1 / 127}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are whole groups of 64."""
    return wide_base(tmp_path_factory.mktemp("wide"))


@pytest.fixture(params=PACKAGES)
def quantize(request: Any) -> str:
    pytest.importorskip(PACKAGES[request.param])
    return request.param


def loaded(folder: Path, quantize: str, dtype: str = "bfloat16") -> Any:
    return load_model(ModelConfig(path=str(folder), dtype=dtype, quantize=quantize)).requires_grad_(False)


def test_packages_pack_and_give_gradients(quantize: str, wide: Path) -> None:
    """Also after a pass without gradients, in which some would repack their weights for inference."""
    model, plain = loaded(wide, quantize), loaded(wide, "none")
    packed = {name: module for name, module in model.named_modules() if is_packed(module)}
    assert set(packed) == set(ModelSpec.of(plain).linears)
    for name, linear in packed.items():
        dense, values = plain.get_submodule(name).weight.float(), dequantized(linear).float()
        assert (values - dense).abs().max() <= STEPS[quantize] * dense.abs().max()
        x = torch.randn(2, 5, linear.in_features).bfloat16()
        with torch.no_grad():
            linear(x)
        x.requires_grad_()
        y = linear(x)
        y.float().sum().backward()
        assert (y.float() - x.float() @ values.t()).abs().max() <= 2**-6 * y.abs().max()
        assert x.grad is not None
        assert (x.grad.float() - values.sum(0)).abs().max() <= 2**-6 * values.sum(0).abs().max()


def test_an_adapter_of_a_packed_base(quantize: str, wide: Path, tmp_path: Path) -> None:
    model = loaded(wide, quantize)
    tokens = torch.arange(12).reshape(2, 6)
    base = model(tokens).logits
    model = sparseft.attach(model, sparseft.S2FTConfig(sparsity=0.9, importance="random", roles=["o", "down"]))
    layers = sparse_layers(model)
    assert layers and all(layer.beside and layer.holds for layer in layers.values())
    assert torch.equal(model(tokens).logits, base)
    own = sparseft.SparseAdamW(sparseft.trainable_parameters(model).values(), lr=1e-2)
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
        own.step()
        own.zero_grad()
    learnt = model(tokens).logits
    assert not torch.equal(learnt, base)
    assert torch.equal(copy.deepcopy(model)(tokens).logits, learnt)
    folder = sparseft.save_adapter(model, tmp_path / "adapter")
    model = sparseft.detach(model)
    assert torch.equal(model(tokens).logits, base)
    assert torch.equal(sparseft.load_adapter(model, folder)(tokens).logits, learnt)
    # the adapter is of the checkpoint, however that is loaded
    sparseft.load_adapter(loaded(wide, "none"), folder)


def test_commands_on_a_packed_base(quantize: str, wide: Path, tmp_path: Path) -> None:
    words = [*on(wide, write_data(tmp_path)["json"]), f"model.quantize={quantize}"]
    run(tmp_path, "train", *words, "method=s2ft", "method.importance=gradient", "method.residual=true",
        "trainer.max_steps=6", "trainer.learning_rate=3e-2", "output_dir=run")  # fmt: skip
    run(tmp_path, "train", *words, "method=lora", "trainer.max_steps=2", "output_dir=lora")
    words_of_export = ["export", "run", "--format", "merged", "--out", "whole", "hardware=cpu"]
    done = run(tmp_path, *words_of_export, "--json").json["gain"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert done["loss_packed"] == pytest.approx(summary["eval_loss_after"], abs=0.01)
    assert done["loss_written"] == pytest.approx(done["loss_packed"], abs=0.01)
    assert done["base"] == "trained" and done["loss_checkpoint"] is None
    brought = done["loss_packed_base"] - done["loss_packed"]
    assert done["survived"] == (done["loss_packed_base"] - done["loss_written"]) / brought > 0.95
    assert json.loads((tmp_path / "whole" / "sparseft_export.json").read_text())["gain"] == done
    own = run(tmp_path, *words_of_export, "--base", "checkpoint", "--json").json["gain"]
    assert own["loss_packed_base"] != own["loss_checkpoint"]
    assert own["survived"] == (own["loss_checkpoint"] - own["loss_written"]) / brought
    said = run(tmp_path, *words_of_export).out
    assert "% of the gain survived: loss " in said and f"on the {quantize} base" in said
    lora = run(tmp_path, "export", "lora", *words_of_export[2:], "--json").json["gain"]
    assert lora["loss_written"] == pytest.approx(lora["loss_packed"], abs=0.01)
    assert (
        "gain" not in run(tmp_path, "export", "run", "--format", "patch", "--out", "p", "hardware=cpu", "--json").json
    )
    assert "every weight" in refused(tmp_path, "train", *words, "method=full", "output_dir=other")
    assert "reselect_steps" in refused(
        tmp_path, "train", *words, "method=s2ft", "method.reselect_steps=2", "output_dir=other"
    )
    assert not (tmp_path / "other").exists()


def test_a_packed_checkpoint(quantize: str, wide: Path, tmp_path: Path) -> None:
    """Loads as it was packed, trains, and is what its own adapters are of; formats of differences refuse it."""
    loaded(wide, quantize).save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(wide).save_pretrained(tmp_path / "packed")
    before, after = loaded(wide, quantize), loaded(tmp_path / "packed", "none", "auto")
    tokens = torch.arange(12).reshape(2, 6)
    torch.testing.assert_close(after(tokens).logits, before(tokens).logits, rtol=0.05, atol=0.05)
    after.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again", "none", "auto")
    assert torch.equal(again(tokens).logits, after(tokens).logits)
    words = [*on(tmp_path / "packed", write_data(tmp_path)["json"]), "trainer.max_steps=2"]
    run(tmp_path, "train", *words, "method=s2ft", "output_dir=run")
    patch = refused(tmp_path, "export", "run", "--format", "patch", "--out", "whole", "hardware=cpu")
    assert "whose files are packed" in patch
    assert "quantized already" in refused(tmp_path, "train", *words, "model.quantize=int8")
    assert "what it was quantized from is not known" in refused(
        tmp_path, "train", *words, "method=s2ft", "method.residual=true"
    )


def test_rows_that_would_be_unpacked_wrongly_are_refused(model_folder: Callable[..., Path]) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match="'model.layers.0.self_attn.q_proj' has 48 input features, and bitsandbytes"):
        loaded(model_folder(), "nf4")


def test_what_cannot_be_packed_is_refused(
    monkeypatch: pytest.MonkeyPatch, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in PACKAGES.values() else find(name))
    words = [*on(model_folder(), write_data(tmp_path)["json"]), "method=s2ft", "model.quantize=nf4"]
    assert "needs the package bitsandbytes, which is not installed" in refused(tmp_path, "train", *words)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="int4: torchao's kernels for it need a CUDA device; use nf4 or int8"):
        check_quantize(ModelConfig(quantize="int4"), None, "cpu")
    check_quantize(ModelConfig(quantize="int4"), None, "cuda")
    assert "expected one of none, nf4, int8, int4" in refused(tmp_path, "train", *words[:-1], "model.quantize=fp3")


def test_a_checkpoint_that_is_not_in_safetensors_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    monkeypatch.setattr(checks, "check_quantize", lambda *_: None)  # whether the package is there
    shutil.copy(model_folder() / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").touch()  # not read
    config = compose("train", ["method=s2ft", f"model.path={tmp_path}", "model.quantize=nf4", "hardware=cpu"])
    with pytest.raises(UserError, match=r"no model.safetensors.* a checkpoint in safetensors is needed here; load the"):
        checks.check_model(config)
    config.model.quantize = "none"
    checks.check_model(config)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("method=full", "method=full trains every weight"),
        ("method=losia", "method.reselect_steps=100: what inactive"),
        ("method=s2ft method.reselect_steps=5", "method.reselect_steps=5: what inactive"),
        ("method=s2ft hardware.zero_stage=2", "DeepSpeed takes no packed weights here yet"),
        ("method=lora hardware.fsdp=true", "FSDP2 takes no packed weights here yet"),
    ],
)
def test_what_a_packed_checkpoint_does_not_go_with_is_refused_at_once(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    monkeypatch.setattr(checks, "check_quantize", lambda *_: None)  # whether the package is there
    content = json.loads((model_folder() / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = compose("train", [*words.split(), f"model.path={tmp_path}", "hardware=cpu"])
    with pytest.raises(UserError) as caught:
        checks.check_model(config)
    assert said in str(caught.value) and f"model.path={tmp_path}" in str(caught.value)


# ---- what the checkpoint held ----


def test_the_fingerprint_is_the_checkpoints(model_folder: Callable[..., Path]) -> None:
    plain = load_model(ModelConfig(path=str(model_folder())))
    packed = nf4.load(model_folder())
    assert base_fingerprints(packed) == base_fingerprints(plain)
    assert ModelSpec.of(packed).total_parameters == ModelSpec.of(plain).total_parameters
    unquantized = Unquantized.of(packed)
    assert unquantized is not None and unquantized is Unquantized.of(packed)
    for name in ModelSpec.of(plain).linears:
        assert torch.equal(unquantized.weight(name), plain.get_submodule(name).weight)
    assert Unquantized.of(plain) is None


@pytest.mark.parametrize("method", ["s2ft", "sylva"])
def test_residual_starts_at_full_precision(method: str, model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Where everything trains, the model is the checkpoint again; the base stays packed, bit for bit."""
    plain, packed = load_model(ModelConfig(path=str(model_folder()))), nf4.load(model_folder())
    tokens = torch.arange(12).reshape(2, 6)
    full, base = plain(tokens).logits, packed(tokens).logits
    assert (base - full).abs().max() > 1e-3
    selection = None
    if method == "s2ft":
        ratios = dict.fromkeys(("q", "k", "v", "o", "g", "u", "d"), 1.0)
        config: Any = sparseft.S2FTConfig(**{f"{role}_ratio": share for role, share in ratios.items()}, residual=True)
    else:
        config, shapes = sparseft.SylvaConfig(block_size=8, residual=True), ModelSpec.of(plain).linears
        sides = {name: [torch.arange(-(-side // 8)) for side in shape] for name, shape in shapes.items()}
        blocks = {name: {"blocks": torch.cartesian_prod(*both)} for name, both in sides.items()}
        selection = sparseft.Selection(blocks, block_size=8)
    with pytest.raises(UserError, match="method.residual=true: this base is at full precision"):
        sparseft.attach(plain, config, selection)
    model = sparseft.attach(packed, config, selection)
    assert (model(tokens).logits - full).abs().max() < 1e-4
    own = sparseft.SparseAdamW(sparseft.trainable_parameters(model).values(), lr=1e-3)
    model(tokens, labels=tokens).loss.backward()
    own.step()
    learnt = model(tokens).logits
    assert torch.equal(sparseft.set_adapter(model, None)(tokens).logits, base)
    assert torch.equal(sparseft.set_adapter(model, "default")(tokens).logits, learnt)
    folder = sparseft.save_adapter(model, tmp_path / "adapter")
    model = sparseft.detach(model)
    assert torch.equal(model(tokens).logits, base)
    model = sparseft.load_adapter(model, folder)
    assert torch.equal(model(tokens).logits, learnt)
    with pytest.raises(UserError, match="cannot be merged: its base is quantized"):
        sparseft.merge(model)
    merged = sparseft.merge(sparseft.load_adapter(load_model(ModelConfig(path=str(model_folder()))), folder))
    assert (merged(tokens).logits - learnt).abs().max() < 1e-4  # what was trained, in the checkpoint itself
    ids = {"input_ids": tokens, "adapter_names": ["default", "__base__"]}
    with pytest.raises(UserError, match=r"method\.residual"):
        model(**ids)
    del model._sparseft_quantized_from
    other = sparseft.detach(model)
    with pytest.raises(UserError, match="fingerprints differ"):  # and without its checkpoint nobody knows the base
        sparseft.load_adapter(other, folder)


@pytest.mark.parametrize("importance", ["random", "weight", "activation", "product", "gradient", "fisher", "sylva"])
def test_every_importance_through_a_packed_base(importance: Any, make_model: Any) -> None:
    """As through the same values in plain linears."""
    packed = nf4.quantize(make_model("llama"))
    plain = make_model("llama")
    for name, module in packed.named_modules():
        if is_packed(module):
            plain.get_submodule(name).weight.data.copy_(module.dequantize())
    config = sparseft.S2FTConfig(sparsity=0.8, importance=importance, roles=["down", "up"])
    batches = [{"input_ids": torch.arange(8)[None] + i, "labels": torch.arange(8)[None] + i} for i in range(3)]
    given = batches if config.needs_data else None
    found, want = (sparseft.compute_selection(model, config, given).modules for model in (packed, plain))
    assert found.keys() == want.keys()
    for name in want:
        for kind, index in want[name].items():
            assert torch.equal(found[name][kind], index)

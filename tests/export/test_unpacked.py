"""`--format merged` of what was trained on a packed base: the model that was trained, in plain numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sparseft
from sparseft.adapters.lifecycle import trainable_parameters
from sparseft.config import ModelConfig
from sparseft.errors import RunError
from sparseft.models.loading import QUANTIZED_FROM
from sparseft.models.packed import unpacked
from sparseft.models.packed.quantized import is_packed
from sparseft.selection.selection import Selection
from support import adapted, nf4
from support.running import refused
from support.running import sparseft as run


@pytest.fixture(autouse=True)
def packs_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """`model.quantize=nf4` by the tests' own NF4, which needs no package."""

    def load(config: ModelConfig, device: Any = "cpu") -> Any:
        return nf4.load(config.path, config.dtype)

    monkeypatch.setattr(unpacked, "load_model", load)


def trained(base: Path, folder: Path, method: str, residual: bool) -> tuple[Any, Any]:
    """A packed model with an adapter of random deltas, which lies in `folder`; and its base's logits."""
    model = nf4.load(base)
    before = logits(model)
    if method == "lora":  # peft takes packed linears of packages alone
        packed, model = model, adapted.load(base)
        setattr(model, QUANTIZED_FROM, getattr(packed, QUANTIZED_FROM))
        for name, module in packed.named_modules():
            if is_packed(module):
                model.get_submodule(name).weight.data.copy_(module.dequantize())
        model = sparseft.attach(model, sparseft.LoraConfig(rank=2, targets=["o_proj", "down_proj"]))
    else:
        by_rows, by_columns, by_blocks = adapted.modules("llama")
        chosen: dict[str, Any] = {by_rows: {"rows": [7, 0]}, by_columns: {"columns": [5, 2], "rows": [2]}}
        chosen[by_blocks] = {"blocks": [[1, 1], [0, 0]]}
        config = sparseft.SylvaConfig(block_size=16, residual=residual)
        model = sparseft.attach(model, config, Selection(chosen, block_size=16))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            if "lora_A" not in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
    sparseft.save_adapter(model, folder)
    return model, before


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.arange(1, 25).reshape(2, 12)).logits.float()


@pytest.mark.parametrize(("method", "residual"), [("sparse", False), ("sparse", True), ("lora", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_what_was_trained(method: str, residual: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    base = adapted.base("llama", tmp_path / "base", dtype, shard="70KB")
    model, before = trained(base, tmp_path / "adapter", method, residual)
    run(tmp_path, "export", "adapter", "--format", "merged", "--out", "out", "model.quantize=nf4", "hardware=cpu")
    written = adapted.load(tmp_path / "out")
    assert written.dtype == dtype
    found, want = logits(written), logits(model)
    change = (want - before).abs().max()
    assert (found - want).abs().max() < (1e-4 if dtype == torch.float32 else 0.05) * change
    # the other way, on request: the same deltas in the weights that were packed
    run(tmp_path, "export", "adapter", "--format", "merged", "--out", "own", "--base", "checkpoint",
        "model.quantize=nf4", "hardware=cpu")  # fmt: skip
    own = adapted.load(tmp_path / "own")
    plain = sparseft.merge(sparseft.load_adapter(adapted.load(base), tmp_path / "adapter"))
    for name, value in plain.state_dict().items():
        assert torch.equal(own.state_dict()[name], value)
    assert (logits(own) - want).abs().max() > 0.1 * change


def test_only_what_was_packed_is_unpacked(tmp_path: Path) -> None:
    """Every other tensor is the checkpoint's to the bit, also one that is wider than what the model computes in."""
    base = adapted.base("llama", tmp_path / "base", torch.float32)
    trained(base, tmp_path / "adapter", "sparse", True)
    run(tmp_path, "export", "adapter", "--format", "merged", "--out", "out", "model.quantize=nf4", "hardware=cpu")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    packed = {f"{name}.weight": module for name, module in nf4.load(base).named_modules() if is_packed(module)}
    assert packed and before.keys() == after.keys()
    touched = set(adapted.modules("llama"))
    for name, value in after.items():
        if name not in packed:
            assert torch.equal(value, before[name])
        elif name.removesuffix(".weight") not in touched:
            assert torch.equal(value, packed[name].dequantize())


def test_unpacked_weights_lie_in_files(tmp_path: Path) -> None:
    """On a CPU, beside the packed model they are made of: nothing of them stays when they go."""
    base, room = adapted.base("llama", tmp_path / "base", torch.bfloat16), tmp_path / "room"
    held = unpacked.Unpacked.of_base(ModelConfig(path=str(base), quantize="nf4"), torch.device("cpu"), {}, room)
    model, packed = adapted.load(base), nf4.load(base)
    held.fill(model)
    for name, parameter in model.named_parameters():
        module = packed.get_submodule(name.rpartition(".")[0])
        place = parameter.untyped_storage().filename
        assert is_packed(module) == (place is not None and Path(place).parent == room), name
        if is_packed(module):
            assert torch.equal(parameter, module.dequantize())
    assert not list(room.iterdir())
    blocked = tmp_path / "file"
    blocked.touch()
    held.room = blocked
    with pytest.raises(RunError, match="no room for the unpacked weights"):
        held.fill(model)


def test_who_has_no_packed_base_has_no_choice(tmp_path: Path) -> None:
    base = adapted.base("llama", tmp_path / "base", torch.float32)
    trained(base, tmp_path / "adapter", "sparse", False)
    words = ["export", "adapter", "--out", "out", "hardware=cpu"]
    assert "expected one of trained, checkpoint" in refused(tmp_path, *words, "--format", "merged", "--base", "other")
    assert "packed." in refused(tmp_path, *words, "--format", "merged", "--base", "trained")
    packed = [*words, "model.quantize=nf4", "--base", "checkpoint"]
    assert "not for patch" in refused(tmp_path, *packed, "--format", "patch")
    assert not (tmp_path / "out").exists()

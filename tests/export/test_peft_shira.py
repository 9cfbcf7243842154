"""`sparseft export --format peft-shira`: entries of weights in PEFT's form, whole or refused with the numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import sparseft
from sparseft.cli.app import main
from sparseft.compose.run_config import compose
from sparseft.errors import UserError
from sparseft.export.formats.peft_shira import PeftShira, plan_of
from sparseft.export.source import Source
from support.exported import adapter, load, lora, maker, saved_model
from support.running import refused

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
PROMPT = torch.tensor([[5, 77, 130, 9, 40, 8]])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    return maker(tmp_path_factory)


def export(source: Path, out: Path, *words: str) -> int:
    return main(["export", str(source), "--format", "peft-shira", "--out", str(out), "--json", *words])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(PROMPT).logits


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_peft_loads_what_was_trained(made: Any, kind: str, tmp_path: Path) -> None:
    model, source = made(kind)
    assert export(source, tmp_path / "out", "--engine", "peft") == 0
    wanted = sparseft.merge(sparseft.load_adapter(load(model), source))
    loaded = peft.PeftModel.from_pretrained(load(model), str(tmp_path / "out"))
    torch.testing.assert_close(logits(loaded), logits(wanted), rtol=1e-4, atol=1e-4)
    merged = loaded.merge_and_unload()
    for name, tensor in wanted.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=0, atol=5e-7)


def test_what_is_no_linear_of_the_layers_is_refused_before_it_is_written(made: Any) -> None:
    """sparseft trains none, but somebody's folder may name one."""
    model, folder = made("llama")
    source = Source.find(str(folder), compose("export", [f"model.path={model}"]))
    source.changes = {"lm_head": next(iter(source.changes.values()))}
    with pytest.raises(UserError, match="no SHiRA for lm_head, which is no linear of the decoder layers"):
        plan_of(source)


def test_r_is_the_least_that_holds_the_fullest_linear(made: Any, tmp_path: Path) -> None:
    """Rows of up (80 x 48): 5 of them are 240 entries, and r · 128 are 256."""
    model, _ = made("llama")
    up, q = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"
    source = adapter(model, tmp_path / "adapter", {up: {"rows": [0, 7, 9, 20, 70]}, q: {"columns": [5]}})
    assert export(source, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert tensors[f"base_model.model.{up}.shira_weight"].shape == (256,)
    assert int(tensors[f"base_model.model.{up}.shira_weight"].count_nonzero()) == 240


def test_a_base_in_bf16(tmp_path: Path) -> None:
    model = saved_model("llama", tmp_path / "model", torch.bfloat16)
    source = adapter(model, tmp_path / "adapter")
    assert export(source, tmp_path / "out") == 0
    loaded = peft.PeftModel.from_pretrained(load(model), str(tmp_path / "out"))
    wanted = sparseft.merge(sparseft.load_adapter(load(model), source))
    assert (logits(loaded) - logits(wanted)).abs().max() < 0.05 * (logits(load(model)) - logits(wanted)).abs().max()


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        ("gpt2", (), "Conv1D"),
        ("mixtral", (), "routed experts"),
        ("llama", ("--engine", "vllm"), "does not read --format peft-shira"),
        ("llama", ("--dtype", "bfloat16"), "float32"),
    ],
)
def test_what_peft_has_no_shira_for(
    made: Any, kind: str, words: tuple[str, ...], said: str, tmp_path: Path, capsys: Any
) -> None:
    _, source = made(kind)
    assert export(source, tmp_path / "out", *words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_too_many_entries_are_refused_with_the_numbers(made: Any, tmp_path: Path, capsys: Any) -> None:
    """All 80 rows of up are r = 30; k (24 x 48) has room for r = 16."""
    model, _ = made("llama")
    up, k = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.k_proj"
    source = adapter(model, tmp_path / "adapter", {up: {"rows": list(range(80))}, k: {"rows": [5]}})
    assert export(source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"{up} needs r = 30 for its 3,840 entries" in error and f"{k} with its 24 x 48 has room for 16" in error


def test_lora_is_refused(made: Any, tmp_path: Path, capsys: Any) -> None:
    model, _ = made("llama")
    attached = sparseft.attach(load(model), sparseft.LoraConfig(rank=2))
    sparseft.save_adapter(attached, tmp_path / "lora")
    assert export(tmp_path / "lora", tmp_path / "out") == 2
    assert "every entry" in capsys.readouterr().err


def one_value(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    tensors["base_model.model.model.layers.1.mlp.up_proj.shira_weight"][0] += 1e-4


def one_place(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    tensors["base_model.model.model.layers.1.mlp.up_proj.shira_indices"][0, 0] += 1


def a_missing_linear(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    for part in ("weight", "indices"):
        del tensors[f"base_model.model.model.layers.1.mlp.up_proj.shira_{part}"]


def another_r(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    config["r"] += 1


@pytest.mark.parametrize("fault", [one_value, one_place, a_missing_linear, another_r])
def test_a_fault_is_caught_and_nothing_kept(
    made: Any, fault: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    _, source = made("llama")
    write = PeftShira.write

    def damaged(self: Any, source: Any, options: Any, folder: Path) -> dict[str, Any]:
        facts = write(self, source, options, folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        fault(tensors, config)
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return facts

    monkeypatch.setattr(PeftShira, "write", damaged)
    assert export(source, tmp_path / "out") == 1
    assert "the export is not what was trained" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "advice"),
    [({}, "use --format merged, patch or peft-lora."), ({"use_dora": True}, "use --format merged or patch.")],
)
def test_what_it_names_instead_takes_the_adapter(made: Any, settings: Any, advice: str, tmp_path: Path) -> None:
    lora(made("llama")[0], tmp_path / "adapter", ["q_proj"], r=2, **settings)
    message = refused(tmp_path, "export", "adapter", "--format", "peft-shira", "--out", "out")
    assert message.endswith(f"changes every entry of its weights: {advice}")

"""What every export refuses before it writes, whatever its format, and what a stopped one leaves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from sparseft.cli.app import main
from sparseft.config import ModelConfig
from sparseft.errors import UserError
from sparseft.export.base_check import check_base
from sparseft.export.formats import format_of
from sparseft.export.formats.patch import PatchFormat
from sparseft.models.fingerprint import base_fingerprints
from support.exported import adapter, lora, saved_model
from support.models import build_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("made")
    model = saved_model("llama", root / "model")
    return model, adapter(model, root / "adapter")


def export(source: Path, format: str, out: Path, *words: str) -> int:
    return main(["export", str(source), "--format", format, "--out", str(out), *words])


@pytest.mark.parametrize(
    ("format", "engine", "said"),
    [
        ("merged", "vlm", "no such engine"),
        ("patch", "vlm", "no such engine"),
        ("patch", "tgi", "TGI does not read --format patch, but peft-lora or merged"),
        ("mlx", "vllm", "vLLM does not read --format mlx"),
        ("merged", "peft", "PEFT does not read --format merged"),
    ],
)
def test_every_format_knows_who_reads_it(
    made: Any, format: str, engine: str, said: str, tmp_path: Path, capsys: Any
) -> None:
    assert export(made[1], format, tmp_path / "out", "--engine", engine) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_behind_a_link_is_written_where_it_lies(made: Any, tmp_path: Path) -> None:
    """On another disk, say: the link stays."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk", target_is_directory=True)
    for _ in range(2):
        assert export(made[1], "peft-shira", tmp_path / "out") == 0
        assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/adapter_config.json").is_file()


def test_a_name_that_no_folder_can_have(made: Any, tmp_path: Path, capsys: Any) -> None:
    assert export(made[1], "patch", tmp_path / ("x" * 300)) == 2
    assert "cannot be written: File name too long" in capsys.readouterr().err


def test_a_base_without_a_tokenizer_is_refused_first(made: Any, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """The proof needs one: to say so afterwards would be late."""
    model = tmp_path / "model"
    model.mkdir()
    for file in ("config.json", "model.safetensors"):
        (model / file).write_bytes((made[0] / file).read_bytes())
    monkeypatch.setattr(PatchFormat, "write", lambda *_: pytest.fail("it was written"))
    assert export(made[1], "patch", tmp_path / "out", f"model.path={model}") == 2
    assert "tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("when", ["write", "verify", "load"])
def test_stopped_at_any_time_it_leaves_nothing(made: Any, when: str, tmp_path: Path, monkeypatch: Any) -> None:
    act = getattr(PatchFormat, when)

    def stopped(*given: Any) -> Any:
        act(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(PatchFormat, when, stopped)
    assert export(made[1], "patch", tmp_path / "out") == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("format", ["peft-lora", "gguf-lora", "mlx"])
def test_both_factors_of_a_lora_may_be_rounded(format: str, dtype: str, tmp_path: Path, capsys: Any) -> None:
    lora(saved_model("llama", tmp_path / "model"), tmp_path / "adapter", ["q_proj", "down_proj"], scale=0.1, r=6)
    assert export(tmp_path / "adapter", format, tmp_path / "out", "--dtype", dtype) == 0, capsys.readouterr().err


@pytest.mark.parametrize("format", ["peft-lora", "peft-shira", "merged", "patch", "gguf-lora", "mlx"])
def test_another_base_is_refused_before_anything_is_written(
    made: Any, format: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    other = transformers.AutoModelForCausalLM.from_pretrained(made[0])
    with torch.no_grad():
        other.model.embed_tokens.weight += 0.1
    other.save_pretrained(tmp_path / "other")
    build_tokenizer().save_pretrained(tmp_path / "other")
    monkeypatch.setattr(type(format_of(format)), "write", lambda *_: pytest.fail("it was written"))
    assert export(made[1], format, tmp_path / "out", f"model.path={tmp_path / 'other'}") == 2
    assert "made for another base model" in capsys.readouterr().err and not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16])
def test_a_base_is_known_by_its_files(kind: str, stored: Any, loaded: Any, tmp_path: Path) -> None:
    """The oracle: the fingerprint of the model as it was loaded when the adapter was made."""
    saved_model(kind, tmp_path / "model", stored)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=loaded)
    source = SimpleNamespace(
        kind="sparse", stored_packed=None, folder=tmp_path, fingerprint="",
        content={"base_fingerprint": base_fingerprints(model)[0]},
        target=SimpleNamespace(model=ModelConfig(path=str(tmp_path / "model"))),
    )  # fmt: skip
    check_base(source)  # type: ignore[arg-type]
    source.content["base_fingerprint"] = "0"
    with pytest.raises(UserError, match="another base model"):
        check_base(source)  # type: ignore[arg-type]

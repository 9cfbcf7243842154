"""What every export refuses before it writes, whatever its format, and what a stopped one leaves."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sparseft.adapters.lifecycle import load_adapter, merge
from sparseft.cli.app import main
from sparseft.commands.export import facts
from sparseft.config import ModelConfig
from sparseft.errors import UserError
from sparseft.export import job
from sparseft.export.formats import format_of
from sparseft.export.formats.patch import PatchFormat
from sparseft.export.job import check_base
from sparseft.export.patch import apply_patch
from sparseft.files.atomic import write_json
from sparseft.models.fingerprint import base_fingerprints
from sparseft.models.loading import load_model
from sparseft.publish.listing import listing_of
from support.exported import adapter, lora, saved_model
from support.models import build_tokenizer
from support.running import files, refused, sparseft


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


def test_a_base_is_not_written_over(made: Any, tmp_path: Path, capsys: Any) -> None:
    """One that is an export itself, which else may be replaced."""
    base = tmp_path / "base"
    assert export(made[1], "merged", base) == 0
    own = adapter(base, tmp_path / "own")
    before = files(base)
    assert export(own, "peft-shira", base) == 2
    assert f"--out {base}: there lies the base model" in capsys.readouterr().err and files(base) == before


def test_a_card_that_was_edited_is_not_lost(made: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        assert export(made[1], "patch", out) == 0
    card = out / "README.md"
    card.write_text("My own words.\n" + card.read_text())
    assert export(made[1], "patch", out) == 2
    assert "README.md was edited" in capsys.readouterr().err and card.read_text().startswith("My own words.")


def test_a_file_that_another_tool_put_there_is_neither_lost_nor_sent(made: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert export(made[1], "merged", out) == 0
    assert "README.md" in (first := files(out)) and {"config.json", "model.safetensors"} <= first
    assert export(made[1], "merged", out) == 0 and files(out) == first
    (out / "x.gguf").write_text("hours of work")
    (out / ".env").write_text("TOKEN=1")
    listed = listing_of(str(out), "me/mine", base="me/base")
    assert {file.name for file in listed.files} == first - {"sparseft_export.json"}
    assert {".env", "x.gguf"} <= {name for name, *_ in listed.left_out}
    (out / ".env").unlink()
    before = files(out)
    assert export(made[1], "merged", out) == 2
    assert "holds other files, which would be lost ('x.gguf')" in capsys.readouterr().err and files(out) == before


def test_a_note_of_an_earlier_version_is_told_what_to_do(made: Any, tmp_path: Path, capsys: Any) -> None:
    """Which files are its own it does not say, so no export goes into its folder either."""
    out = tmp_path / "out"
    assert export(made[1], "merged", out) == 0
    note = json.loads((out / "sparseft_export.json").read_text())
    del note["written"]
    (out / "sparseft_export.json").write_text(json.dumps(note))
    assert export(made[1], "merged", out) == 2 and "holds other files" in capsys.readouterr().err
    with pytest.raises(UserError, match="as an earlier version made it: .* into a new folder"):
        listing_of(str(out), "me/mine", base="me/base")


def test_an_interrupted_measurement_leaves_the_export(made: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "gain", stopped)
    assert export(made[1], "merged", tmp_path / "out") == 130
    assert (tmp_path / "out/model.safetensors").is_file() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_note_that_cannot_be_completed_costs_no_export(
    made: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """As on a disk that is full by then: what was measured is told all the same."""

    def full(path: Path, content: Any) -> Path:
        if "gain" in content:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_json(path, content)

    monkeypatch.setattr(job, "gain", lambda *_: {"survived": 0.5})
    monkeypatch.setattr(job, "write_json", full)
    assert export(made[1], "merged", tmp_path / "out", "--json") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["gain"] == {"survived": 0.5} and "No space left on device" in told.err
    assert "gain" not in json.loads((tmp_path / "out/sparseft_export.json").read_text())


def test_the_share_that_was_touched_is_of_the_entries() -> None:
    result = {"linears": 4, "entries": 90, "touched": 0.4, "files": 1, "bytes": 1000}
    assert facts(result) == ["4 linears", "90 entries in 40.0% of their groups", "1 file", "1.0 kB"]


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


def test_a_base_that_has_moved_is_asked_for(made: Any, tmp_path: Path) -> None:
    """As one is that was named from another working directory."""
    shutil.copytree(made[1], tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model": "../model"}))
    for words in (
        ["export", "adapter", "--format", "patch", "--out", "out"],
        ["eval", "boolq", "--adapter", "adapter"],
    ):
        message = refused(tmp_path, *words)
        assert message.startswith("model.path=../model: no such folder")
        assert message.endswith("It is the base of the adapter adapter: model.path=FOLDER says where it is now.")
    sparseft(tmp_path, "export", "adapter", "--format", "patch", "--out", "out", f"model.path={made[0]}")


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


@pytest.mark.parametrize("rows", [-3, 3])
def test_a_base_whose_files_its_config_does_not_describe_is_refused(
    made: Any, rows: int, tmp_path: Path, capsys: Any
) -> None:
    """One with more rows looks like the right one, if the rest is cut off."""
    base = tmp_path / "base"
    shutil.copytree(made[0], base)
    tensors = load_file(base / "model.safetensors")
    rest = tensors["lm_head.weight"]
    tensors["lm_head.weight"] = torch.cat([rest, rest[:3]])[: len(rest) + rows].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert export(made[1], "patch", tmp_path / "out", f"model.path={base}") == 2
    assert f"{base}: lm_head.weight is ({len(rest) + rows}, " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# ---- of a run ----


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a checkpoint of the first."""
    folder = tmp_path_factory.mktemp("runs")
    words = ["method=s2ft", "trainer.max_steps=2", "trainer.save_steps=1", "trainer.batch_size=1", "hardware=cpu"]
    words += ["trainer.gradient_accumulation=1", "trainer.learning_rate=1e-2", "trainer.warmup_steps=0"]
    sparseft(folder, "train", *words, "dataset.max_examples=4", "trainer.max_length=128", "output_dir=run")
    return folder / "run"


@pytest.mark.parametrize("inside", ["", "/adapter"])
def test_a_checkpoint_is_exported_itself_and_not_its_run(run_folder: Path, inside: str, tmp_path: Path) -> None:
    place = run_folder / "checkpoints/checkpoint-1"
    assert export(Path(f"{place}{inside}"), "patch", tmp_path / "out") == 0
    tiny = ModelConfig(path="bundled:tiny")
    adapters = (place / "adapter", run_folder / "adapter")
    wanted, others = (
        merge(load_adapter(load_model(tiny, torch.device("cpu")), folder)).state_dict() for folder in adapters
    )
    model = load_model(tiny, torch.device("cpu"))
    apply_patch(model, tmp_path / "out")
    found = model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    assert any(not torch.equal(value, found[name]) for name, value in others.items())


def test_a_checkpoint_is_not_evaluated_as_its_run(run_folder: Path) -> None:
    message = refused(run_folder.parent, "eval", "boolq", "--run", "run/checkpoints/checkpoint-1")
    assert "another adapter than the one that its run has left" in message
    assert message.endswith("--adapter run/checkpoints/checkpoint-1).")


def test_a_run_that_went_on_is_refused_before_the_work(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 1.0}\n')
    monkeypatch.setattr(PatchFormat, "write", lambda *_: pytest.fail("written"))
    assert "continued past step 2" in refused(tmp_path, "export", "run", "--format", "patch", "--out", "out")
    done = sparseft(tmp_path, "eval", "boolq", "--run", "run", "--limit", "1")
    assert "its adapter is still that of step 2" in done.err

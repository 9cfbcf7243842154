"""What a newcomer does, on what the package bundles: no settings, no network, one command after another."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.pages import real_pages
from support.running import METHODS, files, metrics, sparseft, summary

SHORT = [
    *("trainer.max_steps=3", "trainer.batch_size=4", "trainer.gradient_accumulation=1", "trainer.warmup_steps=0"),
    *("trainer.max_length=256", "dataset.max_examples=60", "hardware=cpu", "model.dtype=float32"),
]


@pytest.fixture(scope="module", autouse=True)
def pages() -> Iterator[None]:
    """Every run here leaves its page, of whatever method and data."""
    with real_pages():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of one newcomer: nothing in it."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def journey(home: Path) -> dict[str, Any]:
    """preprocess, train, eval twice and report, with hardly a setting; what each command printed."""
    words = ["method=sylva", "method.block_size=16", "method.num_samples=8", "sparsity=0.9", *SHORT]
    done = {
        "preprocess": sparseft(home, "preprocess", *words),
        "train": sparseft(home, "train", *words, "trainer.learning_rate=3e-3"),
        "eval": sparseft(home, "eval", "mmlu", "--shots", "5", "--limit", "3"),
        "base": sparseft(home, "eval", "mmlu", "--shots", "5", "--limit", "3", "--base", "--json"),
        "report": sparseft(home, "report"),
    }
    return done


def test_train_picks_up_what_preprocess_chose(home: Path, journey: dict[str, Any]) -> None:
    path = journey["preprocess"].out.strip()
    assert (home / path / "selection.json").is_file()
    assert f"selection: cached, {path}" in journey["train"].err


def test_training_lowers_the_loss(home: Path, journey: dict[str, Any]) -> None:
    result = summary(home / "outputs" / "latest")
    assert result["model"] == "bundled:tiny" and result["dataset"] == "commonsense"
    assert result["eval_loss_after"] < result["eval_loss_before"]


def test_eval_finds_the_run_and_says_so(home: Path, journey: dict[str, Any]) -> None:
    run = (home / "outputs" / "latest").resolve()
    assert f"Evaluated: the latest run outputs/{run.name} (on bundled:tiny)" in journey["eval"].out
    assert journey["base"].json["evaluated"] == "the base model bundled:tiny"
    entry = json.loads((run / "eval" / "mmlu.json").read_text())["tasks"]["mmlu"]
    assert entry["shots"] == 5 and entry["samples"] == journey["base"].json["tasks"]["mmlu"]["samples"]
    first = (run / "eval" / "mmlu.samples.jsonl").read_text().splitlines()[0]
    assert first.count("Answer:") == 6  # five examples and the question


def test_the_report_shows_the_run(home: Path, journey: dict[str, Any]) -> None:
    page = (home / "outputs" / "latest" / "report.html").read_text()
    assert "mmlu" in page and "sylva" in page
    assert journey["report"].out.startswith("report of outputs/")


def test_nothing_is_left_lying_about(home: Path, journey: dict[str, Any]) -> None:
    assert not [name for name in files(home) if "partial" in name or "/." in name.removeprefix(".cache/")]
    assert {path.name for path in home.iterdir()} == {"outputs", ".cache"}


@pytest.mark.parametrize("family", ["oasst1", "commonsense", "arithmetic", "json", "text"])
def test_every_bundled_family(family: str, in_tmp: Path) -> None:
    words = ["method=s2ft", f"dataset={family}", *SHORT, "trainer.learning_rate=1e-3"]
    result = sparseft(in_tmp, "train", "--json", *words, "trainer.max_steps=2").json
    assert result["dataset"] == family
    assert result["eval_loss_after"] < result["eval_loss_before"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_the_bundled_model_as_stored(method: str, in_tmp: Path) -> None:
    """In bf16, as the bundled model is stored; full fine-tuning keeps its weights in fp32."""
    words = [word for word in SHORT if not word.startswith("model.dtype")]
    done = sparseft(in_tmp, "train", "--json", f"method={method}", *words, "trainer.max_steps=2",
                    "trainer.learning_rate=1e-3")  # fmt: skip
    assert done.json["eval_loss_after"] < done.json["eval_loss_before"]
    run = in_tmp / done.json["run"]
    assert json.loads((run / "environment.json").read_text())["dtype"] == "bfloat16"
    from safetensors.torch import load_file

    (weights,) = (run / "adapter").glob("*.safetensors")
    kinds = {str(t.dtype) for name, t in load_file(weights).items() if not name.endswith(".index")}
    assert kinds == {"torch.float32"}


def command(cwd: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, stderr no terminal."""
    return subprocess.run(
        [sys.executable, "-m", "sparseft", *words], cwd=cwd, capture_output=True, text=True, timeout=300,
        env=os.environ | environment,
    )  # fmt: skip


def test_a_process_prints_useful_lines_only(in_tmp: Path) -> None:
    """No library's warnings, banners or bars; the result alone on stdout."""
    words = ["method=lora", *SHORT, "hardware.gradient_checkpointing=true"]
    done = command(in_tmp, "train", "--json", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 3 and done.stdout.count("\n") == 1
    begins = "data: |model: |trainable: |run: |eval loss |train: |warning: sparsity|step: |export: "
    odd = [line for line in done.stderr.splitlines() if not (re.match(begins, line) or line.endswith(" so far"))]
    assert not odd
    assert "\x1b" not in done.stderr and "\r" not in done.stderr


def test_train_says_the_rank_that_an_export_needs(in_tmp: Path) -> None:
    """Before training starts; a cap binds, and what found no place is said."""
    words = ["method=s2ft", "method.o_ratio=0.5", "method.d_ratio=0.25", *SHORT]
    done = sparseft(in_tmp, "train", "--json", *words, "output_dir=free")
    assert done.json["export_rank"] == 96
    said = [line for line in done.err.splitlines() if line.startswith("export: ")]
    assert len(said) == 1 and "needs rank 96 (model.layers.0.mlp.down_proj): fits vllm (--max-lora-rank 128)" in said[0]
    assert done.err.index("export: ") < done.err.index("train: ")
    capped = sparseft(in_tmp, "train", "--json", *words, "method.max_rank=40", "output_dir=capped")
    assert capped.json["export_rank"] == 40
    warning = "warning: method.max_rank=40 has room for 164 of the 392 heads and channels that the budget asks for"
    assert warning in capped.err and warning.removeprefix("warning: ") in capped.json["warnings"]
    config = json.loads((in_tmp / "capped" / "selection" / "selection.json").read_text())
    assert config["placed"] == [164, 392] and config["method_config"]["max_rank"] == 40
    anew = sparseft(in_tmp, "train", "--json", *words, "method.reselect_steps=2", "output_dir=anew")
    assert anew.json["export_rank"] is None and "; every new selection adds to it" in anew.err


def test_exit_codes_of_a_process(in_tmp: Path) -> None:
    wrong = command(in_tmp, "train", "method=silva")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.count("\n") == 1 and "Did you mean 'sylva'?" in wrong.stderr
    assert not list(in_tmp.iterdir())


def test_the_second_command_of_a_sweep_does_not_inherit(in_tmp: Path) -> None:
    """Points of a sweep share a process: each has its own warnings, peak and random numbers."""
    sparseft(in_tmp, "train", "-m", "method=s2ft", *SHORT, "seed=3,3", "output_dir=twice")
    first, second = summary(in_tmp / "twice" / "0"), summary(in_tmp / "twice" / "1")
    assert first["warnings"] == second["warnings"]
    for key in ("train_loss", "eval_loss_after", "tokens"):
        assert first[key] == second[key]
    assert [line["step"] for line in metrics(in_tmp / "twice" / "1")] == [0, 3, 3]

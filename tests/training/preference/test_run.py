"""A run by preferences as a command: its folder, and what goes on from it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from support.running import files, metrics, refused, sparseft, summary

WORDS = ["trainer.max_steps=2", "trainer.logging_steps=1", "trainer.batch_size=4", "trainer.gradient_accumulation=1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a run of the bundled model on the bundled pairs."""
    folder = tmp_path_factory.mktemp("world")
    sparseft(folder, "train", "objective=dpo", "method=s2ft", "trainer.learning_rate=1e-2", *WORDS, "output_dir=run")
    return folder


def test_the_run_folder(world: Path) -> None:
    found = files(world / "run")
    assert {"config.yaml", "environment.json", "metrics.jsonl", "summary.json", "report.html"} <= found
    assert "adapter/adapter_model.safetensors" in found and "checkpoints/checkpoint-2/manifest.json" in found
    assert not {path for path in found if path.endswith(("README.md", "tokenizer.json"))}
    before, one, two, after = metrics(world / "run")
    rewards = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    assert rewards <= one.keys() & two.keys()
    assert {f"eval_{name}" for name in rewards} <= before.keys() & after.keys()
    told = summary(world / "run")
    assert told["objective"] == "dpo" and told["dataset"] == "preference"
    assert (told["eval_margin_before"], told["eval_margin_after"]) == (0.0, after["eval_rewards/margins"])
    assert told["eval_accuracy_after"] == after["eval_rewards/accuracies"]
    data = json.loads((world / "run/environment.json").read_text())["data"]
    assert (data["format"], data["examples"], data["rows"]) == ("prompt_completion", 64, 64)
    assert one["rewards/margins"] == pytest.approx(one["rewards/chosen"] - one["rewards/rejected"], abs=1e-6)
    page = (world / "run/report.html").read_text()
    assert "<h2>Preference</h2>" in page and "of the pairs in the right order" in page


def test_what_goes_on_from_a_run(world: Path) -> None:
    sparseft(world, "export", "run", "--format", "merged", "--out", "merged")
    assert load_file(world / "merged/model.safetensors")
    told = sparseft(world, "push", "run", "me/pairs", "--dry-run").out
    assert "| objective | dpo |" in told and "Loss of dpo on held-out data: 0.693 before" in told
    message = refused(world, "trim", "run", "--forget", "0.1", "--source", "bundled:data/text/eval.txt")
    assert message.endswith("learnt from preferences, and trimming keeps what lowers the loss of imitation.")
    again = ["train", "objective=ipo", "method=s2ft", "trainer.learning_rate=1e-2", *WORDS, "output_dir=run"]
    again.append("trainer.resume=auto")
    assert "objective=ipo: the run in 'run' was started with dpo" in refused(world, *again)


def test_what_is_refused_before_any_work(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == "trl" else found(name))
        message = refused(world, "train", "objective=dpo", "output_dir=other")
    assert (
        message == "objective=dpo: needs the package trl, whose losses these are: pip install 'sparseft[preference]'."
    )
    assert not (world / "other").exists()

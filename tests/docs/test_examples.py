"""`docs/examples/*.py`, run as they stand on the bundled model, and what they claim."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import sparseft
from sparseft.config import BUNDLED_ROOT
from sparseft.kernels import reference
from sparseft.layers import sparse_layers
from support.places import ROOT

EXAMPLES = ROOT / "docs" / "examples"
IDS = torch.arange(5, 69)[None]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs an example in an empty working directory, `--out out`; gives what its `main` returns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["example"])  # an example reads its own words, never pytest's
    torch.manual_seed(0)
    return lambda name, *words: runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](["--out", "out", *words])


def base() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(BUNDLED_ROOT / "tiny", dtype="auto").eval()


def model_at(folder: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(Path(folder), dtype="auto").eval()


@torch.no_grad()
def logits(model: Any) -> Any:
    return model.eval()(IDS).logits


def check_only_selected(adapter: str, merged: Any) -> None:
    """The merged model is the base but for the adapter's entries, and what the adapter makes of the base."""
    plain, loaded = base().state_dict(), sparseft.load_adapter(base(), adapter)
    assert torch.equal(logits(loaded), logits(merged))
    masks = {}
    for name, layer in sparse_layers(loaded).items():
        masks[f"{name}.weight"] = mask = torch.zeros_like(layer.logical_weight)
        for pattern in layer.patterns.values():
            values = torch.ones_like(pattern.delta).to(mask.dtype)
            reference.scatter_(mask, pattern.kind, pattern.index, values, pattern.block_size)
    different = {name: weight != plain[name] for name, weight in merged.state_dict().items()}
    assert {name for name, where in different.items() if where.any()} == masks.keys()
    for name, mask in masks.items():
        assert not (different[name] & (mask == 0)).any()


def test_every_example_is_tested_here():
    text = Path(__file__).read_text()
    names = [path.stem for path in EXAMPLES.glob("*.py")]
    assert names
    assert [name for name in names if f'run("{name}"' not in text] == []


def test_transformers_trainer(run):
    found = run("transformers_trainer", "--steps", "6")
    assert found["after"] < found["before"] - 1
    check_only_selected("out/adapter", model_at("out/merged"))
    assert (Path("out") / "checkpoint-3" / "adapter" / "adapter_config.json").is_file()


def test_trl_sft(run):
    pytest.importorskip("trl")
    losses = run("trl_sft", "--steps", "6")["losses"]
    assert losses[-1] < losses[0] - 1
    check_only_selected("out/final/adapter", model_at("out/final"))


def test_trl_dpo(run):
    pytest.importorskip("trl")
    found = run("trl_dpo", "--steps", "6")
    assert found["before"]["eval_rewards/margins"] == 0 < found["after"]["eval_rewards/margins"]
    assert found["after"]["eval_rewards/accuracies"] > 0.7
    check_only_selected("out/final/adapter", model_at("out/final"))


def test_trl_grpo(run):
    """The sampler's log-probabilities are the trainer's, whose weights of before are others' soon."""
    pytest.importorskip("trl")
    found = run("trl_grpo", "--steps", "12")
    rewards = found["rewards"]
    assert len(rewards) == 12 and sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.05
    assert found["apart"] < 1e-4 < 1e-2 < found["learnt"]
    assert (Path("out") / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("said", "reward"), [(" 7.", 1), ("7", 1), (" 75", 0), (" 6, not 7", 0), (" seven", 0), ("", 0), ("The 7", 0)]
)
def test_the_reward_of_a_sum(said, reward):
    pytest.importorskip("trl")
    example = runpy.run_path(str(EXAMPLES / "trl_grpo.py"))
    assert example["right"]([example["question"](3, 4)], [said]) == [reward]


def test_accelerate_loop(run):
    losses = run("accelerate_loop", "--steps", "6")["losses"]
    assert losses[-1] < losses[0] - 0.5
    kept = logits(sparseft.load_adapter(base(), "out/adapter"))
    assert run("accelerate_loop", "--steps", "6", "--resume", "out/state")["losses"] == losses[3:]
    assert torch.equal(logits(sparseft.load_adapter(base(), "out/adapter")), kept)


def test_bare_loop(run):
    found = run("bare_loop", "--steps", "6")
    assert found["losses"][-1] < found["losses"][0] - 1
    assert found["same"]
    assert 0.9 * found["trained"] < found["changed"] <= found["trained"]
    check_only_selected("out/adapter", model_at("out/merged"))


def test_peft_load(run):
    found = run("peft_load")
    assert found["difference"] < 1e-4 < 1 < found["learnt"]


def test_serve_many(run):
    found = run("serve_many")
    assert found["mixed"] == found["alone"]
    north, south, plain = (answer.strip() for answer in found["mixed"])
    assert (north, south) == ("The jaxo comes from Ostra.", "The jaxo comes from Tovil.")
    assert plain not in (north, south)

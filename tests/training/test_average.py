"""Averages over steps: against a brute-force mean of all that was ever trained, and resumed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sparseft
from sparseft.errors import UserError
from sparseft.kernels import reference
from sparseft.layers import sparse_layers
from sparseft.layers.inactive import union
from sparseft.selection.compute import reselect
from sparseft.training.average import Average
from sparseft.training.reselection.swap import apply_selection
from support.running import metrics, refused, summary
from support.running import sparseft as command

STEPS = 10
METHODS: dict[str, Callable[[], Any]] = {
    "columns": lambda: sparseft.S2FTConfig(d_ratio=0.2, o_ratio=0.5),
    "permuted": lambda: sparseft.S2FTConfig(d_ratio=0.2, u_ratio=0.1, layout="permuted"),
    "blocks": lambda: sparseft.SylvaConfig(sparsity=0.9, block_size=4, importance="random"),
    "grid": lambda: sparseft.LosiaConfig(sparsity=0.9),
    "lora": lambda: sparseft.LoraConfig(rank=2, dropout=0.0),
    "full": lambda: sparseft.FullConfig(),
}


def learnt(model: Any) -> dict[str, torch.Tensor]:
    """All that has been trained, in fp64: of sparse methods every delta, dense (out, in), else the parameters."""
    layers = sparse_layers(model)
    if not layers:
        return {name: p.detach().double().clone() for name, p in sparseft.trainable_parameters(model).items()}
    found = {}
    for name, layer in layers.items():
        for kind, pattern in layer.patterns.items():
            dense = torch.zeros(layer.out_features, layer.in_features)
            index, delta = union(pattern)
            reference.scatter_(dense, kind, index, delta, pattern.block_size)
            found[f"{name}.{kind}"] = dense.double()
    return found


def trained(make_model: Any, method: str, rule: str, again: int = 0) -> tuple[Any, Any, list[dict[str, torch.Tensor]]]:
    """A model that took steps by random gradients, its average, and after each step what it had learnt; chosen anew
    every `again` steps."""
    config = METHODS[method]()
    model = sparseft.attach(make_model("llama"), config)
    average, history = Average(rule, model, STEPS), []
    optimizer = torch.optim.SGD(sparseft.trainable_parameters(model).values(), lr=0.1)
    state, control = SimpleNamespace(global_step=0, max_steps=STEPS), SimpleNamespace(should_evaluate=True)
    for step in range(1, STEPS + 1):
        average.on_step_begin(None, state, control)
        ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state.global_step = step
        average.on_step_end(None, state, control)
        assert control.should_evaluate == (step < STEPS)  # the last step's evaluation is the mean's
        history.append(learnt(model))
        if again and step % again == 0 and step < STEPS:
            apply_selection(model, reselect(model, config, None, seed=step), optimizer)
    return model, average, history


def mean_of(history: list[dict[str, torch.Tensor]], rule: str) -> dict[str, torch.Tensor]:
    kind, _, number = rule.partition(":")
    if kind == "last":
        history = history[-round(float(number) * len(history)) :]
    factors = [1.0 if kind == "last" else float(number) ** (len(history) - 1 - n) for n in range(len(history))]
    total = {name: sum(f * one[name] for f, one in zip(factors, history, strict=True)) for name in history[0]}
    return {name: value / sum(factors) for name, value in total.items()}


CASES = [(method, rule, 0) for method in METHODS for rule in ("last:0.4", "ema:0.7")]
CASES += [(method, rule, 3) for method in ("columns", "permuted", "blocks", "grid") for rule in ("last:0.7", "ema:0.7")]


@pytest.mark.parametrize(("method", "rule", "again"), CASES)
def test_what_is_left_is_the_mean(make_model: Any, method: str, rule: str, again: int) -> None:
    base = {name: value.double() for name, value in make_model("llama").state_dict().items()}
    model, average, history = trained(make_model, method, rule, again)
    wanted = mean_of(history, rule)
    assert any(not torch.allclose(wanted[name], history[-1][name], atol=1e-6) for name in wanted)
    average.take()
    found = learnt(model)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    if sparse_layers(model):  # the weights hold it too, and the base comes back
        merged = sparseft.merge(model).state_dict()
        for name, value in wanted.items():
            weight = f"{name.rpartition('.')[0]}.weight"
            torch.testing.assert_close(merged[weight].double(), base[weight] + value, rtol=1e-5, atol=1e-6)


def test_a_run_that_ends_before_averages_nothing(make_model: Any, capsys: Any) -> None:
    model = sparseft.attach(make_model("llama"), METHODS["columns"]())
    before = learnt(model)
    Average("last:0.1", model, 100).take()
    assert "the run ended before the first step that counts" in capsys.readouterr().err
    assert all(torch.equal(value, before[name]) for name, value in learnt(model).items())


def test_another_models_average_is_refused(make_model: Any, tmp_path: Path) -> None:
    _, average, _ = trained(make_model, "columns", "ema:0.5")
    average.save(tmp_path)
    other = sparseft.attach(make_model("llama"), METHODS["blocks"]())
    with pytest.raises(UserError, match="other parameters"):
        Average("ema:0.5", other, STEPS, str(tmp_path))
    assert not Average("last:0.5", other, STEPS, str(tmp_path)).parts  # of another rule: it begins anew


# ---- the command ----

WORDS = (
    "train dataset.max_examples=40 trainer.batch_size=2 trainer.gradient_accumulation=1 trainer.max_length=96 "
    "trainer.learning_rate=1e-2 trainer.warmup_steps=0 trainer.logging_steps=1 hardware.device=cpu trainer.max_steps=8"
).split()


@pytest.mark.parametrize(
    "method",
    [
        ["method=s2ft", "method.reselect_steps=3", "method.order=sampled", "trainer.average=last:0.75"],
        ["method=sylva", "method.block_size=16", "sparsity=0.9", "method.importance=random", "trainer.average=ema:0.8"],
        ["method=lora", "method.rank=2", "trainer.average=last:0.75"],
    ],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path, method: list[str]) -> None:
    words, run = [*WORDS, *method, "output_dir=run", "trainer.eval_steps=4", "trainer.save_steps=4"], tmp_path / "run"

    def evaluated() -> list[tuple[int, float]]:
        return [(line["step"], line["eval_loss"]) for line in metrics(run) if "eval_loss" in line]

    done = command(tmp_path, *words)
    assert "average: what is left is the mean over" in done.err
    losses, whole = evaluated(), load_file(run / "adapter" / "adapter_model.safetensors")
    assert [step for step, _ in losses] == [0, 4, 8]  # the last step's once: of what is left
    assert summary(run)["eval_loss_after"] == losses[-1][1]
    if "method=s2ft" in method:  # nor does what is left depend on evaluations and checkpoints
        command(tmp_path, *WORDS, *method, "output_dir=plain")
        plain = load_file(tmp_path / "plain" / "adapter" / "adapter_model.safetensors")
        assert plain.keys() == whole.keys() and all(torch.equal(plain[name], whole[name]) for name in whole)
        assert [line["step"] for line in metrics(tmp_path / "plain") if "eval_loss" in line] == [0, 8]
    for left in ("checkpoints/checkpoint-8", "adapter"):
        shutil.rmtree(run / left)
    (run / "summary.json").unlink()
    for _ in range(2):  # the second time nothing is left to train
        command(tmp_path, *words, "trainer.resume=auto")
        found = load_file(run / "adapter" / "adapter_model.safetensors")
        assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
        assert evaluated() == losses


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["trainer.average=0.5"], "trainer.average"),
        (["trainer.average=last:1.5"], "last:SHARE"),
        (["trainer.average=ema:0"], "ema:DECAY"),
        (["trainer.average=ema:.9", "trainer.keep_best=true", "trainer.eval_steps=1"], "give one of them"),
        (["trainer.average=ema:.9", "hardware.zero_stage=3"], "hardware.zero_stage=3"),
    ],
)
def test_what_cannot_be_averaged_is_refused(tmp_path: Path, words: list[str], part: str) -> None:
    assert part in refused(tmp_path, "train", *words)

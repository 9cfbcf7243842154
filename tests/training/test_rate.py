"""`trainer.learning_rate=auto`: the ramp leaves nothing behind, the run after it is one with that rate given, and what
is read off a curve."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparseft.adapters.lifecycle import attach
from sparseft.config import HardwareConfig, TrainerConfig
from sparseft.errors import RunError
from sparseft.methods import get_method
from sparseft.training import rate
from sparseft.training.rate import choose
from support.running import METHODS, on, refused, sparseft, summary, write_data
from support.training import CPU, examples, same_end

KINDS = {
    "s2ft": {"sparsity": 0.8, "roles": ["q", "o", "up", "down"], "importance": "weight"},
    "sylva": {"sparsity": 0.8, "block_size": 16, "importance": "weight"},
    "paca": {"sparsity": 0.8},
    "losia": {"sparsity": 0.8},
    "lora": {"rank": 2, "dropout": 0.1},
    "dora": {"rank": 2, "dropout": 0.0},
    "full": {"dtype": "model"},
}


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate, "STEPS", 12)


def find(model: Any, count: int = 40, **settings: Any) -> rate.Found:
    trainer = TrainerConfig(**{"learning_rate": "auto", "batch_size": 2, "gradient_accumulation": 2} | settings)
    return rate.find(
        model, examples(count), trainer, HardwareConfig(), device=CPU, seed=3, pad=0, arguments={},
        packing=settings.get("max_length") == 24,
    )  # fmt: skip


def state(model: Any) -> dict[str, torch.Tensor]:
    """All that a model holds: weights, deltas, indices, buffers."""
    return {name: value.detach().clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_nothing_is_left_of_the_ramp(make_model: Any, few_steps: None, kind: str, dtype: torch.dtype) -> None:
    base = make_model("llama").to(dtype)
    model = attach(base, get_method(kind)(**KINDS[kind]))
    model.eval()
    before, moved = state(model), []
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()]
    plain = rate.Ramp.held_out_loss

    def watch(self: Any, data: Any) -> float:
        moved.append(any(not torch.equal(value, before[name]) for name, value in state(self.model).items()))
        return plain(self, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rate.Ramp, "held_out_loss", watch)
        found = find(model)
    assert not moved[0] and moved[-1]  # it did train
    after = state(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert all(parameter.grad is None for parameter in model.parameters()) and not model.training
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert "_is_accelerate_prepared" not in vars(model) and "forward" not in vars(model)
    assert found.curve[0][0] == rate.LOWEST and found.watched == 16


@pytest.mark.parametrize(
    "method", [*("s2ft", "lora"), *(pytest.param(name, marks=pytest.mark.slow) for name in ("sylva", "full"))]
)
def test_the_run_after_it_is_one_with_that_rate_given(
    tmp_path: Path, model_folder: Any, few_steps: None, method: str
) -> None:
    data = write_data(tmp_path)["commonsense"]
    words = ["train", *on(model_folder(), data), *METHODS[method], "trainer.max_steps=4", "trainer.max_length=128",
             "trainer.save_steps=2",
             "trainer.save_total_limit=9", "trainer.logging_steps=1", "trainer.gradient_accumulation=2"]  # fmt: skip
    done = sparseft(tmp_path, *words, "trainer.learning_rate=auto", "output_dir=auto")
    found = json.loads((tmp_path / "auto" / "learning_rate.json").read_text())
    assert f"learning rate: {found['learning_rate']:g}, found in" in done.err
    assert summary(tmp_path / "auto")["learning_rate"] == found["learning_rate"]
    sparseft(tmp_path, *words, f"trainer.learning_rate={found['learning_rate']}", "output_dir=given")
    (tmp_path / "given" / "learning_rate.json").write_text("{}")  # the one file that they differ in
    same_end(tmp_path / "auto", tmp_path / "given")
    # Continued, it goes on with the rate that was found, and looks for no other.
    shutil.copytree(tmp_path / "auto", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-4")
    shutil.rmtree(tmp_path / "cut" / "adapter")
    (tmp_path / "cut" / "summary.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rate, "find", lambda *_, **__: pytest.fail("looked for a rate again"))
        done = sparseft(tmp_path, *words, "trainer.learning_rate=auto", "output_dir=cut", "trainer.resume=auto")
    assert f"learning rate: the run's own, {found['learning_rate']:g}" in done.err
    same_end(tmp_path / "cut", tmp_path / "auto")


def test_a_run_that_lost_its_rate_is_not_continued(tmp_path: Path, model_folder: Any, few_steps: None) -> None:
    data = write_data(tmp_path)["commonsense"]
    words = ["train", *on(model_folder(), data), *METHODS["s2ft"], "trainer.max_steps=2", "trainer.max_length=128",
             "trainer.save_steps=1",
             "output_dir=run"]  # fmt: skip
    sparseft(tmp_path, *words, "trainer.learning_rate=auto")
    (tmp_path / "run" / "learning_rate.json").write_text("{}")
    said = refused(tmp_path, *words, "trainer.learning_rate=auto", "trainer.resume=auto")
    assert "holds no rate that was found" in said


def test_an_interrupted_ramp_leaves_nothing(tmp_path: Path, model_folder: Any, few_steps: None) -> None:
    data = write_data(tmp_path)["commonsense"]
    words = ["train", *on(model_folder(), data), *METHODS["s2ft"], "trainer.max_steps=2", "trainer.max_length=128",
             "trainer.learning_rate=auto", "output_dir=run"]  # fmt: skip
    calls = iter(range(99))

    def interrupted(self: Any, data: Any) -> float:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rate.Ramp, "held_out_loss", interrupted)
        sparseft(tmp_path, *words, code=130)
    assert not (tmp_path / "run").exists() and not (tmp_path / "outputs").exists()


def test_small_and_packed_data(make_model: Any, few_steps: None) -> None:
    def model() -> Any:
        return attach(make_model("llama"), get_method("s2ft")(**KINDS["s2ft"]))

    assert find(model(), count=1).watched == 1  # it watches what it trains on: there is nothing else
    assert find(model(), count=9).watched == 4
    assert find(model(), max_length=24).watched == 16  # packed


def test_a_ramp_ends_where_the_loss_diverges(make_model: Any) -> None:
    model = attach(make_model("llama"), get_method("full")(dtype="model"))
    found = find(model)
    losses = [loss for _, loss in found.curve]
    assert len(losses) < rate.STEPS and not losses[-1] <= rate.DIVERGED * min(losses)
    assert all(loss <= rate.DIVERGED * min(losses[: place + 1]) for place, loss in enumerate(losses[:-1]))


def test_data_that_teach_nothing_have_no_rate(
    make_model: Any, few_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attach(make_model("llama"), get_method("s2ft")(**KINDS["s2ft"]))
    losses = iter(range(1, 99))
    monkeypatch.setattr(rate.Ramp, "held_out_loss", lambda self, data: float(next(losses)))
    with pytest.raises(RunError, match="trainer.learning_rate=auto: no rate from 1e-06 to 1 lowers the loss"):
        find(model)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Some text. " * 50)
    words = ["train", "dataset=text", "dataset.train_path=a.txt", "output_dir=never"]
    for word, said in (
        ("trainer.learning_rate=automatic", "expected a number, more than 0, and what fp32 can hold"),
        ("trainer.learning_rate=0", "expected a number, more than 0"),
    ):
        assert said in refused(tmp_path, *words, word)
    said = refused(tmp_path, *words, "trainer.learning_rate=auto", "hardware.num_processes=2", "hardware.device=cpu")
    assert "a rate is found in one process" in said
    assert not (tmp_path / "never").exists()


# ---- what is read off a curve ----

RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([4.9, 4.6, 4.0, 3.0, 2.0, 3.0, 6.0], 1e-2),  # one best rate
        ([4.9, 4.6, 4.0, 2.1, 2.0, 2.1, 6.0], 9.5e-3),  # between 3e-3 and 3e-2, all as good
        ([4.9, 4.6, 2.1, 2.6, 2.9, 2.0, 6.0], 5.5e-3),  # two valleys: between them
        ([4.9, 4.6, 4.0, 3.0, 2.0, 1.0, 0.0], 1e-1),  # still falling where the ramp ends
        ([4.9, 4.6, 4.0, 3.0, 2.0, float("nan")], 1e-2),
        ([4.9, 4.6, float("inf")], 3e-4),
        ([5.0, 5.1, 5.2], None),
        ([float("nan")], None),
    ],
)
def test_the_middle_of_what_gains_most(losses: list[float], expected: float | None) -> None:
    assert choose(5.0, list(zip(RATES, losses, strict=False))) == expected


def test_a_quadratic_bowl_gets_a_rate_that_trains_it() -> None:
    """Adam's steps move each weight by about the rate: the best one for k steps over a distance d is some d / k."""
    start, steps = torch.full((8,), 0.5), 24

    def run(rates: list[float]) -> list[float]:
        weight = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([weight], lr=1.0)
        losses = []
        for each in rates:
            optimizer.param_groups[0]["lr"] = each
            optimizer.zero_grad()
            (weight**2).mean().backward()
            optimizer.step()
            losses.append(float((weight.detach() ** 2).mean()))
        return losses

    ramp = [1e-6 * 1e6 ** (k / 59) for k in range(60)]
    found = choose(float((start**2).mean()), list(zip(ramp, run(ramp), strict=True)))
    ends = {
        each: run([each * (1 - k / steps) for k in range(steps)])[-1] for each in [10 ** (k / 4) for k in range(-20, 1)]
    }
    best = min(ends.values())
    at = run([found * (1 - k / steps) for k in range(steps)])[-1]
    assert at - best < 0.05 * (0.25 - best)

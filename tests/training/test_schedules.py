"""Schedules and optimizers train or are refused at once; a longer run is on its new schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.trainer_utils import SchedulerType

from sparseft.compose import validation
from sparseft.compose.run_config import compose
from sparseft.config import OPTIMIZERS, TrainerConfig
from sparseft.errors import UserError
from sparseft.training import checks, schedules
from sparseft.training.checkpoints import last_checkpoint
from sparseft.training.trainer import train
from support.running import files, metrics, on, refused, sparseft, summary, write_data
from support.training import attached, examples, spoil, trained, trainer_of

RATE = 1e-2
# What each schedule needs to train five steps, and their rates depend on how many there are.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "inverse_sqrt": {"timescale": 3},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 2, "decay_type": "linear"},
    "greedy": {"min_lr": 1e-5, "patience": 0, "factor": 0.5},
    "reduce_lr_on_plateau": {"patience": 0, "factor": 0.5, "threshold": 0.5},
}
BY_STEPS = [item.value for item in SchedulerType if item.value not in schedules.MEASURED]


def rates_of(name: str, total: int, warmup: int) -> list[float]:
    """The rates of each step, by transformers' own schedule beside a plain optimizer."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE)
    schedule = transformers.get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=total,
        scheduler_specific_kwargs=dict(ARGUMENTS.get(name, {})),
    )  # fmt: skip
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def shown(run: Path) -> dict[int, float]:
    """The learning rate of each step in a run's `metrics.jsonl`; the last one counts where a step has two lines."""
    return {line["step"]: line["learning_rate"] for line in metrics(run) if "learning_rate" in line}


# ---- what is refused ----


@pytest.mark.parametrize("name", [item.value for item in SchedulerType])
def test_every_schedule_can_be_had(name: str) -> None:
    config = TrainerConfig(scheduler=name, scheduler_args=ARGUMENTS.get(name), warmup_steps=1, eval_steps=1)
    schedules.check(config, RATE, 5)
    schedules.check(config, RATE, None)


@pytest.mark.parametrize(
    ("name", "given", "parts"),
    [
        ("linaer", None, ["trainer.scheduler=linaer", "'linear'"]),
        ("cosine_with_min_lr", None, ["trainer.scheduler=cosine_with_min_lr", "min_lr or min_lr_rate"]),
        ("cosine_warmup_with_min_lr", None, ["trainer.scheduler=cosine_warmup", "trainer.scheduler_args.min_lr"]),
        ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}, ["min_lr and min_lr_rate", "give one"]),
        ("cosine_with_min_lr", {"min_lr_rat": 0.1}, ["trainer.scheduler_args.min_lr_rat", "'min_lr_rate'"]),
        ("warmup_stable_decay", None, ["trainer.scheduler=warmup_stable_decay", "num_decay_steps"]),
        ("warmup_stable_decay", {"num_decay_steps": 9}, ["num_decay_steps=9", "1 steps of warm-up", "8 steps"]),
        ("warmup_stable_decay", {"num_decay_steps": -1}, ["num_decay_steps=-1", "at least 0"]),
        ("warmup_stable_decay", {"num_decay_steps": 2.5}, ["num_decay_steps=2.5", "whole number"]),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "lin"}, ["decay_type=lin", "Unknown decay type"]),
        ("linear", {"min_lr": 1e-5}, ["trainer.scheduler_args.min_lr", "trainer.scheduler=linear", "none"]),
        ("constant_with_warmup", {"a": 1}, ["trainer.scheduler_args.a", "trainer.scheduler=constant_with_warmup"]),
        ("cosine", {"num_cycles": "many"}, ["trainer.scheduler=cosine", "num_cycles=many"]),
        ("cosine", {"num_warmup_steps": 3}, ["trainer.scheduler_args.num_warmup_steps", "trainer.warmup_steps"]),
        ("polynomial", {"lr_end": 1.0}, ["lr_end=1.0", "lr_end"]),
        ("polynomial", {"power": -1.0}, ["trainer.scheduler=polynomial", "power=-1.0"]),  # in the very last step
        ("polynomial", {"power": "high"}, ["power=high"]),
        ("inverse_sqrt", {"timescale": -4}, ["timescale=-4"]),
        ("cosine_with_min_lr", {"min_lr_rate": "x"}, ["min_lr_rate=x"]),
        ("cosine_with_min_lr", {"min_lr": -1e-5}, ["min_lr=-1e-05", "at least 0"]),
        ("cosine_with_min_lr", {"min_lr": True}, ["min_lr=True", "a number"]),
        ("cosine_with_min_lr", {"min_lr": 0.02}, ["min_lr=0.02", "more than the run's highest, 0.01"]),
        ("warmup_stable_decay", {"num_decay_steps": None}, ["num_decay_steps=None", "a number"]),
        ("warmup_stable_decay", {"num_decay_steps": 2, "min_lr_ratio": 1.5}, ["min_lr_ratio=1.5", "the run's highest"]),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": 1}, ["decay_type=1", "text"]),
        ("greedy", {"min_lr": 0.0, "smooth": 1}, ["smooth=1", "true or false"]),
        ("reduce_lr_on_plateau", {"factor": 1.5}, ["factor=1.5", "Factor should be < 1.0"]),
        ("reduce_lr_on_plateau", {"patience": "x"}, ["patience=x"]),
        ("reduce_lr_on_plateau", {"min_lr": 0.5}, ["min_lr is 0.5", "0.01"]),
        ("reduce_lr_on_plateau", {"mode": "max"}, ["trainer.scheduler_args.mode"]),
        ("greedy", {"max_lr": 1e-3, "min_lr": 0.0}, ["max_lr is 0.001", "0.01"]),
        ("greedy", {"verbose": True}, ["trainer.scheduler_args.verbose"]),
    ],
)  # fmt: skip
def test_a_schedule_that_cannot_be_followed(name: str, given: Any, parts: list[str]) -> None:
    config = TrainerConfig(scheduler=name, scheduler_args=given, warmup_steps=1, eval_steps=1)
    with pytest.raises(UserError) as caught:
        schedules.check(config, RATE, 8)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "trainer.scheduler" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", schedules.MEASURED)
def test_what_follows_the_loss_needs_evaluations(name: str) -> None:
    config = TrainerConfig(scheduler=name, scheduler_args={"min_lr": 0.0})
    with pytest.raises(UserError, match=f"trainer.scheduler={name}: .*needs trainer.eval_steps"):
        schedules.check(config, RATE, None)


def test_a_greedy_schedule_says_that_its_default_bound_is_too_high() -> None:
    with pytest.raises(UserError, match=r"min_lr is 0.001, expected less than the learning rate \(5e-05\)"):
        schedules.check(TrainerConfig(scheduler="greedy", eval_steps=1), 5e-5, 8)


def test_a_rate_that_is_yet_to_be_found_judges_no_schedule() -> None:
    words = ["trainer.learning_rate=auto", "trainer.scheduler=reduce_lr_on_plateau", "trainer.eval_steps=1"]
    words += ["trainer.scheduler_args.min_lr=1e-3", "method=s2ft"]
    checks.check_trainer(compose("train", words))
    with pytest.raises(UserError, match=r"min_lr is 0.001, expected less than the learning rate \(0.0002\)"):
        checks.check_trainer(compose("train", words[1:]))
    with pytest.raises(UserError, match="no such setting"):
        checks.check_trainer(compose("train", [*words[:-2], "trainer.scheduler_args.mn_lr=1", "method=s2ft"]))


def test_steps_that_train_nothing_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    given = {"num_stable_steps": 2, "num_decay_steps": 2}
    config = TrainerConfig(scheduler="warmup_stable_decay", scheduler_args=given, warmup_steps=0)
    schedules.check(config, RATE, 4)
    assert "learning rate" not in capsys.readouterr().err
    schedules.check(config, RATE, 9)
    assert "the learning rate is 0 after step 4 of 9" in capsys.readouterr().err


@pytest.mark.parametrize("plan", [[], ["--plan"]])
@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["trainer.scheduler=reduce_lr_on_plateau"], "trainer.scheduler=reduce_lr_on_plateau"),
        (["trainer.scheduler=greedy"], "trainer.scheduler=greedy"),
        (["trainer.scheduler=cosine_with_min_lr"], "trainer.scheduler=cosine_with_min_lr"),
        (["trainer.scheduler=warmup_stable_decay"], "trainer.scheduler=warmup_stable_decay"),
        (["trainer.optimizer=adamw_8bit"], "pip install bitsandbytes"),
        (["trainer.optimizer=galore_adamw"], "trainer.optimizer=galore_adamw: cannot be used here"),
        (["trainer.optimizer=schedule_free_adamw"], "trainer.optimizer=schedule_free_adamw: cannot be used here"),
        (["trainer.optimizer=adafactor", "hardware.zero_stage=2"], "trainer.optimizer=adafactor"),
    ],
)
def test_it_is_refused_before_anything_is_loaded(
    words: list[str], part: str, plan: list[str], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This one first: it imports modules, which keep the `load_config` that they find.
    monkeypatch.setattr("sparseft.training.job.run.set_up", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("sparseft.models.loading.load_config", lambda *_: pytest.fail("loaded"))
    assert part in refused(in_tmp, "train", *plan, *words)
    assert files(in_tmp) == set()


@pytest.mark.parametrize("name", list(validation.REFUSED_OPTIMIZERS))
def test_an_optimizer_that_is_refused_says_why(name: str, in_tmp: Path) -> None:
    message = refused(in_tmp, "train", f"trainer.optimizer={name}")
    assert message.startswith(f"trainer.optimizer={name}: cannot be used here (") and "adamw_torch" in message


# ---- what trains ----


def run_of(
    model: Any, folder: Path, total: int, resume: str | None = None, bad: set[int] | None = None, **settings: Any
) -> Any:
    """A run of `total` steps of two micro-steps each; the trained model."""
    settings = {"learning_rate": RATE, "gradient_accumulation": 2, "save_total_limit": 9, **settings}
    copy = attached(model, "s2ft")
    trainer = trainer_of(copy, folder, examples(16), examples(4, seed=1), max_steps=total, **settings)
    spoil(trainer, bad or set())
    train(trainer, resume, total)
    return copy


@pytest.mark.parametrize("bad", [set(), {3, 5}])
@pytest.mark.parametrize("name", BY_STEPS)
def test_a_longer_run_is_on_its_new_schedule(name: str, bad: set[int], make_model: Any, tmp_path: Path) -> None:
    model, settings = make_model("llama"), {"scheduler": name, "scheduler_args": ARGUMENTS.get(name), "warmup_steps": 1}
    run_of(model, tmp_path, 4, bad=bad, **settings)
    first = shown(tmp_path)
    assert first == pytest.approx(dict(enumerate(rates_of(name, 4, 1), start=1)), abs=0)
    run_of(model, tmp_path, 7, last_checkpoint(tmp_path), bad=bad, **settings)
    whole = rates_of(name, 7, 1)
    assert [shown(tmp_path)[step] for step in (5, 6, 7)] == whole[4:]
    assert len({*whole, *first.values()}) > 1 or name == "constant"


@pytest.mark.parametrize("name", schedules.MEASURED)
def test_a_schedule_that_follows_the_loss_goes_on_from_where_it_was(name: str, make_model: Any, tmp_path: Path) -> None:
    settings = {"scheduler": name, "scheduler_args": ARGUMENTS[name], "eval_steps": 1, "save_steps": 3}
    whole = run_of(make_model("llama"), tmp_path / "whole", 6, **settings)
    run_of(make_model("llama"), tmp_path / "cut", 3, **settings)
    kept = json.loads((Path(last_checkpoint(tmp_path / "cut")) / "trainer_state.json").read_text())
    assert kept["best_model_checkpoint"] is None, "what transformers would look for, and miss, when the run goes on"
    cut = run_of(make_model("llama"), tmp_path / "cut", 6, last_checkpoint(tmp_path / "cut"), **settings)
    rates = shown(tmp_path / "whole")
    assert rates == shown(tmp_path / "cut") and len(set(rates.values())) > 1
    assert all(torch.equal(value, trained(cut)[key]) for key, value in trained(whole).items())


@pytest.mark.parametrize("method", ["s2ft", "sylva"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains_and_goes_on(optimizer: str, method: str, make_model: Any, tmp_path: Path) -> None:
    settings = {"optimizer": optimizer, "scheduler": "constant", "max_steps": 4, "save_steps": 2, "weight_decay": 0.1}
    models = []
    for resume in (None, str(tmp_path / "checkpoints" / "checkpoint-2")):
        model = attached(make_model("llama"), method)
        trainer = trainer_of(model, tmp_path, examples(16), gradient_accumulation=2, **settings)
        train(trainer, resume, 4)
        models.append(model)
    whole, resumed = (trained(model) for model in models)
    assert all(value.any() for value in whole.values())
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    from sparseft.layers import sparse_layers

    for layer in sparse_layers(models[0]).values():
        before = layer.weight.clone()
        layer.write_back()  # as base + delta says
        assert torch.equal(layer.weight, before)


# ---- a run that is continued ----


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> list[str]:
    data = write_data(tmp_path_factory.mktemp("data"))["json"]
    words = [
        *on(model_folder(), data),
        "method=s2ft",
        "sparsity=0.9",
        "method.roles=[o,down]",
        "trainer.logging_steps=1",
    ]
    return ["train", *words, "trainer.learning_rate=1e-2", "dataset.max_examples=12"]


def test_a_finished_run_says_so_and_fewer_steps_are_refused(words: list[str], tmp_path: Path) -> None:
    sparseft(tmp_path, *words, "trainer.num_epochs=1.5", "output_dir=run")  # of three steps, the last one not full
    total = summary(tmp_path / "run")["steps"]
    assert total == 5
    again = sparseft(tmp_path, *words, "trainer.num_epochs=1.5", "output_dir=run", "trainer.resume=auto")
    assert f"already trained {total} of {total} steps: nothing is left to train" in again.err
    before = {name: (tmp_path / "run" / name).read_bytes() for name in files(tmp_path / "run")}
    for fewer, steps in (("trainer.max_steps=2", 2), ("trainer.num_epochs=0.5", 2)):
        message = refused(tmp_path, *words, fewer, "output_dir=run", "trainer.resume=auto")
        assert message.startswith(fewer) and f"already trained {total} steps, more than {steps}" in message
    assert {name: (tmp_path / "run" / name).read_bytes() for name in files(tmp_path / "run")} == before
    more = sparseft(tmp_path, *words, "trainer.num_epochs=2", "output_dir=run", "trainer.resume=auto")
    assert f"to 6 steps instead of {total}: the learning rate goes on as a run of 6 steps has it there" in more.err
    assert shown(tmp_path / "run")[6] == pytest.approx(RATE / 6)


def test_other_intervals_hold_from_where_it_goes_on(words: list[str], tmp_path: Path) -> None:
    sparseft(tmp_path, *words, "trainer.max_steps=2", "output_dir=run")
    changed = ["trainer.logging_steps=2", "trainer.save_steps=3", "trainer.eval_steps=2", "trainer.max_steps=7"]
    sparseft(tmp_path, *words, *changed, "output_dir=run", "trainer.resume=auto")
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 6, 7]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4, 6, 7]
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"checkpoint-6", "checkpoint-7"}


@pytest.mark.parametrize(
    "change",
    [
        "trainer.learning_rate=1e-3", "trainer.scheduler=cosine", "trainer.warmup_steps=1", "trainer.optimizer=sgd",
        "trainer.scheduler_args.num_cycles=1.0",
    ],
)  # fmt: skip
def test_the_shape_of_the_schedule_stays(change: str, words: list[str], tmp_path: Path) -> None:
    cosine = ["trainer.scheduler=cosine"] if "scheduler_args" in change else []
    if not (tmp_path / "run").exists():
        sparseft(tmp_path, *words, *cosine, "trainer.max_steps=1", "output_dir=run")
    message = refused(tmp_path, *words, *cosine, change, "trainer.max_steps=2", "output_dir=run", "trainer.resume=auto")
    assert message.startswith(change.split("=")[0].removesuffix(".num_cycles")) and "was started with" in message

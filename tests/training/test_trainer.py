"""The training loop against a loop written out by hand; checkpoints, resuming, interrupts and failures."""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F

from sparseft import signals
from sparseft.adapters.lifecycle import trainable_parameters
from sparseft.compose.run_config import compose
from sparseft.config import HardwareConfig, TrainerConfig
from sparseft.errors import RunError
from sparseft.training.arguments import training_arguments
from sparseft.training.callbacks import RunCallback
from sparseft.training.checkpoints import checkpoint_steps, last_checkpoint, step_of
from sparseft.training.optimizer import SparseAdamW
from sparseft.training.resume import previous_run
from sparseft.training.run_state import Clock
from sparseft.training.trainer import Trainer, train
from support.exported import saved_model
from support.running import METHODS, files, metrics, on, refused, sparseft, summary, write_data
from support.training import CPU, At, attached, examples, long_run, same_end, tensors, trained, trainer_of

# ---- the optimizer ----


@pytest.mark.parametrize(
    ("method", "optimizer", "expected"),
    [
        ("s2ft", "adamw_torch", SparseAdamW),
        ("sylva", "adamw_torch_fused", SparseAdamW),
        ("s2ft", "sgd", torch.optim.SGD),
        ("lora", "adamw_torch", torch.optim.AdamW),
    ],
)
def test_sparse_methods_train_by_the_optimizer_that_writes_weights(
    make_model: Any, tmp_path: Path, method: str, optimizer: str, expected: type
) -> None:
    model = attached(make_model("llama"), method)
    trainer = trainer_of(model, tmp_path, examples(4), optimizer=optimizer, max_steps=1, weight_decay=0.1)
    made = trainer.create_optimizer()
    assert type(made) is expected
    held = {id(p) for group in made.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainable_parameters(model).values()}
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.0]  # transformers' own groups


# ---- the loop ----


def seen_examples(trainer: Trainer, steps: int, per_step: int) -> list[list[dict[str, list[int]]]]:
    """The examples of each optimizer step, as the trainer's own loader gives them, padding cut off."""
    found: list[dict[str, list[int]]] = []
    for batch in trainer.get_train_dataloader():
        masks = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        for ids, mask, labels in zip(batch["input_ids"], masks, batch["labels"], strict=True):
            kept = mask.bool()
            found.append({"input_ids": ids[kept].tolist(), "labels": labels[kept].tolist()})
    return [found[per_step * i : per_step * (i + 1)] for i in range(steps)]


def by_hand(
    model: Any, steps: list[list[dict[str, list[int]]]], *, lr: float, decay: float, clip: float
) -> list[float]:
    """The same training written out: one example at a time, summed losses over the step's labelled tokens.

    Norms are not decayed (the only vectors among what trains).
    """
    parameters = list(trainable_parameters(model).values())
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay}]
    groups += [{"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for number, step in enumerate(steps):
        count = sum(sum(label != -100 for label in example["labels"][1:]) for example in step)
        total = 0.0
        for example in step:
            ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
            logits = model(input_ids=ids).logits[0]
            loss = F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum") / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - number / len(steps))  # linear, stepped once an optimizer step
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize(
    ("method", "batch", "accumulation"),
    [("s2ft", 1, 8), ("s2ft", 8, 1), ("sylva", 1, 8), ("sylva", 8, 1), ("lora", 4, 2), ("full", 4, 2)],
)
def test_training_is_the_loop_written_out(
    method: str, batch: int, accumulation: int, make_model: Any, tmp_path: Path
) -> None:
    """Accumulation, the mean over labelled tokens, clipping, decay and the schedule, all against the hand's loop.

    On a float64 model (with deltas in float32 as ever): AdamW's first steps divide a gradient by its own size, so a
    gradient that is nearly 0 would turn the last bit of a float32 product into a whole step. The norms' and the
    deltas' float32 still leaves a single entry off by more than 1e-6; one trained wrongly would be off by 1e-3.
    """
    base, data = make_model("llama", torch.float64), examples(32)
    model = attached(base, method)
    settings = {"learning_rate": 1e-2 if method != "full" else 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.5}
    trainer = trainer_of(
        model, tmp_path / "run", data, max_steps=3, batch_size=batch, gradient_accumulation=accumulation, **settings
    )
    totals = train(trainer, None, 3)

    expected = attached(base, method)
    steps = seen_examples(trainer_of(attached(base, method), tmp_path / "order", data, max_steps=3), 3, 8)
    losses = by_hand(expected, steps, lr=settings["learning_rate"], decay=0.1, clip=0.5)
    lines = metrics(tmp_path / "run")
    assert [line["loss"] for line in lines] == pytest.approx(losses, abs=2e-6)
    assert totals.loss == pytest.approx(sum(losses), abs=6e-6)
    rate = settings["learning_rate"]
    assert lines[-1]["learning_rate"] == pytest.approx(0, abs=rate / 3 + 1e-12)
    for name, value in trained(expected).items():
        off = (trained(model)[name] - value).abs()
        assert off.max() < 1e-5 and (off > 1e-6).sum() <= 1, name
        assert not torch.equal(value, trained(attached(base, method))[name])  # it did train


def test_the_order_of_examples_is_the_seeds(make_model: Any, tmp_path: Path) -> None:
    data = examples(16)
    orders = []
    for number, draws in enumerate((0, 3)):
        trainer = trainer_of(attached(make_model("llama"), "s2ft"), tmp_path / str(number), data, max_steps=1)
        torch.rand(draws)  # whatever was drawn before must not matter
        orders.append(seen_examples(trainer, 1, 16)[0])
    assert orders[0] == orders[1]
    assert orders[0] != [data[index] for index in range(16)]


def test_weights_that_are_not_selected_never_change(make_model: Any, tmp_path: Path) -> None:
    base = make_model("llama")
    model = attached(base, "s2ft")
    trainer = trainer_of(model, tmp_path, examples(16), max_steps=4, gradient_accumulation=2, weight_decay=0.3)
    train(trainer, None, 4)
    from sparseft.layers import sparse_layers

    changed = 0
    for name, parameter in base.named_parameters():
        module = name.removesuffix(".weight")
        new = dict(model.named_parameters())[name]
        layer = sparse_layers(model).get(module)
        mask = torch.zeros_like(parameter, dtype=torch.bool)
        if layer is not None:
            for kind, pattern in layer.patterns.items():
                if kind == "rows":
                    mask[pattern.index] = True
                else:
                    mask[:, pattern.index] = True
        assert torch.equal(new[~mask], parameter[~mask]), name
        changed += int((new[mask] != parameter[mask]).sum())
    assert changed > 0


# ---- evaluation ----


def test_the_eval_loss_is_the_mean_over_tokens_whatever_the_batch(make_model: Any, tmp_path: Path) -> None:
    model, data = make_model("llama"), examples(13, seed=3)
    total, count = 0.0, 0
    for example in data:
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
        logits = model(input_ids=ids).logits[0].double()
        total += F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum").item()
        count += int((labels[1:] != -100).sum())
    for batch in (1, 4, 13):
        trainer = trainer_of(
            attached(model, "sylva"), tmp_path / str(batch), examples(4), data, max_steps=1, batch_size=batch
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, abs=1e-6)
        assert not trainer.model.training


def test_each_evaluation_happens_once_also_at_an_epochs_end(make_model: Any, tmp_path: Path) -> None:
    trainer = trainer_of(
        attached(make_model("llama"), "s2ft"), tmp_path, examples(4), examples(3), max_steps=6, eval_steps=2,
        gradient_accumulation=2,
    )  # fmt: skip  # two steps an epoch
    train(trainer, None, 6)
    assert [line["step"] for line in metrics(tmp_path) if "eval_loss" in line] == [2, 4, 6]
    assert trainer.model.training  # and evaluation gives the mode back


def test_what_an_evaluation_leads_to_is_no_training_time(make_model: Any, tmp_path: Path) -> None:
    """As that the best adapter is saved."""
    trainer = trainer_of(attached(make_model("llama"), "s2ft"), tmp_path, examples(4), examples(3))
    clock, stood = trainer.run_state.clock, []

    class Slow(transformers.TrainerCallback):
        def on_evaluate(self, *_: Any, **__: Any) -> None:
            first = clock.seconds
            stood.append(all(clock.seconds == first for _ in range(100)))

    trainer.add_callback(Slow())
    clock.start()
    trainer.evaluate()
    assert stood == [True]


def test_the_clock_stands_still_outside_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = Clock()
    assert clock.seconds == 0
    clock.start(10.0)
    now = 103.0
    with clock.paused():
        now = 150.0
        assert clock.seconds == 13.0
    now = 152.0
    assert clock.seconds == 15.0
    clock.stop()
    with clock.paused():
        now = 160.0
    now = 170.0
    assert clock.seconds == 15.0  # a pause does not wind up a clock that stood


# ---- settings ----


def test_a_warm_up_longer_than_the_run_is_a_tenth_of_it() -> None:
    def arguments(**settings: Any) -> Any:
        return training_arguments(
            TrainerConfig(max_steps=10, learning_rate=1e-3, **settings), HardwareConfig(), seed=0, device=CPU,
            total_steps=10,
        )  # fmt: skip

    assert arguments().warmup_steps == 1  # a tenth, where the run is shorter than its warm-up
    assert arguments(warmup_steps=4).warmup_steps == 4


# ---- checkpoints ----


def test_checkpoints_are_kept_by_number_and_limit(make_model: Any, tmp_path: Path) -> None:
    model = attached(make_model("llama"), "s2ft")
    trainer = trainer_of(model, tmp_path, examples(16), max_steps=12, save_steps=1, save_total_limit=3,
                         gradient_accumulation=1)  # fmt: skip
    train(trainer, None, 12)
    folder = tmp_path / "checkpoints"
    assert sorted(item.name for item in folder.iterdir()) == ["checkpoint-10", "checkpoint-11", "checkpoint-12"]
    assert checkpoint_steps(folder) == [10, 11, 12]
    assert last_checkpoint(tmp_path) == str(folder / "checkpoint-12")
    assert step_of(last_checkpoint(tmp_path)) == 12 and step_of(None) == -1


def test_names_that_are_no_checkpoints_are_passed_over(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "11", ".partial-ab", "checkpoint-12.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint_steps(tmp_path / "checkpoints") == [9, 10]


def test_a_checkpoint_is_whole_or_not_there(make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that breaks off at any of its files leaves the earlier checkpoints and nothing else."""
    real = torch.save
    for breaks_at in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        run = tmp_path / breaks_at
        trainer = trainer_of(attached(make_model("llama"), "s2ft"), run, examples(8), max_steps=2, save_steps=1,
                             gradient_accumulation=1)  # fmt: skip

        def save(
            content: Any, path: Any, *args: Any, at: str = breaks_at, tr: Trainer = trainer, **options: Any
        ) -> None:
            if str(path).endswith(at) and tr.state.global_step == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(content, path, *args, **options)

        monkeypatch.setattr(torch, "save", save)
        with pytest.raises(RunError, match="checkpoint-2 could not be written: No space left on device") as caught:
            train(trainer, None, 2)
        assert caught.value.last_checkpoint == str(run / "checkpoints" / "checkpoint-1")
        assert [item.name for item in (run / "checkpoints").iterdir()] == ["checkpoint-1"]


def test_weights_that_are_not_finite_are_not_saved(make_model: Any, tmp_path: Path) -> None:
    model = attached(make_model("llama"), "sylva")
    trainer = trainer_of(model, tmp_path, examples(8), max_steps=4, save_steps=1, logging_steps=100,
                         gradient_accumulation=1)  # fmt: skip
    delta = next(p for p in model.parameters() if p.requires_grad)
    trainer.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    trainer.optimizer.register_step_post_hook(
        lambda *_: delta.data.fill_(math.inf) if trainer.state.global_step == 2 else None
    )
    with pytest.raises(RunError, match="the trained weights are not finite after step 3.*learning_rate") as caught:
        train(trainer, None, 4)
    kept = checkpoint_steps(tmp_path / "checkpoints")
    assert kept == [1, 2] and caught.value.last_checkpoint == last_checkpoint(tmp_path, 2)
    from safetensors.torch import load_file

    for step in kept:
        tensors = load_file(tmp_path / "checkpoints" / f"checkpoint-{step}" / "adapter" / "adapter_model.safetensors")
        assert all(t.isfinite().all() for t in tensors.values())


# ---- resuming ----


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file; its folder is the working directory of the runs below."""
    return write_data(tmp_path_factory.mktemp("runs"))["json"]


@pytest.fixture(scope="module")
def uninterrupted(data: Path, model_folder: Any) -> Any:
    """`run(method)`: the folder of an uninterrupted run, made once."""
    made: dict[str, Path] = {}

    def run(method: str) -> Path:
        if method not in made:
            sparseft(data.parent, *long_run(method, model_folder(), data), f"output_dir=whole-{method}")
            made[method] = data.parent / f"whole-{method}"
        return made[method]

    return run


def stop_after(whole: Path, step: int, folder: Path) -> Path:
    """A copy of a run as it would lie there had the machine failed some time after its checkpoint at `step`."""
    shutil.copytree(whole, folder)
    for name in ("summary.json", "report.html"):
        (folder / name).unlink()
    shutil.rmtree(folder / "adapter")
    for later in checkpoint_steps(folder / "checkpoints"):
        if later > step:
            shutil.rmtree(folder / "checkpoints" / f"checkpoint-{later}")
    (folder / "checkpoints" / ".partial-abc").mkdir()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')  # torn
    return folder


@pytest.mark.parametrize(("method", "step"), [("s2ft", 2), ("s2ft", 6), ("sylva", 4), ("lora", 4), ("full", 4)])
def test_a_resumed_run_ends_as_the_uninterrupted_one(
    method: str, step: int, uninterrupted: Any, data: Path, model_folder: Any, tmp_path: Path
) -> None:
    run = stop_after(uninterrupted(method), step, tmp_path / "run")
    shutil.rmtree(data.parent / ".cache", ignore_errors=True)  # the run's own selection must do
    done = sparseft(data.parent, *long_run(method, model_folder(), data), f"output_dir={run}", "trainer.resume=auto")
    assert f"resume: {run}/checkpoints/checkpoint-{step}" in done.err
    assert "calibrate" not in done.err and not list((data.parent / ".cache").rglob("selection.json"))
    same_end(run, uninterrupted(method))


def test_a_run_from_before_second_moments_had_a_structure_is_continued(
    uninterrupted: Any, data: Path, model_folder: Any, tmp_path: Path
) -> None:
    run = stop_after(uninterrupted("sylva"), 4, tmp_path / "run")
    now = (run / "config.yaml").read_text()
    before = now.replace("  structure: multilevel\n", "").replace("  rank: null\n", "  rank: 1\n")
    assert len(before.splitlines()) == len(now.splitlines()) - 1 and "rank: 1" in before
    (run / "config.yaml").write_text(before)
    sparseft(data.parent, *long_run("sylva", model_folder(), data), f"output_dir={run}", "trainer.resume=auto")
    same_end(run, uninterrupted("sylva"))


@pytest.mark.parametrize("method", ["sylva", "lora"])
def test_a_finished_run_stays_as_it_is(
    method: str, uninterrupted: Any, data: Path, model_folder: Any, tmp_path: Path
) -> None:
    whole = uninterrupted(method)
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    sparseft(data.parent, *long_run(method, model_folder(), data), f"output_dir={run}", "trainer.resume=auto")
    same_end(run, whole)
    for key in ("train_seconds", "tokens_per_second"):  # of the training, not of loading it again
        assert summary(run)[key] == pytest.approx(summary(whole)[key], rel=0.5)


def test_a_finished_run_can_be_made_longer(uninterrupted: Any, data: Path, model_folder: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted("s2ft"), run)
    words = [word.replace("max_steps=7", "max_steps=9") for word in long_run("s2ft", model_folder(), data)]
    sparseft(data.parent, *words, f"output_dir={run}", "trainer.resume=auto")
    result = summary(run)
    assert result["steps"] == 9
    assert result["tokens"] > summary(uninterrupted("s2ft"))["tokens"]
    steps = [line["step"] for line in metrics(run) if "loss" in line]
    assert steps == [3, 6, 7, 9]


def test_a_resumed_run_of_single_experts_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    """A selection comes from its file in another order than it was chosen in; the optimizer's state goes by order."""
    model = saved_model("mixtral", tmp_path / "model")
    words = ["train", *on(model, write_data(tmp_path)["json"]), *METHODS["sylva"], "model.dtype=float32",
             "trainer.max_steps=4", "trainer.save_steps=2"]  # fmt: skip
    sparseft(tmp_path, *words, "output_dir=whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for left in ("checkpoints/checkpoint-4", "adapter"):
        shutil.rmtree(tmp_path / "parts" / left)
    (tmp_path / "parts" / "summary.json").unlink()
    sparseft(tmp_path, *words, "output_dir=parts", "trainer.resume=auto")
    ends = [load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "parts")]
    assert ends[0].keys() == ends[1].keys() and any("experts" in name for name in ends[0])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_resuming_where_no_checkpoint_was_written_starts_anew(
    uninterrupted: Any, data: Path, model_folder: Any, tmp_path: Path
) -> None:
    run = stop_after(uninterrupted("s2ft"), 0, tmp_path / "run")
    done = sparseft(data.parent, *long_run("s2ft", model_folder(), data), f"output_dir={run}", "trainer.resume=auto")
    assert "resume: no checkpoint yet, so from the beginning" in done.err
    same_end(run, uninterrupted("s2ft"))
    fresh = tmp_path / "fresh"  # nor need there be a run at all: one command for the first start and for every other
    sparseft(data.parent, *long_run("s2ft", model_folder(), data), f"output_dir={fresh}", "trainer.resume=auto")
    same_end(fresh, uninterrupted("s2ft"))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("method.block_size=4", ["method.block_size=4", "was started with 8"]),
        ("seed=1", ["seed=1", "was started with 0"]),
        ("trainer.learning_rate=1", ["trainer.learning_rate=1.0", "was started with 0.005"]),
        ("trainer.batch_size=3", ["trainer.batch_size=3", "was started with 2"]),
        ("scope=mlp", ["scope=mlp", "was started with null"]),
        ("dataset.max_examples=10", ["dataset.max_examples=10", "was started with 11"]),
    ],
)
def test_a_run_is_continued_with_its_own_settings(
    change: str, parts: list[str], uninterrupted: Any, data: Path, model_folder: Any, tmp_path: Path
) -> None:
    run = stop_after(uninterrupted("sylva"), 4, tmp_path / "run")
    before = {name: (run / name).read_bytes() for name in files(run)}
    key = change.partition("=")[0]
    words = [word for word in long_run("sylva", model_folder(), data) if not word.startswith(f"{key}=")]
    message = refused(data.parent, *words, change, f"output_dir={run}", "trainer.resume=auto")
    for part in parts:
        assert part in message
    assert {name: (run / name).read_bytes() for name in files(run)} == before


def test_a_run_is_continued_with_other_settings_of_what_it_does_not_train(
    uninterrupted: Any, data: Path, model_folder: Any, tmp_path: Path
) -> None:
    run = stop_after(uninterrupted("s2ft"), 4, tmp_path / "run")
    changes = [
        "chat.temperature=0.5",
        "eval.shots=1",
        "bench.length=32",
        "trainer.checkpointing=full",
        "dataset.name=text",
    ]
    words = [*long_run("s2ft", model_folder(), data), *changes, f"output_dir={run}", "trainer.resume=auto"]
    previous = previous_run(compose("train", words[1:]))
    assert previous is not None and previous.step == 4


def test_a_run_is_continued_on_its_own_data(uninterrupted: Any, data: Path, model_folder: Any, tmp_path: Path) -> None:
    moved = tmp_path / data.name
    lines = data.read_text().splitlines()
    moved.write_text("\n".join([lines[0].replace("2", "3"), *lines[1:]]))
    run = stop_after(uninterrupted("s2ft"), 4, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(data), str(moved)))  # as if the file had changed in place
    message = refused(tmp_path, *long_run("s2ft", model_folder(), moved), f"output_dir={run}", "trainer.resume=auto")
    assert message.startswith("the training examples are not those that the run in ")


def test_a_finished_run_without_its_checkpoints_is_not_trained_over(
    uninterrupted: Any, data: Path, model_folder: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted("s2ft"), run)
    shutil.rmtree(run / "checkpoints")
    before = {name: (run / name).read_bytes() for name in files(run)}
    message = refused(
        data.parent, *long_run("s2ft", model_folder(), data), f"output_dir={run}", "trainer.resume=auto", "seed=1"
    )
    assert message.startswith(f"the run in '{run}' has finished, ")
    assert {name: (run / name).read_bytes() for name in files(run)} == before


def test_what_a_run_is_is_written_once_all_of_it_is_known(
    data: Path, model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new config beside the old environment would speak of other processes than the run had."""
    from sparseft.training.job import folder

    def slow(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "environment", slow)
    sparseft(tmp_path, *long_run("s2ft", model_folder(), data), "output_dir=run", code=130)
    assert files(tmp_path / "run") == set()


# ---- interrupts and failures ----


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_says_where(number: signal.Signals, make_model: Any, tmp_path: Path) -> None:
    trainer = trainer_of(attached(make_model("llama"), "s2ft"), tmp_path, examples(16), max_steps=9,
                         gradient_accumulation=2)  # fmt: skip
    trainer.add_callback(At(3, lambda: os.kill(os.getpid(), number)))
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt) as caught:
        train(trainer, None, 9)
    assert caught.value.last_checkpoint == str(tmp_path / "checkpoints" / "checkpoint-4")
    assert trainer.state.global_step == 4
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("together", [True, False])
def test_a_second_signal_stops_at_once_unless_it_comes_with_the_first(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    if not together:  # instead of waiting for a second
        monkeypatch.setattr(signals, "TOGETHER", 0.0)
    trainer = trainer_of(attached(make_model("llama"), "s2ft"), tmp_path, examples(16), max_steps=9,
                         gradient_accumulation=2)  # fmt: skip
    trainer.add_callback(At(3, twice))
    with pytest.raises(KeyboardInterrupt):
        train(trainer, None, 9)
    saved = last_checkpoint(tmp_path)
    assert trainer.state.global_step == (4 if together else 3) and (saved is not None) == together


def test_an_interrupted_command_exits_130_and_resumes_to_the_same_end(
    data: Path, model_folder: Any, tmp_path: Path
) -> None:
    """A process of its own gets a real Ctrl-C; then the same command with trainer.resume=auto."""
    words = [*on(model_folder(), data), *METHODS["sylva"], "trainer.max_steps=16", "trainer.gradient_accumulation=4"]
    words += ["trainer.logging_steps=1", "trainer.learning_rate=1e-3"]
    sparseft(tmp_path, "train", *words, "output_dir=whole")
    child = subprocess.Popen(
        [sys.executable, "-m", "sparseft", "train", *words, "output_dir=run"],
        cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and child.poll() is None:
        if lines.is_file() and lines.read_text().count('"loss"') >= 2:
            break
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert "SIGINT: finishing the step and saving" in err
    checkpoint = last_checkpoint(tmp_path / "run")
    assert checkpoint is not None and step_of(checkpoint) < 16
    relative = Path(checkpoint).relative_to(tmp_path)
    assert err.splitlines()[-1] == f"error: interrupted. The last good checkpoint is {relative}."
    sparseft(tmp_path, "train", *words, "output_dir=run", "trainer.resume=auto")
    for name, value in tensors(tmp_path / "whole").items():
        assert torch.equal(tensors(tmp_path / "run")[name], value), name
    assert [line.get("loss") for line in metrics(tmp_path / "run")] == [
        line.get("loss") for line in metrics(tmp_path / "whole")
    ]


PLATEAU = "trainer.scheduler=reduce_lr_on_plateau", "trainer.scheduler_args={patience: 0, threshold: 0.5}"
GREEDY = "trainer.scheduler=greedy", "trainer.scheduler_args={min_lr: 1e-6, patience: 0}"


@pytest.mark.parametrize(
    ("at", "words"),
    [
        (4, ["trainer.keep_best=true", "trainer.learning_rate=1.0"]),  # at the best evaluation
        (2, ["trainer.patience=1", "trainer.learning_rate=1.0"]),
        pytest.param(2, list(PLATEAU), marks=pytest.mark.slow),
        pytest.param(2, list(GREEDY), marks=pytest.mark.slow),
    ],
    ids=["best", "patience", "plateau", "greedy"],
)
def test_an_interrupt_in_a_step_that_is_evaluated(
    at: int, words: list[str], data: Path, model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no time for the evaluation then; going on makes it up, and all that it decides."""
    words = [*on(model_folder(), data), *METHODS["s2ft"], "trainer.max_steps=6", "trainer.eval_steps=2",
             "trainer.warmup_steps=0", "trainer.logging_steps=1", *words]  # fmt: skip
    sparseft(tmp_path, "train", *words, "output_dir=whole")
    own = RunCallback.on_step_end

    def interrupted(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.run.interrupted = "SIGINT" if state.global_step == at else None
        own(self, args, state, control, **given)

    def failed(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
        raise RunError("ended before the next checkpoint")

    with monkeypatch.context() as patch:
        patch.setattr(RunCallback, "on_step_end", interrupted)
        sparseft(tmp_path, "train", *words, "output_dir=run", code=130)
    assert [line["step"] for line in metrics(tmp_path / "run") if "eval_loss" in line] == list(range(0, at, 2))
    if "trainer.keep_best=true" in words:
        assert summary(tmp_path / "whole")["best_step"] == at
        with monkeypatch.context() as patch:
            patch.setattr(RunCallback, "on_step_end", failed)
            sparseft(tmp_path, "train", *words, "output_dir=run", "trainer.resume=auto", code=1)
    sparseft(tmp_path, "train", *words, "output_dir=run", "trainer.resume=auto")
    facts = "step loss eval_loss learning_rate".split()
    found, wanted = (
        [{k: line.get(k) for k in facts} for line in metrics(tmp_path / name)] for name in ("run", "whole")
    )
    assert found == wanted
    assert summary(tmp_path / "run").get("best_step") == summary(tmp_path / "whole").get("best_step")
    for name, value in tensors(tmp_path / "whole").items():
        assert torch.equal(tensors(tmp_path / "run")[name], value), name


@pytest.mark.parametrize("words", [[], list(PLATEAU)], ids=["best", "plateau"])
def test_an_interrupt_in_an_evaluation_does_not_wait_for_it(
    words: list[str], data: Path, model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left unrecorded, the step is saved, and going on makes it up."""
    words = [*on(model_folder(), data), *METHODS["s2ft"], "trainer.max_steps=6", "trainer.eval_steps=2",
             "trainer.warmup_steps=0", "trainer.logging_steps=1", "trainer.keep_best=true", *words]  # fmt: skip
    sparseft(tmp_path, "train", *words, "output_dir=whole")
    own, ended = Trainer.held_out_loss, []

    def interrupted(self: Any, data: Any) -> float:
        if self.state.global_step == 4:
            self.run_state.interrupted = "SIGINT"
        loss = own(self, data)
        ended.append(self.state.global_step)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "held_out_loss", interrupted)
        done = sparseft(tmp_path, "train", *words, "output_dir=run", code=130)
    assert ended == [0, 2] and "checkpoint is run/checkpoints/checkpoint-4." in done.err
    assert [line["step"] for line in metrics(tmp_path / "run") if "eval_loss" in line] == [0, 2]
    sparseft(tmp_path, "train", *words, "output_dir=run", "trainer.resume=auto")
    facts = "step loss eval_loss learning_rate".split()
    found, wanted = (
        [{k: line.get(k) for k in facts} for line in metrics(tmp_path / name)] for name in ("run", "whole")
    )
    assert found == wanted and summary(tmp_path / "run")["best_step"] == summary(tmp_path / "whole")["best_step"]
    for name, value in tensors(tmp_path / "whole").items():
        assert torch.equal(tensors(tmp_path / "run")[name], value), name


def test_a_loss_that_is_not_finite_stops_the_run(data: Path, model_folder: Any, tmp_path: Path) -> None:
    words = [*on(model_folder(), data), *METHODS["sylva"], "trainer.max_steps=6", "trainer.save_steps=1"]
    done = sparseft(
        tmp_path, "train", *words, "output_dir=run", "trainer.learning_rate=1e30", "trainer.logging_steps=1", code=1
    )
    (error,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "the evaluation loss is nan at step 6" in error and "try a lower trainer.learning_rate" in error
    assert "There is no good checkpoint of before: no step with the weights of checkpoint-" in error
    assert "warning: step 2: loss nan" in done.err and "training ends with 5 steps whose loss" in done.err
    assert done.out == ""
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "adapter").exists()
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] >= 1


# ---- memory ----


def test_the_peak_starts_again_with_each_run() -> None:
    from sparseft.memory import memory_bytes, reset_peak_memory

    now, size = memory_bytes(CPU, peak=False), 300 << 20
    reset_peak_memory(CPU)
    if memory_bytes(CPU, peak=True) > now + (50 << 20):
        pytest.skip("this system does not let a process reset its peak")
    block = mmap.mmap(-1, size)  # not by malloc, which may have as much that was used before
    np.frombuffer(block, dtype=np.uint8).fill(1)
    assert memory_bytes(CPU, peak=False) >= now + size * 0.9
    block.close()
    assert memory_bytes(CPU, peak=True) >= now + size * 0.9
    assert memory_bytes(CPU, peak=False) < now + size * 0.5
    reset_peak_memory(CPU)
    assert memory_bytes(CPU, peak=True) < now + size * 0.5


def test_the_bases_fingerprint_is_taken_once(in_tmp: Path, model_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the selection's key, which hands it on to the adapter's description."""
    from transformers import AutoModelForCausalLM

    from sparseft.adapters import state
    from sparseft.models.fingerprint import base_fingerprint

    monkeypatch.setattr(state, "base_fingerprints", lambda _: pytest.fail("a second time"))
    words = ["train", *on(model_folder(), write_data(in_tmp)["json"]), "method=s2ft", "trainer.max_steps=1"]
    sparseft(in_tmp, *words, "output_dir=run")
    (description,) = (in_tmp / "run/adapter").glob("*.json")
    base = AutoModelForCausalLM.from_pretrained(model_folder())
    assert json.loads(description.read_text())["base_fingerprint"] == base_fingerprint(base)

"""The best evaluation, `trainer.eval_task` and `trainer.target_score`: against the checkpoints of the same run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparseft.training.average import Average
from sparseft.training.best import Best, Evaluation, evaluations, read_best, without_a_better
from sparseft.training.trainer import Trainer
from support.running import METHODS, files, metrics, on, refused, sparseft, summary, write_data

STEPS = 8


@pytest.mark.parametrize(
    ("new", "old", "better"),
    [
        ((1.0, None), None, True),
        ((1.0, None), (2.0, None), True),
        ((2.0, None), (2.0, None), False),
        ((3.0, None), (2.0, None), False),
        ((3.0, 0.5), (2.0, 0.4), True),  # the score decides, whatever the loss
        ((1.0, 0.4), (2.0, 0.5), False),
        ((1.0, 0.5), (2.0, 0.5), False),
    ],
)
def test_which_evaluation_is_better(new: tuple, old: tuple | None, better: bool) -> None:
    assert Evaluation(2, *new).better_than(Evaluation(1, *old) if old else None) is better


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("runs"))["json"]


# The held-out loss at each step, scripted so that what is best does not hang on the last bits of a sum.
LOSSES = {0: 6.0, 1: 5.0, 2: 4.0, 3: 2.0, 4: 6.0, 5: 7.0, 6: 5.0, 7: 4.5, 8: 4.8}
BEST = 3


@pytest.fixture(autouse=True)
def scripted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "model_folder" in request.fixturenames:
        monkeypatch.setattr(Trainer, "held_out_loss", lambda self, _data: LOSSES[self.state.global_step])


def scripted_run(method: str, model: Path, data: Path, *more: str) -> list[str]:
    """A run with an evaluation and a checkpoint at every step."""
    words = [word for word in on(model, data) if not word.startswith(("trainer.max_steps", "trainer.learning_rate"))]
    words += [*METHODS[method], f"trainer.max_steps={STEPS}", "trainer.eval_steps=1", "trainer.save_steps=1"]
    words += ["trainer.save_total_limit=99", "dataset.max_examples=6", "dataset.eval_fraction=0.5"]
    return ["train", *words, "trainer.learning_rate=1e-2", "trainer.warmup_steps=0", "trainer.keep_best=true", *more]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "adapter").glob("*.safetensors")
    return load_file(file)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["eval_loss"] for line in metrics(run) if "eval_loss" in line}


@pytest.mark.parametrize("method", ["s2ft", "sylva", "lora", "full"])
def test_the_adapter_left_is_that_of_the_lowest_loss(
    method: str, data: Path, model_folder: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    sparseft(data.parent, *scripted_run(method, model_folder(), data), f"output_dir={run}")
    assert losses(run) == LOSSES
    assert summary(run)["best_step"] == BEST and summary(run)["eval_loss_after"] == LOSSES[BEST]
    assert same(adapter(run), adapter(run / "checkpoints" / f"checkpoint-{BEST}"))
    assert not same(adapter(run), adapter(run / "checkpoints" / f"checkpoint-{STEPS}"))


def test_early_evaluations_do_not_count(data: Path, model_folder: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sparseft(data.parent, *scripted_run("s2ft", model_folder(), data, "trainer.best_after=0.75"), f"output_dir={run}")
    assert summary(run)["best_step"] == 7


def test_of_a_longer_run_an_earlier_best_is_none(tmp_path: Path) -> None:
    """Though it has the lower loss: the share of `trainer.best_after` is of more steps now."""
    control, saved = SimpleNamespace(), []

    def evaluated(step: int, loss: float, from_step: int) -> Best:
        best = Best(tmp_path, saved.append, from_step=from_step)
        best.on_evaluate(None, SimpleNamespace(global_step=step, max_steps=8), control, {"eval_loss": loss})
        return best

    evaluated(4, 2.0, from_step=3)
    assert evaluated(5, 1.0, from_step=6).take(None) is None  # and nothing is put into the model
    evaluated(7, 3.0, from_step=6)
    assert len(saved) == 2 and read_best(tmp_path) == Evaluation(7, 3.0)


@pytest.mark.parametrize("step", [1, 5])
def test_a_resumed_run_keeps_the_same_best(step: int, data: Path, model_folder: Any, tmp_path: Path) -> None:
    words = scripted_run("sylva", model_folder(), data)
    whole, run = tmp_path / "whole", tmp_path / "run"
    sparseft(data.parent, *words, f"output_dir={whole}")
    shutil.copytree(whole, run)
    (run / "summary.json").unlink()
    for later in range(step + 1, STEPS + 1):  # as after a crash: the best of a future that did not happen lies there
        shutil.rmtree(run / "checkpoints" / f"checkpoint-{later}")
    sparseft(data.parent, *words, f"output_dir={run}", "trainer.resume=auto")
    assert same(adapter(run), adapter(whole)) and losses(run) == losses(whole)
    assert summary(run)["best_step"] == summary(whole)["best_step"]
    assert files(run) == files(whole)
    # Made to end where it was resumed, its best is the best up to there.
    short = tmp_path / "short"
    shutil.copytree(whole, short)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(short / "checkpoints" / f"checkpoint-{later}")
    sparseft(data.parent, *words, f"trainer.max_steps={step}", f"output_dir={short}", "trainer.resume=auto")
    assert summary(short)["best_step"] == min(range(1, step + 1), key=lambda at: LOSSES[at])


def test_evaluations_leave_training_as_it_is(data: Path, model_folder: Any, tmp_path: Path) -> None:
    """The losses of a method with dropout are the same, however often the run is evaluated."""
    words = ["train", *on(model_folder(), data), *METHODS["lora"], "method.dropout=0.5", "trainer.max_steps=6"]
    words += ["dataset.eval_fraction=0.25", "trainer.logging_steps=1", "trainer.learning_rate=1e-2"]
    seen = []
    for steps, evaluated in ((0, []), (None, [0, 6]), (1, [*range(7)]), (2, [0, 2, 4, 6])):
        run = tmp_path / str(steps)
        more = ["trainer.keep_best=true"] if steps == 2 else []
        sparseft(data.parent, *words, f"trainer.eval_steps={steps or json.dumps(steps)}", *more, f"output_dir={run}")
        seen.append([line["loss"] for line in metrics(run) if "loss" in line])
        assert [line["step"] for line in metrics(run) if "eval_loss" in line] == evaluated
        assert (summary(run)["eval_loss_before"] is None) == (summary(run)["eval_loss_after"] is None) == (steps == 0)
    assert len(seen[0]) == 6 and all(losses == seen[0] for losses in seen)


# ---- a task that judges ----

JUDGED = ("train", "method=s2ft", "sparsity=0.9", "dataset.max_examples=24", "dataset.eval_fraction=0.2", "seed=1",
          "trainer.max_steps=4", "trainer.eval_steps=2", "trainer.gradient_accumulation=1", "trainer.max_length=64",
          "trainer.learning_rate=3e-2", "trainer.warmup_steps=0", "trainer.eval_task=mmlu", "eval.limit=10",
          "trainer.save_steps=2", "trainer.keep_best=true")  # fmt: skip


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the bundled model, judged by the bundled MMLU."""
    folder = tmp_path_factory.mktemp("judged")
    sparseft(folder, *JUDGED, "output_dir=run")
    return folder / "run"


def test_scores_are_those_that_eval_measures(judged: Path) -> None:
    """On the validation split while training, on the test split at the end: each as `sparseft eval` finds it, with its
    standard error."""
    lines = [line for line in metrics(judged) if "eval_score" in line]
    seen = {line["step"]: (line["eval_score"], line["eval_score_stderr"]) for line in lines}
    assert list(seen) == [0, 2, 4]

    def measured(*words: str) -> tuple[float, float]:
        done = sparseft(judged.parent, "eval", "mmlu", "--json", "eval.limit=10", *words)
        return done.json["tasks"]["mmlu"]["accuracy"], done.json["tasks"]["mmlu"]["stderr"]

    assert measured("--base", "eval.split=validation") == seen[0]
    for step in (2, 4):
        checkpoint = f"run/checkpoints/checkpoint-{step}/adapter"
        assert measured("--adapter", checkpoint, "eval.split=validation") == seen[step]
    result = summary(judged)
    best = result["best_step"]
    assert seen[best][0] == max(seen[2][0], seen[4][0]) == result["eval_score_after"]
    assert result["eval_score_before"] == seen[0][0]
    stored = json.loads((judged / "eval" / "mmlu.json").read_text())
    assert stored["tasks"]["mmlu"]["accuracy"] == result["test_score"] and stored["sparseft"]["split"] == "test"
    assert measured("--run", "run") == (result["test_score"], result["test_score_stderr"])


def test_training_ends_at_the_target_and_stays_ended(judged: Path, tmp_path: Path) -> None:
    seen = {line["step"]: line["eval_score"] for line in metrics(judged) if "eval_score" in line}
    target = f"trainer.target_score={seen[2]}"
    done = sparseft(tmp_path, *JUDGED, target, "output_dir=run")
    run = tmp_path / "run"
    assert "step 2: score" in done.err and "reaches trainer.target_score" in done.err
    result = summary(run)
    assert (result["steps"], result["best_step"]) == (2, 2)
    assert same(adapter(run), adapter(judged / "checkpoints" / "checkpoint-2"))
    sparseft(tmp_path, *JUDGED, target, "output_dir=run", "trainer.resume=auto")
    assert summary(run)["steps"] == 2
    sparseft(tmp_path, *JUDGED, "output_dir=run", "trainer.resume=auto")
    assert summary(run)["steps"] == 4  # without an aim it goes on
    assert same(adapter(run), adapter(judged))


def test_an_interrupt_while_a_task_judges_does_not_wait_for_it(
    judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Trainer.measured

    def interrupted(self: Any, data: Any = None) -> dict[str, float]:
        found = own(self, data)
        if self.state.global_step == 2:
            self.run_state.interrupted = "SIGINT"
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "measured", interrupted)
        done = sparseft(tmp_path, *JUDGED, "output_dir=run", code=130)
    assert "checkpoint is run/checkpoints/checkpoint-2." in done.err
    assert [line["step"] for line in metrics(tmp_path / "run") if "eval_loss" in line] == [0]
    sparseft(tmp_path, *JUDGED, "output_dir=run", "trainer.resume=auto")
    scores = [
        [line["eval_score"] for line in metrics(run) if "eval_score" in line] for run in (tmp_path / "run", judged)
    ]
    assert scores[0] == scores[1] and same(adapter(tmp_path / "run"), adapter(judged))


def test_evaluations_without_a_better_one() -> None:
    def since(*losses: float) -> int:
        return without_a_better([Evaluation(step, loss) for step, loss in enumerate(losses)])

    assert [since(), since(2.0), since(2.0, 1.0), since(2.0, 2.0), since(1.0, 2.0, 1.5), since(1.0, 2.0, 0.5)] == [
        0, 0, 0, 1, 2, 0,
    ]  # fmt: skip


def test_the_means_evaluation_counts_for_no_patience(tmp_path: Path) -> None:
    lines = [{"step": step, "eval_loss": loss} for step, loss in ((2, 1.0), (4, 1.1), (6, 1.2))]
    lines.append({"step": 6, "eval_loss": 0.9, "averaged": True})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert without_a_better(evaluations(tmp_path, range(1, 7))) == 2
    assert evaluations(tmp_path, range(1, 7), averaged=True) == [Evaluation(6, 0.9)]


def test_a_run_that_ended_early_with_a_mean_stays_ended(
    data: Path, model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean is better than what ended the training."""
    taken: list[bool] = []
    take, loss = Average.take, Trainer.held_out_loss
    monkeypatch.setattr(Average, "take", lambda self: taken.append(True) or take(self))
    monkeypatch.setattr(Trainer, "held_out_loss", lambda self, given: 0.5 if taken else loss(self, given))
    words = [word for word in scripted_run("s2ft", model_folder(), data) if "keep_best" not in word]
    words += ["trainer.average=ema:0.5", "trainer.patience=2", f"output_dir={tmp_path}/run"]
    sparseft(tmp_path, *words)
    run = tmp_path / "run"
    first = metrics(run)
    seen = [(line["step"], line.get("averaged")) for line in first if "eval_loss" in line]
    assert seen[-2:] == [(5, None), (5, True)]
    assert summary(run)["eval_loss_after"] == 0.5
    taken.clear()
    sparseft(tmp_path, *words, "trainer.resume=auto")
    assert summary(run)["steps"] == 5 and summary(run)["eval_loss_after"] == 0.5
    assert metrics(run) == first


def test_the_steps_before_an_early_end_are_logged(data: Path, model_folder: Any, tmp_path: Path) -> None:
    """Between the lines of metrics, once: also where the run then goes on."""
    words = [*scripted_run("s2ft", model_folder(), data), f"output_dir={tmp_path}/run", "trainer.logging_steps=3"]
    sparseft(tmp_path, *words, "trainer.patience=2")
    run = tmp_path / "run"
    result, lines = summary(run), [line for line in metrics(run) if "loss" in line]
    assert result["steps"] == lines[-1]["step"] == 5
    before = [0, *(line["step"] for line in lines)]
    total = sum(line["loss"] * (line["step"] - last) for line, last in zip(lines, before, strict=False))
    assert total / 5 == pytest.approx(result["train_loss"])
    sparseft(tmp_path, *words, "trainer.resume=auto")
    assert [line["step"] for line in metrics(run) if "loss" in line] == [*before[1:], 6, 8]


def test_training_ends_when_nothing_gets_better_and_stays_ended(tmp_path: Path) -> None:
    """At a rate too small to change a weight; of equal ones the first is what is left."""
    words = [
        "train", "method=s2ft", "trainer.eval_steps=1", "trainer.max_steps=9", "trainer.warmup_steps=0",
        "trainer.gradient_accumulation=1", "trainer.learning_rate=1e-30", "trainer.keep_best=true",
        "trainer.patience=2", "dataset.max_examples=40", "output_dir=run",
    ]  # fmt: skip
    done = sparseft(tmp_path, *words)
    run = tmp_path / "run"
    result = summary(run)
    assert (result["steps"], result["best_step"]) == (3, 1)
    assert "step 3: no better evaluation in the last 2, so training ends" in done.err
    sparseft(tmp_path, *words, "trainer.resume=auto")
    assert summary(run)["steps"] == 3
    sparseft(tmp_path, *words, "trainer.resume=auto", "trainer.patience=null")
    assert summary(run)["steps"] == 9  # with all the time in the world it goes on


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trainer.keep_best=true"], ["trainer.keep_best=true", "trainer.eval_steps"]),
        (["trainer.eval_task=mmlu"], ["trainer.eval_task=mmlu", "trainer.eval_steps"]),
        (["trainer.target_score=0.5", "trainer.eval_steps=1"], ["trainer.target_score=0.5", "trainer.eval_task"]),
        (["trainer.patience=2"], ["trainer.patience=2", "trainer.eval_steps"]),
        (["trainer.patience=2", "trainer.eval_steps=0"], ["trainer.patience=2", "trainer.eval_steps"]),
        (["trainer.target_score=38.1", "trainer.eval_steps=1", "trainer.eval_task=mmlu"], ["38.1", "at most 1"]),
        (["trainer.eval_task=mmul", "trainer.eval_steps=1"], ["mmul", "mmlu"]),
        (["trainer.eval_task=mt_bench", "trainer.eval_steps=1"], ["mt_bench", "judge"]),
        (["trainer.eval_task='mmlu,boolq'", "trainer.eval_steps=1"], ["one task"]),
        (["trainer.eval_task=lm_eval:boolq", "trainer.eval_steps=1"], ["lm_eval:boolq", "validation"]),
        (["trainer.eval_task=boolq", "trainer.eval_steps=1"], ["boolq", "validation"]),  # no such split is bundled
        (["trainer.eval_task=mmlu", "trainer.eval_steps=1", "eval.data_dir=nowhere"], ["nowhere"]),
    ],
    ids=lambda value: "-".join(value),
)
def test_wrong_judges(words: list[str], parts: list[str], in_tmp: Path) -> None:
    said = refused(in_tmp, "train", *words)
    assert all(part in said for part in parts)
    assert {name for name in files(in_tmp) if not name.startswith(".cache/")} == set()  # tokens are kept


def test_wrong_values_are_refused_without_loading(in_tmp: Path) -> None:
    assert "trainer.best_after=1.5" in refused(in_tmp, "train", "trainer.best_after=1.5")

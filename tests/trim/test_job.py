"""`sparseft trim` and `trainer.forget_budget`, on a run of the bundled model that has forgotten its arithmetic."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparseft.adapters.lifecycle import load_adapter
from sparseft.commands.trim import beside, render
from sparseft.compose.run_config import compose, from_dict
from sparseft.data.packing import padding_id
from sparseft.data.sampling import seeded_first
from sparseft.evaluation.held_out import batch_losses, mean_loss
from sparseft.evaluation.target import find_target, prompt_format
from sparseft.files.untrusted import read_yaml_object
from sparseft.models.loading import load_model, load_tokenizer, vocabulary_rows
from sparseft.trim import job
from sparseft.trim.search import Found
from support.running import files, refused, summary
from support.running import sparseft as run

SOURCE = "bundled:data/arithmetic/train.json"
TRAIN = [
    *("train", "dataset=text", "trainer.max_steps=15", "trainer.batch_size=4", "trainer.gradient_accumulation=1"),
    *("trainer.max_length=64", "trainer.warmup_steps=0", "dataset.max_examples=100", "hardware=cpu"),
]
METHODS = {
    "s2ft": ["method=s2ft", "trainer.learning_rate=1e-2"],
    "lora": ["method=lora", "trainer.learning_rate=1e-2"],
}
BUDGET = 0.05
HELD_OUT = 24
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each kind of adapter, `run-<method>`."""
    folder = tmp_path_factory.mktemp("world")
    for name, words in METHODS.items():
        run(folder, *TRAIN, *words, f"output_dir=run-{name}")
    return folder


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer examples than in earnest."""
    monkeypatch.setattr(job, "HELD_OUT", HELD_OUT)


def found_at_once(problem: Any, units: int, *_: Any) -> Found:
    """In `search`'s place where only what becomes of its factors matters."""
    half = torch.full((units,), 0.5, dtype=torch.float64)
    return Found(half, half)


def tensors(adapter: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(adapter / "adapter_model.safetensors")


def test_as_much_is_at_once_as_the_hardware_takes(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    def measured(*_: Any, **options: Any) -> Any:
        made.update(options)
        raise StopIteration

    monkeypatch.setattr(job, "Measured", measured)
    monkeypatch.chdir(world)
    words = ["hardware.micro_batch=2", "hardware=cpu", "trainer.checkpointing=full"]
    one = job.Trimming.find("run-s2ft", compose("trim", words), words, BUDGET, SOURCE)
    with pytest.raises(StopIteration):
        one.run()
    assert (made["batch_size"], made["recomputed"]) == (2, True)


@pytest.fixture(scope="module")
def trimmed(world: Path) -> dict[str, dict[str, Any]]:
    """What trimming each run has printed, its adapter beside it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(job, "HELD_OUT", HELD_OUT)
        words = ["--forget", str(BUDGET), "--source", SOURCE, "--json"]
        return {method: run(world, "trim", f"run-{method}", *words).json for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_written_forgets_what_is_said_and_no_more(
    method: str, world: Path, trimmed: dict[str, dict[str, Any]]
) -> None:
    own = tensors(world / f"run-{method}" / "adapter")
    result = trimmed[method]
    out = world / f"run-{method}-trim-{BUDGET:g}"
    assert result["path"] == out.name and result["trimmed"]
    source, target = result["source"], result["target"]
    assert source["forgetting_before"] > 1.5 * BUDGET
    assert source["forgetting"] <= BUDGET
    assert source["forgetting"] == pytest.approx(source["loss_after"] - source["loss_base"])
    assert target["loss_before"] < target["loss_after"] < target["loss_base"]
    assert target["loss_after"] <= result["one_factor"]["target_loss"]
    said = json.loads((out / "trim.json").read_text())
    assert {key: said[key] for key in result if key in said} == {k: v for k, v in result.items() if k in said}
    assert len(result["mean_factors"]) > 1 and 0 < result["mean_factor"] < 1

    assert all(torch.equal(value, own[key]) for key, value in tensors(world / f"run-{method}" / "adapter").items())
    scaled = tensors(out)
    assert scaled.keys() == own.keys()
    for key, value in own.items():  # each trained value by a factor from 0 to 1
        assert (scaled[key].abs() <= value.abs()).all() and (scaled[key] * value >= 0).all()
    assert any(not torch.equal(scaled[key], value) for key, value in own.items())

    config = from_dict(read_yaml_object(world / f"run-{method}" / "config.yaml"))
    config.cache_dir = str(world / ".cache/sparseft")
    tokenizer = load_tokenizer(config.model)
    rows = job.source_data(config, SOURCE, tokenizer).eval
    rows = [rows[index] for index in seeded_first(HELD_OUT, len(rows), config.seed, "trimming")]
    model: Any = load_adapter(load_model(config.model, CPU), out).eval()
    pad = padding_id(tokenizer, vocabulary_rows(model)[0])
    measured = mean_loss(batch_losses(model, rows, pad, CPU, 4))  # in the order that the batches were measured in
    assert measured == pytest.approx(source["loss_after"], rel=1e-5)


def test_a_trimmed_adapter_is_an_adapter_like_any_other(
    world: Path, trimmed: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = trimmed["s2ft"]["path"]
    evaluated = run(world, "eval", "boolq", "--adapter", adapter, "--limit", "2", "eval.compare_base=false", "--json")
    assert evaluated.json["tasks"]["boolq"]["samples"] == 2
    exported = run(world, "export", adapter, "--format", "patch", "--out", "patched", "--json").json
    assert exported["proof"]["same_answers"] == exported["proof"]["prompts"]
    render(trimmed["s2ft"])
    shown = capsys.readouterr().out
    assert "as trained" in shown and "one factor for all" in shown and f"--adapter {adapter}" in shown


def test_an_adapter_alone_is_asked_as_its_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its dtype, on what it was trained on, in its prompts; whether trimmed or still in its run."""
    words = [*METHODS["s2ft"], "dataset=commonsense", "model.dtype=float32", "trainer.max_steps=1", "output_dir=run"]
    run(tmp_path, *TRAIN, *words)
    run(tmp_path, "trim", "run", "--forget", "9", "--source", SOURCE, "--out", "trimmed")
    monkeypatch.chdir(tmp_path)
    config = compose("eval", [])
    own = find_target(config, run="run", adapter=None, base=False)
    assert own.model.dtype == "float32" and prompt_format("auto", own.told) == "alpaca"
    for adapter in ("run/adapter", "run", "trimmed"):
        found = find_target(config, run=None, adapter=adapter, base=False)
        assert (found.model.path, found.model.dtype) == (own.model.path, "float32")
        assert own.seen is not None and found.seen is not None
        assert len(own.seen) and (found.seen.hashes == own.seen.hashes).all()
        assert prompt_format("auto", found.told) == "alpaca"
        words = ["model.dtype=bfloat16"]
        other = find_target(compose("eval", words), run=None, adapter=adapter, base=False, overrides=words)
        assert other.model.dtype == "bfloat16"


def test_what_is_within_the_budget_stays_as_it_is(world: Path) -> None:
    shown = run(world, "trim", "run-s2ft", "--forget", "9", "--source", SOURCE, "--out", "same").out
    assert "within the budget of 9 as it is" in shown
    assert json.loads((world / "same" / "trim.json").read_text())["trimmed"] is False
    own = tensors(world / "run-s2ft" / "adapter")
    assert all(torch.equal(value, own[key]) for key, value in tensors(world / "same").items())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run-s2ft", "--source", SOURCE], ["--forget is missing"]),
        (["run-s2ft", "--forget", "0.1"], ["--source is missing"]),
        (["run-s2ft", "--forget", "0", "--source", SOURCE], ["--forget 0", "above 0"]),
        (["run-s2ft", "--forget", "-1", "--source", SOURCE], ["--forget -1", "above 0"]),
        (["run-s2ft", "--forget", "nan", "--source", SOURCE], ["--forget nan", "above 0"]),
        (["run-s2ft", "--forget", "0.1", "--source", "shrot.txt"], ["--source", "no file 'shrot.txt'", "short.txt"]),
        (["run-s2ft", "--forget", "0.1", "--source", "short.txt"], ["--source short.txt is too short", "1024"]),
        (["run-s2tf", "--forget", "0.1", "--source", SOURCE], ["no run 'run-s2tf'", "run-s2ft"]),
        (["run-s2ft", "run-lora", "--forget", "0.1", "--source", SOURCE], ["One run at a time: 'run-lora'"]),
        (["run-s2ft", "--forget", "0.1", "--source", SOURCE, "--out", "run-lora"], ["--out run-lora", "already"]),
        (["half", "--forget", "0.1", "--source", SOURCE], ["half", "did not finish"]),
        (["full", "--forget", "0.1", "--source", SOURCE], ["method full", "no sum of parts"]),
        (["dora", "--forget", "0.1", "--source", SOURCE], ["method dora", "no sum of parts"]),
        (
            ["run-s2ft", "--forget", "0.1", "--source", SOURCE, "hardware.num_processes=2"],
            ["hardware.num_processes=2", "one process"],
        ),
    ],
)
def test_wrong_input_is_refused_and_leaves_nothing(words: list[str], expected: list[str], world: Path) -> None:
    (world / "short.txt").write_text("Not much of a text.\n\nBut two paragraphs.\n")
    shutil.copytree(world / "run-s2ft", world / "half", dirs_exist_ok=True)
    shutil.rmtree(world / "half" / "adapter")
    for name in ("full", "dora"):
        if not (world / name).exists():
            run(world, *TRAIN, f"method={name}", "trainer.max_steps=1", f"output_dir={name}", "-q")
    before = {path for path in files(world) if ".cache" not in path}
    message = refused(world, "trim", *words)
    assert all(part in message for part in expected), message
    assert {path for path in files(world) if ".cache" not in path} == before


def test_data_that_have_changed_since_are_refused(world: Path) -> None:
    story = [f"{number} plus 3 is {number + 3}, as anyone who counts knows." for number in range(40)]
    (world / "story.txt").write_text("\n\n".join(story))
    words = [*TRAIN, *METHODS["s2ft"], "dataset.train_path=story.txt", "trainer.max_steps=1", "output_dir=told"]
    run(world, *words)
    (world / "story.txt").write_text("\n\n".join(reversed(story)))
    trimming = ["trim", "told", "--forget", "9", "--source", SOURCE, "--out", "told-trimmed"]
    message = refused(world, *trimming)
    assert message.startswith("the training examples are not those that the run in ")
    assert "did story.txt, the tokenizer or the version of sparseft change? Give the data as they were" in message
    assert not (world / "told-trimmed").exists()
    run(world, *trimming, "dataset.train_path=story.txt", "dataset.max_examples=30")


def test_ctrl_c_leaves_nothing(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = files(world)
    for place in ("search", "write_json"):
        with monkeypatch.context() as patched:
            patched.setattr(job, "search", found_at_once)
            patched.setattr(job, place, stop)
            run(world, "trim", "run-s2ft", "--forget", "0.05", "--source", SOURCE, "--out", "stopped", code=130)
        assert files(world) == before


@pytest.mark.parametrize(("examples", "expected"), [(1, (1, 1)), (2, (1, 1)), (97, (49, 48)), (300, (96, HELD_OUT))])
def test_without_evaluation_examples_the_loss_is_measured_on_others(examples: int, expected: tuple[int, int]) -> None:
    data: Any = SimpleNamespace(train=range(examples), eval=None)
    calibration, rows = job.of_target(data, seed=0)
    assert (len(calibration), len(rows)) == expected
    assert examples == 1 or not {*calibration} & {*rows}
    data.eval = range(1000, 1010)
    assert (len(job.of_target(data, seed=0)[0]), sorted(job.of_target(data, seed=0)[1])) == (
        min(examples, 96),
        [*data.eval],
    )


def test_where_it_is_written() -> None:
    assert beside(Path("outputs/a"), 0.02) == Path("outputs/a-trim-0.02")
    assert beside(Path("."), 1.0).name.endswith("-trim-1")


# ---- at the end of a run ----

AT_THE_END = [f"trainer.forget_budget={BUDGET}", f"trainer.forget_source={SOURCE}"]


def test_a_run_with_a_budget_leaves_both_adapters(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*TRAIN, *METHODS["s2ft"], *AT_THE_END, "output_dir=budgeted"]
    done = run(world, *words)
    folder = world / "budgeted"
    assert "trim: forgets" in done.out
    trim = summary(folder)["trim"]
    assert trim["trimmed"] and trim["source"]["forgetting"] <= BUDGET
    as_trained, trimmed = tensors(folder / "adapter-untrimmed"), tensors(folder / "adapter")
    untouched = tensors(world / "run-s2ft" / "adapter")  # the same run without a budget
    assert all(torch.equal(value, untouched[key]) for key, value in as_trained.items())
    assert any(not torch.equal(value, trimmed[key]) for key, value in as_trained.items())
    assert json.loads((folder / "adapter" / "trim.json").read_text())["budget"] == BUDGET
    assert summary(folder)["eval_loss_after"] == summary(world / "run-s2ft")["eval_loss_after"]

    monkeypatch.setattr(job, "search", found_at_once)
    run(world, *words, "trainer.resume=auto", "trainer.max_steps=16", "-q")  # from the checkpoint, which is untrimmed
    again = tensors(folder / "adapter-untrimmed")
    assert any(not torch.equal(value, as_trained[key]) for key, value in again.items())
    on = [*TRAIN, *METHODS["s2ft"], "output_dir=budgeted", "trainer.resume=auto", "trainer.max_steps=17", "-q"]
    run(world, *on)  # without a budget: what it left before is of another adapter
    assert not (folder / "adapter-untrimmed").exists() and "trim" not in summary(folder)
    run(world, *TRAIN, *METHODS["s2ft"], "output_dir=budgeted", "overwrite=true", "trainer.max_steps=1", "-q")
    assert not (folder / "adapter-untrimmed").exists() and not (folder / "adapter" / "trim.json").exists()


def test_ctrl_c_while_trimming_leaves_the_finished_run(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "search", stop)
    done = run(world, *TRAIN, *METHODS["s2ft"], *AT_THE_END, "output_dir=stopped", code=130)
    assert "its adapter is as it was trained" in done.err
    own = tensors(world / "run-s2ft" / "adapter")
    assert all(torch.equal(value, own[key]) for key, value in tensors(world / "stopped" / "adapter").items())
    assert "trim" not in summary(world / "stopped") and not (world / "stopped" / "adapter-untrimmed").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([AT_THE_END[0]], ["trainer.forget_budget needs trainer.forget_source=FILE"]),
        ([AT_THE_END[1]], ["trainer.forget_source needs trainer.forget_budget=NATS"]),
        ([*AT_THE_END, "trainer.forget_budget=0"], ["trainer.forget_budget=0", "more than 0"]),
        ([AT_THE_END[0], "trainer.forget_source=none.txt"], ["trainer.forget_source", "no file 'none.txt'"]),
        ([AT_THE_END[0], "trainer.forget_source=tiny.txt"], ["trainer.forget_source tiny.txt is too short"]),
        ([*AT_THE_END, "method=full"], ["trainer.forget_budget=0.05", "method full", "no sum of parts"]),
        ([*AT_THE_END, "method=dora"], ["method dora", "no sum of parts"]),
        ([*AT_THE_END, "hardware.num_processes=2"], ["a run trims in one process", "sparseft trim RUN"]),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused_before_training(
    words: list[str], expected: list[str], tmp_path: Path
) -> None:
    (tmp_path / "tiny.txt").write_text("Not much of a text.\n\nBut two paragraphs.\n")
    message = refused(tmp_path, *TRAIN, *words, "output_dir=never")
    assert all(part in message for part in expected), message
    assert not (tmp_path / "never").exists()

"""`sparseft bench time`: its curves are those of the runs, and its times what the steps until the loss take."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparseft.bench import time_to_loss
from sparseft.bench.time_to_loss import Study, at_edge, compare, median_batch, reached, seconds_at, step_error, verdict
from sparseft.compose.run_config import compose, from_dict
from sparseft.data.loading import load_datasets
from sparseft.data.packing import Collator
from sparseft.errors import Diverged, RunError
from sparseft.files.untrusted import read_yaml_object
from sparseft.models import mixed_precision
from sparseft.models.loading import load_tokenizer
from sparseft.models.mixed_precision import AUTOCAST
from support.running import refused, sparseft

STUDY = ("bench", "time", "dataset.max_examples=80", "trainer.max_steps=4", "trainer.eval_steps=2",
         "trainer.batch_size=4", "trainer.max_length=64", "bench.seeds=2", "bench.rates=[1e-3,3e-2]", "bench.steps=3",
         "bench.warmup_steps=1", "output_dir=out",
         "bench.variants=['LoRA: method=lora method.dropout=0','S2FT: method=s2ft method.roles=[o,down] "
         "method.importance=gradient method.num_samples=4 method.reselect_steps=2 "
         "method.reselect_by=calibration']")  # fmt: skip


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("time")
    return folder, sparseft(folder, *STUDY, "--json").json


def run_of(folder: Path, variant: str, rate: float, seed: int, kind: str = "runs") -> Path:
    return folder / "out" / kind / f"{variant.lower()}-lr-{rate:g}-seed{seed}"


def losses_of(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]


def test_curves_are_the_runs_at_the_rate_that_another_split_chose(studied: tuple[Path, dict[str, Any]]) -> None:
    folder, result = studied
    assert result["seeds"] == [0, 1] and list(result["variants"]) == ["LoRA", "S2FT"]
    for variant, entry in result["variants"].items():
        losses = []
        for rate in (1e-3, 3e-2):
            summary = json.loads((run_of(folder, variant, rate, 2, "rates") / "summary.json").read_text())
            assert summary["seed"] == 2  # not one that is reported
            losses.append([rate, summary["eval_loss_after"]])
        assert entry["rate_losses"] == losses and entry["rate"] == min(losses, key=lambda each: each[1])[0]
        for seed in result["seeds"]:
            curve = losses_of(run_of(folder, variant, entry["rate"], seed))
            assert [tuple(each) for each in entry["curves"][seed]] == curve and [at for at, _ in curve] == [0, 2, 4]
    others = {tuple(path.name.split("-lr-")) for path in (folder / "out/runs").iterdir()}
    assert len(others) == 4  # a rate each


def test_times_are_steps_until_the_first_variant_s_last_loss(studied: tuple[Path, dict[str, Any]]) -> None:
    """Oracle: the curve filled with 10,001 points, of which the first one below the loss is looked for."""
    folder, result = studied
    reference = result["variants"]["LoRA"]
    for entry in result["variants"].values():
        for seed in (0, 1):
            at, losses = zip(*entry["curves"][seed], strict=True)
            fine = np.linspace(0, 4, 10_001)
            below = np.flatnonzero(np.interp(fine, at, losses) <= reference["curves"][seed][-1][1] + 1e-12)
            steps = entry["steps_to_loss"][seed]
            assert (steps is None) == (len(below) == 0)
            if steps is not None:
                assert steps == pytest.approx(fine[below[0]], abs=1e-3)
                again = 1 if entry["reselect_steps"] and steps > 2 else 0
                chosen = entry["selection_seconds"][seed] + again * entry["reselection_seconds"][seed]
                assert entry["seconds_to_loss"][seed] == pytest.approx(steps * entry["step_seconds"] + chosen)
                assert entry["ratios"][seed] == entry["seconds_to_loss"][seed] / reference["seconds_to_loss"][seed]
    assert reference["ratios"] == [1.0, 1.0] and reference["selection_seconds"] == [0.0, 0.0]
    s2ft = result["variants"]["S2FT"]
    assert min(s2ft["selection_seconds"]) > 0 and min(s2ft["reselection_seconds"]) > 0
    assert (folder / "out/time-to-loss.svg").read_text().startswith("<svg")
    assert "| S2FT | " in (folder / "out/bench.md").read_text()


def test_an_interrupted_study_goes_on_with_what_is_missing(studied: tuple[Path, dict[str, Any]]) -> None:
    folder, result = studied
    runs = sorted((folder / "out").glob("r*s/*/metrics.jsonl"))
    before = {run: run.stat().st_mtime_ns for run in runs}
    gone = run_of(folder, "S2FT", result["variants"]["S2FT"]["rate"], 1)
    (gone / "summary.json").unlink()
    again = sparseft(folder, *STUDY, "--json").json
    assert {run for run in runs if run.stat().st_mtime_ns != before[run]} == {gone / "metrics.jsonl"}
    for variant, entry in again["variants"].items():
        assert entry["curves"] == result["variants"][variant]["curves"]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    lora = "LoRA: method=lora"
    for words, text in (
        ([f"bench.variants=['{lora}','lora: method=s2ft']"], "'lora': its folders would be those of 'LoRA'"),
        ([f"bench.variants=['{lora}','S2FT: method=s2ft model.dtype=bfloat16']"], "'S2FT': it sets model.dtype"),
        ([f"bench.variants=['{lora}','S2FT: method=s2ft dataset.max_examples=3']"], "it sets dataset.max_examples"),
        ([f"bench.variants=['{lora}','S2FT: method=s2ft trainer.checkpointing=selective']"], "runs plain steps only"),
        (["trainer.eval_steps=null"], "give trainer.eval_steps"),
        (["dataset.eval_fraction=0"], "give dataset.eval_fraction"),
        (
            [f"bench.variants=['{lora}','S2FT: method=s2ft method.reselect_steps=2']"],
            "'S2FT': method.reselect_by=running",
        ),
        (
            [f"bench.variants=['{lora}','mean: method=lora trainer.average=last:0.5']"],
            "'mean': trainer.average=last:0.5",
        ),
        (
            [f"bench.variants=['{lora}','SGD: method=lora trainer.optimizer=sgd']"],
            "'SGD': trainer.optimizer=sgd: the steps that a benchmark times are AdamW's",
        ),
        (["trainer.label_smoothing=0.1"], "trainer.label_smoothing=0.1: no step that a benchmark times has it"),
        (["trainer.keep_best=true"], "trainer.keep_best looks at the held-out examples"),
    ):
        assert text in refused(tmp_path, "bench", "time", *words)
    assert not list(tmp_path.iterdir())


def test_the_step_is_timed_of_the_weights_that_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full training of a 16-bit checkpoint has fp32 weights, and products in bf16 where the device is fast at them."""
    words = ["model.dtype=bfloat16", "dataset=commonsense", "dataset.max_examples=20", "trainer.batch_size=2",
             "trainer.gradient_accumulation=3", "hardware.micro_batch=1", "trainer.max_length=64",
             "bench.steps=1", "bench.warmup_steps=0", f"cache_dir={tmp_path}"]  # fmt: skip
    methods = {"full": ["method=full"], "as stored": ["method=full", "method.dtype=model"], "LoRA": ["method=lora"]}
    configs = {name: compose("bench", [*words, *own]) for name, own in methods.items()}
    seen: dict[str, tuple[torch.dtype, bool]] = {}
    at_once: set[tuple[int, int]] = set()

    def step(made: Any, batch: Any, accumulation: int, clipped: float) -> None:
        at_once.add((len(batch["input_ids"]), accumulation))
        own = next(p for p in made.model.parameters() if p.requires_grad or made.is_floor)
        seen[made.name] = own.dtype, hasattr(made.model.forward, AUTOCAST)

    monkeypatch.setattr(time_to_loss, "step", step)
    for fast in ((), ("cpu",)):
        monkeypatch.setattr(mixed_precision, "HALF_IS_FAST", fast)
        time_to_loss.step_seconds(configs, configs["full"])
        assert seen["full"] == (torch.float32, bool(fast)) and seen["as stored"] == (torch.bfloat16, bool(fast))
        assert seen["floor"] == (torch.bfloat16, False) and not seen["LoRA"][1]
    assert at_once == {(1, 6)}


@pytest.mark.parametrize(("setting", "norm"), [(1.0, 1.0), (0.25, 0.25), (0.0, math.inf)])
def test_the_timed_step_clips_as_training_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: float, norm: float
) -> None:
    """Which takes the norm of the gradient in any case."""
    words = ["dataset=commonsense", "dataset.max_examples=20", "trainer.batch_size=2", "trainer.max_length=64",
             f"trainer.max_grad_norm={setting}", "bench.steps=1", "bench.warmup_steps=0", "method=lora",
             f"cache_dir={tmp_path}"]  # fmt: skip
    seen = []

    def clip(parameters: Any, most: float) -> None:
        assert any(parameter.grad is not None for parameter in parameters)
        seen.append(most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    config = compose("bench", words)
    time_to_loss.step_seconds({"LoRA": config}, config)
    assert set(seen) == {norm}


def test_reached_interpolates_and_takes_the_first_time() -> None:
    curve = [(0, 4.0), (10, 2.0), (20, 3.0), (30, 1.0)]
    assert reached(curve, 2.0) == 10 and reached(curve, 3.0) == 5 and reached(curve, 1.5) == 27.5
    assert reached(curve, 4.5) == 0 and reached(curve, 0.9) is None


def test_choosing_counts_until_the_step_is_done() -> None:
    entry = {"step_seconds": 2.0, "selection_seconds": [5.0], "reselect_steps": 10, "reselection_seconds": [3.0]}
    for steps, times in ((4.0, 0), (10.0, 0), (10.5, 1), (20.0, 1), (25.0, 2)):
        assert seconds_at(entry, 0, steps) == 2 * steps + 5 + 3 * times
    assert seconds_at(entry | {"reselect_steps": 0}, 0, 25.0) == 55


@pytest.mark.parametrize("choosing", [0.0, 5.0])
def test_a_reference_that_learns_nothing_is_no_measure(choosing: float) -> None:
    entry = {"step_seconds": 2.0, "selection_seconds": [choosing], "reselect_steps": 0, "reselection_seconds": [0.0],
             "step_error": 0.0}  # fmt: skip
    for last in (5.0, math.nan):
        found: dict[str, Any] = {name: entry | {"curves": [[(0, 4.0), (10, loss)]]} for name, loss in
                                 (("LoRA", last), ("S2FT", 3.0))}  # fmt: skip
        compare(found)
        for each in found.values():
            assert each["ratios"] == [None] and each["verdict"] == "LoRA ends no lower than it began"


def test_the_edge_is_that_of_the_rates_whatever_their_order() -> None:
    for best, expected in ((1e-4, True), (1e-2, True), (1e-3, False)):
        assert at_edge(best, [1e-3, 1e-2, 1e-4]) is expected
    assert not at_edge(1e-3, [1e-3, 1e-4]) and not at_edge(None, [])


def study_of(folder: Path, rates: str, summaries: dict[float, dict[str, Any]]) -> Study:
    """A study whose trainings end as `summaries` say, by rate, without having run."""
    words = ["dataset=commonsense", "trainer.eval_steps=2", f"bench.rates={rates}", "bench.seeds=1"]
    config = compose("bench", words)

    def train(trial: Any) -> dict[str, Any]:
        assert not Path(trial.cache_dir).exists()
        summary = summaries[trial.trainer.learning_rate]
        if isinstance(summary, Exception):
            raise summary
        return summary

    return Study(config, words, [], folder, {"S2FT": ["method=s2ft"]}, train)


def test_a_rate_whose_loss_is_no_number_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_to_loss, "curve_of", lambda run: [])
    rest = {"learning_rate": 0.1, "trainable_parameters": 1, "steps": 1, "selection_seconds": None}
    rest["reselection_seconds"] = None
    losses = {0.3: math.nan, 0.1: 2.0, 0.2: 3.0}
    study = study_of(tmp_path, "[0.3,0.1,0.2]", {rate: rest | {"eval_loss_after": x} for rate, x in losses.items()})
    assert time_to_loss._trained(study, "S2FT")["rate"] == 0.1


def test_a_rate_that_diverges_drops_out_and_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time_to_loss, "curve_of", lambda run: [])
    rest = {"learning_rate": 0.1, "trainable_parameters": 1, "steps": 1, "selection_seconds": None}
    rest |= {"reselection_seconds": None, "eval_loss_after": 2.0}
    ends: dict[float, Any] = {0.3: Diverged("the loss is nan."), 0.1: rest}
    assert time_to_loss._trained(study_of(tmp_path, "[0.3,0.1]", ends), "S2FT")["rate"] == 0.1
    assert "s2ft-lr-0.3-seed1 diverged and drops out: the loss is nan." in capsys.readouterr().err
    ends[0.3] = AssertionError("trained again")
    found = time_to_loss._trained(study_of(tmp_path, "[0.3,0.1]", ends), "S2FT")
    assert found["rate"] == 0.1 and math.isnan(dict(found["rate_losses"])[0.3])
    ends[0.2] = Diverged("it is inf.")
    with pytest.raises(RunError, match=r"^the loss is nan\.$"):
        time_to_loss._trained(study_of(tmp_path, "[0.3,0.2]", ends), "S2FT")
    with pytest.raises(Diverged):  # there is nothing to choose from
        time_to_loss._trained(study_of(tmp_path, "[0.2]", ends), "S2FT")


def test_a_variant_whose_step_raises_has_its_curves_and_no_times(
    studied: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = studied
    plain = time_to_loss.step

    def step(made: Any, *rest: Any) -> Any:
        if made.name == "S2FT":
            raise MemoryError("too little")
        return plain(made, *rest)

    monkeypatch.setattr(time_to_loss, "step", step)
    done = sparseft(folder, *STUDY, "--json", code=1)
    lora, s2ft = done.json["variants"].values()
    assert "Failed while measured: the step of S2FT (MemoryError: too little)" in done.err
    assert s2ft["curves"] == result["variants"]["S2FT"]["curves"] and s2ft["seconds_to_loss"] == [None, None]
    assert s2ft["step_failed"] == "MemoryError: too little" and s2ft["verdict"] == "the step of S2FT failed"
    assert not [key for key in s2ft if key.startswith("step_s") or key in ("step_floors", "step_error")]
    assert lora["step_seconds"] > 0 and lora["ratios"] == [1.0, 1.0]
    assert "S2FT: its step failed, so it has no times: MemoryError: too little" in (folder / "out/bench.md").read_text()


def test_without_the_first_ones_step_there_are_no_ratios() -> None:
    entry = {"step_seconds": 2.0, "selection_seconds": [0.0], "reselect_steps": 0, "reselection_seconds": [0.0]}
    found: dict[str, Any] = {name: entry | {"curves": [[(0, 4.0), (10, 3.0)]]} for name in ("LoRA", "S2FT")}
    found["LoRA"]["step_failed"] = "no memory"
    compare(found)
    assert [each["ratios"] for each in found.values()] == [[None], [None]]
    assert [each["verdict"] for each in found.values()] == ["the step of LoRA failed"] * 2
    assert found["S2FT"]["seconds_to_loss"] == [20.0]


def test_a_selection_of_an_interrupted_training_takes_its_time_again(tmp_path: Path) -> None:
    study = study_of(tmp_path, "[]", {0.1: {"seed": 0}})
    trial = study.trial("S2FT", 0, 0.1)
    Path(trial.config.cache_dir, "selections").mkdir(parents=True)
    assert study.summary(trial) == {"seed": 0}


def test_verdicts_need_three_seeds_and_an_interval_apart_from_one() -> None:
    assert verdict([0.5, 0.51, 0.49]) == "faster" and verdict([1.5, 1.6, 1.55]) == "slower"
    assert verdict([0.5, 1.5, 0.9]) == "cannot tell" and verdict([0.5, 0.5]) == "cannot tell from 2 seeds"
    assert verdict([0.5, None, 0.5]) == "gets there with 2 of 3 seeds" and verdict([None]) == "does not get there"
    mean, half = 0.9, 4.303 * 0.1 / math.sqrt(3)  # by hand: 0.8, 0.9, 1.0 do not tell
    assert mean + half > 1 and verdict([0.8, 0.9, 1.0]) == "cannot tell"


@pytest.mark.parametrize("packing", [False, True])
def test_the_batch_is_the_median_one(packing: bool, studied: tuple[Path, dict[str, Any]]) -> None:
    """Oracle: all batches made, their widths and labels counted."""
    words = ["model=tiny", "dataset=commonsense", "dataset.max_examples=50", "trainer.batch_size=3",
             "trainer.max_length=128", f"dataset.packing={str(packing).lower()}"]  # fmt: skip
    config = compose("train", words)
    tokenizer = load_tokenizer(config.model)
    data = load_datasets(
        config.dataset, tokenizer, max_length=128, seed=0, bundled=True, cache_dir=str(studied[0] / "cache")
    )
    rows: Any = data.packed if packing else data.train
    each = [rows[i] for i in range(len(rows))]
    batches = [Collator(0)(each[i : i + 3]) for i in range(0, len(each) - 2, 3)]
    widths = sorted(batch["input_ids"].shape[1] for batch in batches)
    config.cache_dir = str(studied[0] / "cache")
    found = median_batch(config, tokenizer, 0)
    width = widths[(len(widths) - 1) // 2]
    labels = sorted(int((b["labels"] != -100).sum()) for b in batches if b["input_ids"].shape[1] == width)
    assert found["input_ids"].shape == (3, width)
    assert int((found["labels"] != -100).sum()) == labels[(len(labels) - 1) // 2]


def test_the_settings_of_a_run_are_the_variant_s(studied: tuple[Path, dict[str, Any]]) -> None:
    folder, result = studied
    run = run_of(folder, "S2FT", result["variants"]["S2FT"]["rate"], 1)
    config = from_dict(read_yaml_object(run / "config.yaml"))
    assert (config.seed, config.method.reselect_steps, config.trainer.eval_steps) == (1, 2, 2)
    assert config.trainer.learning_rate == result["variants"]["S2FT"]["rate"]


def test_what_a_step_takes_has_an_error_of_its_own() -> None:
    """All seeds have one measurement of it in common: of two variants that take the same steps it is all there is."""
    same = step_error([1.00, 1.02, 0.97, 1.01], [1.0, 1.0, 1.0, 1.0])
    assert same == pytest.approx(3.182 * np.std([1.00, 1.02, 0.97, 1.01], ddof=1) / 2)  # by hand: t of three degrees
    assert verdict([0.997] * 3, same) == "cannot tell" and verdict([0.9] * 3, same) == "faster"
    assert step_error([3.0, 6.0], [1.0, 2.0]) == 0  # a machine that became slower
    assert verdict([0.9] * 3, step_error([1.0], [1.0])) == "cannot tell"  # one turn says nothing

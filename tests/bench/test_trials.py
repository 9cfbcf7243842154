"""Variants × seeds as ordinary runs: which of what lies in a benchmark's folder is taken, refused or trained again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparseft.bench import fusion, time_to_loss
from sparseft.bench.quality import variants
from sparseft.bench.trials import Trial, check_trial, finished, rates_of_seeds, shown_rates, summary_of
from sparseft.compose.run_config import compose
from sparseft.errors import Diverged, UserError

WORDS = ["dataset=commonsense", "trainer.eval_steps=2", "bench.rates=[0.1,0.2]", "bench.seeds=1"]
VARIANTS = "bench.variants=['LoRA: method=lora','S2FT: method=s2ft']"
SKILLS = "bench.skills=['gsm8k: dataset=arithmetic','boolq: dataset=commonsense']"


def has_run(trial: Trial) -> None:
    """Leaves what a run with the trial's settings does."""
    folder = Path(str(trial.config.output_dir))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(trial.config.to_dict()))
    (folder / "summary.json").write_text("{}")


def untrained(_config: Any) -> Any:
    raise AssertionError("trained")


def trial_of(folder: Path, *words: str) -> Trial:
    config = compose("train", [*WORDS[:1], "method=s2ft", *words])
    config.method = dataclasses.replace(config.method, exclude=[str(folder / "runs/first")])
    config.output_dir = str(folder / "runs/second")
    return Trial("second", 0, config)


def test_a_folder_that_was_moved_or_is_named_otherwise_holds_the_same_runs(in_tmp: Path) -> None:
    """Also runs that leave out what another one in the folder trains."""
    has_run(trial_of(Path("there")))
    assert finished(trial_of(Path("there"))) == finished(trial_of(in_tmp / "there")) == {}
    Path("there").rename("elsewhere")
    assert finished(trial_of(Path("elsewhere"))) == finished(trial_of(in_tmp / "elsewhere")) == {}
    with pytest.raises(UserError, match="holds a run with other settings"):
        finished(trial_of(Path("elsewhere"), "trainer.max_steps=3"))
    other = trial_of(Path("elsewhere"))
    other.config.method = dataclasses.replace(other.config.method, exclude=["elsewhere/runs/third"])
    with pytest.raises(UserError, match="holds a run with other settings"):
        finished(other)


def test_how_a_trial_was_started_is_no_other_setting(tmp_path: Path) -> None:
    """A run's `config.yaml` says neither; those of earlier versions did."""
    for words in ([], ["overwrite=true"]):
        trial = trial_of(tmp_path / str(len(words)), *words)
        has_run(trial)
        again = trial_of(tmp_path / str(len(words)), "overwrite=true", "trainer.resume=auto")
        assert finished(again) == {}


@pytest.mark.parametrize(
    ("words", "same"), [(["dataset.train_path=a.json"], True), (["dataset.mix=[a.json,b.json]"], True), ([], False)]
)
def test_what_ones_own_data_are_called_is_no_other_setting(words: list[str], same: bool, tmp_path: Path) -> None:
    """Of data without `dataset=` runs of earlier versions say commonsense. A name that says what is read counts."""
    trial = trial_of(tmp_path, *words)
    has_run(trial)
    trial.config.dataset.name = "json"
    if same:
        assert finished(trial) == {}
        return
    with pytest.raises(UserError, match="holds a run with other settings"):
        finished(trial)


def test_a_training_that_diverged_is_not_done_again(tmp_path: Path) -> None:
    trial = trial_of(tmp_path)

    def train(_config: Any) -> Any:
        raise Diverged("the loss is nan.")

    with pytest.raises(Diverged, match=r"^the loss is nan\.$"):
        summary_of(trial, train)
    with pytest.raises(Diverged, match=r"^second diverged before, .* unless .*second is deleted: the loss is nan\.$"):
        summary_of(trial, untrained)
    (tmp_path / "runs/second/diverged.json").unlink()
    assert summary_of(trial, lambda _: {"seed": 0}) == {"seed": 0}


@pytest.mark.parametrize(
    ("plan", "words", "place"),
    [
        (time_to_loss.Study.plan, [], lambda study: study.trial("S2FT", 1, 0.2, choosing=True)),
        (time_to_loss.Study.plan, [], lambda study: study.trial("S2FT", 0, 0.2)),
        (fusion.Study.plan, [SKILLS, "dataset.eval_fraction=0.1"], lambda study: study.trial("S2FT", "boolq", 0, 0.2)),
    ],
)
def test_runs_with_other_settings_are_refused_before_the_first_training(
    plan: Callable[..., Any], words: list[str], place: Callable[[Any], Trial], tmp_path: Path
) -> None:
    words = [*WORDS, VARIANTS, *words]

    def planned(*more: str) -> Any:
        return plan(compose("bench", [*words, *more]), [*words, *more], [], tmp_path, untrained)

    has_run(place(planned("trainer.max_steps=3")))
    planned("trainer.max_steps=3")
    with pytest.raises(UserError, match="'S2FT': .* holds a run with other settings"):
        planned("trainer.max_steps=4")


def test_nothing_is_decided_by_the_examples_that_are_reported() -> None:
    config = compose("train", ["dataset.eval_fraction=0.1"])
    plain = config.trainer
    check_trial(config, "quality")
    looking: dict[str, dict[str, Any]] = {
        "keep_best": {"keep_best": True},
        "patience": {"patience": 2},
        "scheduler=greedy": {"scheduler": "greedy"},
        "scheduler=reduce_lr_on_plateau": {"scheduler": "reduce_lr_on_plateau"},
        "forget_budget": {"forget_budget": 0.1, "forget_source": "source.txt"},
    }
    for name, settings in looking.items():
        config.trainer = dataclasses.replace(plain, eval_steps=2, **settings)
        with pytest.raises(UserError, match=rf"^trainer\.{name} looks at the held-out .* bench quality reports"):
            check_trial(config, "quality")
        config.trainer = dataclasses.replace(config.trainer, eval_task="boolq")
        if name in ("keep_best", "patience"):  # by another task's score, but for bench front
            check_trial(config, "quality")
        with pytest.raises(UserError, match=rf"^trainer\.{name} looks at the held-out .* bench front reports"):
            check_trial(config, "front", by_score=False)
    config.trainer, config.dataset.eval_fraction = plain, 0.0
    with pytest.raises(UserError, match=r"^bench quality needs held-out examples: give dataset\.eval_fraction or"):
        check_trial(config, "quality")


def test_a_rate_that_each_seed_has_found_is_shown_for_each() -> None:
    assert rates_of_seeds([0.1, 0.1]) == {"learning_rate": 0.1, "learning_rates": [0.1, 0.1]}
    rest = {"eval_loss_after": 1.0, "eval_loss_before": 2.0, "train_loss": 1.0, "trainable_parameters": 1}
    summaries = [rest | {"train_seconds": 1.0, "learning_rate": rate} for rate in (0.01, 0.02, 0.01)]
    trials = [Trial("auto", seed, None) for seed in range(3)]  # type: ignore[arg-type]
    row = variants(trials, summaries)["auto"]
    assert row["learning_rate"] is None and row["learning_rates"] == [0.01, 0.02, 0.01]
    assert shown_rates(row) == "0.01, 0.02"

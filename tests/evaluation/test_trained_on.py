"""Which tasks a run was trained for: one answer, which the model card and the report give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparseft.compose.run_config import compose
from sparseft.evaluation.trained_on import trained_for
from sparseft.publish.facts import facts_of
from sparseft.report.run_data import read_run
from support import adapted
from support.published import finished_run

GROUP = {"own": ["a", "b"], "a": [], "b": [], "c": []}


def of(tasks: dict[str, list[str]], **config: Any) -> set[str]:
    return trained_for(config, {}, {}, tasks)


@pytest.mark.parametrize(
    ("tasks", "config", "expected"),
    [
        # trainer.eval_task, of whatever the data are
        ({"mmlu": [], "boolq": []}, {"trainer": {"eval_task": "boolq"}, "dataset": {"name": "json"}}, {"boolq"}),
        ({"mmlu": [], "boolq": []}, {"trainer": {"eval_task": "commonsense"}}, {"boolq"}),
        # members that were asked alone, of a group that was not
        ({"boolq": [], "gsm8k": []}, {"dataset": {"name": "commonsense"}}, {"boolq"}),
        ({"mmlu_virology": []}, {"dataset": {"name": "json", "train_path": "mmlu.json"}}, {"mmlu_virology"}),
        # groups, whole and in part
        (GROUP, {"dataset": {"name": "own"}}, {"own", "a", "b"}),
        (GROUP, {"dataset": {"name": "a"}}, {"own", "a"}),
        ({"commonsense": [], "arithmetic": []}, {"dataset": {"train_path": "google/boolq"}}, {"commonsense"}),
        ({"mmlu": [], "mmlu_stem": []}, {"trainer": {"eval_task": "mmlu_virology"}}, {"mmlu"}),
        ({"mmlu": [], "mmlu_stem": []}, {"dataset": {"train_path": "own.json"}}, set()),
        # a group of which a part was found, and another one was asked alone
        ({"commonsense": ["piqa"], "boolq": []}, {"dataset": {"name": "commonsense"}}, {"commonsense", "boolq"}),
        *(
            ({"arithmetic": []}, {"dataset": {"train_path": path}}, {"arithmetic"} if counts else set())
            for path, counts in {
                "/home/me/gsm8k-exp/medical.jsonl": False,
                "/home/me/gsm8k/data/train.jsonl": False,
                "/home/me/own/gsm8k.jsonl": True,
                "gsm8k/train.json": True,
                "/data/gsm8k/train-00000-of-00002.parquet": True,
                "C:\\data\\gsm8k\\0001.jsonl": True,
                "data/gsm8k/*.jsonl": True,
                "data/gsm8k/": True,
                "openai/gsm8k:main (train)": True,
                "bundled:data/arithmetic/train.json": True,
            }.items()
        ),
        ({"arithmetic": []}, {"dataset": {"mix": ["gsm8k/train.json:0.7", "gsm8k-exp/own.json:0.3"]}}, {"arithmetic"}),
        ({"arithmetic": []}, {"dataset": {"mix": ["gsm8k-exp/own.json:0.7", "b.json:0.3"]}}, set()),
    ],
)  # fmt: skip
def test_tasks_members_and_groups(tasks: dict[str, list[str]], config: Any, expected: set[str]) -> None:
    assert of(tasks, **config) == expected


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "commonsense"),
        (["dataset.train_path=own.jsonl"], "json"),
        (["dataset.hub_path=me/mine"], "json"),
        (["dataset.mix=[own.jsonl:1]"], "json"),
        (["dataset=[own.jsonl:1]"], "json"),
        (["dataset=commonsense", "dataset.train_path=own.jsonl"], "commonsense"),
        (["dataset.name=arithmetic", "dataset.train_path=own.jsonl"], "arithmetic"),
        (["experiment=quickstart"], "commonsense"),
        (["experiment=quickstart", "dataset.train_path=own.jsonl"], "json"),
        (["experiment=quickstart", "dataset.mix=[own.jsonl,b.jsonl]"], "json"),
        (["experiment=quickstart", "dataset=commonsense", "dataset.train_path=own.jsonl"], "commonsense"),
        (["experiment=time_to_loss_smollm2"], "commonsense"),
        (["objective=dpo", "dataset.train_path=own.jsonl"], "preference"),
    ],
)
def test_data_of_ones_own_are_of_the_family_that_was_chosen_alone(words: list[str], name: str) -> None:
    assert compose("train", words).dataset.name == name


@pytest.mark.parametrize(
    ("text", "words", "name"),
    [
        ("trainer: {max_steps: 5}", [], "commonsense"),
        ("trainer: {max_steps: 5}", ["dataset.train_path=own.jsonl"], "json"),
        ("dataset: {train_path: own.jsonl}", [], "json"),
        ("dataset: {train_path: own.jsonl}", ["dataset.train_path=null"], "commonsense"),
        ("dataset: {train_path: own.jsonl, name: commonsense}", [], "commonsense"),
        ("defaults: [override /dataset: commonsense]\ndataset: {train_path: own.jsonl}", [], "commonsense"),
        ("dataset: {train_path: own.jsonl}\noutput_dir: 'outputs/${dataset.name}'", [], "json"),
    ],
)
def test_an_experiments_data_are_of_the_family_that_it_chose(
    text: str, words: list[str], name: str, tmp_path: Path
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(f"# @package _global_\n{text}\n")
    config = compose("train", ["experiment=mine", *words], [str(tmp_path)])
    assert config.dataset.name == name
    assert config.output_dir is None or config.output_dir == f"outputs/{name}"


def test_an_option_of_ones_own_may_say_its_file_alone(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset/mine.yaml").write_text("eval_fraction: 0.2\n")
    assert compose("train", ["dataset=mine"], [str(tmp_path)]).dataset.name == "commonsense"
    (tmp_path / "dataset/mine.yaml").write_text("train_path: own.jsonl\n")
    assert compose("train", ["dataset=mine"], [str(tmp_path)]).dataset.name == "json"


def test_a_chosen_family_keeps_what_an_experiment_sets_for_it(tmp_path: Path) -> None:
    """Also where the experiment has chosen none, so that its family is the one of all runs."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\ndataset: {eval_fraction: 0.3}\n")
    dataset = compose("train", ["experiment=mine", "dataset=commonsense"], [str(tmp_path)]).dataset
    assert (dataset.name, dataset.eval_fraction) == ("commonsense", 0.3)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    return adapted.adapter("llama", "rows", adapted.base("llama", folder / "base"), folder / "adapter")


@pytest.mark.parametrize(
    ("dataset", "eval_task", "expected"),
    [
        ({"name": "json"}, None, set()),
        ({"name": "json"}, "mmlu", {"mmlu"}),
        ({"name": "commonsense"}, None, {"boolq"}),
        ({"name": "json", "train_path": "google/boolq"}, "mmlu", {"boolq", "mmlu"}),
    ],
)
def test_card_and_report_say_the_same(
    dataset: dict[str, Any], eval_task: str | None, expected: set[str], adapter: Path, tmp_path: Path
) -> None:
    run = finished_run(adapter, tmp_path / "run", data="own.jsonl")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["dataset"] = dataset
    config["trainer"]["eval_task"] = eval_task
    (run / "config.yaml").write_text(json.dumps(config))
    of_card = {score.task for score in facts_of(run).scores if score.learnt}
    assert of_card == read_run(run).learns == expected


def test_a_group_has_the_members_that_any_evaluation_found(adapter: Path, tmp_path: Path) -> None:
    run = finished_run(adapter, tmp_path / "run", data="own.jsonl")
    (run / "config.yaml").write_text("dataset: {name: own}\n")
    score = {"accuracy": 0.5, "stderr": 0.1, "samples": 9}
    for member in ("a", "b"):
        tasks = {"own": score | {"tasks": [member]}, member: score}
        (run / f"eval/own-{member}.json").write_text(json.dumps({"task": "own", "tasks": tasks}))
    assert {each.task for each in facts_of(run).scores if each.learnt} == {"own", "a", "b"}

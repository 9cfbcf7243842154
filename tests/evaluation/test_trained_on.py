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
    ],
)  # fmt: skip
def test_tasks_members_and_groups(tasks: dict[str, list[str]], config: Any, expected: set[str]) -> None:
    assert of(tasks, **config) == expected


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "commonsense"),
        (["dataset.train_path=own.jsonl"], "json"),
        (["dataset.mix=[own.jsonl:1]"], "json"),
        (["dataset=[own.jsonl:1]"], "json"),
        (["dataset=commonsense", "dataset.train_path=own.jsonl"], "commonsense"),
        (["dataset.name=arithmetic", "dataset.train_path=own.jsonl"], "arithmetic"),
        (["experiment=quickstart", "dataset.train_path=own.jsonl"], "commonsense"),
        (["objective=dpo", "dataset.train_path=own.jsonl"], "preference"),
    ],
)
def test_data_of_ones_own_are_of_the_family_that_was_chosen_alone(words: list[str], name: str) -> None:
    assert compose("train", words).dataset.name == name


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

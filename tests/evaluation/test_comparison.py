"""A run beside its base: differences and errors by hand, the exact test, and what the command makes of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from sparseft.commands.eval import render
from sparseft.evaluation.comparison import compare, mean_and_error, sign_test, weighted_error
from support.models import build_model, build_tokenizer
from support.running import METHODS, on, refused, sparseft, write_data


@pytest.mark.parametrize("pair", [(0, 0), (1, 0), (0, 5), (3, 3), (10, 2), (40, 61), (300, 299), (2000, 1700)])
def test_the_sign_test_is_the_exact_binomial_test(pair: tuple[int, int]) -> None:
    expected = scipy.stats.binomtest(pair[0], sum(pair), 0.5).pvalue if sum(pair) else 1.0
    assert sign_test(*pair) == pytest.approx(expected, rel=1e-9)
    assert sign_test(*pair) == sign_test(*reversed(pair))


def test_errors_by_hand() -> None:
    values = [1.0, 0.0, 0.0, -1.0, 1.0]
    mean, error = mean_and_error(values)
    assert (mean, error) == (pytest.approx(0.2), pytest.approx(np.std(values, ddof=1) / math.sqrt(5)))
    assert mean_and_error([1.0]) == (1.0, None)
    assert weighted_error([0.3, 0.4], [0.5, 0.5]) == pytest.approx(0.25)
    assert weighted_error([0.3, None], [0.5, 0.5]) is None
    assert weighted_error([], []) is None


def outcome(verdicts: dict[str, list[int]], groups: dict[str, tuple[list[str], str]]) -> dict[str, Any]:
    """What `evaluate` returns, of tasks with these verdicts and of groups `(members, weighting)`."""
    samples = {
        name: [
            {"doc_id": n, "prompt": f"{name} {n}", "metrics": {"acc": float(v)}, "answer": str(v), "correct": bool(v)}
            for n, v in enumerate(values)
        ]
        for name, values in verdicts.items()
    }
    tasks = {
        name: {"accuracy": float(np.mean(values)), "stderr": 0.1, "samples": len(values), "metric": "acc,none"}
        for name, values in verdicts.items()
    }
    members = {name: [name] for name in verdicts}
    for group, (names, weighting) in groups.items():
        parts = [tasks[name]["accuracy"] for name in names]
        weights = [1.0 if weighting == "tasks" else len(verdicts[name]) for name in names]
        tasks[group] = {"accuracy": float(np.average(parts, weights=weights)), "stderr": 0.1, "weighting": weighting}
        members[group] = names
    return {"tasks": tasks, "samples": samples, "members": members}


def test_differences_of_tasks_and_groups_by_hand() -> None:
    before = {"one": [0, 0, 1, 1], "two": [1, 0]}
    after = {"one": [1, 0, 1, 0], "two": [1, 1]}
    groups = {"macro": (["one", "two"], "tasks"), "micro": (["one", "two"], "questions")}
    new, old = outcome(after, groups), outcome(before, groups)
    compare(new, old)
    one, two = new["tasks"]["one"], new["tasks"]["two"]
    errors = {name: np.std(np.subtract(after[name], before[name]), ddof=1) / math.sqrt(len(after[name]))
              for name in after}  # fmt: skip
    assert (one["base"], one["difference"], one["improved"], one["worsened"], one["p_value"]) == (0.5, 0.0, 1, 1, 1.0)
    assert (two["difference"], two["improved"], two["worsened"]) == (0.5, 1, 0)
    assert one["difference_stderr"] == pytest.approx(errors["one"])
    macro, micro = new["tasks"]["macro"], new["tasks"]["micro"]
    assert macro["difference"] == pytest.approx((0.0 + 0.5) / 2)
    assert macro["difference_stderr"] == pytest.approx(math.hypot(errors["one"], errors["two"]) / 2)
    assert micro["difference"] == pytest.approx(1 / 6)
    assert micro["difference_stderr"] == pytest.approx(math.hypot(4 * errors["one"], 2 * errors["two"]) / 6)
    assert (macro["improved"], macro["worsened"]) == (micro["improved"], micro["worsened"]) == (2, 1)
    assert new["samples"]["two"][1]["base"] == {"answer": "0", "correct": False, "metrics": {"acc": 0.0}}


def test_a_task_without_a_metric_of_questions_has_no_difference() -> None:
    new, old = outcome({"one": [1, 0]}, {}), outcome({"one": [1, 0]}, {})
    for side in (new, old):
        side["tasks"]["one"] |= {"metric": None, "accuracy": None}
    compare(new, old)
    assert "difference" not in new["tasks"]["one"]


def test_answers_to_other_questions_are_not_compared() -> None:
    new, old = outcome({"one": [1, 0]}, {}), outcome({"one": [1, 0]}, {})
    old["samples"]["one"][1]["prompt"] = "another"
    with pytest.raises(AssertionError):
        compare(new, old)


# ---- the command ----


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> Path:
    """Runs of every kind of adapter, and questions."""
    folder = tmp_path_factory.mktemp("world")
    write_data(folder)
    for name in ("s2ft", "lora", "full"):
        sparseft(
            folder, "train", *on(model_folder(), folder / "pairs.jsonl"), *METHODS[name], "trainer.max_steps=6",
            "trainer.learning_rate=5e-2", f"output_dir=run-{name}",
        )  # fmt: skip
    for task in ("boolq", "ARC-Easy"):
        labels = ("true", "false") if task == "boolq" else ("answer1", "answer2")
        (folder / "data" / task).mkdir(parents=True)
        records = [{"instruction": f"Q {n}?", "input": "", "output": "", "answer": labels[n % 2]} for n in range(6)]
        (folder / "data" / task / "test.json").write_text(json.dumps(records))
    for split in ("dev", "val"):
        (folder / "data" / "mmlu" / split).mkdir(parents=True)
        rows = "".join(f"Is it {n}?,yes,no,maybe,never,{'ABCD'[n % 4]}\n" for n in range(12))
        (folder / "data" / "mmlu" / split / f"anatomy_{split}.csv").write_text(rows)
    return folder


WORDS = ["eval.data_dir=data", "eval.split=any", "eval.max_new_tokens=4", "--json"]


@pytest.mark.parametrize("method", ["s2ft", "lora", "full"])
def test_a_run_is_compared_with_its_base(method: str, world: Path, model_folder: Any) -> None:
    """Oracle: the base evaluated by itself, in another call; a task of the other split in the same one."""
    tasks = ["mmlu", "boolq", "ARC-Easy", "--shots", "0"]
    both = sparseft(world, "eval", *tasks, f"--run=run-{method}", *WORDS).json
    alone = sparseft(world, "eval", *tasks, "--base", f"model.path={model_folder()}", *WORDS).json
    never = sparseft(world, "eval", *tasks, f"--run=run-{method}", *WORDS, "eval.compare_base=false").json
    assert both["tasks"].keys() == alone["tasks"].keys()
    for name, entry in both["tasks"].items():
        assert entry["base"] == alone["tasks"][name]["accuracy"]
        assert entry["base_stderr"] == alone["tasks"][name]["stderr"]
        assert entry["difference"] == pytest.approx(entry["accuracy"] - entry["base"])
        assert entry["accuracy"] == never["tasks"][name]["accuracy"] and "base" not in never["tasks"][name]
    assert both["tasks"]["mmlu_anatomy"]["split"] == "validation" and both["tasks"]["boolq"]["split"] == "test"
    lines = (world / f"run-{method}" / "eval" / "mmlu.samples.jsonl").read_text().splitlines()
    assert len(lines) == 12
    sparseft(world, "eval", *tasks, f"--run=run-{method}", *WORDS)  # again: the files of the last one had no base
    stored = json.loads((world / f"run-{method}" / "eval" / "mmlu.json").read_text())
    assert stored["sparseft"]["base"] == str(model_folder())
    records = [json.loads(line) for line in
               (world / f"run-{method}" / "eval" / "mmlu.samples.jsonl").read_text().splitlines()]  # fmt: skip
    improved = sum(record["correct"] and not record["base"]["correct"] for record in records)
    assert stored["tasks"]["mmlu"]["improved"] == improved
    if method != "lora":  # whose first steps move little
        assert all(record["base"]["loglikelihoods"] != record["loglikelihoods"] for record in records)


def test_the_table_shows_both(world: Path) -> None:
    words = ["--run=run-s2ft", *WORDS[:-1], "--shots=0", "--batch-size=auto"]
    lines = sparseft(world, "eval", "mmlu_anatomy", *words).out.splitlines()
    assert lines[1].split() == ["task", "base", "adapter", "difference", "p", "samples", "shots"]
    assert lines[3].split()[4] == "±" and lines[3].split()[-2:] == ["12", "0"]
    without = sparseft(world, "eval", "mmlu_anatomy", *words, "eval.compare_base=false").out
    assert without.splitlines()[1].split() == ["task", "accuracy", "stderr", "samples", "shots"]


def test_an_adapter_alone_is_compared_too_but_a_model_folder_has_no_base(world: Path) -> None:
    adapter = sparseft(world, "eval", "mmlu_anatomy", "--adapter=run-s2ft/adapter", *WORDS, "--shots=0").json
    assert "difference" in adapter["tasks"]["mmlu_anatomy"]
    whole = sparseft(world, "eval", "mmlu_anatomy", "--adapter=run-full/adapter", *WORDS, "--shots=0").json
    assert "difference" not in whole["tasks"]["mmlu_anatomy"]


def test_splits_and_batch_sizes_that_are_none(world: Path) -> None:
    message = refused(world, "eval", "boolq", "--base", "eval.data_dir=data", "--batch-size=big")
    assert "eval.batch_size=big" in message and "auto" in message
    assert "--batch-size and eval.batch_size" in refused(
        world, "eval", "boolq", "--base", "--batch-size=2", "eval.batch_size=2"
    )
    assert "Did you mean 'any'" in refused(world, "eval", "boolq", "--base", "eval.split=an")


def test_the_bundled_questions_are_found_for_a_whole_model_too(tmp_path: Path) -> None:
    """The trained model lies in its run; the questions lie beside the model that it was trained from."""
    words = ["method=full", "trainer.max_steps=1", "dataset.eval_fraction=0"]
    sparseft(tmp_path, "train", *words, "output_dir=run")
    done = sparseft(tmp_path, "eval", "boolq", "--run=run", "--limit=1", "eval.max_new_tokens=1", "--json")
    assert done.json["tasks"]["boolq"]["samples"] == 1


def test_the_bundled_questions_serve_any_model(tmp_path: Path) -> None:
    build_model("llama", vocab_size=512).save_pretrained(tmp_path / "mine")
    build_tokenizer().save_pretrained(tmp_path / "mine")
    words = ["boolq", "--base", "--limit=1", "model.path=mine", "eval.max_new_tokens=1", "--json"]
    done = sparseft(tmp_path, "eval", *words, "eval.data_dir=bundled:data")
    assert done.json["tasks"]["boolq"]["samples"] == 1
    assert "bundled:data" in refused(tmp_path, "eval", *words, "eval.data_dir=bundled:dat")


def test_a_task_without_an_accuracy_shows_its_first_metric(capsys: pytest.CaptureFixture[str]) -> None:
    both = [outcome({"wikitext": [0, 0]}, {}) for _ in range(2)]
    for each, value in zip(both, (23.125, 31.5), strict=True):
        metrics = {"word_perplexity,none": value, "word_perplexity_stderr,none": None, "bits_per_byte,none": 1.0}
        each["tasks"]["wikitext"] |= {"accuracy": None, "metric": None, "metrics": metrics, "shots": 0}
    result = {"evaluated": "it", "files": ["out/eval/wikitext.json"], **both[0]}
    render(result)
    (alone,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wikitext")]
    assert "word_perplexity 23.1250" in alone
    compare(*both)
    render(result)
    (beside,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wikitext")]
    assert beside.index("word_perplexity 31.5000") < beside.index("word_perplexity 23.1250")

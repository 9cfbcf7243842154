"""The parts of the page, each against what its files say: counted by hand, or from a dense mask."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from sparseft.files import atomic
from sparseft.files.hashing import file_hash
from sparseft.report import answers, learning, preference, selected
from sparseft.report.comparison import comparison, differences
from sparseft.report.run_data import Answer, Run, Score, read_run


def a_run(label: str = "run", **fields: Any) -> Run:
    return Run(Path(label), label, **fields)


# -- answers ----------------------------------------------------------------------------------------------------------


def lines(*adapter: tuple[float, str], prompt: str = "p", base: str = "old") -> list[Answer]:
    return [Answer(0, True, prompt, base)] + [Answer(step, False, prompt, text) for step, text in adapter]


def test_the_bases_answer_stands_beside_the_last_with_the_earlier_ones_folded() -> None:
    found = answers.sample_answers([a_run(answers=lines((10, "a"), (20, "old"), (10, "b")))])
    (prompt,) = found["prompts"]
    base, adapter = prompt["answers"]
    assert (base["name"], base["text"], base["earlier"]) == ("base", "old", [])
    assert (adapter["name"], adapter["text"], adapter["same"]) == ("after step 20", "old", True)
    assert adapter["earlier"] == [("after step 10", "b")]  # a step taken again counts as it came last


def test_prompts_that_end_alike_stand_apart() -> None:
    one, two = lines((5, "x")), lines((5, "y"))
    for answer in two:
        answer.prompt_id = "2"
    found = answers.sample_answers([a_run(answers=one + two)])["prompts"]
    assert [(each["prompt"], each["answers"][1]["text"]) for each in found] == [("p", "x"), ("p", "y")]


def test_runs_share_a_base_only_where_it_answered_alike() -> None:
    one, two = a_run("one", answers=lines((5, "x"))), a_run("two", answers=lines((5, "y")))
    names = [cell["name"] for cell in answers.sample_answers([one, two, a_run("none")])["prompts"][0]["answers"]]
    assert names == ["base", "one, after step 5", "two, after step 5"]
    two.answers = lines((5, "y"), base="other")
    names = [cell["name"] for cell in answers.sample_answers([one, two])["prompts"][0]["answers"]]
    assert names[:2] == ["base of one", "base of two"]
    assert answers.sample_answers([a_run()]) is None


def test_many_and_long_answers_are_cut_and_it_is_said() -> None:
    run = a_run(answers=lines(*((step, f"{step}") for step in range(1, 101))))
    cell = answers.sample_answers([run])["prompts"][0]["answers"][1]
    assert cell["text"] == "100" and len(cell["earlier"]) + cell["left"] == 99
    assert cell["earlier"][0] == ("after step 1", "1") and len(cell["earlier"]) == answers.STEPS - 1
    run = a_run(answers=lines((1, "x" * (answers.LENGTH + 5)), (2, ""), (3, " \n")))
    cell = answers.sample_answers([run])["prompts"][0]["answers"][1]
    assert cell["text"] == "(only white space: ' \\n')" and cell["earlier"][1][1] == "(empty)"
    assert cell["earlier"][0][1].endswith("… (5 more characters in samples.jsonl)")


def test_lines_that_are_no_answers_are_left_out(tmp_path: Path) -> None:
    good = {"step": 4, "model": "adapter", "prompt": "p", "answer": "a"}
    bad = [{}, good | {"step": "4"}, good | {"model": "other"}, good | {"answer": None}, good | {"prompt": 3}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [good, *bad]) + '{"torn')
    assert read_run(tmp_path).answers == [Answer(4, False, "p", "a", "")]
    (tmp_path / "samples.jsonl").write_text("[]\n")
    assert "samples.jsonl could not be read" in " ".join(read_run(tmp_path).warnings)


# -- learnt and forgotten ---------------------------------------------------------------------------------------------


def measured(task: str, before: float, after: float, **more: Any) -> dict[str, dict[str, Score]]:
    return {
        "before": {task: Score(before, 0.03, 100, 0)},
        "after": {task: Score(after, 0.04, 100, 0, **more)},
        "headline": [task],
    }


def test_a_change_has_the_paired_error_where_there_is_one() -> None:
    change = a_run(**measured("t", 0.5, 0.4)).change("t")
    assert change.value == pytest.approx(-0.1) and change.stderr == pytest.approx(0.05) and not change.paired
    change = a_run(**measured("t", 0.5, 0.4, paired=0.01)).change("t")
    assert change.stderr == 0.01 and change.paired


def test_other_questions_are_not_compared() -> None:
    run = a_run(**measured("t", 0.5, 0.4))
    run.before["t"].samples = 99
    assert run.change("t") is None and run.change("missing") is None


def test_the_base_beside_an_evaluation_is_read(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    compared = {"base": 0.5, "base_stderr": 0.03, "difference_stderr": 0.01}
    entry = {"accuracy": 0.6, "stderr": 0.04, "samples": 9, "shots": 2, "tasks": ["m"]} | compared
    atomic.write_json(tmp_path / "eval/t.json", {"task": "t", "tasks": {"t": entry}})
    run = read_run(tmp_path)
    assert run.before["t"] == Score(0.5, 0.03, 9, 2, ["m"]) and run.change("t").stderr == 0.01


@pytest.mark.parametrize("kind", ["adapter", "whole model"])
def test_scores_of_another_adapter_are_left_out(kind: str, tmp_path: Path) -> None:
    """The run went on, or was trimmed, after they were measured."""
    for name in ("eval", "adapter"):
        (tmp_path / name).mkdir()
    if kind == "adapter":
        (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"values")
        present = file_hash(tmp_path / "adapter/adapter_model.safetensors")
    else:
        present = "of all its files"
        atomic.write_json(tmp_path / "adapter/sparseft_config.json", {"config_sha256": present})
    for task, known in (("old", "another"), ("new", present), ("unknown", None)):
        content = {"task": task, "tasks": {task: {"accuracy": 0.6}}, "sparseft": {"adapter_sha256": known}}
        atomic.write_json(tmp_path / f"eval/{task}.json", content)
    run = read_run(tmp_path)
    assert set(run.after) == set(run.headline) == {"new", "unknown"}
    assert [warning for warning in run.warnings if warning.startswith("eval/old.json is of another adapter")]


def test_an_error_below_zero_is_none(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    entry = {"accuracy": 0.6, "stderr": -0.1, "base": 0.5, "base_stderr": -1, "difference_stderr": -0.01}
    atomic.write_json(tmp_path / "eval/t.json", {"task": "t", "tasks": {"t": entry}})
    run = read_run(tmp_path)
    assert run.after["t"].stderr is None and run.before["t"].stderr is None and run.change("t").stderr is None
    assert run.change("t").paired is False


def test_what_it_trains_for_is_told_from_what_it_does_not() -> None:
    run = a_run(**measured("sums", 0.1, 0.9), config={"trainer": {"eval_task": "sums"}, "dataset": {"name": ["x"]}})
    found = learning.learnt_and_forgotten([run], 12)
    assert found["unknown"] and "sums, trained for: +80.00 points ± 5.00 (standard error)" in found["chart"]["wide"]
    facts = measured("facts", 0.8, 0.7)
    run.before |= facts["before"]
    run.after |= facts["after"]
    run.headline = ["facts", "sums"]
    found = learning.learnt_and_forgotten([run], 12)
    assert not found["unknown"] and "facts, not trained for: -10.00 points" in found["chart"]["wide"]
    assert run.learns == {"sums"}
    run.config = {}
    found = learning.learnt_and_forgotten([run], 12)
    assert "facts, change: -10.00 points" in found["chart"]["wide"] and "is not known" in " ".join(found["notes"])


def test_members_of_what_it_trains_for_are_trained_for_too() -> None:
    scores = {"group": Score(0.5, None, 1, 0, ["a", "b"]), "a": Score(0.5, None, 1, 0), "c": Score(0.5, None, 1, 0)}
    assert a_run(after=scores, config={"dataset": {"name": "group"}}).learns == {"group", "a"}
    # A group is no measure of what was forgotten where one of its members was trained.
    assert a_run(after=scores, config={"dataset": {"name": "a"}}).learns == {"group", "a"}


def test_what_a_run_learns_is_judged_by_its_sources() -> None:
    scores = {name: Score(0.5, None, 1, 0) for name in ("commonsense", "arithmetic")}
    for dataset, expected in (
        ({"name": "json", "train_path": "medical.jsonl"}, set()),
        ({"name": "json", "mix": ["arithmetic:0.7", "commonsense:0.3"]}, {"arithmetic", "commonsense"}),
        ({"name": "arithmetic", "train_path": "math_10k.json"}, {"arithmetic"}),
        ({"name": "commonsense", "train_path": "commonsense_170k.json"}, {"commonsense"}),
    ):
        assert a_run(after=scores, config={"dataset": dataset}).learns == expected


# -- comparison -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [(5, 0, "test"), (100, 5, "test"), (100, 0, "validation"), (100, 0, "test")])
def test_the_best_stands_out_among_those_that_were_asked_the_same(other: tuple[int, int, str]) -> None:
    scores = [Score(0.45, 0.05, 100, 0, split="test"), Score(0.6, 0.2, *other[:2], split=other[2])]
    table = comparison([a_run(after={"t": each}, headline=["t"]) for each in scores])["table"]
    assert table.best == ({(1, list(table.head).index("t"))} if scores[0].asked == scores[1].asked else set())


def test_a_column_sorts_by_its_numbers_and_missing_ones_have_none() -> None:
    one = a_run("one", summary={"steps": 5, "train_seconds": 100, "eval_loss_after": 0.5}, config={"a": 1})
    two = a_run("two", metrics=[{"step": 3, "eval_loss": 0.7}], config={"a": 2})
    table = comparison([one, two])["table"]
    column = {name: list(table.head).index(name) for name in table.head}
    assert table.keys[column["time"]] == [100, None] and [row[column["time"]] for row in table.rows][1] == "–"
    assert table.keys[column["steps"]] == [5, 3] and table.keys[column["loss after"]] == [0.5, 0.7]
    assert [row[column["state"]] for row in table.rows] == ["finished", "not finished"]
    assert "memory" not in column  # nobody has one
    assert table.best == {(0, column["loss after"])}


def test_settings_of_many_runs_are_columns() -> None:
    runs = [a_run(str(index), config={"seed": index, "same": 1}) for index in range(20)]
    assert differences(runs[:3]).rows == [["seed", "0", "1", "2"]]
    table = differences(runs)
    assert table.head == ["run", "seed"] and table.rows[5] == ["5", "5"] and table.sorts
    assert differences([a_run(str(index)) for index in range(20)]).rows == []


def test_a_few_settings_of_some_runs_stand_beside_their_results() -> None:
    runs = [a_run(str(index), config={"seed": index, "a": ["x", None, 1][index]}) for index in range(3)]
    found = comparison(runs)
    assert found["settings"].rows == [] and found["differ"] == 2
    assert found["table"].head == ["run", "seed", "a", "state"]
    assert found["table"].keys == {1: [0, 1, 2]} and found["table"].rows[1][:3] == ["1", "1", "null"]
    assert comparison(runs[:2])["settings"].rows == [["seed", "0", "1"], ["a", '"x"', "null"]]


def test_what_many_runs_share_is_said_once() -> None:
    runs = [a_run(str(index), summary={"steps": 7, "train_seconds": index}) for index in range(6)]
    found = comparison(runs)
    assert "steps 7" in found["note"] and found["table"].head == ["run", "time"]
    assert "steps" in comparison(runs[:2])["table"].head


def test_paths_are_named_shortly() -> None:
    run = a_run(summary={"model": "/models/smol/", "dataset": "/data/sums/train.json"})
    assert (run.model_name, run.dataset_name) == ("smol", "sums/train.json")
    run = a_run(summary={"model": "some/model", "dataset": "letters"})
    assert (run.model_name, run.dataset_name) == ("some/model", "letters")
    assert a_run(summary={"model": "/"}).model_name == "/"


# -- where in the weights ---------------------------------------------------------------------------------------------


def selection(folder: Path, block: int | None, **more: Any) -> Run:
    """A run that trains a pattern in two linears; `more` goes into selection.json."""
    pattern = numpy.random.default_rng(0)
    tensors = {"layers.0.a.rows.index": pattern.choice(70, 9, replace=False)}
    tensors["layers.1.a.columns.index"] = pattern.choice(40, 5, replace=False)
    modules = {"layers.0.a": {"shape": [70, 40], "rows": 9, "trainable": 360}}
    modules["layers.1.a"] = {"shape": [70, 40], "columns": 5, "trainable": 350}
    if block:
        tensors = {"layers.0.a.blocks.index": numpy.array([[0, 0], [2, 1], [8, 4]])}  # 9 × 5 blocks of 8
        modules = {"layers.0.a": {"shape": [70, 40], "blocks": 3, "trainable": 144}}
    (folder / "selection").mkdir(parents=True)
    save_file(
        {name: index.astype("int32") for name, index in tensors.items()}, folder / "selection/selection.safetensors"
    )
    atomic.write_json(folder / "selection/selection.json", {"block_size": block, "modules": modules} | more)
    return read_run(folder)


def painted(cell: dict[str, Any]) -> numpy.ndarray:
    """The shade of every cell of a small picture, from its paths."""
    grid = numpy.zeros((cell["high"], cell["wide"]), dtype=int)
    for shade, path in cell["paths"]:
        parts = re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)h-(\d+)z", path)
        assert "".join(f"M{a} {b}h{c}v{d}h-{e}z" for a, b, c, d, e in parts) == path
        for left, top, wide, high, _ in (map(int, part) for part in parts):
            assert not grid[top : top + high, left : left + wide].any()  # nothing is painted twice
            grid[top : top + high, left : left + wide] = shade
    return grid


def test_pictures_are_the_dense_mask_seen_from_afar(tmp_path: Path) -> None:
    run = selection(tmp_path, None)
    found = selected.selected(run)
    (table,) = found["map"]
    ((role, about, cells),) = table["rows"]
    assert table["layers"] == ["0", "1"] and (role, about) == ("a", "a: the darkest cell trains 50.0\xa0%")
    generator = numpy.random.default_rng(0)
    rows, columns = generator.choice(70, 9, replace=False), generator.choice(40, 5, replace=False)
    dense = [numpy.zeros((70, 40)), numpy.zeros((70, 40))]
    dense[0][rows] = 1
    dense[1][:, columns] = 1
    means = []
    for mask in dense:
        down, across = numpy.arange(70) * 16 // 70, numpy.arange(40) * 16 // 40
        means.append([[mask[numpy.ix_(down == i, across == j)].mean() for j in range(16)] for i in range(16)])
    darkest = numpy.max(means)
    for cell, mean in zip(cells, means, strict=True):
        assert (painted(cell) == numpy.ceil(numpy.round(numpy.array(mean) / darkest * 4, 6))).all()
    assert cells[0]["label"].replace("\xa0", " ") == "layer 0, a: 12.9 % trains, 9 rows"


def test_blocks_are_drawn_one_by_one(tmp_path: Path) -> None:
    (table,) = selected.selected(selection(tmp_path, 8))["map"]
    ((_, _, (cell,)),) = table["rows"]
    expected = numpy.zeros((9, 5), dtype=int)
    expected[[0, 2, 8], [0, 1, 4]] = 4
    assert (painted(cell) == expected).all()


def test_grids_are_the_dense_mask_seen_from_afar(tmp_path: Path) -> None:
    (tmp_path / "selection").mkdir()
    index = numpy.array([3, 69, 20, -1, -40, -18, 4, 5, -18], dtype="int32")  # two grids, as after re-selection
    save_file({"layers.0.a.grid.index": index}, tmp_path / "selection/selection.safetensors")
    modules = {"layers.0.a": {"shape": [70, 40], "grid": 9, "trainable": 11}}
    candidates = {"layers.0.a": {"kind": "grid", "unit": 1, "start": 0, "units": 2800, "kept": 11}}
    atomic.write_json(tmp_path / "selection/selection.json", {"modules": modules, "candidates": candidates})
    found = selected.selected(read_run(tmp_path))
    assert found["note"].startswith("1 grids in 1 weights")
    ((_, _, (cell,)),) = found["map"][0]["rows"]
    assert cell["label"].replace("\xa0", " ").endswith("11 of 2,800 entries, where rows cross columns")
    mask = numpy.zeros((70, 40))
    mask[numpy.ix_([3, 69, 20], [0, 39, 17])] = 1
    mask[[4, 5], 17] = 1
    down, across = numpy.arange(70) * 16 // 70, numpy.arange(40) * 16 // 40
    mean = numpy.array([[mask[numpy.ix_(down == i, across == j)].mean() for j in range(16)] for i in range(16)])
    assert (painted(cell) == numpy.ceil(numpy.round(mean / mean.max() * 4, 6))).all()


def test_heads_are_drawn_and_named(tmp_path: Path) -> None:
    (tmp_path / "selection").mkdir()
    index = numpy.array([*range(4, 8), *range(16, 20)], dtype="int32")  # heads 1 and 4 of 5
    save_file({"layers.0.q_proj.rows.index": index}, tmp_path / "selection/selection.safetensors")
    modules = {"layers.0.q_proj": {"shape": [20, 6], "rows": 8, "trainable": 48}}
    entry = {"kind": "rows", "unit": 4, "start": 0, "units": 5, "kept": 2}
    content = {"modules": modules, "candidates": {"layers.0.q_proj:q": entry}}
    atomic.write_json(tmp_path / "selection/selection.json", content)
    ((_, _, (cell,)),) = selected.selected(read_run(tmp_path))["map"][0]["rows"]
    assert cell["label"].endswith("q heads 1, 4 of 5") and cell["high"] == 5
    assert painted(cell).any(axis=1).tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("index", [[70], [-1]])
def test_an_index_outside_of_the_weight_is_said(tmp_path: Path, index: list[int]) -> None:
    run = selection(tmp_path, None)
    tensors = {"layers.0.a.rows.index": numpy.array(index, dtype="int32")}
    save_file(tensors, tmp_path / "selection/selection.safetensors")
    found = selected.selected(run)
    assert found["map"] == [] and "an index outside of the weight" in found["map_note"]


def test_a_missing_or_strange_file_of_indices_is_said(tmp_path: Path) -> None:
    run = selection(tmp_path, None)
    save_file({"layers.0.a.rows.index": numpy.zeros(3)}, tmp_path / "selection/selection.safetensors")
    assert "is no index of a selection" in selected.selected(run)["map_note"]
    (tmp_path / "selection/selection.safetensors").unlink()
    assert "no such file" in selected.selected(run)["map_note"]


# -- importance -------------------------------------------------------------------------------------------------------


def entry(scale: float, **more: Any) -> dict[str, Any]:
    scores = [scale * value for value in (0, 1, 2, 3, 4, 5, 60)]
    kept = [scale * value for value in (5, 6, 60)]
    return {"kind": "rows", "unit": 1, "start": 0, "units": 70, "kept": 9, "scores": scores, "kept_scores": kept} | more


def test_scores_are_drawn_with_the_cut(tmp_path: Path) -> None:
    candidates = {"layers.0.a": entry(1, kept_share=0.25), "layers.1.a": entry(10, kept_share=0.5)}
    settings = {"importance": "fisher", "order": "largest"}
    found = selected.selected(selection(tmp_path, None, candidates=candidates, method_config=settings))["scores"]
    (chart,) = found["charts"]
    assert "Importance fisher" in found["note"] and "what lies above it trains" in found["note"]
    for tip in ("the least that is kept, layer 0: 5", "the least that is kept, layer 1: 50", "5 to 95 %", "25 to 75 %"):
        assert f"<title>{tip}</title>" in chart
    assert "a: 25 to 50 % of the sum is kept" in chart


@pytest.mark.parametrize(
    ("order", "said"), [("smallest", "the most that is kept"), ("sampled", "the median of what is")]
)
def test_the_cut_of_other_orders_is_another(tmp_path: Path, order: str, said: str) -> None:
    settings = {"importance": "weight", "order": order}
    run = selection(tmp_path, None, candidates={"layers.0.a": entry(1)}, method_config=settings)
    assert said in selected.selected(run)["scores"]["note"]


def test_random_and_older_selections_have_no_scores(tmp_path: Path) -> None:
    bare = {name: value for name, value in entry(1).items() if "scores" not in name}
    settings = {"importance": "random"}
    run = selection(tmp_path / "random", None, candidates={"layers.0.a": bare}, method_config=settings)
    assert "drawn at random" in selected.selected(run)["scores"]["note"]
    assert "were not kept" in selected.selected(selection(tmp_path / "old", None))["scores"]["note"]


@pytest.mark.parametrize("strange", [[], "x", {"layers.0.a": 3}, {"layers.0.a": {"scores": [1, "x"], "unit": {}}}])
def test_strange_candidates_are_no_trouble(tmp_path: Path, strange: Any) -> None:
    found = selected.selected(selection(tmp_path, None, candidates=strange))
    assert found["map"] and found["scores"]["charts"] == []


def test_scores_of_zero_only_are_drawn(tmp_path: Path) -> None:
    nothing = entry(0, kept_share=None)
    found = selected.selected(selection(tmp_path, None, candidates={"layers.0.a": nothing}))
    assert "nan" not in "".join(found["scores"]["charts"])


# -- preference -------------------------------------------------------------------------------------------------------


def test_margin_and_accuracy_are_drawn_where_there_are_any() -> None:
    assert preference.preference([a_run()]) is None
    steps = [{"step": s, "loss": 0.5, "rewards/margins": s / 10, "rewards/accuracies": 0.5} for s in (1, 2)]
    held = [
        {"step": s, "eval_loss": 0.5, "eval_rewards/margins": s / 5, "eval_rewards/accuracies": 0.75} for s in (0, 2)
    ]
    summary = {"eval_margin_before": 0.0, "eval_margin_after": 0.4, "eval_accuracy_after": 0.75}
    run = a_run(metrics=[*steps, *held], summary=summary)
    found = preference.preference([run])
    assert found["note"].replace("\N{NO-BREAK SPACE}", " ") == (
        "On held-out data the margin went from 0.000 to 0.400, and 75.0 % of the pairs are in the right order."
    )
    margin, accuracy = (chart["wide"] for chart in found["charts"])
    assert "evaluation, optimizer step 2: 0.4" in margin and "training" in margin
    assert "evaluation, optimizer step 2: 0.75" in accuracy
    alone = a_run(metrics=[{k: v for k, v in line.items() if "accuracies" not in k} for line in held])  # kto's
    assert len(preference.preference([alone])["charts"]) == 1
    both = preference.preference([run, a_run("other", metrics=held)])
    assert both["note"] == "" and "other evaluation" in both["charts"][0]["wide"]

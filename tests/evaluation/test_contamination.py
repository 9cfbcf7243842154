"""Training questions in test sets: found whatever their typography, counted, and scored apart."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseft.config import DatasetConfig, EvalConfig
from sparseft.data import question_hashes as data
from sparseft.data.loaded import LoadedData
from sparseft.data.loading import load_datasets
from sparseft.data.question_hashes import QuestionHashes, normalised, question_hash
from sparseft.data.split import halves
from sparseft.errors import UserError
from sparseft.evaluation import contamination
from sparseft.evaluation.run import prepare
from support.running import METHODS, on, sparseft, summary


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What's the capital of France?", "  what s  the CAPITAL of\nFrance", True),
        ("Straße – “quoted”", "STRASSE quoted", True),
        ("½ of ﬁve", "1⁄2 of five", True),  # NFKC
        ("What is 3 + 4?", "What is 3 - 4?", False),
        ("3*4", "3 * 4", True),
        ("3/4", "3*4", False),
        ("3.5 apples", "35 apples", False),
        ("a well-known fact", "a well known fact", True),
        ("the answer", "the answers", False),
        ("问题是什么？", "问题是什么", True),
    ],
)
def test_normalisation(one: str, other: str, same: bool) -> None:
    assert (normalised(one) == normalised(other)) == same
    assert (question_hash(one) == question_hash(other)) == same


def test_nothing_is_no_question() -> None:
    assert question_hash("?! …") is None and question_hash("") is None
    assert "?!" not in QuestionHashes([]) and "?!" not in QuestionHashes([question_hash("a") or 0])


def test_wordings_of_a_test_record() -> None:
    assert data.test_questions({"instruction": "Add.", "input": "1 and 2", "answer": "3"}) == ["Add.\n1 and 2"]
    mmlu = {"question": "Which?", "choices": ["x", "y"], "answer": 1}
    assert data.test_questions(mmlu, "prompt") == ["prompt", "Which?", "Which?\nx\ny", "Which?\nA. x\nB. y"]
    assert data.test_questions({"id": 3}, None) == []


def test_saved_hashes_come_back_and_damage_is_refused(tmp_path: Path) -> None:
    seen = QuestionHashes([question_hash(text) or 0 for text in ("one", "two", "two", "zwölf")])
    path = seen.save(tmp_path)
    again = QuestionHashes.load(tmp_path)
    assert again is not None and again.hashes.tolist() == seen.hashes.tolist() and len(again) == 3
    assert "TWO!" in again and "three" not in again
    assert again.overlap([["nine", "one"], ["three"], [], ["Zwölf"]]) == [0, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train_questions.safetensors"]
    assert QuestionHashes.load(tmp_path / "elsewhere") is None
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="train_questions.safetensors: truncated or damaged"):
        QuestionHashes.load(tmp_path)
    from safetensors.numpy import save_file

    save_file({"hashes": np.zeros(3, np.int64)}, path, metadata={"normalisation": "0"})
    with pytest.raises(UserError, match="written by another version"):
        QuestionHashes.load(tmp_path)
    save_file({"hashes": np.zeros(3, np.float32)}, path, metadata={"normalisation": "1"})
    with pytest.raises(UserError, match="expected one row of int64 hashes, got float32"):
        QuestionHashes.load(tmp_path)


RECORDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "alpaca": ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, ["Add.\n1 and 2"]),
    "guanaco": ({"text": "### Human: one?### Assistant: a### Human: two?### Assistant: b"}, ["one?", "two?"]),
    "messages": (
        {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "why?"},
                      {"role": "assistant", "content": "so"}]},
        ["why?"],
    ),
    "prompt_completion": ({"prompt": "1+2=", "completion": "3"}, ["1+2="]),
    "text": ({"text": "no question at all"}, []),
}  # fmt: skip


@pytest.mark.parametrize("format", RECORDS)
def test_questions_of_each_format(tmp_path: Path, tokenizer: Any, format: str) -> None:
    record, questions = RECORDS[format]
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    config = DatasetConfig(train_path=str(tmp_path / "a.jsonl"), eval_fraction=0.0)
    for _ in range(2):  # made, then from the cache
        loaded = load_datasets(config, tokenizer, max_length=256, seed=0, bundled=False, cache_dir=tmp_path / "cache")
        assert loaded.format == format
        assert loaded.questions.hashes.tolist() == sorted(question_hash(text) for text in questions)


def test_questions_of_what_is_split_off_or_dropped_were_not_trained_on(tmp_path: Path, tokenizer: Any) -> None:
    records = [{"prompt": f"question {n} ", "completion": "yes"} for n in range(20)]
    records.append({"prompt": "far too long " * 40, "completion": "yes"})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = DatasetConfig(train_path=str(tmp_path / "a.jsonl"), eval_fraction=0.25)
    loaded = load_datasets(config, tokenizer, max_length=64, seed=0, bundled=False, cache_dir=tmp_path / "cache")
    assert (len(loaded.questions), loaded.eval_overlap, loaded.dropped) == (15, 0, 1)
    seen = [record["prompt"] in loaded.questions for record in records]
    assert sum(seen) == 15 and not seen[-1]
    texts = [tokenizer.decode(item["input_ids"]) for item in loaded.eval]
    assert {n for n in range(20) if not seen[n]} == {int(text.split()[1]) for text in texts}


def branches(*sizes: int) -> list[dict[str, str]]:
    """Conversations of so many trees, as many of each: the first question is the tree's, what follows a branch's."""
    return [
        {"text": f"### Human: root {tree}?### Assistant: yes### Human: and {n} of {tree}?### Assistant: {tree}.{n}"}
        for tree, size in enumerate(sizes)
        for n in range(size)
    ]


def sides(
    folder: Path, tokenizer: Any, records: list[Any], fraction: float, seed: int
) -> tuple[LoadedData, list[Counter]]:
    """The data split, and of training and held-out conversations how many are of each tree."""
    random.Random(seed).shuffle(records)
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = DatasetConfig(train_path=str(folder / "a.jsonl"), eval_fraction=fraction)
    loaded = load_datasets(config, tokenizer, max_length=256, seed=seed, bundled=False, cache_dir=folder / "cache")
    assert loaded.eval is not None and len(loaded.train) + len(loaded.eval) == len(records)
    texts = [[tokenizer.decode(item["input_ids"]) for item in part] for part in (loaded.train, loaded.eval)]
    return loaded, [Counter(int(text.split("?")[0].split()[-1]) for text in part) for part in texts]


@pytest.mark.parametrize(("sizes", "held_out"), [([5] * 12, 15), ([1] * 20, 5)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_conversations_with_one_first_question_go_to_one_side(
    tmp_path: Path, tokenizer: Any, sizes: list[int], held_out: int, seed: int
) -> None:
    loaded, (trained, evaluated) = sides(tmp_path, tokenizer, branches(*sizes), 0.25, seed)
    assert loaded.eval_overlap == 0 and not trained.keys() & evaluated.keys()
    assert evaluated.total() == held_out


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_question_that_most_ask_is_on_both_sides(tmp_path: Path, tokenizer: Any, seed: int) -> None:
    """One that more ask than are to be held out: what is held out would otherwise be of the few others alone."""
    loaded, (trained, evaluated) = sides(tmp_path, tokenizer, branches(3, 1, 1, 1, 40), 0.15, seed)
    assert trained[4] and evaluated[4] and 5 <= evaluated.total() <= 7
    assert all(tree == 4 for tree in trained.keys() & evaluated.keys())
    assert loaded.eval_overlap == 1
    assert any("of the evaluation examples are training questions too" in note for note in loaded.notes)


@pytest.mark.parametrize("sizes", [[5] * 12, [1] * 20, [3, 1, 1, 1, 40]], ids=["trees", "alone", "one for most"])
def test_halves_are_of_whole_questions_whatever_is_held_out(tmp_path: Path, tokenizer: Any, sizes: list[int]) -> None:
    """But those of a question that most ask, which are in both."""
    found_in: dict[str, set[bool]] = {}
    for seed in range(4):
        loaded, _ = sides(tmp_path, tokenizer, branches(*sizes), 0.5, seed)
        assert loaded.eval is not None and loaded.eval_tokens is not None
        for item, half in zip(loaded.eval, halves(loaded.eval_tokens), strict=True):
            found_in.setdefault(tokenizer.decode(item["input_ids"]), set()).add(bool(half))
    assert len(found_in) > sum(sizes) // 2 and all(len(found) == 1 for found in found_in.values())
    of_tree: dict[int, set[bool]] = {}
    for text, found in found_in.items():
        of_tree.setdefault(int(text.split("?")[0].split()[-1]), set()).update(found)
    assert [tree for tree, found in of_tree.items() if len(found) > 1] == [4] * (40 in sizes)
    assert set().union(*of_tree.values()) == {False, True}


@pytest.mark.parametrize("asked", ["two?", "or?", "some?", "more?"])
def test_neither_half_is_empty_where_few_questions_are_asked(tmp_path: Path, tokenizer: Any, asked: str) -> None:
    """Their hashes may put all into one half."""
    rows = [
        {"text": f"### Human: {each}### Assistant: {n}"} for each in ("one?", asked, "who?", "why?") for n in range(10)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DatasetConfig(train_path=str(tmp_path / "a.jsonl"), eval_fraction=0.5)
    loaded = load_datasets(config, tokenizer, max_length=64, seed=0, bundled=False, cache_dir=tmp_path / "cache")
    assert loaded.eval_tokens is not None and 0.2 < halves(loaded.eval_tokens).mean() < 0.8


def test_what_asks_nothing_counts_for_no_question(tokenizer: Any, tmp_path: Path) -> None:
    """Texts beside conversations, of two sets."""
    trees = [{"text": f"### Human: root {tree}?### Assistant: {n}"} for tree in range(8) for n in range(4)]
    texts = [{"text": f"once upon a time {n}"} for n in range(80)]
    for name, rows in (("a", texts), ("b", trees)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DatasetConfig(mix=[f"{tmp_path / name}.jsonl" for name in "ab"], eval_fraction=0.5)
    loaded = load_datasets(config, tokenizer, max_length=64, seed=0, bundled=False, cache_dir=tmp_path / "cache")
    assert loaded.eval is not None and loaded.eval_tokens is not None
    of_tree: dict[str, set[bool]] = {}
    for item, half in zip(loaded.eval, halves(loaded.eval_tokens), strict=True):
        text = tokenizer.decode(item["input_ids"])
        if "root" in text:
            of_tree.setdefault(text.split("?")[0].split()[-1], set()).add(bool(half))
    assert len(of_tree) > 2 and all(len(found) == 1 for found in of_tree.values())


def test_texts_are_halved_piece_by_piece(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text(" ".join(map(str, range(400))))
    config = DatasetConfig(train_path=str(tmp_path / "a.txt"), eval_fraction=0.5)
    loaded = load_datasets(config, tokenizer, max_length=32, seed=0, bundled=False, cache_dir=tmp_path / "cache")
    assert loaded.eval_tokens is not None and 0.2 < halves(loaded.eval_tokens).mean() < 0.8


# --- in training and evaluation -----------------------------------------------------------------------------------


def test_records(count: int) -> list[dict[str, str]]:
    return [
        {"instruction": f"Tom has {n} pens and buys {n}. How many?", "input": "", "output": "", "answer": f"{2 * n}"}
        for n in range(1, count + 1)
    ]


test_records.__test__ = False  # type: ignore[attr-defined]


def pens(numbers: Iterable[int]) -> QuestionHashes:
    """The questions of gsm8k below about so many pens."""
    return QuestionHashes([question_hash(f"0: Tom has {n} pens and buys {n}. How many?") or 0 for n in numbers])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests of two arithmetic tasks, and a training set that holds 3 of the 8 questions of one, in other letters."""
    made = tmp_path_factory.mktemp("contamination")
    for task, first in (("gsm8k", 0), ("SVAMP", 100)):
        (made / "tests" / task).mkdir(parents=True)
        records = [{**record, "instruction": f"{first}: {record['instruction']}"} for record in test_records(8)]
        for split in ("test", "validation"):
            (made / "tests" / task / f"{split}.json").write_text(json.dumps(records))
    train = [{"prompt": f"Other {n}", "completion": "2"} for n in range(20)]
    train += [{"prompt": f"0 {r['instruction'].upper()}!", "completion": "2"} for r in test_records(3)]
    (made / "train.json").write_text(json.dumps(train))
    held_out = [{"prompt": f"0: {r['instruction']}", "completion": "2"} for r in test_records(8)]
    (made / "held_out.json").write_text(json.dumps(held_out))
    return made


def test_overlap_of_a_plan_counts_each_task(folder: Path) -> None:
    seen = pens((2, 5))
    plan = prepare(["gsm8k", "SVAMP"], EvalConfig(), data_dir=str(folder / "tests"))
    expected = {"gsm8k": (2, 8), "SVAMP": (0, 8)}
    assert contamination.overlap_of_plan(plan, seen) == expected
    assert contamination.overlap_of_folder(str(folder / "tests"), seen) == expected


def outcome(verdicts: dict[str, list[int]]) -> dict[str, Any]:
    """An evaluation's outcome with these verdicts, as far as it is read here."""
    tasks = {name: {"accuracy": sum(v) / len(v), "metric": "acc,extract", "samples": len(v)}
             for name, v in verdicts.items()}  # fmt: skip
    samples = {
        name: [{"doc_id": n, "metrics": {"acc": float(value)}} for n, value in enumerate(values)]
        for name, values in verdicts.items()
    }
    members = {name: [name] for name in verdicts} | {"arithmetic": list(verdicts)}
    tasks["arithmetic"] = {"accuracy": 0.0, "metric": "acc,extract", "samples": 16}
    return {"tasks": tasks, "samples": samples, "members": members}


def test_scores_without_the_overlap_by_hand(folder: Path, tmp_path: Path) -> None:
    plan = prepare(["arithmetic"], EvalConfig(), data_dir=str(folder / "tests"))
    found = outcome({"gsm8k": [1, 1, 1, 0, 0, 0, 1, 0], "SVAMP": [0, 0, 1, 0, 0, 0, 0, 0]})
    untouched = json.dumps(found)
    contamination.annotate(found, plan, None)
    assert json.dumps(found) == untouched
    pens((1, 2, 3)).save(tmp_path)
    contamination.annotate(found, plan, QuestionHashes.load(tmp_path))
    tasks = found["tasks"]
    assert (tasks["gsm8k"]["train_overlap"], tasks["gsm8k"]["accuracy_without_overlap"]) == (3, pytest.approx(1 / 5))
    assert (tasks["SVAMP"]["train_overlap"], tasks["SVAMP"]["accuracy_without_overlap"]) == (0, pytest.approx(1 / 8))
    # arithmetic weighs its tasks alike, however many questions are left of each.
    group = tasks["arithmetic"]
    assert (group["train_overlap"], group["accuracy_without_overlap"]) == (3, pytest.approx((1 / 5 + 1 / 8) / 2))
    assert [record["train_overlap"] for record in found["samples"]["gsm8k"]] == [True] * 3 + [False] * 5
    assert contamination.rows(tasks) == [["gsm8k", 8, 3, "0.5000", "0.2000"], ["arithmetic", 16, 3, "0.0000", "0.1625"]]


def test_the_base_without_the_overlap_by_hand(folder: Path) -> None:
    plan = prepare(["arithmetic"], EvalConfig(), data_dir=str(folder / "tests"))
    found = outcome({"gsm8k": [1, 1, 1, 0, 0, 0, 1, 0], "SVAMP": [0, 0, 1, 0, 0, 0, 0, 0]})
    for entry in found["tasks"].values():
        entry["base"] = 0.25
    for record in found["samples"]["gsm8k"]:  # right: questions 2 (trained on) and 8 of gsm8k
        record["base"] = {"metrics": {"acc": float(record["doc_id"] in (1, 7))}}
    for record in found["samples"]["SVAMP"]:
        record["base"] = {"metrics": {"acc": 0.0}}
    contamination.annotate(
        found,
        plan,
        pens((1, 2, 3)),
    )
    assert contamination.compared(found["tasks"])
    assert contamination.rows(found["tasks"]) == [
        ["gsm8k", 8, 3, "0.2500", "0.5000", "0.2000", "0.2000"],
        ["arithmetic", 16, 3, "0.2500", "0.0000", "0.1000", "0.1625"],
    ]


def test_a_metric_that_no_single_question_has(folder: Path) -> None:
    plan = prepare(["gsm8k"], EvalConfig(), data_dir=str(folder / "tests"))
    for value in ([0, 1], None):  # what lm-eval aggregates itself; NaN in strict JSON
        found = outcome({"gsm8k": [1] * 8})
        for record in found["samples"]["gsm8k"]:
            record["metrics"]["acc"] = value
        contamination.annotate(found, plan, QuestionHashes([1]))
        assert found["tasks"]["gsm8k"]["accuracy_without_overlap"] is None
        assert found["tasks"]["gsm8k"]["train_overlap"] == 0


def test_nothing_left_has_no_score(folder: Path, tmp_path: Path) -> None:
    plan = prepare(["gsm8k"], EvalConfig(), data_dir=str(folder / "tests"))
    pens(range(1, 9)).save(tmp_path)
    found = outcome({"gsm8k": [1] * 8})
    contamination.annotate(found, plan, QuestionHashes.load(tmp_path))
    assert found["tasks"]["gsm8k"]["accuracy_without_overlap"] is None
    assert contamination.rows(found["tasks"])[0] == ["gsm8k", 8, 8, "1.0000", "-"]


def test_a_run_knows_what_it_was_trained_on(folder: Path, model_folder: Any, tmp_path: Path) -> None:
    words = on(model_folder("llama"), folder / "train.json", "json")
    done = sparseft(
        tmp_path, "train", *words, *METHODS["s2ft"], "trainer.max_steps=1", "dataset.eval_fraction=0",
        f"dataset.eval_path={folder / 'held_out.json'}", "output_dir=run", "--json",
    )  # fmt: skip
    assert "warning: data: 3 of 8 questions of the evaluation examples are training questions too" in done.err
    assert summary(tmp_path / "run")["contamination"] == {"eval_data": 3}
    evaluated = sparseft(
        tmp_path, "eval", "gsm8k", "SVAMP", f"eval.data_dir={folder / 'tests'}", "eval.max_new_tokens=2", "--limit", "2"
    )
    assert "Test questions that were training questions" in evaluated.out
    (line,) = [line for line in evaluated.out.splitlines() if line.split()[:3] == ["gsm8k", "2", "2"]]
    assert line.split()[-1] == "-"  # both questions asked were trained on
    written = json.loads((tmp_path / "run" / "eval" / "gsm8k.json").read_text())
    assert written["tasks"]["gsm8k"]["train_overlap"] == 2
    samples = (tmp_path / "run" / "eval" / "SVAMP.samples.jsonl").read_text().splitlines()
    assert [json.loads(sample)["train_overlap"] for sample in samples] == [False, False]

    # What could not be used after the answers is refused before anything is asked.
    words = ["gsm8k", f"eval.data_dir={folder / 'tests'}"]
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        done = sparseft(tmp_path, "eval", *words, "--adapter", "run", f"output_dir={place}", code=2)
        assert "file" in done.err and "requests" not in done.err
    hashes = tmp_path / "run" / "train_questions.safetensors"
    hashes.write_bytes(hashes.read_bytes()[:-4])
    done = sparseft(tmp_path, "eval", *words, code=2)
    assert "truncated or damaged" in done.err and "requests" not in done.err


def test_a_whole_model_alone_is_known_by_the_run_around_it(folder: Path, model_folder: Any, tmp_path: Path) -> None:
    words = on(model_folder("llama"), folder / "train.json", "json")
    words += [*METHODS["full"], "trainer.max_steps=1", "dataset.eval_fraction=0"]
    sparseft(tmp_path, "train", *words, "output_dir=run")
    done = sparseft(
        tmp_path, "eval", "gsm8k", "--adapter", "run/adapter", f"eval.data_dir={folder / 'tests'}",
        "eval.max_new_tokens=2", "--limit", "2", "output_dir=there", "--json",
    )  # fmt: skip
    assert json.loads(done.out)["tasks"]["gsm8k"]["train_overlap"] == 2


def test_the_task_that_judges_a_training_is_looked_through(folder: Path, model_folder: Any, tmp_path: Path) -> None:
    words = on(model_folder("llama"), folder / "train.json", "json")
    done = sparseft(
        tmp_path, "train", *words, *METHODS["s2ft"], "trainer.max_steps=1", "dataset.eval_fraction=0.05",
        "trainer.eval_task=gsm8k", "trainer.eval_steps=1", f"eval.data_dir={folder / 'tests'}", "eval.limit=1",
        "eval.max_new_tokens=2", "output_dir=run", "--json",
    )  # fmt: skip
    counts = summary(tmp_path / "run")["contamination"]["tasks"]["gsm8k"]
    assert counts["test"] == counts["validation"] > 0  # of 3, less those that were split off
    assert f"gsm8k: {counts['test']} of 8 questions of its test split are training questions" in done.err
    assert "train_overlap" in json.loads((tmp_path / "run" / "eval" / "gsm8k.json").read_text())["tasks"]["gsm8k"]


def test_test_sets_beside_a_training_are_looked_through(folder: Path, model_folder: Any, tmp_path: Path) -> None:
    words = on(model_folder("llama"), folder / "train.json", "json")
    done = sparseft(
        tmp_path, "train", *words, *METHODS["s2ft"], "trainer.max_steps=1", "dataset.eval_fraction=0",
        f"eval.data_dir={folder / 'tests'}", "output_dir=run",
    )  # fmt: skip
    assert summary(tmp_path / "run")["contamination"] == {"tasks": {"gsm8k": {"test": 3}, "SVAMP": {"test": 0}}}
    assert "gsm8k: 3 of 8 questions of its test split are training questions" in done.err
    assert "SVAMP: " not in done.err

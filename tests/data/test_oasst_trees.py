"""OASST message trees: which conversations they become, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparseft.data.formats import detect_format
from sparseft.data.oasst_trees import Trees
from sparseft.data.records import Records
from sparseft.data.sources import open_source
from sparseft.errors import UserError
from support.data import load
from support.places import SHARED


def say(text: str, *replies: dict, role: str = "prompter", **more: Any) -> dict:
    return {"message_id": text, "text": text, "role": role, "lang": "en", "replies": list(replies)} | more


def answer(text: str, *replies: dict, rank: int | None = 0, **more: Any) -> dict:
    return say(text, *replies, role="assistant", rank=rank, **more)


def tree(root: dict) -> dict:
    return {"message_tree_id": root["text"], "tree_state": "ready_for_export", "prompt": root}


def texts(root: dict, paths: str = "all", language: str | None = None) -> list[str]:
    records = Records([tree(root)], "trees.jsonl", "line", [1])
    return [example.text for example in Trees(paths, language).convert(records)]


def chat(*turns: str) -> str:
    return "".join(f"### {'Assistant' if index % 2 else 'Human'}: {turn}" for index, turn in enumerate(turns))


BRANCHING = say(
    "q",
    answer("second", say("thanks"), rank=1),
    answer("best", say("left hanging"), say("more?", answer("yes", rank=1), answer("of course", rank=0)), rank=0),
    answer("unranked", rank=None),
)


def test_all_paths_end_at_the_last_answer_and_none_is_the_beginning_of_another() -> None:
    assert texts(BRANCHING) == [
        chat("q", "second"),  # nobody answered "thanks"
        chat("q", "best", "more?", "yes"),
        chat("q", "best", "more?", "of course"),
        chat("q", "unranked"),
    ]


def test_best_follows_the_ranks_and_passes_by_what_nobody_answered() -> None:
    assert texts(BRANCHING, "best") == [chat("q", "best", "more?", "of course")]
    unranked = say("q", answer("first", rank=None), answer("other", rank=None))
    assert texts(unranked, "best") == [chat("q", "first")]


@pytest.mark.parametrize(
    ("mark", "why"),
    [
        ({"deleted": True}, "1 messages deleted"),
        ({"review_result": False}, "1 messages not passed by review"),
        ({"review_result": None}, "1 messages not passed by review"),
        ({"lang": "de"}, "1 messages not in en"),
        ({"text": " "}, "1 messages empty"),
    ],
)
def test_a_message_left_out_takes_its_replies_along_and_is_counted(mark: dict, why: str) -> None:
    kept, gone = answer("kept", rank=1, review_result=True), answer("gone", rank=0) | mark
    trees = Trees("best", "en")
    (example,) = trees.convert(Records([tree(say("q", gone, kept))], "trees.jsonl", "line", [1]))
    assert example.text == chat("q", "kept")
    assert trees.note("trees.jsonl") == f"left out of the trees: {why}"
    deep = Trees("all", "en")
    gone["replies"] = [say("a", answer("b")), say("c")]
    assert [e.text for e in deep.convert(Records([tree(say("q", gone, kept))], "x", "line", [1]))] == [
        chat("q", "kept")
    ]
    assert why.replace("1", "4", 1) in str(deep.note("x"))


def test_only_what_the_assistant_says_is_learnt_and_questions_are_known() -> None:
    (example,) = Trees("best", None).convert(Records([tree(BRANCHING)], "trees.jsonl", "line", [1]))
    assert [text for text, answer in example.segments if answer] == [" best", " of course"]
    assert example.questions == ("q", "more?")


@pytest.mark.parametrize(
    ("root", "words"),
    [
        ({"text": "q", "role": "human", "replies": []}, ["role is 'human'", "prompter"]),
        (say("q", answer("a") | {"text": 3}), ["'text' must be text, not a number"]),
        (say("q") | {"replies": {}} | {"replies": "x"}, ["'replies' must be a list"]),
        (say("q", "a"), ["must be an object, this is text"]),
        (say("q", answer("a", rank="first")), ["message a", "'rank' must be a number"]),
    ],
)
def test_what_is_no_tree_is_named(root: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        Trees("all", None).convert(Records([tree(root)], "trees.jsonl", "line", [7]))
    for word in ["trees.jsonl, line 7", *words]:
        assert word in str(error.value)


def test_nested_too_deep_is_the_users_to_settle() -> None:
    root = answer("end")
    for _ in range(3000):
        root = say("q", root)
    with pytest.raises(UserError, match="line 1: what it holds is nested too deep"):
        Trees("all", None).convert(Records([tree(root)], "trees.jsonl", "line", [1]))


def write(path: Path, roots: list[dict]) -> str:
    path.write_text("".join(json.dumps(tree(root)) + "\n" for root in roots))
    return str(path)


def test_trees_are_detected_and_settings_apply(tmp_path: Path, tokenizer: Any) -> None:
    german = say("frage", answer("antwort", lang="de"), lang="de")
    path = write(tmp_path / "trees.jsonl", [BRANCHING, german, say("nobody")])
    best = load(path, tokenizer)
    assert (best.format, len(best.train)) == ("oasst_trees", 2)
    assert any("1 of 3 trees without an answer" in note for note in best.notes)
    assert len(load(path, tokenizer, paths="all").train) == 5
    assert len(load(path, tokenizer, paths="all", language="de").train) == 1
    with pytest.raises(UserError, match=r"dataset.language=fr; languages there: en \(2 trees\), de \(1 trees\)"):
        load(path, tokenizer, language="fr")
    with pytest.raises(UserError, match="none of the 1 training records holds an example"):
        load(write(tmp_path / "none.jsonl", [say("nobody")]), tokenizer)


def test_paths_of_a_tree_stay_on_one_side_of_the_split(tmp_path: Path, tokenizer: Any) -> None:
    roots = [say(f"question {name}", answer("a"), answer("b"), answer("c")) for name in "klmnopqr"]
    loaded = load(write(tmp_path / "trees.jsonl", roots), tokenizer, paths="all", eval_fraction=0.25)
    assert (len(loaded.train), len(loaded.eval), loaded.eval_overlap) == (18, 6, 0)


def test_settings_of_trees_are_refused_elsewhere(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    for name, value in (("language", "en"), ("paths", "all")):
        with pytest.raises(UserError, match=f"dataset.{name}={value}: applies to message trees.*prompt_completion"):
            load(str(tmp_path / "pairs.jsonl"), tokenizer, **{name: value})
    flat = [{"message_id": "1", "parent_id": None, "text": "hello", "role": "prompter"}] * 2
    with pytest.raises(UserError, match="single messages of OpenAssistant trees"):
        detect_format(Records(flat, "flat.jsonl", "line", [1, 2]))


def test_real_trees_hold_every_conversation_made_of_them_elsewhere() -> None:
    """The published trees against the guanaco lines that others made of them."""
    folder = SHARED / "data" / "oasst1"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/oasst1")
    trees = Trees("all", "en")
    mine = {e.text for chunk in open_source(str(folder / "en_100_tree.jsonl")).chunks() for e in trees.convert(chunk)}
    theirs = {
        json.loads(line)["text"] for line in (folder / "trees100_guanaco_style_train.jsonl").read_text().splitlines()
    }
    roots = {text.split("### Assistant:")[0] for text in theirs}
    assert len(theirs) == 498 and theirs == {text for text in mine if text.split("### Assistant:")[0] in roots}


def test_fields_that_oasst_does_not_have_are_counted() -> None:
    answer = {"role": "assistant", "text": "b", "weight": 0, "lang": "en", "review_result": True}
    tree = {"message_tree_id": "1", "prompt": {"role": "prompter", "text": "a", "replies": [answer, answer]}}
    trees = Trees("best", None)
    trees.convert(Records([tree, tree | {"system": "x"}], "set", "line", [1, 2]))
    assert trees.note("set") == "fields 'weight' of 2 records, 'system' of 1 record are not used"

"""`sparseft data` as a command: what it prints, its JSON, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.running import refused, sparseft, summary, write_data

CHAT = {
    "messages": [
        {"role": "user", "content": "hi \x1b[31m?"},
        {"role": "assistant", "content": "first answer"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "second answer"},
    ]
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_data(folder)
    return folder


def test_what_is_learnt_is_marked(world: Path) -> None:
    (world / "chats.jsonl").write_text(json.dumps(CHAT) + "\n", encoding="utf-8")
    done = sparseft(world, "data", "chats.jsonl", "dataset.eval_fraction=0")
    assert "User: hi [31m?\n\nAssistant:⟦ first answer⟧\n\nUser: more\n\nAssistant:⟦ second answer</s>⟧\n" in done.out
    assert "\x1b" not in done.out + done.err
    assert "template   plain User: and Assistant: text" in done.out
    assert "data: 1 training record from chats.jsonl, format messages (detected)" in done.err
    assert not (world / "outputs").exists()


def test_its_numbers_are_the_runs(world: Path) -> None:
    """And `train` takes the tokens up."""
    words = ["trainer.max_length=30", "dataset.eval_fraction=0.25", "seed=3"]
    done = sparseft(world, "data", "pairs.jsonl", *words, "--json", "--examples", "2").json
    trained = sparseft(
        world, "train", "method=s2ft", "dataset.train_path=pairs.jsonl", *words, "trainer.max_steps=1",
        "trainer.batch_size=18", "trainer.gradient_accumulation=1", "output_dir=run",
    )  # fmt: skip
    assert "training tokens: cached" in trained.err
    facts = json.loads((world / "run" / "environment.json").read_text())["data"]
    assert (done["examples"], done["tokens"]) == (facts["examples"], facts["tokens"])
    assert done["tokens"] == summary(world / "run")["tokens"] and done["eval_examples"] == 6
    assert sum(row["examples"] for row in done["histogram"]) == done["examples"] == 18
    assert len(done["shown"]) == 2 and done["learnt_tokens"] < done["tokens"]
    for example in done["shown"]:
        assert [part["learnt"] for part in example["parts"]] == [False, True]


def test_what_is_lost_is_counted(world: Path) -> None:
    short, long = {"prompt": "2+3=", "completion": "5"}, {"prompt": "2+3=", "completion": "five " * 40}
    endless = {"prompt": "2+3= " * 40, "completion": "5"}
    (world / "lost.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [short, short, long, endless]))
    words = ("lost.jsonl", "trainer.max_length=24", "dataset.eval_fraction=0")
    done = sparseft(world, "data", *words, "--json").json
    assert (done["examples"], done["cut"], done["dropped"], done["duplicates"]) == (3, 1, 1, 1)
    assert done["lengths"]["max"] == 24
    printed = sparseft(world, "data", *words, "--examples", "0").out
    assert "1 answers end at trainer.max_length=24" in printed and "1 without a token to learn in so many" in printed
    assert "⟦" not in printed


def test_nothing_to_learn_is_refused_with_its_reason(world: Path) -> None:
    (world / "asked.jsonl").write_text(json.dumps({"text": "### Human: anybody there?"}) + "\n")
    assert "no '### Assistant:' turn to learn from" in refused(world, "data", "asked.jsonl", "dataset.format=guanaco")
    (world / "masked.jsonl").write_text(
        json.dumps({"messages": [{**message, "weight": 0} for message in CHAT["messages"]]}) + "\n"
    )
    assert "all answers are masked" in refused(world, "data", "masked.jsonl")
    (world / "long.jsonl").write_text(json.dumps({"prompt": "2 + 3 = " * 90, "completion": "5"}) + "\n")
    assert "fits trainer.max_length=16" in refused(world, "data", "long.jsonl", "trainer.max_length=16")


def test_what_is_wrong_is_one_sentence(world: Path, model_folder: Any, tmp_path: Path) -> None:
    odd = shutil.copy(world / "pairs.jsonl", world / "x=~y.jsonl").name
    assert "x=~y.jsonl, format prompt_completion" in sparseft(world, "data", odd).out
    assert "Did you mean 'pairs.jsonl'" in refused(world, "data", "pears.jsonl")
    assert "One file at a time" in refused(world, "data", "pairs.jsonl", "lost.jsonl")
    assert "set the same" in refused(world, "data", "pairs.jsonl", "dataset.train_path=lost.jsonl")
    assert "Did you mean 'dataset.format'" in refused(world, "data", "pairs.jsonl", "dataset.formt=text")
    assert "no such folder" in refused(world, "data", "pairs.jsonl", "model.path=./nowhere")
    small = shutil.copytree(model_folder(), tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 5}))
    assert "embeddings have 5 rows" in refused(world, "data", "pairs.jsonl", f"model.path={small}")


def test_of_pairs_both_answers_are_shown(world: Path) -> None:
    done = sparseft(world, "data", "objective=dpo", "--examples", "1")
    better, worse = done.out.split("--- worse answer 1: ")
    assert better.startswith(
        "--- better answer 1: 36 tokens, 24 of them learnt\nOne more thing: What age is the bipt?\n⟦Let me"
    )
    assert "\n⟦The bipt is old.</s>⟧\n" in worse and "examples   64 to train on, 24 held out" in done.out
    found = sparseft(world, "data", "objective=kto", "trainer.batch_size=2", "--json").json
    assert found["examples"] == 128 and sum(row["examples"] for row in found["histogram"]) == 128
    assert [each["answer"] for each in found["shown"]] == ["better", "worse"] * 3
    chats = {"prompt": [{"role": "user", "content": "a"}], "chosen": [{}], "rejected": [{}]}
    (world / "chosen.jsonl").write_text(json.dumps(chats) + "\n", encoding="utf-8")
    message = refused(world, "data", "chosen.jsonl")
    assert (
        "line 1: these are pairs of a better and a worse answer, and objective=sft imitates one; objective=dpo"
        in message
    )

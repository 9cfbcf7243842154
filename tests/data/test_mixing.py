"""Several sources in one training set, and old data beside new ones."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from sparseft.compose.run_config import compose, from_dict
from sparseft.config import BUNDLED_ROOT, DatasetConfig
from sparseft.data import mixing
from sparseft.data.loading import LoadedData, load_datasets
from sparseft.data.mixing import Taken, counts, drawn, joined, parse_share, replayed, take
from sparseft.data.preview import duplicates
from sparseft.data.token_cache import Cache
from sparseft.data.tokenized import Facts, TokenizedDataset, Tokens
from sparseft.errors import UserError
from support.running import refused, sparseft, summary


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(Path(BUNDLED_ROOT) / "tiny")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources, told apart by their first letter: 40 of a, 20 of b, 10 of c."""
    folder = tmp_path_factory.mktemp("world")
    for letter, count in (("a", 40), ("b", 20), ("c", 10)):
        lines = (json.dumps({"prompt": f"{letter} {number} =", "completion": "yes"}) for number in range(count))
        (folder / f"{letter}.jsonl").write_text("\n".join(lines))
    return folder


def load(world: Path, tokenizer: Any, seed: int = 0, **settings: Any) -> LoadedData:
    for key in ("train_path", "eval_path", "replay"):
        if settings.get(key):
            settings[key] = str(world / settings[key])
    if "mix" in settings:
        settings["mix"] = [str(world / text) for text in settings["mix"]]
    cache = settings.pop("cache", world / "cache")
    config = DatasetConfig(name="json", **{"eval_fraction": 0.0} | settings)
    return load_datasets(config, tokenizer, max_length=64, seed=seed, bundled=True, cache_dir=cache)


def letters(dataset: TokenizedDataset | None, tokenizer: Any) -> dict[str, int]:
    assert dataset is not None
    return dict(Counter(tokenizer.decode(each["input_ids"]).strip()[0] for each in dataset))


# ---- how many ----


@given(
    st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 10)), min_size=2, max_size=5),
    st.sampled_from(["first", "all"]),
)
def test_shares_hold_and_the_end_is_where_it_was_asked_for(sources: list[tuple[int, float]], stopping: str) -> None:
    sizes, weights = [size for size, _ in sources], [weight for _, weight in sources]
    found = counts(sizes, weights, stopping)
    total = sum(weights)
    whole = (min if stopping == "first" else max)(size * total / weight for size, weight in sources)
    for count, weight in zip(found, weights, strict=True):
        assert count >= 1 and (abs(count - whole * weight / total) <= 0.5 + 1e-6 or count == 1)
    ended = [count >= size for count, size in zip(found, sizes, strict=True)]
    assert any(ended) if stopping == "first" else all(ended)


def test_without_shares_all_is_taken() -> None:
    assert counts([3, 5], None, "first") == counts([3, 5], None, "all") == [3, 5]
    assert replayed(90, 0.1) == 10 and replayed(3, 0.01) == 1


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 3))
def test_no_example_comes_twice_before_all_came_once(count: int, size: int, seed: int) -> None:
    found = drawn(count, size, seed, "mix")
    times = np.bincount(found, minlength=size)
    assert len(found) == count and times.max() - times.min() <= 1 and (found == drawn(count, size, seed, "mix")).all()


def test_shares_are_read() -> None:
    assert parse_share("k", "a.json:0.3") == mixing.Share("a.json", 0.3)
    assert parse_share("k", "bundled:data/a.json") == mixing.Share("bundled:data/a.json", None)
    assert parse_share("k", "bundled:data/a.json:2") == mixing.Share("bundled:data/a.json", 2.0)
    for text in ("a:0", "a:-1", "a:nan", "a:inf", ":0.5"):
        with pytest.raises(UserError, match="no share above 0"):
            parse_share("k", text)


# ---- the examples ----


def tokens(first: int, count: int) -> Tokens:
    """Examples 0 to `count`, their ids from `first` on; two a record, one of them the questions' too."""
    pairs = [([first + i] * (i + 1), [-100] * i + [first + i]) for i in range(count)]
    return Tokens(
        TokenizedDataset.from_lists(pairs), np.arange(count) // 2, np.arange(count, dtype=np.uint64) + first,
        np.arange(count) // 2, Facts(records=count, examples=count, cut=1),
    )  # fmt: skip


def test_joined_pieces_are_the_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "CHUNK", 2)
    pieces = [("a", tokens(10, 5)), ("b", tokens(20, 3))]
    for _ in range(2):  # made, and found
        whole = joined(pieces, Cache(tmp_path))
        assert list(whole.dataset) == [each for _, piece in pieces for each in piece.dataset]
        assert whole.records.tolist() == [0, 0, 1, 1, 2, 3, 3, 4]  # none of the one is one of the other
        assert whole.questions.tolist() == [10, 11, 12, 13, 14, 20, 21, 22]
        assert whole.question_records.tolist() == [0, 0, 1, 1, 2, 3, 3, 4]
    (entry,) = (tmp_path / "tokens").iterdir()
    (entry / "labels.bin").unlink()  # and not cut: it is mapped
    assert list(joined(pieces, Cache(tmp_path)).dataset) == list(whole.dataset)


def test_what_is_taken_of_pieces(tmp_path: Path) -> None:
    pieces = [("a", tokens(10, 5)), ("b", tokens(20, 3))]
    some = np.array([False, True, False, False, True])
    first, second = Taken(0, np.array([4, 1]), some), Taken(1, np.array([2]), np.array([True, False, False]))
    both = take(pieces, [first, second], Cache(tmp_path))
    a, b = (list(piece.dataset) for _, piece in pieces)
    assert list(both.dataset) == [a[4], a[1], b[2]] and both.records.tolist() == [2, 0, 4]
    assert both.questions.tolist() == [11, 14, 20] and both.question_records.tolist() == [0, 2, 3]
    assert both.facts == Facts(records=8, examples=8, cut=2)
    alone = take(pieces, [second], Cache(tmp_path / "unused"))  # of one piece nothing is joined
    assert list(alone.dataset) == [b[2]] and alone.facts == Facts(records=3, examples=3, cut=1)
    assert not (tmp_path / "unused").exists()


def test_a_mix(world: Path, tokenizer: Any) -> None:
    whole = load(world, tokenizer, mix=["a.jsonl", "b.jsonl"])
    assert letters(whole.train, tokenizer) == {"a": 40, "b": 20}
    first = load(world, tokenizer, mix=["a.jsonl:0.5", "b.jsonl:0.5"])
    assert letters(first.train, tokenizer) == {"a": 20, "b": 20} and len(set(first.train.example_keys())) == 40
    every = load(world, tokenizer, mix=["a.jsonl:1", "c.jsonl:1"], stopping="all")
    assert letters(every.train, tokenizer) == {"a": 40, "c": 40} and len(set(every.train.example_keys())) == 50
    assert any("mix: 50.0%" in note and "c.jsonl, 50" in note and "40 examples an epoch, of 10" in note
               for note in every.notes)  # fmt: skip
    again, other = (load(world, tokenizer, seed, mix=["a.jsonl:0.5", "b.jsonl:0.5"]) for seed in (0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.train_source == f"{world / 'a.jsonl'} + {world / 'b.jsonl'}"


def test_no_seed_and_no_share_writes_tokens_again(world: Path, tokenizer: Any, tmp_path: Path) -> None:
    words = {"mix": ["a.jsonl:1", "b.jsonl:1"], "replay": "c.jsonl:0.1", "eval_fraction": 0.2}
    data = load(world, tokenizer, 0, **words, cache=tmp_path)
    there = sorted(path.name for path in (tmp_path / "tokens").iterdir())
    assert len(there) == 4  # three sources, and all of them joined
    other = load(world, tokenizer, 1, **words | {"mix": ["a.jsonl:1", "b.jsonl:3"], "stopping": "all"}, cache=tmp_path)
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == there
    assert data.fingerprint != other.fingerprint and list(data.eval) != list(other.eval)


def test_what_is_held_out_is_not_trained_on(world: Path, tokenizer: Any) -> None:
    data = load(
        world, tokenizer, mix=["a.jsonl:0.5", "b.jsonl:0.5"], stopping="all", replay="c.jsonl:0.2", eval_fraction=0.25
    )
    assert letters(data.eval, tokenizer) == {"a": 10, "b": 5}
    assert letters(data.train, tokenizer) == {"a": 30, "b": 30, "c": 15}
    assert data.eval_overlap == 0 and not set(data.train.example_keys()) & set(data.eval.example_keys())
    one = load(world, tokenizer, train_path="a.jsonl", replay="c.jsonl:0.2", eval_path="b.jsonl")
    assert letters(one.train, tokenizer) == {"a": 40, "c": 10} and letters(one.eval, tokenizer) == {"b": 20}
    packed = load(world, tokenizer, train_path="a.jsonl", replay="c.jsonl:0.2", packing=True)
    assert packed.packed is not None and len(packed.packed) < 50


def prompts(dataset: TokenizedDataset | None, tokenizer: Any) -> Counter[str]:
    assert dataset is not None
    return Counter(tokenizer.decode(each["input_ids"]).partition("=")[0].strip() for each in dataset)


def test_what_one_set_holds_out_no_other_trains(world: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Also with another answer, and of a replayed set; what most of a set asks is no one's own question."""
    rows = [{"prompt": f"a {number} =", "completion": "no"} for number in range(40)]
    rows += [{"prompt": f"x {number} =", "completion": "no"} for number in range(5)]
    (world / "also.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for settings, held in (
        ({"train_path": "a.jsonl", "replay": "also.jsonl:0.5"}, 10),
        ({"mix": ["a.jsonl:0.5", "also.jsonl:0.5"]}, 21),
        ({"mix": ["a.jsonl", "also.jsonl"]}, 21),
    ):
        data = load(world, tokenizer, **settings, eval_fraction=0.25)
        assert data.eval_overlap == 0 and len(data.eval) == held
        assert not set(prompts(data.train, tokenizer)) & set(prompts(data.eval, tokenizer))
        assert any("left out of training" in note for note in data.notes), data.notes
    (world / "alike.jsonl").write_text(
        "\n".join(json.dumps({"prompt": "a 0 =", "completion": f"n {n}"}) for n in range(30))
    )
    for seed in range(12):  # that question is held out of a.jsonl with some of them
        data = load(world, tokenizer, seed, train_path="a.jsonl", replay="alike.jsonl:0.4", eval_fraction=0.25)
        assert prompts(data.train, tokenizer)["a 0"] >= 20
    (world / "same.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"c {n} =", "completion": "so"}) for n in range(9))
    )
    (world / "one.jsonl").write_text(json.dumps({"prompt": "c 9 =", "completion": "so"}))
    said = "dataset.replay: all examples of .*one.jsonl ask questions that are held out"
    refused_once = 0
    for seed in range(30):
        try:
            load(world, tokenizer, seed, train_path="c.jsonl", replay="one.jsonl:0.1", eval_fraction=0.3)
        except UserError as error:
            assert re.match(said, str(error)), error
            refused_once += 1
    assert 0 < refused_once < 30


def test_several_answers_to_a_held_out_question_are_left_out(world: Path, tokenizer: Any) -> None:
    """However few are held out."""
    rows = [{"prompt": f"a {n} =", "completion": each} for n in range(40) for each in ("no", "never", "not so")]
    (world / "thrice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load(world, tokenizer, train_path="a.jsonl", replay="thrice.jsonl:0.5", eval_fraction=0.025)
    assert data.eval_overlap == 0 and len(data.eval) == 1
    assert not set(prompts(data.train, tokenizer)) & set(prompts(data.eval, tokenizer))


def test_questions_of_a_run_are_those_that_it_trains(world: Path, tokenizer: Any) -> None:
    """Of a set of which a share is taken, not all."""
    data = load(world, tokenizer, mix=["a.jsonl:0.2", "c.jsonl:0.8"])
    trained = prompts(data.train, tokenizer)
    assert len(trained) == len(data.questions) == 12 and all(f"{each} =" in data.questions for each in trained)


def test_long_replayed_examples_are_warned_of(world: Path, tokenizer: Any) -> None:
    (world / "long.txt").write_text("This goes on and on. " * 400)
    data = load(world, tokenizer, train_path="a.jsonl", replay="long.txt:0.1")
    (warning,) = [text for text in data.warnings if "dataset.replay" in text]
    assert "long.txt is 9% of the examples but" in warning
    assert not load(world, tokenizer, train_path="a.jsonl", replay="c.jsonl:0.1").warnings


def test_the_same_data_are_seen_under_any_name(world: Path, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(world / "a.jsonl")
    (tmp_path / "copy.jsonl").write_bytes((world / "a.jsonl").read_bytes())
    for other, said in (
        (f"{world}/../{world.name}/a.jsonl", "both read"),
        (str(tmp_path / "link.jsonl"), "both read"),
        (str(world / "[ab].jsonl"), "both read"),
        (str(tmp_path / "copy.jsonl"), "hold the same data"),
    ):
        with pytest.raises(UserError, match=f"dataset.mix: '.*a.jsonl' and '.*' {said}"):
            load(world, tokenizer, mix=["a.jsonl", other])
        with pytest.raises(UserError, match="dataset.replay: '.*' is what is trained on anyway"):
            load(world, tokenizer, train_path="a.jsonl", replay=f"{other}:0.1")


def test_settings_of_a_format_hold_for_the_sets_that_have_it(world: Path, tokenizer: Any) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    (world / "chat.jsonl").write_text(json.dumps(chat))
    data = load(world, tokenizer, mix=["a.jsonl", "chat.jsonl"], plain_chat=True)
    assert "User: Hi" in tokenizer.decode(data.train[40]["input_ids"]) and data.formats == [
        "prompt_completion", "messages",
    ]  # fmt: skip
    with pytest.raises(UserError, match="dataset.language=en: applies to message trees.*a.jsonl has format prompt_"):
        load(world, tokenizer, mix=["a.jsonl", "chat.jsonl"], language="en")


def test_repeats_of_a_share_are_no_duplicates(world: Path, tokenizer: Any) -> None:
    (world / "twice.jsonl").write_text((world / "c.jsonl").read_text() + "\n" + (world / "c.jsonl").read_text())
    data = load(world, tokenizer, mix=["a.jsonl:1", "twice.jsonl:1"], stopping="all")
    assert letters(data.train, tokenizer) == {"a": 40, "c": 40}
    assert len(data.train.places) == 60 and duplicates(data.train) == 10


# ---- commands ----


def test_a_preview_shows_every_source(world: Path) -> None:
    shown = sparseft(world, "data", "dataset=[a.jsonl,b.jsonl]", "--json", "dataset.eval_fraction=0").json["shown"]
    assert {example["parts"][0]["text"].strip()[0] for example in shown} == {"a", "b"}


def test_a_run_on_named_sets(tmp_path: Path) -> None:
    words = ["dataset=[commonsense:0.7,arithmetic:0.3]", "dataset.replay=oasst1:0.1"]
    done = sparseft(
        tmp_path, "train", "method=s2ft", *words, "trainer.max_steps=1", "trainer.gradient_accumulation=1",
        "output_dir=run",
    )  # fmt: skip
    assert "mix: 10.0% replayed from bundled:data/oasst1/train.jsonl" in done.err
    assert summary(tmp_path / "run")["dataset"] == "commonsense:0.7 + arithmetic:0.3"
    config = compose("train", words)
    assert from_dict(config.to_dict()) == config and config.dataset.name == "json"
    data = json.loads((tmp_path / "run" / "environment.json").read_text())["data"]
    assert data["sources"] == [f"bundled:data/{name}/train.json" for name in ("commonsense", "arithmetic")] + [
        "bundled:data/oasst1/train.jsonl"
    ]
    assert data["train"] == " + ".join(data["sources"])


def test_named_sets_of_other_models_are_their_published_ones(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "mine.yaml").write_text("defaults: [_defaults, _self_]\nname: json\ntrain_path: my.jsonl\n")
    config = compose("train", ["model.path=./x", "dataset=[oasst1:0.9,mine:0.1]"], [str(tmp_path)])
    assert config.dataset.mix == ["timdettmers/openassistant-guanaco:0.9", "my.jsonl:0.1"]
    config = compose("train", ["dataset=[mine:0.5,b.jsonl:0.5]"], [str(tmp_path)])
    assert config.dataset.mix == ["my.jsonl:0.5", "b.jsonl:0.5"] and config.dataset.train_path is None
    replay = compose("train", ["model.path=./x", "dataset.train_path=a.jsonl", "dataset.replay=oasst1:0.05"]).dataset
    assert replay.replay == "timdettmers/openassistant-guanaco:0.05"
    assert compose("train", ["dataset=[a.jsonl,b.jsonl]"]).dataset.mix == ["a.jsonl", "b.jsonl"]
    assert compose("train", ["dataset=[a.jsonl,b.jsonl]", "dataset=text"]).dataset.mix is None  # the last word counts
    assert compose("train", ["dataset=text", "dataset=[text,oasst1]"]).dataset.format == "auto"  # of each source


def test_shares_in_yaml(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "both.yaml").write_text(
        "defaults: [_defaults, _self_]\nmix:\n  - my.jsonl: 0.7\n  - owner/name:main: 0.3\nreplay: {old.jsonl: 0.1}\n"
    )
    found = compose("train", ["dataset=both"], [str(tmp_path)]).dataset
    assert found.mix == ["my.jsonl:0.7", "owner/name:main:0.3"] and found.replay == "old.jsonl:0.1"
    assert compose("train", ["dataset=[a.jsonl:0.7, b.jsonl:0.3]"]).dataset.mix == ["a.jsonl:0.7", "b.jsonl:0.3"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dataset.mix=[a.jsonl]"], "name at least two sources"),
        (["dataset.mix=[a.jsonl,a.jsonl:2]"], "named twice"),
        (["dataset.mix=[a.jsonl,b.jsonl:2]"], "'a.jsonl' has no share and others have"),
        (["dataset.mix=[a.jsonl:1,b.jsonl:0]"], "no share above 0"),
        (["dataset.mix=[a.jsonl,b.jsonl]", "dataset.train_path=c.jsonl"], "both name training data"),
        (["dataset=[a.jsonl,d.jsonl]"], "dataset.mix: there is no file 'd.jsonl'"),
        (["dataset.replay=a.jsonl"], "no share between 0 and 1"),
        (["dataset.replay=a.jsonl:1"], "no share between 0 and 1"),
        (["dataset.replay=d.jsonl:0.1"], "dataset.replay: there is no file"),
        (["dataset.train_path=a.jsonl", "dataset.replay=a.jsonl:0.1"], "trained on anyway"),
        (["dataset.stopping=last"], "dataset.stopping"),
        (["dataset.mix=[]"], "name at least two sources"),
        (["dataset.train_path=a.jsonl", "dataset.replay=b.jsonl:0.9999999"], "would be repeated"),
        (["dataset.mix=[a.jsonl:1,c.jsonl:1e9]", "dataset.stopping=all"], "would be repeated"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(world: Path, words: list[str], said: str) -> None:
    assert said in refused(world, "train", *words, "output_dir=never")
    assert not (world / "never").exists()

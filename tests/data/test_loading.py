"""Training data: reading, formats, tokenisation and masks, splits, batches."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sparseft.config import BUNDLED_ROOT, DatasetConfig, RunConfig
from sparseft.data.encoding import Encoder, tokenize
from sparseft.data.formats import Example, detect_format
from sparseft.data.loading import LoadedData, load_datasets
from sparseft.data.packing import Collator, padding_id
from sparseft.data.prompts import alpaca_prompt
from sparseft.data.reading import named_sources
from sparseft.data.records import Records
from sparseft.data.sampling import calibration_batches, calibration_count, seeded_first
from sparseft.data.sources import open_source
from sparseft.data.tokenized import TokenizedDataset
from sparseft.errors import UserError
from support.data import (
    BOS,
    CHATML,
    EOS,
    FORGETFUL,
    convert,
    convert_messages,
    labelled,
    load,
    make_tokenizer,
    records_of,
    write,
)
from support.places import SHARED


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def alpaca(count: int) -> list[dict[str, str]]:
    return [
        {"instruction": f"What is {n} plus one?", "input": "", "output": f"It is {n + 1}", "answer": str(n + 1)}
        for n in range(count)
    ]


# --- formats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "format", "segments"),
    [
        (
            {"instruction": "Add.", "input": "", "output": " 4", "answer": "4"},
            "alpaca",
            [(alpaca_prompt("Add."), False), (" 4", True)],
        ),
        (
            {"instruction": "Add.", "input": "2 and 2", "output": "4"},
            "alpaca",
            [(alpaca_prompt("Add.", "2 and 2"), False), ("4", True)],
        ),
        (
            {"instruction": "Add.", "input": None, "output": "4"},
            "alpaca",
            [(alpaca_prompt("Add."), False), ("4", True)],
        ),
        ({"prompt": "2+2=", "completion": "4"}, "prompt_completion", [("2+2=", False), ("4", True)]),
        ({"text": "Once upon a time"}, "text", [("Once upon a time", True)]),
        (
            {"text": "### Human: a?### Assistant: b.### Human: c?### Assistant: d."},
            "guanaco",
            [
                ("### Human: a?### Assistant:", False),
                (" b.", True),
                ("### Human: c?### Assistant:", False),
                (" d.", True),
            ],
        ),
        (
            {"text": "Be kind.\n### Human: a?\n### Assistant: b.\n### Human: c?"},
            "guanaco",
            [("Be kind.\n### Human: a?\n### Assistant:", False), (" b.\n", True), ("### Human: c?", False)],
        ),
    ],
)
def test_format_is_detected_and_converted(item: dict, format: str, segments: list) -> None:
    records = records_of(item)
    assert detect_format(records) == format
    (converted,) = convert(records, format)
    assert converted.segments == segments
    assert converted.source == "set.jsonl, line 1"


def test_most_of_the_first_records_decide_the_format() -> None:
    about = {"text": "The marks ### Human: and ### Assistant: separate turns."}
    assert detect_format(records_of(about, {"text": "a"}, {"text": "b"})) == "text"
    assert detect_format(records_of({"messages": [{"role": "user", "content": "x"}]})) == "messages"
    assert detect_format(records_of({"conversations": [{"from": "human", "value": "x"}]})) == "messages"


MARKERS = st.sampled_from(["### Human:", "### Assistant:", "### Human: q", "### Assistant: a", " ", "\n", "word", "é☃"])


@settings(deadline=None)
@given(st.lists(MARKERS, max_size=12).map("".join))
@example("### Assistant: first### Human: then")
@example("x### Human:### Assistant: a\n\n### Human: ")
def test_guanaco_keeps_every_character_and_labels_exactly_the_answers(text: str) -> None:
    try:
        found = convert(records_of({"text": text}), "guanaco")
    except UserError:
        found = []
    if not found:
        # Refused or left out only for a reason: an empty text, a speaker missing, or an answer of white space.
        turns = text.split("### Assistant:")[1:]
        assert not turns or "### Human:" not in text or any(not turn.split("### Human:")[0].strip() for turn in turns)
        return
    (converted,) = found
    assert converted.text == text
    answers = [piece for piece, answer in converted.segments if answer]
    assert answers == [turn.split("### Human:")[0] for turn in text.split("### Assistant:")[1:]]


QUESTION = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("item", "format", "why"),
    [
        ({"instruction": "a", "output": " \n"}, "alpaca", "line 2): 'output' is empty"),
        ({"prompt": "a", "completion": ""}, "prompt_completion", "line 2): 'completion' is empty"),
        ({"text": "### Human: only a question"}, "guanaco", "line 2): the text has no '### Assistant:' turn"),
        ({"text": "### Human: a### Assistant: ### Human: b### Assistant: c"}, "guanaco", "line 2): an '###"),
        ({"messages": []}, "messages", "line 2): the conversation is empty"),
        ({"instruction": "a", "output": None}, "alpaca", "line 2): 'output' is empty"),
        ({"prompt": "a", "completion": None}, "prompt_completion", "line 2): 'completion' is empty"),
        ({"text": None}, "guanaco", "line 2): 'text' is empty"),
        ({"conversations": []}, "messages", "line 2): the conversation is empty"),
        ({"messages": None}, "messages", "line 2): the conversation is empty"),
        ({"messages": None, "conversations": None}, "messages", "line 2): the conversation is empty"),
        (
            {"messages": [QUESTION, {"role": "assistant", "content": None}]}, "messages",
            "line 2, message 2): an assistant's 'content' is empty",
        ),
        ({"messages": [QUESTION]}, "messages", "line 2): the conversation has no assistant message"),
        (
            {"messages": [QUESTION, {"role": "assistant", "content": " "}]}, "messages",
            "line 2, message 2): an assistant's 'content' is empty",
        ),
    ],
)  # fmt: skip
def test_a_record_without_an_answer_is_left_out_and_said(
    item: dict, format: str, why: str, tmp_path: Path, tokenizer: Any
) -> None:
    """With the place of the first; a file of nothing else is refused."""
    place, reason = why.split("): ")
    good = {
        "alpaca": {"instruction": "a", "output": "b"},
        "prompt_completion": {"prompt": "a", "completion": "b"},
        "guanaco": {"text": "### Human: a### Assistant: b"},
        "messages": {"messages": [QUESTION, {"role": "assistant", "content": "b"}]},
    }[format]
    loaded = load(write(tmp_path / "a.jsonl", [good, item, item, good]), tokenizer, format=format)
    assert len(loaded.train) == 2
    (warning,) = loaded.warnings
    assert warning.startswith(f"2 records left out: {reason}") and f"a.jsonl, {place})" in warning
    with pytest.raises(UserError, match="none of the 1 training records holds an example .1 record left out: "):
        load(write(tmp_path / "b.jsonl", [item]), tokenizer, format=format)


@pytest.mark.parametrize(
    ("item", "format", "words"),
    [
        ({"instruction": "a", "outptu": "b"}, "alpaca", ["lacks 'output'", "'outptu'", "Did you mean 'output'?"]),
        ({"instruction": " ", "output": "b"}, "alpaca", ["'instruction' is empty"]),
        ({"instruction": "a", "output": 4}, "alpaca", ["'output' must be text, not a number"]),
        ({"instruction": "a", "input": ["x"], "output": "b"}, "alpaca", ["'input' must be text, not a list"]),
        ({"prompt": "a"}, "prompt_completion", ["lacks 'completion'", "prompt"]),
        ({"text": "### Assistant: only an answer"}, "guanaco", ["no '### Human:' turn"]),
        ({}, "text", ["lacks 'text'", "nothing"]),
        ({"text": "half \ud83d a pair"}, "text", ["surrogate", "\\ud83d"]),
    ],
)
def test_bad_record_is_named_with_what_it_lacks(item: dict, format: str, words: list[str]) -> None:
    good = {"instruction": "a", "output": "b", "prompt": "a", "completion": "b", "text": "### Human: a### Assistant: b"}
    with pytest.raises(UserError) as error:
        convert(records_of(good, item), format)
    for word in ["set.jsonl, line 2", *words]:
        assert word in str(error.value)


GOOD = {
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "alpaca": {"instruction": "a", "output": "b"},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "oasst_trees": {"prompt": {"role": "prompter", "text": "a", "replies": [{"role": "assistant", "text": "b"}]}},
    "text": {"text": "a"},
}


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"text": None}, "'text': expected text, got null"),
        ({"messages": None}, "'messages': expected a list of messages, got null"),
        ({"instruction": "a", "output": None}, "'output': expected text, got null"),
    ],
)
def test_of_nulls_alone_no_format_is_detected(tmp_path: Path, tokenizer: Any, item: dict, words: str) -> None:
    with pytest.raises(UserError, match=rf"a\.jsonl, line 1: {words}"):
        load(write(tmp_path / "a.jsonl", [item]), tokenizer)


@pytest.mark.parametrize("nothing", ["", None])
def test_an_empty_text_is_of_any_format(tmp_path: Path, tokenizer: Any, nothing: Any) -> None:
    """Of turns too, though it has none."""
    items = [{"text": "### Human: a### Assistant: b"}, {"text": nothing}]
    found = load(write(tmp_path / "a.jsonl", items), tokenizer)
    assert (found.format, len(found.train)) == ("guanaco", 1)
    assert found.warnings[0].startswith("1 record left out: 'text' is empty (first: ")


def test_nulls_of_parquet_are_left_out_as_empty_texts_are(tmp_path: Path, tokenizer: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"instruction": "Add.", "input": "2 and 2", "output": "4", "system": "Be brief."},
        {"instruction": "Add.", "input": None, "output": "4", "system": None},
        {"instruction": "Add.", "input": None, "output": None, "system": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    texts = [{key: value or "" for key, value in row.items()} for row in rows]
    found, same = load(str(tmp_path / "a.parquet"), tokenizer), load(write(tmp_path / "a.jsonl", texts), tokenizer)
    assert list(found.train) == list(same.train) and len(found.train) == 2
    assert found.warnings[0].startswith("1 record left out: 'output' is empty (first: ")
    asked_nothing = pyarrow.Table.from_pylist([rows[0], rows[0] | {"instruction": None}])
    pyarrow.parquet.write_table(asked_nothing, tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet, record 2: 'instruction': expected text, got null"):
        load(str(tmp_path / "b.parquet"), tokenizer)


@pytest.mark.parametrize("detected", [True, False])
@pytest.mark.parametrize(
    ("format", "item", "words"),
    [
        ("messages", {"messages": "User: a"}, "'messages': expected a list of messages, got text"),
        ("messages", {"messages": {"role": "user"}}, "'messages': expected a list of messages, got an object"),
        ("messages", {"conversations": 5, "id": "x"}, "'conversations': expected a list of messages, got a number"),
        ("text", {"text": ["a"]}, "'text': expected text, got a list"),
        ("text", {"text": 5}, "'text': expected text, got a number"),
        ("text", {"text": True}, "'text': expected text, got true or false"),
        ("alpaca", {"instruction": ["a"], "output": "b"}, "'instruction' must be text, not a list"),
        ("prompt_completion", {"prompt": 5, "completion": "a"}, "'prompt' must be text, not a number"),
        (
            "prompt_completion",
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
            "'prompt' must be text, not a list; the messages of a chat go into one list, under 'messages'",
        ),
        (
            "oasst_trees",
            {"prompt": {"text": "a"}},
            "'prompt': expected a tree's first message, with 'replies' (a list)",
        ),
    ],
)
def test_a_known_key_with_a_value_of_another_type_says_both(
    tmp_path: Path, tokenizer: Any, format: str, item: dict, words: str, detected: bool
) -> None:
    """Alone in a file whose format is detected, or after a good record of the format that is set."""
    path = write(tmp_path / "a.jsonl", [item] if detected else [GOOD[format], item])
    with pytest.raises(UserError) as error:
        load(path, tokenizer, format="auto" if detected else format)
    assert f"a.jsonl, line {1 if detected else 2}: {words}" in str(error.value)
    assert "Did you mean" not in str(error.value)


def test_a_key_that_is_right_is_never_suggested_for_itself() -> None:
    for item, partner in (({"prompt": "a"}, "completion"), ({"instruction": "a"}, "output")):
        with pytest.raises(UserError, match=f"needs '{partner}' beside it") as error:
            detect_format(records_of(item))
        assert "Did you mean" not in str(error.value)


TURNS = {"text": "### Human: a### Assistant: b"}


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([*alpaca(20), GOOD["messages"]], ["line 21", "format messages", "first records have alpaca", "one format"]),
        ([GOOD["messages"], GOOD["prompt_completion"]], ["line 2", "format prompt_completion", "messages"]),
        ([GOOD["messages"], {"messages": None} | GOOD["prompt_completion"]], ["line 2", "format prompt_completion"]),
        ([GOOD["messages"], *alpaca(3)], ["line 1", "format messages", "alpaca"]),
        ([GOOD["text"], TURNS], ["line 2", "guanaco", "dataset.format=text"]),
        ([TURNS, GOOD["text"]], ["line 2", "format text", "dataset.format=text"]),
    ],
)
def test_a_file_of_several_formats_is_refused_by_its_first_odd_record(
    tmp_path: Path, tokenizer: Any, records: list[dict], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        load(write(tmp_path / "a.jsonl", records), tokenizer)
    for word in ["a.jsonl, ", *words]:
        assert word in str(error.value)


def test_keys_of_other_formats_beside_ones_own_are_no_mixture(tmp_path: Path, tokenizer: Any) -> None:
    """Alpaca's own set has its whole prompt as `text`, others a `prompt` beside their `messages`."""
    assert load(write(tmp_path / "a.jsonl", [*alpaca(3), alpaca(1)[0] | TURNS]), tokenizer).format == "alpaca"
    assert (
        load(write(tmp_path / "b.jsonl", [GOOD["messages"], GOOD["messages"] | {"prompt": "a"}]), tokenizer).format
        == "messages"
    )


@pytest.mark.parametrize("set_before", [True, False])
def test_what_was_cached_with_its_format_set_is_still_refused_without(
    tmp_path: Path, tokenizer: Any, set_before: bool
) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "a story of one"}, TURNS])

    def cached(format: str) -> LoadedData:
        config = DatasetConfig(train_path=path, format=format, eval_fraction=0)
        return load_datasets(config, tokenizer, max_length=99, seed=0, bundled=False, cache_dir=tmp_path / "cache")

    if set_before:
        assert len(cached("text").train) == 2
    with pytest.raises(UserError, match="line 2.*format guanaco"):
        cached("auto")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("key", "record"),
    [
        ("completion", '{"prompt": "a", "completion": "b", "completion": "c"}'),
        ("completion", '{"prompt": "a", "completion": "b", "comp\\u006cetion": "c"}'),
        ("x", '{"prompt": "a", "completion": "b", "more": [{"x": 1, "x": 1}]}'),
        ("content", '{"messages": [{"role": "user", "content": "a", "content": "a"}]}'),
    ],
)
def test_a_key_twice_is_refused_with_its_place(tmp_path: Path, name: str, key: str, record: str) -> None:
    good = '{"prompt": "a", "completion": "b"}'
    lines = [f"[{good},", "", f"{record}]"] if name == "a.json" else [good, "", record, good]
    (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=f"{name}, line 3.*: the key '{key}' stands twice"):
        for _ in open_source(str(tmp_path / name)).chunks():
            pass


def test_a_parquet_column_twice_is_refused(tmp_path: Path) -> None:
    import pyarrow.parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet: there are two columns 'text'"):
        open_source(str(tmp_path / "a.parquet"))


def test_unknown_keys_get_suggestions() -> None:
    with pytest.raises(UserError, match=r"line 1: the keys \(instructions, response\).*Did you mean 'instruction'"):
        detect_format(records_of({"instructions": "a", "response": "b"}))


def test_format_can_be_set_against_what_would_be_detected(tmp_path: Path, tokenizer: Any) -> None:
    text = "### Human: a?### Assistant: b."
    loaded = load(write(tmp_path / "a.jsonl", [{"text": text}]), tokenizer, format="text")
    assert loaded.format == "text"
    assert labelled(tokenizer, loaded.train[0]) == text + EOS


# --- chat messages ----------------------------------------------------------------------------------------------

STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('Start with a user.') }}{% endif %}" + CHATML

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "<think>x</think>Hi"},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": [{"type": "text", "text": "Enough"}]},
    {"role": "user", "content": "Unanswered"},
]


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(bos=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def test_messages_go_through_the_chat_template() -> None:
    tokenizer = chat_tokenizer(CHATML)
    examples, note = convert_messages(records_of({"messages": CHAT}), tokenizer)
    assert "chat template" in note and "plain" not in note
    assert examples[0].segments == [
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("<think>x</think>Hi<|im_end|>\n", True),
        ("<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n", False),
        ("Enough<|im_end|>\n", True),
    ]
    done = tokenize(examples, Encoder(tokenizer), max_length=512)
    # The template's own end of turn is there, so no EOS is put behind it.
    assert labelled(tokenizer, done.dataset[0]) == "<think>x</think>Hi<|im_end|>\nEnough<|im_end|>\n"
    assert tokenizer.eos_token_id not in done.dataset[0]["input_ids"]


def test_template_that_rewrites_earlier_turns_gives_one_example_an_answer() -> None:
    tokenizer = chat_tokenizer(FORGETFUL)
    examples, note = convert_messages(records_of({"messages": CHAT}), tokenizer)
    assert "one example an answer" in note
    assert [[text for text, answer in each.segments if answer] for each in examples] == [
        ["<think>x</think>Hi<|im_end|>\n"],
        ["Enough<|im_end|>\n"],
    ]
    assert "<think>" not in examples[1].segments[0][0] and "Hi" in examples[1].segments[0][0]
    assert [each.record for each in examples] == [0, 0]


def test_messages_without_a_template_are_plain_text_and_that_is_said() -> None:
    tokenizer = chat_tokenizer(None)
    sharegpt = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
    examples, note = convert_messages(records_of({"messages": CHAT}, {"conversations": sharegpt}), tokenizer)
    assert "plain User/Assistant text" in note
    assert examples[0].segments == [
        ("Be brief.\n\nUser: Hello\n\nAssistant:", False),
        (" <think>x</think>Hi", True),
        ("\n\nUser: More\n\nAssistant:", False),
        (" Enough", True),
    ]
    assert examples[1].segments == [("User: Hello\n\nAssistant:", False), (" Hi", True)]
    done = tokenize(examples, Encoder(tokenizer), max_length=512)
    assert labelled(tokenizer, done.dataset[1]) == " Hi" + EOS


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ({}, ["needs a list under 'messages' or 'conversations'"]),
        ([{"role": "asistant", "content": "a"}], ["message 1", "Did you mean 'assistant'?"]),
        ([{"role": "user"}, {"role": "assistant", "content": "a"}], ["message 1", "must be text, not null"]),
        (
            [{"role": "user", "content": "q"}, {"role": "assistant", "text": "a"}],
            ["message 2", "must be text, not null"],
        ),
        (["hello"], ["message 1", "expected an object"]),
        ([{"role": "user", "content": [{"type": "image"}]}], ["message 1", "type text"]),
        ([{"role": "assistant", "content": "a", "tool_calls": [1]}], ["message 1", "tool calls"]),
        ([{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}], ["refuses", "Start with a user"]),
    ],
)
def test_bad_conversation_is_named(messages: list, words: list[str]) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(UserError) as error:
        convert_messages(records_of(good, {"messages": messages}), chat_tokenizer(STRICT))
    for word in ["set.jsonl, line 2", *words]:
        assert word in str(error.value)


# --- sources ----------------------------------------------------------------------------------------------------


def test_array_lines_and_parquet_give_the_same_examples(tmp_path: Path, tokenizer: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    items = [*alpaca(3), {"instruction": "Où?", "input": "☃\u2028", "output": "Zürich 🙂", "answer": ""}]
    array = load(write(tmp_path / "a.json", items), tokenizer)
    # A byte order mark, CRLF ends, blank lines, unescaped unicode (a raw U+2028 among it), no newline at the end.
    lines = "\r\n".join(["", *(json.dumps(item, ensure_ascii=False) for item in items[:2]), "  "])
    lines += "\r\n" + "\r\n".join(json.dumps(item, ensure_ascii=False) for item in items[2:])
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), tmp_path / "c.parquet")
    (tmp_path / "no_suffix").write_bytes((tmp_path / "b.jsonl").read_bytes())
    for name in ("b.jsonl", "c.parquet", "no_suffix"):
        other = load(str(tmp_path / name), tokenizer)
        assert list(other.train) == list(array.train)
        assert other.fingerprint == array.fingerprint
    assert labelled(tokenizer, array.train[3]) == "Zürich 🙂" + EOS


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n\n{"text": "b"}\n')
    records = open_source(str(tmp_path / "a.jsonl")).first(9)
    assert [records.where(index)[-6:] for index in (0, 1)] == ["line 1", "line 4"]


def test_text_file_is_documents_between_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\r\n\r\nfirst\r\nmore\r\n \r\n\r\nsecond é\r\n".encode())
    records = open_source(str(tmp_path / "a.txt")).first(9)
    assert [item["text"] for item in records.items] == ["first\nmore", "second é"]
    assert records.numbers == [3, 7]
    assert detect_format(Records([{"text": "### Human: a### Assistant: b"}], "x", plain_text=True)) == "text"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', ["line 2", "broken JSON", "one JSON object a line"]),
        ("a.json", b'[{"text": "a"},\n {"text": }]', ["line 2, column 11", "broken JSON", "JSON array"]),
        ("a.json", b'{\n "data": []\n}', ["is one JSON object", "keys: data", "array of records or JSON lines"]),
        ("a.json", b"[]", ["holds no records"]),
        ("a.json", b'[{"text": "a"}, "b"]', ["record 2", "must be a JSON object", "this is text"]),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', ["line 2", "must be a JSON object", "list"]),
        ("a.jsonl", b'{"text": "a"}\n{"n": ' + b"9" * 5000 + b"}\n", ["line 2", "broken JSON", "digits"]),
        ("a.json", b'[{"n": ' + b"9" * 5000 + b"}]", ["line 1", "broken JSON", "digits"]),
        ("a.jsonl", b'{"text": ' + b"[" * 200000, ["line 1", "nested too deep"]),
        ("a.json", b'[{"text": ' + b"[" * 200000, ["line 1", "nested too deep"]),
        ("a.jsonl", b" \n\n", ["is empty"]),
        ("a.txt", b"", ["is empty"]),
        ("a.txt", b"fine\nb\xe9d\n", ["line 2", "not UTF-8"]),
        ("a.parquet", b"PAR1 nonsense", ["not a readable parquet file"]),
        ("a.csv", b"prompt,completion\na,b\n\nc\n", ["line 4", "1 fields", "names 2", "prompt, completion"]),
        ("a.csv", b'prompt,completion\n"a"b,c\n', ["line 2", "broken row"]),
        ("a.tsv", b"a\ta\n1\t2\n", ["two columns 'a'"]),
        ("a.csv", b"prompt\nb\xe9d\n", ["line 2", "not UTF-8"]),
        ("a.csv", b"prompt,completion\n", ["holds no records"]),
        ("a.arrow", b"nonsense", ["not a readable Arrow file"]),
        ("a.arrow", b"ARROW1 nonsense", ["not a readable Arrow file"]),
    ],
)
def test_broken_files_are_named_with_the_place(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        for _ in open_source(str(tmp_path / name)).chunks():
            pass
    for word in [name, *words]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_name_the_nearest(tmp_path: Path, in_tmp: Path) -> None:
    write(tmp_path / "train.jsonl", [{"text": "a"}])
    cases = {
        str(tmp_path / "trian.jsonl"): "Did you mean 'train.jsonl'",
        "trian.jsonl": "Did you mean 'train.jsonl'",
        str(tmp_path / "xyz"): "Available: train.jsonl",
        str(tmp_path / "nowhere" / "train.jsonl"): "nowhere' does not exist",
        str(tmp_path / "*.json"): "no file matches",
        str(tmp_path / "train.jsonl:main"): "there is no file",
        "bundled:comonsense/train.json": "Did you mean 'commonsense/train.json'",
        "bundled:../config.py": "bundles no data file",
    }
    for path, message in cases.items():
        with pytest.raises(UserError, match=f"dataset.eval_path: .*{message}"):
            open_source(path, key="dataset.eval_path")


def test_a_path_that_is_gone_is_not_looked_up_on_the_hub(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    import datasets

    def hub(*_: Any, **__: Any) -> None:
        raise AssertionError("looked up on the hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", hub)
    (in_tmp / "data").mkdir()
    write(in_tmp / "data" / "train.jsonl", [{"text": "a"}])
    cases = {
        "data/trian.jsonl": "Did you mean 'train.jsonl'",
        "data/train": "Did you mean 'train.jsonl'",  # no ending, but its folder is here
        "dta/train.jsonl": "'dta' does not exist.*Did you mean 'data/train.jsonl'",
        "dta/train.json.gz": "'dta' does not exist.*Did you mean 'data'",
        "nowhere/set.csv": "'nowhere' does not exist",
        "nowhere/set.parquet": "'nowhere' does not exist",
        "nowhere/set.txt.zst": "'nowhere' does not exist",
        "./train": "",
        "../gone/train": "'../gone' does not exist",
        "one/two/three": "'one/two' does not exist",
        "~/gone/train": "gone' does not exist",
        "train.jsonl": "",
    }
    for path, message in cases.items():
        looked = "" if path.startswith("~") else rf" \(looked in {in_tmp}\)"
        for key in ("dataset.train_path", "dataset.eval_path"):
            with pytest.raises(UserError, match=rf"{key}: there is no file '{re.escape(path)}'{looked}\..*{message}"):
                open_source(path, key=key)
    with pytest.raises(AssertionError, match="looked up on the hub"):
        open_source("owner/name")


def test_a_pipe_is_said_to_be_none_that_can_be_read_again(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="is no regular file"):
        open_source(str(tmp_path / "a.jsonl"))


def test_hub_id_offline_says_to_give_a_file() -> None:
    with pytest.raises(UserError, match=r"somebody/no-such-set.*hub.*dataset\.train_path=FILE"):
        open_source("somebody/no-such-set")


# --- tokens and labels ------------------------------------------------------------------------------------------


def one(segments: list[tuple[str, bool]], tokenizer: Any, **settings: Any) -> dict[str, list[int]] | None:
    """The single example that `segments` become; None if it was dropped."""
    done = tokenize([Example(segments, "here")], Encoder(tokenizer), **{"max_length": 512, **settings})
    assert len(done.dataset) + done.facts.dropped == 1
    return done.dataset[0] if len(done.dataset) else None


@pytest.mark.parametrize("bos", [True, False])
def test_prompt_ids_are_what_evaluation_feeds_though_merges_cross_the_border(bos: bool) -> None:
    tokenizer = make_tokenizer(bos=bos)
    prompt, answer = alpaca_prompt("Is it?"), "the correct answer is true"
    prompt_ids = tokenizer(prompt)["input_ids"]
    joined = tokenizer(prompt + answer)["input_ids"]
    assert joined[: len(prompt_ids)] != prompt_ids  # else this tokenizer would prove nothing
    item = one([(prompt, False), (answer, True)], tokenizer)
    count = len(prompt_ids)
    assert item["input_ids"][:count] == prompt_ids
    assert item["labels"] == [-100] * count + item["input_ids"][count:]
    assert labelled(tokenizer, item) == answer + EOS
    assert item["input_ids"].count(tokenizer.bos_token_id) == int(bos)


@pytest.mark.parametrize("style", ["bytes", "prepend", "metaspace", "prefix_space"])
def test_an_answer_gets_no_space_that_the_text_does_not_have(style: str) -> None:
    tokenizer = make_tokenizer(style)
    segments = [("Q: né?\n", False), ("the end", True), ("\nQ: ☃\nA:", False), (" Hello there", True)]
    item = one(segments, tokenizer)
    text = tokenizer.decode(item["input_ids"], skip_special_tokens=True)
    assert text.removeprefix(" " if style == "prefix_space" else "") == "".join(text for text, _ in segments)
    first = tokenizer("Q: né?\n")["input_ids"]
    assert item["input_ids"][: len(first)] == first
    assert item["labels"][: len(first)] == [-100] * len(first)


BORDERS = st.sampled_from(
    ["the ", "answer", ":", " ", "", "\n", "correct", BOS, EOS, "</", "s>", f"is{EOS}\n", "Z\u00fcrich"]
)


@pytest.mark.parametrize("style", ["bytes", "prepend", "metaspace", "prefix_space"])
@given(texts=st.lists(BORDERS, max_size=8))
def test_texts_join_where_no_token_spans_a_border_of_the_whole(style: str, texts: list[str]) -> None:
    """Though each border is looked at with the text since the last added token alone."""
    encoder = _encoder(style)

    def ids(text: str) -> list[int]:
        return encoder.tokenizer(text, add_special_tokens=False)["input_ids"]

    wholes = ["".join(texts[:count]) for count in range(1, len(texts) + 1)]
    borders = zip(wholes, wholes[1:], strict=False)
    expected = all(ids(after)[: len(ids(before))] == ids(before) for before, after in borders)
    assert encoder.joins([(text, False) for text in texts]) == expected


@functools.cache
def _encoder(style: str) -> Encoder:
    return Encoder(make_tokenizer(style))


def test_labels_of_several_turns_decode_to_the_answers(tokenizer: Any) -> None:
    (converted,) = convert(
        records_of({"text": "### Human: a?### Assistant: Hello there### Human: c?### Assistant: the end### Human: x"}),
        "guanaco",
    )
    item = one(converted.segments, tokenizer)
    # No EOS between the turns, one at the end; the question nobody answered is gone.
    assert labelled(tokenizer, item) == " Hello there the end" + EOS
    text = tokenizer.decode(item["input_ids"])
    assert text == BOS + "### Human: a?### Assistant: Hello there### Human: c?### Assistant: the end" + EOS


def test_bos_and_eos_never_stand_twice(tokenizer: Any) -> None:
    item = one([(BOS + "Q:", False), (" A" + EOS, True)], tokenizer)
    assert item["input_ids"].count(tokenizer.bos_token_id) == 1
    assert item["input_ids"].count(tokenizer.eos_token_id) == 1
    assert item["labels"][-1] == tokenizer.eos_token_id


def test_tokenizer_without_eos_is_used_and_reported(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(eos=False)
    loaded = load(write(tmp_path / "a.json", alpaca(1)), tokenizer)
    assert labelled(tokenizer, loaded.train[0]) == "It is 1"
    assert any("no EOS" in note for note in loaded.notes)


def test_loss_on_prompt_labels_all_but_the_first_token(tokenizer: Any) -> None:
    item = one([("Q: a", False), (" b", True)], tokenizer, loss_on_prompt=True)
    assert item["labels"] == [-100, *item["input_ids"][1:]]
    # Without BOS the first token is text, but nothing stands before it to predict it either.
    item = one([("Hello there", True)], make_tokenizer(bos=False))
    assert item["labels"] == [-100, *item["input_ids"][1:]]


def test_too_long_cuts_the_answer_and_never_the_question(tokenizer: Any) -> None:
    segments = [("Where is it? Zürich?", False), ("né à Zürich, the end of all", True)]
    whole = one(segments, tokenizer)
    length, prompt = len(whole["input_ids"]), len(tokenizer(segments[0][0])["input_ids"])
    assert one(segments, tokenizer, max_length=length) == whole
    for room in range(2, length):
        cut = one(segments, tokenizer, max_length=room)
        if room <= prompt:
            assert cut is None
        else:
            assert cut == {"input_ids": whole["input_ids"][:room], "labels": whole["labels"][:room]}
        assert one(segments, tokenizer, max_length=room, too_long="drop") is None
    done = tokenize([Example(segments, "here")] * 3, Encoder(tokenizer), max_length=prompt + 1)
    assert (len(done.dataset), done.facts.cut, done.facts.dropped) == (3, 3, 0)


def test_too_long_conversation_loses_whole_questions_at_the_end(tokenizer: Any) -> None:
    turns = [("Q: one?", False), (" Hello", True), ("Q: zwei?", False), (" there", True)]
    whole = one(turns, tokenizer)
    first = len(one(turns[:2], tokenizer)["input_ids"]) - 1  # less EOS
    question = len(Encoder(tokenizer)._encode_texts(["Q: zwei?"])[0])
    for room in range(first, first + question + 1):  # the second question, or only a part of it, would fit
        item = one(turns, tokenizer, max_length=room)
        assert tokenizer.decode(item["input_ids"]) == BOS + "Q: one? Hello"
    item = one(turns, tokenizer, max_length=first + question + 1)
    assert item["input_ids"] == whole["input_ids"][: first + question + 1]
    assert item["labels"][-1] == whole["input_ids"][first + question]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("max_length", [2, 3, 7, 8, 500])
def test_long_text_is_cut_in_pieces_that_predict_every_token_once(bos: bool, max_length: int) -> None:
    tokenizer = make_tokenizer(bos=bos)
    text = "né à Zürich, the end. " * 3
    whole = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    done = tokenize([Example([(text, True)], "here")], Encoder(tokenizer), max_length=max_length, chunk=True)
    assert all(2 <= len(item["input_ids"]) <= max_length for item in done.dataset)
    assert [label for item in done.dataset for label in item["labels"] if label != -100] == whole[1:]
    assert [i["input_ids"][0] for i in done.dataset] == whole[: -1 : max_length - 1]
    assert (done.facts.cut, done.facts.dropped) == (0, 0)


def test_stored_examples_behave_as_a_map_dataset() -> None:
    data = TokenizedDataset.from_lists([([5, 6, 7], [-100, 6, 7]), ([8, 9], [-100, 9])])
    assert len(data) == 2 and data.num_tokens == 5
    assert data[-1] == data[torch.tensor(1)] == {"input_ids": [8, 9], "labels": [-100, 9]}
    assert list(data.lengths) == [3, 2]
    with pytest.raises(IndexError):
        data[2]
    assert list(data.subset([1, 0])) == [data[1], data[0]]
    assert len(data.subset([])) == 0
    packed = torch.tensor([0, 3, 5], dtype=torch.int64).numpy().tobytes()
    packed += torch.tensor([5, 6, 7, 8, 9, -100, 6, 7, -100, 9], dtype=torch.int32).numpy().tobytes()
    assert data.fingerprint() == hashlib.sha256(packed).hexdigest()
    moved = TokenizedDataset.from_lists([([5, 6], [-100, 6]), ([7, 8, 9], [7, -100, 9])])
    assert moved.fingerprint() != data.fingerprint()


# --- load_datasets ----------------------------------------------------------------------------------------------


def decoded(tokenizer: Any, data: TokenizedDataset) -> list[str]:
    return [tokenizer.decode(item["input_ids"]) for item in data]


def test_split_is_seeded_disjoint_and_complete(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.json", alpaca(40))
    everything = decoded(tokenizer, load(path, tokenizer).train)
    assert len(set(everything)) == 40
    loaded = load(path, tokenizer, eval_fraction=0.1, seed=3)
    train, held_out = decoded(tokenizer, loaded.train), decoded(tokenizer, loaded.eval)
    assert len(held_out) == 4 and not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(everything)
    assert train == [text for text in everything if text in set(train)]  # file order
    again = load(path, tokenizer, eval_fraction=0.1, seed=3)
    assert (list(again.train), list(again.eval)) == (list(loaded.train), list(loaded.eval))
    assert again.fingerprint == loaded.fingerprint == loaded.train.fingerprint()
    other = load(path, tokenizer, eval_fraction=0.1, seed=4)
    assert decoded(tokenizer, other.eval) != held_out and other.fingerprint != loaded.fingerprint


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"), [(40, 0.0, None), (40, 0.001, 1), (2, 0.05, 1), (2, 0.99, 1), (1, 0.5, None)]
)
def test_split_sizes(tmp_path: Path, tokenizer: Any, count: int, fraction: float, held_out: int | None) -> None:
    loaded = load(write(tmp_path / "a.json", alpaca(count)), tokenizer, eval_fraction=fraction)
    assert (None if loaded.eval is None else len(loaded.eval)) == held_out
    assert len(loaded.train) == count - (held_out or 0)
    assert bool(loaded.eval_source) == (held_out is not None)


def test_examples_of_one_record_stay_on_one_side_of_the_split(tmp_path: Path, tokenizer: Any) -> None:
    documents = [" ".join([word] * 60) for word in ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")]
    path = write(tmp_path / "a.txt", "\n\n".join(documents))
    loaded = load(path, tokenizer, eval_fraction=0.3, max_length=20)
    assert len(loaded.train) > 6
    words = [{w for w in ("alpha", "beta", "gamma", "delta", "epsilon", "zeta") for t in texts if w in t}
             for texts in (decoded(tokenizer, loaded.train), decoded(tokenizer, loaded.eval))]  # fmt: skip
    assert not words[0] & words[1] and len(words[0]) == 4 and len(words[1]) == 2
    single = load(write(tmp_path / "b.txt", documents[0]), tokenizer, eval_fraction=0.3, max_length=20)
    assert len(single.eval) >= 1 and len(single.train) > len(single.eval)


def test_max_examples_comes_before_everything_else(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.json", [*alpaca(10), {"instruction": "bad"}])
    assert decoded(tokenizer, load(path, tokenizer, max_examples=10).train)[9].endswith("It is 10" + EOS)
    loaded = load(path, tokenizer, max_examples=4, eval_fraction=0.5)
    assert (len(loaded.train), len(loaded.eval)) == (2, 2)
    with pytest.raises(UserError, match="record 11.*lacks 'output'"):
        load(path, tokenizer)


def test_eval_path_wins_over_the_split_and_overlap_is_reported(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.json", alpaca(10))
    eval_path = write(tmp_path / "e.jsonl", [*alpaca(12)[9:], {"instruction": "x", "output": "y"}])
    loaded = load(path, tokenizer, eval_path=eval_path, eval_fraction=0.5)
    assert (len(loaded.train), len(loaded.eval)) == (10, 4)
    assert (loaded.train_source, loaded.eval_source) == (path, eval_path)
    assert any("1 of 4 evaluation examples are also training examples" in note for note in loaded.warnings)
    assert any("1 of 4 questions of the evaluation examples are training questions" in each for each in loaded.warnings)
    assert loaded.eval_overlap == 1
    with pytest.raises(UserError, match="dataset.eval_path: there is no file"):
        load(path, tokenizer, eval_path=str(tmp_path / "none.json"))


def test_cut_and_dropped_are_counted_and_nothing_left_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    short, long = {"prompt": "Q:", "completion": "a"}, {"prompt": "Q:", "completion": "abcdefghij" * 5}
    endless = {"prompt": "Question " * 30, "completion": "a"}
    path = write(tmp_path / "a.jsonl", [short, long, endless])
    loaded = load(path, tokenizer, max_length=20)
    assert (len(loaded.train), loaded.cut, loaded.dropped) == (2, 1, 1)
    assert loaded.train.lengths.max() == 20
    loaded = load(path, tokenizer, max_length=20, too_long="drop")
    assert (len(loaded.train), loaded.cut, loaded.dropped) == (1, 0, 2)
    with pytest.raises(UserError, match="none of the 1 training examples fits trainer.max_length=20"):
        load(write(tmp_path / "b.jsonl", [endless]), tokenizer, max_length=20)


def test_a_set_that_is_on_no_hub_says_where_its_file_is() -> None:
    with pytest.raises(UserError, match=r"dataset\.train_path=FILE \(math_10k\.json of github\.com/AGI-Edgerunners"):
        named_sources(DatasetConfig(name="arithmetic"), bundled=False)
    with pytest.raises(UserError, match=r"dataset 'text' names no training data for this model; .*=FILE\.$"):
        named_sources(DatasetConfig(name="text"), bundled=False)


@pytest.mark.parametrize("name", ["commonsense", "arithmetic", "oasst1", "text", "json"])
def test_bundled_sets_load_with_the_bundled_model(name: str, tokenizer: Any, in_tmp: Path) -> None:
    config = DatasetConfig(name=name, hub_path="somebody/else")
    loaded = load_datasets(config, tokenizer, max_length=512, seed=0, bundled=True, cache_dir=in_tmp)
    assert loaded.train_source.startswith("bundled:data/") and len(loaded.train) > 50
    format = {"oasst1": "guanaco", "text": "text"}.get(name, "alpaca")
    assert (loaded.format, loaded.dropped) == (format, 0)
    own_eval = name in ("oasst1", "text")
    assert own_eval == loaded.eval_source.rpartition("/")[2].startswith("eval.")
    if not own_eval:
        assert len(loaded.eval) == round(0.05 * (len(loaded.train) + len(loaded.eval)))
    else:
        lines = (BUNDLED_ROOT / "data" / loaded.eval_source.removeprefix("bundled:data/")).read_text().strip()
        assert len(loaded.eval) == len(lines.split("\n\n" if name == "text" else "\n"))


def test_tokens_lie_where_the_command_keeps_them(in_tmp: Path, tokenizer: Any) -> None:
    config = DatasetConfig(train_path=write(in_tmp / "a.json", alpaca(3)), eval_fraction=0)
    assert len(load_datasets(config, tokenizer, max_length=512, seed=0, bundled=False).train) == 3
    assert (in_tmp / RunConfig.cache_dir / "tokens").is_dir()


def test_which_training_set_is_taken(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.json", alpaca(3))
    config = DatasetConfig(train_path=path, eval_fraction=0)
    bundled = {"max_length": 512, "seed": 0, "bundled": True, "cache_dir": tmp_path / "cache"}
    assert load_datasets(config, tokenizer, **bundled).train_source == path
    with pytest.raises(UserError, match="dataset.train_path="):
        load(None, tokenizer)
    with pytest.raises(UserError, match="'oast1'.*dataset.train_path=FILE.*Did you mean 'oasst1'"):
        load_datasets(DatasetConfig(name="oast1"), tokenizer, **bundled)


# --- batches ----------------------------------------------------------------------------------------------------


def test_collator_pads_right_and_keeps_the_label_of_a_real_eos() -> None:
    examples = [{"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}, {"input_ids": [7, 2], "labels": [-100, 2]}]
    batch = Collator(2)(examples)  # the pad token is EOS
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 2], [7, 2, 2]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, 6, 2], [-100, 2, -100]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    whole = Collator(2)(examples[:1])
    assert {name: tensor.tolist() for name, tensor in whole.items()} == {  # no mask where nothing is to be masked
        "input_ids": [[5, 6, 2]],
        "labels": [[-100, 6, 2]],
    }
    longer = Collator(2, pad_to=4)(examples[:1])
    assert {name: tensor.tolist() for name, tensor in longer.items()} == {
        "input_ids": [[5, 6, 2, 2]],
        "attention_mask": [[1, 1, 1, 0]],
        "labels": [[-100, 6, 2, -100]],
    }


def test_padding_without_a_pad_token() -> None:
    tokenizer = make_tokenizer()
    assert padding_id(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert padding_id(tokenizer) == tokenizer.eos_token_id
    assert padding_id(make_tokenizer(eos=False)) == 0


def test_calibration_batches_are_distinct_seeded_and_unpadded() -> None:
    data = TokenizedDataset.from_lists([(list(range(n, 2 * n + 2)), [-100] * n + [1, 2]) for n in range(20)])
    batches = calibration_batches(data, 8, 5, 0)
    chosen = [tuple(batch["input_ids"][0].tolist()) for batch in batches]
    assert len(set(chosen)) == len(chosen) == 8
    assert set(chosen) <= {tuple(item["input_ids"]) for item in data}
    assert all("attention_mask" not in batch and batch["labels"].shape[0] == 1 for batch in batches)
    again = [tuple(batch["input_ids"][0].tolist()) for batch in calibration_batches(data, 8, 5, 0)]
    other = [tuple(batch["input_ids"][0].tolist()) for batch in calibration_batches(data, 8, 6, 0)]
    assert chosen == again != other
    assert len(calibration_batches(data, 1000, 5, 0)) == 20
    for wrong in (0, -1, 0.0, 1.0, 1.5, float("nan")):
        with pytest.raises(UserError, match="method.num_samples"):
            calibration_batches(data, wrong, 5, 0)


def test_calibration_on_a_share_of_the_data() -> None:
    data = TokenizedDataset.from_lists([([n, n, 1], [-100, n, 1]) for n in range(300)])

    def chosen(num_samples: float | None) -> list[int]:
        return [int(batch["input_ids"][0, 0]) for batch in calibration_batches(data, num_samples, 5, 0)]

    assert chosen(None) == chosen(0.01) == chosen(3)  # 1 % of 300, the same as by number
    assert chosen(0.5) == chosen(150)
    assert len(chosen(1e-6)) == 1
    assert [calibration_count(None, n) for n in (1, 149, 151, 1000, 170_000)] == [1, 1, 2, 10, 1700]


def test_seeded_order_is_a_permutation_fixed_for_good() -> None:
    assert sorted(seeded_first(1000, 1000, 7, "evaluation")) == list(range(1000))
    assert seeded_first(1000, 1000, 7, "evaluation") != seeded_first(1000, 1000, 7, "calibration")
    # By definition, and so in every version: indices in the order of blake2b("purpose:seed:index").
    order = sorted(range(50), key=lambda i: hashlib.blake2b(f"evaluation:7:{i}".encode(), digest_size=16).digest())
    assert seeded_first(50, 50, 7, "evaluation") == order
    assert seeded_first(8, 50, 7, "evaluation") == order[:8]


# --- the rest ---------------------------------------------------------------------------------------------------


def test_lm_eval_feeds_the_same_prompt_ids(make_hflm: Callable[[Any], Any]) -> None:
    """What lm-eval's own code makes of a prompt is the start of the training example."""
    prompt = alpaca_prompt("Is it?")
    for bos in (True, False):
        tokenizer = make_tokenizer(bos=bos)
        item = one([(prompt, False), ("the correct answer is true", True)], tokenizer)
        for ids in (make_hflm(tokenizer).tok_encode(prompt), make_hflm(tokenizer).tok_batch_encode([prompt])[0][0]):
            assert item["input_ids"][: len(ids)] == list(map(int, ids))
            assert item["labels"][len(ids) - 1 : len(ids) + 1] == [-100, item["input_ids"][len(ids)]]


@pytest.fixture
def make_hflm() -> Callable[[Any], Any]:
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=800, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    return lambda tokenizer: HFLM(pretrained=model, tokenizer=tokenizer)


@pytest.mark.skipif(not (SHARED / "models/stories260k").is_dir(), reason="needs ../shared/models/stories260k")
@pytest.mark.skipif(not (SHARED / "data/oasst1").is_dir(), reason="needs ../shared/data/oasst1")
def test_real_conversations_round_trip_with_a_real_tokenizer() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models/stories260k")
    file = SHARED / "data/oasst1/trees100_guanaco_style_train.jsonl"
    loaded = load(str(file), tokenizer, max_length=100_000, max_examples=40)
    texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").split("\n")[:40]]
    assert loaded.format == "guanaco" and (loaded.dropped, loaded.cut) == (0, 0)
    for item, text in zip(loaded.train, texts, strict=True):
        assert tokenizer.decode(item["input_ids"], skip_special_tokens=True) == text
        answers = [turn.split("### Human:")[0] for turn in text.split("### Assistant:")[1:]]
        # This tokenizer's decoder strips one space at the start of what it is given.
        assert " " + labelled(tokenizer, item) == "".join(answers) + EOS

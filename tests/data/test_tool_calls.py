"""Tools and their calls as OpenAI, transformers and ShareGPT write them: in one form, the template's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparseft.config import DatasetConfig
from sparseft.data.encoding import Encoder, tokenize
from sparseft.data.loading import load_datasets
from sparseft.errors import UserError
from support.data import BOS, EOS, convert_messages, make_tokenizer, records_of

ARGUMENTS = {"city": "Zürich", "days": [1, 2]}
AS_TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
SCHEMA = {"name": "weather", "description": "How it is.", "parameters": {"type": "object", "properties": {}}}

# What templates do with a call's arguments: to JSON (Qwen2.5, Llama 3), joined to text (DeepSeek V3), written as they
# come (some write Python's form of an object then), either (Qwen3), or one by one (Qwen3-Coder).
WRITE = {
    "tojson": "{{ f.arguments | tojson }}",
    "joined": "{{ '' + f.arguments }}",
    "bare": "{{ f.arguments }}",
    "either": "{{ f.arguments if f.arguments is string else f.arguments | tojson }}",
    "items": "{% for key, value in f.arguments.items() %}<{{ key }}>{{ value | tojson }}{% endfor %}",
}


def tokenizer_of(write: str) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% if tools %}TOOLS{% for t in tools %} {{ t.function.name }}{% endfor %}{% endif %}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls or [] %}"
        "{% set f = call.function %}CALL {{ f.name }} " + WRITE[write] + "{% endfor %}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer


def texts(tokenizer: Any, record: dict[str, Any]) -> tuple[str, list[str], str]:
    """The whole text, what of it is learnt, and the note."""
    examples, note = convert_messages(records_of(record), tokenizer)
    (item,) = tokenize(examples, Encoder(tokenizer), max_length=10_000).dataset
    runs, before = [], False
    for token, label in zip(item["input_ids"], item["labels"], strict=True):
        if label != -100:
            runs = [*runs[:-1], [*runs[-1], token]] if before else [*runs, [token]]
        before = label != -100
    return tokenizer.decode(item["input_ids"]), [tokenizer.decode(run) for run in runs], note


def openai(arguments: Any, **fields: Any) -> dict[str, Any]:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hot?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "31 °C"},
            {"role": "assistant", "content": "Yes."},
        ],
        "tools": [{"type": "function", "function": SCHEMA}],
        "parallel_tool_calls": False,
    } | fields


def former_openai() -> dict[str, Any]:
    record = openai(None, functions=[SCHEMA])
    del record["tools"]
    messages = record["messages"]
    messages[2] = {
        "role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": AS_TEXT},
    }  # fmt: skip
    messages[3] = {"role": "function", "name": "weather", "content": "31 °C"}
    return record


def sharegpt(tools: Any) -> dict[str, Any]:
    return {
        "system": "Be brief.",
        "tools": tools,
        "conversations": [
            {"from": "human", "value": "Hot?"},
            {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": ARGUMENTS})},
            {"from": "observation", "value": "31 °C"},
            {"from": "gpt", "value": "Yes."},
        ],
    }


RECORDS = {
    "OpenAI": openai(AS_TEXT),
    "transformers": openai(ARGUMENTS),
    "former OpenAI": former_openai(),
    "ShareGPT": sharegpt([SCHEMA]),
    "LLaMA-Factory": sharegpt(json.dumps([SCHEMA])),
}


@pytest.mark.parametrize("write", WRITE)
@pytest.mark.parametrize("spelling", RECORDS)
def test_a_call_reads_the_same_however_a_record_spells_it(spelling: str, write: str) -> None:
    tokenizer = tokenizer_of(write)
    text, learnt, note = texts(tokenizer, RECORDS[spelling])
    said = '<city>"Zürich"<days>[1, 2]' if write == "items" else AS_TEXT
    assert learnt == [f"CALL weather {said}{EOS}", f"Yes.{EOS}"]
    asked = f"{BOS}TOOLS weather<|system|>Be brief.<|user|>Hot?<|assistant|>"
    assert text == f"{asked}{learnt[0]}<|tool|>31 °C<|assistant|>{learnt[1]}"
    assert "'tools'" not in note and "'functions'" not in note and "'tool_calls'" not in note


def test_several_calls_in_a_turn_and_text_beside_them() -> None:
    record = openai("{}")
    record["messages"][2] |= {"content": "Let me see. "}
    record["messages"][2]["tool_calls"] *= 2
    assert texts(tokenizer_of("tojson"), record)[1][0] == f"Let me see. CALL weather {{}}CALL weather {{}}{EOS}"
    record = sharegpt([SCHEMA])
    record["conversations"][1]["value"] = json.dumps([{"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}])
    assert texts(tokenizer_of("joined"), record)[1][0] == f"CALL a {{}}CALL b {{}}{EOS}"


def test_calls_of_others_are_read_and_not_learnt() -> None:
    record = openai(AS_TEXT)
    record["messages"][2]["weight"] = 0
    assert texts(tokenizer_of("tojson"), record)[1] == [f"Yes.{EOS}"]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (openai('{"city": '), "message 3: what a tool call gives as arguments is text, but no JSON"),
        (openai('"Zürich"'), "message 3: the arguments of a tool call are Zürich; expected an object"),
        (openai("{}", tools="[{"), "'tools' is text, but no JSON"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "weather()"}]},
         "message 2: the tool call is text, but no JSON"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"city": 1}'}]},
         "message 2: a tool call is written"),
    ],
)  # fmt: skip
def test_what_is_no_call_is_refused_with_its_place(record: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        convert_messages(records_of(record), tokenizer_of("tojson"))


def test_a_table_gives_a_call_no_arguments_of_another(tmp_path: Path) -> None:
    """Arrow gives all structs of a column the same fields; JSON lines keep a null that was written."""
    import datasets
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    def asking(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        record = openai(arguments)
        record["messages"][2]["tool_calls"][0]["function"]["name"] = name
        properties = {key: {"type": "string"} for key in arguments}
        schema = {"name": name, "parameters": {"type": "object", "properties": properties}}
        return record | {"tools": [{"type": "function", "function": schema}]}

    records = [
        asking("weather", {"city": "Rome"}),
        asking("pay", {"amount": 3, "to": [{"name": "Ann"}, {"iban": "X"}]}),
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text(lines)
    table = pyarrow.Table.from_pylist(records)
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    pyarrow.feather.write_feather(table, str(tmp_path / "c.arrow"))
    datasets.Dataset(table).save_to_disk(str(tmp_path / "d"))

    tokenizer = tokenizer_of("tojson")
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ t.function.name }}", "{{ t | tojson }}")

    def examples(name: str) -> list[Any]:
        config = DatasetConfig(train_path=str(tmp_path / name), eval_fraction=0.0)
        cache = tmp_path / "cache"
        return list(load_datasets(config, tokenizer, max_length=4000, seed=0, bundled=False, cache_dir=cache).train)

    expected = examples("a.jsonl")
    assert len(expected) == 2
    for name in ("b.parquet", "c.arrow", "d"):
        assert examples(name) == expected
    (tmp_path / "e.jsonl").write_text(lines.replace('"Rome"', "null"))
    assert '{"city": null}' in tokenizer.decode(examples("e.jsonl")[0]["input_ids"])

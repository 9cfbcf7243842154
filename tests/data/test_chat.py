"""Chats through templates: what is learnt, with which prompt, and what is said of the fields that nothing uses."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GenerationConfig

from sparseft.config import DatasetConfig, ModelConfig
from sparseft.data.chat import Chats
from sparseft.data.encoding import Encoder, generation_ends, tokenize
from sparseft.data.loading import load_datasets
from sparseft.data.prompts import alpaca_prompt
from sparseft.data.token_cache import tokens_key
from sparseft.errors import UserError
from sparseft.models.loading import load_tokenizer
from support.data import (
    BOS,
    CHATML,
    EOS,
    FORGETFUL,
    UNMARKED,
    convert,
    convert_messages,
    labelled,
    load,
    make_tokenizer,
    records_of,
    write,
)
from support.places import SHARED

STORIES = SHARED / "models/stories260k"

TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% elif m.role == 'system' %}"
    "{{ m.content }}\n{% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
FIELDS = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}CALL {{ call.function.name }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NEEDS_USER = (
    "{% set seen = namespace(user=false) %}{% for m in messages %}{% if m.role == 'user' %}{% set seen.user = true %}"
    "{% endif %}{% endfor %}{% if not seen.user %}{{ raise_exception('a user message is needed') }}{% endif %}" + FIELDS
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'system' %}{{ m.content }}{% else %}"
    "<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a "
    "helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}"
    "\n{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.first and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}{% else %}"
    "{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] "
    "| trim + '<|eot_id|>' %}{% if loop.first %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Version 3: the system message stands before the last message, if that is the user's.
MISTRAL3 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if m['role'] == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}{% else %}"
    "{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}{% else %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
QWEN3 = (  # reasons unless told otherwise: an empty thought before an answer, none before those that are past
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML, "forgetful": FORGETFUL, "strict": NEEDS_USER, "fields": FIELDS, "turns": TURNS, "r1": R1,
    "smollm2": SMOLLM2, "llama2": LLAMA2, "llama3": LLAMA3, "mistral": MISTRAL, "mistral3": MISTRAL3, "gemma": GEMMA,
    "phi3": PHI3, "glm": GLM, "zephyr": ZEPHYR, "qwen3": QWEN3,
}  # fmt: skip
MARKS = (
    "<|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> <end_of_turn> <think> "
    "<|user|> <|assistant|> <|system|> <|end|> [gMASK] <sop> <|User|> <|Assistant|>"
).split()


@functools.cache
def _tokenizers() -> dict[str, Any]:
    found = {
        f"{style}{' bos' * bos}{' marks' * marks}": make_tokenizer(style, bos=bos)
        for style in ("bytes", "prepend", "metaspace", "prefix_space")
        for bos in (True, False)
        for marks in (True, False)
    }
    if STORIES.is_dir():
        found |= {name: AutoTokenizer.from_pretrained(STORIES) for name in ("stories", "stories marks")}
    for name, tokenizer in found.items():
        if name.endswith("marks"):
            tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    # Phi-3's marks take the white space behind them.
    from tokenizers import AddedToken

    eager = make_tokenizer("prepend")
    eager.add_tokens([AddedToken(mark, rstrip=True, special=True, normalized=False) for mark in MARKS])
    return found | {"prepend eager": eager}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return _tokenizers()


def chat(*contents: str, system: str | None = None, **last: Any) -> list[dict[str, Any]]:
    """User and assistant in turns; `last` goes to the last message."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    messages[-1] |= last
    return [{"role": "system", "content": system}, *messages] if system else messages


def generation_ids(tokenizer: Any, messages: list[dict], text: str | None = None) -> list[int]:
    """What `generate` gets to answer `messages`, as evaluation feeds it: the tokenizer's own BOS, but never twice."""
    if text is None:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    bare = tokenizer(text, add_special_tokens=False).input_ids
    before = tokenizer("a").input_ids[: -len(tokenizer("a", add_special_tokens=False).input_ids)]
    return bare if bare[: len(before)] == before else before + bare


def converted(tokenizer: Any, *records: dict) -> tuple[list[dict[str, list[int]]], str]:
    examples, note = convert_messages(records_of(*records), tokenizer)
    done = tokenize(examples, Encoder(tokenizer), max_length=10_000)
    return list(done.dataset), note


def check_prompts(tokenizer: Any, template: str, messages: list[dict]) -> None:
    """Every answer's prompt is the start of an example, ids and all, and the loss begins right behind it."""
    tokenizer.chat_template = TEMPLATES[template]
    items, note = converted(tokenizer, {"messages": messages})
    assert "plain" not in note
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(items) in (1, len(answers))
    for position, turn in enumerate(answers):
        item = items[position] if len(items) > 1 else items[0]
        if template == "r1":  # the generation prompt opens a thought that no rendering has: up to there it is the same
            prompt = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
            expected = generation_ids(tokenizer, [], prompt.removesuffix("<think>\n"))
        else:
            expected = generation_ids(tokenizer, messages[:turn])
        assert item["input_ids"][: len(expected)] == expected
        assert item["labels"][len(expected) - 1] == -100, "the prompt is learnt"
        assert item["labels"][len(expected)] == item["input_ids"][len(expected)], "the answer is not learnt"
    counted = sum(item["labels"].count(-100) for item in items)
    assert 0 < counted < sum(map(len, (item["labels"] for item in items)))
    text = "".join(labelled(tokenizer, item) for item in items)
    for turn in answers:
        assert messages[turn]["content"].split("</think>")[-1].strip().replace(" ", "") in text.replace(" ", "")


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_ids_are_those_of_generation(template: str, tokenizers: dict[str, Any]) -> None:
    """Oracle: `apply_chat_template` with a generation prompt, tokenised as evaluation tokenises it."""
    chats = [
        chat("Hi", "Yo."),
        chat("What is one and one?", "Two.", "And two more?", "Four."),
        chat("Q: né?", "the end", "the answer", " is true", "is", "Hello there"),
        chat("a\n", "\n\nb", "c ", "d\n"),
        chat("Hi", "Yo.", "again", "<b>yes</b>", system="Be brief."),
    ]
    for name, tokenizer in tokenizers.items():
        for messages in chats:
            try:
                check_prompts(tokenizer, template, messages)
            except AssertionError as error:
                raise AssertionError(f"{template}, {name}, {messages}") from error


CONTENT = st.lists(st.sampled_from(["a", "the", " ", "\n", ":", "é", "☃", ".", "<", "1", "is true"]), max_size=6).map(
    "".join
)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(set(TEMPLATES) - {"r1"})),
    st.integers(0, 100),
    st.lists(CONTENT.filter(str.strip), min_size=2, max_size=6).filter(lambda contents: len(contents) % 2 == 0),
    st.one_of(st.none(), CONTENT.filter(str.strip)),
)
def test_prompt_ids_are_those_of_generation_whatever_is_said(
    template: str, which: int, contents: list[str], system: str | None
) -> None:
    found = _tokenizers()
    check_prompts(found[sorted(found)[which % len(found)]], template, chat(*contents, system=system))


def test_one_example_where_every_prompt_in_it_is_generations(tokenizers: dict[str, Any]) -> None:
    """A conversation is not taken apart where nothing asks for it: the whole is what the tokenizer makes of it."""
    for name in ("bytes bos marks", "prepend bos marks", "metaspace marks", "prefix_space bos marks"):
        for template in ("chatml", "llama3", "gemma", "smollm2", "fields"):
            tokenizer = tokenizers[name]
            tokenizer.chat_template = TEMPLATES[template]
            messages = chat("What?", "Two.", "And?", "Four.")
            (item,), _ = converted(tokenizer, {"messages": messages})
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            assert item["input_ids"] == generation_ids(tokenizer, [], text), (name, template)


def test_second_prompt_behind_an_added_token_begins_as_the_tokenizer_has_it() -> None:
    tokenizer = make_tokenizer("prepend")
    tokenizer.chat_template = TURNS.replace(": ", "> ").replace(":{", ">{")
    (item,), _ = converted(tokenizer, {"messages": chat("What?", "Two.", "And?", "Four.")})
    tokens = tokenizer.convert_ids_to_tokens(item["input_ids"])
    behind = tokens.index(EOS) + 1
    assert tokens[behind].startswith("▁")
    # In text of another format, within one segment, too.
    (example,) = tokenize_one(tokenizer, {"prompt": f"A {EOS}", "completion": f"né {EOS}the"})
    assert example["input_ids"] == tokenizer(f"A {EOS}né {EOS}the").input_ids + [tokenizer.eos_token_id]


def tokenize_one(tokenizer: Any, record: dict) -> list[dict[str, list[int]]]:
    from sparseft.data.formats import detect_format

    records = records_of(record)
    examples = convert(records, detect_format(records))
    return list(tokenize(examples, Encoder(tokenizer), max_length=10_000).dataset)


def learnt(tokenizer: Any, item: dict[str, list[int]]) -> str:
    return labelled(tokenizer, item).strip()


# --- which answers are learnt -----------------------------------------------------------------------------------


def switched(key: str, value: Any, style: str, other: Any = None) -> dict:
    """An answer WRONG with `key: value`, then an answer RIGHT with `key: other`, where that is not None."""
    messages = chat("a", "WRONG", "c", "RIGHT", **({} if other is None else {key: other}))
    messages[1][key] = value
    if style == "conversations":
        names = {"user": "human", "assistant": "gpt"}
        messages = [{"from": names[each.pop("role")], "value": each.pop("content"), **each} for each in messages]
    return {style: messages}


@pytest.mark.parametrize("template", [CHATML, R1, FORGETFUL, None])
@pytest.mark.parametrize("style", ["messages", "conversations"])
@pytest.mark.parametrize("key", ["weight", "train", "loss", "train_on_turn"])
def test_masked_answers_are_read_and_not_learnt(template: str | None, style: str, key: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    for value, other in ((0, 1), (False, True), ("0", "1"), (0.0, None), ("false", "True")):
        items, _ = converted(tokenizer, switched(key, value, style, other))
        assert "WRONG" not in "".join(labelled(tokenizer, item) for item in items)
        assert "RIGHT" in labelled(tokenizer, items[-1]) and "WRONG" in tokenizer.decode(items[-1]["input_ids"])
        # Turned round, the last answer is masked: it and its question are no use to anyone.
        items, _ = converted(tokenizer, switched(key, 1, style, value))
        assert ["WRONG" in labelled(tokenizer, item) for item in items] == [True]
        assert "RIGHT" not in tokenizer.decode(items[0]["input_ids"])
    items, _ = converted(tokenizer, switched(key, None, style))
    text = "".join(labelled(tokenizer, item) for item in items)
    assert "RIGHT" in text and "WRONG" in text


@pytest.mark.parametrize("value", [0.5, 2, -1, "half", float("nan"), [1], {}])
def test_other_weights_are_refused_with_file_and_line(value: Any, tmp_path: Path) -> None:
    records = [{"messages": chat("a", "b")}, {"messages": chat("a", "b", weight=value)}]
    with pytest.raises(UserError, match=r"a\.jsonl, line 2, message 2: 'weight' is .*expected 0 or false.*1 or true"):
        load(write(tmp_path / "a.jsonl", records), chat_tokenizer(CHATML))


def test_switches_that_contradict_each_other_or_are_no_answers() -> None:
    with pytest.raises(UserError, match="message 2: 'train' says to learn this message, 'weight' not to"):
        converted(chat_tokenizer(CHATML), {"messages": chat("a", "b", weight=0, train=True)})
    messages = chat("a", "b")
    messages[0]["weight"] = 1
    items, note = converted(chat_tokenizer(CHATML), {"messages": messages})
    assert len(items) == 1 and "1 message of others than the assistant asked to be learnt" in note
    messages[0]["weight"] = 0
    assert "asked" not in converted(chat_tokenizer(CHATML), {"messages": messages})[1]


def test_conversations_without_an_answer_to_learn_are_counted(tmp_path: Path) -> None:
    masked = {"messages": chat("a", "b", weight=0)}
    loaded = load(write(tmp_path / "a.jsonl", [{"messages": chat("a", "b")}, masked, masked]), chat_tokenizer(CHATML))
    assert len(loaded.train) == 1
    assert any("2 conversations left out: all answers are masked" in note for note in loaded.notes)
    with pytest.raises(UserError, match="none of the 1 training records holds an example.*all answers are masked"):
        load(write(tmp_path / "b.jsonl", [masked]), chat_tokenizer(CHATML))


def chat_tokenizer(template: str | None, style: str = "bytes") -> Any:
    tokenizer = make_tokenizer(style, bos=False)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = template
    return tokenizer


# --- every field is used, refused or counted --------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "weather"}}]


def test_fields_reach_the_template() -> None:
    tokenizer = chat_tokenizer(FIELDS)
    record = {"system": "Be brief.", "tools": TOOLS, "messages": chat("Hot?", "Yes.", reasoning_content="it is July")}
    (item,), note = converted(tokenizer, record)
    text = tokenizer.decode(item["input_ids"])
    assert text.startswith('TOOLS [{"type"') and "<|system|>Be brief.</s><|user|>Hot?" in text
    assert learnt(tokenizer, item) == "<think>it is July</think>Yes.</s>"
    assert "not used" not in note
    spelt, _ = converted(tokenizer, {**record, "tools": json.dumps(TOOLS)})
    assert spelt == [item]
    calls = [{"function": {"name": "weather", "arguments": {}}}]
    for content in ("", None):
        (item,), note = converted(tokenizer, {"messages": chat("Hot?", content, tool_calls=calls)})
        assert learnt(tokenizer, item) == "CALL weather</s>" and "not used" not in note


def test_fields_that_the_template_does_not_use_are_counted_once() -> None:
    records = [
        {
            "tools": TOOLS,
            "documents": [{"title": "t", "text": "x"}],
            "id": 7,
            "empty": None,
            "tags": [],
            "messages": chat("Hot?", "Yes.", name="Ann", reasoning_content="July"),
        }  # fmt: skip
    ] * 12
    items, note = converted(chat_tokenizer(CHATML), *records)
    assert len(items) == 12
    for name in ("tools", "documents", "name", "reasoning_content"):
        assert note.count(f"'{name}' of 12 records") == 1
    assert "are not used by the template" in note and "field 'id' of 12 records is not used" in note
    assert "empty" not in note and "tags" not in note
    bare, _ = converted(chat_tokenizer(CHATML), {"messages": chat("Hot?", "Yes.")})
    assert items[0] == bare[0]
    _, note = converted(chat_tokenizer(None), *records)
    assert "the tokenizer has no chat template" in note
    assert "'tools' of 12 records" in note and "not used: no chat template writes them" in note
    # Only the second of these has something that is lost.
    _, note = converted(chat_tokenizer(FIELDS), {"messages": chat("a", "b")}, {"messages": chat("a", "b", name="Ann")})
    assert "field 'name' of 1 record is not used by the template" in note


def test_what_a_template_leaves_of_the_messages_is_counted() -> None:
    r1 = R1.replace("'system' %}{{ m.content }}", "'system' %}")
    record = {"messages": chat("Hi", "<think>Well.</think>Yo.", system="Be kind.")}
    (item,), note = converted(chat_tokenizer(r1), record)
    assert "does not write 1 system message as given" in note and "assistant" not in note
    assert labelled(chat_tokenizer(r1), item) == "Yo.</s>"
    _, note = converted(chat_tokenizer(CHATML), record)
    assert "does not write" not in note


RESPACED = CHATML.replace(
    "{{ m.content }}", "{{ m.content.replace('<think>', '<think>\n').replace('</think>', '\n</think>\n\n') }}"
)
OPENS = CHATML.replace("assistant\n{%", "assistant\n<think>{%")  # the whole answer is written, and its beginning asked


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (R1, ["the part of 2 answers up to </think>, which is not learnt (first: set.jsonl, line 1, message 2)"]),
        (CHATML.replace("m.content", "m.content | upper"), ["2 answers as given, so not all of it is learnt (first: "]),
        (CHATML, []),
        (RESPACED, []),
        (OPENS, []),
        (FORGETFUL, []),
    ],
    ids=["r1", "other", "chatml", "respaced", "opens", "forgetful"],
)
def test_reasoning_that_is_not_learnt_is_warned_of(template: str, said: list[str]) -> None:
    """White space alone is no difference, and a thought that the prompt opens stands there."""
    records = records_of(*[{"messages": chat("Hi", "<think>Well.</think>Yo.")}] * 2)
    chats = Chats(Encoder(chat_tokenizer(template)))
    assert len(chats.convert(records)) == 2
    warnings = chats.warnings()
    assert len(warnings) == len(said)
    for warning, words in zip(warnings, said, strict=True):
        assert words in warning


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"system": "A", "messages": chat("a", "b", system="B")}, ["'system' says one thing", "another"]),
        ({"system": ["A"], "messages": chat("a", "b")}, ["'system' must be text"]),
        ({"tools": {"a": 1}, "messages": chat("a", "b")}, ["'tools' must be a list of objects"]),
        ({"tools": "weather", "messages": chat("a", "b")}, ["'tools' is text, but no JSON"]),
        ({"documents": ["x"], "messages": chat("a", "b")}, ["'documents' must be a list of objects"]),
        ({"messages": chat("a", "", tool_calls=[{"x": 1}])}, ["message 2", "does not write tool calls"]),
        ({"messages": chat("a", "b", tool_calls="x")}, ["message 2", "tool calls", "list of objects"]),
        ({"system": "A", "messages": chat("a", "", tool_calls=[{"x": 1}])}, ["message 2", "tool calls"]),
        ({"messages": chat("a", "b", "c\ud83d", "d")}, ["half a surrogate pair (\\ud83d)"]),
        ({"tools": "[" * 10**5, "messages": chat("a", "b")}, ["nested too deep"]),
    ],
)
def test_fields_that_cannot_be_used_are_refused_with_file_and_line(record: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        converted(chat_tokenizer(CHATML), {"messages": chat("a", "b")}, record)
    for word in ["set.jsonl, line 2", *words]:
        assert word in str(error.value)


def test_unknown_fields_of_other_formats_are_counted(tmp_path: Path) -> None:
    alpaca = {"instruction": "a", "input": "", "output": "b", "answer": "b", "weight": 0, "id": "x", "tag": None}
    notes = load(write(tmp_path / "a.jsonl", [alpaca] * 3), make_tokenizer()).notes
    assert any("fields 'weight' of 3 records, 'id' of 3 records are not used" in note for note in notes)
    assert not any("'answer'" in note or "'tag'" in note for note in notes)
    notes = load(write(tmp_path / "b.jsonl", [{"text": "a", "source": "s"}]), make_tokenizer()).notes
    assert any("field 'source' of 1 record is not used" in note for note in notes)
    many = {"text": "a", **{f"f{n}": n for n in range(40)}}
    assert any(
        "28 others are not used" in each for each in load(write(tmp_path / "c.jsonl", [many]), make_tokenizer()).notes
    )


def test_alpaca_with_system_and_history() -> None:
    tokenizer = make_tokenizer()
    record = {"instruction": "And?", "input": "Chile", "output": "Lima.", "system": "One word.\n",
              "history": [["Name one.", "Peru. "], ["Why?", "So."]]}  # fmt: skip
    (item,) = tokenize_one(tokenizer, record)
    assert (
        tokenizer.decode(item["input_ids"])
        == BOS
        + (
            "One word.\n\n### Instruction:\nName one.\n\n### Response:\nPeru.\n\n### Instruction:\nWhy?\n\n"
            "### Response:\nSo.\n\n### Instruction:\nAnd?\n\n### Input:\nChile\n\n### Response:\nLima."
        )
        + EOS
    )
    assert labelled(tokenizer, item) == "Lima." + EOS
    plain = {"instruction": "And?", "input": "", "output": "Lima."}
    (item,), (same,) = (tokenize_one(tokenizer, plain | more) for more in ({}, {"system": "", "history": []}))
    assert item == same and tokenizer.decode(item["input_ids"]).startswith(BOS + alpaca_prompt("And?"))
    for history in ("x", [["a"]], [["a", 1]], [{"a": "b"}], ["ab"]):
        with pytest.raises(UserError, match=r"set\.jsonl, line 1: .*'history'.*pair"):
            tokenize_one(tokenizer, plain | {"history": history})


# --- templates of their own mind --------------------------------------------------------------------------------


def test_a_generation_prompt_that_opens_a_thought_does_not_change_what_is_learnt() -> None:
    tokenizer = chat_tokenizer(R1)
    for answer in ("Yo.", "<b>Yo</b>", "<think"):  # also where the answer begins like the thought
        (item,), note = converted(tokenizer, {"messages": chat("Hi", answer)})
        assert tokenizer.decode(item["input_ids"]) == f"{BOS}<|User|>Hi<|Assistant|>{answer}{EOS}"
        assert labelled(tokenizer, item) == answer + EOS
        assert "plain" not in note
        assert "generation is asked for 1 answer with '<think>\\n' at the prompt's end, which the template" in note
    closed = R1.replace("<|Assistant|>{{", "<|Assistant|></think>{{")  # `<think>` and `</think>` part amid the tokens
    tokenizer = chat_tokenizer(closed)
    tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]}, replace_extra_special_tokens=False)
    (item,), _ = converted(tokenizer, {"messages": chat("Hi", "Yo.")})
    assert labelled(tokenizer, item) == f"</think>Yo.{EOS}"


def test_a_template_that_moves_the_system_message_gives_each_answer_its_own_prompt() -> None:
    tokenizer = chat_tokenizer(MISTRAL3)
    items, note = converted(tokenizer, {"messages": chat("Hi", "Yo.", "More", "No.", system="Be brief.")})
    assert [tokenizer.decode(item["input_ids"]) for item in items] == [
        f"{BOS}[INST] Be brief.\n\nHi[/INST] Yo.{EOS}",
        f"{BOS}[INST] Hi[/INST] Yo.{EOS}[INST] Be brief.\n\nMore[/INST] No.{EOS}",
    ]
    assert [labelled(tokenizer, item) for item in items] == [f" Yo.{EOS}", f" No.{EOS}"]
    assert "1 conversation as one example an answer: the template rewrites earlier turns" in note


def test_a_template_that_hides_where_answers_begin_is_refused_and_never_left_for_another() -> None:
    masked = {"messages": chat("a", "b", weight=0)}
    for template in (UNMARKED, "{{ messages | length }}", "{{ messages[-1].role }}"):
        with pytest.raises(
            UserError, match=r"set\.jsonl, line 2, message 2: .*template does not show where this answer"
        ):
            converted(chat_tokenizer(template), masked, {"messages": chat("Hello", "Hi")})


def test_plain_text_instead_of_a_template_is_a_setting(tmp_path: Path) -> None:
    """What a template's refusal names: the text of a tokenizer without one, kept apart from the template's."""
    file = tmp_path / "set.jsonl"
    file.write_text("".join(json.dumps({"messages": chat(f"{n}?", "Hi")}) + "\n" for n in range(4)))

    def texts(template: str | None, **settings: Any) -> list[str]:
        tokenizer = chat_tokenizer(template)
        config = DatasetConfig(name="json", train_path=str(file), eval_fraction=0.0, **settings)
        data = load_datasets(
            config, tokenizer, max_length=200, seed=0, bundled=False, cache_dir=str(tmp_path / "cache")
        )
        return [tokenizer.decode(data.train[n]["input_ids"]) for n in range(len(data.train))]

    with pytest.raises(UserError, match="dataset.plain_chat=true"):
        texts("{{ messages | length }}")
    plain = texts(None)
    assert "User: 0?" in plain[0] and "Assistant: Hi" in plain[0]
    assert texts("{{ messages | length }}", plain_chat=True) == texts(CHATML, plain_chat=True) == plain
    assert texts(CHATML) != plain
    file.write_text('{"prompt": "1+1=", "completion": "2"}\n')
    with pytest.raises(UserError, match="plain_chat=true: applies to chats .* has format prompt_completion"):
        texts(None, plain_chat=True)


def test_a_chat_that_the_assistant_opens() -> None:
    record = {"messages": [{"role": "assistant", "content": "Welcome!"}, *chat("hi", "hello")]}
    for template in (FIELDS, R1, TURNS.replace("T: ", "T:"), CHATML, GEMMA):
        tokenizer = chat_tokenizer(template)
        (item,), note = converted(tokenizer, record)
        text = labelled(tokenizer, item)
        assert "Welcome!" in text and "hello" in text and "hi" not in text and "left out" not in note
    # What the template puts before it, a system message, is prompt.
    (item,), _ = converted(chat_tokenizer(SMOLLM2), record)
    assert labelled(chat_tokenizer(SMOLLM2), item) == "Welcome!<|im_end|>\nhello<|im_end|>\n"
    # A template that cannot begin so: the later answer is learnt, the first one read and counted.
    tokenizer = chat_tokenizer(NEEDS_USER)
    (item,), note = converted(tokenizer, record)
    assert labelled(tokenizer, item) == "hello</s>" and "Welcome!" in tokenizer.decode(item["input_ids"])
    assert "1 answer left out, whose prompt the template refuses: a user message is needed" in note
    assert "(first: set.jsonl, line 1, message 1)" in note
    with pytest.raises(UserError, match=r"set\.jsonl, line 1: .*refuses the conversation: roles must alternate"):
        converted(chat_tokenizer(LLAMA2), record)
    (item,), _ = converted(chat_tokenizer(None), record)
    assert labelled(chat_tokenizer(None), item) == " Welcome! hello" + EOS


def test_only_answers_that_a_template_cannot_be_asked_for_is_an_error_that_says_so(tmp_path: Path) -> None:
    record = {"messages": [{"role": "assistant", "content": "Welcome!"}, {"role": "user", "content": "hi"}]}
    template = (
        "{% if add_generation_prompt and messages | length < 2 %}{{ raise_exception('ask') }}{% endif %}" + CHATML
    )
    with pytest.raises(UserError, match="none of the 1 training records holds an example.*1 answer left out.*ask"):
        load(write(tmp_path / "a.jsonl", [record]), chat_tokenizer(template))


def test_errors_of_a_template_are_refusals() -> None:
    for broken in ("{{ messages[0].content + 1 }}", "{{ 1 / 0 }}", "{{ messages[0].nothing.more }}", "{{ [].pop() }}"):
        with pytest.raises(UserError, match=r"set\.jsonl, line 1: .*refuses the conversation: \S"):
            converted(chat_tokenizer(broken), {"messages": chat("a", "b")})


# --- the end of an answer ---------------------------------------------------------------------------------------


def glm_tokenizer(folder: Path, ends: list[str]) -> Any:
    tokenizer = chat_tokenizer(GLM)
    tokenizer.save_pretrained(folder)
    config = GenerationConfig(eos_token_id=[tokenizer.convert_tokens_to_ids(end) for end in ends])
    config.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_the_next_roles_mark_ends_answers_where_it_ends_generation(tmp_path: Path) -> None:
    tokenizer = glm_tokenizer(tmp_path, [EOS, "<|user|>"])
    assert generation_ends(tokenizer) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")}
    messages = chat("Hi", "Yo.", "More", "No.")
    (item,), note = converted(tokenizer, {"messages": messages})
    assert labelled(tokenizer, item) == "Yo.<|user|>No.<|user|>"
    assert tokenizer.decode(item["input_ids"]) == tokenizer.apply_chat_template(messages, tokenize=False) + "<|user|>"
    assert "as one example an answer" not in note
    # An answer before the assistant's own next message ends with EOS: no mark of the template's is an end there.
    (item,), _ = converted(tokenizer, {"messages": chat("Hi", "Yo.", weight=1)})
    assert labelled(tokenizer, item) == "Yo.<|user|>"


def test_an_answer_without_any_end_gets_eos(tmp_path: Path) -> None:
    tokenizer = glm_tokenizer(tmp_path, [EOS])  # `<|user|>` would not end generation
    items, note = converted(tokenizer, {"messages": chat("Hi", "Yo.", "More", "No.")})
    assert [labelled(tokenizer, item) for item in items] == ["Yo." + EOS, "No." + EOS]
    assert "as one example an answer: the template does not end answers, so EOS does" in note


def test_what_ends_generation_is_that_of_the_hubs_revision_from_the_first_run_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model, which would bring the file, is loaded when the data are tokenised already."""
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "v2").mkdir()
    GenerationConfig(eos_token_id=[2, 300]).save_pretrained(tmp_path / "v2")
    asked = []

    def cached_file(path: str, name: str, revision: str | None = None, **options: Any) -> str | None:
        asked.append((path, name, revision))
        return str(tmp_path / revision / name) if revision else None

    monkeypatch.setattr("transformers.utils.hub.cached_file", cached_file)
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained",
        lambda *args, real=AutoTokenizer.from_pretrained, **options: real(tmp_path / "tokenizer"),
    )  # fmt: skip
    ends = generation_ends(load_tokenizer(ModelConfig(path="someone/model", revision="v2")))
    assert {2, 300} <= ends and ("someone/model", "generation_config.json", "v2") in asked
    assert 300 not in generation_ends(load_tokenizer(ModelConfig(path="someone/model")))


def test_cached_tokens_are_not_used_where_other_tokens_end_generation(tmp_path: Path) -> None:
    keys = []
    for name, ends in (("a", [EOS]), ("b", [EOS, "<|user|>"])):
        keys.append(tokens_key("content", glm_tokenizer(tmp_path / name, ends), {}))
    assert keys[0] != keys[1]

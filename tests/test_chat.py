"""Chats through templates: what is learnt, with which prompt, and what is said of the fields that nothing uses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import BOS, CHATML, EOS, FORGETFUL, STRICT, UNMARKED, labelled, load, make_tokenizer, records_of, write
from transformers import AutoTokenizer, GenerationConfig

from sparseft.data.caching import tokens_key
from sparseft.data.chat import convert_messages
from sparseft.data.prompts import alpaca_prompt
from sparseft.data.tokenized import Encoder, generation_ends, tokenize
from sparseft.errors import UserError

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
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
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% elif m.role == 'system' %}"
    "{{ m.content }}{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
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
    "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.first %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
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
MARKS = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<think>",
    "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "[gMASK]", "<sop>", "<|User|>", "<|Assistant|>",
]  # fmt: skip


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


CONTENT = st.text(st.sampled_from(["a", "the", " ", "\n", ":", "é", "☃", ".", "<", "1", "'"]), min_size=1, max_size=6)


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
    names = sorted(ALL := _cached_tokenizers())
    check_prompts(ALL[names[which % len(names)]], template, chat(*contents, system=system))


def _cached_tokenizers(found: dict[str, Any] = {}) -> dict[str, Any]:  # noqa: B006: kept between examples
    if not found:
        found |= _tokenizers()
    return found

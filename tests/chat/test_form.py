"""Questions are put as training puts them, and answers end where training ends them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparseft.chat.form import find_form, prompt_ids
from sparseft.data.encoding import Encoder
from sparseft.data.formats import Example
from sparseft.data.templates import end_of_turn
from sparseft.errors import UserError
from support.data import CHATML, EOS, convert, convert_messages, make_tokenizer, records_of

SYSTEM = "Be brief."
MESSAGES = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": "Is it hot?"},
    {"role": "assistant", "content": "Yes, 30 °C."},
    {"role": "user", "content": "And now?"},
]
ANSWER = "No."


def tokenizer_with(template: str | None, style: str = "bytes", bos: bool = True) -> Any:
    tokenizer = make_tokenizer(style, bos=bos)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def learnt(name: str, tokenizer: Any) -> Example:
    """What training makes of the conversation with its last answer."""
    if name in ("chat", "plain"):
        records = records_of({"messages": [*MESSAGES, {"role": "assistant", "content": ANSWER}]})
        return convert_messages(records, tokenizer)[0][0]
    if name == "alpaca":
        record = {"instruction": "And now?", "output": ANSWER, "history": [["Is it hot?", "Yes, 30 °C."]]}
        return convert(records_of(record | {"system": SYSTEM}), "alpaca")[0]
    text = f"{SYSTEM}\n### Human: Is it hot?### Assistant: Yes, 30 °C.### Human: And now?### Assistant: {ANSWER}"
    return convert(records_of({"text": text}), "guanaco")[0]


@pytest.mark.parametrize("name", ["chat", "alpaca", "guanaco", "plain"])
def test_a_prompt_is_what_training_has_before_the_answer(name: str) -> None:
    tokenizer = tokenizer_with(CHATML if name == "chat" else None)
    form = find_form(name, tokenizer, None)
    segments = learnt(name, tokenizer).segments
    assert form.write(MESSAGES) == "".join(text for text, _ in segments[:-1])
    answer, counted = segments[-1]
    assert counted and answer.startswith(ANSWER if name in ("chat", "alpaca") else f" {ANSWER}")


@pytest.mark.parametrize("style", ["bytes", "metaspace", "prepend"])
@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}" + CHATML, None])
def test_the_ids_are_those_of_training(style: str, template: str | None) -> None:
    """BOS once, whoever puts it."""
    tokenizer = tokenizer_with(template, style)
    messages = [{"role": "user", "content": "Is it hot?"}, {"role": "assistant", "content": ANSWER}]
    encoder = Encoder(tokenizer)
    (example,), _ = convert_messages(records_of({"messages": messages}), tokenizer)
    (encoded,) = encoder.encode([example])
    expected = [token for ids, answer in encoded if not answer for token in ids]
    form = find_form("chat" if template else "plain", tokenizer, None)
    found = prompt_ids(form, messages[:1], encoder)
    assert found == expected and found.count(tokenizer.bos_token_id) == 1


def test_raw_questions_stand_alone() -> None:
    form = find_form("raw", tokenizer_with(None), None)
    assert form.write(MESSAGES[1:]) == "And now?"
    with pytest.raises(UserError, match="no place for a system message"):
        form.write(MESSAGES)


@pytest.mark.parametrize(
    ("format", "templated", "untemplated"),
    [
        ("alpaca", "alpaca", "alpaca"),
        ("guanaco", "guanaco", "guanaco"),
        ("oasst_trees", "guanaco", "guanaco"),
        ("messages", "chat", "plain"),
        ("prompt_completion", "raw", "raw"),
        ("text", "raw", "raw"),
        (None, "chat", "alpaca"),  # a base model
    ],
)
def test_the_form_is_the_training_datas(tmp_path: Path, format: str | None, templated: str, untemplated: str) -> None:
    (tmp_path / "environment.json").write_text(json.dumps({"data": {"format": format}} if format else {}))
    assert find_form("auto", tokenizer_with(CHATML), tmp_path).name == templated
    assert find_form("auto", tokenizer_with(None), tmp_path).name == untemplated
    assert find_form("guanaco", tokenizer_with(CHATML), tmp_path).name == "guanaco"


def test_chats_that_were_learnt_as_plain_text_go_on_as_such(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(json.dumps({"data": {"format": "messages"}}))
    (tmp_path / "config.yaml").write_text(yaml.dump({"dataset": {"plain_chat": True}}))
    assert find_form("auto", tokenizer_with(CHATML), tmp_path).name == "plain"
    assert find_form("chat", tokenizer_with(CHATML), tmp_path).name == "chat"


def test_a_template_that_is_not_there_or_refuses_is_said() -> None:
    with pytest.raises(UserError, match="chat.prompt=chat: the tokenizer has no chat template"):
        find_form("chat", tokenizer_with(None), None)
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match="the model's chat template refuses this: no system message"):
        find_form("auto", tokenizer_with(strict), None).write(MESSAGES)


def test_where_an_answer_ends() -> None:
    chatml = tokenizer_with(CHATML)
    assert end_of_turn(chatml) == {chatml.convert_tokens_to_ids("<|im_end|>")}
    other = tokenizer_with("{% for m in messages %}{{ m.content }} {{ eos_token }}{% endfor %}")
    assert end_of_turn(other) == {other.convert_tokens_to_ids(EOS)}
    assert end_of_turn(tokenizer_with(None)) == set()
    assert end_of_turn(tokenizer_with("{% for m in messages %}{{ m.content }}\n{% endfor %}")) == set()
    assert find_form("alpaca", chatml, None).stops == ("### Instruction", "### Response")
    assert find_form("plain", chatml, None).stops == ("\n\nUser:",)

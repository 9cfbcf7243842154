"""How a conversation becomes the text that a model goes on from, and where its answer ends.

The wording is that of training (`data/prompts.py`, the tokenizer's chat template), and so are the token ids
(`data/encoding.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseft.chat.conversation import Message
from sparseft.data.encoding import Encoder
from sparseft.data.formats import Example, check_encodable
from sparseft.data.prompts import AS_MESSAGES, STOPS, alpaca_conversation, guanaco_conversation, plain_conversation
from sparseft.data.templates import asking
from sparseft.errors import UserError
from sparseft.evaluation.target import data_format, prompt_format

Write = Callable[[list[Message]], str]


@dataclass(frozen=True)
class Form:
    """How questions are put: `chat` (the tokenizer's template), `alpaca`, `guanaco`, `plain` or `raw`."""

    name: str
    why: str  # why this one, as a sentence goes on
    write: Write  # messages, the last of them the user's -> the text to go on from
    stops: tuple[str, ...] = ()  # texts at which an answer ends, where the model goes on by itself with another turn
    alone: bool = False  # a question sees no turns before it


def find_form(wanted: str, tokenizer: Any, run: Path | None) -> Form:
    """`chat.prompt`; `auto` is the form of the run's training data, else the chat template, else alpaca.

    UserError for `chat` where the tokenizer has no template.
    """
    templated = bool(getattr(tokenizer, "chat_template", None))
    name = prompt_format(wanted, run)
    why = "as set" if wanted != "auto" else "as in the training data"
    if name == "auto" and data_format(run) in ("prompt_completion", "text"):
        name = "raw"
    elif name == "auto":
        name = "chat" if templated else "alpaca"
        why = "by the model's template" if templated else "the tokenizer has no chat template"
    if wanted == "chat" and not templated:
        raise UserError("chat.prompt=chat: the tokenizer has no chat template; use alpaca, guanaco, plain or raw.")
    if name == AS_MESSAGES:
        name = "chat" if templated else "plain"
    if name == "chat":
        return Form(name, why, lambda messages: asking(tokenizer, messages))
    write = {
        "alpaca": _turns(alpaca_conversation),
        "guanaco": _turns(guanaco_conversation),
        "plain": _turns(plain_conversation),
        "raw": _alone,
    }[name]
    return Form(name, why, write, tuple(STOPS[name]), alone=name == "raw")


def _turns(write: Callable[..., str]) -> Write:
    """The wording of `data/prompts.py`, which takes pairs, for messages."""

    def written(messages: list[Message]) -> str:
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        said = [message["content"] for message in messages if message["role"] != "system"]
        return write(zip(said[:-1:2], said[1::2], strict=True), said[-1], system=system)

    return written


def _alone(messages: list[Message]) -> str:
    if messages[0]["role"] == "system":
        raise UserError("questions are put alone, as they are (raw), which leaves no place for a system message.")
    return messages[-1]["content"]


def prompt_ids(form: Form, messages: list[Message], encoder: Encoder) -> list[int]:
    """The token ids of the prompt, as training has them: one BOS where the tokenizer puts one."""
    example = Example([(form.write(messages), False)], "the conversation")
    check_encodable(example.text, example.source)
    (segments,) = encoder.encode([example])
    return [token for ids, _ in segments for token in ids]

"""What a tokenizer's chat template writes. A template is a program on what a chat says, so it may refuse or fail.

Some write today's date (`strftime_now`: Llama 3.2, gpt-oss, SmolLM3). Training data have one day for all of a run
(`dataset.chat_date`), or a run that is continued tomorrow would not find its own examples again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime
from typing import Any

from sparseft.config import DatasetConfig
from sparseft.errors import UserError, shown

# Stands in for an answer, to see what the template writes around it whatever the answer says.
STAND_IN = "STANDS7IN7FOR7AN7ANSWER"


class Refused(Exception):
    """The template cannot render these messages; its own words."""


def rendered(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    prompt: bool = False,
    day: str | None = None,
    context: Mapping[str, Any] | None = None,
) -> str:
    """The messages as the template writes them; `prompt`: with what asks for the next answer. `day` (YYYY-MM-DD) is the
    one that it takes for today, `context` what else it gets (`tools`, `documents`). Refused where it cannot."""
    from jinja2.exceptions import TemplateError  # only conversations need it

    try:
        with _today(day):
            # As a batch of one, which unlike a conversation may be empty: the prompt of one that the assistant opens.
            return tokenizer.apply_chat_template(
                [messages], tokenize=False, add_generation_prompt=prompt, **(context or {})
            )[0]
    # A key that is not there, a text where it expects a list, …
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise Refused(shown(str(error).strip().rstrip("."), 300) or type(error).__name__) from error


@contextlib.contextmanager
def _today(day: str | None) -> Iterator[None]:
    """Inside, transformers' `strftime_now`, which no argument of a call can replace, writes that day."""
    if day is None:
        yield
        return
    from transformers.utils import chat_template_utils

    fixed = datetime.fromisoformat(day)
    own = chat_template_utils.datetime
    chat_template_utils.datetime = type("datetime", (own,), {"now": staticmethod(lambda tz=None: fixed)})
    try:
        yield
    finally:
        chat_template_utils.datetime = own


def asking(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """The text that a model answers to `messages` behind. UserError where the template refuses."""
    try:
        return rendered(tokenizer, messages, prompt=True)
    except Refused as refusal:
        raise UserError(f"the model's chat template refuses this: {refusal}.") from refusal.__cause__


def chat_date(config: DatasetConfig, tokenizer: Any) -> str | None:
    """The day that chats are written on (`dataset.chat_date`, else today); None where the template writes none."""
    writes = "strftime_now" in str(getattr(tokenizer, "chat_template", None))
    return (config.chat_date or date.today().isoformat()) if writes else None


def end_of_turn(tokenizer: Any) -> set[int]:
    """The token with which the chat template ends an answer, which a model may have learnt to say instead of EOS; empty
    where there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return set()
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": STAND_IN}]
    try:
        text = rendered(tokenizer, messages)
    except Refused:  # it says so where something is asked
        return set()
    behind = text.partition(STAND_IN)[2].lstrip()
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    marks = [token for token in special if behind.startswith(token)]
    return {tokenizer.convert_tokens_to_ids(max(marks, key=len))} if marks else set()

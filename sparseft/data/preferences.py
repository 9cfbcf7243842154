"""Preference records: of two answers the better one, or of one answer whether it is good.

| format | keys |
| --- | --- |
| `preference` | `prompt`, `chosen`, `rejected`: texts or lists of messages; the prompt may begin both answers instead |
| `unpaired` | `prompt`, `completion`, `label` (true: a good answer) |

Two texts that are whole dialogues (`\\n\\nHuman: …\\n\\nAssistant: …`, as of HH-RLHF) are read as lists of messages.
Either side of a record is an ordinary example, so that an answer to prefer is written, tokenised and cut as one to
imitate is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sparseft.data.chat import BESIDE, Chats
from sparseft.data.encoding import Encoder
from sparseft.data.formats import (
    DETECTION_RECORDS,
    Converter,
    Example,
    NothingToLearn,
    Plain,
    counted,
    is_empty,
    unused_sentence,
)
from sparseft.data.messages import SWITCHES
from sparseft.data.records import Records, kind
from sparseft.errors import UserError, nearest, shown

PREFERENCE, UNPAIRED = "preference", "unpaired"
BETTER, WORSE = SIDES = ("better", "worse")
ANSWERS = ("chosen", "rejected", "completion")
KEYS = {PREFERENCE: ("prompt", "chosen", "rejected"), UNPAIRED: ("prompt", "completion", "label")}


def detect_preference(records: Records) -> str:
    """The format of the first records. UserError where they say nothing of what is better."""
    first = records.items[:DETECTION_RECORDS]
    # a table has a cell for each column: what is empty in one record may be of another format
    filled = [{key: value for key, value in item.items() if not is_empty(value)} for item in first]
    for item in (*filled, *first):
        if "chosen" in item or "rejected" in item:
            return PREFERENCE
        if "label" in item and "completion" in item:
            return UNPAIRED
    keys = sorted({str(key) for item in records.items[:DETECTION_RECORDS] for key in item})
    wanted = sorted({key for each in KEYS.values() for key in each})
    near = next((f" '{shown(key)}':{nearest(key, wanted)}" for key in keys if key not in wanted
                 and "Did you mean" in nearest(key, wanted)), "")  # fmt: skip
    raise UserError(
        f"{records.where(0) if len(records) else records.source}: the keys ({shown(', '.join(keys), 300)}) do not say "
        f"which answer is better; expected prompt, chosen and rejected, or prompt, completion and label.{near}"
    )


def written_as(records: Records) -> str:
    """The format of `formats.py` in which the answers are written: `messages`, or `prompt_completion`."""
    answers = (item.get(key) for item in map(_in_messages, records.items) for key in ANSWERS)
    return "messages" if any(isinstance(answer, list) for answer in answers) else "prompt_completion"


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def _in_messages(item: dict[str, Any]) -> dict[str, Any]:
    """A pair of texts that are whole dialogues, without a prompt, as lists of messages; any other record as it is."""
    both = {key: item.get(key) for key in ("chosen", "rejected")}
    turns = [_TURN.match(text) if isinstance(text, str) else None for text in both.values()]
    if item.get("prompt") or not all(turn and turn[1] == "Human" for turn in turns):
        return item
    parts = {key: _TURN.split(text)[1:] for key, text in both.items()}
    return item | {
        key: [{"role": _ROLES[name], "content": text.strip()} for name, text in zip(each[::2], each[1::2], strict=True)]
        for key, each in parts.items()
    }


class Side(Converter):
    """Converts one side of the records; `plain` and `day`: of chats, as `Chats` takes them."""

    def __init__(self, encoder: Encoder, format: str, side: str, plain: bool = False, day: str | None = None) -> None:
        super().__init__()
        self.format, self.better = format, side == BETTER
        self.texts, self.chats = Plain("prompt_completion"), Chats(encoder, plain, day)
        self._chats = self._same = 0

    def convert(self, records: Records) -> list[Example]:
        """The examples of this side, at most one a record. UserError names file and record where something is wrong."""
        examples = []
        for index, item in enumerate(map(_in_messages, records.items)):
            where = records.where(index)
            is_chat = any(isinstance(item.get(key), list) for key in ANSWERS)
            beside = {key: value for key, value in item.items() if key in BESIDE and is_chat}
            known = (*KEYS[self.format], *beside)
            self._unknown.update(str(key) for key in item if key not in known and not is_empty(item[key]))
            one = None
            with self._counting_empty():
                one = self._of_pair(item, where) if self.format == PREFERENCE else self._of_answer(item, where)
            if one is None:
                continue
            self._chats += "messages" in one
            one |= beside
            way = self.chats if "messages" in one else self.texts
            found = way.convert(Records([one], records.source, start=records.start + index, places=[where]))
            if len(found) > 1:
                raise UserError(
                    f"{where}: an answer of several turns, which the chat template does not write as one text; put "
                    "all but the last turn into 'prompt'."
                )
            examples += found
        return examples

    def _examples(self, item: dict[str, Any], where: str) -> Iterator[Example]:
        raise NotImplementedError  # `convert` hands whole records on

    def note(self, source: str) -> str | None:
        """How chats were rendered, the pairs whose answers are the same, and fields not used, as a sentence."""
        said = [self.chats.note(source)] if self._chats else []
        if self._same:
            said.append(f"{counted(self._same, 'pair')} left out: both answers are the same")
        said += unused_sentence(self._unknown)
        return "; ".join(said) or None

    def warnings(self) -> list[str]:
        """Those of all that converts records here."""
        return [*super().warnings(), *self.chats.warnings(), *self.texts.warnings()]

    def _of_pair(self, item: dict[str, Any], where: str) -> dict[str, Any] | None:
        chosen, rejected = (_given(item, key, where, PREFERENCE) for key in ("chosen", "rejected"))
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise UserError(
                f"{where}: 'chosen' is {kind(chosen)} and 'rejected' {kind(rejected)}; both are texts, or both lists "
                "of messages."
            )
        if chosen == rejected:
            self._same += 1
            return None
        answer = chosen if self.better else rejected
        prompt = item.get("prompt")
        if isinstance(answer, list) and not _is_prompt_of(prompt, chosen, rejected):
            common = next((at for at, both in enumerate(zip(chosen, rejected, strict=False)) if both[0] != both[1]),
                          min(len(chosen), len(rejected)))  # fmt: skip
            if common == 0:
                raise UserError(
                    f"{where}: no 'prompt', and 'chosen' and 'rejected' do not begin with the same messages."
                )
            prompt, answer = chosen[:common], answer[common:]
        return _example(prompt, answer, "chosen" if self.better else "rejected", where)

    def _of_answer(self, item: dict[str, Any], where: str) -> dict[str, Any] | None:
        label = item.get("label")
        if isinstance(label, str):  # fields of CSV are text
            said = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
            label = said.get(label.strip().lower(), label)
        if not isinstance(label, bool) and label not in (0, 1):
            raise UserError(f"{where}: 'label' is {shown(repr(label))}; expected true (a good answer) or false.")
        answer = _given(item, "completion", where, UNPAIRED)
        return _example(item.get("prompt"), answer, "completion", where) if bool(label) is self.better else None


def _given(item: dict[str, Any], key: str, where: str, format: str) -> Any:
    """The value of an answer: text, or a list of messages."""
    value = item.get(key)
    if key not in item:
        keys = sorted(str(name) for name in item if item[name] is not None)
        wrong = [name for name in keys if name not in KEYS[format]]
        near = next((f" '{shown(name)}':{nearest(name, [key])}" for name in wrong
                     if "Did you mean" in nearest(name, [key])), "")  # fmt: skip
        raise UserError(
            f"{where}: the {format} record lacks '{key}' (it has: {shown(', '.join(keys), 300) or 'nothing'}).{near}"
        )
    if not isinstance(value, str | list | None):
        raise UserError(f"{where}: '{key}' must be text or a list of messages, not {kind(value)}.")
    if not value or (isinstance(value, str) and not value.strip()):
        raise NothingToLearn(f"'{key}' is empty", where)
    return value


def _is_prompt_of(prompt: Any, *answers: list[Any]) -> bool:
    """Whether a chat's `prompt` stands apart from its answers: not in front of them too."""
    if prompt is None or prompt == []:
        return False
    if isinstance(prompt, list):
        return any(answer[: len(prompt)] != prompt for answer in answers)
    first = answers[0][0]
    return not (isinstance(first, dict) and first.get("role", first.get("from")) in ASKING)


ASKING = ("system", "developer", "user", "human")  # roles that a conversation begins with


def _example(prompt: Any, answer: Any, key: str, where: str) -> dict[str, Any]:
    """The record of an example to learn from, in the terms of `formats.py`."""
    if isinstance(answer, str):
        if not isinstance(prompt, str):
            has = "is missing" if prompt is None else f"must be text as '{key}' is, not {kind(prompt)}"
            raise UserError(f"{where}: 'prompt' {has}.")
        return {"prompt": prompt, "completion": answer}
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        has = "is missing" if prompt is None else f"must be text or a list of messages, not {kind(prompt)}"
        raise UserError(f"{where}: 'prompt' {has}.")
    if not answer:
        raise UserError(f"{where}: '{key}' has no message behind those that it shares with the other answer.")
    return {"messages": [*map(_unlearnt, prompt), *answer]}


def _unlearnt(message: Any) -> Any:
    """A message of the prompt, which is never learnt."""
    if not isinstance(message, dict) or message.get("role", message.get("from")) in ASKING:
        return message
    return {name: value for name, value in message.items() if name not in SWITCHES} | {"train": False}

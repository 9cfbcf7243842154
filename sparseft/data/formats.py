"""Records to examples: which format a data set has, and which parts of a record the loss counts.

| format | keys | loss on |
| --- | --- | --- |
| `alpaca` | `instruction`, `output`, optional `input`, `system`, `history` | `output` |
| `guanaco` | `text` with `### Human:` and `### Assistant:` turns | every assistant turn |
| `messages` | `messages` or `conversations`: a list of {role, content} (or {from, value}) | every assistant turn |
| `prompt_completion` | `prompt`, `completion` | `completion` |
| `text` | `text` | everything |
| `oasst_trees` | `prompt` with nested `replies`: message trees of OASST | every assistant turn |

A file has one format; where it is detected, a record of another one is refused. LLM-Adapters' `answer` serves
evaluation alone. Fields that a format does not have are counted in a note, records without an answer in a warning.
"""

from __future__ import annotations

import abc
import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sparseft.data.prompts import ASSISTANT, HUMAN, alpaca_conversation
from sparseft.data.records import Records, kind
from sparseft.data.sections import LONGEST, Section, sections_of
from sparseft.errors import UserError, nearest, shown

DETECTION_RECORDS = 16  # how many of the first records decide the format

_EXPECTED = (
    "expected instruction/output (alpaca), text with '### Human:' and '### Assistant:' turns (guanaco), "
    "messages (chat), prompt/completion, text, or prompt with nested replies (oasst_trees)"
)
# What the keys of each format hold.
_TYPES = {
    "messages": {"messages": "a list of messages", "conversations": "a list of messages"},
    "alpaca": {"instruction": "text", "output": "text"},
    "prompt_completion": {"prompt": "text", "completion": "text"},
    "oasst_trees": {"prompt": "a tree's first message, with 'replies' (a list)"},
    "guanaco": {"text": "text"},
    "text": {"text": "text"},
}
# The key of each format that may be empty, or null as parquet keeps it: such records are left out.
_ANSWERS = {"alpaca": "output", "prompt_completion": "completion", "guanaco": "text", "text": "text"}
CHAT_KEYS = ("messages", "conversations")  # of a chat, either of them; null in a record without one
_PARTNERS = {"instruction": "output", "output": "instruction", "prompt": "completion", "completion": "prompt"}
_MARKERS = re.compile(f"({re.escape(HUMAN)}|{re.escape(ASSISTANT)})")

Segments = list[tuple[str, bool]]  # texts, and whether each is an answer: whether the loss counts on it


@dataclass
class Example:
    """One training example before tokenisation.

    The segments' texts joined are the whole text. Segments are tokenised separately, so that no token spans the border
    of prompt and answer.
    """

    segments: Segments
    source: str  # file and record, for messages
    record: int = 0  # index of the record it came from: examples of one record stay on one side of a split
    closed: bool = False  # no EOS is added: the last answer ends with an end-of-turn token of its own, or goes on
    before: str = ""  # what stands right before, where this is a later section of a text
    questions: tuple[str, ...] = ()  # what is asked, bare of any template: to be found again in test sets

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.segments)


def detect_format(records: Records) -> str:
    """The format that most of the first records have. UserError if the first record fits none."""
    if records.plain_text:  # a text file may well talk about "### Human:"; its documents are text all the same
        return "text"
    found = Counter(
        each for each in (_format_of(item) for item in records.items[:DETECTION_RECORDS]) if each is not None
    )
    flat_message = {"message_id", "parent_id", "text", "role"}
    if found and all(flat_message <= item.keys() for item in records.items[:DETECTION_RECORDS]):
        raise UserError(
            f"{records.where(0)}: these are single messages of OpenAssistant trees (message_id, parent_id), no "
            "conversations; give the file of whole trees (….trees.jsonl), or set dataset.format."
        )
    if not found:
        if {"chosen", "rejected"} <= records.items[0].keys():
            raise UserError(
                f"{records.where(0)}: these are pairs of a better and a worse answer, and objective=sft imitates one; "
                "objective=dpo (or ipo, kto, orpo, simpo) learns from pairs."
            )
        trees = isinstance(records.items[0].get("prompt"), dict)
        for format in ("messages", "alpaca", "oasst_trees" if trees else "prompt_completion", "text"):
            _check_types(records.items[0], format, records.where(0))
        keys = sorted(str(key) for key in records.items[0])
        alone = next((f" '{key}' needs '{_PARTNERS[key]}' beside it." for key in keys if key in _PARTNERS), "")
        raise UserError(
            f"{records.where(0)}: the keys ({shown(', '.join(keys), 300)}) fit no known format; {_EXPECTED}.{alone}"
            + _misspelt(keys, ("instruction", "output", "text", "messages", "conversations", "prompt", "completion"))
        )
    return found.most_common(1)[0][0]


def _format_of(item: dict[str, Any]) -> str | None:
    def has(question: str, answer: str) -> bool:
        given = [item.get(question), item.get(answer)]
        # a table has a cell for each column: where both are empty, the text beside them is meant
        return None not in given and (text is None or is_empty(text) or not all(map(is_empty, given)))

    text = item.get("text")
    if isinstance(item.get("prompt"), dict) and isinstance(item["prompt"].get("replies"), list):
        return "oasst_trees"
    if isinstance(item.get("messages"), list) or isinstance(item.get("conversations"), list):
        return "messages"
    if has("instruction", "output"):
        return "alpaca"
    if has("prompt", "completion"):
        return "prompt_completion"
    if isinstance(text, str):
        return "guanaco" if HUMAN in text and ASSISTANT in text else "text"
    return None


def check_records(records: Records, format: str) -> str | None:
    """A sentence on the first record that is of another format than the file, None where there is none. UserError for
    a record that would be of this one, had its value under the format's key another type."""
    if records.plain_text:
        return None
    mixed, answer = None, _ANSWERS.get(format, "")
    for index, item in enumerate(records.items):
        if answer in item and is_empty(item[answer]):
            continue
        own = _format_of(item)
        if own is None and not (format == "messages" and is_null_chat(item)):
            _check_types(item, format, records.where(index))
        elif own not in (None, format) and mixed is None:
            way = "set dataset.format=text to read all as that, or " if {own, format} == {"guanaco", "text"} else ""
            mixed = (
                f"{records.where(index)}: this record has format {own}, but most of the first records have {format}; a "
                f"file has one format: {way}give each its own file."
            )
    return mixed


def _check_types(item: dict[str, Any], format: str, where: str) -> None:
    """Refuses a record of no known format that has a key of `format` with a value of another type."""
    for key, expected in _TYPES[format].items():
        if key in item and not (expected == "text" and isinstance(item[key], str)):
            without = " without them" if format == "oasst_trees" and isinstance(item[key], dict) else ""
            raise UserError(f"{where}: '{key}': expected {expected}, got {kind(item[key])}{without}.")


class NothingToLearn(Exception):
    """A record that is as it should be, but for the answer, which is empty or not there; public sets have some."""

    def __init__(self, why: str, where: str) -> None:
        super().__init__(why)
        self.where = where


class Converter(abc.ABC):
    """Turns the records of a data set into examples, chunk by chunk, and counts what it leaves out."""

    def __init__(self) -> None:
        self._unknown: Counter[str] = Counter()  # records, by a field that nothing uses
        self._empty: Counter[str] = Counter()  # records with nothing to learn, by the reason
        self._first_empty: dict[str, str] = {}

    def convert(self, records: Records) -> list[Example]:
        """The examples of these records. UserError names file and record of one that lacks something."""
        examples = []
        for index, item in enumerate(records.items):
            try:
                with self._counting_empty():
                    for example in self._examples(item, records.where(index)):
                        example.record = records.start + index
                        check_encodable(example.text, example.source)
                        examples.append(example)
            except RecursionError as error:  # in a template or in the JSON of a tool call, too
                raise UserError(f"{records.where(index)}: what it holds is nested too deep to be read.") from error
        return examples

    @contextlib.contextmanager
    def _counting_empty(self) -> Iterator[None]:
        """Inside, what has nothing to learn is left out and counted."""
        try:
            yield
        except NothingToLearn as reason:
            self._empty[str(reason)] += 1
            self._first_empty.setdefault(str(reason), reason.where)

    @abc.abstractmethod
    def _examples(self, item: dict[str, Any], where: str) -> Iterable[Example]:
        """The examples of one record, which stands at `where`."""

    def note(self, source: str) -> str | None:
        """What the user should be told of the conversion once all records are converted; None: nothing."""
        return "; ".join(unused_sentence(self._unknown)) or None

    def warnings(self) -> list[str]:
        """Such sentences that should worry the user."""
        return [
            f"{counted(count, 'record')} left out: {reason} (first: {self._first_empty[reason]})"
            for reason, count in self._empty.most_common()
        ]


class Plain(Converter):
    """`alpaca`, `guanaco`, `prompt_completion` and `text`: a record is one example, a long text one a section."""

    def __init__(self, format: str) -> None:
        super().__init__()
        self.format = format

    def _examples(self, item: dict[str, Any], where: str) -> Iterator[Example]:
        self._unknown.update(str(key) for key in item if key not in _FIELDS[self.format] and not is_empty(item[key]))
        if isinstance(item, Section) and (item.before or item.more):
            if self.format != "text":
                raise UserError(
                    f"{where}: a text of more than {LONGEST:,} characters without a blank line is no single "
                    f"{self.format} record; put blank lines between the records, or use JSON lines."
                )
            yield Example([(item["text"], True)], where, closed=item.more, before=item.before)
            return
        segments = _SEGMENTS[self.format](item, where)
        if self.format != "text":
            yield Example(segments, where, questions=_QUESTIONS[self.format](item))
            return
        for part in sections_of(item):
            yield Example([(part["text"], True)], where, closed=part.more, before=part.before)


_FIELDS = {
    "alpaca": {"instruction", "input", "output", "answer", "system", "history"},
    "guanaco": {"text"},
    "prompt_completion": {"prompt", "completion"},
    "text": {"text"},
}
_MOST_FIELDS = 12  # named in one note


def is_empty(value: Any) -> bool:
    """Whether a field holds nothing: None, or an empty text, list or object."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def is_null_chat(item: dict[str, Any]) -> bool:
    """Whether a record has the key of a chat and nothing under it: a conversation without a message."""
    given = [item[key] for key in CHAT_KEYS if key in item]
    return bool(given) and all(value is None for value in given)


def unused_sentence(fields: Counter[str], by: str = "") -> list[str]:
    """`field 'id' of 12 records, 'source' of 3 records not used`, as a list of one sentence, or of none. `fields`
    counts records; `by` says who does not use them."""
    used = [(name, count) for name, count in fields.most_common() if count]
    named = [f"'{shown(name)}' of {counted(count, 'record')}" for name, count in used[:_MOST_FIELDS]]
    if len(used) > _MOST_FIELDS:
        named.append(f"{len(used) - _MOST_FIELDS} others")
    if not named:
        return []
    noun, verb = ("field", "is") if len(used) == 1 else ("fields", "are")
    return [f"{noun} {', '.join(named)} {verb} not used{by}"]


def counted(number: int, noun: str) -> str:
    """`1 record`, `2 records`."""
    return f"{number:,} {noun}{'s' if number > 1 else ''}"


def check_encodable(text: str, where: str) -> None:
    """Refuses half a surrogate pair, which JSON's \\u escapes can spell but no tokenizer can encode."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        character = f"\\u{ord(text[error.start]):04x}"
        raise UserError(f"{where}: the text holds half a surrogate pair ({character}), no character.") from error


def _alpaca(item: dict[str, Any], where: str) -> Segments:
    instruction = _text(item, "instruction", where, "alpaca")
    if not instruction.strip():
        raise UserError(f"{where}: 'instruction' is empty; an alpaca record needs a question.")
    given = "" if item.get("input") is None else _text(item, "input", where, "alpaca")
    system = "" if item.get("system") is None else _text(item, "system", where, "alpaca")
    prompt = alpaca_conversation(_history(item, where), instruction, given, system)
    return [(prompt, False), (_answer(item, "output", where, "alpaca"), True)]


def _history(item: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """The turns before an alpaca record's own: questions and answers."""
    history = item.get("history")
    if is_empty(history):
        return []
    if not isinstance(history, list):
        raise UserError(f"{where}: 'history' must be a list of [question, answer] pairs.")
    for number, turn in enumerate(history, 1):
        if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(each, str) for each in turn):
            raise UserError(f"{where}: turn {number} of 'history' must be a [question, answer] pair of texts.")
    return [(question, answer) for question, answer in history]


def _prompt_completion(item: dict[str, Any], where: str) -> Segments:
    prompt = _text(item, "prompt", where, "prompt_completion")
    return [(prompt, False), (_answer(item, "completion", where, "prompt_completion"), True)]


def _plain(item: dict[str, Any], where: str) -> Segments:
    return [(_answer(item, "text", where, "text"), True)]


def _guanaco(item: dict[str, Any], where: str) -> Segments:
    """Cuts at the markers only: joined, the segments are the text exactly, white space and all.

    A prompt ends right after `### Assistant:`, as it does when a model is asked; the space that follows belongs to
    the answer, where a tokenizer can join it to the first word.
    """
    text = _answer(item, "text", where, "guanaco")
    pieces = _MARKERS.split(text)  # before the first marker, then marker and turn in turns
    if ASSISTANT not in pieces[1::2]:
        raise NothingToLearn(f"the text has no '{ASSISTANT}' turn to learn from", where)
    if HUMAN not in pieces[1::2]:
        raise UserError(f"{where}: the guanaco text has no '{HUMAN}' turn.")
    parts: Segments = [(pieces[0], False)]
    for marker, turn in zip(pieces[1::2], pieces[2::2], strict=True):
        if marker == ASSISTANT and not turn.strip():
            raise NothingToLearn(f"an '{ASSISTANT}' turn is empty", where)
        parts += [(marker, False), (turn, marker == ASSISTANT)]
    return join_prompts(parts)


def join_prompts(segments: Segments) -> Segments:
    """The segments with all that stands between two answers as one."""
    joined: Segments = []
    for text, answer in segments:
        if joined and not answer and not joined[-1][1]:
            joined[-1] = (joined[-1][0] + text, False)
        elif text:
            joined.append((text, answer))
    return joined


_SEGMENTS: dict[str, Callable[[dict[str, Any], str], Segments]] = {
    "alpaca": _alpaca,
    "guanaco": _guanaco,
    "prompt_completion": _prompt_completion,
    "text": _plain,
}

_QUESTIONS: dict[str, Callable[[dict[str, Any]], tuple[str, ...]]] = {
    "alpaca": lambda item: (
        *(question for question, _ in item.get("history") or ()),
        "\n".join(filter(None, (item["instruction"], item.get("input")))),
    ),
    "guanaco": lambda item: _human_turns(item["text"]),
    "prompt_completion": lambda item: (item["prompt"],),
    "text": lambda item: (),
}


def _human_turns(text: str) -> tuple[str, ...]:
    pieces = _MARKERS.split(text)
    return tuple(turn for marker, turn in zip(pieces[1::2], pieces[2::2], strict=True) if marker == HUMAN)


def _text(item: dict[str, Any], key: str, where: str, format: str) -> str:
    value = item.get(key)
    if value is None:
        keys = sorted(str(each) for each in item if item[each] is not None)
        raise UserError(
            f"{where}: the {format} record lacks '{key}' (it has: {shown(', '.join(keys), 300) or 'nothing'})."
            + _misspelt([each for each in keys if each not in _KNOWN_KEYS], (key,))
        )
    if not isinstance(value, str):
        chat = isinstance(value, list) and format == "prompt_completion"
        hint = "; the messages of a chat go into one list, under 'messages'" if chat else ""
        raise UserError(f"{where}: '{key}' must be text, not {kind(value)}{hint}.")
    return value


def _answer(item: dict[str, Any], key: str, where: str, format: str) -> str:
    null = key in item and item[key] is None
    if null or not _text(item, key, where, format).strip():
        raise NothingToLearn(f"'{key}' is empty", where)
    return item[key]


_KNOWN_KEYS = frozenset(("instruction", "input", "output", "answer", "text", "prompt", "completion"))


def _misspelt(keys: list[str], expected: tuple[str, ...]) -> str:
    """` 'outptu': Did you mean 'output'?` for the first key that is nearly an expected one."""
    for key in keys:
        if key in expected:
            continue
        suggestion = nearest(key, expected)
        if suggestion.startswith(" Did you mean"):
            return f" '{shown(key)}':{suggestion}"
    return ""

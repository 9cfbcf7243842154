"""Chat `messages` to examples, through the tokenizer's chat template where it has one.

A template is a program, so where an answer begins and ends in its output is found by rendering the conversation up to
it, once as generation would ask for it (the prompt) and once with it. What is learnt is the template's own text:

- the rendering with the answer begins with the prompt: what it adds is the answer, with its end-of-turn marker;
- the generation prompt opens a thought that the template does not write into conversations (DeepSeek-R1's `<think>`):
  the answer begins where both renderings part;
- the prompt is written in another order once the answer stands behind it (Mistral's system message, which belongs to
  the last message if that is the user's): the prompt as generation gets it, then the answer as the template writes it.

A conversation becomes one example with loss on every answer where each prompt in it, text and token ids, is the one
that generation gets. Where it is not (the template rewrites earlier turns, a token spans the border of prompt and
answer, or answers do not end by themselves), each answer becomes an example with its own history. A template that
shows an answer's beginning in none of these ways is refused. `User:` and `Assistant:` in plain text are for tokenizers
without one, and where that is set (`dataset.plain_chat`).
"""

from __future__ import annotations

import os.path
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparseft.data.encoding import Encoder
from sparseft.data.formats import (
    CHAT_KEYS,
    Converter,
    Example,
    Segments,
    check_encodable,
    counted,
    is_empty,
    join_prompts,
    unused_sentence,
)
from sparseft.data.messages import Conversation, Message, parse_conversation
from sparseft.data.prompts import PLAIN_ASSISTANT, PLAIN_BREAK, plain_turn
from sparseft.data.templates import STAND_IN, Refused, rendered
from sparseft.data.tool_calls import with_arguments
from sparseft.errors import UserError, shown

BESIDE = ("system", "functions", "tools", "documents")  # of a record, beside its messages: what templates may use


@dataclass
class Answer:
    """An answer in the template's text."""

    turn: int  # the message's index
    text: str  # the rendering up to the answer's end
    start: int  # where in it the answer begins
    closed: bool  # it ends with an end-of-turn token
    endless: bool  # the template writes nothing at all behind it


class Chats(Converter):
    """Converts conversations with the encoder's tokenizer; `plain`: without its chat template; `day`: the one that the
    template takes for today."""

    def __init__(self, encoder: Encoder, plain: bool = False, day: str | None = None) -> None:
        super().__init__()
        self.encoder, self.day = encoder, day
        self.tokenizer = encoder.tokenizer
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        # Why the template is not used; None: it is.
        self.plainly = (
            None if has_template and not plain else "as set" if plain else "the tokenizer has no chat template"
        )
        self._marks = _end_marks(self.tokenizer)
        self._masked = 0
        self._apart: Counter[str] = Counter()  # conversations with one example an answer, by reason
        self._refused: Counter[str] = Counter()  # answers whose prompt the template refuses, by its words
        self._first_refused: dict[str, str] = {}
        self._unused: Counter[str] = Counter()  # records, by a field that the template does not use
        self._unwritten: Counter[str] = Counter()  # messages whose content the template does not write, by role
        self._shortened: Counter[bool] = Counter()  # learnt ones among them, by whether a thought is what is missing
        self._first_shortened: dict[bool, str] = {}
        self._asked = 0
        self._as_text: bool | None = None  # whether the template wants a call's arguments as text
        self._asked_with: Counter[str] = Counter()  # answers, by a generation prompt's end that is in no text

    def _examples(self, item: dict[str, Any], where: str) -> Iterator[Example]:
        """Raises UserError for a conversation that lacks something, that the template refuses, or in which it does not
        show where an answer begins."""
        chat = parse_conversation(item, where)
        self._asked += chat.asked
        used = next((key for key in CHAT_KEYS if item.get(key) is not None), "messages")
        known = (used, *BESIDE)
        self._unknown.update(key for key in item if key not in known and not is_empty(item[key]))
        if not chat.learnt:
            self._masked += 1
            return
        chat.messages = [self._with_arguments(message, chat.where) for message in chat.messages]
        questions = tuple(message["content"] for message in chat.messages if message["role"] == "user")
        for segments, closed in self._plain(chat) if self.plainly else self._rendered(chat):
            yield Example(segments, where, closed=closed, questions=questions)

    def _with_arguments(self, message: Message, where: str) -> Message:
        """The message with its calls' arguments as the template wants them."""
        if not message.get("tool_calls"):
            return message
        if self._as_text is None:
            self._as_text = self._takes_text()
        calls = [with_arguments(call, as_text=self._as_text, where=where) for call in message["tool_calls"]]
        return message | {"tool_calls": calls}

    def _takes_text(self) -> bool:
        """Whether the template joins arguments to text, as OpenAI writes them: an object it refuses (`'…' + {}`), or
        writes as Python does."""

        def written(arguments: Any) -> str | None:
            function = {"name": STAND_IN, "arguments": arguments}
            calls = [{"id": "call00000", "type": "function", "function": function}]  # Mistral's are nine letters
            messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": calls}]
            try:
                return self._try(messages, Conversation(messages, [1], {}, ""))
            except Refused:
                return None

        given = None if self.plainly else written({"key": 1})
        return not self.plainly and (given is None or "{'key'" in given) and written('{"key": 1}') is not None

    def note(self, source: str) -> str:
        """How the messages were rendered and what was left out, as a sentence."""
        if self.plainly:
            parts = [f"messages rendered as plain User/Assistant text: {self.plainly}"]
        else:
            parts = ["messages rendered with the tokenizer's chat template"]
        for reason, count in self._apart.most_common():
            parts.append(f"{counted(count, 'conversation')} as one example an answer: {reason}")
        if self._masked:
            parts.append(f"{counted(self._masked, 'conversation')} left out: all answers are masked")
        for reason, count in self._refused.most_common():
            parts.append(
                f"{counted(count, 'answer')} left out, whose prompt the template refuses: {reason} (first: "
                f"{self._first_refused[reason]})"
            )
        for end, count in self._asked_with.most_common():
            parts.append(
                f"generation is asked for {counted(count, 'answer')} with {shown(repr(end))} at the prompt's end, "
                "which the template does not write there in conversations"
            )
        for role, count in self._unwritten.most_common():
            parts.append(f"the template does not write {counted(count, f'{role} message')} as given")
        if self._asked:
            parts.append(
                f"{counted(self._asked, 'message')} of others than the assistant asked to be learnt; only answers are"
            )
        by = ": no chat template writes them" if self.plainly else " by the template"
        parts += [*unused_sentence(self._unused, by), *unused_sentence(self._unknown)]
        return "; ".join(parts)

    def warnings(self) -> list[str]:
        """Answers that the template does not write as they are: it decides what is learnt of them."""
        said = super().warnings()
        for thought, count in self._shortened.most_common():
            how = (
                "the part of {} up to </think>, which is not learnt"
                if thought
                else "{} as given, so not all of it is learnt"
            )
            said.append(
                f"the chat template does not write {how.format(counted(count, 'answer'))} (first: "
                f"{self._first_shortened[thought]})"
            )
        return said

    def _plain(self, chat: Conversation) -> list[tuple[Segments, bool]]:
        for turn in chat.learnt:
            if not chat.messages[turn]["content"].strip():
                raise UserError(f"{chat.place(turn)}: tool calls without text need a chat template ({self.plainly}).")
        self._unused.update({*chat.context, *_extras(chat.messages)})
        return [(_in_plain_text(chat), False)]

    def _rendered(self, chat: Conversation) -> list[tuple[Segments, bool]]:
        """Segments of each example, and whether its last answer ends with an end-of-turn token."""
        used = chat.messages[: chat.learnt[-1] + 1]  # what follows the last answer teaches nothing
        full = self._render(used, chat)
        check_encodable(full, chat.where)  # before a tokenizer looks for borders in it
        answers = [each for turn in chat.learnt if (each := self._answer(chat, turn, full)) is not None]
        if not answers:
            return []
        self._count_unused(chat, used, full)
        reason = self._why_apart(answers, full)
        if reason is None:
            segments, done = [], 0
            for each in answers:
                segments += [(each.text[done : each.start], False), (each.text[each.start :], True)]
                done = len(each.text)
            found = [(segments, answers[-1].closed)]
        else:
            self._apart[reason] += 1
            found = [
                ([(each.text[: each.start], False), (each.text[each.start :], True)], each.closed) for each in answers
            ]
        self._count_unwritten(chat, used, answers, [full, *(each.text for each in answers)])
        return found

    def _why_apart(self, answers: list[Answer], full: str) -> str | None:
        """Why the answers cannot share one example; None if they can."""
        if len(answers) == 1:
            return None
        done = 0
        segments: Segments = []
        whole = (
            answers[-1].text if answers[-1].text.startswith(full) else full
        )  # the last one may have a mark behind it
        for each in answers:
            if each.start < done or not whole.startswith(each.text):
                return "the template rewrites earlier turns"
            segments += [(each.text[done : each.start], False), (each.text[each.start :], True)]
            done = len(each.text)
        if any(each.endless and not each.closed for each in answers):
            return "the template does not end answers, so EOS does"
        if not self.encoder.joins(segments):
            return "tokens would span the border of prompt and answer"
        return None

    def _answer(self, chat: Conversation, turn: int, full: str) -> Answer | None:
        """The answer `turn`, None if the template refuses to be asked for it."""
        messages, where = chat.messages, chat.place(turn)
        try:
            prompt = self._try(messages[:turn], chat, prompt=True)
            answered = full if turn == chat.learnt[-1] else self._try(messages[: turn + 1], chat)
        except Refused as refusal:
            self._first_refused.setdefault(str(refusal), where)
            self._refused[str(refusal)] += 1
            return None
        if not messages[turn]["content"].strip():
            bare = {key: value for key, value in messages[turn].items() if key != "tool_calls"}
            if self._render([*messages[:turn], bare], chat) == answered:
                raise UserError(f"{where}: the chat template does not write tool calls, and there is no other content.")
        if answered.startswith(prompt) and (turn or prompt):
            text, start = answered, len(prompt)
        else:
            text, start = self._parted(chat, turn, prompt, answered, where)
        if start == len(text):
            raise UserError(f"{where}: {_SHOWS_NOT}: it writes nothing for it.")
        closed = bool(self._marks) and text.rstrip().endswith(self._marks)
        endless = False
        if not closed:
            around = self._stand_in(chat, turn)
            endless = around is not None and not around[1].strip()
            mark = self._next_mark(chat, turn, answered, full) if endless else ""
            text, closed = text + mark, bool(mark)
        return Answer(turn, text, start, closed, endless)

    def _parted(self, chat: Conversation, turn: int, prompt: str, answered: str, where: str) -> tuple[str, int]:
        """Text and start of an answer whose rendering does not begin with its prompt."""
        messages = chat.messages
        around = self._stand_in(chat, turn)
        common = os.path.commonprefix([prompt, answered, *([around[0] + STAND_IN] if around else [])])
        opens = turn == 0 and around is not None and answered.startswith(around[0])
        if opens and around[0].rstrip().endswith(prompt.strip()):  # behind a system message of the template's own
            return answered, len(around[0].rstrip()) + len(os.path.commonprefix([_space(around[0]), _space(prompt)]))
        try:
            history = self._try(messages[:turn], chat)
        except Refused:
            history = None
        if history is not None and answered.startswith(history) and len(common) >= len(history):
            # In the generation prompt. Not amid a token of the template's, `</think>` where the prompt has `<think>`.
            start = len(common)
            while start > len(history) and not self.encoder.joins(
                [(answered[:start], False), (answered[start:], True)]
            ):
                start -= 1
            if prompt[start:].strip():
                self._asked_with[prompt[start:]] += 1
            return answered, start
        if around is not None and turn and answered.startswith(around[0]):
            before, asked = around[0].rstrip(), prompt.rstrip()
            same = os.path.commonprefix([before[::-1], asked[::-1]])[::-1]
            opening = prompt[len(history) :].strip() if history is not None and prompt.startswith(history) else ""
            if messages[turn - 1]["content"].strip() in same or (opening and opening in same):
                space = _space(around[0]).removeprefix(os.path.commonprefix([_space(around[0]), _space(prompt)]))
                return prompt + space + answered[len(around[0]) :], len(prompt)
        raise UserError(f"{where}: {_SHOWS_NOT}.")

    def _stand_in(self, chat: Conversation, turn: int) -> tuple[str, str] | None:
        """What the template writes before and behind the answer `turn`, whatever it says; None if it does not show."""
        message = chat.messages[turn] | {"content": STAND_IN}
        try:
            text = self._try([*chat.messages[:turn], message], chat)
        except Refused:
            return None
        before, found, behind = text.rpartition(STAND_IN)
        return (before, behind) if found else None

    def _next_mark(self, chat: Conversation, turn: int, answered: str, full: str) -> str:
        """The token that the next message begins with, if it ends generation (GLM's `<|user|>`), with white space
        before it; else nothing."""
        text = full
        if turn == chat.learnt[-1]:
            try:
                text = self._try([*chat.messages[: turn + 1], {"role": "user", "content": STAND_IN}], chat)
            except Refused:
                return ""
        if not text.startswith(answered):
            return ""
        behind = text[len(answered) :]
        bare = behind.lstrip()
        mark = next((mark for mark in self._marks if bare.startswith(mark)), None)
        if mark is None or self.tokenizer.convert_tokens_to_ids(mark) not in self.encoder.ends:
            return ""
        return behind[: len(behind) - len(bare) + len(mark)]

    def _count_unused(self, chat: Conversation, used: list[Message], full: str) -> None:
        """Counts the fields without which the template writes the same."""
        for name in chat.context:
            context = {key: value for key, value in chat.context.items() if key != name}
            other = Conversation(chat.messages, chat.learnt, context, chat.where)
            self._unused[name] += self._same(used, other, full)
        for name in _extras(chat.messages):
            bare = [{key: value for key, value in message.items() if key != name} for message in chat.messages]
            same = self._same(bare[: len(used)], chat, full)
            for turn, message in enumerate(used[:-1]):  # some fields are written in the last message only
                if same and name in message and message["role"] == "assistant":
                    try:
                        same = self._try([*used[:turn], bare[turn]], chat) == self._try(used[: turn + 1], chat)
                    except Refused:
                        same = False
            self._unused[name] += same

    def _same(self, messages: list[Message], chat: Conversation, full: str) -> bool:
        try:
            return self._try(messages, chat) == full
        except Refused:
            return False

    def _count_unwritten(
        self, chat: Conversation, used: list[Message], answers: list[Answer], texts: list[str]
    ) -> None:
        """Counts messages whose content stands in none of the texts. White space does not count: some templates set
        `<think>` off by lines of their own."""
        learnt = {each.turn: each for each in answers}
        for turn, message in enumerate(used):
            within = [learnt[turn].text[learnt[turn].start :]] if turn in learnt else texts
            if any(message["content"].strip() in text for text in within):
                continue
            content = _squeezed(message["content"])
            if turn in learnt:
                self._compare(content, learnt[turn], chat.place(turn))
            elif not any(content in _squeezed(text) for text in texts):
                self._unwritten[message["role"]] += 1

    def _compare(self, content: str, answer: Answer, where: str) -> None:
        """Counts a learnt answer of which the text lacks something."""
        before, text = _squeezed(answer.text[: answer.start]), _squeezed(answer.text)
        found = text.rfind(content)
        if found >= 0 and found + len(content) > len(before):  # it may begin in the prompt, which opens its thought
            return
        thought = "</think>" in content and content.rpartition("</think>")[2] in text[len(before) :]
        self._shortened[thought] += 1
        self._first_shortened.setdefault(thought, where)

    def _render(self, messages: list[Message], chat: Conversation) -> str:
        try:
            return self._try(messages, chat)
        except Refused as refusal:
            raise UserError(f"{chat.where}: the tokenizer's chat template refuses the conversation: {refusal}.") from (
                refusal.__cause__
            )

    def _try(self, messages: list[Message], chat: Conversation, *, prompt: bool = False) -> str:
        """What the template writes; `prompt`: with what asks for the next answer. Refused where it cannot."""
        return rendered(self.tokenizer, messages, prompt=prompt, day=self.day, context=chat.context)


_SHOWS_NOT = (
    "the tokenizer's chat template does not show where this answer begins (its text with the answer does not go on "
    "from its text that asks for one); give the tokenizer another chat_template, or dataset.plain_chat=true to write "
    "chats as plain User: and Assistant: text"
)


def _extras(messages: Sequence[Message]) -> list[str]:
    """Names of what messages have besides role and content."""
    return sorted({key for message in messages for key in message} - {"role", "content"})


def _end_marks(tokenizer: Any) -> tuple[str, ...]:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return tuple({*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)})


def _squeezed(text: str) -> str:
    """`text` without white space."""
    return "".join(text.split())


def _space(text: str) -> str:
    """The white space that `text` ends with."""
    return text[len(text.rstrip()) :]


def _in_plain_text(chat: Conversation) -> Segments:
    """`User: question`, blank line, `Assistant: answer`, blank line; other roles by their own names."""
    parts: Segments = []
    for turn, message in enumerate(chat.messages[: chat.learnt[-1] + 1]):
        parts.append((PLAIN_BREAK if turn else "", False))
        if turn in chat.learnt:
            parts += [(PLAIN_ASSISTANT, False), (f" {message['content']}", True)]
        else:
            parts.append((plain_turn(message["role"], message["content"]), False))
    return join_prompts(parts)

"""OpenAssistant's message trees (OASST1 and 2, a tree a line) to conversations.

A tree is `{"message_tree_id", "prompt": message}`, a message `{"role": "prompter" | "assistant", "text", "replies":
[message, …]}` with `rank` (0 is best), `lang`, `deleted` and `review_result` where they are known. Messages are left
out, with all replies to them, where they are deleted, are said not to have passed review, or are in another language
than the one asked for.

Conversations are written as in the guanaco format: `### Human: …### Assistant: …`, loss on what the assistant says.
`best` follows the best-ranked reply at each message: one conversation a tree. `all` takes every path from the root to
an assistant's message with no further answer below it. Both leave out what nobody answered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sparseft.data.formats import Converter, Example, Segments, is_empty, join_prompts, unused_sentence
from sparseft.data.prompts import ASSISTANT, human_turn
from sparseft.data.records import kind
from sparseft.errors import UserError, nearest, shown

_ROLES = ("prompter", "assistant")
# What OASST publishes of a tree and of a message; what else there is, is counted.
_TREE_FIELDS = {"message_tree_id", "tree_state", "prompt", "origin"}
_FIELDS = set(
    "message_id parent_id message_tree_id tree_state user_id created_date text role lang review_count review_result "
    "deleted rank synthetic model_name detoxify emojis labels replies".split()
)


@dataclass
class TreeMessage:
    """A message that is kept, and the kept replies to it in the order of the file."""

    role: str  # prompter | assistant
    text: str
    rank: float  # 0 is best; infinite where it is not known
    replies: list[TreeMessage] = field(default_factory=list)
    answered: bool = False  # an assistant's message stands below it


class Trees(Converter):
    """Converts message trees along the paths that are asked for: `best` or `all`."""

    def __init__(self, paths: str, language: str | None) -> None:
        super().__init__()
        self.paths, self.language = paths, language
        self.trees = self.without = 0
        self.left_out: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()  # of root messages
        self._found: set[str] = set()  # fields of the present tree's messages that nothing uses

    def _examples(self, item: dict[str, Any], where: str) -> Iterator[Example]:
        if not isinstance(item.get("prompt"), dict):
            raise UserError(f"{where}: an oasst_trees record needs its first message under 'prompt', an object.")
        self.trees += 1
        self.languages[str(item["prompt"].get("lang"))] += 1
        self._found = {str(key) for key in item if key not in _TREE_FIELDS and not is_empty(item[key])}
        root = self._kept(item["prompt"], where)
        self._unknown.update(self._found)
        found = list(self._conversations(root)) if root is not None else []
        self.without += not found
        for messages in found:
            questions = tuple(message.text for message in messages if message.role == "prompter")
            yield Example(_segments(messages), where, questions=questions)

    def note(self, source: str) -> str | None:
        """What was left out, as a sentence; UserError where nothing is left because of the language."""
        if self.language is not None and self.without == self.trees:
            there = ", ".join(f"{shown(name)} ({count:,} trees)" for name, count in self.languages.most_common(8))
            wanted = f"dataset.language={self.language}"
            raise UserError(f"{source}: no conversation has {wanted}; languages there: {there}.")
        parts = [f"{count:,} messages {what}" for what, count in sorted(self.left_out.items())]
        if self.without:
            parts.append(f"{self.without:,} of {self.trees:,} trees without an answer")
        said = [f"left out of the trees: {', '.join(parts)}"] if parts else []
        return "; ".join([*said, *unused_sentence(self._unknown)]) or None

    def _kept(self, item: Any, tree: str) -> TreeMessage | None:
        """A message with its replies, or None if it is left out. `tree` is where the whole tree stands."""
        if not isinstance(item, dict):
            raise UserError(f"{tree}: every message must be an object, this is {kind(item)}.")
        where = tree if item.get("message_id") is None else f"{tree}, message {shown(item['message_id'])}"
        self._found.update(str(key) for key in item if key not in _FIELDS and not is_empty(item[key]))
        role, text = item.get("role"), item.get("text")
        if role not in _ROLES:
            raise UserError(f"{where}: the role is {shown(repr(role))}.{nearest(str(role), _ROLES)}")
        replies = item.get("replies") or []
        if not isinstance(replies, list):
            raise UserError(f"{where}: 'replies' must be a list, not {kind(replies)}.")
        reason = self._why_not(item)
        if reason is not None:
            self.left_out[reason] += _size(item)
            return None
        if not isinstance(text, str):
            raise UserError(f"{where}: 'text' must be text, not {kind(text)}.")
        rank = item.get("rank")
        if rank is not None and not isinstance(rank, int | float):
            raise UserError(f"{where}: 'rank' must be a number, not {kind(rank)}.")
        message = TreeMessage(role, text, float("inf") if rank is None else rank)
        message.replies = [reply for each in replies if (reply := self._kept(each, tree)) is not None]
        message.answered = any(reply.role == "assistant" or reply.answered for reply in message.replies)
        return message

    def _why_not(self, item: dict[str, Any]) -> str | None:
        if item.get("deleted"):
            return "deleted"
        if "review_result" in item and item["review_result"] is not True:  # None: nobody reviewed it
            return "not passed by review"
        language = item.get("lang")
        if self.language is not None and language != self.language:
            return f"not in {self.language}"
        text = item.get("text")
        if isinstance(text, str) and not text.strip():
            return "empty"
        return None

    def _conversations(self, root: TreeMessage) -> Iterator[list[TreeMessage]]:
        if not root.answered:
            return
        pending = [[root]]
        while pending:
            path = pending.pop()
            ahead = [reply for reply in path[-1].replies if reply.role == "assistant" or reply.answered]
            if not path[-1].answered:
                yield path
            elif self.paths == "best":
                pending.append([*path, min(ahead, key=lambda reply: reply.rank)])
            else:
                pending += [[*path, reply] for reply in reversed(ahead)]


def _segments(messages: list[TreeMessage]) -> Segments:
    parts: Segments = []
    for message in messages:
        if message.role == "assistant":
            parts += [(ASSISTANT, False), (f" {message.text}", True)]
        else:
            parts.append((human_turn(message.text), False))
    return join_prompts(parts)


def _size(item: dict[str, Any]) -> int:
    """Messages in a tree."""
    count, pending = 0, [item]
    while pending:
        each = pending.pop()
        count += 1
        pending += [reply for reply in each.get("replies") or [] if isinstance(reply, dict)]
    return count

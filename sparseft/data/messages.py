"""What a record's chat says, its messages and which of their answers are learnt, in any common spelling (OpenAI's roles
and contents, ShareGPT's from and value)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparseft.data.formats import CHAT_KEYS, NothingToLearn, is_empty, is_null_chat
from sparseft.data.records import kind
from sparseft.data.tool_calls import calls_of, objects, spelt_call, tools_of
from sparseft.errors import UserError, nearest, shown

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "function_call": "assistant"}
_SHAREGPT |= dict.fromkeys(("observation", "function", "function_response", "tool_response"), "tool")
NO_ANSWER = {"name", "reasoning_content", "reasoning", "thinking", "refusal"}  # texts of a message beside its content
SWITCHES = ("weight", "train", "loss", "train_on_turn")  # of a message: whether it is learnt

Message = dict[str, Any]  # role, content, and what else the template may use


@dataclass
class Conversation:
    """The chat of one record."""

    messages: list[Message]
    learnt: list[int]  # the messages that are answers to learn from, ascending
    context: dict[str, list[Any]]  # `tools` and `documents`, where there are any
    where: str  # file and record
    asked: int = 0  # messages of others that ask to be learnt
    inserted: int = 0  # messages added in front of the record's own list

    def place(self, turn: int) -> str:
        """`train.jsonl, line 7, message 2`, for messages."""
        return f"{self.where}, message {turn + 1 - self.inserted}"


def parse_conversation(item: dict[str, Any], where: str) -> Conversation:
    """The record's chat. UserError says what is missing or wrong; NothingToLearn where an answer is empty or there is
    none."""
    messages = next((item[key] for key in CHAT_KEYS if item.get(key) is not None), [] if is_null_chat(item) else None)
    if not isinstance(messages, list):
        keys = shown(", ".join(sorted(str(key) for key in item)), 300) or "nothing"
        raise UserError(f"{where}: a chat record needs a list under 'messages' or 'conversations' (it has: {keys}).")
    if not messages:
        raise NothingToLearn("the conversation is empty", where)
    parsed = [_parse_message(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]
    switches = [_switch(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]
    answers = [turn for turn, message in enumerate(parsed) if message["role"] == "assistant"]
    if not answers:
        raise NothingToLearn("the conversation has no assistant message to learn from", where)
    learnt = [turn for turn in answers if switches[turn] is not False]
    asked = sum(bool(on) for turn, on in enumerate(switches) if turn not in answers)
    inserted = 0
    system = item.get("system")
    if not is_empty(system):
        if not isinstance(system, str):
            raise UserError(f"{where}: 'system' must be text, not {kind(system)}.")
        if parsed[0]["role"] not in ("system", "developer"):
            parsed.insert(0, {"role": "system", "content": system})
            learnt, inserted = [turn + 1 for turn in learnt], 1
        elif parsed[0]["content"].strip() != system.strip():
            raise UserError(f"{where}: 'system' says one thing, the first message (system) another; keep one of them.")
    lists = {"tools": tools_of(item, where), "documents": objects(item.get("documents"), "documents", where)}
    context = {name: found for name, found in lists.items() if found}
    return Conversation(parsed, learnt, context, where, asked, inserted)


def _parse_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"{where}: expected an object with role and content, this is {kind(message)}.")
    role_key = "role" if "role" in message or "from" not in message else "from"
    given = message.get(role_key)
    role = _SHAREGPT.get(given, given) if isinstance(given, str) else given
    if role not in ROLES:
        raise UserError(f"{where}: the role is {shown(repr(role))}.{nearest(str(role), ROLES)}")
    content_key = "content" if "content" in message or "value" not in message else "value"
    content = message.get(content_key)
    taken = (role_key, content_key, *SWITCHES)
    others = {str(key): value for key, value in message.items() if key not in taken and not is_empty(value)}
    calls = spelt_call(content, where) if given == "function_call" else calls_of(others, where)
    elsewhere = content_key not in message and any(isinstance(others[key], str) for key in others.keys() - NO_ANSWER)
    if given == "function_call" or (content is None and (calls or (role == "assistant" and not elsewhere))):
        content = ""  # parquet leaves out what is null
    if calls:
        others.pop("function_call", None)
        others["tool_calls"] = calls
    if isinstance(content, list):
        content = _join_parts(content, where)
    if not isinstance(content, str):
        raise UserError(f"{where}: 'content' must be text, not {kind(content)}.")
    if role == "assistant" and not content.strip() and not calls:
        raise NothingToLearn("an assistant's 'content' is empty", where)
    return {"role": role, "content": content, **others}


def _switch(message: dict[str, Any], where: str) -> bool | None:
    """Whether the message says that it is to be learnt; None if it does not say."""
    said: dict[str, bool] = {}
    for key in SWITCHES:
        value = message.get(key)
        if value is None:
            continue
        plain = value.strip().lower() if isinstance(value, str) else value
        if isinstance(plain, str):
            plain = {"false": False, "true": True, "0": 0, "1": 1, "0.0": 0, "1.0": 1}.get(plain)
        if not isinstance(plain, bool | int | float) or plain not in (0, 1):
            raise UserError(
                f"{where}: '{key}' is {shown(repr(value))}; expected 0 or false (not learnt), or 1 or true (learnt)."
            )
        said[key] = bool(plain)
    if len({*said.values()}) > 1:
        on, off = (next(key for key, value in said.items() if value is each) for each in (True, False))
        raise UserError(f"{where}: '{on}' says to learn this message, '{off}' not to; keep one of them.")
    return next(iter(said.values()), None)


def _join_parts(parts: list[Any], where: str) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise UserError(
                f"{where}: every part of 'content' must be of type text; images and others are not supported."
            )
    return "".join(part["text"] for part in parts)

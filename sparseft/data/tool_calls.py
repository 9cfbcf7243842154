"""Tools and their calls as records spell them, in the one form that templates are written for.

That form is transformers': `tools` is a list of `{"type": "function", "function": {name, description, parameters}}`,
an assistant's `tool_calls` one of `{"type": "function", "function": {name, arguments}}`, the arguments an object.
OpenAI writes them as JSON text, and once had `functions` and `function_call` for both; ShareGPT has bare functions, and
a call as a turn of its own, whose text is the call.
"""

from __future__ import annotations

import json
from typing import Any

from sparseft.errors import UserError, shown

Call = dict[str, Any]


def objects(value: Any, name: str, where: str) -> list[Any]:
    """A list of objects, which may be spelt as a JSON text; empty where there is none."""
    if isinstance(value, str) and value.strip():
        value = _from_json(value, f"{where}: '{name}'")
    if value is None or (isinstance(value, str | list | dict) and not value):
        return []
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise UserError(f"{where}: '{name}' must be a list of objects.")
    return value


def tools_of(record: dict[str, Any], where: str) -> list[Any]:
    """The tools that a record offers, as `tools` or `functions`."""
    key = "tools" if record.get("tools") is not None else "functions"
    return [_typed(tool) if "name" in tool else tool for tool in objects(record.get(key), key, where)]


def calls_of(message: dict[str, Any], where: str) -> list[Call]:
    """The tool calls of an assistant's message, as `tool_calls` or `function_call`; their arguments are left as they
    are. UserError where they are none, or their arguments text that is no JSON object."""
    calls = message.get("tool_calls")
    if calls is None and isinstance(message.get("function_call"), dict):
        calls = [message["function_call"]]
    if not calls:
        return []
    if not (isinstance(calls, list) and all(isinstance(each, dict) for each in calls)):
        raise UserError(f"{where}: the tool calls ('tool_calls') must be a list of objects.")
    calls = [_typed(call) if "name" in call and "function" not in call else call for call in calls]
    for call in calls:
        with_arguments(call, as_text=False, where=where)
    return calls


def spelt_call(text: Any, where: str) -> list[Call]:
    """The calls that a turn of ShareGPT's `function_call` spells: `{"name": …, "arguments": …}`, or a list of such."""
    found = _from_json(text, f"{where}: the tool call") if isinstance(text, str) else text
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise UserError(f'{where}: a tool call is written {{"name": …, "arguments": …}}, not {shown(str(text))}.')
    return calls_of({"tool_calls": calls}, where)


def with_arguments(call: Call, *, as_text: bool, where: str) -> Call:
    """The call with its arguments as an object or, `as_text`, as JSON."""
    function = call.get("function")
    if not isinstance(function, dict) or function.get("arguments") is None:
        return call
    arguments = function["arguments"]
    if isinstance(arguments, str) and not as_text:
        arguments = _from_json(arguments or "{}", f"{where}: what a tool call gives as arguments")
        if not isinstance(arguments, dict):
            raise UserError(f"{where}: the arguments of a tool call are {shown(str(arguments))}; expected an object.")
    elif as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return call | {"function": function | {"arguments": arguments}}


def _typed(function: dict[str, Any]) -> dict[str, Any]:
    """A bare function as `{"type": "function", "function": …}`."""
    return {"type": "function", "function": function}


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{what} is text, but no JSON: {error}.") from error

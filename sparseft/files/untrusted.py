"""Reads JSON and YAML that anybody may have written: within bounds, strictly, and executing nothing. No torch here.

What Python's own readers let pass would be a surprise later: a key that stands twice (the last one wins), NaN and
infinities, YAML aliases that unfold without end, a device in a file's place.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from sparseft.errors import UserError, shown

MAX_BYTES = 256 << 20  # of a description: a hundred times the largest that sparseft writes


class KeyTwice(ValueError):
    """A key stands twice in one JSON object."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key '{shown(key)}' stands twice")
        self.key = key


def parse_json(text: str | bytes, *, numbers: bool = True) -> Any:
    """The value of a JSON document; bytes are UTF-8.

    numbers: NaN, infinities and numbers beyond float64 are refused.

    Raises:
        ValueError: not JSON (`json.JSONDecodeError` says where), or a key stands twice, or nested too deeply.
    """
    strict: dict[str, Any] = {"parse_constant": _no_constant, "parse_float": _finite} if numbers else {}
    try:
        return json.loads(text, object_pairs_hook=unique_keys, **strict)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of its keys and values, for `object_pairs_hook`; `KeyTwice` where a key stands twice."""
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        raise KeyTwice(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return content


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond what a float64 holds")
    return value


def why(error: Exception) -> str:
    """What is wrong with a document, of an exception out of here: short, without the document."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno}"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error) or type(error).__name__


def read_bytes(path: str | Path, limit: int = MAX_BYTES) -> bytes:
    """A regular file's content.

    Raises:
        OSError: as `open`; ValueError: no regular file (a device or a pipe may never end), or more than `limit` bytes.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("not a regular file")
        if found.st_size > limit:
            raise ValueError(f"{found.st_size:,} bytes, more than the {limit:,} that a description may have")
        return file.read(found.st_size)  # never read(limit): that allocates the limit at once


def read_json(path: str | Path, *, numbers: bool = True) -> Any:
    """A JSON file's value; OSError or ValueError (`why` makes a reason of it) where it cannot be had."""
    return parse_json(read_bytes(path).decode("utf-8"), numbers=numbers)


def read_json_object(path: str | Path, what: str = "", *, numbers: bool = True) -> dict[str, Any]:
    """A JSON file that holds one object, of `what` folder; `UserError` naming the file otherwise. numbers: as for
    `parse_json`; the files of transformers may hold infinities."""
    try:
        content = read_json(path, numbers=numbers)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{f', so this is no {what} folder' if what else ''}.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({why(error)}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}.")
    return content


def parse_yaml(text: str) -> Any:
    """The value of a YAML document, without aliases (a few lines of them unfold to gigabytes); ValueError otherwise."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("a YAML alias (*name), which is not read")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) != len(keys):
                raise KeyTwice(next(key for key in keys if keys.count(key) > 1))
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader=Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark is not None else ""
        raise ValueError(f"{getattr(error, 'problem', None) or 'not YAML'}{place}") from error
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (LookupError, AttributeError, TypeError, OverflowError) as error:  # a scalar that its tag does not fit
        raise ValueError(f"a value that is none of its kind ({type(error).__name__})") from error


def read_yaml_object(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds one mapping with text keys; `UserError` naming the file otherwise."""
    try:
        content = parse_yaml(read_bytes(path).decode("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({why(error)}).") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: expected groups and their fields, got {type(content).__name__}.")
    return content

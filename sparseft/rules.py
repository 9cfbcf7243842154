"""What a field of a settings dataclass may hold: its annotation says it, and everything here reads it from there.

    zero_stage: Literal[0, 1, 2, 3] = 0
    max_grad_norm: Annotated[float, AT_LEAST_0] = 1.0
    micro_batch: Annotated[int, AT_LEAST_1] | None = None

Every refusal is a `UserError` that starts with the key and the value seen: `trainer.batch_size=0: expected …`.
"""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import fields
from datetime import date
from typing import Annotated, Any, Literal, NamedTuple

from sparseft.errors import UserError, nearest, shown

LARGEST = 2**63 - 1  # what the loops and counters of torch and Python hold


class Rule(NamedTuple):
    """A condition on a value, and what a message says was expected."""

    holds: Callable[[Any], bool]
    expected: str


AT_LEAST_0 = Rule(lambda value: value >= 0, "at least 0")
AT_LEAST_1 = Rule(lambda value: value >= 1, "at least 1")
AT_LEAST_2 = Rule(lambda value: value >= 2, "at least 2")
ABOVE_0 = Rule(lambda value: value > 0, "more than 0")
BELOW_1 = Rule(lambda value: 0 <= value < 1, "a number from 0 to below 1")
A_DAY = Rule(lambda value: _is_day(value), "a day as 2026-01-31")


def _is_day(value: str) -> bool:
    try:
        return date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False


@functools.cache
def field_types(config_class: type) -> dict[str, Any]:
    """The annotation of each field of a dataclass, resolved, in order."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    return {entry.name: hints[entry.name] for entry in fields(config_class)}


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """`Annotated[int, …] | Literal["auto"] | None` -> `(int, str, NoneType)`: the types without their rules."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return alternatives(annotation.__origin__)
    if origin is Literal:
        return tuple(dict.fromkeys(map(type, typing.get_args(annotation))))
    if origin in (typing.Union, types.UnionType):
        return tuple(dict.fromkeys(each for option in typing.get_args(annotation) for each in alternatives(option)))
    return (annotation,)


def is_optional(annotation: Any) -> bool:
    """Whether None is a value of the field."""
    return type(None) in alternatives(annotation)


def is_text(annotation: Any) -> bool:
    """Whether the field holds text and nothing else (None apart), so that whatever is typed is meant literally."""
    return set(alternatives(annotation)) - {type(None)} == {str}


def is_mapping(annotation: Any) -> bool:
    """Whether the field holds settings of its own, by names that are not known here."""
    return any(typing.get_origin(option) is dict for option in alternatives(annotation))


def describe(annotation: Any) -> str:
    """What a user may write there: "a whole number or null". Of several types under one rule it is the rule that says
    it: some stand there so that a value comes as far as that."""
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    words |= {Any: "a value", list: "a list such as [a,b]", dict: "a group such as {name: value}"}
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return arguments[-1].expected if len(alternatives(annotation)) > 1 else describe(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(describe, arguments)))
    return " or ".join(words.get(typing.get_origin(each) or each, str(each)) for each in alternatives(annotation))


def show(value: Any) -> str:
    """A value as one writes it on the command line, shortened where it is longer than a message should be."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return shown("[" + ",".join(show(item) for item in value) + "]", 300)
    if isinstance(value, dict):
        return shown("{" + ", ".join(f"{name}: {show(item)}" for name, item in value.items()) + "}", 300)
    return shown(str(value), 300)


def check_type(key: str, value: Any, annotation: Any) -> Any:
    """`value` as the field holds it (a whole number becomes a float where one is expected).

    Raises `UserError` where it does not fit. true and false are no numbers, and a number is no text.
    """
    for option in alternatives(annotation):
        if option is Any:
            return value
        if option is type(None) and value is None:
            return None
        if option is bool and isinstance(value, bool):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            if abs(value) > LARGEST:
                raise UserError(f"{key}={show(value)}: expected a whole number of at most {LARGEST}.")
            return value
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise UserError(f"{key}={value}: expected a finite number.")
            return float(value)
        if option is float and isinstance(value, str):
            number = _scientific(value)
            if number is not None:
                return number
        if option is str and isinstance(value, str):
            if not value.strip():
                alternative = f"; write {key}=null to leave it out" if is_optional(annotation) else ""
                raise UserError(f"{key} is empty: expected {describe(annotation)}{alternative}.")
            return value
        if typing.get_origin(option) is list and isinstance(value, list | tuple):
            (item,) = typing.get_args(option)
            return [check_type(f"{key}[{position}]", entry, item) for position, entry in enumerate(value)]
        if typing.get_origin(option) is dict and isinstance(value, dict):
            return {str(name): _plain(f"{key}.{name}", entry) for name, entry in value.items()}
    quoting = is_text(annotation) and value is not None and not isinstance(value, dict | list)
    hint = " (in a YAML file, quote the value)" if quoting else ""
    seen = f"'{value}'" if isinstance(value, str) and _reads_as_other(value) else show(value)
    raise UserError(f"{key}={seen}: expected {describe(annotation)}{hint}.")


def _reads_as_other(text: str) -> bool:
    """Whether text would be taken for a number, true, false or null if it stood without quotes."""
    try:
        float(text)
    except ValueError:
        return text.strip().lower() in ("true", "false", "null")
    return True


def _plain(key: str, value: Any) -> Any:
    """A value of a setting whose type is not known here: a finite number, text, true, false, null, a list of such."""
    if isinstance(value, list | tuple):
        return [_plain(f"{key}[{position}]", entry) for position, entry in enumerate(value)]
    if isinstance(value, str) and (number := _scientific(value)) is not None:
        return number
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value}: expected a finite number.")
    if value is None or isinstance(value, str | int | float):
        return value
    raise UserError(f"{key}={show(value)}: expected a number, text, true or false, null or a list.")


def _scientific(text: str) -> float | None:
    """`1e-4` as a number: PyYAML reads it as text for want of a dot."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if "e" in text.lower() and math.isfinite(number) else None


def check_choice(key: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuses a value that is none of `choices`, naming the nearest."""
    options = list(choices)
    if value in options:
        return
    listed = f": expected one of {', '.join(map(show, options))}" if len(options) <= 12 else " is unknown"
    begun = [option for option in map(str, options) if value and option.startswith(str(value))]
    near = f" Did you mean '{begun[0]}'?" if begun else nearest(str(value), map(str, options))
    if len(options) <= 12 and not near.startswith(" Did you mean"):
        near = ""  # the message lists all options already
    sweep = (
        " To sweep over several values add --multirun."
        if isinstance(value, str) and "," in value and all(part in map(str, options) for part in value.split(","))
        else ""
    )
    raise UserError(f"{key}={show(value)}{listed}.{sweep or near}")


def check_value(key: str, value: Any, annotation: Any) -> None:
    """Refuses a value of the right type that the annotation's rules or choices exclude; None passes."""
    if value is None:
        return
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        check_choice(key, value, arguments)
    elif origin is Annotated:
        check_value(key, value, arguments[0])
        for rule in arguments[1:]:
            if not rule.holds(value):
                raise UserError(f"{key}={show(value)}: expected {rule.expected}.")
    elif origin is list and isinstance(value, list | tuple):
        for entry in value:
            check_value(key, entry, arguments[0])
    elif origin in (typing.Union, types.UnionType):
        for option in arguments:
            check_value(key, value, option)


def check_fields(config: Any, key: Callable[[str], str], *, typed: bool = False) -> None:
    """`check_value` of every field of a dataclass, with `typed` `check_type` before: of one that Python code may have
    made. `key` makes of a field's name what a user calls it."""
    for name, annotation in field_types(type(config)).items():
        if typed:
            check_type(key(name), getattr(config, name), annotation)
        check_value(key(name), getattr(config, name), annotation)

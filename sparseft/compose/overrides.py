"""The words of a command line that set something: `key=value`, `+key=value`, `~key`, `group=option`.

Hydra's grammar gives a meaning to `=`, `,`, brackets, `~`, quotes and to numbers, which is right for numbers and lists
and wrong for paths. So the type of the key decides: text is taken as typed, all else goes through Hydra's parser.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from sparseft.errors import UserError
from sparseft.rules import alternatives, describe, is_text

GROUPS = ("model", "dataset", "method", "hardware", "experiment")

_SWEEP_FUNCTION = re.compile(r"(choice|range|glob|interval|shuffle|sort|tag)\(.*\)", re.DOTALL)
_CLOSING = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Override:
    """One word; `value` is what stands after the first `=`, None where the word deletes (`~key`)."""

    word: str
    key: str
    value: str | None


def is_override(word: str) -> bool:
    """Whether a word sets something (as against a task of `eval`)."""
    return "=" in word or word[:1] in {"~", "+"}


def paths_and_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words that name a path, and those that set something; what lies there is a path though it has a `=` in it."""
    paths = [word for word in words if not is_override(word) or os.path.exists(word)]
    return paths, [word for word in words if word not in paths]


def parse(word: str) -> Override:
    """Splits a word; `+` and `++` mean nothing here, because only known keys can be set."""
    key, equals, value = word.partition("=")
    if key.startswith("~"):
        return Override(word, key[1:].strip(), None)
    key = key.removeprefix("+").removeprefix("+").strip()
    if not equals:
        raise UserError(f"'{word}' is not a setting: expected key=value.")
    if not key:
        raise UserError(f"'{word}' names no key: expected key=value.")
    return Override(word, key, value)


def unquote(text: str) -> str | None:
    """What stands between a pair of quotes that encloses the whole text, escapes undone; None if there is none.

    As in Hydra's grammar: `\\'` is a quote, and backslashes are only special before a quote.
    """
    quote = text[:1]
    if quote not in {"'", '"'}:
        return None
    inside, position = "", 1
    for match in re.finditer(r"(\\*)([^\\])", text[1:], re.DOTALL):
        backslashes, character = match.groups()
        position += len(match[0])
        if character != quote:
            inside += backslashes + character
            continue
        inside += backslashes[: len(backslashes) // 2]
        if len(backslashes) % 2 == 0:  # not escaped: the quotes close here
            return inside if position == len(text) else None
        inside += quote
    return None


def split_top_level(text: str) -> list[str]:
    """Splits at the commas outside quotes and closed brackets: `a,'b,c',d[1,2]` -> `a`, `'b,c'`, `d[1,2]`."""
    parts, start, position = [], 0, 0
    while position < len(text):
        character = text[position]
        if character == ",":
            parts.append(text[start:position])
            start = position + 1
        elif character in {"'", '"'} and position == start:  # a quote inside a word is an apostrophe
            closing = re.compile(rf"{character}\s*(,|$)").search(text, position + 1)
            if closing is not None:
                position = closing.start()
        elif character in _CLOSING:
            closing_bracket = text.find(_CLOSING[character], position)
            if closing_bracket >= 0:
                position = closing_bracket
        position += 1
    return [*parts, text[start:]]


def text_value(override: Override) -> str | None:
    """The value of a text field: as typed, without enclosing quotes; a bare `null` is null."""
    assert override.value is not None
    if override.value == "null":
        return None
    unquoted = unquote(override.value)
    return override.value if unquoted is None else unquoted


def parsed_value(override: Override, annotation: Any) -> Any:
    """The value of any other field, read by Hydra's grammar: numbers, true and false, null, lists, interpolations."""
    parsed = _hydra_parse(override, annotation)
    if parsed.is_sweep_override():
        raise UserError(
            f"{override.word}: several values make a sweep, add --multirun; "
            f"a single one would be {describe(annotation)}."
        )
    return parsed.value()


def expand(
    words: list[str], annotation_of: Callable[[str], Any], options_of: Callable[[str], list[str]]
) -> list[list[str]]:
    """The points of a sweep, the last swept key changing fastest; words that sweep nothing stand in every point.

    annotation_of: a key's type, None if it is unknown (such a word stays as it is, composing refuses it).
    options_of: the options of a group, for `glob(*)`.
    """
    dimensions = []
    for word in words:
        override = parse(word)
        if override.value is None:
            dimensions.append([word])
            continue
        annotation = str if override.key in GROUPS else annotation_of(override.key)
        if annotation is None:
            dimensions.append([word])
            continue
        values = _swept_values(override, annotation, options_of)
        dimensions.append([f"{override.key}={value}" for value in values] if values else [word])
    return [list(point) for point in itertools.product(*dimensions)]


def _swept_values(override: Override, annotation: Any, options_of: Callable[[str], list[str]]) -> list[str]:
    """The values of a sweep as one would type them one at a time; empty if the word sweeps nothing."""
    value = (override.value or "").strip()
    if is_text(annotation) and not value.startswith(("range(", "glob(", "interval(", "shuffle(", "sort(", "tag(")):
        if value.startswith("choice(") and value.endswith(")"):
            parts = split_top_level(value[len("choice(") : -1])
        else:
            parts = split_top_level(value)
            if len(parts) == 1:
                return []
        values = [part.strip() for part in parts]
        if not all(values):
            raise UserError(
                f"{override.word}: an empty value in the sweep; quote the value if the comma belongs to it."
            )
        return values
    if is_text(annotation) and not _SWEEP_FUNCTION.fullmatch(value):
        return []
    parsed = _hydra_parse(override, annotation)
    if not parsed.is_sweep_override():
        return []
    if parsed.is_interval_sweep():
        raise UserError(f"{override.word}: an interval has no points to enumerate; use range(start,stop,step).")
    swept = parsed.value()
    if hasattr(swept, "include"):  # Hydra's Glob
        if override.key not in GROUPS:
            raise UserError(f"{override.word}: glob() sweeps over the options of a group ({', '.join(GROUPS)}).")
        names = [
            name
            for name in options_of(override.key)
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in swept.include)
            and not any(fnmatch.fnmatchcase(name, pattern) for pattern in swept.exclude)
        ]
        if not names:
            raise UserError(f"{override.word} matches nothing. Available: {', '.join(options_of(override.key))}.")
        return names
    return [str(item) for item in parsed.sweep_string_iterator()]


def _hydra_parse(override: Override, annotation: Any) -> Any:
    """Hydra's own reading of `key=value`; where the field may hold text, what its grammar does not know is text."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    value = override.value or ""
    try:
        try:
            return OverridesParser.create().parse_override(f"{override.key}={value}")
        except HydraException:
            if not _may_hold_text(annotation):
                raise
            return OverridesParser.create().parse_override(f"{override.key}={_quoted(value)}")
    except HydraException as error:
        raise UserError(
            f"{override.word}: the value cannot be read; expected {describe(annotation)}, quoted if it holds "
            "any of = , ( ) [ ] { } ' \"."
        ) from error


def _may_hold_text(annotation: Any) -> bool:
    """Whether text is a value of the field, or of the list that it holds."""
    return any(each is str or any(map(_may_hold_text, get_args(each))) for each in alternatives(annotation))


def _quoted(value: str) -> str:
    """The value with its words that Hydra's grammar does not know in quotes: `[~/runs/a,b]` -> `['~/runs/a',b]`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Quote, QuotedString
    from hydra.errors import HydraException

    value = value.strip()
    words = split_top_level(value)
    if len(words) > 1:
        return ",".join(map(_quoted, words))
    if value.startswith("[") and value.endswith("]"):
        return f"[{_quoted(value[1:-1])}]"
    if not value or value.startswith(("[", "{", "'", '"', "${")):
        return value
    try:
        OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return QuotedString(value, Quote.single).with_quotes()
    return value

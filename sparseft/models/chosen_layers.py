"""`method.layers`: which decoder layers train, so that the backward pass ends at the lowest of them. No torch here."""

from __future__ import annotations

import re
from typing import Any

from sparseft.errors import UserError
from sparseft.rules import Rule, show

ALL = "all"
EXPECTED = "all, upper:SHARE (upper:0.5 is the upper half), a list of layers counted from 0 such as [12,13], or 12-29"
_UPPER = re.compile(r"upper:(\d+(?:\.\d*)?|\.\d+)")
_RANGE = re.compile(r"(\d+)-(\d+)")


def _readable(value: Any) -> bool:
    """Whether some model has such layers."""
    if isinstance(value, list):
        return bool(value) and all(type(number) is int and number >= 0 for number in value)
    text = str(value)
    if upper := _UPPER.fullmatch(text):
        return 0.0 < float(upper[1]) <= 1.0
    if between := _RANGE.fullmatch(text):
        return int(between[1]) <= int(between[2])
    return text == ALL


LAYERS = Rule(_readable, EXPECTED)


def chosen_layers(value: Any, depth: int) -> frozenset[int] | None:
    """The layers that a setting means in a model of `depth`; None: all. UserError where the model has no such layer.

    Of a share, as many of the last layers as come nearest to it, at least one.
    """
    assert _readable(value), value
    if isinstance(value, list):
        layers = frozenset(value)
    elif value == ALL:
        return None
    elif upper := _UPPER.fullmatch(value):
        return frozenset(range(depth - max(1, round(float(upper[1]) * depth)), depth))
    else:
        first, last = map(int, value.split("-"))
        if last >= depth:  # before a range is made of it
            first = last
        layers = frozenset(range(first, last + 1))
    if max(layers) >= depth:
        raise UserError(
            f"method.layers={show(value)}: the model has no decoder layer {max(layers)}; its {depth} are 0 to "
            f"{depth - 1}."
        )
    return layers

"""The methods, by name. A new one is a file here, a YAML in `conf/method/`, a line below and a test file.

Importing this package or a method's module does not import torch, so that configs can be checked fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from sparseft.errors import UserError, nearest

if TYPE_CHECKING:
    from sparseft.methods.base import Method

METHODS: dict[str, str] = {
    "s2ft": "sparseft.methods.s2ft:S2FT",
    "sylva": "sparseft.methods.sylva:Sylva",
    "lora": "sparseft.methods.lora:Lora",
    "dora": "sparseft.methods.lora:Dora",
    "full": "sparseft.methods.full:Full",
}


def get_method(name: str) -> Method:
    """The method of that name; an unknown one is a `UserError` with the nearest."""
    if name not in METHODS:
        raise UserError(f"Unknown method '{name}'.{nearest(name, METHODS)}")
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)()


def config_class(name: str) -> type:
    """The config dataclass of a method, for composing and checking `conf/method/<name>.yaml`."""
    return get_method(name).config_class


def method_of(config: object) -> Method:
    """The method that a config object configures (the most specific one: DoRA is LoRA with `use_dora`)."""
    for name in METHODS:
        method = get_method(name)
        if type(config) is method.config_class and method.accepts(config):
            return method
    raise TypeError(
        f"expected a method's config ({', '.join(config_class(name).__name__ for name in METHODS)}), "
        f"got {type(config).__name__}"
    )

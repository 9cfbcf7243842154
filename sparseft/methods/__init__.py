"""The methods, by name. A new one is a file here, a YAML in `conf/method/`, a line below and a test file.

Importing a method's module does not import torch, so that configs can be checked fast; importing this package, whose
names `import sparseft` reads, loads next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseft.methods.base import MethodConfig

METHODS: dict[str, str] = {
    "s2ft": "sparseft.methods.s2ft:S2FTConfig",
    "sylva": "sparseft.methods.sylva:SylvaConfig",
    "paca": "sparseft.methods.paca:PacaConfig",
    "losia": "sparseft.methods.losia:LosiaConfig",
    "lora": "sparseft.methods.lora:LoraConfig",
    "dora": "sparseft.methods.lora:DoraConfig",
    "full": "sparseft.methods.full:FullConfig",
}


def get_method(name: str) -> type[MethodConfig]:
    """The method of that name, the class of its settings; an unknown one is a `UserError` with the nearest."""
    if name not in METHODS:
        from sparseft.errors import UserError, nearest

        raise UserError(f"Unknown method '{name}'.{nearest(name, METHODS)}")
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def sparse_methods() -> str:
    """The methods that train a selection, for messages: "s2ft, sylva, paca or losia"."""
    *first, last = (name for name in METHODS if get_method(name).sparse)
    return f"{', '.join(first)} or {last}"


def checked(config: Any) -> MethodConfig:
    """A method's settings, validated; anything else is a `TypeError`."""
    from sparseft.methods.base import MethodConfig

    if not isinstance(config, MethodConfig):
        known = ", ".join(entry.partition(":")[2] for entry in METHODS.values())
        raise TypeError(f"expected a method's config ({known}), got {type(config).__name__}")
    config.validate()
    return config

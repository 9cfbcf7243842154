"""The formats of `sparseft export`, each in a file of its own."""

from __future__ import annotations

import importlib

from sparseft.errors import UserError, nearest
from sparseft.export.formats.base import Format

FORMATS = {
    "peft-lora": "sparseft.export.formats.peft_lora:PeftLora",
    "peft-shira": "sparseft.export.formats.peft_shira:PeftShira",
    "merged": "sparseft.export.formats.merged:Merged",
    "packed": "sparseft.export.formats.packed:Packed",
    "patch": "sparseft.export.formats.patch:PatchFormat",
    "gguf-lora": "sparseft.export.formats.gguf_lora:GgufLora",
    "mlx": "sparseft.export.formats.mlx:Mlx",
}


def format_of(name: str) -> Format:
    """The format of that name; an unknown one is a `UserError`."""
    if name not in FORMATS:
        raise UserError(f"--format {name}: no such format.{nearest(name, FORMATS)}")
    module, _, attribute = FORMATS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)()

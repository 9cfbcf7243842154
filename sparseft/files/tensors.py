"""Reading and writing the folders of tensors that sparseft leaves: safetensors and JSON only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparseft.errors import UserError, shown

if TYPE_CHECKING:
    from torch import Tensor

# What such a folder is known by. A whole model has another description than an adapter: transformers would take a
# folder with an adapter_config.json for a peft adapter.
ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"
WHOLE_CONFIG = "sparseft_config.json"
ADAPTER_FORMAT = 1  # version of a sparse adapter's folder
SELECTION_CONFIG, SELECTION_TENSORS = "selection.json", "selection.safetensors"
DESCRIPTIONS = (ADAPTER_CONFIG, WHOLE_CONFIG, SELECTION_CONFIG)

KINDS = ("rows", "columns", "blocks")

MAX_NAME = 1000  # characters of a tensor's name: the longest that models have are a tenth of it


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a missing or damaged one is a `UserError` naming it."""
    return read_described(path, what)[0]


def read_described(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `read_tensors`, with the texts in the file's header."""
    from safetensors import SafetensorError, safe_open

    if path.exists() and not path.is_file():  # a device or a pipe may never end
        raise UserError(f"{path}: not a regular file, so this is no {what} folder.")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, so this is no {what} folder.") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = shown(str(error).partition("\n")[0], 300)  # safetensors may quote a whole broken header
        raise UserError(f"{path}: truncated or damaged ({reason}).") from error


def split_name(name: str, source: Path) -> tuple[str, str, str]:
    """`<module>.rows.delta` -> (module, rows, delta)."""
    parts = name.rsplit(".", 2)
    if len(name) > MAX_NAME:
        raise UserError(f"{source}: a tensor's name of {len(name):,} characters: no module's is so long.")
    if len(parts) != 3 or parts[1] not in KINDS:
        expected = f"<module>.<{'|'.join(KINDS)}>.<index|delta>"
        raise UserError(f"{source}: unexpected tensor '{shown(name)}': expected {expected}.")
    return parts[0], parts[1], parts[2]

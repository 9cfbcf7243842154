"""Reading and writing the folders of tensors that sparseft leaves: safetensors and JSON only."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseft.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("rows", "columns", "blocks")
DESCRIPTIONS = ("adapter_config.json", "sparseft_config.json", "selection.json")  # what every folder of ours holds


def umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


class replaced_folder:
    """`with replaced_folder(path) as aside:` fills a new folder that takes the place of `path` at the end, or never."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.abspath(path))

    def __enter__(self) -> Path:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: expected a folder to write, this is a file.")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.aside = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}.") from error
        self.aside.chmod(0o755)
        return self.aside

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            shutil.rmtree(self.aside, ignore_errors=True)
            return
        for file in self.aside.iterdir():  # safetensors writes for the owner alone, whatever the umask
            if file.is_file():
                file.chmod(0o666 & ~umask())
        if self.path.exists():
            self._check_ours()
            old = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.old.", dir=self.path.parent))
            self.path.rename(old / "old")
            self.aside.rename(self.path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            self.aside.rename(self.path)

    def _check_ours(self) -> None:
        """Replaces what such a folder held before, never a folder of the user's other files."""
        there = list(self.path.iterdir())
        ours = any(entry.name in DESCRIPTIONS for entry in there) and not any(entry.is_dir() for entry in there)
        if there and not ours:
            shutil.rmtree(self.aside, ignore_errors=True)
            raise UserError(f"{self.path}: the folder holds other files, which would be lost: name a new one.")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """One JSON object from a file; anything else is a `UserError` naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, so this is no {what} folder.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}.")
    return content


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a missing or damaged one is a `UserError` naming it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, so this is no {what} folder.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: truncated or damaged ({error}).") from error


def split_name(name: str, source: Path) -> tuple[str, str, str]:
    """`<module>.rows.delta` -> (module, rows, delta)."""
    parts = name.rsplit(".", 2)
    if len(parts) != 3 or parts[1] not in KINDS:
        raise UserError(f"{source}: unexpected tensor '{name}': expected <module>.<{'|'.join(KINDS)}>.<index|delta>.")
    return parts[0], parts[1], parts[2]

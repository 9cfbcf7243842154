"""How files and folders are written: aside, then renamed, so that they are whole or not there."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sparseft.errors import UserError


def write_text(path: str | Path, text: str) -> Path:
    """Writes `text` (UTF-8) aside in the same folder, syncs it and renames it to `path`: all of it or nothing."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with open(aside, "x", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return path


def write_json(path: str | Path, content: Any) -> Path:
    """Writes `content` as strict, indented JSON (NaN and infinities become null), as `write_text` does."""
    return write_text(path, dumps(content, indent=2) + "\n")


def dumps(content: Any, indent: int | None = None) -> str:
    """Strict JSON that any UTF-8 file can hold: half a surrogate pair (an argument that was no text) stays escaped."""
    text = json.dumps(_strict(content), indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _strict(value: Any) -> Any:
    """`value` with what JSON lacks replaced: NaN and infinities by null, paths by strings, 0-d arrays by numbers."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float):  # numpy's float64 too
        return float(value) if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a scalar of numpy or torch
        return _strict(value.item())
    return value


# A whole model's: transformers takes a folder with an adapter_config.json for a peft adapter.
WHOLE_CONFIG = "sparseft_config.json"

DESCRIPTIONS = ("adapter_config.json", WHOLE_CONFIG, "selection.json")  # what every folder of ours holds


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

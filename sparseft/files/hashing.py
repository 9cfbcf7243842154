"""Hashes of files and descriptions, and a whole model's, by which damage and edits are seen."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sparseft.errors import UserError, shown
from sparseft.files.atomic import dumps
from sparseft.files.tensors import ADAPTER_TENSORS, WHOLE_CONFIG
from sparseft.files.untrusted import read_json_object

# A hash over those entries of a description that nothing else checks stands with the tensors. Not among them is
# `base_model`: a base may be moved, and its new name be written here.
BODY = "config_sha256"

HASHED = ("format_version", "method", "method_config", "modules", "files")


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def adapter_hash(folder: Path | None) -> str | None:
    """By what an adapter's values are known: the SHA-256 of its tensors; of a whole model that of its description,
    which has those of its files. None where there is neither."""
    if folder is None:
        return None
    if (folder / ADAPTER_TENSORS).is_file():
        return file_hash(folder / ADAPTER_TENSORS)
    known = read_json_object(folder / WHOLE_CONFIG).get(BODY) if (folder / WHOLE_CONFIG).is_file() else None
    return known if isinstance(known, str) else None


def describe_whole(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with the hashes of all files in a whole model's folder, and its own: what `check_whole` reads."""
    described = {**content, "files": {path.name: file_hash(path) for path in sorted(folder.iterdir())}}
    return described | {BODY: body_hash(described, HASHED)}


def check_whole(folder: Path) -> None:
    """Raises `UserError` where a whole model that sparseft wrote is not, file by file, what was written.

    A folder without sparseft's description is anybody's model and passes. Files that say nothing of the weights may
    come later: full fine-tuning leaves its tokenizer there.
    """
    if not os.path.lexists(folder / WHOLE_CONFIG):
        return
    content = read_json_object(folder / WHOLE_CONFIG, "model")
    files = content.get("files")
    if not isinstance(files, dict) or body_hash(content, HASHED) != content.get(BODY):
        raise UserError(f"{folder}: {WHOLE_CONFIG} is not what was written with the model (altered).")
    for path in folder.iterdir():
        if path.name not in files and path.name.endswith((".safetensors", ".bin", ".index.json")):
            raise UserError(f"{folder}: '{shown(path.name)}' is not in {WHOLE_CONFIG}, but would be read as weights.")
    for name, known in files.items():
        path = folder / name
        if path.parent != folder or not os.path.isfile(path):  # whatever the name is
            raise UserError(f"{folder}: '{shown(name)}' of {WHOLE_CONFIG} is missing.")
        if file_hash(path) != known:
            raise UserError(f"{folder}: '{shown(name)}' is not the file that was saved (altered or truncated).")


def body_hash(content: Mapping[str, Any], keys: Collection[str] | None = None) -> str:
    """A hash over a description (of `keys` alone, where given), whatever the order of its keys and its layout.

    It stands in the tensors' file, whose own hash or digest stands in the description: neither can be changed alone.
    """
    kept = {key: value for key, value in content.items() if keys is None or key in keys}
    as_read = json.loads(dumps(kept))  # tuples are lists there, numbers that are not finite null
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()

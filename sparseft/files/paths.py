"""Paths that are not there: whether one was meant, where it was looked for, and what is near."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sparseft.errors import nearest

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # owner/name
# Endings of files, compressed or not: no hub id ends so.
FILE_SUFFIXES = frozenset(
    ".json .jsonl .ndjson .txt .text .md .parquet .csv .tsv .arrow .gz .gzip .bz2 .xz .lzma .zst .zstd .lz4 .zip .tar "
    ".tgz .safetensors .gguf .bin .pt .pth".split()
)


def looks_local(path: str) -> bool:
    """Whether a path that is not there was meant as one all the same, and not as a hub id `owner/name`."""
    marked = path.startswith((".", "/", "~")) or path.endswith("/") or path.count("/") > 1 or "\\" in path
    return marked or Path(path).suffix.lower() in FILE_SUFFIXES or ("/" in path and Path(path).parent.is_dir())


def where_looked(path: str | Path) -> str:
    """` (looked in /home/me)` for a relative path, which may be right from another folder; empty for any other."""
    return "" if Path(path).expanduser().is_absolute() else f" (looked in {Path.cwd()})"


def nearest_path(path: str | Path) -> str:
    """` Did you mean 'train.jsonl'?` for a path that is not there: the nearest name in its folder, or, where that is
    missing, the path with the nearest to its first part that is missing. Empty where nothing is near."""
    there, rest = Path(path).expanduser(), []
    while not there.parent.is_dir() and there != there.parent:
        rest.append(there.name)
        there = there.parent
    try:
        names = [name for name in os.listdir(there.parent) if not rest or (there.parent / name).is_dir()]
    except OSError:
        return ""
    found = nearest(there.name, names)
    if not found.startswith(" Did you mean"):
        return ""
    if not rest:
        return found
    near = there.parent / found.removeprefix(" Did you mean '").removesuffix("'?")
    whole = near.joinpath(*reversed(rest))
    return f" Did you mean '{whole if whole.exists() else near}'?"

"""The licence of a base model, of what lies beside its weights: its card's metadata, else its LICENSE file."""

from __future__ import annotations

from pathlib import Path

from sparseft.config import BUNDLED
from sparseft.errors import HUB_ID
from sparseft.files.hub import cached_file
from sparseft.files.untrusted import parse_yaml, read_bytes

# The first words of licences' texts, as the hub names them.
TEXTS = {
    "Apache License Version 2.0": "apache-2.0",
    "MIT License": "mit",
    "LLAMA 2 COMMUNITY LICENSE": "llama2",
    "META LLAMA 3 COMMUNITY LICENSE": "llama3",
    "LLAMA 3.1 COMMUNITY LICENSE": "llama3.1",
    "LLAMA 3.2 COMMUNITY LICENSE": "llama3.2",
    "LLAMA 3.3 COMMUNITY LICENSE": "llama3.3",
}


def licence_in(base: str) -> str | None:
    """The hub's name of the licence of a base, a folder or an id whose files the hub's cache holds; None: not known."""
    if base.startswith(BUNDLED):
        return "apache-2.0"  # as the package it comes with
    card, text = (_file(base, name) for name in ("README.md", "LICENSE"))
    if card is not None:
        parts = card.split("---", 2)
        try:
            data = parse_yaml(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
        except ValueError:
            data = None
        if isinstance(data, dict) and isinstance(data.get("license"), str):
            return data["license"]
    head = " ".join((text or "")[:400].split()).lower()
    found = [name for words, name in TEXTS.items() if words.lower() in head]
    return found[0] if found else "other" if text else None


def _file(base: str, name: str) -> str | None:
    path: Path | None = Path(base).expanduser() / name
    if path is None or not path.is_file():
        path = cached_file(base, name) if HUB_ID.fullmatch(base) else None
    try:
        return None if path is None else read_bytes(path).decode("utf-8", "replace")
    except (OSError, ValueError):
        return None

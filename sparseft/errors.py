"""The two kinds of failure a user can meet, and what a message may add: the nearest name, the nearest path."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """The input was wrong: one sentence saying what, where and what was expected (exit code 2)."""


class RunError(RuntimeError):
    """The work failed while running: what happened and what is safe (exit code 1).

    last_checkpoint: the last good one's folder, None where there is none, left out where that is not known here.
    """

    def __init__(self, message: str, last_checkpoint: Any = ...) -> None:
        super().__init__(message)
        if last_checkpoint is not ...:
            self.last_checkpoint = last_checkpoint


class Diverged(RunError):
    """Training came to losses or weights that are no numbers, which a lower rate may not."""


class Interrupted(KeyboardInterrupt):
    """The user, or the system, has ended the work, which saved first where it trained: `last_checkpoint` as of
    `RunError`."""

    def __init__(self, name: str, last_checkpoint: Any = ...) -> None:
        super().__init__(name)
        if last_checkpoint is not ...:
            self.last_checkpoint = last_checkpoint


def note_checkpoint(error: BaseException, checkpoint: str | os.PathLike | None) -> None:
    """Lets an exception say where the last good checkpoint is (None: there is none), as its `last_checkpoint`."""
    error.last_checkpoint = checkpoint  # type: ignore[attr-defined]


def in_a_run(error: BaseException) -> bool:
    """Whether an exception knows of the last good checkpoint, be it that there is none: work had begun."""
    return hasattr(error, "last_checkpoint")


def checkpoint_of(error: BaseException) -> str | None:
    """The last good checkpoint, as far as the exception knows it."""
    checkpoint = getattr(error, "last_checkpoint", None)
    return None if checkpoint is None else str(checkpoint)


class LayoutWarning(UserWarning):
    """A part of the model cannot be laid out as asked for, and is trained as it is: the result is the same."""


def shown(value: object, limit: int = 80) -> str:
    """What a file says, as a message may repeat it: on one line, printable, of at most `limit` characters and `…`.

    Text stands without quotes. A file may hold a text of any length, with what a terminal would obey.
    """
    text = value if isinstance(value, str) else repr(value)
    kept = text if len(text) <= limit else f"{text[:limit]}…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in kept)


# What stands in a URL and lets others in: a name and a password before the host, and what follows `?`, which errors
# also quote without the host. A name alone ends at the last `@` before `/`, `?` or `#`; a password may hold any of
# these, as nobody escaped it, and ends at the last `@` before a space or the next URL. What reads as a host with a port
# is no name with a password, whatever comes later.
_HOST = r"(?:localhost|[\w-]+\.[\w.-]*|\[[\da-fA-F:.]*\])(?::\d{0,5})?(?:[/?#\s]|$)"
_PASSWORD = r"(?:[\w+.-]*://)?(?:(?![\w+.-]://)\S)*"  # what follows a name's colon begins no other URL
_LOGIN = re.compile(rf"(?<![\w+.-])([A-Za-z][\w+.-]*://)(?!{_HOST})(?:[^\s/?#:]*:{_PASSWORD}@|[^\s/?#]*@)")
_END = r"""(?=[.,;:)\]]*(?:[\s'"`<>]|$))"""
_QUERY = re.compile(rf"""(?<=\S)\?[\w.%\[\]-]+=[^\s'"`<>]*?{_END}|(\w://[^\s'"`<>?]*)\?[^\s'"`<>]*?{_END}""")


def without_secrets(text: str) -> str:
    """A text with its URLs less who logs in and what is asked for: both hold passwords and tokens."""
    return _QUERY.sub(r"\1", _LOGIN.sub(r"\1", text))


def reason_of(error: BaseException) -> str:
    """What an exception of a library says, on one line: its first line, with the next where that only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return shown(" ".join(lines[:2]) if lines[0].endswith(":") else lines[0], 300)


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the candidate nearest to `name`, or the list of them if none is near."""
    names = list(dict.fromkeys(str(candidate) for candidate in candidates))
    lowered = {candidate.lower().lstrip("-"): candidate for candidate in reversed(names)}  # the dashes of options
    close = difflib.get_close_matches(str(name).lower().lstrip("-"), list(lowered), n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{lowered[close[0]]}'?"
    return f" Available: {', '.join(sorted(names))}." if names else ""


# ---- paths that are not there: whether one was meant, where it was looked for, and what is near ----

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


def local_name(path: str) -> str:
    """What a path that is here is called in files that are read elsewhere, where `corpus/x` would be an id of the hub:
    `./corpus/x`."""
    return f"./{path}" if HUB_ID.fullmatch(path) and Path(path).suffix.lower() not in FILE_SUFFIXES else path


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

"""Tokens of a data set: made once, a chunk of records at a time, and kept in files that are mapped into memory.

A cache entry is `<cache_dir>/tokens/<key>/`: flat little-endian arrays and `tokens.json`, which says how long they are
and their checksums. The key is a hash over the file's content, the tokenizer, the format and all settings that decide
the tokens. An entry is written aside and renamed, so it is whole or not there; of two runs that make the same one, the
first to finish leaves it. An entry that does not match its checksums is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sparseft import __version__
from sparseft.data.encoding import generation_ends
from sparseft.data.tokenized import Facts, TokenizedDataset, Tokens
from sparseft.errors import UserError
from sparseft.files.atomic import asides, new_aside, publish, write_json
from sparseft.files.untrusted import read_json

LAYOUT = "7"  # changes with what the files hold or how tokens come about
ARRAYS = {
    "input_ids": "<i4",
    "labels": "<i4",
    "lengths": "<i8",  # tokens of each example
    "records": "<i8",  # the record of each example
    "questions": "<u8",  # hashes
    "question_records": "<i8",
}
DESCRIPTION = "tokens.json"
ABANDONED_SECONDS = 24 * 3600.0  # the age at which a killed run's partial files are deleted


class Damaged(Exception):
    """A cache entry does not match its description."""


def tokens_key(content: str, tokenizer: Any, settings: dict[str, Any]) -> str:
    """The name of a cache entry. `content` is a hash of the records, `settings` all else that decides the tokens."""
    parts = [LAYOUT, __version__, version("transformers"), version("tokenizers"), content, settings]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for part in tokenizer_content(tokenizer):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:20]


def tokenizer_content(tokenizer: Any) -> Iterator[bytes]:
    """All that a tokenizer's ids and rendered chats depend on."""
    yield type(tokenizer).__name__.encode()
    template = getattr(tokenizer, "chat_template", None)
    ends = [tokenizer.eos_token_id, sorted(generation_ends(tokenizer))]
    yield json.dumps([template, tokenizer.special_tokens_map, *ends], default=str).encode()
    if getattr(tokenizer, "is_fast", False):
        yield tokenizer.backend_tokenizer.to_str().encode()
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            yield file.read_bytes()


class Cache:
    """The folder of tokenised data sets below `cache_dir`."""

    def __init__(self, cache_dir: str | Path) -> None:
        self.cache_dir = cache_dir
        self.folder = Path(cache_dir).expanduser() / "tokens"

    def path(self, key: str) -> Path:
        """Where an entry lies or will lie."""
        return self.folder / key

    def load(self, key: str) -> Tokens | None:
        """The entry, mapped into memory; None where there is none. Damaged where it cannot be used."""
        path = self.path(key)
        return _load(path) if path.is_dir() else None

    @contextlib.contextmanager
    def making(self, key: str) -> Iterator[Writer]:
        """A writer whose files become the entry at the end, or nothing if it fails. UserError where the folder cannot
        be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clear_abandoned()
            aside = new_aside(self.path(key))
        except OSError as error:
            there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
            reason = f"{there} cannot be written ({error.strerror})" if there.is_dir() else f"{there} is no folder"
            raise UserError(f"cache_dir={self.cache_dir}: {reason}.") from error
        try:
            with Writer(aside) as writer:
                yield writer
            with _written(aside):
                _publish(aside, self.path(key))
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _clear_abandoned(self) -> None:
        for partial in asides(self.folder):
            with contextlib.suppress(FileNotFoundError):  # another process has finished it, or given it up
                newest = max(path.stat().st_mtime for path in (partial, *partial.glob("*")))
                if time.time() - newest > ABANDONED_SECONDS:
                    shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[None]:
    """What the file system refuses inside, a full disk mostly, is for the user to settle."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cache_dir: {folder.parent} cannot be written: {error.strerror}; make room, or name another cache_dir."
        ) from error


def _publish(aside: Path, path: Path) -> None:
    """Puts a finished entry in its place: another run's whole one stays, a damaged one goes."""
    with contextlib.suppress(Damaged):
        if path.exists():
            _load(path)
            return
    try:
        publish(aside, path, sync=False)  # no fsync: a file cut short by a power failure fails its checksum
    except OSError:
        if not path.is_dir():  # else another run has published the same content first
            raise


def _load(path: Path) -> Tokens:
    try:
        description = read_json(path / DESCRIPTION)
        facts = Facts(**description["facts"])
        arrays = {name: _map(path / f"{name}.bin", dtype, description[name]) for name, dtype in ARRAYS.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path}: {error}") from error
    offsets = np.concatenate([[0], np.cumsum(arrays["lengths"], dtype=np.int64)])
    if not offsets[-1] == len(arrays["input_ids"]) == len(arrays["labels"]):
        raise Damaged(f"{path}: the examples' lengths do not add up to the number of tokens")
    dataset = TokenizedDataset(arrays["input_ids"], arrays["labels"], offsets)
    return Tokens(dataset, arrays["records"], arrays["questions"], arrays["question_records"], facts)


def _map(path: Path, dtype: str, stated: dict[str, int]) -> np.ndarray:
    size = path.stat().st_size
    if size != stated["count"] * np.dtype(dtype).itemsize:
        raise Damaged(f"{path} has {size} bytes, not those of {stated['count']} items")
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            checksum = zlib.crc32(block, checksum)
    if checksum != stated["crc32"]:
        raise Damaged(f"{path} does not have its checksum")
    if not size:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))


class Writer:
    """Appends tokens, chunk by chunk, to one file an array, and describes them at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = Facts()

    def __enter__(self) -> Writer:
        self._files = {name: (self.folder / f"{name}.bin").open("wb") for name in ARRAYS}
        self._counts = dict.fromkeys(ARRAYS, 0)
        self._checksums = dict.fromkeys(ARRAYS, 0)
        return self

    def add(self, tokens: Tokens) -> None:
        """Appends a chunk."""
        self.facts.examples += tokens.facts.examples
        self.facts.dropped += tokens.facts.dropped
        self.facts.cut += tokens.facts.cut
        dataset = tokens.dataset
        arrays = {
            "input_ids": dataset.flat("input_ids"),
            "labels": dataset.flat("labels"),
            "lengths": dataset.lengths,
            "records": tokens.records,
            "questions": tokens.questions,
            "question_records": tokens.question_records,
        }
        for name, dtype in ARRAYS.items():
            values = np.ascontiguousarray(arrays[name], dtype)
            content = memoryview(values).cast("B") if len(values) else b""
            with _written(self.folder):
                self._files[name].write(content)
            self._counts[name] += len(values)
            self._checksums[name] = zlib.crc32(content, self._checksums[name])

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with _written(self.folder):
            for file in self._files.values():
                file.close()
            if kind is None:
                stated = {name: {"count": self._counts[name], "crc32": self._checksums[name]} for name in ARRAYS}
                content = {"layout": LAYOUT, "facts": asdict(self.facts), **stated}
                write_json(self.folder / DESCRIPTION, content)

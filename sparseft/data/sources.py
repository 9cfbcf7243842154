"""Where records come from: a JSON array, JSON lines, parquet or text file, or a data set of the Hugging Face hub.

Records stay plain dicts here; `formats.py` knows what their keys mean. Nothing read is ever executed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.config import BUNDLED, BUNDLED_ROOT, in_bundle
from sparseft.data import readers, unpacking
from sparseft.data.readers import Item
from sparseft.errors import HUB_ID, UserError, looks_local, nearest, nearest_path, where_looked
from sparseft.files.hashing import file_hash

_JSON_SUFFIXES = {".json", ".jsonl", ".ndjson"}
_TEXT_SUFFIXES = {".txt", ".text", ".md"}
_PARQUET_SUFFIXES = {".parquet"}
_DATA_SUFFIXES = _JSON_SUFFIXES | _TEXT_SUFFIXES | _PARQUET_SUFFIXES

CHUNK_BYTES = 2**22  # of records that are in memory together, about
CHUNK_RECORDS = 4096
HUB_RECORDS = 256  # read at once


@dataclass
class Records:
    """Some consecutive records in file order, and where each one stands."""

    items: list[dict[str, Any]]
    source: str  # as the user named it
    unit: str = "record"  # what `numbers` counts: record | line
    numbers: list[int] = field(default_factory=list)  # 1-based, one a record
    plain_text: bool = False  # read from a text file: every record is {"text": document}
    start: int = 0  # records of the source before these

    def __len__(self) -> int:
        return len(self.items)

    def where(self, index: int) -> str:
        """`train.jsonl, line 7`, for messages."""
        return f"{self.source}, {self.unit} {self.numbers[index]}"


@dataclass
class Source:
    """A file or a hub set that can be read any number of times, never all of it at once."""

    name: str  # as the user named it
    unit: str  # record | line
    plain_text: bool
    items: Callable[[], Iterator[Item]]  # from the beginning, each time it is called
    content: Callable[[], str]  # a hash of all that `items` yields

    def chunks(self, count: int | None = None) -> Iterator[Records]:
        """The first `count` records (None: all), about `CHUNK_BYTES` at a time."""
        start, size = 0, 0
        chunk = self._records(0)
        for number, item, length in itertools.islice(self.items(), count):
            if not isinstance(item, dict):
                where = f"{self.name}, {self.unit} {number}"
                raise UserError(f"{where}: a record must be a JSON object with named fields, this is {kind(item)}.")
            chunk.items.append(item)
            chunk.numbers.append(number)
            size += length
            if size >= CHUNK_BYTES or len(chunk) >= CHUNK_RECORDS:
                yield chunk
                start += len(chunk)
                chunk, size = self._records(start), 0
        if len(chunk):
            yield chunk

    def _records(self, start: int) -> Records:
        return Records([], self.name, self.unit, [], self.plain_text, start)

    def first(self, count: int) -> Records:
        """The first `count` records."""
        return next(self.chunks(count), self._records(0))


def kind(value: Any) -> str:
    """What a value is, in the words of a JSON file: text, a number, a list, …"""
    words = {bool: "true or false", int: "a number", float: "a number", str: "text", dict: "an object"}
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return "a list"
    return words.get(type(value), f"a {type(value).__name__}")  # parquet has dates, decimals and bytes, too


def open_source(path: str, *, split: str | None = "train", key: str = "dataset.train_path") -> Source:
    """What `path` names: an existing file, a `bundled:` path, or else a hub id written `owner/name`.

    `split` is the split of a hub id; None takes its validation or test split (an evaluation set). `key` is the
    config's name for the path, used in messages. Raises UserError if nothing can be read there.
    """
    file = locate_file(path, key=key)
    source = open_hub(path, split, key=key) if file is None else open_file(file, name=path)
    if not len(source.first(1)):
        raise UserError(f"{source.name} holds no records; {key} needs at least one.")
    return source


def locate_file(path: str, *, key: str = "dataset.train_path") -> Path | None:
    """The file that `path` names, or None if it reads as a hub id. A missing file is a UserError."""
    if path.startswith(BUNDLED):
        return _bundled_file(path, key)
    file = Path(path).expanduser()
    if file.is_file():
        return file
    if file.is_dir():
        inside = sorted(str(file / entry.name) for entry in file.iterdir() if _suffix(entry) in _DATA_SUFFIXES)
        found = f" Files in it: {', '.join(inside)}." if inside else ""
        raise UserError(f"{key}: '{path}' is a folder; a JSON, JSON lines, parquet or text file was expected.{found}")
    if file.exists():
        raise UserError(f"{key}: '{path}' is no regular file; a data file is read more than once.")
    if HUB_ID.fullmatch(path) and not looks_local(path):
        return None
    raise UserError(f"{key}: there is no file '{path}'{where_looked(path)}.{_nearest_file(file)}")


def _bundled_file(path: str, key: str) -> Path:
    if (file := in_bundle(path)) is not None and file.is_file():
        return file
    data = BUNDLED_ROOT / "data"
    name = path.removeprefix(BUNDLED).removeprefix("data/")
    names = [file.relative_to(data).as_posix() for file in data.rglob("*") if _suffix(file) in _DATA_SUFFIXES]
    raise UserError(f"{key}: the package bundles no data file '{path}'.{nearest(name, names)}")


def _nearest_file(file: Path) -> str:
    """Names the nearest existing file in the folder of the missing `file`, or the folder that is missing itself."""
    folder = file.parent
    if not folder.is_dir():
        return f" Its folder '{folder}' does not exist either; a hub id is written owner/name.{nearest_path(file)}"
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    suggestion = nearest(file.name, names)
    if suggestion.startswith(" Did you mean"):
        return suggestion
    # Without a near name only the folder's data files are worth listing, and not thousands of them.
    return nearest(file.name, [name for name in names if _suffix(Path(name)) in _DATA_SUFFIXES][:20])


def open_file(file: Path, name: str | None = None) -> Source:
    """A data file, compressed or not; the kind follows the suffix, or the content where the suffix says nothing.

    JSON and text must be UTF-8 (a byte order mark and CRLF line ends are fine). `name` is how messages call the file.
    Raises UserError for a file that cannot be read or holds nothing; what does not parse is refused as it is read.
    """
    name = str(file) if name is None else name
    suffix = _suffix(file)
    try:
        is_parquet = unpacking.head(file, name).startswith(b"PAR1") or suffix in _PARQUET_SUFFIXES
        first = readers.first_character(file, name)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}.") from error
    if not first:
        raise UserError(f"{name} is empty; training examples were expected.")
    if is_parquet:
        unit, read = "record", readers.parquet
    elif suffix in _JSON_SUFFIXES or (suffix not in _TEXT_SUFFIXES and first in "{["):
        unit, read = ("record", readers.json_array) if first == "[" else ("line", readers.json_lines)
    elif suffix in {".csv", ".tsv"}:
        raise UserError(f"{name}: {suffix} files are not read; expected JSON, JSON lines, parquet or plain text.")
    else:
        unit, read = "line", readers.plain_text

    def content() -> str:  # files of the same bytes differ where their names say that they are read in different ways
        return f"{read.__name__} {file_hash(file)}"

    return Source(name, unit, read is readers.plain_text, functools.partial(_items, read, file, name), content)


def _items(read: Callable[[Path, str], Iterator[Item]], file: Path, name: str) -> Iterator[Item]:
    try:
        yield from read(file, name)
    except UserError:
        unpacking.check_whole(file, name)  # damage shows as broken content first, and in a checksum at the end only
        raise


def _suffix(file: Path) -> str:
    """The suffix that says how a file is to be read, in lower case: of `a.JSONL.gz` it is `.jsonl`."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in unpacking.SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def open_hub(name: str, split: str | None, *, key: str = "dataset.train_path") -> Source:
    """One split of the hub's data set `name` (from the cache when offline). Split None: validation, else test."""
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with console.working(f"loading {name} from the Hugging Face hub or its cache"):
            loaded = datasets.load_dataset(name)
    # DatasetNotFoundError and the connection errors are OSErrors; a missing configuration is a ValueError.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"'{name}' is no file here, and could not be loaded from the Hugging Face hub or its cache ({reason}). "
            f"Give a local file: {key}=FILE."
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    splits = [str(each) for each in loaded]
    if split is None:
        split = next((each for each in ("validation", "test") if each in splits), None)
        if split is None:
            raise UserError(
                f"The data set '{name}' has no validation or test split (it has: {', '.join(splits)}). "
                f"Give a local file: {key}=FILE."
            )
    elif split not in splits:
        raise UserError(f"The data set '{name}' has no split '{split}' (dataset.hub_split).{nearest(split, splits)}")
    chosen = loaded[split]  # an Arrow table, mapped into memory from the hub's cache

    def items() -> Iterator[Item]:
        for start in range(0, len(chosen), HUB_RECORDS):
            part = chosen.select(range(start, min(start + HUB_RECORDS, len(chosen))))
            share = part.data.nbytes // max(1, len(part))
            for number, item in enumerate(part.to_list(), start=start + 1):
                yield number, item, share

    return Source(f"{name} ({split})", "record", False, items, lambda: str(chosen._fingerprint))

"""Records, plain dicts, and what they are read from, a bounded number of bytes at a time.

`formats.py` knows what their keys mean, `files.py` and `hub_sets.py` where they come from. Nothing read is ever
executed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseft.data.readers import Item
from sparseft.data.sampling import seeded_first
from sparseft.errors import UserError

CHUNK_BYTES = 2**22  # of records that are in memory together, about
CHUNK_RECORDS = 4096
BUFFER = 4096  # records that a stream is shuffled in
LARGE = 2**14  # bytes; a larger record waits for its turn in a file, not in memory


@dataclass
class Records:
    """Some consecutive records in file order, and where each one stands."""

    items: list[dict[str, Any]]
    source: str  # as the user named it
    unit: str = "record"  # what `numbers` counts: record | line
    numbers: list[int] = field(default_factory=list)  # 1-based, one a record
    plain_text: bool = False  # read from a text file: every record is {"text": document}
    start: int = 0  # records of the source before these
    places: list[str] = field(default_factory=list)  # where each one stands, in the place of `source` and `numbers`
    sizes: list[int] = field(
        default_factory=list
    )  # about how many bytes of memory each one takes, as read from a source

    def __len__(self) -> int:
        return len(self.items)

    def where(self, index: int) -> str:
        """`train.jsonl, line 7`, for messages."""
        return self.places[index] if self.places else f"{self.source}, {self.unit} {self.numbers[index]}"


@dataclass
class Source:
    """A file or a hub set that can be read any number of times, never all of it at once."""

    name: str  # as the user named it
    unit: str  # record | line
    plain_text: bool
    items: Callable[[], Iterator[Item]]  # from the beginning, each time it is called
    content: Callable[[], str]  # a hash of all that `items` yields
    files: tuple[Path, ...] = ()  # that it is read from, where these lie here

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
            chunk.sizes.append(length)
            size += length
            if size >= CHUNK_BYTES or len(chunk) >= CHUNK_RECORDS:
                yield chunk
                start += len(chunk)
                chunk, size = self._records(start), 0
        if len(chunk):
            yield chunk

    def _records(self, start: int) -> Records:
        return Records([], self.name, self.unit, plain_text=self.plain_text, start=start)

    def first(self, count: int) -> Records:
        """The first `count` records."""
        return next(self.chunks(count), self._records(0))


class Several(Source):
    """Files that are read as one, one after another."""

    def __init__(self, name: str, parts: Sequence[Source]) -> None:
        def content() -> str:
            return hashlib.sha256("\n".join(part.content() for part in parts).encode()).hexdigest()

        files = tuple(file for part in parts for file in part.files)
        super().__init__(name, parts[0].unit, parts[0].plain_text, lambda: iter(()), content, files)
        self.parts = parts

    def chunks(self, count: int | None = None) -> Iterator[Records]:
        """As of one file; a chunk is of one file, which it names."""
        start = 0
        for part in self.parts:
            left = None if count is None else count - start
            if left == 0:
                return
            for chunk in part.chunks(left):
                chunk.start = start
                start += len(chunk)
                yield chunk


class Streamed(Source):
    """Records of a source in an order that `seed` makes within a moving window of `BUFFER` records."""

    def __init__(self, source: Source, seed: int) -> None:
        super().__init__(
            source.name, source.unit, source.plain_text, lambda: iter(()),
            lambda: f"{source.content()} shuffled {seed} {BUFFER}", source.files,
        )  # fmt: skip
        self.source, self.seed = source, seed

    def first(self, count: int) -> Records:
        """The first `count` of the source's own order, for which no more than these are read."""
        return self.source.first(count)

    def chunks(self, count: int | None = None) -> Iterator[Records]:
        """The first `count` records of that order; of the source only `BUFFER` records more than these are read. What
        waits takes at most `BUFFER` times `LARGE` bytes of memory."""
        chunks = self.source.chunks(None if count is None else count + BUFFER)
        there = ((chunk.where(at), item, chunk.sizes[at]) for chunk in chunks for at, item in enumerate(chunk.items))
        with _putting_aside() as aside:
            waiting = ((place, aside(item) if size > LARGE else item, size) for place, item, size in there)
            chunk, start, held = self._records(0), 0, 0
            for place, item, size in itertools.islice(_shuffled(waiting, self.seed), count):
                chunk.places.append(place)
                chunk.items.append(_taken_back(item) if isinstance(item, Path) else item)
                held += size
                if held >= CHUNK_BYTES or len(chunk) >= CHUNK_RECORDS:
                    yield chunk
                    start += len(chunk)
                    chunk, held = self._records(start), 0
            if len(chunk):
                yield chunk


@contextlib.contextmanager
def _putting_aside() -> Iterator[Callable[[dict[str, Any]], Path]]:
    """A function that writes a record to a file, in a folder that is made for the first one and goes at the end.
    UserError where it cannot be written."""
    with contextlib.ExitStack() as stack:
        numbers = itertools.count()

        @functools.cache
        def folder() -> Path:
            return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sparseft-stream-")))

        def aside(item: dict[str, Any]) -> Path:
            try:
                file = folder() / str(next(numbers))
                file.write_bytes(pickle.dumps(item))
            except OSError as error:
                raise UserError(
                    "dataset.streaming: large records wait in files, which cannot be written to "
                    f"{tempfile.tempdir or 'a temporary folder'}: {error.strerror}; make room, or name another folder "
                    "in TMPDIR."
                ) from error
            return file

        yield aside


def _taken_back(file: Path) -> dict[str, Any]:
    # Pickled, as a record may hold dates and bytes; by this process, in a folder that is open to its user alone.
    content = file.read_bytes()
    file.unlink()
    return pickle.loads(content)


def _shuffled(items: Iterable[Any], seed: int) -> Iterator[Any]:
    """All of `items`, each drawn by hash from the `BUFFER` that wait: the same in all versions of Python."""
    buffer: list[Any] = []
    for number, item in enumerate(items):
        if len(buffer) < BUFFER:
            buffer.append(item)
            continue
        digest = hashlib.blake2b(f"stream:{seed}:{number}".encode(), digest_size=8).digest()
        place = int.from_bytes(digest, "little") % BUFFER
        yield buffer[place]
        buffer[place] = item
    yield from (buffer[place] for place in seeded_first(len(buffer), len(buffer), seed, "stream"))


def kind(value: Any) -> str:
    """What a value is, in the words of a JSON file: text, a number, a list, …"""
    words = {bool: "true or false", int: "a number", float: "a number", str: "text", dict: "an object"}
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return "a list"
    return words.get(type(value), f"a {type(value).__name__}")  # parquet has dates, decimals and bytes, too

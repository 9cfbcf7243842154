"""By what the content of data files is known: of several processes on a machine the first one reads them for that, the
others take its results."""

from __future__ import annotations

from pathlib import Path

from sparseft.distributed import env
from sparseft.files.hashing import file_hash

Stamp = tuple[str, int, int, int]

KNOWN: dict[Stamp, str] = {}  # what the machine's first process has hashed; `ranks.main_first` tells the others


def content_hash(file: Path) -> str:
    """SHA-256 of a file; in a machine's other processes as the first one had it, where by its size and its time it is
    still the same file."""
    stat = file.stat()
    stamp = str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino
    if env.local_rank() != 0:
        return KNOWN.get(stamp) or file_hash(file)
    KNOWN[stamp] = file_hash(file)  # each time: it may be written while it is read
    return KNOWN[stamp]

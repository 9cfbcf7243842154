"""Files as the bytes they hold: compressed ones are unpacked as they are read, a bounded number of bytes at a time.

How a file is compressed is told by its first bytes, never by its name: a file called `.gz` may hold plain text.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import IO, Any

from sparseft.errors import UserError, reason_of

BLOCK = 2**16  # bytes read at once: larger strings that come and go leave holes in the heap
HEAD = 512  # bytes that tell what a file is
# What a file may unfold to: so many bytes, or so many times its size. Some hundred bytes can say that one of them is
# repeated a billion times.
FREE, RATIO = 2**28, 200

SUFFIXES = {".gz", ".gzip", ".bz2", ".xz", ".lzma", ".zst", ".zstd", ".lz4"}

_STARTS = {
    b"\x1f\x8b\x08": "gzip",
    **{b"BZh%d1AY&SY" % level: "bzip2" for level in range(1, 10)},
    **{b"BZh%d\x17rE8P\x90" % level: "bzip2" for level in range(1, 10)},  # of nothing
    b"\xfd7zXZ\0": "xz",
    b"]\0\0": "xz",  # .lzma
    b"\x28\xb5\x2f\xfd": "zstd",
    **{bytes([0x50 + number]) + b"\x2a\x4d\x18": "zstd" for number in range(16)},  # a frame to skip comes first
    b"\x04\x22\x4d\x18": "lz4",
}
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a rar archive",
    b"\x1f\x9d": "packed by compress (.Z)",
}


def packing(start: bytes) -> str | None:
    """What a file that begins so is compressed with: gzip | bzip2 | xz | zstd | lz4; None: it is not."""
    return next((name for magic, name in _STARTS.items() if start.startswith(magic)), None)


def head(file: Path, source: str) -> bytes:
    """The first bytes of what a file holds. UserError for an archive, or what is compressed twice."""
    with file.open("rb") as content:
        start = content.read(HEAD)
    packed = packing(start)
    if packed is not None:
        with unpacked(file, source) as content:
            start = content.read(HEAD)
    within = f", compressed with {packed}" if packed else ""
    archive = next((name for magic, name in _ARCHIVES.items() if start.startswith(magic)), None)
    if start[257:262] == b"ustar":
        archive = "a tar archive"
    if archive is not None:
        raise UserError(f"{source} is {archive}{within}; unpack it, and give the data file that it holds.")
    if packed and (inner := packing(start)):
        raise UserError(f"{source} is compressed twice, with {inner} and then with {packed}; unpack it once.")
    if packed and start.startswith(b"PAR1"):
        raise UserError(
            f"{source} is a parquet file{within}; parquet compresses by itself: unpack it, and give the .parquet file."
        )
    return start


def unpacked(file: Path, source: str) -> IO[bytes]:
    """What a file holds, opened for reading.

    Raises UserError, here or as it is read, naming `source`: a compressed file that is damaged or cut off, or that
    unfolds beyond measure.
    """
    with file.open("rb") as content:
        packed = packing(content.read(HEAD))
    if packed is None:
        return file.open("rb")
    return io.BufferedReader(_Unpacking(file, source, packed), BLOCK)


def check_whole(file: Path, source: str) -> None:
    """Unpacks a compressed file to its end, where the checksums stand: UserError as from `unpacked`."""
    with file.open("rb") as content:
        packed = packing(content.read(HEAD))
    if packed is not None:
        with unpacked(file, source) as content:
            while content.read(BLOCK):
                pass


class _Unpacking(io.RawIOBase):
    """The content of a compressed file."""

    def __init__(self, file: Path, source: str, packed: str) -> None:
        self._source, self._packed = source, packed
        self._size, self._done = file.stat().st_size, 0
        self._inner: Any = _opened(file, packed)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            block = self._inner.read(len(buffer))
        except EOFError as error:
            raise UserError(f"{self._source} is cut off: its {self._packed} data end too early.") from error
        # OSError: of bz2, gzip and pyarrow alike; MemoryError: of xz data that ask for a dictionary beyond all bounds.
        except (OSError, ValueError, zlib.error, lzma.LZMAError, MemoryError) as error:
            if "truncated" in str(error).lower():
                raise UserError(f"{self._source} is cut off: its {self._packed} data end too early.") from error
            raise UserError(
                f"{self._source} is damaged: its {self._packed} data cannot be unpacked ({reason_of(error)})."
            ) from error
        self._done += len(block)
        if self._done > max(FREE, RATIO * self._size):
            raise UserError(
                f"{self._source}: its {self._size:,} bytes unfold to more than {self._done:,}; unpack it yourself if "
                "that is meant."
            )
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()


def _opened(file: Path, packed: str) -> Any:
    if packed == "gzip":
        return gzip.open(file)
    if packed == "bzip2":
        return bz2.open(file)
    if packed == "xz":
        return lzma.open(file)
    import pyarrow  # reads what Python's own library cannot

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), packed)

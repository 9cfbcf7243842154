"""Files that hold records: what a path names here, and how each kind of file is read."""

from __future__ import annotations

import functools
import glob
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sparseft.config import BUNDLED, BUNDLED_ROOT, in_bundle
from sparseft.data import readers, tables, unpacking
from sparseft.data.contents import content_hash
from sparseft.data.readers import Item
from sparseft.data.records import Several, Source
from sparseft.errors import HUB_ID, UserError, looks_local, nearest, nearest_path, where_looked

_JSON_SUFFIXES = {".json", ".jsonl", ".ndjson"}
_TEXT_SUFFIXES = {".txt", ".text", ".md"}
_PARQUET_SUFFIXES = {".parquet"}
_SEPARATED = {".csv": tables.comma_separated, ".tsv": tables.tab_separated}
_ARROW_SUFFIXES = {".arrow", ".feather"}
_DATA_SUFFIXES = _JSON_SUFFIXES | _TEXT_SUFFIXES | _PARQUET_SUFFIXES | set(_SEPARATED) | _ARROW_SUFFIXES
KINDS = "JSON, JSON lines, parquet, Arrow, CSV or plain text"


def locate_file(path: str, *, key: str = "dataset.train_path") -> Path | None:
    """The file that `path` names, or None if it reads as a hub id. A missing file is a UserError."""
    if path.startswith(BUNDLED):
        return _bundled_file(path, key)
    file = Path(path).expanduser()
    if file.is_file():
        return file
    if file.is_dir():
        inside = sorted(str(file / entry.name) for entry in file.iterdir() if suffix_of(entry) in _DATA_SUFFIXES)
        found = f" Files in it: {', '.join(inside)}." if inside else ""
        raise UserError(f"{key}: '{path}' is a folder; one file was expected ({KINDS}).{found}")
    if file.exists():
        raise UserError(f"{key}: '{path}' is no regular file; a data file is read more than once.")
    if HUB_ID.fullmatch(path) and not looks_local(path):
        return None
    raise UserError(f"{key}: there is no file '{path}'{where_looked(path)}.{_nearest_file(file)}")


def matching(path: str, *, key: str = "dataset.train_path") -> list[Path]:
    """The files that a pattern (`data/*.jsonl`, `data/**/*.parquet`) matches, by name. UserError where there are
    none."""
    found = [Path(name) for name in sorted(glob.glob(str(Path(path).expanduser()), recursive=True))]
    files = [file for file in found if file.is_file()]
    if not files:
        raise UserError(f"{key}: no file matches '{path}'{where_looked(path)}.")
    return files


def is_pattern(path: str) -> bool:
    """Whether a path is a pattern, and not the name of a file with such characters in it."""
    return glob.has_magic(path) and not path.startswith(BUNDLED) and not Path(path).expanduser().exists()


def _bundled_file(path: str, key: str) -> Path:
    if (file := in_bundle(path)) is not None and file.is_file():
        return file
    data = BUNDLED_ROOT / "data"
    name = path.removeprefix(BUNDLED).removeprefix("data/")
    names = [file.relative_to(data).as_posix() for file in data.rglob("*") if suffix_of(file) in _DATA_SUFFIXES]
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
    return nearest(file.name, [name for name in names if suffix_of(Path(name)) in _DATA_SUFFIXES][:20])


def is_read(file: Path) -> bool:
    """Whether a file's name says that it is one of those that `open_file` reads."""
    return suffix_of(file) in _DATA_SUFFIXES


def open_files(files: Sequence[Path], name: str) -> Source:
    """Files as one set that is called `name`; messages name the file."""
    return Several(name, [open_file(file) for file in files])


def open_file(file: Path, name: str | None = None) -> Source:
    """A file, read as its content and its name say. UserError for one that cannot be read or is empty."""
    name = name or str(file)
    suffix = suffix_of(file)
    try:
        start = unpacking.head(file, name)
        first = readers.first_character(file, name)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}.") from error
    if not first:
        raise UserError(f"{name} is empty; training examples were expected.")
    read: Callable[[Path, str], Iterator[Item]]
    if start.startswith(b"PAR1") or suffix in _PARQUET_SUFFIXES:
        unit, read = "record", tables.parquet
    elif start.startswith(b"ARROW1") or suffix in _ARROW_SUFFIXES:
        unit, read = "record", tables.arrow
    elif suffix in _SEPARATED:
        unit, read = "line", _SEPARATED[suffix]
    elif suffix in _JSON_SUFFIXES or (suffix not in _TEXT_SUFFIXES and first in "{["):
        unit, read = ("record", readers.json_array) if first == "[" else ("line", readers.json_lines)
    else:
        unit, read = "line", readers.plain_text

    def content() -> str:  # files of the same bytes differ where their names say that they are read in different ways
        return f"{read.__name__} {content_hash(file)}"

    is_text = read is readers.plain_text
    return Source(name, unit, is_text, functools.partial(_items, read, file, name), content, (file.resolve(),))


def _items(read: Callable[[Path, str], Iterator[Item]], file: Path, name: str) -> Iterator[Item]:
    try:
        yield from read(file, name)
    except UserError:
        unpacking.check_whole(file, name)  # damage shows as broken content first, and in a checksum at the end only
        raise


def suffix_of(file: Path) -> str:
    """The suffix that says how a file is to be read, in lower case: of `a.JSONL.gz` it is `.jsonl`."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in unpacking.SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""

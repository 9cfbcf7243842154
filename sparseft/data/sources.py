"""What a path of the configuration names: a file, a pattern, a folder, a bundled file, or a set of the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparseft.config import BUNDLED
from sparseft.data.files import is_pattern, locate_file, matching, open_file, open_files
from sparseft.data.hub_sets import BUILT, open_built, open_set
from sparseft.data.records import Source, Streamed
from sparseft.errors import UserError, local_name


@dataclass(frozen=True)
class Place:
    """Where data lie: in `files`, or in a folder or a set of the hub, of which `datasets` knows the parts."""

    files: tuple[Path, ...] = ()
    name: str = ""  # a folder, or a hub id
    subset: str | None = None
    split: str | None = None


def locate(path: str, *, key: str = "dataset.train_path") -> Place:
    """What `path` names: `FILE`, a pattern of files, `FOLDER[:SUBSET[:SPLIT]]` or `owner/name[:SUBSET[:SPLIT]]`.

    `key` is the config's name for the path, used in messages. UserError where there is nothing of that name and it is
    no hub id.
    """
    if is_pattern(path) and not _in_parts(path):
        return Place(tuple(matching(path, key=key)))
    place = Place(name=path) if Path(path).expanduser().is_dir() else _in_parts(path)
    if place is not None:
        return place
    file = locate_file(path, key=key)
    return Place(name=path) if file is None else Place((file,))


def _in_parts(path: str) -> Place | None:
    """`NAME:SUBSET`, `NAME:SUBSET:SPLIT` or `NAME::SPLIT` of a folder or a hub id; None where it is nothing of that
    kind."""
    name, *parts = path.split(":", 2)
    if not parts or path.startswith(BUNDLED) or Path(path).expanduser().exists():
        return None
    if not Path(name).expanduser().is_dir():
        try:
            if locate_file(name) is not None:
                return None
        except UserError:
            return None
    return Place((), name, parts[0] or None, (parts[1] or None) if len(parts) > 1 else None)


def open_source(
    path: str,
    *,
    split: str | None = "train",
    key: str = "dataset.train_path",
    streaming: bool = False,
    shuffle: int | None = None,
) -> Source:
    """What `path` names (`locate`), to be read.

    `split` is the split of a set that has some, where the path names none; None takes its validation or test split
    (an evaluation set). streaming: of a hub set no more is fetched than is read. shuffle: the seed of the order that
    records are read in; None: the set's own. Raises UserError if nothing can be read there.
    """
    place = locate(path, key=key)
    if not place.files:
        source = open_set(place.name, place.subset, place.split or split, key=key, streaming=streaming)
    elif all(file.suffix.lower() in BUILT for file in place.files):
        source = open_built(place.files, local_name(path), key=key)
    elif is_pattern(path):
        source = open_files(place.files, path)
    else:
        source = open_file(place.files[0], local_name(path))
    if not len(source.first(1)):
        raise UserError(f"{source.name} holds no records; {key} needs at least one.")
    return source if shuffle is None else Streamed(source, shuffle)

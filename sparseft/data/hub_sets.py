"""Sets that `datasets` knows: of the hub, in a folder of its layout, saved by `save_to_disk`, in WebDataset files.

`datasets` says which files a subset and a split have, and loads what is not here. Of a folder the files are read by our
own readers wherever these can read them.
"""

from __future__ import annotations

import contextlib
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.data.files import KINDS, is_read, open_files
from sparseft.data.readers import Item
from sparseft.data.records import Source
from sparseft.data.tables import without_nulls
from sparseft.errors import UserError, local_name, nearest, reason_of, shown

HUB_RECORDS = 256  # read at once
HELD_OUT = ("validation", "test")  # splits to evaluate on, the first that there is
BUILT = {".tar": "webdataset", ".xml": "xml", ".h5": "hdf5", ".hdf5": "hdf5"}  # files that `datasets` reads, and how


def open_set(
    name: str, subset: str | None, split: str | None, *, key: str = "dataset.train_path", streaming: bool = False
) -> Source:
    """One split of a folder or of the hub's data set `name` (from the cache when offline).

    split: of the set, also a part of one (`train[:10%]`); None: `validation`, else `test`. streaming: nothing is
    loaded but what is read.
    """
    folder = Path(name).expanduser()
    local = folder.is_dir()
    name = local_name(name) if local else name
    if local and any((folder / known).is_file() for known in ("state.json", "dataset_dict.json")):
        return _saved(folder, name, split, key)
    with _loading(name, key, local):
        import datasets

        builder = datasets.load_dataset_builder(str(folder) if local else name, subset)
    title = f"{name}:{subset}" if subset else name
    known = [str(each) for each in builder.config.data_files or {}]
    if local and split is None and known == ["train"]:  # a folder of files to evaluate on
        split = "train"
    if known:
        split = _chosen(title, split, known, key)
    if local and not (folder / "README.md").is_file():  # which may say what is data
        _warn_of_others(folder, title, [Path(file) for part in known for file in builder.config.data_files[part]])
    if local and split in known:
        files = [Path(file) for file in builder.config.data_files[split]]
        if all(is_read(file) for file in files):
            return open_files(files, f"{title} ({split})")
    return _built(builder, title, split, key, streaming, local)


def _warn_of_others(folder: Path, title: str, files: Sequence[Path]) -> None:
    """Of a folder `datasets` reads one kind of file: says which others there are that would be read alone."""
    taken = {file.resolve() for file in files}
    others = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
        and is_read(path)
        and path.resolve() not in taken
        and not path.name.startswith((".", "_"))
        and path.suffix not in (".md", ".txt")  # which people write beside data
    )
    if taken and others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        console.warn(
            f"{title}: of a folder one kind of file is read, here that of {files[0].name}; not read: "
            f"{', '.join(others[:3])}{more}. A pattern names others, as '{folder.name}/*{Path(others[0]).suffix}'."
        )


def open_built(files: Sequence[Path], name: str, *, key: str = "dataset.train_path") -> Source:
    """Files of a kind that `datasets` alone reads (`BUILT`), all of the first one's."""
    with _loading(name, key, True):
        import datasets

        builder = datasets.load_dataset_builder(
            BUILT[files[0].suffix.lower()], data_files=[str(file) for file in files]
        )
    source = _built(builder, name, "train", key, False, True)
    source.name, source.files = name, tuple(file.resolve() for file in files)
    first = source.first(1).items
    if first and "__key__" in first[0]:
        inside = ", ".join(key for key in first[0] if not key.startswith("__"))
        raise UserError(
            f"{name} is a tar archive; those of WebDataset are read, with a .json or .txt file for each record (here: "
            f"{shown(inside)}): unpack it, and give the data file that it holds."
        )
    return source


def _built(builder: Any, title: str, split: str | None, key: str, streaming: bool, local: bool) -> Source:
    """A split, as the builder makes it."""
    if streaming:
        known = [str(each) for each in builder.info.splits or {}]
        split = _chosen(title, split, known, key) if known else split or HELD_OUT[0]
        if "[" in split:
            raise UserError(
                f"{title}: a stream has no parts of splits ({split}): name a whole one; of what is trained on "
                "dataset.max_examples takes the first."
            )
        with _loading(title, key, local):
            stream = builder.as_streaming_dataset(split)

        def passing() -> Iterator[Item]:
            for number, item in enumerate(stream, start=1):
                yield number, _record(item), sum(len(str(value)) for value in item.values())

        content = f"{builder.name} {builder.config_id} {builder.hash} {split}"
        return Source(f"{title} ({split})", "record", False, passing, lambda: content)
    with _loading(title, key, local):
        builder.download_and_prepare()
    split = _chosen(title, split, [str(each) for each in builder.info.splits or {}], key)
    with _loading(title, key, local):
        table = builder.as_dataset(split)
    return _table(table, f"{title} ({split})")


def _saved(folder: Path, name: str, split: str | None, key: str) -> Source:
    """A split of what `save_to_disk` has written."""
    with _loading(name, key, True):
        import datasets

        found = datasets.load_from_disk(str(folder))
    if not isinstance(found, dict):  # a set without splits
        return _table(found, name)
    chosen = _chosen(name, split, [str(each) for each in found], key)
    return _table(found[chosen], f"{name} ({chosen})")


def _table(table: Any, name: str) -> Source:
    """The rows of a `datasets.Dataset`: an Arrow table, mapped into memory."""

    def items() -> Iterator[Item]:
        for start in range(0, len(table), HUB_RECORDS):
            part = table.select(range(start, min(start + HUB_RECORDS, len(table))))
            share = part.data.nbytes // max(1, len(part))
            for number, item in enumerate(part.to_list(), start=start + 1):
                yield number, _record(item), share

    return Source(name, "record", False, items, lambda: str(table._fingerprint))


def _record(item: dict[str, Any]) -> dict[str, Any]:
    """A row as a record. Those of WebDataset have a field a file: the record's own is in that of JSON, else a text."""
    item = without_nulls(item)
    if "__key__" not in item:
        return item
    if isinstance(item.get("json"), dict):
        return item["json"]
    return {"text": item["txt"]} if isinstance(item.get("txt"), str) else item


def _chosen(title: str, split: str | None, splits: list[str], key: str) -> str:
    """The split that is meant. UserError where the set has none of that name."""
    if split is None:
        found = next((each for each in HELD_OUT if each in splits), None)
        if found is None:
            raise UserError(
                f"The data set '{title}' has no validation or test split (it has: {', '.join(splits)}). "
                f"Give a local file: {key}=FILE."
            )
        return found
    for part in split.split("+"):
        if (named := part.partition("[")[0].strip()) not in splits:
            raise UserError(
                f"The data set '{title}' has no split '{named}' (dataset.hub_split, or {title.partition(':')[0]}:"
                f"SUBSET:SPLIT).{nearest(named, splits)}"
            )
    return split


@contextlib.contextmanager
def _loading(name: str, key: str, local: bool) -> Iterator[None]:
    """Inside, what `datasets` says of a set that it cannot load becomes a UserError, and no bar is drawn."""
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with console.working(f"loading {name}" + ("" if local else " from the Hugging Face hub or its cache")):
            yield
    # DatasetNotFoundError and the connection errors are OSErrors; a missing configuration is a ValueError; ImportError:
    # of a package that a kind of file needs.
    except (OSError, ValueError, ImportError, tarfile.TarError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, UserError):
            raise
        subsets = re.findall(r"'([^']+)'", str(error).partition("vailable")[2])
        if subsets and ("Config name is missing" in str(error) or "not found" in str(error)):
            named = re.search(r"BuilderConfig '([^']*)'", str(error))
            said = f"has no subset '{named[1]}'" if named else "has several subsets"
            raise UserError(
                f"The data set '{name}' {said}: give one as {name.partition(':')[0]}:SUBSET."
                f"{nearest(named[1] if named else '', subsets)}"
            ) from error
        generated = isinstance(error, datasets.exceptions.DatasetGenerationError)  # whose cause says why not
        reason = reason_of(error.__cause__ if generated and error.__cause__ else error).rstrip(".")
        if local and "contain any data files" in reason:
            raise UserError(f"{key}: the folder '{name}' holds no data files: expected {KINDS}.") from error
        if local:
            raise UserError(f"{key}: '{name}' cannot be read ({reason}).") from error
        raise UserError(
            f"'{name}' is no file here, and could not be loaded from the Hugging Face hub or its cache ({reason}). "
            f"Give a local file: {key}=FILE."
        ) from error
    except RuntimeError as error:
        script = re.search(r"Dataset scripts are no longer supported, but found (\S+)", str(error))
        if script is None:
            raise
        if local:
            raise UserError(
                f"{key}: the script {script[1]} in the folder '{name}' is in the way, as datasets takes it for the "
                f"set's own: name the data files, as {key}='{name}/*.jsonl'."
            ) from error
        raise UserError(
            f"'{name}' is loaded by a script ({script[1]}), which datasets no longer runs: give another set, or its "
            f"data files ({key}=FILE)."
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bars()

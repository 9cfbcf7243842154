"""How files and folders are written: aside, then renamed, so that they are whole or not there. Nothing else renames.

What is aside lies beside the place that it is for, under a name that begins with `PARTIAL`. A crash may leave some.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.errors import RunError, UserError, checkpoint_of, in_a_run, note_checkpoint

PARTIAL = ".partial-"
_NOBODYS = (".DS_Store", "Thumbs.db", "desktop.ini")  # what file managers leave wherever somebody looks
TAKEN = (errno.ENOTEMPTY, errno.EEXIST)  # another process has put its own folder there meanwhile

# ---- JSON ----


def plain(value: Any, other: Callable[[Any], Any] = lambda value: value) -> Any:
    """`value` with what strict JSON lacks replaced: NaN and infinities by null, paths by text, arrays and scalars of
    numpy and torch, and tuples, by lists and numbers, keys by text. other: makes something of any other kind."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item, other) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, other) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist(), other)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value if isinstance(value, int) else other(value)


def dumps(content: Any, indent: int | None = None, *, ascii: bool = False) -> str:
    """Strict JSON that any UTF-8 file can hold (half a surrogate pair, of an argument that was no text, stays escaped),
    or with `ascii` any stream."""
    text = json.dumps(plain(content), indent=indent, ensure_ascii=ascii, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# ---- files ----


def write_text(path: str | Path, text: str | Iterable[str]) -> Path:
    """Writes text (UTF-8), whole or in parts, to `path`: all of it or nothing."""
    path = Path(path)
    with replaced_file(path) as aside, open(aside, "x", encoding="utf-8", newline="") as file:
        file.writelines([text] if isinstance(text, str) else text)
    return path


def write_json(path: str | Path, content: Any) -> Path:
    """Writes `content` as strict, indented JSON (`plain`), as `write_text` does."""
    return write_text(path, dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def replaced_file(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """`with replaced_file(path) as aside:` writes a file that takes the place of `path` at the end, or never.

    sync: hands it to the disk before; not needed where a file that is not whole is noticed when it is read.
    """
    aside = _aside(path)
    try:
        yield aside
        if sync:
            _sync(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def replace_link(path: Path, target: str) -> None:
    """Makes `path` a link to the folder `target`, in place of a former link."""
    aside = _aside(path)
    try:
        aside.symlink_to(target, target_is_directory=True)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def move(file: Path, folder: Path) -> None:
    """Moves a file that nobody reads yet into another folder, which may lie on another disk."""
    shutil.move(file, folder / file.name)


def asides(folder: Path, name: str | None = None) -> Iterator[Path]:
    """What lies aside in a folder, of other processes or left by a crash; with `name`, of what is called so."""
    return folder.glob(f"{PARTIAL}*" if name is None else f"{PARTIAL}{'?' * 8}-{glob.escape(name)}")


def name_leftovers(path: Path) -> None:
    """Warns of what was to become `path` and lies beside it, with its size: a killed process may have left a whole
    model, and nothing else shows it."""
    for aside in asides(path.parent, path.name):
        size = console.size(sum(file.lstat().st_size for file in aside.rglob("*") if not file.is_dir()))
        console.warn(
            f"'{aside}' ({size}) is what a killed process left: remove it, unless one is still writing '{path}'"
        )


def try_writing(folder: Path) -> None:
    """OSError where no file can be made in a folder: some file systems refuse what their modes allow."""
    with tempfile.TemporaryFile(dir=folder):
        pass


# ---- folders ----


def new_aside(path: Path) -> Path:
    """Makes an empty folder beside `path`, for `publish` to put there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    aside.mkdir()
    return aside


def publish(aside: Path, path: Path, *, sync: bool = True) -> None:
    """Renames a finished folder to `path`; one that was there goes only then, also one that another process puts there
    meanwhile. `sync` as for a file."""
    if sync:
        for entry in aside.rglob("*"):
            _sync(entry)
        _sync(aside)
    try:
        old = _exchange(aside, path)
    except OSError as error:
        if error.errno not in TAKEN:
            raise
        old = _exchange(aside, path)
    if sync:
        _sync(path.parent)
    if old is not None:
        _delete(old)


def _exchange(aside: Path, path: Path) -> Path | None:
    """Renames `aside` to `path`; returns where that lies which was there."""
    old = _aside(path) if os.path.lexists(path) else None
    if old is not None:
        with contextlib.suppress(FileNotFoundError):  # another process has taken it away meanwhile
            os.rename(path, old)
    try:
        os.rename(aside, path)
    except BaseException:
        if old is not None:
            try:
                os.rename(old, path)
            except OSError as error:
                if error.errno in TAKEN:
                    _delete(old)
        raise
    return old


def remove(folder: Path) -> None:
    """Deletes a folder, renamed before: half of it is never taken for it. OSError where it cannot be renamed."""
    old = _aside(folder)
    os.rename(folder, old)
    _delete(old)


def check_replaceable(path: Path, marks: Collection[str], owned: Collection[str] = ()) -> None:
    """Refuses a path, before the work, that `replaced_folder` would refuse after it, and one that could not be put
    aside, or not without taking the current folder away."""
    check_ours(path, marks, owned)
    if path.is_dir() and not path.is_symlink():
        place = path.resolve()
        mounted, inside = os.path.ismount(place), Path.cwd().is_relative_to(place)
        if mounted or inside:
            why = "a file system is mounted there" if mounted else "you are in it"
            raise UserError(f"{path}: cannot be replaced, as {why}: name a folder in it, such as {path / 'new'}.")


def check_ours(path: Path, marks: Collection[str], owned: Collection[str] = ()) -> None:
    """Refuses a file, and a folder that holds anything of the user's own: none of `marks`, or a file whose path in it
    no pattern of `owned` fits (`*` is never `/`). What file managers leave is nobody's."""
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: expected a folder to write, this is a file.")
        there = sorted(each for each in path.iterdir() if each.name not in _NOBODYS) if path.exists() else []
        patterns = (f"{PARTIAL}*", *marks, *owned) if any(entry.name in marks for entry in there) else ()
        for entry in there:
            inner = entry.rglob("*") if patterns and entry.is_dir() else ()
            for file in [each for each in inner if not each.is_dir()] or [entry]:
                name = file.relative_to(path).as_posix()
                if file.name not in _NOBODYS and not any(_fits(name, pattern) for pattern in patterns):
                    raise UserError(
                        f"{path}: the folder holds other files, which would be lost ('{name}'): name a new one, or "
                        "move them."
                    )
    except OSError as error:  # a name that is too long, say
        raise UserError(f"{path}: cannot be written: {error.strerror}.") from error


def _fits(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


@contextlib.contextmanager
def replaced_folder(path: str | Path, marks: Collection[str], owned: Collection[str] = ()) -> Iterator[Path]:
    """`with replaced_folder(path, marks) as aside:` fills a new folder that takes the place of `path` at the end, or
    never. What is replaced holds a file named in `marks`, and no other files than these and those that the patterns of
    `owned` fit: never a file of the user's own (`UserError`). Where one came there meanwhile, what was written stays
    aside, and the error says where."""
    path = Path(os.path.abspath(path))
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: expected a folder to write, this is a file.")
        if any(parent.name.startswith(PARTIAL) for parent in path.parents) and not path.exists():
            aside = path  # within what is itself aside
            aside.mkdir(parents=True)
        else:
            aside = new_aside(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}.") from error
    try:
        yield aside
        mask = os.umask(0o022)  # can only be read by setting it
        os.umask(mask)
        for file in aside.iterdir():  # safetensors writes for the owner alone
            if file.is_file():
                file.chmod(0o666 & ~mask)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if aside == path:
        return
    try:
        check_ours(path, marks, owned)
    except UserError as error:
        raise UserError(f"{error} What was written lies in {aside}.") from None
    try:
        publish(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _aside(path: Path) -> Path:
    return path.with_name(f"{PARTIAL}{secrets.token_hex(4)}-{path.name}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _delete(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


# ---- a full or read-only disk, in a sentence ----

# The reasons why a file cannot be written that lie with the disk, not with the code.
STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ENODEV}

NEVER_OF_READING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


WHOLE = "the file could not be written to its end (is the disk full?)"


def storage_problem(error: BaseException) -> str | None:
    """Why a file could not be written, where that is what `error` says; None for any other error."""
    from safetensors import SafetensorError

    if isinstance(error, UserError) and getattr(error.__cause__, "errno", None) in NEVER_OF_READING:
        error = error.__cause__  # reading refuses it as wrong input, but here the disk failed during the work
    if isinstance(error, OSError) and error.errno in STORAGE:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}"
    text = str(error).partition("\n")[0]
    short = isinstance(error, OSError) and error.errno is None and re.fullmatch(r"\d+ requested and \d+ written", text)
    if short:  # numpy's, of an array that did not fit
        return WHOLE
    if isinstance(error, SafetensorError) and "I/O error" in text:
        return text.partition("I/O error:")[2].strip() or text
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "inline_container" in text):
        return WHOLE
    return None


@contextlib.contextmanager
def explained(what: str, last_checkpoint: Callable[[], Any]) -> Iterator[None]:
    """Inside, what fails by the disk becomes a `RunError` that says so, and whatever ends the work knows the last good
    checkpoint (`last_checkpoint()`, its folder or None)."""
    try:
        yield
    except BaseException as error:
        problem = storage_problem(error)
        if problem is None:
            if not in_a_run(error):
                note_checkpoint(error, last_checkpoint())
            raise
        checkpoint = checkpoint_of(error) or last_checkpoint()
        raise RunError(f"{what} could not be written: {problem.rstrip('.')}.", checkpoint) from error

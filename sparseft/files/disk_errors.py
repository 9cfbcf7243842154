"""A full or read-only disk, in a sentence."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Any

from sparseft.errors import RunError, UserError

# The reasons why a file cannot be written that lie with the disk, not with the code.
STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ENODEV}

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}  # of these, what never comes of reading


def storage_problem(error: BaseException) -> str | None:
    """Why a file could not be written, where that is what `error` says; null for any other error."""
    from safetensors import SafetensorError

    if isinstance(error, UserError) and getattr(error.__cause__, "errno", None) in FULL:
        error = error.__cause__  # refused as input where it comes first, but the work has begun
    if isinstance(error, OSError) and error.errno in STORAGE:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}"
    text = str(error).partition("\n")[0]
    if isinstance(error, SafetensorError) and "I/O error" in text:
        return text.partition("I/O error:")[2].strip() or text
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "inline_container" in text):
        return "the file could not be written to its end (is the disk full?)"
    return None


@contextlib.contextmanager
def explained(what: str, last_checkpoint: Any) -> Iterator[None]:
    """Inside, what fails by the disk becomes a `RunError` that says so, and whatever ends the work knows the last good
    checkpoint (`last_checkpoint()`, its folder or null)."""
    try:
        yield
    except BaseException as error:
        problem = storage_problem(error)
        if problem is None:
            if not hasattr(error, "last_checkpoint"):
                error.last_checkpoint = last_checkpoint()  # type: ignore[attr-defined]
            raise
        checkpoint = getattr(error, "last_checkpoint", None) or last_checkpoint()
        raise RunError(f"{what} could not be written: {problem.rstrip('.')}.", checkpoint) from error

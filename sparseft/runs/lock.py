"""One job at a time writes in a run's folder, or in that of a benchmark of runs: by a lock that the system takes back
when its holder ends, however that ends. No torch here."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path

from sparseft.console import warn
from sparseft.errors import UserError, shown
from sparseft.runs.folder import LOCK

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_HELD: set[int] = set()  # descriptors of this process


class Lock:
    """`with Lock() as lock: lock.take(run)`: the run's folder is this job's to write until the end.

    Its file stays: who removed it could take it from under a job that has just opened it.
    """

    def __init__(self) -> None:
        self._handle: int | None = None

    def __enter__(self) -> Lock:
        return self

    def take(self, run: Path) -> None:
        """Takes the lock of a folder that is there, where this has none yet. UserError where another job has it;
        where the file system knows no locks, a warning."""
        if self._handle is not None:
            return
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "this system has no such locks")
            # Never through a link, whose target would be somebody else's; not emptied, as it says who has it.
            handle = os.open(run / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BaseException as error:
                holder = shown(os.read(handle, 200).decode(errors="replace").strip())
                os.close(handle)
                if isinstance(error, BlockingIOError):
                    raise UserError(
                        f"output_dir '{run}' is in use by {holder or 'another process'}: wait for it or end it."
                    ) from None
                raise
            _HELD.add(handle)
            self._handle = handle
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as error:
            if self._handle is None:
                warn(
                    f"output_dir '{run}' cannot be locked ({error.strerror}), so nothing keeps another job from "
                    "writing in it at the same time"
                )

    def __exit__(self, *exception: object) -> None:
        if self._handle in _HELD:  # else this is a fork of the process that has it
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, 0)  # a folder that is passed on names no host
            os.close(self._handle)
            _HELD.discard(self._handle)
        self._handle = None


def _let_go() -> None:
    """A fork, as of a data loader, shares the descriptor, and would keep the folder locked when this process is
    killed."""
    while _HELD:
        os.close(_HELD.pop())


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)

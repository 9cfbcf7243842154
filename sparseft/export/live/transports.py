"""What carries steps from a sender to one receiver: files in a folder that both see, or `torch.distributed`.

Both have a `device`, where a body has to lie; `open`, ahead of a sender's first message; `send` and `receive`, with a
timeout in seconds (RunError where none came in time, or one that is damaged); and `applied`, once the receiver needs a
message no more.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

from sparseft.errors import RunError, UserError, reason_of
from sparseft.export.live.messages import END, HEADER, Message, check_header, message_of
from sparseft.files.atomic import replaced_file

SUFFIX = ".step"
AHEAD = 2  # files that wait to be read, at most: the sender waits for the receiver then
PATIENCE = 0.02  # seconds between two looks into the folder, at most


class Folder:
    """A file for each step in a folder (of a memory disk, best), renamed when it is whole and removed once applied."""

    device = torch.device("cpu")

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def _waiting(self) -> list[Path]:
        return sorted(self.folder.glob(f"[0-9]*{SUFFIX}")) if self.folder.is_dir() else []

    def open(self) -> None:
        if self._waiting():
            raise UserError(f"{self.folder}: steps of another sender lie there: name a new folder, or empty it.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be made: {error.strerror}.") from error

    def send(self, message: Message, timeout: float) -> None:
        end = time.monotonic() + timeout
        while message.kind != END and len(waiting := self._waiting()) >= AHEAD:
            if time.monotonic() > end:
                raise RunError(
                    f"{self.folder}: nobody has read {waiting[0].name} for {timeout:g} s: is the receiver there?"
                )
            time.sleep(PATIENCE / 4)
        path = self.folder / f"{message.sequence:012d}{SUFFIX}"
        try:
            with replaced_file(path, sync=False) as aside, open(aside, "xb") as file:
                file.write(memoryview(message.header.numpy().view("uint8")))
                file.write(memoryview(message.body.numpy()))
        except OSError as error:  # a full disk, a folder that is gone
            raise RunError(f"{path} cannot be written: {error.strerror}. The step was not sent.") from error

    def receive(self, timeout: float) -> Message:
        end, pause = time.monotonic() + timeout, 0.0005
        while not (waiting := self._waiting()):
            if time.monotonic() > end:
                raise RunError(f"{self.folder}: no step came for {timeout:g} s: is the sender there?")
            time.sleep(pause)
            pause = min(2 * pause, PATIENCE)
        try:
            content = torch.from_numpy(numpy.fromfile(waiting[0], dtype="uint8"))
        except OSError as error:  # another receiver has taken it
            raise RunError(f"{waiting[0]} cannot be read: {error.strerror}.") from error
        size = 8 * HEADER
        if len(content) < size:
            raise RunError(f"{waiting[0]} is truncated. The weights are those of the step before.")
        return message_of(check_header(content[:size].view(torch.int64)), content[size:])

    def applied(self, message: Message) -> None:
        (self.folder / f"{message.sequence:012d}{SUFFIX}").unlink(missing_ok=True)


class PatchPeer:
    """The other process of a `torch.distributed` group: `PatchPeer(rank)`. With NCCL, steps go from device to device.

    rank: the peer's, in the world; group: None, the default one.
    """

    def __init__(self, rank: int, group: Any = None) -> None:
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            raise UserError("PatchPeer needs torch.distributed.init_process_group first.")
        self.rank, self.group = rank, group
        nccl = torch.distributed.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def open(self) -> None:
        pass

    def send(self, message: Message, timeout: float) -> None:
        with _reachable(self.rank):
            torch.distributed.send(message.header.to(self.device), self.rank, group=self.group)
            if message.body.numel():
                torch.distributed.send(message.body, self.rank, group=self.group)

    def receive(self, timeout: float) -> Message:
        header = torch.empty(HEADER, dtype=torch.int64, device=self.device)
        with _reachable(self.rank):
            torch.distributed.recv(header, self.rank, group=self.group)
            numbers = check_header(header)
            body = torch.empty(numbers[5], dtype=torch.uint8, device=self.device)
            if body.numel():
                torch.distributed.recv(body, self.rank, group=self.group)
        return message_of(numbers, body)

    def applied(self, message: Message) -> None:
        pass


@contextlib.contextmanager
def _reachable(rank: int) -> Iterator[None]:
    try:
        yield
    except RunError:
        raise
    except RuntimeError as error:  # whatever the backend raises where the other process is gone, or late
        raise RunError(
            f"the process of rank {rank} cannot be reached ({reason_of(error)}): it may have ended."
        ) from error

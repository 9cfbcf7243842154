"""Commands in processes that are killed: at a file operation, half-way through one, or after a time."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
PRELOADED = ["sparseft.training.trainer", "sparseft.commands.train", "sparseft.report.page", "peft", "jinja2",
             "matplotlib.backends.backend_svg", __name__]  # fmt: skip


@dataclass
class Ended:
    """How a command's process ended."""

    code: int  # exit code; -9: killed
    operations: int  # changes of files below the working directory that it began
    err: str


def run(words: list[str], cwd: Path, *, operation: int = 0, half: bool = False, seconds: float = 0.0) -> Ended:
    """`sparseft WORDS` in a process of its own in `cwd`, killed (SIGKILL) when it begins its `operation`-th change of a
    file (with `half`, if that writes tensors, when half of them are written), or after `seconds`; 0: never."""
    child = _process(words, cwd, operation, half, {})
    child.start()
    child.join(seconds or 300)
    if child.is_alive():
        child.kill()
        child.join()
    return _ended(child, cwd, 0)


def run_together(
    words: list[str], cwd: Path, ranks: int = 2, *, victim: int = 0, operation: int = 0, half: bool = False
) -> list[Ended]:
    """As `run`, in as many processes, started as torchrun starts them, of which the `victim` is killed. The others are
    stopped then, as a launcher does: by SIGTERM, and after some seconds by SIGKILL."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port,
              "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    children = []
    for rank in range(ranks):
        variables = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        children.append(_process(words, cwd, operation if rank == victim else 0, half, variables))
    for child in children:
        child.start()
    end = time.monotonic() + 900  # a busy machine may pause them for minutes
    while any(child.is_alive() for child in children) and time.monotonic() < end:
        time.sleep(0.05)
        if any(child.exitcode for child in children):
            end = min(end, time.monotonic() + 10)
            for child in children:
                child.terminate()
                child.join(5)
    for child in children:
        child.kill()
        child.join()
    return [_ended(child, cwd, rank) for rank, child in enumerate(children)]


def _process(words: list[str], cwd: Path, operation: int, half: bool, variables: dict[str, str]) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # imported once, not by each of a hundred processes
    return context.Process(target=_child, args=([str(word) for word in words], str(cwd), operation, half, variables))


def _ended(child: Any, cwd: Path, rank: int) -> Ended:
    log, count = cwd / f".killing.err-{rank}", cwd / f".killing.count-{rank}"
    operations = count.stat().st_size if count.exists() else 0
    err = log.read_text(errors="replace") if log.exists() else ""
    for path in (log, count):
        path.unlink(missing_ok=True)
    return Ended(child.exitcode or 0, operations, err)


def _child(words: list[str], cwd: str, operation: int, half: bool, variables: dict[str, str]) -> None:
    gc.freeze()  # what was preloaded: a collection would touch, and so copy, all of it
    os.chdir(cwd)
    os.environ.update(variables)
    rank = variables.get("RANK", "0")
    # Other files of the test's own are not counted; a byte is written for each operation, so that a kill loses none.
    count = os.open(f".killing.count-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    log = os.open(f".killing.err-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    done = 0

    def begin() -> bool:
        """Counts an operation; whether it is the fatal one."""
        nonlocal done
        done += 1
        os.write(count, b".")
        return done == operation

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            changes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            changes = event in CHANGES
        if changes and _inside(arguments[0], cwd) and begin():
            os.kill(os.getpid(), signal.SIGKILL)

    _break_off(begin, half)
    import sparseft.importance.calibration as resuming
    import sparseft.importance.scores as scores
    from sparseft.cli.app import main

    resuming.SAVE_SECONDS = resuming.SAVE_COST = 0.0  # calibration saves its state after each sample
    scores.TOKENS_TOGETHER = 1
    sys.addaudithook(hook)
    with contextlib.suppress(SystemExit):
        os._exit(main(words))


def _inside(path: Any, cwd: str) -> bool:
    if not isinstance(path, (str, bytes, os.PathLike)):
        return False
    return os.path.abspath(os.fsdecode(path)).startswith(cwd)


def _break_off(begin: Any, half: bool) -> None:
    """Counts the writers that Python's audit does not see, and lets the fatal one stop half-way."""
    import safetensors.torch
    import torch

    def wrapped(write: Any, place: int) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if not isinstance(args[place], (str, os.PathLike)):  # into memory, as objects that are sent to other ranks
                return write(*args, **options)
            fatal = begin()
            if fatal and not half:
                os.kill(os.getpid(), signal.SIGKILL)
            result = write(*args, **options)
            if fatal:
                os.truncate(args[place], os.path.getsize(args[place]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    safetensors.torch.save_file = wrapped(safetensors.torch.save_file, 1)
    torch.save = wrapped(torch.save, 1)

"""Runs a piece of work as the command line promises: exit codes instead of exceptions, nothing stray on stdout."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sparseft import signals
from sparseft.errors import RunError, UserError, checkpoint_of, in_a_run, shown
from sparseft.files.atomic import dumps

DONE = 0
FAILED = 1
WRONG_INPUT = 2
INTERRUPTED = 130

# Why a path that was given can be neither there nor made: too long, links in a circle, below a file, or not to enter.
OF_A_PATH = {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES}


@dataclass
class Outcome:
    """An exit code, with the result (code 0) or one line about what went wrong."""

    code: int
    result: Any = None
    message: str = ""


def execute(work: Callable[[], Any], debug: bool = False, guard_stdout: bool = True) -> Outcome:
    """Runs `work` and turns every exception into an exit code and one line.

    guard_stdout: what `work`, the libraries it calls and its child processes print to stdout goes to stderr.
    """
    if not debug:
        quiet_libraries()
    try:
        with signals.terminable(), stdout_to_stderr() if guard_stdout else contextlib.nullcontext():
            return Outcome(DONE, work())
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and not guard_stdout:  # the reader of our output went away
            discard_stdout()
            return Outcome(DONE)
        outcome = outcome_of(error)
        if debug and outcome.code in (FAILED, WRONG_INPUT):
            traceback.print_exception(error, file=sys.stderr)
        elif outcome.code == FAILED:
            outcome.message += " (--debug shows the traceback)"
        return outcome


def outcome_of(error: BaseException) -> Outcome:
    if isinstance(error, UserError):
        return Outcome(WRONG_INPUT, message=_one_line(str(error)))
    if isinstance(error, KeyboardInterrupt):
        return Outcome(INTERRUPTED, message="interrupted." + _last_checkpoint(error))
    if isinstance(error, SystemExit):
        if isinstance(error.code, int) and error.code:  # a launcher's child that has already said why
            return Outcome(error.code)
        return Outcome(FAILED, message=_one_line(str(error.code or "ended early, without a result")))
    if isinstance(error, OSError) and error.errno in OF_A_PATH and error.filename and not in_a_run(error):
        path = shown(os.fsdecode(error.filename))
        return Outcome(WRONG_INPUT, message=f"'{path}' cannot be used: {error.strerror}.")
    message = _one_line(str(error))
    if not isinstance(error, RunError):
        message = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return Outcome(FAILED, message=message + _last_checkpoint(error))


def quiet_libraries() -> None:
    """Silences what libraries say to their developers: users at the command line can do nothing about it."""
    if not sys.warnoptions:  # -W and PYTHONWARNINGS are the user's own word
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "Both num_training_steps and num_stable_steps")  # as the user wrote it
        warnings.filterwarnings("ignore", "Sparse invariant checks")  # torch's, of PEFT's SHiRA
    logging.getLogger("DeepSpeed").addFilter(_no_accelerator_line)  # kept when DeepSpeed sets the logger up
    logging.getLogger("accelerate.accelerator").addFilter(_no_accumulation_line)


def _no_accelerator_line(record: logging.LogRecord) -> bool:
    """Drops DeepSpeed's word on the accelerator it found, which it says when it is imported, used or not."""
    return "accelerator" not in record.getMessage()


def _no_accumulation_line(record: logging.LogRecord) -> bool:
    """Drops accelerate's word that DeepSpeed counts the micro-steps, as transformers' Trainer wants it to."""
    return "Gradient accumulation steps mismatch" not in record.getMessage()


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Sends stdout to stderr, also what C code and child processes write to file descriptor 1."""
    original = sys.stdout
    original.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        original.flush()  # what was written through a kept reference to sys.stdout still belongs to stderr
        os.dup2(saved, 1)
        os.close(saved)


def open_streams() -> None:
    """Makes stdout and stderr take whatever is printed: what their encoding lacks is escaped, and a closed one leads
    nowhere."""
    for descriptor in (0, 1, 2):  # ascending, as the lowest free one is what opens
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):  # else a program's own, in whose process this runs
            stream.reconfigure(errors="backslashreplace")


def emit(text: str) -> None:
    """Prints a result on stdout; a reader that went away (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard_stdout()


def flush_stdout() -> str:
    """Flushes stdout before the interpreter does, which would report a closed pipe as an ignored exception; returns why
    what was printed is lost, if it is."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        discard_stdout()
    except OSError as error:  # a full disk
        discard_stdout()
        return f"stdout cannot be written: {error.strerror}"
    return ""


def discard_stdout() -> None:
    """Points stdout at nothing, so that what is still buffered can be flushed."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def to_json(result: Any) -> str:
    """One line of strict JSON in ASCII, which every stdout can print."""
    return dumps(result, ascii=True)


def _last_checkpoint(error: BaseException) -> str:
    checkpoint = checkpoint_of(error)
    return f" The last good checkpoint is {checkpoint}." if checkpoint else ""


def _one_line(message: str) -> str:
    return " ".join(message.split())

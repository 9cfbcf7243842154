"""One of several processes that `launch.run` has started: runs the command and leaves result and outcome as files."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.cli.jobs import command_module
from sparseft.cli.outcome import DONE, outcome_of, quiet_libraries, stdout_to_stderr
from sparseft.compose.run_config import from_dict
from sparseft.distributed import env, launch
from sparseft.errors import checkpoint_of, in_a_run, note_checkpoint
from sparseft.files.atomic import write_json
from sparseft.files.untrusted import read_json


def work(folder: Path) -> dict[str, Any]:
    """This process's part of the job that lies in `folder`; returns the command's result."""
    job = read_json(folder / launch.JOB)
    launch.end_with(job["parent"])
    sys.orig_argv = job["arguments"]  # what `environment.json` calls the command line is the user's
    return command_module(job["command"]).run(from_dict(job["config"]))


def main(folder: Path) -> int:
    """Runs the job that lies in `folder`; returns the exit code, as the command line has them."""
    quiet_libraries()
    result: Any = None
    end = launch.End(DONE)
    try:
        with stdout_to_stderr():
            result = work(folder)
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        checkpoint = checkpoint_of(error)
        if in_a_run(error):
            note_checkpoint(error, None)  # the parent's word, from its own exception
        found = outcome_of(error)
        end = launch.End(found.code, found.message, checkpoint, text, time.time())
    if env.local_rank() == 0 and end.code == DONE:
        with contextlib.suppress(OSError):  # the folder is gone, where TMPDIR was cleaned meanwhile
            write_json(folder / launch.RESULT, result)
    try:
        write_json(folder / launch.END.format(rank=env.rank()), dataclasses.asdict(end))
    except OSError:
        if end.message:
            console.error(end.message)  # the parent, which would, does not get to know it
    if end.code:
        # At once: the other processes may be waiting for this one in a collective, and its threads for them.
        sys.stderr.flush()
        os._exit(end.code)
    return DONE


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))

"""One of several processes that `launch.run` has started: runs the command and leaves result and outcome as files."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from sparseft.cli.outcome import DONE, outcome_of, quiet_libraries, stdout_to_stderr, to_json
from sparseft.compose.run_config import from_dict
from sparseft.distributed import launch
from sparseft.files.atomic import write_text


def work(folder: Path) -> dict[str, Any]:
    """This process's part of the job that lies in `folder`; returns the command's result."""
    job = json.loads((folder / launch.JOB).read_text(encoding="utf-8"))
    launch.end_with(job["parent"])
    sys.orig_argv = job["arguments"]  # what `environment.json` calls the command line is the user's
    module = importlib.import_module(f"sparseft.commands.{job['command']}")
    return module.run(from_dict(job["config"]))


def main(folder: Path) -> int:
    """Runs the job that lies in `folder`; returns the exit code, as the command line has them."""
    rank = os.environ["RANK"]
    if not launch.first_process():
        os.environ["SPARSEFT_QUIET"] = "1"
    quiet_libraries()
    result: Any = None
    outcome = launch.Outcome(DONE)
    try:
        with stdout_to_stderr():
            result = work(folder)
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        checkpoint = error.__dict__.pop("last_checkpoint", None)  # the parent's word, from its own exception
        found = outcome_of(error)
        outcome = launch.Outcome(found.code, found.message, checkpoint and str(checkpoint), text, time.time())
    if os.environ["LOCAL_RANK"] == "0" and outcome.code == DONE:
        write_text(folder / launch.RESULT, to_json(result))
    write_text(folder / launch.OUTCOME.format(rank=rank), to_json(dataclasses.asdict(outcome)))
    if outcome.code:
        # At once: the other processes may be waiting for this one in a collective, and its threads for them.
        sys.stderr.flush()
        os._exit(outcome.code)
    return DONE


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))

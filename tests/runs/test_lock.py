"""One job at a time trains in a run's folder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sparseft.errors import UserError
from sparseft.runs import lock
from sparseft.runs.folder import is_run, prepare_run_folder
from sparseft.runs.lock import Lock


def test_a_second_job_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with Lock() as first:
        first.take(tmp_path)
        first.take(tmp_path)  # it has it
        with Lock() as second, pytest.raises(UserError, match=rf"by process {os.getpid()} on .*: wait"):
            second.take(tmp_path)
    assert not is_run(tmp_path) and (tmp_path / ".lock").read_bytes() == b""
    with Lock() as third:
        third.take(tmp_path)


KILLED = """
import os, sys, time
from pathlib import Path
from sparseft.runs.lock import Lock
Lock().take(Path(sys.argv[1]))
child = os.fork()
print(child or "", flush=True)
time.sleep(60)
"""


def test_a_killed_job_leaves_no_lock_not_by_its_forks_either(tmp_path: Path) -> None:
    job = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    fork = int(next(line for line in job.stdout if line.strip()))
    try:
        with Lock() as mine, pytest.raises(UserError, match=f"process {job.pid} "):
            mine.take(tmp_path)
        time.sleep(0.2)  # for the fork to have let go
        job.kill()
        job.wait()
        os.kill(fork, 0)  # it lives
        with Lock() as mine:
            mine.take(tmp_path)
    finally:
        os.kill(fork, signal.SIGKILL)
        job.stdout.close()


def test_where_there_are_no_locks_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch, Lock() as mine:
        patch.setattr(lock.fcntl, "flock", refuse)
        mine.take(tmp_path)
    assert "cannot be locked (No locks available)" in capsys.readouterr().err
    with monkeypatch.context() as patch, Lock() as mine:
        patch.setattr(lock, "fcntl", None)
        mine.take(tmp_path)
    assert "cannot be locked (this system has no such locks)" in capsys.readouterr().err


def test_a_lock_never_writes_through_a_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / ".lock").symlink_to("mine.txt")
    with Lock() as held:
        held.take(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine" and "cannot be locked" in capsys.readouterr().err


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_new_folder_is_looked_at_again_under_the_lock(overwrite: bool, tmp_path: Path) -> None:
    """Two jobs that find the same folder empty: the second one must not take the first one's run for its own."""

    def begun_by_another(run: Path) -> None:
        (run / "config.yaml").write_text("seed: 1")

    run = tmp_path / "run"
    if overwrite:  # as it was asked for
        prepare_run_folder(str(run), "full", "json", overwrite=True, hold=begun_by_another)
        assert not is_run(run)
        return
    with pytest.raises(UserError, match="already holds a run"):
        prepare_run_folder(str(run), "full", "json", hold=begun_by_another)
    assert (run / "config.yaml").read_text() == "seed: 1"

"""What ends a run of two processes before its end: one of them meets it, both end, and it is said once.

`make test-slow` has all of it, with DeepSpeed's stages and FSDP2; a handful here.
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparseft.distributed import launch
from sparseft.training.checkpoints import check, checkpoint_steps
from support.places import ROOT, SUPPORT
from support.ranks import Stage, sharing
from support.running import METHODS, files, gone, on, sparseft, write_data

TWO = "hardware.num_processes=2"
SECONDS = 600  # that two processes may take; their collectives would wait for hours


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("together"))["json"]


class Failing:
    """`sparseft COMMAND` with two processes, in one of which something fails."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
        self.folder, self.monkeypatch, self.capfd = folder, monkeypatch, capfd
        monkeypatch.setenv("PYTHONPATH", f"{SUPPORT.parent}:{ROOT}")
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def __call__(self, failing: dict[str, Any], command: str, *words: str, code: int = 1) -> str:
        """Runs it and returns the error: the only one. It comes soon, and no process is left."""
        self.capfd.readouterr()
        start = time.monotonic()
        with self.monkeypatch.context() as patch:
            patch.setattr(launch, "WORKER", "support.failing_worker")
            patch.setenv("SPARSEFT_FAILING", json.dumps(failing))
            done = sparseft(self.folder, command, *words, TWO, code=code)
        assert time.monotonic() - start < SECONDS
        children = self.capfd.readouterr()
        assert children.out == done.out == ""
        said = [line for line in (children.err + done.err).splitlines() if "error" in line.lower()]
        assert len(said) == 1 and said[0].startswith("error: "), said
        assert "Traceback" not in children.err and "[rank" not in children.err, children.err
        assert gone([int((self.folder / f"pid-{rank}").read_text()) for rank in range(2)])
        return said[0].removeprefix("error: ").removesuffix(" (--debug shows the traceback)")


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Failing:
    return Failing(tmp_path, monkeypatch, capfd)


def training(data: Path, model: Path, stage: Stage, *words: str) -> list[str]:
    return [
        *on(model, data), *METHODS["s2ft"], "trainer.max_steps=5", "trainer.save_steps=2", "output_dir=run",
        "dataset.eval_fraction=0", sharing(stage), *words,
    ]  # fmt: skip


def steps(folder: Path) -> list[int]:
    """The checkpoints of the run, each of them whole, with nothing beside them."""
    place = folder / "run" / "checkpoints"
    found = checkpoint_steps(place)
    assert sorted(item.name for item in place.iterdir()) == sorted(f"checkpoint-{step}" for step in found)
    for step in found:
        check(place / f"checkpoint-{step}")
    return found


# What fails, the sentence, and the last good checkpoint.
DISK = "checkpoint-4 could not be written: "
CASES: dict[str, tuple[dict[str, Any], str, int]] = {
    "disk full, adapter": ({"what": "checkpoint", "rank": 0, "limit": 6000}, DISK, 2),
    "disk full, optimizer": ({"what": "checkpoint", "rank": 0, "limit": 30000}, DISK, 2),
    "disk full, the other's part": ({"what": "checkpoint", "rank": 1, "limit": 1000}, DISK, 2),
    "disk full at the end": ({"what": "adapter", "rank": 0, "limit": 6000}, "the run in 'run' could not be written: ",
                             5),
    "read-only": ({"what": "read_only", "rank": 0}, f"{DISK}{{run}}/checkpoints: Read-only file system.", 2),
    "memory": ({"what": "memory", "rank": 1}, "memory ran out (CUDA out of memory. Tried to allocate 2.00 GiB): "
               "trainer.batch_size=1 trainer.gradient_accumulation=4 take the same 4 examples", 2),
    "no number": ({"what": "nan", "rank": 1}, "the loss or its gradient was not finite in the steps 4 to 5 "
                  "(trainer.max_bad_steps=2), which updated nothing", 2),
}  # fmt: skip
EVERYDAY = ["disk full, optimizer", "memory"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path, model_folder: Any) -> Callable[[Stage], Path]:
    """`whole(stage)`: the run in which nothing fails."""
    folder = tmp_path_factory.mktemp("whole")

    @functools.cache
    def make(stage: Stage) -> Path:
        sparseft(folder, "train", *training(data, model_folder(), stage, f"output_dir=whole-{stage}"), TWO)
        return folder / f"whole-{stage}"

    return make


@pytest.mark.parametrize(
    ("case", "stage"),
    [
        pytest.param(case, stage, marks=[] if case in EVERYDAY and stage == 0 else [pytest.mark.slow])
        for case in CASES
        for stage in (0, 2, 3, "fsdp")
    ],
)
def test_a_failure_of_one_process_ends_both(
    case: str, stage: Stage, failing: Failing, data: Path, model_folder: Any, whole: Callable[[Stage], Path]
) -> None:
    what, sentence, step = CASES[case]
    words = training(data, model_folder(), stage, "trainer.max_bad_steps=2", "trainer.save_total_limit=1")
    message = failing(what, "train", *words)
    assert sentence.format(run="run") in message, message
    assert message.endswith(f"The last good checkpoint is run/checkpoints/checkpoint-{step}."), message
    assert steps(failing.folder) == [step]
    assert not (failing.folder / "run" / "adapter").exists()
    assert not [name for name in files(failing.folder) if "/." in name and ".cache" not in name]
    if case != "disk full, optimizer":  # goes on to the same end; killed anywhere it does so in test_kill.py
        return
    sparseft(failing.folder, "train", *words, TWO, "trainer.resume=auto")
    runs = failing.folder / "run", whole(stage)
    left, right = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
def test_a_disk_full_of_selections(failing: Failing, data: Path, model_folder: Any) -> None:
    words = [*on(model_folder(), data), *METHODS["sylva"]]
    message = failing({"what": "cached", "rank": 0, "limit": 100}, "preprocess", *words)
    assert re.fullmatch(r"the selection .*/selections/\w+ could not be written: File too large.*", message), message
    assert not list((failing.folder / ".cache" / "sparseft" / "selections").iterdir())


COMMAND = """
import sys
from sparseft.distributed import launch
from sparseft.cli.app import main
launch.WORKER = "support.failing_worker"
sys.exit(main(sys.argv[1:]))
"""
STAGES = {"statistics": "statistics 2 in 0", "scoring": "scores 2 in 0", "writing": "writing in 0"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "whom", "number"),
    [
        (stage, *each)
        for stage in STAGES
        for each in (("second", "SIGKILL"), ("parent", "SIGKILL"), ("parent", "SIGTERM"))
    ],
)
def test_preprocess_goes_on_after_a_signal(
    stage: str, whom: str, number: str, failing: Failing, data: Path, model_folder: Any, whole_selection: Path
) -> None:
    folder = failing.folder
    failing.monkeypatch.setenv("SPARSEFT_FAILING", json.dumps({"what": "slow", "rank": None}))
    words = ["preprocess", *selecting(data, model_folder())]
    log = (folder / "log.txt").open("w")
    parent = subprocess.Popen([sys.executable, "-c", COMMAND, *words], cwd=folder, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + SECONDS
        while STAGES[stage] not in (said := (folder / "log.txt").read_text()):
            assert parent.poll() is None and time.monotonic() < end, said
            time.sleep(0.02)
        pids = [int((folder / f"pid-{rank}").read_text()) for rank in range(2)]
        os.kill(parent.pid if whom == "parent" else pids[1], signal.Signals[number])
        code = parent.wait(SECONDS)
    finally:
        parent.kill()  # nothing where it has ended
    said = (folder / "log.txt").read_text()
    assert gone(pids)
    assert code == ({"SIGKILL": -9, "SIGTERM": 130}[number] if whom == "parent" else 1), said
    if code > 0:
        (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert ("interrupted." if code == 130 else "process 1 was killed by SIGKILL") in error
    kept = list((folder / ".cache" / "sparseft" / "selections").iterdir())
    if stage != "writing" or whom == "second":  # else it may have been written
        assert [path.suffix for path in kept] == [".partial"], kept
    sparseft(folder, *words)
    (path,) = (folder / ".cache" / "sparseft" / "selections").iterdir()
    for name in files(whole_selection):
        assert (path / name).read_bytes() == (whole_selection / name).read_bytes(), name


def selecting(data: Path, model: Path) -> list[str]:
    return [*on(model, data), *METHODS["sylva"], "method.num_samples=6", TWO]


@pytest.fixture(scope="module")
def whole_selection(tmp_path_factory: pytest.TempPathFactory, data: Path, model_folder: Any) -> Path:
    folder = tmp_path_factory.mktemp("selection")
    sparseft(folder, "preprocess", *selecting(data, model_folder()))
    (path,) = (folder / ".cache" / "sparseft" / "selections").iterdir()
    return path


@pytest.mark.slow
def test_an_output_that_cannot_be_written_is_refused_once(failing: Failing, data: Path, model_folder: Any) -> None:
    words = training(data, model_folder(), 0, "output_dir=/proc/run")
    message = failing({"what": "memory", "rank": 0}, "train", *words, code=2)
    assert "/proc/run" in message

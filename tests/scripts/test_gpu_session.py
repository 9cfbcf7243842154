"""The session for a GPU: whatever a stage does, what was found is kept and the next one runs."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparseft.errors import UserError
from support.places import ROOT


@pytest.fixture(scope="module")
def scripts() -> Iterator[None]:
    sys.path.insert(0, str(ROOT / "scripts"))
    yield
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def runner(scripts: None) -> Any:
    return importlib.import_module("gpu_stages.runner")


@pytest.fixture(scope="module")
def findings(scripts: None) -> Any:
    return importlib.import_module("gpu_stages.findings")


@pytest.fixture(scope="module")
def session(scripts: None) -> Any:
    return importlib.import_module("gpu_session")


def fine(found: Any) -> None:
    found.fact("it", True, "so", "so")


def read(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "session.json").read_text())
    return content | {"stages": {entry["name"]: entry for entry in content["stages"]}}


@pytest.fixture
def run(runner: Any, tmp_path: Path) -> Any:
    """`run({name: work}, seconds=60, limit=30, **options)` -> what session.json holds."""

    def go(works: dict[str, Any], seconds: float = 60, limit: float = 30, **options: Any) -> dict[str, Any]:
        stages = [runner.Stage(name, limit, f"does {name}", work) for name, work in works.items()]
        runner.run(stages, tmp_path, seconds, facts={"device": "none"}, say=lambda text: None, **options)
        return read(tmp_path)

    return go


def test_whatever_a_stage_does_the_next_one_runs(run: Any, runner: Any, findings: Any, tmp_path: Path) -> None:
    orphan = tmp_path / "orphan"

    def raises(found: Any) -> None:
        fine(found)
        raise ValueError("no\nsuch kernel")

    def waits() -> None:
        orphan.write_text(str(os.getpid()))
        time.sleep(100)

    def hangs(found: Any) -> None:
        fine(found)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        runner.in_child(waits, 100, group=False)

    def dies(found: Any) -> None:
        fine(found)
        os.kill(os.getpid(), signal.SIGKILL)

    def leaves(found: Any) -> None:
        os._exit(3)

    def lacks(found: Any) -> None:
        raise findings.Skip("no such tool")

    works = {"raises": raises, "dies": dies, "leaves": leaves, "lacks": lacks, "fine": fine}
    stages = run(works)["stages"]
    assert {name: (entry["verdict"], entry["reason"]) for name, entry in stages.items()} == {
        "raises": ("failed", "ValueError: no such kernel"),
        "dies": ("failed", "killed by SIGKILL"),
        "leaves": ("failed", "ended with exit code 3 and no word"),
        "lacks": ("skipped", "no such tool"),
        "fine": ("ok", ""),
    }
    for name in ("raises", "dies"):
        assert [row["found"] for row in stages[name]["rows"]] == ["so"]
    log = (tmp_path / "session.log").read_text()
    assert "==== raises" in log and "ValueError: no" in log

    start = time.monotonic()
    stages = run({"hangs": hangs, "fine": fine}, limit=1.5)["stages"]
    assert time.monotonic() - start < 20
    assert (stages["hangs"]["verdict"], stages["hangs"]["reason"]) == ("failed", "did not end within 2 s")
    assert stages["hangs"]["rows"] and stages["fine"]["verdict"] == "ok"
    pid = int(orphan.read_text())
    end = time.monotonic() + 10
    while time.monotonic() < end and _runs(pid):
        time.sleep(0.05)
    assert not _runs(pid)  # what a stage has started ends with it


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_after_each_stage_all_that_is_known_is_there(run: Any, tmp_path: Path) -> None:
    def looks(found: Any) -> None:
        before = read(tmp_path)
        found.fact("first", before["stages"]["first"]["verdict"] == "ok", "there")
        found.fact("not complete", before["complete"] is False, "no")
        found.fact("its numbers", found.earlier("first") == {"time": 2.5}, str(found.earlier("first")))
        (found.files / "trace").write_text("a trace")

    content = run({"first": lambda found: found.number("time", 2.5, "ms"), "second": looks})
    assert content["complete"] is True
    assert content["stages"]["second"]["verdict"] == "ok", content["stages"]["second"]["rows"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "session.json", "session.md", "session.log", "second.tar.gz",
    }  # fmt: skip
    text = (tmp_path / "session.md").read_text()
    assert "| stage | what | expected | found | verdict |" in text and "|  | time |  | 2.5 ms |  |" in text


def test_no_stage_starts_when_the_time_is_spent(run: Any, runner: Any, session: Any) -> None:
    def slow(found: Any) -> None:
        time.sleep(100)

    stages = run({"slow": slow, "late": fine}, seconds=runner.LEAST + 0.5)["stages"]
    assert stages["slow"]["reason"].startswith("did not end within")  # it had what was left
    assert stages["late"]["verdict"] == "skipped"
    assert stages["late"]["reason"] == f"no time left of {runner.LEAST + 0.5:g} s"
    dry = run({"late": fine}, seconds=60, spent=61, dry=True)
    assert dry["seconds_allowed"] == 60 and dry["stages"]["late"]["reason"] == "no time left of 60 s"
    assert session.code(dry | {"stages": list(dry["stages"].values())}, (), []) == 1  # it has shown nothing


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_what_was_found(run: Any, tmp_path: Path, number: signal.Signals) -> None:
    def interrupts(found: Any) -> None:
        fine(found)
        os.kill(os.getppid(), number)
        time.sleep(100)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run({"first": fine, "interrupts": interrupts, "last": fine})
    content = read(tmp_path)
    assert content["complete"] is False and signal.getsignal(signal.SIGTERM) is before
    found = {name: (entry["verdict"], entry["reason"], len(entry["rows"])) for name, entry in content["stages"].items()}
    assert found == {
        "first": ("ok", "", 1), "interrupts": ("failed", "interrupted", 1), "last": ("skipped", "interrupted", 0),
    }  # fmt: skip


def test_numbers_are_judged_by_what_was_expected(run: Any, findings: Any, session: Any, runner: Any) -> None:
    def measures(found: Any) -> None:
        found.number("low", 1.02, "", findings.at_most(1.03))
        found.number("high", 47.0, "ms", findings.near(40, 0.1))
        found.number("unknown", 3.0)
        with found.attempt("part"):
            raise RuntimeError("one part alone")

    def off(found: Any) -> None:
        found.number("high", 2, "", findings.between(3, 4))

    content = run({"measures": measures, "off": off})
    rows = content["stages"]["measures"]["rows"]
    assert [(row["expected"], row["verdict"]) for row in rows] == [
        ("≤ 1.03", "ok"), ("40 ± 10% ms", "off"), ("", ""), ("", "failed"),
    ]  # fmt: skip
    assert [entry["verdict"] for entry in content["stages"].values()] == ["failed", "off"]
    listed = content | {"stages": list(content["stages"].values())}
    assert session.code(listed, (), ["off"]) == 0 and session.code(listed, (), []) == 1
    dry = run({"off": off, "wrong": lambda found: found.fact("bits", False, "differ", "equal")}, dry=True)
    assert [entry["verdict"] for entry in dry["stages"].values()] == ["ok", "off"]  # facts hold on any device
    assert session.code(dry | {"stages": list(dry["stages"].values())}, (), []) == 1


def test_some_stages_again(run: Any, runner: Any, tmp_path: Path) -> None:
    def counts(found: Any) -> None:
        found.number("pid", os.getpid())

    works = {"one": counts, "two": counts}
    before = run(works)["stages"]
    after = run(works, only=["two"])["stages"]
    assert after["one"] == before["one"] and after["two"]["rows"] != before["two"]["rows"]
    with pytest.raises(UserError, match="holds a real session"):
        run(works, only=["two"], dry=True)
    needs = runner.Stage("cuda", 5, "", counts, needs_cuda=True)
    dry = runner.run([needs], tmp_path / "dry", 60, facts={}, dry=True, say=lambda text: None)
    assert [(entry["verdict"], entry["reason"]) for entry in dry["stages"]] == [("skipped", "needs CUDA")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "x", "--only", "sync"], "--only sync: no such stage. Did you mean 'syncs'?"),
        (["--out", "x", "--dryy"], "unknown option '--dryy'. Did you mean '--dry'?"),
        (["--out", "x", "--seconds", "0"], "--seconds 0: expected more than 0."),
        (["--out", "x", "--seconds", "soon"], "argument --seconds: invalid float value: 'soon'."),
        ([], "the following arguments are required: --out."),
        (["--out", __file__], f"--out {__file__}: expected a folder, this is a file."),
        (["--out", f"{__file__}/x"], f"cannot write to --out '{__file__}/x': Not a directory, '{__file__}' is a file."),
    ],
)
def test_wrong_options(session: Any, words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert session.main(words) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_a_folder_that_cannot_be_made(run: Any, runner: Any) -> None:
    with pytest.raises(UserError, match=r"^--out /proc/session: the folder cannot be made: "):
        runner.run((), Path("/proc/session"), 60, facts={})


def test_the_stages_fit_into_a_session(session: Any) -> None:
    assert len({stage.name for stage in session.STAGES}) == len(session.STAGES) == 13
    assert sum(stage.seconds for stage in session.STAGES) <= 780

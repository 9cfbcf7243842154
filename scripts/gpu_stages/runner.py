"""Runs stages one after another, each in a process of its own and within a limit; whatever one does, the next one runs.

After each stage `session.json` and `session.md` hold all that is known. A stage gets its own limit or what is left of
the session's, whichever is less. Processes are forked, so that what this one has imported is there at once: it must
never use the device itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_stages import findings as rows_of
from gpu_stages.findings import FAILED, OFF, OK, SKIPPED, Findings, Skip, told
from sparseft.errors import UserError
from sparseft.files.atomic import write_json, write_text
from sparseft.files.untrusted import read_json_object
from sparseft.signals import terminable

JSON, MARKDOWN, LOG = "session.json", "session.md", "session.log"
LEAST = 3.0  # seconds below which starting a stage is no use
DRY = 4.0  # a slow CPU is no finding: limits of a dry session are so many times as long
GRACE = 5.0  # … that a killed one may take to go; one that waits for a driver may never


@dataclass(frozen=True)
class Stage:
    """A part of a session. `work` runs in its own process and reports by `Findings`."""

    name: str
    seconds: float
    what: str
    work: Callable[[Findings], None]
    needs_cuda: bool = False


@dataclass
class Session:
    """The session's folder and what it holds so far."""

    folder: Path
    facts: dict[str, Any]
    stages: Sequence[Stage]
    results: dict[str, dict[str, Any]]

    def leave(self, complete: bool) -> None:
        """Writes what there is, whole or not at all."""
        content = self.facts | {
            "complete": complete,
            "stages": [self.results[stage.name] for stage in self.stages if stage.name in self.results],
        }
        write_json(self.folder / JSON, content)
        write_text(self.folder / MARKDOWN, markdown(content))


def run(
    stages: Sequence[Stage],
    folder: Path,
    seconds: float,
    *,
    facts: dict[str, Any],
    spent: float = 0.0,
    dry: bool = False,
    only: Collection[str] = (),
    say: Callable[[str], None] = lambda text: print(text, flush=True),
) -> dict[str, Any]:
    """The session's content, as `session.json` has it.

    spent: of the seconds, before the first stage. only: the stages to run; of the others stays what the folder holds
    from before. UserError where the folder cannot be made. Interrupted (Ctrl-C, SIGTERM),
    leaves what there is and raises KeyboardInterrupt.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file system that lets nobody write asks for no permission
        raise UserError(f"--out {folder}: the folder cannot be made: {error.strerror}.") from error
    session = Session(folder, facts | {"dry": dry, "seconds_allowed": seconds}, stages, {})
    if only:
        session.results |= _before(folder, dry)
    else:
        (folder / LOG).unlink(missing_ok=True)
    chosen = [stage for stage in stages if not only or stage.name in only]
    end = time.monotonic() + seconds - spent
    with terminable():  # with what there is written
        for position, stage in enumerate(chosen):
            try:
                result = _result(stage, session, end, dry, say)
            except KeyboardInterrupt:
                for left in chosen[position:]:  # the first of them has its rows
                    known = session.results.get(left.name) if left is stage else None
                    session.results[left.name] = known or _entry(left, SKIPPED, "interrupted")
                session.leave(complete=False)
                raise
            session.results[stage.name] = result
            session.leave(complete=stage is chosen[-1])
            say(f"{stage.name}: {result['verdict']} in {result['seconds']:.0f} s" + _because(result))
    return read_json_object(folder / JSON)


def _before(folder: Path, dry: bool) -> dict[str, dict[str, Any]]:
    if not (folder / JSON).is_file():
        return {}
    content = read_json_object(folder / JSON)
    if content.get("dry") is not dry:
        kind = "dry" if content.get("dry") else "real"
        raise UserError(f"--out {folder} holds a {kind} session: give another folder.")
    return {entry["name"]: entry for entry in content["stages"]}


def _entry(
    stage: Stage, verdict: str, reason: str = "", spent: float = 0.0, rows: Sequence[Any] = ()
) -> dict[str, Any]:
    return {
        "name": stage.name,
        "what": stage.what,
        "verdict": verdict,
        "reason": reason,
        "limit": stage.seconds,
        "seconds": round(spent, 2),
        "rows": list(rows),
    }


def _result(stage: Stage, session: Session, end: float, dry: bool, say: Callable[[str], None]) -> dict[str, Any]:
    left = end - time.monotonic()
    if dry and stage.needs_cuda:
        return _entry(stage, SKIPPED, "needs CUDA")
    if left < LEAST:
        # A dry session is to show that everything works: without this stage it does not.
        verdict = FAILED if dry else SKIPPED
        return _entry(stage, verdict, f"no time left of {session.facts['seconds_allowed']:g} s")
    limit = min(stage.seconds * (DRY if dry else 1.0), left)
    say(f"{stage.name}: {stage.what} (at most {limit:.0f} s)")
    with tempfile.TemporaryDirectory(prefix="gpu-session-", ignore_cleanup_errors=True) as made:
        place = Path(made)
        for name in ("files", "scratch"):
            (place / name).mkdir()
        findings = Findings(
            place / "rows.jsonl", dry=dry, files=place / "files", scratch=place / "scratch",
            earlier=session.results, end=time.monotonic() + limit,
        )  # fmt: skip
        start = time.monotonic()
        try:
            verdict, reason = in_child(lambda: stage.work(findings), limit, log=place / "log")
            rows = rows_of.read(place / "rows.jsonl")
            entry = _entry(stage, verdict or _judged(rows), reason, time.monotonic() - start, rows)
        except KeyboardInterrupt:
            rows = rows_of.read(place / "rows.jsonl")
            session.results[stage.name] = _entry(stage, FAILED, "interrupted", time.monotonic() - start, rows)
            raise
        finally:
            _keep(place, session.folder, stage.name)
    return entry


def _judged(rows: Sequence[dict[str, Any]]) -> str:
    """Of a stage that came to its end."""
    verdicts = [row["verdict"] for row in rows]
    for verdict in (FAILED, OFF):
        if verdict in verdicts:
            return verdict
    return SKIPPED if rows and all(verdict == SKIPPED for verdict in verdicts) else OK


def _keep(place: Path, folder: Path, name: str) -> None:
    """Adds a stage's output to the log, and packs the files that it leaves, as few as may be."""
    with (folder / LOG).open("ab") as log:
        log.write(f"\n==== {name}\n".encode())
        if (place / "log").is_file():
            with (place / "log").open("rb") as own:
                shutil.copyfileobj(own, log)
    if any((place / "files").iterdir()):
        with tarfile.open(folder / f"{name}.tar.gz", "w:gz") as packed:
            packed.add(place / "files", arcname=name)


# ---- a process of its own ----


def in_child(work: Callable[[], None], limit: float, *, log: Path | None = None, group: bool = True) -> tuple[str, str]:
    """Does `work` in a forked process with a limit in seconds. Returns (verdict, reason): ("", "") where it came to its
    end, else FAILED or SKIPPED and why.

    group: it leads a group of processes, which is ended with it; false inside another one's, so that it ends with that.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(work, sender, log, group))
    sys.stdout.flush()
    sys.stderr.flush()
    child.start()
    sender.close()
    try:
        child.join(limit)
        late = child.is_alive()
        said = None
        with contextlib.suppress(EOFError, OSError):
            if not late and receiver.poll(0):
                said = receiver.recv()
    finally:
        _end(child, group)
        receiver.close()
    if late:
        stuck = child.exitcode is None
        return FAILED, f"did not end within {limit:.0f} s" + (" and cannot be killed" if stuck else "")
    if said is not None:
        return said
    if child.exitcode is not None and child.exitcode < 0:
        return FAILED, f"killed by {signal.Signals(-child.exitcode).name}"
    return FAILED, f"ended with exit code {child.exitcode} and no word"


def _end(child: Any, group: bool) -> None:
    """Kills the process, and all that it has started where that is a group of their own, and waits for it a little."""
    if group:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    child.kill()  # where it had no time to make a group of its own
    child.join(GRACE)


def _child(work: Callable[[], None], sender: Any, log: Path | None, group: bool) -> None:
    if group:
        os.setsid()  # away from the terminal too, whose Ctrl-C is for the session
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if log is not None:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(output, number)
        # Where they were something else than these two until now.
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    try:
        work()
        said = ("", "")
    except Skip as reason:
        said = (SKIPPED, str(reason))
    except BaseException as error:
        traceback.print_exc()
        said = (FAILED, told(error))
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send(said)
    sender.close()
    os._exit(0)  # whatever threads a library has started


# ---- what is shown ----

COLUMNS = ("stage", "what", "expected", "found", "verdict")


def table(content: dict[str, Any]) -> list[list[str]]:
    """A line for each stage, and below it one for each of its rows."""
    lines = []
    for entry in content["stages"]:
        spent = f"{entry['seconds']:.0f} of {entry['limit']:.0f} s"
        lines.append([entry["name"], entry["what"], "", entry["reason"] or spent, entry["verdict"]])
        lines += [["", row["what"], row["expected"], row["found"], row["verdict"]] for row in entry["rows"]]
    return lines


def markdown(content: dict[str, Any]) -> str:
    """The table, under what it was measured on."""
    facts = [f"{name}: {value}" for name, value in content.items() if name not in ("stages", "versions")]
    versions = content.get("versions", {})
    facts.append("versions: " + ", ".join(f"{name} {version or '-'}" for name, version in versions.items()))
    lines = [*(f"- {fact}" for fact in facts), "", "| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in table(content)]
    return "\n".join(lines) + "\n"


def _because(result: dict[str, Any]) -> str:
    return f": {result['reason']}" if result["reason"] else ""

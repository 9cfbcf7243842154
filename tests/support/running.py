"""Running commands in this process as the command line does, and small data files for them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseft.cli.app import main
from sparseft.runs.folder import LOCK


@dataclass
class Done:
    """What came of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout; nothing else may stand there."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """The working directory inside."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def sparseft(cwd: Path, *words: str, code: int | None = 0) -> Done:
    """`sparseft WORDS` in `cwd`; checks the exit code unless `code` is None."""
    out, err = io.StringIO(), io.StringIO()
    with working_in(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        done = Done(main([str(word) for word in words]), "", "")
    done.out, done.err = out.getvalue(), err.getvalue()
    assert "Traceback" not in done.err, done.err
    if code is not None:
        assert done.code == code, f"exit code {done.code}\n{done.err}"
    return done


def refused(cwd: Path, *words: str) -> str:
    """The one message of a command that must refuse its input, with exit code 2 and nothing on stdout."""
    done = sparseft(cwd, *words, code=2)
    assert done.out == ""
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.err
    return errors[0].removeprefix("error: ")


def files(folder: Path) -> set[str]:
    """Every file below a folder, by its path there, but a run's lock, which stays."""
    paths = (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return {path.relative_to(folder).as_posix() for path in paths if path.name != LOCK}


def write_data(folder: Path, count: int = 24) -> dict[str, Path]:
    """One small training file of each kind, by the name of its family."""
    sums = [(a, b) for a in range(2, 20) for b in range(3, 12)][:: max(1, 160 // count)][:count]
    alpaca = [
        {"instruction": f"What is {a} + {b}?", "input": "", "output": f"the answer is {a + b}", "answer": str(a + b)}
        for a, b in sums
    ]
    guanaco = [{"text": f"### Human: add {a} and {b}### Assistant: it is {a + b}"} for a, b in sums]
    pairs = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in sums]
    made = {
        "commonsense": folder / "alpaca.json",
        "arithmetic": folder / "sums.json",
        "oasst1": folder / "guanaco.jsonl",
        "json": folder / "pairs.jsonl",
        "text": folder / "story.txt",
    }
    made["commonsense"].write_text(json.dumps(alpaca))
    made["arithmetic"].write_text(json.dumps(alpaca))
    made["oasst1"].write_text("".join(json.dumps(line) + "\n" for line in guanaco))
    made["json"].write_text("".join(json.dumps(line) + "\n" for line in pairs))
    made["text"].write_text("\n\n".join(f"{a} plus {b} is {a + b}, as anyone who counts knows." for a, b in sums))
    return made


def on(model: Path, data: Path, family: str = "json") -> list[str]:
    """Overrides for a tiny model on a small file."""
    return [
        f"model.path={model}",
        f"dataset={family}",
        f"dataset.train_path={data}",
        "trainer.max_length=96",
        "trainer.batch_size=2",
        "trainer.gradient_accumulation=2",
        "trainer.warmup_steps=0",
        "hardware=cpu",
    ]


METHODS = {  # settings that make each method small but real on a model 48 wide
    "s2ft": ["method=s2ft", "sparsity=0.9", "method.roles=[o,down]"],
    "sylva": ["method=sylva", "sparsity=0.9", "method.block_size=8", "method.num_samples=8"],
    "lora": ["method=lora", "sparsity=0.9"],
    "dora": ["method=dora", "sparsity=0.9"],
    "full": ["method=full", "trainer.learning_rate=1e-3"],
}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def summary(run: Path) -> dict[str, Any]:
    """A run's `summary.json`."""
    return json.loads((run / "summary.json").read_text())


def gone(pids: list[int], seconds: float = 20) -> bool:
    """Whether the processes have ended (a zombie has: whoever adopted it has only not looked yet)."""

    def running(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    end = time.monotonic() + seconds
    while any(map(running, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(map(running, pids))

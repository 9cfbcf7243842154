"""`sparseft chat` as a command: options, pipes, results, and signals on a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support.places import ROOT
from support.running import Done, refused, sparseft

QUIET_WORDS = ("chat.max_new_tokens=8", "hardware=cpu")


def chat(cwd: Path, monkeypatch: pytest.MonkeyPatch, lines: str, *words: Any, code: int = 0) -> Done:
    """`sparseft chat WORDS` that reads `lines`."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return sparseft(cwd, "chat", *words, *QUIET_WORDS, code=code)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the bundled model, the latest of its working directory."""
    folder = tmp_path_factory.mktemp("world")
    sparseft(
        folder, "train", "method=s2ft", "trainer.max_steps=1", "trainer.gradient_accumulation=1", "hardware=cpu",
        "dataset.max_examples=40", "output_dir=outputs/20260101-101010-mine",
    )  # fmt: skip
    return folder / "outputs" / "20260101-101010-mine"


def test_only_answers_are_on_stdout(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cwd = run.parents[1]
    one = chat(cwd, monkeypatch, "What is 12 + 30?\n", "--base")
    assert one.out.strip() and one.out.endswith("\n") and "\x1b" not in one.out + one.err
    assert "talking to the base model bundled:tiny" in one.err
    lines = "What is 12 + 30?\n/help\n\n/both\nWhat is 3 + 4?\n/quit\nnever read\n"
    both = chat(cwd, monkeypatch, lines)  # the latest run
    assert "talking to the latest run" in both.err and "prompts: alpaca, as in the training data" in both.err
    assert re.fullmatch(r"(.+\n)+base:\n(.+\n)+mine:\n(.+\n)+", both.out), both.out
    assert "/help" not in both.out and "never" not in both.out


def test_options_and_overrides_mix(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = chat(run.parents[1], monkeypatch, "Hello\n", "--run", run, "--json", "chat.prompt=plain")
    mixed = chat(
        run.parents[1], monkeypatch, "Hello\n", "chat.prompt=plain", "--json", "model.dtype=auto", "--run", run
    )
    assert plain.json == mixed.json and plain.json["prompt"] == "plain"


def test_json_is_the_talk(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = f"/both\nWhat is 12 + 30?\n/reset\n/base\nHello\n/save {tmp_path / 'talk.jsonl'}\n"
    done = chat(run.parents[1], monkeypatch, lines, "--json", "--adapter", run / "adapter")
    result = done.json
    assert result["talked_to"].startswith("the adapter ") and result["prompt"] == "alpaca"
    assert [(turn["question"], list(turn["answers"])) for turn in result["turns"]] == [
        ("What is 12 + 30?", ["base", "mine"]),
        ("Hello", ["base"]),
    ]
    for turn in result["turns"]:
        for answer in turn["answers"].values():
            assert answer["tokens"] <= 8 and answer["ended"] in ("itself", "length")
    assert result["saved"] == [str(tmp_path / "talk.jsonl")]
    (said,) = map(json.loads, (tmp_path / "talk.jsonl").read_text().splitlines())
    assert [message["content"] for message in said["messages"]] == [
        "Hello",
        result["turns"][1]["answers"]["base"]["text"],
    ]


def test_nothing_at_all_is_fine(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chat(run.parents[1], monkeypatch, "", "--base").out == ""
    assert chat(run.parents[1], monkeypatch, "", "--base", "--json").json["turns"] == []


def test_what_is_wrong_is_one_sentence(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cwd = run.parents[1]
    assert "exclude each other" in refused(cwd, "chat", "--base", "--run", str(run))
    assert "no such folder" in refused(cwd, "chat", "--adapter", "nowhere")
    assert "outputs/mine" in refused(cwd, "chat", "--run", "outputs/mine")
    assert "'outputs/latest' is not a setting (key=value): a run is given as --run" in refused(
        cwd, "chat", "outputs/latest"
    )
    assert "Did you mean 'chat.temperature'?" in refused(cwd, "chat", "chat.temperatur=1")
    assert "chat.max_new_tokens=0" in refused(cwd, "chat", "chat.max_new_tokens=0")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    other = ROOT.parent / "no-such"
    assert "no such folder" in refused(cwd, "chat", "--run", str(run), f"model.path={other}/x")
    for line, message in {
        "/hlep": "no command /hlep. Did you mean '/help'?",
        "/adapter": "no adapter is loaded yet",
    }.items():
        done = chat(cwd, monkeypatch, f"{line}\n", "--base", code=2)
        assert message in done.err and done.out == ""


def test_a_run_of_another_base_is_refused(run: Path, model_folder: Any) -> None:
    message = refused(run.parents[1], "chat", "--run", str(run), f"model.path={model_folder('llama')}")
    assert "adapter" in message and "base" in message


def test_a_real_pipe(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sparseft", "chat", "--base", *QUIET_WORDS]
    done = subprocess.run(
        command, input=b"What is 12 + 30?\nAnd 3 + 4?\n", capture_output=True, cwd=tmp_path, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert len(done.stdout.splitlines()) >= 2 and b"\x1b" not in done.stdout and b">" not in done.stdout
    assert "talking to the base model bundled:tiny; prompts: alpaca" in done.stderr.decode()


class Terminal:
    """`sparseft chat` on a terminal of its own."""

    def __init__(self, cwd: Path, *words: str) -> None:
        self.pid, self.master = pty.fork()
        if not self.pid:
            os.chdir(cwd)
            os.environ.update(PYTHONPATH=str(ROOT), TERM="xterm", COLUMNS="100", LINES="40")
            os.execv(sys.executable, [sys.executable, "-m", "sparseft", "chat", *words])
        self.seen = ""
        self.end = time.monotonic() + 240

    def until(self, text: str, after: int = 0) -> None:
        """Reads until `text` stands behind the first `after` characters."""
        while text not in self.seen[after:]:
            assert time.monotonic() < self.end, f"no {text!r} in {self.seen!r}"
            if select.select([self.master], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.master, 4096).decode(errors="replace")
                except OSError as error:  # it has ended
                    raise AssertionError(f"no {text!r} in {self.seen!r}") from error

    def type(self, text: str) -> int:
        """Types, and returns where on the screen that begins."""
        place = len(self.seen)
        os.write(self.master, text.encode())
        return place

    def interrupt(self, after: int) -> int:
        """Ctrl-C once the next prompt is up: one that comes while `input` sets itself up waits for the next key."""
        self.until("base>", after)
        time.sleep(0.2)
        return self.type("half a line\x03")

    def code(self) -> int:
        while time.monotonic() < self.end:
            with_data = select.select([self.master], [], [], 0.2)[0]
            if with_data:
                try:
                    self.seen += os.read(self.master, 4096).decode(errors="replace")
                except OSError:
                    pass
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.master)
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"it did not end: {self.seen!r}")


def test_ctrl_c_stops_an_answer_and_not_the_program(tmp_path: Path) -> None:
    """The model's EOS is taken from it, so that no answer ends by itself within a minute."""
    import transformers

    from sparseft.config import BUNDLED_ROOT

    folder = tmp_path / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED_ROOT / "tiny")
    model.config.max_position_embeddings = 1_000_000
    model.generation_config.suppress_tokens = [2]
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(BUNDLED_ROOT / "tiny").save_pretrained(folder)
    terminal = Terminal(
        tmp_path, "--base", f"model.path={folder}", "chat.max_new_tokens=900000", "hardware=cpu", "chat.prompt=raw"
    )
    terminal.until("base>")
    place = terminal.type("The raven is black.\r")
    terminal.until("raven is black.\r\n", place)
    terminal.until(" ", len(terminal.seen) + 40)  # an answer comes
    place = terminal.type("\x03")
    terminal.until("stopped", place)
    terminal.until("base>", place)
    place = terminal.type("/save talk.jsonl\r")
    terminal.until("saved to talk.jsonl", place)
    question, answer = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert question["content"] == "The raven is black." and len(answer["content"]) > 20
    place = terminal.interrupt(place)
    terminal.until("Ctrl-C again or Ctrl-D leaves", place)
    place = terminal.type("/hlep\r")
    terminal.until("Did you mean '/help'", place)
    place = terminal.interrupt(place)
    terminal.until("Ctrl-C again", place)
    terminal.interrupt(place)
    assert terminal.code() == 0

"""The command line: what it hands to the commands, what it prints where, and its exit codes."""

from __future__ import annotations

import errno
import importlib.machinery
import io
import json
import os
import re
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparseft import console
from sparseft.cli.app import main
from sparseft.cli.outcome import outcome_of
from sparseft.compose.run_config import from_dict
from sparseft.errors import RunError, UserError, note_checkpoint
from support.places import ROOT

COMMANDS = ("preprocess", "train", "eval", "export", "trim", "chat", "bench", "report", "push")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[tuple, dict]]]:
    """`fake(command, run)` puts `run` in the place of a command's module; the calls are recorded in what it returns."""

    def install(command: str, run: Callable[..., Any] = lambda *args, **kwargs: {"run": "outputs/x"}) -> list:
        calls: list[tuple[tuple, dict]] = []

        def recorded(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            return run(*args, **kwargs)

        name = f"sparseft.commands.{command}"
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.run = recorded  # type: ignore[attr-defined]
        module.render = lambda result: print("rendered", json.dumps(result))  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
        return calls

    return install


def in_a_process(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sparseft", *words],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, **options,
    )  # fmt: skip


# -- help -------------------------------------------------------------------------------------------------------------


def test_help_names_every_command(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capfd.readouterr().out
    assert all(command in out for command in COMMANDS)


def test_alone_it_prints_its_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    alone = capfd.readouterr()
    assert main(["-h"]) == 0
    assert alone.out == capfd.readouterr().out and alone.err == ""
    assert "sparseft train experiment=quickstart" in alone.out


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_shows_an_example(command: str, flag: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([command, flag]) == 0
    out = capfd.readouterr().out
    assert "Example" in out and f"\n    sparseft {command} " in out
    assert "--json" in out and "--debug" in out
    assert "Arguments:" not in out  # the text says what they are


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    import sparseft

    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"sparseft {sparseft.__version__}\n"


# -- what the commands get --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "preprocess"])
def test_options_and_overrides_in_any_order(command: str, fake: Callable, capfd: pytest.CaptureFixture[str]) -> None:
    calls = fake(command)
    for words in (
        ["seed=3", "--json", "method=s2ft", "--debug", "~scope"],
        ["--debug", "--json", "seed=3", "method=s2ft", "~scope"],
        ["seed=3", "method=s2ft", "+scope=null", "--json", "--debug"],
    ):
        assert main([command, *words]) == 0
        ((config,), keywords) = calls.pop()
        assert (config.seed, config.method_name, keywords) == (3, "s2ft", {})
        assert json.loads(capfd.readouterr().out) == {"run": "outputs/x"}


def test_eval_tells_tasks_from_overrides(fake: Callable, capfd: pytest.CaptureFixture[str]) -> None:
    calls = fake("eval")
    words = "mmlu eval.split=validation boolq --shots 5 ~scope --limit 7 +seed=2 --run r"
    assert main(["eval", *words.split()]) == 0
    (config,), keywords = calls.pop()
    overrides = ["eval.split=validation", "~scope", "+seed=2", "eval.shots=5", "eval.limit=7"]
    assert keywords == {
        "tasks": ["mmlu", "boolq"], "run": "r", "adapter": None, "base": False, "overrides": overrides
    }  # fmt: skip
    assert (config.eval.shots, config.eval.limit, config.eval.split, config.seed) == (5, 7, "validation", 2)
    assert main(["eval", "gsm8k", "--base"]) == 0
    assert calls.pop()[1] == {"tasks": ["gsm8k"], "run": None, "adapter": None, "base": True, "overrides": []}
    assert capfd.readouterr().out.startswith("rendered")


@pytest.mark.parametrize(
    ("command", "words"),
    [("export", ["--format", "patch", "--out", "p"]), ("trim", ["--forget", "0.1", "--source", "x"])],
)
def test_a_run_may_have_an_equals_sign_in_its_name(
    command: str, words: list[str], fake: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=2e-4").mkdir()
    calls = fake(command)
    assert main([command, "lr=2e-4", "seed=3", *words]) == 0
    ((args, given),) = calls
    assert given["folder"] == "lr=2e-4" and args[0].seed == 3 and given["overrides"] == ["seed=3"]


def test_bench(fake: Callable) -> None:
    calls = fake("bench")
    assert main(["bench", "seed=1", "train", "bench.steps=2"]) == 0
    assert main(["bench"]) == 0
    ((config,), keywords), (_, default) = calls
    assert (config.bench.steps, config.seed) == (2, 1)
    assert keywords == {"what": "train", "words": ["seed=1", "bench.steps=2"], "config_dirs": []}
    assert default == {"what": "train", "words": [], "config_dirs": []}


def test_report(fake: Callable) -> None:
    reported = fake("report")
    assert main(["report"]) == 0 and main(["report", "runs/a=1", "b"]) == 0
    assert reported == [(([],), {}), ((["runs/a=1", "b"],), {})]


def test_what_deepspeeds_runner_puts_first_is_dropped(fake: Callable, capfd: pytest.CaptureFixture[str]) -> None:
    """Its launcher runs `python -m sparseft --local_rank=N train …`."""
    calls = fake("train")
    assert main(["--local_rank=1", "train", "seed=3", "--json"]) == 0
    (config,), _ = calls.pop()
    assert config.seed == 3
    for words in (["--local_rank=x", "train"], ["train", "--local_rank=1"]):  # not what it writes
        assert main(words) == 2
    assert capfd.readouterr().err.count("No such option: --local_rank.") == 2


@pytest.mark.parametrize("words", [["--cfg"], ["--cfg", "job"], ["--cfg=job"]])
@pytest.mark.parametrize("command", ["train", "preprocess", "eval", "bench"])
def test_cfg_prints_the_configuration_and_runs_nothing(
    command: str, words: list[str], fake: Callable, capfd: pytest.CaptureFixture[str]
) -> None:
    calls = fake(command)
    assert main([command, *words, "seed=3", "method=lora"]) == 0
    config = from_dict(yaml.safe_load(capfd.readouterr().out))
    assert (config.seed, config.method_name, calls) == (3, "lora", [])


def test_cfg_as_json_and_with_own_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for folder, name in (("one", "a"), ("two", "b")):
        (tmp_path / folder / "model").mkdir(parents=True)
        (tmp_path / folder / "model" / f"{name}.yaml").write_text(f"name: {name}\npath: /{name}\n")
    dirs = ["--config-dir", str(tmp_path / "one"), "--config-dir", str(tmp_path / "two")]
    assert main(["train", "model=b", *dirs, "--cfg", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["model"]["path"] == "/b"


# -- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], ["trian", "Did you mean 'train'?"]),
        (["train", "--jsn"], ["--jsn", "Did you mean '--json'?"]),
        (["preprocess", "--shots", "3"], ["--shots", "Available: --cfg,"]),  # not --json, which shares its dashes alone
        (["train", "seed=1", "--multi-run"], ["--multi-run", "'--multirun'"]),
        (["train", "--trainer.max_steps=5"], ["trainer.max_steps=…"]),
        (["train", "--method", "s2ft"], ["method=…"]),
        (["train", "--learning_rate", "1e-4"], ["Did you mean 'trainer.learning_rate'?", "key=value, without dashes"]),
        (["train", "--batch-size", "4"], ["Did you mean 'trainer.batch_size'?"]),  # not eval's
        (["train", "--targets", "q_proj"], ["Did you mean 'method.targets'?"]),
        (["train", "run/config.yaml"], ["'run/config.yaml' is not a setting", "--config-dir DIR experiment=config."]),
        (["eval", "mmlu", "--shots", "five"], ["--shots", "integer"]),
        (["eval", "mmlu", "--shots", "-1"], ["eval.shots=-1", "at least 0"]),
        (["eval", "mmlu", "--shots", "5", "eval.shots=4"], ["--shots and eval.shots"]),
        (["eval"], ["No task"]),
        (["eval", "mmlu", "--run", "a", "--base"], ["--run and --base exclude each other"]),
        (["eval", "mmlu", "--run", "a", "--adapter", "b"], ["--run and --adapter exclude each other"]),
        (["train", "s2ft"], ["'s2ft' is not a setting", "key=value"]),
        (["train", "method", "s2ft"], ["'method' is not a setting", "method=…"]),
        (["preprocess", "sparsity=1.5"], ["sparsity=1.5", "between 0 and 1"]),
        (["train", "-m", "seed=interval(1,2)"], ["range("]),
        (["train", "--config-dir", "/nowhere/at/all"], ["/nowhere/at/all", "no such folder"]),
        (["bench", "trian"], ["Unknown benchmark 'trian'", "'train'"]),
        (["bench", "train", "loader"], ["One benchmark at a time"]),
        (["bench", "served"], ["Unknown benchmark 'served'"]),
        (["export", "x", "--out", "y"], ["--format is missing"]),
        (["export", "x", "y", "--format", "merged", "--out", "z"], ["One run or adapter at a time: 'y'"]),
        (["report", "--format", "html"], ["No such option: --format"]),
        (
            ["train", "--limit", "3"],
            ["No such option: --limit. Available: ", "--quiet, -m, -q. (see sparseft train --help)"],
        ),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_wrong_input_is_one_line_on_stderr(
    words: list[str], expected: list[str], as_json: bool, fake: Callable, capfd: pytest.CaptureFixture[str]
) -> None:
    for command in COMMANDS:
        fake(command)
    assert main([*words[:1], *(["--json"] if as_json and words[0] in COMMANDS else []), *words[1:]]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and "\x1b" not in err
    for part in expected:
        assert part in err


# -- exit codes and streams -------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[..., Any]:
    def run(*_: Any, **__: Any) -> Any:
        raise error

    return run


def with_checkpoint(error: BaseException) -> BaseException:
    error.last_checkpoint = "outputs/x/checkpoints/checkpoint-40"  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (UserError("data.json: line 3 has no 'output'."), 2, "error: data.json: line 3 has no 'output'.\n"),
        (RunError("the loss is not finite."), 1, "error: the loss is not finite. (--debug shows the traceback)\n"),
        (
            with_checkpoint(RunError("out of memory.")),
            1,
            "error: out of memory. The last good checkpoint is outputs/x/checkpoints/checkpoint-40.",
        ),
        (ValueError("two\nlines"), 1, "error: ValueError: two lines (--debug"),
        (KeyError("x"), 1, "error: KeyError: 'x'"),
        (MemoryError(), 1, "error: MemoryError"),
        (KeyboardInterrupt(), 130, "error: interrupted.\n"),
        (with_checkpoint(KeyboardInterrupt()), 130, "checkpoint-40"),
        (SystemExit(2), 2, ""),
        (SystemExit(0), 1, "ended early"),
        (SystemExit("no"), 1, "error: no"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, expected: str, fake: Callable, capfd: pytest.CaptureFixture[str]
) -> None:
    fake("train", raising(error))
    assert main(["train"]) == code
    out, err = capfd.readouterr()
    assert out == "" and expected in err and "Traceback" not in err


@pytest.mark.parametrize(("error", "code"), [(UserError("wrong"), 2), (ValueError("broken"), 1)])
def test_debug_shows_the_traceback(
    error: BaseException, code: int, fake: Callable, capfd: pytest.CaptureFixture[str]
) -> None:
    fake("train", raising(error))
    assert main(["train", "--debug"]) == code
    err = capfd.readouterr().err
    assert "Traceback" in err and "in run" in err


def test_debug_shows_the_traceback_of_a_refused_override(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "seed=x", "--debug"]) == 2
    assert "Traceback" in capfd.readouterr().err


def noisy(*_: Any, **__: Any) -> dict[str, Any]:
    print("printed by a library")
    os.system("echo printed by a child")
    os.write(1, b"printed by C\n")
    return {"loss": float("nan"), "best": [float("inf"), 1.5], "run": Path("outputs/x"), "text": "é"}


def test_stdout_holds_the_result_only(fake: Callable, capfd: pytest.CaptureFixture[str]) -> None:
    fake("train", noisy)
    assert main(["train", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"loss": None, "best": [None, 1.5], "run": "outputs/x", "text": "é"}
    assert out.count("\n") == 1
    for line in ("printed by a library", "printed by a child", "printed by C"):
        assert line in err


def test_numbers_of_numpy_are_json(fake: Callable, capfd: pytest.CaptureFixture[str]) -> None:
    import numpy

    result = {"a": numpy.float32(0.5), "b": numpy.int64(3), "c": numpy.float64("nan"), 4: (1, True, None)}
    fake("train", lambda config: result)
    assert main(["train", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"a": 0.5, "b": 3, "c": None, "4": [1, True, None]}


def test_a_result_that_cannot_be_shown_is_a_failure(fake: Callable, capfd: pytest.CaptureFixture[str]) -> None:
    fake("train", lambda config: {"x": object()})
    for words in (["train"], ["train", "--json"]):
        assert main(words) == 1
        out, err = capfd.readouterr()
        assert "TypeError" in err


@pytest.mark.parametrize("words", [["--help"], ["train", "--cfg"], ["train", "-m", "--cfg", "seed=range(0,4)"]])
def test_a_closed_pipe_is_no_error(words: list[str]) -> None:
    command = f"set -o pipefail; {sys.executable} -m sparseft {' '.join(map(repr, words))} | head -c 5"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, "Error" in done.stderr, "Exception" in done.stderr) == (0, False, False), done.stderr


ODD = "é 日本 \udcff \N{PILE OF POO}"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize("as_json", [True, False])
def test_what_the_streams_cannot_print_is_escaped(
    fake: Callable, monkeypatch: pytest.MonkeyPatch, encoding: str, as_json: bool
) -> None:
    """Results, tables, logs, warnings, progress and messages alike."""

    def work(config: Any) -> dict[str, Any]:
        console.log(ODD)
        console.warn(ODD)
        with console.Progress(1, ODD) as progress:
            progress.update(1)
        return {"run": ODD}

    def render(result: dict[str, Any]) -> None:
        print(result["run"])
        console.table(ODD, [ODD], [[ODD]])

    fake("train", work)
    monkeypatch.setattr(sys.modules["sparseft.commands.train"], "render", render)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["train", *(["--json"] if as_json else [])]) == 0
    assert main([f"{ODD}=1"]) == main(["train", f"{ODD}=1"]) == 2
    err.flush()
    printed, said = out.buffer.getvalue().decode(encoding), err.buffer.getvalue().decode(encoding)
    if as_json:
        assert json.loads(printed) == {"run": ODD} and printed.isascii()
    else:
        shown = ODD.encode(encoding, "backslashreplace").decode(encoding)
        assert printed.splitlines()[:3] == [shown, shown, shown]
    assert said.count("Unknown key") == 1 and "Error" not in said
    console.clear_warnings()


@pytest.mark.parametrize("words", [["--help"], ["train", "--cfg", "dataset.train_path=é日本"]])
@pytest.mark.parametrize("redirection", ["", ">&-", "2>&-", ">&- 2>&-", "<&- >&-", "| true", "2>&1 | head -1"])
def test_streams_of_any_encoding_or_none(words: list[str], redirection: str) -> None:
    command = f"set -o pipefail; {sys.executable} -m sparseft {' '.join(map(repr, words))} {redirection}"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["--help"], ["train", "--cfg"], ["train", "--cfg", "--json"]])
def test_a_full_disk_under_stdout_is_said(words: list[str]) -> None:
    command = f"{sys.executable} -m sparseft {' '.join(words)} > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "No space left" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_interrupting_a_real_process(tmp_path: Path) -> None:
    """Ctrl-C while a command works ends with 130 and no traceback."""
    code = (
        "import sys, types, importlib.machinery, os, signal\n"
        "module = types.ModuleType('sparseft.commands.report')\n"
        "module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)\n"
        "module.run = lambda runs: os.kill(os.getpid(), signal.SIGINT) or __import__('time').sleep(30)\n"
        "sys.modules[module.__name__] = module\n"
        "from sparseft.cli.app import main\n"
        "sys.exit(main(['report']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=30)
    assert (done.returncode, done.stderr) == (130, "error: interrupted.\n")


def test_from_another_folder(tmp_path: Path) -> None:
    done = in_a_process("train", "--cfg", "model=gpt2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["model"]["name"] == "gpt2"
    assert list(tmp_path.iterdir()) == []


# -- sweeps -----------------------------------------------------------------------------------------------------------


def fails_for_seed_1(config: Any, **_: Any) -> dict[str, Any]:
    if config.seed == 1:
        raise RunError("no luck.")
    return {"run": config.output_dir, "seed": config.seed}


def test_a_sweep_goes_on_past_a_failing_point(fake: Callable, capfd: pytest.CaptureFixture[str]) -> None:
    calls = fake("train", fails_for_seed_1)
    assert main(["train", "-m", "seed=0,1,2", "output_dir=out"]) == 1
    assert [(config.seed, config.output_dir) for (config,), _ in calls] == [(0, "out/0"), (1, "out/1"), (2, "out/2")]
    out, err = capfd.readouterr()
    assert out.splitlines()[-3:] == [
        "point 0: seed=0 done, out/0",
        "point 1: seed=1 failed with exit code 1: no luck. (--debug shows the traceback)",
        "point 2: seed=2 done, out/2",
    ]
    assert out.count("rendered") == 2
    assert "point 1 (2 of 3): seed=1" in err and "error: no luck." in err


def test_a_sweep_as_json(fake: Callable, capfd: pytest.CaptureFixture[str]) -> None:
    fake("train", fails_for_seed_1)
    assert main(["train", "--json", "--multirun", "seed=range(0,2)", "scope='a b',mlp", "method=s2ft"]) == 1
    content = json.loads(capfd.readouterr().out)["points"]
    assert [point["exit_code"] for point in content] == [0, 0, 1, 1]
    assert content[0]["overrides"] == ["seed=0", "scope='a b'"]
    assert content[0]["result"] == {"run": None, "seed": 0}
    assert content[2]["error"].startswith("no luck.") and "result" not in content[2]


def test_the_worst_exit_code_of_a_sweep(fake: Callable, capfd: pytest.CaptureFixture[str]) -> None:
    calls = fake("train", fails_for_seed_1)
    assert main(["train", "-m", "seed=0,1,-5,2"]) == 2
    assert [config.seed for (config,), _ in calls] == [0, 1, 2]
    assert "seed=-5" in capfd.readouterr().err


def test_an_interrupt_ends_a_sweep(fake: Callable, capfd: pytest.CaptureFixture[str]) -> None:
    calls = fake("train", raising(KeyboardInterrupt()))
    assert main(["train", "-m", "seed=0,1"]) == 130
    assert len(calls) == 1


def test_swept_output_folders_stay_as_they_are(fake: Callable) -> None:
    calls = fake("eval")
    assert main(["eval", "mmlu", "-m", "output_dir=a,b"]) == 0
    assert [keywords["overrides"] for _, keywords in calls] == [["output_dir=a"], ["output_dir=b"]]
    calls.clear()
    assert main(["eval", "mmlu", "-m", "seed=0,1", "output_dir=o"]) == 0
    assert [config.output_dir for (config,), _ in calls] == ["o/0", "o/1"]
    assert calls[1][1]["overrides"] == ["seed=1", "output_dir=o", "output_dir=o/1"]


def test_swept_output_folders_with_several_points_are_numbered(fake: Callable) -> None:
    """Or the second point would take the first one's place, where it may overwrite."""
    calls = fake("train")
    assert main(["train", "-m", "output_dir=a,b", "seed=0,1", "overwrite=true"]) == 0
    assert [config.output_dir for (config,), _ in calls] == ["a/0", "a/1", "b/2", "b/3"]


def test_the_configurations_of_a_sweep(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-m", "--cfg", "method=s2ft,full"]) == 0
    documents = list(yaml.safe_load_all(capfd.readouterr().out))
    assert [from_dict(document).method_name for document in documents] == ["s2ft", "full"]


# -- the console ------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], tuple[Terminal, Terminal]]]:
    """`out, err = terminal()` makes stdout and stderr terminals of 80 columns."""

    def install() -> tuple[Terminal, Terminal]:
        out, err = Terminal(), Terminal()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        return out, err

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    console._console.cache_clear()
    yield install
    console._console.cache_clear()


def test_log_and_warn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    console.clear_warnings()
    console.log("reading [data] " + "x" * 200)
    console.warn("small block")
    monkeypatch.setenv("SPARSEFT_QUIET", "1")
    console.log("unheard")
    console.warn("heard")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "reading [data] " + "x" * 200 + "\nwarning: small block\nwarning: heard\n"
    assert console.recorded_warnings() == ["small block", "heard"]
    console.clear_warnings()
    assert console.recorded_warnings() == []


def test_log_on_a_terminal_keeps_long_lines_whole(terminal: Callable) -> None:
    _, err = terminal()
    console.log("[bold]path[/] /" + "x" * 200)
    console.warn("careful")
    text = err.getvalue()
    assert "[bold]path[/] /" + "x" * 200 + "\n" in text
    assert "\x1b[33mwarning: careful" in text
    console.clear_warnings()


def test_a_path_that_cannot_be_used_is_wrong_input_until_work_has_begun() -> None:
    with pytest.raises(OSError) as raised:
        Path("a" * 300).exists()
    found = outcome_of(raised.value)
    assert (found.code, found.message) == (2, f"'{'a' * 80}…' cannot be used: File name too long.")
    denied = PermissionError(errno.EACCES, "Permission denied", "/root/run")
    assert outcome_of(denied).message == "'/root/run' cannot be used: Permission denied."
    assert outcome_of(PermissionError(errno.EACCES, "Permission denied")).code == 1  # of no path
    note_checkpoint(denied, None)
    assert outcome_of(denied).code == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_stderr_changes_no_exit_code() -> None:
    command = f"{sys.executable} -m sparseft train nonsense=1 2> /dev/full"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT).returncode == 2


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.EIO, "Input/output error")])
def test_a_closed_stderr_does_not_end_a_run(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    monkeypatch.setattr(sys, "stderr", Closed())
    console.log("one")
    console.log("two")


ROWS = [["full", 1.23456, 1024, None], ["a method with a very long name " * 5, 0.5, 7, None]]


def test_a_plain_table_is_aligned_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    console.table("Step times", ["method", "seconds", "bytes", "note"], ROWS)
    title, header, rule, first, second = capsys.readouterr().out.splitlines()
    assert title == "Step times" and set(rule) == {"-", " "}
    assert ROWS[1][0] in second
    assert first.split() == ["full", "1.235", "1024", "-"]
    assert header.index("seconds") + len("seconds") == first.index("1.235") + len("1.235")
    with pytest.raises(ValueError, match="3 columns"):
        console.table("t", ["a", "b", "c"], [[1]])


def test_a_table_on_a_terminal_cuts_nothing_off(terminal: Callable) -> None:
    out, _ = terminal()
    console.table("Step times", ["method", "seconds", "bytes", "note"], ROWS)
    text = out.getvalue()
    assert "…" not in text and "1.235" in text
    assert sum(line.count("name") for line in text.splitlines()) == 5


@pytest.mark.parametrize("width", [30, 60, 80, 200])
def test_a_table_on_a_narrow_terminal_breaks_no_number(
    width: int, terminal: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = terminal()
    monkeypatch.setenv("COLUMNS", str(width))
    columns = ["method", "step ms", "p20-p80", "÷ floor", "tokens/s", "peak MiB", "trainable"]
    console.table("t", columns, [["lora rank=16", "10.25", "10.1-10.5", "1.00", "12,345", "1,234.5", "12,345,678"]])
    words = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()).split()
    assert {"10.25", "10.1-10.5", "12,345", "1,234.5", "12,345,678", "rank=16", "trainable"} <= set(words)


@pytest.mark.parametrize("width", [30, 60])
def test_a_table_too_wide_for_a_terminal_is_stacked(
    width: int, terminal: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = terminal()
    monkeypatch.setenv("COLUMNS", str(width))
    columns = ["task", "base", "adapter", "difference", "p", "samples"]
    console.table("Evaluated: r", columns, [["mmlu_high_school_government", "0.25", "0.26", "+0.01 ± 0.02", "1", 57]])
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["Evaluated: r", "mmlu_high_school_government"] and max(map(len, lines)) <= width
    for text in ("base 0.25", "difference +0.01 ± 0.02", "samples 57"):
        assert any(text in line for line in lines)


def test_plain_progress_is_a_line_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with console.Progress(50, "train", plain_line_seconds=1e9, plain_line_pause=0) as progress:
        for step in range(1, 51):
            progress.update(step, loss=2.0 / step, tokens_per_second=12345.6)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 10
    assert lines[0] == "train: 5/50 steps (10 %), loss 0.4, 12,346 tokens/s"
    assert lines[-1] == "train: 50/50 steps, loss 0.04, 12,346 tokens/s, in 0:00"


def test_plain_progress_of_a_quick_loop_is_its_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with console.Progress(50, "calibrate", unit="sample") as progress:
        for done in range(1, 51):
            progress.update(done)
    assert capsys.readouterr().err.splitlines() == ["calibrate: 50/50 samples, in 0:00"]


def test_plain_progress_by_the_clock(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.Progress(1000, "train", initial=500) as progress:
        for step in range(501, 511):
            now[0] += 4.0
            progress.update(step)
    lines = capsys.readouterr().err.splitlines()
    # After 12, 24 and 36 seconds, then at the end; four seconds a step, the steps before the resumption not counted.
    assert lines[0] == "train: 503/1000 steps (50 %), 33:08 left"
    assert [line.split()[1] for line in lines] == ["503/1000", "506/1000", "509/1000", "510/1000"]


def test_progress_is_quiet_on_demand(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEFT_QUIET", "1")
    with console.Progress(2, "train") as progress:
        progress.update(1)
        progress.update(2)
    assert capsys.readouterr().err == ""


def test_a_progress_is_heard_where_it_began_though_what_goes_on_inside_is_quiet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with console.Progress(2, "train") as progress, console.quiet():
        console.log("a step")
        with console.Progress(1, "step") as inner:
            inner.update(1)
        progress.update(2)
    assert capsys.readouterr().err.splitlines() == ["train: 2/2 steps, in 0:00"]


def test_progress_on_a_terminal(terminal: Callable) -> None:
    out, err = terminal()
    with console.Progress(4, "train") as progress:
        progress.update(2, loss=1.25, tokens_per_second=812.0)
        console.log("a line above the bar")
        progress.update(4, loss=1.0, tokens_per_second=900.0)
    text = err.getvalue()
    assert out.getvalue() == ""
    assert "4/4" in text and "loss 1" in text and "900 tokens/s" in text and "a line above the bar\n" in text


@pytest.mark.parametrize("width", [40, 60, 100])
def test_progress_is_one_line_at_any_width(width: int, terminal: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal()
    progress = console.Progress(1000, "a long description", initial=100)
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with progress:
        for step in range(101, 121):
            now[0] += 4.0
            progress.update(step, loss=2.31, tokens_per_second=12345.0)
        line = progress.live_line(width, ascii_only=False).plain
    assert len(line) <= width and "120/1000 steps" in line and "58:40 left" in line
    assert ("12,345 tokens/s" in line) == (width >= 100)


def test_the_live_line_leaves_room_for_what_a_ctrl_c_echoes(terminal: Callable) -> None:
    _, err = terminal()
    with console.Progress(4, "a very long description " * 20) as progress:
        progress.update(2)
    live = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", err.getvalue()).replace("\r", "\n").splitlines()
    assert max(len(line) for line in live if "…" in line) == 80 - len("^C") - 1


def test_a_log_file_has_no_control_characters_and_says_each_thing_once(capsys: pytest.CaptureFixture[str]) -> None:
    with console.Progress(20, "train", plain_line_pause=0) as progress:
        for step in range(1, 21):
            progress.update(step, loss=2.0)
            if step % 10 == 0:
                with console.working("saving"), console.Progress(3, "evaluate", keeps=False) as inner:
                    inner.update(3)
                console.log(f"step {step}: eval loss 2.0")
    lines = capsys.readouterr().err.splitlines()
    assert not any(character in line for line in lines for character in "\r\x1b\t")
    assert len(lines) == len(set(lines)) == 12  # nine tenths, two evaluations, the end
    assert lines[-1] == "train: 20/20 steps, loss 2, in 0:00"


def test_a_step_without_a_count_is_said_once_it_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with console.working("loading m"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(console, "PLAIN_LINE_SECONDS", 0.05)
    with console.working("loading m"):
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4 and set(lines) == {"loading m: 0:00 so far"}  # after 0.05, 0.1 and 0.2 s


def test_a_quiet_part_leaves_the_progress_around_it_alone(terminal: Callable) -> None:
    _, err = terminal()
    with console.Progress(2, "bench") as around:
        with console.quiet(), console.Progress(9, "hidden") as inner, console.working("hidden too"):
            inner.update(9)
        around.update(2)
    assert "hidden" not in err.getvalue() and "bench: 2/2 steps, in 0:00" in err.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (61, "1:01"), (3723, "1:02:03")])
def test_duration(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


def test_quiet_silences_progress_and_logs_of_one_command(fake: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    def work(config: Any) -> dict[str, Any]:
        console.log("a log line")
        console.warn("a warning")
        with console.Progress(1, "train") as progress:
            progress.update(1)
        return {}

    fake("train", work)
    assert main(["train", "--quiet", "--json"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("{}\n", "warning: a warning\n")
    assert main(["train"]) == 0  # the next one speaks again
    assert "a log line\n" in capsys.readouterr().err
    console.clear_warnings()

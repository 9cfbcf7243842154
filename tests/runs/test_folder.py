"""Run folders: written whole, refused or replaced safely, found again."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from sparseft.errors import UserError
from sparseft.files import atomic
from sparseft.runs import environment
from sparseft.runs import folder as runs
from sparseft.runs import metrics as runs_metrics


def make_run(folder: Path, **summary: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "summary.json").write_text(json.dumps({"method": "full", **summary}))
    return folder


# -- writing ----------------------------------------------------------------------------------------------------------


def test_json_is_strict_and_complete(tmp_path: Path) -> None:
    content = {
        "nan": math.nan,
        "list": [math.inf, 1.5, (2, -math.inf)],
        "numpy": numpy.float32(0.5),
        "count": numpy.int64(3),
        "path": tmp_path,
        "text": "naïve 日本 </script>",
        "half": "\ud800",
        "flag": True,
    }
    path = atomic.write_json(tmp_path / "x.json", content)
    text = path.read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {
        "nan": None,
        "list": [None, 1.5, [2, None]],
        "numpy": 0.5,
        "count": 3,
        "path": str(tmp_path),
        "text": "naïve 日本 </script>",
        "half": "\ud800",
        "flag": True,
    }


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = atomic.write_text(tmp_path / "x.txt", "old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        atomic.write_text(path, "new")
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["x.txt"]


def test_what_json_cannot_hold_is_an_error_not_a_guess(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        atomic.write_json(tmp_path / "x.json", {"set": {1, 2}})
    assert list(tmp_path.iterdir()) == []


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    written = atomic.write_text(tmp_path / "x", "")
    assert written.stat().st_mode == (tmp_path / "plain").stat().st_mode


# -- a new run's folder -----------------------------------------------------------------------------------------------


def test_default_folders_are_unique_within_a_second(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "timestamp", lambda: "20260131-235959")
    made = [runs.prepare_run_folder(None, "full", "my data/1") for _ in range(3)]
    assert [str(run) for run in made] == [
        "outputs/20260131-235959-full-my_data_1",
        "outputs/20260131-235959-full-my_data_1-2",
        "outputs/20260131-235959-full-my_data_1-3",
    ]
    assert all(run.is_dir() for run in made)


def test_timestamp_sorts_and_has_no_separators_of_paths() -> None:
    assert re.fullmatch(r"\d{8}-\d{6}", runs.timestamp())


@pytest.mark.parametrize("mark", ["config.yaml", "summary.json", "metrics.jsonl", "adapter"])
def test_a_folder_with_a_run_is_refused(tmp_path: Path, mark: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / mark).mkdir() if mark == "adapter" else (run / mark).write_text("{}")
    with pytest.raises(UserError, match=r"already holds a run.*trainer\.resume=auto.*overwrite=true"):
        runs.prepare_run_folder(str(run), "full", "json")
    assert runs.prepare_run_folder(str(run), "full", "json", resume=True) == run
    assert (run / mark).exists()


def test_a_folder_with_other_files_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert runs.prepare_run_folder(str(tmp_path), "full", "json") == tmp_path
    assert [item.name for item in tmp_path.iterdir()] == ["notes.txt"]  # nor does the check leave anything


def test_overwrite_deletes_the_old_run_and_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    old = """
        environment.json metrics.jsonl report.html selection/selection.json selection/selection.safetensors
        adapter/adapter_config.json adapter/adapter_model.safetensors adapter/model-00001-of-00002.safetensors
        adapter/tokenizer_config.json checkpoints/checkpoint-10/optimizer.pt checkpoints/checkpoint-10/deep/er
        eval/mmlu.json eval/mmlu.samples.jsonl eval/before/mmlu.json eval/mt_bench/model_answer/run.jsonl
        train_questions.safetensors .summary.json.12-ab.partial checkpoints/.partial-k2x9/checkpoint-20/optimizer.pt
        checkpoints/.best/adapter/adapter_model.safetensors .adapter.k2x9/adapter_model.safetensors
    """.split()
    mine = ["notes.txt", "eval/plot.png", "checkpoints/best/weights", "checkpoints/checkpoint-x/a"]
    for name in (*old, *mine):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    assert runs.prepare_run_folder(str(run), "full", "json", overwrite=True) == run
    left = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    assert left == sorted(mine)
    assert not (run / "selection").exists() and not (run / "eval/before").exists()


def test_an_interrupted_overwrite_leaves_the_old_run_or_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is interrupted: a new run would go on from a checkpoint that it finds."""

    def interrupted(plain: Callable[..., Any]) -> Callable[..., Any]:
        def delete(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return plain(*args, **options)

        return delete

    for count in range(99):
        run = make_run(tmp_path / str(count))
        (run / "metrics.jsonl").write_text("")
        for name in ("checkpoints/checkpoint-1", "checkpoints/checkpoint-2", "checkpoints/.best"):
            (run / name).mkdir(parents=True)
        left = [count]
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", interrupted(Path.unlink))
            patch.setattr(shutil, "rmtree", interrupted(shutil.rmtree))
            try:
                runs.prepare_run_folder(str(run), "full", "json", overwrite=True)
            except KeyboardInterrupt:
                assert (run / "config.yaml").is_file()
            else:
                break
    assert count > 5 and list(run.iterdir()) == []


def test_checkpoints_alone_are_not_taken_for_a_new_runs(tmp_path: Path) -> None:
    """As an overwrite that was interrupted could leave them."""
    (tmp_path / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    for resume in (False, True):
        with pytest.raises(UserError, match=r"holds 'checkpoints/checkpoint-5' of a run that is not.*overwrite=true"):
            runs.prepare_run_folder(str(tmp_path), "full", "json", resume=resume)
    runs.prepare_run_folder(str(tmp_path), "full", "json", overwrite=True)
    assert not (tmp_path / "checkpoints" / "checkpoint-5").exists()


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_what_the_adapter_could_not_take_the_place_of_is_refused_before_the_work(
    tmp_path: Path, options: dict[str, bool]
) -> None:
    run = make_run(tmp_path / "run")
    (run / "adapter").mkdir()
    (run / "adapter" / "my notes.md").write_text("mine")
    before = sorted(run.rglob("*"))
    with pytest.raises(UserError, match="adapter" if options else "already holds a run"):
        runs.prepare_run_folder(str(run), "full", "json", **options)
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_links_that_lead_out_of_the_folder_are_refused_at_the_start(tmp_path: Path, options: dict[str, bool]) -> None:
    """As they are where a run is continued or read."""
    (tmp_path / "scratch" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "scratch")
    with pytest.raises(UserError, match=r"'.*run/checkpoints' is a link that leads out of the run's folder"):
        runs.prepare_run_folder(str(tmp_path / "run"), "full", "json", **options)
    assert (tmp_path / "scratch" / "checkpoint-5").is_dir()


def test_overwrite_never_follows_a_link(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "checkpoint-5").mkdir(parents=True)
    (elsewhere / "checkpoint-5/weights").write_text("precious")
    (elsewhere / "selection.json").write_text("precious")
    (run / "checkpoints").symlink_to(elsewhere)
    (run / "selection").symlink_to(elsewhere)
    runs.prepare_run_folder(str(run), "full", "json", overwrite=True)
    assert (elsewhere / "checkpoint-5/weights").read_text() == "precious"
    assert (elsewhere / "selection.json").read_text() == "precious"
    assert list(run.iterdir()) == []


def test_overwrite_leaves_links_behind_a_link_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/before").symlink_to(tmp_path / "theirs")
    (run / "eval").symlink_to(tmp_path / "elsewhere")
    runs.prepare_run_folder(str(run), "full", "json", overwrite=True)
    assert (tmp_path / "elsewhere/before").is_symlink()
    assert list(run.iterdir()) == []


def test_unusable_folders_are_refused_with_the_reason(tmp_path: Path, in_tmp: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        runs.prepare_run_folder(str(tmp_path / "file"), "full", "json")
    with pytest.raises(UserError, match="cannot write to output_dir.*Not a directory"):
        runs.prepare_run_folder(str(tmp_path / "file" / "run"), "full", "json")
    with pytest.raises(UserError, match="output_dir is empty"):
        runs.prepare_run_folder(" ", "full", "json")
    with pytest.raises(UserError, match=r"trainer\.resume needs output_dir"):
        runs.prepare_run_folder(None, "full", "json", resume=True)
    Path("outputs").write_text("in the way")
    with pytest.raises(UserError, match="the folder of runs 'outputs' is a file"):
        runs.check_run_folder(None)  # before anything is loaded


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that refuses writes even to root")
def test_a_folder_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(UserError, match="cannot write to output_dir '/proc/self'"):
        runs.prepare_run_folder("/proc/self", "full", "json")


# -- finding runs -----------------------------------------------------------------------------------------------------


def test_latest_links_to_the_run_started_last(in_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(UserError, match="no run yet.*sparseft train"):
        runs.latest_run()
    first = make_run(in_tmp / "outputs/a")
    far = make_run(tmp_path_factory.mktemp("far") / "run")
    runs.link_latest(first)
    assert os.readlink("outputs/latest") == "a"  # relative: survives moving the working directory
    assert runs.latest_run() == Path("outputs/a")
    runs.link_latest(far)
    assert runs.latest_run() == far.resolve()
    runs.link_latest(Path("outputs/a"))
    assert runs.latest_run() == Path("outputs/a")
    runs.link_latest(make_run(in_tmp / "elsewhere/b"))
    assert runs.latest_run() == Path("elsewhere/b")
    assert sorted(item.name for item in Path("outputs").iterdir()) == ["a", "latest"]  # nothing left aside


def test_latest_in_outputs_that_lie_elsewhere(in_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("scratch")
    Path("outputs").symlink_to(place)
    runs.link_latest(make_run(in_tmp / "mine"))
    assert runs.latest_run() == Path("mine")
    runs.link_latest(make_run(in_tmp / "outputs/a"))
    assert os.readlink("outputs/latest") == "a" and runs.latest_run().resolve() == place / "a"


def test_latest_that_is_gone_or_empty_says_so(in_tmp: Path) -> None:
    run = make_run(in_tmp / "outputs/a")
    runs.link_latest(run)
    for item in run.iterdir():
        item.unlink()
    with pytest.raises(UserError, match="left nothing"):
        runs.latest_run()
    run.rmdir()
    with pytest.raises(UserError, match="no longer there"):
        runs.latest_run()
    runs.link_latest(make_run(in_tmp / "outputs/b"))  # a dangling link is replaced
    assert runs.latest_run() == Path("outputs/b")


def test_a_real_folder_named_latest_is_left_alone(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(in_tmp / "outputs/latest")
    runs.link_latest(make_run(in_tmp / "outputs/a"))
    assert "outputs/latest" in capsys.readouterr().err
    assert not Path("outputs/latest").is_symlink() and Path("outputs/latest/config.yaml").exists()
    with pytest.raises(UserError, match="not a link"):
        runs.latest_run()


def test_find_run_takes_a_run_or_what_lies_inside(in_tmp: Path) -> None:
    run = make_run(in_tmp / "outputs/a")
    for name in ("adapter/adapter_config.json", "checkpoints/checkpoint-5/config.yaml", "eval/before/mmlu.json"):
        (run / name).parent.mkdir(parents=True)
        (run / name).write_text("{}")
    runs.link_latest(run)
    for given in (
        "outputs/a",
        "outputs/latest",
        "outputs/a/adapter",
        "outputs/a/summary.json",
        "outputs/a/checkpoints/checkpoint-5",
        "outputs/a/eval/before/mmlu.json",
        run,
    ):
        assert runs.find_run(given) == Path("outputs/a"), given
    assert runs.find_run(make_run(in_tmp / "eval")) == Path("eval")  # a run may be named like a part of one


def test_another_adapter_inside_a_run_is_not_taken_for_its_own(in_tmp: Path) -> None:
    run = make_run(in_tmp / "outputs/a")
    others = ("checkpoints/checkpoint-5", "checkpoints/checkpoint-5/adapter", "adapter-untrimmed")
    for name in (*others, "adapter", "eval"):
        (run / name).mkdir(parents=True, exist_ok=True)
    for name in others:
        with pytest.raises(UserError, match="another adapter than the one that its run has left"):
            runs.find_run(run / name, for_adapter=True)
    for name in ("", "adapter", "eval", "checkpoints"):
        assert runs.find_run(run / name, for_adapter=True) == Path("outputs/a")
    assert runs.is_checkpoint(run / "checkpoints/checkpoint-5")
    assert not runs.is_checkpoint(run / "checkpoints") and not runs.is_checkpoint(run)
    alone = in_tmp / "models/checkpoints/checkpoint-5"  # not in a run: somebody's folder of that name
    assert not runs.is_checkpoint(make_run(alone)) and runs.find_run(alone, for_adapter=True)


def test_find_run_names_what_is_near(in_tmp: Path) -> None:
    make_run(in_tmp / "outputs/sylva-one")
    with pytest.raises(UserError, match="nothing of that name. Did you mean 'sylva-one'"):
        runs.find_run("outputs/silva-one")
    with pytest.raises(UserError, match="sparseft train"):
        runs.find_run("nowhere/at/all")
    (in_tmp / "outputs/empty").mkdir()
    with pytest.raises(UserError, match="holds no run: expected a folder with config.yaml"):
        runs.find_run("outputs/empty")


def test_load_summary(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3)
    assert runs.load_summary(run) == {"method": "full", "steps": 3}
    (run / "summary.json").write_text('{\n"steps": \n')
    with pytest.raises(UserError, match="summary.json: cannot be read as JSON .* line 3"):
        runs.load_summary(run)
    (run / "summary.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object, got list"):
        runs.load_summary(run)
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match="did not finish"):
        runs.load_summary(run)


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_round_trip_strictly(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert runs_metrics.read_metrics(path) == []
    runs_metrics.append_metrics(path, {"step": 1, "loss": 2.5})
    runs_metrics.append_metrics(path, {"step": 2, "loss": math.nan})
    assert path.read_text() == '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": null}\n'
    assert runs_metrics.read_metrics(path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}]


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"step": 2, "x": "\xe2\x82', b'{"step": 2}'])
def test_a_torn_last_line_is_left_out_and_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn)
    assert runs_metrics.read_metrics(path) == [{"step": 1}]
    runs_metrics.append_metrics(path, {"step": 3})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'
    path.write_bytes(torn)
    runs_metrics.append_metrics(path, {"step": 4})
    assert path.read_bytes() == b'{"step": 4}\n'


def test_a_broken_line_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\nnot json\n{"step": 2}\n')
    with pytest.raises(UserError, match="metrics.jsonl', line 3: not JSON"):
        runs_metrics.read_metrics(path)
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="line 1: expected one JSON object"):
        runs_metrics.read_metrics(path)


def test_truncate_metrics_cuts_back_to_the_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    runs_metrics.truncate_metrics(path, 5)  # nothing there: nothing to do
    assert not path.exists()
    for record in ({"eval_loss": 3.0}, {"step": 0, "eval_loss": 3.0}, {"step": 5}, {"step": 6}, {"step": 10}):
        runs_metrics.append_metrics(path, record)
    with open(path, "ab") as file:
        file.write(b'{"step": 1')
    runs_metrics.truncate_metrics(path, 5)
    assert path.read_text() == '{"eval_loss": 3.0}\n{"step": 0, "eval_loss": 3.0}\n{"step": 5}\n'
    runs_metrics.truncate_metrics(path, -1)  # starting anew
    assert path.read_text() == ""


# -- environment ------------------------------------------------------------------------------------------------------


def test_environment_holds_versions_and_no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import getpass
    import socket

    import torch

    monkeypatch.setattr(sys, "orig_argv", ["/x/.venv/bin/python", "/x/.venv/bin/sparseft", "train", "output_dir=a b"])
    monkeypatch.setattr(sys, "argv", ["/x/.venv/bin/sparseft", "train", "output_dir=a b"])
    found = environment.environment("cpu", "float32", 2)
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["versions"]) >= {"python", "sparseft", "transformers", "peft", "datasets", "lm_eval", "triton"}
    assert set(found["versions"]) >= {"trl", "tokenizers", "huggingface_hub", "bitsandbytes", "torchao", "gguf"}
    assert (found["device"], found["dtype"], found["world_size"]) == ("cpu", "float32", 2)
    assert found["command_line"] == "sparseft train 'output_dir=a b'"
    monkeypatch.setattr(sys, "orig_argv", ["/x/.venv/bin/python3.11", "-m", "sparseft", "train"])
    monkeypatch.setattr(sys, "argv", ["/x/sparseft/__main__.py", "train"])
    assert environment.environment("cpu", "float32", 1)["command_line"] == "python3.11 -m sparseft train"
    text = json.dumps({key: value for key, value in found.items() if key != "command_line"})
    assert socket.gethostname() not in text
    assert len(getpass.getuser()) < 3 or not re.search(rf"\b{getpass.getuser()}\b", text)


def test_commit_is_the_packages_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its own checkout: the commit, marked when changed. Inside someone else's repository: none."""
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@example.org")

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    module = tmp_path / "sparseft/environment.py"
    module.parent.mkdir()
    module.write_text("1\n")
    monkeypatch.setattr(environment, "__file__", str(module))
    assert environment.package_commit() is None  # no repository
    git("init", "-q")
    (tmp_path / "other.txt").write_text("1\n")
    git("add", "other.txt")
    git("commit", "-q", "-m", "theirs")
    assert environment.package_commit() is None  # a repository, but the package is not part of it
    git("add", ".")
    git("commit", "-q", "-m", "ours")
    assert environment.package_commit() == git("rev-parse", "HEAD")
    (tmp_path / "untracked.txt").write_text("")
    assert environment.package_commit() == git("rev-parse", "HEAD")
    module.write_text("2\n")
    assert environment.package_commit() == git("rev-parse", "HEAD") + "-dirty"

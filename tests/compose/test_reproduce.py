"""The scripts from download to table: their commands compose, and one of them runs through on a tiny model."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sparseft.compose.run_config import compose
from sparseft.evaluation.tasks import COMMONSENSE
from support.places import ROOT
from support.presets import PRESETS, SMALL

SCRIPTS = {path.stem.removeprefix("reproduce_"): path for path in (ROOT / "scripts").glob("reproduce_*.sh")}
NAMES = sorted(SCRIPTS.keys() - {"common"})


def script(name: str, *words: str, cwd: Path, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["bash", str(SCRIPTS[name]), *words], cwd=cwd, capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line[2:]) for line in text.splitlines() if line.startswith("+ ")]


def test_every_preset_is_in_one_script(tmp_path: Path) -> None:
    rows = []
    for name in NAMES:
        for words in commands(script(name, "--dry-run", cwd=tmp_path).stdout):
            if words[:2] == ["sparseft", "train"]:
                rows.append(words[2].removeprefix("experiment="))
    assert sorted(rows) == sorted(PRESETS)


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_compose(name: str, tmp_path: Path) -> None:
    """Settings and names exist, what is downloaded is what is used, and a dry run leaves nothing."""
    found = commands(script(name, "--dry-run", cwd=tmp_path, RUNS="my runs").stdout)
    fetched = {words[-2].removesuffix(".partial") for words in found if words[0] == "curl"}
    used = set()
    for words in found:
        if words[:2] == ["sparseft", "train"]:
            config = compose("train", words[2:])
            assert config.output_dir == f"my runs/{words[2].removeprefix('experiment=')}"
            used |= {config.dataset.train_path} - {None}
        elif words[:2] == ["sparseft", "eval"]:
            assert words[3] == "--run" and words[4].startswith("my runs/")
            config = compose("eval", words[5:])
            assert (config.eval.data_dir is None) == (words[2] == "mmlu")
            used |= {
                path for path in fetched if config.eval.data_dir and path.endswith(("/test.json", "question.jsonl"))
            }
    assert used == fetched
    table = found[-1]
    assert table[0] == "python" and Path(table[1]).is_file()
    assert list(tmp_path.iterdir()) == []


def test_rows_and_settings_on_the_command_line(tmp_path: Path) -> None:
    words = ("--dry-run", "lora_llama2_commonsense", "--", "hardware=1xl4", "trainer.batch_size=2", "eval.limit=5")
    train, evaluation, table = commands(script("commonsense", *words, cwd=tmp_path).stdout)[-3:]
    assert train[2] == "experiment=lora_llama2_commonsense" and train[-3:] == list(words[3:])
    assert evaluation[-2:] == ["hardware=1xl4", "eval.limit=5"]  # what is about training stays out
    assert table[-1].endswith("lora_llama2_commonsense")
    assert "no row" in script("commonsense", "lora_llama2", cwd=tmp_path, code=2).stderr
    assert "--dry-run" in script("sylva", "--help", cwd=tmp_path).stdout


@pytest.mark.slow
def test_from_data_to_table(tmp_path: Path) -> None:
    """Everything but the downloads, which lie there already; a second time nothing is trained again."""
    for task in COMMONSENSE:
        answer = {"boolq": "true", "piqa": "solution1", "hellaswag": "ending1", "winogrande": "option1"}
        records = [{"instruction": f"{task}?", "input": "", "output": "so", "answer": answer.get(task, "answer1")}]
        (tmp_path / "data" / task).mkdir(parents=True)
        (tmp_path / "data" / task / "test.json").write_text(json.dumps(records))
    records = [{"instruction": f"{n}?", "input": "", "output": f"the answer is {n}", "answer": ""} for n in range(12)]
    (tmp_path / "data" / "commonsense_170k.json").write_text(json.dumps(records))
    (tmp_path / "bin").mkdir()
    for name, words in (("sparseft", "-m sparseft"), ("python", "")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "DATA": "data",
        "RUNS": "runs",
    }
    row = "s2ft_llama2_commonsense"
    words = (row, "--", *SMALL, "trainer.eval_steps=1", "eval.max_new_tokens=2", "eval.compare_base=false")
    done = script("commonsense", *words, cwd=tmp_path, **environment)
    header, _, line = done.stdout.splitlines()[-3:]
    assert header.split(" | ")[-1] == "commonsense |" and header.count("|") == 11
    assert line.startswith(f"| {row} | ") and line.count("|") == 11
    again = script("commonsense", *words, cwd=tmp_path, **environment)
    assert f"# runs/{row} is trained already" in again.stdout
    assert again.stdout.splitlines()[-1] == line


def test_the_table(tmp_path: Path) -> None:
    def write(run: str, task: str, tasks: dict[str, object]) -> None:
        (tmp_path / run / "eval").mkdir(parents=True, exist_ok=True)
        (tmp_path / run / "eval" / f"{task}.json").write_text(json.dumps({"tasks": tasks}))

    def table(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "reproduce_table.py"), *words], cwd=tmp_path, capture_output=True,
            text=True,
        )  # fmt: skip
        return done.stdout or done.stderr

    one = {"accuracy": 0.7123, "stderr": 0.0041, "samples": 9}
    write("a", "commonsense", {"commonsense": one | {"tasks": ["boolq"]}, "boolq": one | {"stderr": None}})
    write("b", "commonsense", {"commonsense": one | {"tasks": ["piqa"]}, "piqa": one})
    assert table("commonsense", "a", "b").splitlines() == [
        "| run | boolq | piqa | commonsense |",
        "| --- | --- | --- | --- |",
        "| a | 71.2 |  | 71.2 ± 0.4 |",
        "| b |  | 71.2 ± 0.4 | 71.2 ± 0.4 |",
    ]
    write("a", "mmlu", {"mmlu": one | {"tasks": []}, "mmlu_x": one, "mmlu_stem": one | {"tasks": ["mmlu_x"]}})
    assert table("mmlu", "a").splitlines()[0] == "| run | mmlu_stem | mmlu |"
    write("a", "mt_bench", {"mt_bench": {"accuracy": None, "stderr": None, "samples": 80}})
    assert table("mt_bench", "a").splitlines()[-1] == "| a | 80 answers |"
    assert "sparseft eval mmlu --run b writes it" in table("mmlu", "b")

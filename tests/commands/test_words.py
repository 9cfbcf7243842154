"""What a user reads of a run in a log file and in a pipe."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sparseft import console
from sparseft.commands import export
from support.running import sparseft

WORDS = (
    "trainer.max_steps=2", "trainer.eval_steps=1", "trainer.save_steps=1", "trainer.max_length=64", "sparsity=0.9",
    "trainer.gradient_accumulation=1", "dataset.max_examples=24", "method.num_samples=4",
)  # fmt: skip


def test_a_run_s_log_says_each_thing_once(tmp_path: Path) -> None:
    done = sparseft(tmp_path, "train", "method=sylva", *WORDS, "output_dir=run")
    lines = done.err.splitlines()
    assert not re.search(r"[\r\x1b]", done.err) and "it/s]" not in done.err  # no bars of libraries
    assert len(lines) == len(set(lines))
    losses = [line for line in lines if "eval loss" in line]
    assert [line.split(":")[0] for line in losses] == ["eval loss before", "step 1", "step 2"]  # not "after" again
    assert len([line for line in lines if line.startswith("train: 2/2 steps, loss ")]) == 1
    told = done.out.splitlines()
    assert len(told) == 2 and told[0].startswith("sylva: eval loss ") and told[1] == "run: run"
    again = sparseft(tmp_path, "export", "run", "--format", "peft-shira", "--out", "x", "--quiet", "--json")
    result = json.loads(again.out)
    assert again.err == "" and result["format"] == "peft-shira" and result["rank"] == result["r"] > 0
    patch = sparseft(tmp_path, "export", "run", "--format", "patch", "--out", "p", "--json")
    assert json.loads(patch.out)["rank"] is None


@pytest.mark.parametrize(
    ("begins", "expected"),
    [([""], "data: 3, loss 1"), (["data: "], "data: 3, loss 1, loss 1"), ([], "data: 3, loss 1, data: 3, loss 1")],
)
def test_what_is_shared_is_said_once(begins: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with console.once(*begins):
        for words in ("data: 3", "loss 1", "data: 3", "loss 1"):
            console.log(words)
    console.log("data: 3")
    assert capsys.readouterr().err.splitlines() == [*expected.split(", "), "data: 3"]


def test_what_an_export_holds_is_said_in_units() -> None:
    lora = {"path": "x", "rank": 128, "needed": 98, "linears": 30, "target_modules": ["down_proj"], "bytes": 32448792}
    assert export.facts(lora) == ["rank 128 (98 needed)", "30 linears (down_proj)", "32.4 MB"]
    assert export.facts({"files": 1, "bytes": 1234}) == ["1 file", "1.2 kB"]
    assert export.facts({"tensors": 2, "entries": 10240, "bytes": 10**9}) == ["2 tensors", "10,240 entries", "1.0 GB"]

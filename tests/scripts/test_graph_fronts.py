"""The script that trains many contenders as CUDA graphs: its steps without a graph, its tokens, its table."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from sparseft.bench.forgetting import SPLITS
from support.places import ROOT

MODEL = str(ROOT / "sparseft" / "bundled" / "tiny")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    found = tuple(importlib.import_module(name) for name in ("graph_fronts", "front_tokens"))
    for name in ("graph_fronts", "front_tokens"):
        monkeypatch.delitem(sys.modules, name)
    return found


def write_tokens(path: Path) -> None:
    found: dict[str, np.ndarray] = {}
    random = np.random.default_rng(0)

    def put(name: str, lengths: list[int]) -> None:
        total = sum(lengths)
        found[f"{name}.ids"] = random.integers(5, 200, total).astype(np.uint16)
        found[f"{name}.labelled"] = np.concatenate([np.arange(each) >= 3 for each in lengths])
        found[f"{name}.lengths"] = np.array(lengths, np.int32)

    put("oasst1.train", [9, 12, 7, 11] * 5)
    for name in ("oasst1", "stories", "maths"):
        for split in SPLITS:
            put(f"{name}.{split}", [5, 9, 6])
    put("piqa", [6, 8, 7, 9])
    found["piqa.of"] = np.array([(2, 0), (2, 1)], np.int32)
    np.savez(path, **found)


def test_trains_and_says_how_it_compares(
    scripts: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fronts, _ = scripts
    write_tokens(tmp_path / "tokens.npz")
    monkeypatch.setitem(fronts.LENGTHS, "oasst1", 12)
    few = {
        name: fronts.dataclasses.replace(fronts.CONTENDERS[name], rates=fronts.CONTENDERS[name].rates[:1])
        for name in ("LoRA", "S2FT of o and down, sampled", "Sylva by gradient", "full")
    }
    monkeypatch.setattr(fronts, "CONTENDERS", few)
    out = tmp_path / "runs.jsonl"
    words = [
        "train",
        "--model",
        MODEL,
        "--tokens",
        str(tmp_path / "tokens.npz"),
        "--target",
        "oasst1",
        "--out",
        str(out),
    ]
    fronts.main([*words, "--steps", "5", "--seeds", "3"])
    base, *lines = map(json.loads, out.read_text().splitlines())
    assert base["contender"] == "base" and len(lines) == 3 * len(few)
    for line in lines:
        assert line["curve"].keys() == {"1", "2", "3", "4", "5"} and line["losses"] != base["losses"]
        # The curve's rows are all of the test half, which is as small as this.
        assert line["curve"]["5"] == pytest.approx(line["losses"]["oasst1.test"], rel=1e-6)
    capsys.readouterr()
    fronts.main(["table", str(out), "--levels", "0.05"])
    printed = capsys.readouterr().out
    assert "oasst1: 3 seeds" in printed and all(name in printed for name in few)
    content = out.read_bytes()
    with pytest.raises(SystemExit) as ended:
        fronts.main(words)
    assert ended.value.code == 2 and f"--out {out} exists already" in capsys.readouterr().err
    assert out.read_bytes() == content


def test_losses_are_those_of_the_model(scripts: tuple[Any, Any]) -> None:
    fronts, _ = scripts
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    rows = []
    for length in (9, 4, 6, 11):
        ids = torch.arange(5, 5 + length)
        rows.append((ids, torch.where(torch.arange(length) > 1, ids, -100)))
    sums, counts = fronts.Held(rows, torch.device("cpu"), most=20).losses(model)
    for (ids, labels), found, count in zip(rows, sums, counts, strict=True):
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        expected = F.cross_entropy(logits, labels[1:], reduction="sum")
        assert float(found) == pytest.approx(float(expected), rel=1e-5)
        assert count == (labels[1:] != -100).sum()


def test_a_step_is_the_trainers(scripts: tuple[Any, Any], tmp_path: Path) -> None:
    """One step by SparseAdamW on the drawn batch, clipped, at the first rate of the ramp."""
    fronts, _ = scripts
    write_tokens(tmp_path / "tokens.npz")
    study = fronts.Study(MODEL, tmp_path / "tokens.npz", "oasst1", torch.device("cpu"))
    training = fronts.Training(study, "full", fronts.CONTENDERS["full"], 1e-3, 0, 10)
    training.steps = 10
    oracle = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=1.0, weight_decay=0.0)
    for step, (ids, labels) in enumerate(study.drawn(0, 10)):
        loss = oracle(
            input_ids=ids, labels=labels, attention_mask=(torch.arange(ids.shape[1]) >= 0).long().expand_as(ids)
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * min(step + 1, (10 - step) / 9)
        optimizer.step()
    training.all_steps()
    for found, expected in zip(training.model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_tokens_of_a_folder(scripts: tuple[Any, Any], tmp_path: Path) -> None:
    fronts, tokens = scripts
    data = tmp_path / "data"

    def write(path: str, content: list[dict[str, Any]], lines: bool = False) -> None:
        file = data / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content))

    def problem(number: int, options: str) -> dict[str, Any]:
        asks = f"Which, {number}?\n\nAnswer format: {options}"
        return {"instruction": asks, "input": "", "output": f"the correct answer is {options.split('/')[0]}",
                "answer": options.split("/")[0]}  # fmt: skip

    for split in ("train", "test"):
        write(f"arithmetic/gsm8k/{split}.json", [problem(at, "1/2") for at in range(520)])
        for name in (*tokens.TRAINED_SETS, *tokens.UNTOUCHED_SETS):
            write(f"commonsense/{name}/{split}.json", [problem(at, "true/false") for at in range(20)])
    write("commonsense/piqa/test.json", [
        {"instruction": f"Choose: Boil {at}?\n\nSolution1: In a pot.\n\nSolution2: In a hat {at}.\n\n"
                        "Answer format: solution1/solution2", "output": "x", "answer": "solution2"}
        for at in range(6)
    ])  # fmt: skip
    chats = [{"text": f"### Human: Hello {at}### Assistant: Good day, {at}."} for at in range(60)]
    for name in ("trees100_guanaco_style_train", "openassistant_best_replies_eval"):
        write(f"oasst1/{name}.jsonl", chats, lines=True)
    (data / "text").mkdir()
    (data / "text" / "tinystories.txt").write_text("\n\n".join(f"Once upon a time, {at}." for at in range(40)))
    tokens.main(["--model", MODEL, "--data", str(data), "--out", str(tmp_path / "tokens.npz")])
    found = np.load(tmp_path / "tokens.npz")
    assert found["piqa.of"].tolist() == [[2, 1]] * 6 and len(found["piqa.lengths"]) == 12
    assert found["asked.of"].tolist() == [[2, 0]] * 60 and len(found["asked.lengths"]) == 120
    own = {tuple(ids.tolist()) for ids, _ in fronts.rows_of(found, "oasst1.train")}
    held = {tuple(ids.tolist()) for split in SPLITS for ids, _ in fronts.rows_of(found, f"oasst1.{split}")}
    assert len(own) == 45 and len(held) == 15 and not own & held

"""The script that asks every export of a run 50 prompts: what it counts is what a greedy decoder would answer."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sparseft.export.proof import HuggingFace
from support import exported
from support.places import ROOT


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("export_answers")
    sys.path.remove(str(ROOT / "scripts"))


def lines(script: Any, capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[float, int]]:
    """Of each model that was asked: the largest difference, and how many answers are alike."""
    found = re.findall(r"^  ([\w-]+| the base).*?: logits differ by up to (\S+) .*, (\d+) of \d+ answers alike",
                       capsys.readouterr().out.replace("  the base", "  base"), re.M)  # fmt: skip
    return {name: (float(largest), int(alike)) for name, largest, alike in found}


def test_every_export_answers_alike_and_the_base_does_not(script, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(script, "questions", lambda count: ["Who are you?", "One, two, three,", "Once upon a"][:count])
    model = exported.saved_model("llama", tmp_path / "model", torch.bfloat16)
    adapter = exported.adapter(model, tmp_path / "adapter")
    script.main([str(adapter), str(tmp_path / "out"), "--prompts", "3"])
    found = lines(script, capsys)
    assert found.keys() >= {"base", "peft-lora", "merged", "patch", "peft-shira"}
    changed, same = found.pop("base")
    assert changed > 0.1 and same < 3
    assert all(largest < 1e-3 * changed and alike == 3 for largest, alike in found.values())


def test_one_pass_counts_what_a_greedy_decoder_answers(script, tmp_path, capsys) -> None:
    """The oracle: every model's own answer, one token after another, each with a pass over all before it."""
    model = exported.load(exported.saved_model("llama", tmp_path / "model"))
    prompts = [[5, 9, 11 + number] for number in range(8)]
    texts = [script.answered(model, ids) for ids in prompts]
    wanted = script.asked(HuggingFace(model, ""), texts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.003 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        same = 0
        for text, ids in zip(texts, prompts, strict=True):
            answer = list(ids)
            while len(answer) < len(text.ids):
                answer.append(int(model(torch.tensor([answer]), use_cache=False).logits[0, -1].argmax()))
            same += answer == text.ids
    script.report("other", texts, script.asked(HuggingFace(model, ""), texts), wanted)
    assert 0 < same < 8, "too easy"
    assert f" {same} of 8 answers alike" in capsys.readouterr().out

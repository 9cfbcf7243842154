"""The script that holds the structures of second moments against the exact choice."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from support.places import ROOT


def test_structures_beside_the_exact_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = importlib.import_module("structure_overlap")
    monkeypatch.delitem(sys.modules, "structure_overlap")
    words = ["method=sylva", "sparsity=0.95", "method.block_size=16", "method.num_samples=4", f"cache_dir={tmp_path}"]
    rows = {row[0]: row[1:] for row in script.main(["--structures", "multilevel,hodlr:2", *words])}
    assert list(rows) == ["dense", "multilevel", "hodlr:2", "mean gradient"]
    assert rows["dense"][:2] == [1.0, 1.0]
    assert rows["multilevel"][0] > 0.9 > rows["mean gradient"][0]
    assert rows["dense"][2] == rows["multilevel"][2] == "0 of 44" != rows["hodlr:2"][2]
    printed = capsys.readouterr().out
    assert "28 linears, 4 samples" in printed and "down_proj" in printed

"""`sparseft bench loader`: what it measures and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparseft.bench import loader
from support.running import on, sparseft, write_data


def test_the_table_and_bench_json_agree(tmp_path: Path, model_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "REPEATS", 1)
    words = on(model_folder("llama"), write_data(tmp_path)["json"])
    monkeypatch.setattr(loader, "TARGET", 1e-9)  # not what this is about
    done = sparseft(tmp_path, "bench", "loader", *words, "output_dir=bench")
    result = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert (result["examples"], result["max_length"], result["batch_size"]) == (24, 96, 2)
    stages = result["stages"]
    assert list(stages) == ["tokenise", "cached", "pack", "collate", "collate, 2 workers", "all, first epoch"]
    total = sum(stages[name]["seconds"] for name in ("tokenise", "pack", "collate"))
    assert stages["all, first epoch"]["seconds"] == pytest.approx(total)
    for name, stage in stages.items():
        assert stage["tokens_per_second"] == pytest.approx(result["tokens"] / stage["seconds"])
        assert any(line.startswith(name) for line in done.out.splitlines())
    assert "an assumption: 3,957 tokens/s, 6.7 billion parameters x 6 operations at 40% of 400 TFLOP/s" in done.out
    assert not (tmp_path / ".cache").exists()  # measured in a folder of its own, so that nothing was cached before


def test_a_small_vocabulary_does_not_flatter() -> None:
    # By hand: 100,000 tokens of 2 characters in a second are worth 50,000 of 4; more characters count for no more.
    half, whole = loader._stage(100_000, 1.0, 2.0), loader._stage(100_000, 1.0, 5.0)
    assert half["ratio_to_needed"] == pytest.approx(50_000 / (0.4 * 400e12 / (6 * 6_738_415_616)))
    assert whole["ratio_to_needed"] == pytest.approx(2 * half["ratio_to_needed"])
    assert (half["met"], whole["met"]) == (False, True)


def test_a_stage_below_the_target_fails(tmp_path: Path, model_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "REPEATS", 1)
    monkeypatch.setattr(loader, "TARGET", 1e9)
    words = on(model_folder("llama"), write_data(tmp_path)["json"])
    done = sparseft(tmp_path, "bench", "loader", *words, "output_dir=bench", code=1)
    assert "6 of 6 stages below the target: tokenise; cached;" in done.err
    assert json.loads((tmp_path / "bench" / "bench.json").read_text())["stages"]["cached"]["met"] is False

"""What is said of a run before it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparseft.compose.run_config import compose
from sparseft.training.job import set_up as module
from sparseft.training.job.set_up import set_up
from support.running import on, write_data


@pytest.mark.parametrize(
    ("words", "times", "ways"),
    [
        (["dataset.eval_fraction=0.5", "trainer.max_steps=1"], 3.0, ["dataset.eval_fraction", "trainer.eval_steps=0"]),
        (
            ["dataset.eval_fraction=0.5", "trainer.eval_steps=2"],
            1.5,
            ["dataset.eval_fraction", "a larger trainer.eval"],
        ),
        (["dataset.eval_path={}", "trainer.eval_steps=1"], 6.0, ["dataset.eval_path", "a larger trainer.eval_steps"]),
        (["dataset.eval_fraction=0.5", "trainer.eval_steps=0"], 0, []),
        (["dataset.eval_fraction=0.5", "trainer.num_epochs=11"], 0, []),
        (["dataset.eval_fraction=0.4", "trainer.max_steps=1"], 0, []),  # few examples
    ],
)
def test_evaluations_that_take_much_of_a_run_are_warned_of(
    words: list[str], times: float, ways: list[str], tmp_path: Path, model_folder: Any,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A step takes 4 examples, here of much the same length."""
    monkeypatch.setattr(module, "MANY", 12)
    data = write_data(tmp_path)["json"]
    words = [word.format(data) for word in words]
    capsys.readouterr()
    set_up(compose("train", [*on(model_folder(), data), f"cache_dir={tmp_path}", *words]), None)
    said = [line for line in capsys.readouterr().err.splitlines() if "each evaluation reads" in line]
    assert len(said) == bool(times)
    for line in said:
        assert float(line.partition(" times")[0].split()[-1]) == pytest.approx(times, rel=0.1), line
        assert all(way in line for way in ways), line

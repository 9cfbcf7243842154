"""The gain at an export, where the run's own data cannot be read any more."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from sparseft.compose.run_config import compose, to_yaml
from sparseft.config import ModelConfig
from sparseft.export import gain as module
from sparseft.export.gain import gain
from sparseft.models.loading import load_tokenizer


def test_what_fails_costs_no_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out examples without an answer, say, or a model that does not fit any more."""
    monkeypatch.setattr(module, "_measured", lambda *_: 1 / 0)
    assert gain(SimpleNamespace(), tmp_path, "trained") is None
    assert "survived is not measured: division by zero" in capsys.readouterr().err


def test_data_that_are_gone_cost_no_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = compose("train", ["dataset=json", "hardware=cpu"])
    own.dataset.train_path = str(tmp_path / "gone.jsonl")
    (tmp_path / "config.yaml").write_text(to_yaml(own))
    model = ModelConfig(path=own.model.path)
    source = SimpleNamespace(
        beside=model, tokenizer=load_tokenizer(model), config=own,
        target=SimpleNamespace(folder=tmp_path, adapter=tmp_path, model=model),
    )  # fmt: skip
    assert gain(source, tmp_path, "trained") is None
    assert "survived is not measured" in (told := capsys.readouterr().err) and "gone.jsonl" in told

"""LoRA and DoRA: the rank that a sparsity comes to."""

from __future__ import annotations

import pytest

from sparseft import DoraConfig, LoraConfig, attach
from sparseft.methods.lora import rank_for
from sparseft.models.spec import ModelSpec
from support.experts import build


def test_a_rank_beyond_what_a_linear_has_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Sparsity counts the experts of a mixture, which LoRA does not train: all of the rank goes to the attention."""
    attach(build("mixtral"), LoraConfig(sparsity=0.95))
    assert "warning" not in capsys.readouterr().err
    for config in (LoraConfig(sparsity=0.5), DoraConfig(sparsity=0.5)):
        model = build("mixtral")
        spec = ModelSpec.of(model)
        rank = rank_for(spec, config)
        attach(model, config)
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        assert rank > 24 and len(said) == 1
        assert f"sparsity=0.5 asks for rank {rank}, and the smallest linear" in said[0]
        assert "k_proj, has rank 24: " in said[0]
    attach(build("mixtral"), LoraConfig(rank=30))
    assert "warning" not in capsys.readouterr().err

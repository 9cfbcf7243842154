"""`load_state_dict` of attached models: deltas without a place, and states of another base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import sparseft
from sparseft.errors import UserError
from sparseft.layers import sparse_layers
from support.models import build_model

CONFIG = sparseft.S2FTConfig(sparsity=0.9, importance="random")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 15)[None]).logits


def trained(model: Any) -> Any:
    """The model with deltas that are not zero."""
    with torch.no_grad():
        for parameter in sparseft.trainable_parameters(model).values():
            parameter.fill_(0.05)
    return model.eval()


@pytest.mark.parametrize("strict", [True, False])
def test_deltas_without_a_place_are_refused_before_anything_is_loaded(strict: bool) -> None:
    base = logits(build_model("llama"))
    model = trained(sparseft.attach(build_model("llama"), CONFIG))
    answer, state = logits(model), copy.deepcopy(model.state_dict())
    sparseft.set_adapter(model, None)
    holder = torch.nn.ModuleDict({"module": model})  # as DDP and averages hold it
    for loaded, held in ((model, state), (holder, {f"module.{name}": value for name, value in state.items()})):
        with pytest.raises(UserError, match=r"^load_state_dict: '.*\.delta' has no place here"):
            loaded.load_state_dict(held, strict=strict)
        assert torch.equal(logits(model), base)
    sparseft.set_adapter(model, "default")
    model.load_state_dict(state)
    assert torch.equal(logits(model), answer)
    plain = sparseft.detach(model)
    assert torch.equal(logits(plain), base)
    assert not plain._load_state_dict_pre_hooks and not plain._load_state_dict_post_hooks


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("layout", ["gather", "permuted"])
def test_an_adapter_names_the_base_that_a_plain_state_brought(layout: str, active: bool, tmp_path: Path) -> None:
    config = sparseft.S2FTConfig(sparsity=0.9, importance="random", layout=layout)
    model = copy.deepcopy(trained(sparseft.attach(build_model("llama", seed=3), config)))
    if not active:
        sparseft.set_adapter(model, None)
    model.load_state_dict(build_model("llama").state_dict(), strict=False)
    sparseft.set_adapter(model, "default")
    trained(model)
    folder = sparseft.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(UserError, match="made for another base model"):
        sparseft.load_adapter(build_model("llama", seed=3), folder)
    torch.testing.assert_close(logits(sparseft.load_adapter(build_model("llama"), folder)), logits(model))


@pytest.mark.parametrize("layout", ["gather", "permuted"])
def test_deltas_alone_and_a_state_of_the_same_base_keep_its_name(layout: str) -> None:
    config = sparseft.S2FTConfig(sparsity=0.9, importance="random", layout=layout)
    model = trained(sparseft.attach(build_model("llama"), config))
    known, answer, state = model._sparseft.fingerprints, logits(model), copy.deepcopy(model.state_dict())
    for kept in (state, {name: value for name, value in state.items() if name.endswith(".delta")}):
        with torch.no_grad():
            for layer in sparse_layers(model).values():
                for pattern in layer.patterns.values():
                    pattern.delta.zero_()
        model.load_state_dict(kept, strict=False)
        assert model._sparseft.fingerprints == known and torch.equal(logits(model), answer)

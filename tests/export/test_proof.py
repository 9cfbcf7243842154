"""The proof's own arithmetic: fp32 whatever the model is stored in, with base + delta rounded or not."""

import copy

import pytest
import torch

import sparseft
from sparseft.export.changes import sparse_changes
from sparseft.export.proof import HuggingFace
from sparseft.layers import sparse_layers
from support import experts
from support.models import build_model

CONFIGS = {
    "s2ft": sparseft.S2FTConfig(o_ratio=0.4, d_ratio=0.1, q_ratio=0.3),
    "sylva": sparseft.SylvaConfig(importance="random", block_size=16, sparsity=0.8),
    "paca": sparseft.PacaConfig(importance="random", rank=3),
}


def fill(model: torch.nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in sparse_layers(model).values():
            for pattern in layer.patterns.values():
                pattern.delta.copy_(torch.randn(pattern.delta.shape, generator=generator) * 0.05)
            layer.write_back()


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "mixtral"])
def test_it_computes_in_float32_with_and_without_rounding(kind, method, tmp_path):
    base = (experts.build("mixtral") if kind == "mixtral" else build_model(kind)).to(torch.bfloat16)
    ids = list(range(3, 20))
    model = sparseft.attach(copy.deepcopy(base), CONFIGS[method])
    fill(model)
    sparseft.save_adapter(model, tmp_path / "adapter")
    stored = {name: value.clone() for name, value in model.state_dict().items()}

    wide = copy.deepcopy(base).float()  # the oracle: dense differences added in fp32
    plain = sparseft.attach(wide, CONFIGS[method], selection=None)
    sparseft.detach(plain)
    changes = sparse_changes(tmp_path / "adapter")
    parameters = dict(wide.named_parameters())
    with torch.no_grad():
        for module, change in changes.items():
            if f"{module}.weight" in parameters:
                weight = parameters[f"{module}.weight"]
                weight += change.dense().T if kind == "gpt2" else change.dense()
            else:
                stack, _, number = module.rpartition(".")
                parameters[stack][int(number)] += change.dense()
        exact = wide(torch.tensor([ids])).logits[0]
        rounded = copy.deepcopy(wide).to(torch.bfloat16).float()(torch.tensor([ids])).logits[0]

    assert (HuggingFace(model, "", unrounded=True).logits(ids) - exact).abs().max() < 1e-4 * exact.abs().max()
    assert (HuggingFace(model, "").logits(ids) - rounded).abs().max() < 1e-4 * rounded.abs().max()
    assert (exact - rounded).abs().max() > 1e-3 * exact.abs().max(), "the two cannot be told apart here"
    for name, value in model.state_dict().items():
        assert torch.equal(value, stored[name]), f"{name} was not put back"


def test_weights_are_put_back_after_a_failure():
    model = build_model("llama", dtype=torch.bfloat16)
    model.model.layers[1].mlp.forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        HuggingFace(model, "").logits([1, 2, 3])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

"""Whole models on the device: attached as the base, dense autograd's gradients, every bit back; the same selection."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sparseft
from sparseft.kernels import reference
from sparseft.layers import sparse_layers
from sparseft.training.optimizer import SparseAdamW
from support.experts import MODELS
from support.experts import build as build_experts
from support.models import build_model
from support.oracles import chosen_units, dense_gradients

KINDS: dict[
    str, Callable[[], Any]
] = {  # grouped queries; biases; Conv1D and tied embeddings; experts as 3-D parameters
    "llama": lambda: build_model("llama"),
    "qwen2": lambda: build_model("qwen2"),
    "gpt2": lambda: build_model("gpt2"),
    **{kind: (lambda kind=kind: build_experts(kind)) for kind in MODELS},
}
METHODS: dict[str, Callable[[], Any]] = {
    "s2ft": lambda: sparseft.S2FTConfig(sparsity=0.8, roles=["v", "up", "down"], importance="weight"),
    "permuted": lambda: sparseft.S2FTConfig(sparsity=0.8, roles=["v", "up", "down"], layout="permuted"),
    "sylva": lambda: sparseft.SylvaConfig(sparsity=0.8, block_size=16, importance="weight"),
}
CASES = [
    *((kind, method) for kind in ("llama", "qwen2") for method in METHODS),
    *((kind, method) for kind in ("gpt2", *MODELS) for method in ("s2ft", "sylva")),
]


def tokens(device: str, seed: int = 0, rows: int = 3, length: int = 10) -> dict[str, Tensor]:
    ids = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_a_model_trains_and_comes_back(kind: str, method: str, device: str) -> None:
    model = KINDS[kind]().to(device)
    batch = tokens(device)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        base_logits = model(**batch).logits
    expected = dense_gradients(copy.deepcopy(model), batch)
    model = sparseft.attach(model, METHODS[method]())
    with torch.no_grad():
        logits = model(**batch).logits
    if method == "permuted":  # sums run in another order
        torch.testing.assert_close(logits, base_logits, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(logits, base_logits)
    model(**batch).loss.backward()
    for name, layer in sparse_layers(model).items():
        for pattern in layer.patterns.values():
            exact = reference.gather(expected[name], pattern.kind, pattern.index, pattern.block_size)
            found = pattern.delta.grad if pattern.delta.grad is not None else torch.zeros_like(exact)  # no token came
            torch.testing.assert_close(found, exact, rtol=0, atol=1e-4 * float(exact.abs().max()) + 1e-7)
    optimizer = SparseAdamW(sparseft.trainable_parameters(model).values(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    trained = {name: p.detach().clone() for name, p in sparseft.trainable_parameters(model).items()}
    sparseft.set_adapter(model, None)
    with torch.no_grad():
        off = model(**batch).logits
    assert torch.equal(off, logits)
    sparseft.set_adapter(model, "default")
    assert all(torch.equal(p, trained[name]) for name, p in sparseft.trainable_parameters(model).items())
    plain = sparseft.detach(model)
    after = plain.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("method", "importance"),
    [("s2ft", "activation"), ("s2ft", "gradient"), ("s2ft", "fisher"), ("sylva", "sylva"), ("sylva", "fisher")],
)
def test_the_same_units_are_chosen(method: str, importance: str, device: str) -> None:
    """As in float64 on the CPU, to within 1 % of the units."""
    settings = {"sparsity": 0.9, "importance": importance, "num_samples": 12}
    config = sparseft.SylvaConfig(block_size=4, **settings) if method == "sylva" else sparseft.S2FTConfig(**settings)
    chosen = []
    for place, dtype in (("cpu", torch.float64), (device, torch.float32)):
        model = build_model("llama").to(place, dtype)
        batches = [tokens(place, seed, rows=4, length=24) for seed in range(3)]
        chosen.append(chosen_units(sparseft.compute_selection(model, config, batches)))
    expected, found = chosen
    assert len(found) == len(expected) and len(found & expected) >= 0.99 * len(expected)

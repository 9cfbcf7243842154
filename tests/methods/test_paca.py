"""PaCA: which columns train, how many, and their gradient. The contract suite holds what is every method's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sparseft
from sparseft.errors import UserError
from sparseft.layers import sparse_layers
from sparseft.models.spec import ModelSpec
from support import experts

Make = Callable[..., Any]
KINDS = ("llama", "gpt2")


def batch(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 96, (3, 10), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def chosen(model: Any, **settings: Any) -> dict[str, list[int]]:
    selection = sparseft.compute_selection(model, sparseft.PacaConfig(**settings))
    assert all(kinds.keys() == {"columns"} for kinds in selection.modules.values())
    return {name: kinds["columns"].tolist() for name, kinds in selection.modules.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_rank_columns_of_every_linear_train_with_autograds_gradient(make_model: Make, kind: str) -> None:
    dense, model = make_model(kind), make_model(kind)
    linears = ModelSpec.of(model).linears
    sparseft.attach(model, sparseft.PacaConfig(rank=4))
    layers = sparse_layers(model)
    assert layers.keys() == linears.keys()
    deltas = sparseft.trainable_parameters(model)
    assert sum(delta.numel() for delta in deltas.values()) == sum(4 * rows for rows, _ in linears.values())
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    for each in (model, dense):
        each(**batch()).loss.backward()
    for name, layer in layers.items():
        gradient = dense.get_submodule(name).weight.grad
        gradient = gradient.t() if kind == "gpt2" else gradient
        columns = layer.patterns["columns"]
        torch.testing.assert_close(columns.delta.grad, gradient[:, columns.index], rtol=1e-5, atol=1e-6)
    torch.optim.SGD(deltas.values(), lr=1.0).step()
    for name, layer in layers.items():
        changed = layer.weight.detach() != before[name]
        changed = changed.t() if kind == "gpt2" else changed
        index = layer.patterns["columns"].index
        assert changed.any(0).nonzero().flatten().tolist() == sorted(index.tolist())


def test_the_seed_draws(make_model: Make) -> None:
    model = make_model("llama")
    first = chosen(model, rank=4, seed=1)
    assert first == chosen(model, rank=4, seed=1) != chosen(model, rank=4, seed=2)
    assert len(set(map(tuple, first.values()))) > 1  # not the same columns everywhere


@pytest.mark.parametrize("allocation", ["per_layer", "global"])
@pytest.mark.parametrize("sparsity", [0.98, 0.9, 0.5])
def test_a_sparsity_is_met_to_a_column_of_each_linear(make_model: Make, sparsity: float, allocation: str) -> None:
    model = make_model("llama")
    linears = ModelSpec.of(model).linears
    columns = chosen(model, sparsity=sparsity, allocation=allocation)
    if allocation == "per_layer":
        assert all(abs(len(index) - (1 - sparsity) * linears[name][1]) <= 1 for name, index in columns.items())
    wanted = sum((1 - sparsity) * inputs for _, inputs in linears.values())
    assert columns.keys() == linears.keys()
    assert abs(sum(map(len, columns.values())) - wanted) <= len(linears)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["largest", "smallest"])
def test_a_global_choice_by_weight_costs_what_was_asked_for(make_model: Make, kind: str, order: str) -> None:
    """Columns of wide outputs weigh more and cost more: they compete with their own kind alone."""
    model = make_model(kind)
    linears = ModelSpec.of(model).linears
    columns = chosen(model, sparsity=0.8, allocation="global", importance="weight", order=order)
    trained = sum(len(index) * linears[name][0] for name, index in columns.items())
    wanted = sum(0.2 * rows * inputs for rows, inputs in linears.values())
    assert abs(trained - wanted) <= sum(rows for rows, _ in linears.values()) / 2  # half a column of each, by rounding
    assert len(set(map(len, columns.values()))) > 2  # not as many everywhere


@pytest.mark.parametrize("allocation", ["per_layer", "global", "flops"])
def test_experts_of_one_3d_parameter_compete_with_each_other(allocation: str) -> None:
    model = experts.build("mixtral")
    linears = ModelSpec.of(model).linears
    config = sparseft.PacaConfig(sparsity=0.9, importance="weight", allocation=allocation)
    selection = sparseft.compute_selection(model, config)
    wanted = 0.1 * sum(rows * inputs for rows, inputs in linears.values())
    assert abs(selection.meta["trainable_parameters"] - wanted) <= sum(rows for rows, _ in linears.values()) / 2
    stacks = [key for key in selection.meta["candidates"] if ".mlp.experts." in key and ".0." in key]
    path = "model.layers.0.mlp.experts"
    assert stacks == [f"{path}.gate_up_proj:gate_up_proj", f"{path}.down_proj:down_proj"]


def test_a_scope_is_all_that_trains(make_model: Make) -> None:
    assert all("mlp" in name for name in chosen(make_model("llama"), rank=2, scope="mlp"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": "3"}, r"method.rank='3': expected a whole number or null"),
        ({"rank": 1.5}, r"method.rank=1.5: expected a whole number or null"),
        ({"rank": True}, r"method.rank=true: expected a whole number or null"),
        ({"rank": 0}, r"method.rank=0: expected at least 1, or null"),
        ({"rank": 4, "sparsity": 0.9}, r"sparsity=0.9 and method.rank=4 both set the size: give one"),
        ({"rank": 10_000}, r"method.rank=10000: model\.layers\..* has only \d+ input features; use at most \d+"),
    ],
)
def test_wrong_sizes_are_refused(make_model: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sparseft.attach(make_model("llama"), sparseft.PacaConfig(**settings))

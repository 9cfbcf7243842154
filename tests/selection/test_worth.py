"""`allocation=flops` against brute force: no other choice of as many units has more importance for its FLOPs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import sparseft
from sparseft.errors import UserError
from sparseft.importance.units import units_of
from sparseft.models.spec import ModelSpec
from sparseft.models.step_cost import StepCost, Trained
from sparseft.selection.budget import ratio_budget
from sparseft.selection.choose import choose
from support.models import build_model

LAYERS = 3


def small() -> ModelSpec:
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=4, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return ModelSpec.of(transformers.AutoModelForCausalLM.from_config(config))


def best_by_force(spec: ModelSpec, budget: Any, scores: dict[str, Tensor]) -> float:
    """The largest importance kept ÷ FLOPs of all choices."""
    cost = StepCost(spec)
    by_role: dict[str, list[tuple[Any, int]]] = {}
    for c in budget.candidates:
        by_role.setdefault(c.role, []).extend((c, unit) for unit in range(c.count))
    sizes = {c.role: c.unit * (c.shape[0] if c.kind == "columns" else c.shape[1]) for c in budget.candidates}
    weights = {role: budget.pooled[role] * sizes[role] for role in by_role}
    most = {
        role: sum(sorted((float(scores[c.key][u]) for c, u in units), reverse=True)[: budget.pooled[role]])
        for role, units in by_role.items()
    }
    found = 0.0
    for chosen in itertools.product(*(itertools.combinations(u, budget.pooled[r]) for r, u in by_role.items())):
        trained: dict[str, int] = {}
        kept = 0.0
        for role, units in zip(by_role, chosen, strict=True):
            for c, _ in units:
                trained[c.module] = trained.get(c.module, 0) + sizes[role]
            kept += weights[role] * sum(float(scores[c.key][u]) for c, u in units) / most[role]
        found = max(found, kept / sum(weights.values()) / cost.step(Trained(trained)))
    return found


def worth_of(spec: ModelSpec, budget: Any, scores: dict[str, Tensor], selection: Any) -> float:
    cost, sums, most, weights = StepCost(spec), {}, {}, {}
    for c in budget.candidates:
        index = selection.modules.get(c.module, {}).get(c.kind)
        units = [] if index is None else units_of(c, index)
        sums[c.role] = sums.get(c.role, 0.0) + float(scores[c.key][units].sum())
        weights[c.role] = budget.pooled[c.role] * c.unit * (c.shape[0] if c.kind == "columns" else c.shape[1])
    for role in sums:
        every = torch.cat([scores[c.key] for c in budget.candidates if c.role == role])
        most[role] = float(every.sort(descending=True).values[: budget.pooled[role]].sum())
    kept = sum(weights[role] * sums[role] / most[role] for role in sums) / sum(weights.values())
    return kept / cost.step(Trained(selection.trainable(spec.linears)))


@pytest.mark.parametrize("ratios", [{"down": 0.25}, {"up": 0.25}, {"o": 0.34, "down": 0.17}, {"q": 0.5, "gate": 0.17}])
@pytest.mark.parametrize("slope", [-1.0, -0.1, 0.0, 0.3, 3.0])
def test_no_choice_is_worth_more(ratios: dict[str, float], slope: float) -> None:
    """With scores that rise or fall through the layers, so that the gradient ends at many a place."""
    spec = small()
    budget = ratio_budget(spec, ratios, scope=None)
    generator = torch.Generator().manual_seed(int(10 * slope) + 100)
    scores = {
        c.key: torch.rand(c.count, generator=generator) * 2.0 ** (slope * spec.layer_of[c.module])
        for c in budget.candidates
    }
    selection = choose(budget, scores, order="largest", allocation="flops", seed=0, spec=spec)
    by_force = best_by_force(spec, budget, scores)
    assert worth_of(spec, budget, scores, selection) == pytest.approx(by_force, rel=1e-6)
    chosen = {c.role: 0 for c in budget.candidates}
    for c in budget.candidates:
        index = selection.modules.get(c.module, {}).get(c.kind)
        chosen[c.role] += 0 if index is None else len(units_of(c, index))
    assert chosen == budget.pooled  # of each role as many as `global` takes
    assert 0.0 < selection.meta["flops"]["kept"] <= 1.0 and 0.0 < selection.meta["flops"]["cost"] <= 1.0


def test_importance_where_it_is_worth_the_way() -> None:
    """All of it in the lowest layer: the gradient goes there. None to tell by: the top of the model is filled."""
    spec = small()
    budget = ratio_budget(spec, {"down": 0.25}, scope=None)
    for worth, layer in ((lambda c: float(spec.layer_of[c.module] == 0), 0), (lambda c: 1.0, LAYERS - 1)):
        scores = {c.key: torch.full((c.count,), worth(c)) for c in budget.candidates}
        selection = choose(budget, scores, order="largest", allocation="flops", seed=0, spec=spec)
        assert {spec.layer_of[module] for module in selection.modules} == {layer}
        assert selection.meta["flops"]["layer"] == layer
    scores = {c.key: torch.rand(c.count) for c in budget.candidates}
    drawn = choose(budget, scores, order="largest", allocation="flops", seed=0, spec=spec, drawn=True)
    assert {spec.layer_of[module] for module in drawn.modules} == {LAYERS - 1}


def test_the_cap_on_the_rank_holds_with_it() -> None:
    """What no longer fits in the top goes below it."""
    for max_rank, layers in ((None, {1}), (4, {0, 1})):
        config = sparseft.S2FTConfig(sparsity=0.99, allocation="flops", max_rank=max_rank)
        if max_rank:
            config.sparsity = 0.992
            config.max_rank = 4
        selection = sparseft.compute_selection(build_model("llama"), config)
        assert {int(name.split(".")[2]) for name in selection.modules} == layers
        assert all(len(kinds["columns"]) <= (max_rank or 99) for kinds in selection.modules.values())


def test_blocks_of_all_weights_and_named_layers() -> None:
    model = build_model("llama")
    config = sparseft.SylvaConfig(sparsity=0.9, block_size=4, importance="weight", allocation="flops")
    selection = sparseft.compute_selection(model, config)
    both = {int(name.split(".")[2]) for name in selection.modules}
    assert both == {1} and selection.meta["flops"]["layer"] == 1
    config.layers = [0]
    assert {int(n.split(".")[2]) for n in sparseft.compute_selection(model, config).modules} == {0}


def test_other_orders_are_refused() -> None:
    with pytest.raises(UserError, match=r"method\.order=smallest .* use method\.order=largest"):
        sparseft.S2FTConfig(allocation="flops", order="smallest", importance="activation").validate()

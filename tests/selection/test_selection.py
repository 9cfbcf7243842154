"""Budgets, the choice of units, and selection files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparseft
from sparseft.errors import RunError, UserError
from sparseft.importance.units import Candidate, generator_for, unit_index
from sparseft.methods.s2ft import S2FTConfig
from sparseft.methods.sylva import SylvaConfig
from sparseft.models.spec import ModelSpec
from sparseft.selection.budget import block_budget, blocks_spent, keep_count, ratio_budget
from sparseft.selection.choose import choose, rank_units
from sparseft.selection.compute import compute_selection, first_samples
from sparseft.selection.selection import Selection, describe_selection, units_by_role
from support import experts
from support.models import build_model

DOWN = "model.layers.0.mlp.down_proj"
LLAMA = ModelSpec.of(build_model("llama"))


def rank(scores: list[float], order: str, seed: int = 0) -> list[int]:
    return rank_units(torch.tensor(scores), order, torch.Generator().manual_seed(seed)).tolist()


# ---- choosing ----


def test_ties_are_broken_by_index() -> None:
    assert rank([1.0, 3.0, 3.0, 0.0, 3.0, 1.0], "largest") == [1, 2, 4, 0, 5, 3]
    assert rank([1.0, 3.0, 3.0, 0.0, 3.0, 1.0], "smallest") == [3, 0, 5, 1, 2, 4]
    assert rank([0.0] * 500, "largest") == rank([0.0] * 500, "smallest") == list(range(500))


def test_nan_scores_are_a_failure() -> None:
    with pytest.raises(RunError, match="not finite"):
        rank([1.0, float("nan")], "largest")


def test_sampled_is_without_replacement_and_zeros_come_last() -> None:
    for seed in range(20):
        order = rank([0.0, 2.0, 0.0, 1.0, 5.0], "sampled", seed)
        assert sorted(order) == [0, 1, 2, 3, 4] and set(order[3:]) == {0, 2}


def test_sampled_is_in_proportion() -> None:
    """First draw: P(i) = s_i / Σs. Second: P(j | i) = s_j / (Σs − s_i). 20,000 draws, tolerance over 5 deviations."""
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([rank_units(scores, "sampled", generator)[:2] for _ in range(20_000)])
    first = torch.bincount(draws[:, 0], minlength=4) / len(draws)
    torch.testing.assert_close(first, scores / 10, rtol=0, atol=0.02)
    after_last = draws[draws[:, 0] == 3][:, 1]
    second = torch.bincount(after_last, minlength=4) / len(after_last)
    torch.testing.assert_close(second, torch.tensor([1.0, 2.0, 3.0, 0.0]) / 6, rtol=0, atol=0.03)


def test_sampled_draws_zeros_in_random_order() -> None:
    """Re-selection must not take the same ones each time where few units have a score."""
    scores = torch.tensor([0.0] * 8 + [1e-30])
    orders = [rank(scores.tolist(), "sampled", seed) for seed in range(400)]
    assert all(order[0] == 8 for order in orders)
    second = torch.bincount(torch.tensor([order[1] for order in orders]), minlength=8)[:8]
    assert (second > 20).all() and (second < 90).all()  # 50 each, standard deviation 6.6


def test_unit_index() -> None:
    heads = Candidate("m", "rows", (40, 7), 16, 4, 3)
    assert unit_index(heads, torch.tensor([0, 2])).tolist() == [16, 17, 18, 19, 24, 25, 26, 27]
    blocks = Candidate("m", "blocks", (10, 7), 0, 4, 6)  # 3 × 2 blocks
    assert unit_index(blocks, torch.tensor([0, 1, 2, 5])).tolist() == [[0, 0], [0, 1], [1, 0], [2, 1]]


def test_keep_count() -> None:
    assert [keep_count(share, 10) for share in (0.0, 0.04, 0.26, 0.5, 0.999, 1.0, 3.0)] == [1, 1, 3, 5, 10, 10, 10]


def scores_for(candidates: list[Candidate], seed: int = 0) -> dict[str, Tensor]:
    return {c.key: torch.rand(c.count, generator=generator_for(seed, c.key), dtype=torch.float64) for c in candidates}


@pytest.mark.parametrize("order", ["largest", "smallest"])
def test_per_layer_takes_the_best_of_each(make_model: Callable[..., Any], order: str) -> None:
    spec = ModelSpec.of(make_model("llama"))
    budget = ratio_budget(spec, {"v": 0.5, "o": 0.34, "up": 0.1, "down": 0.025}, scope=None)
    scores = scores_for(budget.candidates)
    selection = choose(budget, scores, order=order, allocation="per_layer", seed=0)
    units = {"v_proj": (1, 12), "o_proj": (2, 12), "up_proj": (8, 1), "down_proj": (2, 1)}
    assert len(selection.modules) == 8
    for module, kinds in selection.modules.items():
        leaf = module.rsplit(".", 1)[1]
        count, size = units[leaf]
        (kind, index), *_ = kinds.items()
        assert kind == ("columns" if leaf in ("o_proj", "down_proj") else "rows")
        key = next(c.key for c in budget.candidates if c.module == module)
        ranked = sorted(range(len(scores[key])), key=lambda u: scores[key][u].item(), reverse=order == "largest")
        wanted = sorted(u * size + i for u in ranked[:count] for i in range(size))
        assert index.tolist() == wanted


def test_global_takes_the_best_of_all_layers_together(make_model: Callable[..., Any]) -> None:
    spec = ModelSpec.of(make_model("llama"))
    budget = ratio_budget(spec, {"down": 0.1}, scope=None)
    names = [c.module for c in budget.candidates]
    scores = {f"{names[0]}:down": torch.zeros(80).double(), f"{names[1]}:down": torch.arange(80).double()}
    selection = choose(budget, scores, order="largest", allocation="global", seed=0)
    assert {m: k["columns"].tolist() for m, k in selection.modules.items()} == {names[1]: list(range(64, 80))}


def test_global_blocks_leave_every_layer_its_minimum(make_model: Callable[..., Any]) -> None:
    spec = ModelSpec.of(make_model("llama"))
    budget = block_budget(spec, 16, 0.9, scope=None)
    scores = {c.key: torch.arange(c.count).double() for c in budget.candidates}
    rich = budget.candidates[4].key
    scores[rich] += 1e6
    selection = choose(budget, scores, order="largest", allocation="global", seed=0)
    total = sum(c.count for c in budget.candidates)
    chosen = {m: k["blocks"] for m, k in selection.modules.items()}
    assert sum(map(len, chosen.values())) == round(0.1 * total)
    assert len(chosen) == 14 and len(chosen[rich]) == min(15, round(0.1 * total) - 13)
    for c in budget.candidates:
        if c.key != rich:  # its one block is its best: the last
            assert chosen[c.module].tolist() == [[-(-c.shape[0] // 16) - 1, -(-c.shape[1] // 16) - 1]]


def test_fused_projections_share_one_module(make_model: Callable[..., Any]) -> None:
    config = S2FTConfig(q_ratio=0.25, v_ratio=0.25)
    selection = compute_selection(make_model("gpt2"), config)
    rows = selection.modules["transformer.h.0.attn.c_attn"]["rows"]
    assert len(rows) == 24 and rows.tolist() == sorted(rows.tolist())
    assert ((rows[:12] < 48) & (rows[12:] >= 96)).all() and rows[0] % 12 == rows[12] % 12 == 0


# ---- budgets ----


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.95, 0.984])
@pytest.mark.parametrize("roles", [["down"], ["o", "down"], ["v", "o", "up", "down"], ["q", "k", "gate"]])
@pytest.mark.parametrize("allocation", ["per_layer", "global"])
def test_sparsity_is_met(make_model: Callable[..., Any], sparsity: float, roles: list[str], allocation: str) -> None:
    model = make_model("llama")
    spec = ModelSpec.of(model)
    config = S2FTConfig(sparsity=sparsity, roles=roles, allocation=allocation)
    scope = sum(r * c for r, c in spec.linears.values())
    available = sum(spec.linears[s.module][0] * spec.linears[s.module][1] for s in spec.slots if s.role in roles)
    if (1 - sparsity) * scope > available:
        with pytest.raises(UserError, match="roles .* have only"):
            compute_selection(model, config)
        return
    selection = compute_selection(model, config)
    found = selection.trainable(spec.linears)
    assert selection.meta["trainable_parameters"] == sum(found.values()) and selection.meta["scope_parameters"] == scope
    if allocation == "per_layer":
        finest = min(s.unit * s.other for s in spec.slots if s.role in roles)
        floor = sum(s.unit * s.other for s in spec.slots if s.role in roles and s.layer == 0)  # one unit of each role
        wanted = (1 - sparsity) * scope / len(set(spec.layer_of.values()))
        for layer in range(len(set(spec.layer_of.values()))):
            mine = sum(n for module, n in found.items() if f".{layer}." in module)
            assert abs(mine - wanted) <= finest or mine == floor
    else:
        units = {s.role: s.unit * s.other for s in spec.slots if s.role in roles}
        mine = sum(found.values())
        assert abs(mine - (1 - sparsity) * scope) <= min(units.values()) or mine == sum(units.values())


@pytest.mark.parametrize("order", ["largest", "smallest"])
@pytest.mark.parametrize(
    ("kind", "names"), [("llama", ["q_proj", "down_proj"]), ("mixtral", ["gate_up_proj", "down_proj"])]
)
def test_a_global_choice_among_named_linears_costs_what_was_asked_for(kind: str, names: list[str], order: str) -> None:
    """Rows of wide inputs weigh more and cost more: they compete with those of their own name alone."""
    model = experts.build(kind) if kind in experts.MODELS else build_model(kind)
    spec = ModelSpec.of(model)
    config = S2FTConfig(sparsity=0.95, rows=names, importance="weight", allocation="global", order=order)
    trained = compute_selection(model, config).meta["trainable_parameters"]
    assert abs(trained - 0.05 * spec.weights_in(None)) <= 80  # the inputs of the widest


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("size", [8, 32])
def test_block_budget(make_model: Callable[..., Any], kind: str, size: int) -> None:
    model = make_model(kind)
    spec = ModelSpec.of(model)
    selection = compute_selection(model, SylvaConfig(block_size=size, importance="weight"))  # the default sparsity
    assert selection.block_size == size and selection.modules.keys() == spec.linears.keys()
    for module, (rows, columns) in spec.linears.items():
        count = -(-rows // size) * -(-columns // size)
        assert len(selection.modules[module]["blocks"]) == max(1, round(0.016 * count))


@pytest.mark.parametrize("allocation", ["per_layer", "global"])
def test_what_trains_of_each_role(make_model: Callable[..., Any], allocation: str) -> None:
    model = make_model("llama")  # 2 layers, 6 heads and 2 key/value heads of 12, 48 wide, 80 channels
    spec = ModelSpec.of(model)
    config = S2FTConfig(v_ratio=0.5, o_ratio=0.34, d_ratio=0.1, allocation=allocation)
    found = units_by_role(compute_selection(model, config), spec)
    assert found == {"v": (2, 4, 2 * 12 * 48), "o": (4, 12, 4 * 12 * 48), "down": (16, 160, 16 * 48)}
    fused = units_by_role(compute_selection(make_model("gpt2"), S2FTConfig(q_ratio=0.25, v_ratio=0.5)),
                          ModelSpec.of(make_model("gpt2")))  # fmt: skip
    assert fused == {"q": (2, 8, 2 * 12 * 48), "v": (4, 8, 4 * 12 * 48)}
    blocks = compute_selection(model, SylvaConfig(importance="random", block_size=8))
    assert units_by_role(blocks, spec) == {}


@pytest.mark.parametrize("named", [{"rows": ["q_proj"]}, {"columns": ["o_proj"], "rows": ["gate_proj"]}])
def test_of_named_linears_no_heads_are_said_to_train(named: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """What trains of them are single features."""
    model = build_model("llama")
    config = S2FTConfig(sparsity=0.97, **named)
    describe_selection(compute_selection(model, config), ModelSpec.of(model), config)
    err = capsys.readouterr().err
    assert "trainable: " in err and "trainable by role" not in err


def block_areas(shape: tuple[int, int], size: int) -> list[int]:
    """The weights of each block, by counting."""
    (rows, columns), blocks = shape, []
    for r in range(0, rows, size):
        blocks += [min(size, rows - r) * min(size, columns - c) for c in range(0, columns, size)]
    return sorted(blocks, reverse=True)


def brute_force_misses(
    shapes: list[tuple[int, int]], size: int, sparsity: float, allocation: str
) -> tuple[float, float]:
    """How far from what is asked for the blocks kept are, in the mean and for the largest ones."""
    every = [block_areas(shape, size) for shape in shapes]
    kept = [max(1, round((1 - sparsity) * len(areas))) if allocation == "per_layer" else 1 for areas in every]
    mean = sum(count * sum(areas) / len(areas) for count, areas in zip(kept, every, strict=True))
    most = sum(sum(areas[:count]) for count, areas in zip(kept, every, strict=True))
    if allocation == "global":  # one each, the rest from anywhere
        total = max(1, round((1 - sparsity) * sum(map(len, every))))
        if (free := max(0, total - len(every))) > 0:
            left = sum(sum(areas) * (1 - 1 / len(areas)) for areas in every)
            mean += free * left / (sum(map(len, every)) - len(every))
            most += sum(sorted((area for areas in every for area in areas[1:]), reverse=True)[:free])
    asked = (1 - sparsity) * sum(rows * columns for rows, columns in shapes)
    return abs(mean / asked - 1), abs(most / asked - 1)


@settings(max_examples=150)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5),
    scale=st.sampled_from([1, 4, 8, 16]),
    sparsity=st.sampled_from([0.3, 0.5, 0.8, 0.9, 0.95, 0.984, 0.99, 0.999]),
    allocation=st.sampled_from(["per_layer", "global"]),
)
def test_the_block_size_is_the_largest_that_meets_the_sparsity(
    shapes: list[tuple[int, int]], scale: int, sparsity: float, allocation: str
) -> None:
    shapes = [(scale * rows, scale * columns) for rows, columns in shapes]
    spec = replace(LLAMA, linears={f"m{number}": shape for number, shape in enumerate(shapes)})
    config = SylvaConfig(sparsity=sparsity, allocation=allocation)
    sizes = [size for size in (64, 32, 16, 8, 4) if size <= min(map(max, shapes))]
    if not sizes:
        with pytest.raises(UserError, match="both sides are below 4, the smallest block; leave it out by scope"):
            config.settled(spec)
        return
    misses = {size: brute_force_misses(shapes, size, sparsity, allocation) for size in sizes}
    missed = {size: max(both) for size, both in misses.items()}
    meeting = [size for size in sizes if missed[size] <= 0.1 + 1e-9]
    found = config.settled(spec)
    if meeting:
        assert found == replace(config, block_size=meeting[0])
    else:
        assert missed[found.block_size] == pytest.approx(min(missed.values()))
    assert found.settled(spec) == found  # it may be given too
    for size in sizes:  # a size that is given is kept, also where it misses
        given_size = replace(config, block_size=size)
        assert given_size.settled(spec) == given_size


@pytest.mark.parametrize("allocation", ["per_layer", "global"])
def test_what_blocks_train_in_the_mean_and_at_most(allocation: str) -> None:
    shapes = {"a": (40, 25), "b": (9, 70), "c": (33, 33)}
    budget = block_budget(replace(LLAMA, linears=shapes), 8, 0.8, scope=None)
    mean, most = blocks_spent(budget, allocation)
    generator = torch.Generator().manual_seed(0)
    found, largest = [], {}
    for c in budget.candidates:
        rows, columns = (unit_index(c, torch.arange(c.count)) * c.unit).T
        high, wide = ((side - start).clamp(max=c.unit) for side, start in zip(c.shape, (rows, columns), strict=True))
        largest[c.key] = (high * wide).double()
    for _ in range(400):
        scores = {c.key: torch.rand(c.count, generator=generator) for c in budget.candidates}
        chosen = choose(budget, scores, order="largest", allocation=allocation, seed=0)
        found.append(sum(chosen.trainable(shapes).values()))
    assert mean == pytest.approx(sum(found) / len(found), rel=0.01) and max(found) <= most
    chosen = choose(budget, largest, order="largest", allocation=allocation, seed=0)
    assert sum(chosen.trainable(shapes).values()) == most


def test_a_block_size_left_open_is_the_same_selection_as_that_size_given(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    config = SylvaConfig(sparsity=0.95, importance="weight")
    found = compute_selection(model, config)
    given_size = compute_selection(model, replace(config, block_size=8))
    assert found.digest() == given_size.digest() and found.meta == given_size.meta
    assert found.meta["method_config"]["block_size"] == found.block_size == 8
    assert found.meta["trainable_parameters"] == pytest.approx(0.05 * found.meta["scope_parameters"], rel=0.1)


def test_scope_limits_what_is_chosen(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    selection = compute_selection(model, SylvaConfig(block_size=8, importance="random", scope="self_attn"))
    assert set(selection.modules) == {n for n in ModelSpec.of(model).linears if "self_attn" in n}
    attention = compute_selection(model, S2FTConfig(sparsity=0.9, scope="self_attn"))  # no down in scope
    assert all("self_attn" in name for name in attention.modules)
    assert attention.meta["scope_parameters"] == sum(
        r * c for n, (r, c) in ModelSpec.of(model).linears.items() if "attn" in n
    )


def meta_model(config: Any) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def llama(**options: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, **options)


@pytest.mark.parametrize(
    ("shape", "ratios", "millions"),
    [
        ({"intermediate_size": 11008, "vocab_size": 32000}, {"o_ratio": 0.052, "d_ratio": 0.02}, 56.6),
        ({"intermediate_size": 14336, "vocab_size": 128256, "num_key_value_heads": 8}, {"d_ratio": 0.03}, 56.4),
    ],
    ids=["llama2-7b", "llama3-8b"],
)
def test_the_papers_parameter_counts(shape: dict[str, int], ratios: dict[str, float], millions: float) -> None:
    """S2FT, table 5: 56.6M trainable parameters on LLaMA-2-7B and 56.4M on LLaMA-3-8B."""
    model = meta_model(llama(**shape))
    selection = compute_selection(model, S2FTConfig(allocation="global", **ratios))
    assert round(selection.meta["trainable_parameters"] / 1e6, 1) == millions
    for name, kinds in selection.modules.items():
        assert name.endswith(("o_proj", "down_proj")) and set(kinds) == {"columns"}
        if name.endswith("o_proj"):  # whole heads
            assert (kinds["columns"].reshape(-1, 128)[:, 0] % 128 == 0).all()
    per_layer = compute_selection(model, S2FTConfig(**ratios))
    assert {len(k["columns"]) for n, k in per_layer.modules.items() if "down" in n} == {
        round(ratios["d_ratio"] * shape["intermediate_size"])
    }


# ---- errors ----


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (S2FTConfig(scope="self_atn"), "scope=self_atn matches no linear.*Did you mean 'self_attn'"),
        (SylvaConfig(scope="lm_head", importance="random"), "matches no linear"),
        (SylvaConfig(block_size=128, importance="random"), r"block_size=128 is larger than both sides of .*\(72×48\)"),
        (S2FTConfig(sparsity=0.1, roles=["down"]), "raise sparsity or name more method.roles"),
        (S2FTConfig(sparsity=1.0), "sparsity=1.0: expected a share between 0 and 1"),
        (S2FTConfig(sparsity=0.0), "sparsity=0.0"),
        (SylvaConfig(sparsity=-0.5), "sparsity=-0.5"),
        (S2FTConfig(sparsity=0.9, o_ratio=0.1), "both set the budget"),
        (S2FTConfig(o_ratio=0.0, d_ratio=0.0), "every ratio that is set is 0"),
        (S2FTConfig(v_ratio=1.5), "v_ratio=1.5"),
        (S2FTConfig(roles=["dwon"]), "Did you mean 'down'"),
        (S2FTConfig(roles=[]), "roles is empty"),
        (S2FTConfig(importance="wieght"), "Did you mean 'weight'"),
        (S2FTConfig(order="lowest"), "method.order=lowest"),
        (SylvaConfig(block_size=48), "block_size=48"),
        (S2FTConfig(importance="activation"), "needs calibration batches"),
        (sparseft.LoraConfig(), "selects nothing"),
    ],
)
def test_wrong_input(make_model: Callable[..., Any], config: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compute_selection(make_model("llama"), config)


def test_missing_roles_are_named(make_model: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="no 'gate' projection in scope .it has down, k, o, q, up, v"):
        compute_selection(make_model("gpt2"), S2FTConfig(g_ratio=0.1))
    with pytest.raises(UserError, match="no 'down' projection in scope"):
        compute_selection(make_model("llama"), S2FTConfig(d_ratio=0.1, scope="self_attn"))


def test_nan_and_text_shares_are_refused() -> None:
    for config in (
        S2FTConfig(sparsity=float("nan")),
        S2FTConfig(d_ratio=float("nan")),
        SylvaConfig(damping=float("nan")),
    ):
        with pytest.raises(UserError):
            config.validate()


def test_an_attached_model_is_refused(make_model: Callable[..., Any]) -> None:
    model = sparseft.attach(make_model("llama"), S2FTConfig())
    with pytest.raises(UserError, match="sparse layers already"):
        compute_selection(model, S2FTConfig())


# ---- calibration batches ----


def test_num_samples_limits_the_calibration(make_model: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    ids = torch.randint(3, 96, (6, 5))
    batches = [{"input_ids": ids[:4]}, {"input_ids": ids[4:]}]
    seen: list[int] = []
    config = S2FTConfig(importance="activation", num_samples=3)
    few = compute_selection(make_model("llama"), config, batches, progress=seen.append)
    assert seen == [1, 2, 3]
    alone = compute_selection(make_model("llama"), config, [{"input_ids": ids[:3]}])
    assert few.digest() == alone.digest()
    assert [len(b["input_ids"]) for b in first_samples(iter(batches), 4)] == [4]
    assert [len(b["input_ids"]) for b in first_samples(batches, 100)] == [4, 2]
    for share in (None, 0.5):  # of training data that only the caller knows: what it hands over is the sample
        assert [len(b["input_ids"]) for b in first_samples(batches, share)] == [4, 2]
        replace(config, num_samples=share).validate()
    for wrong in (0, -3, 0.0, 1.0, 2.5, float("nan")):
        with pytest.raises(
            UserError, match="method.num_samples=.*(whole number of calibration examples|finite number)"
        ):
            replace(config, num_samples=wrong).validate()


@pytest.mark.parametrize("batches", [[torch.ones(2, 5, dtype=torch.long)], {"input_ids": torch.ones(2, 5)}, [{}]])
def test_batches_that_are_no_dicts_are_refused(make_model: Callable[..., Any], batches: Any) -> None:
    with pytest.raises(UserError, match="each calibration batch is to be a dict with input_ids"):
        compute_selection(make_model("llama"), S2FTConfig(importance="activation"), batches)


# ---- determinism ----

SCRIPT = """
import sys
import torch
from sparseft.importance.scores import compute_scores
from sparseft.importance.units import Candidate
from sparseft.selection.budget import Budget
from sparseft.selection.choose import choose
torch.manual_seed(int(sys.argv[1]))
units = (("rows", 8), ("blocks", 48))
candidates = [Candidate(f"m{i}.{kind}", kind, (64, 48), 0, 8, n) for i in range(3) for kind, n in units]
budget = Budget(candidates, {c.key: 3 for c in candidates}, {"": 9}, 1, 1, 8)
for seed in (3, 4):
    for order in ("largest", "sampled"):
        for allocation in ("per_layer", "global"):
            scores = compute_scores(None, candidates, "random", seed=seed).scores
            print(choose(budget, scores, order=order, allocation=allocation, seed=seed).digest())
"""


def test_the_same_in_every_process_and_another_with_another_seed() -> None:
    """Whatever the hash seed of Python's strings and the state of torch's generator."""
    runs = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT, seed],
            capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout.split()
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1] and len(set(runs[0])) == 8


# ---- the caller's own indices and files ----


def test_indices_from_the_caller() -> None:
    selection = Selection({"m": {"rows": [3, 1]}, "n": {"columns": torch.tensor([0], dtype=torch.int32)}})
    assert selection.modules["m"]["rows"].dtype == torch.int64 and selection.modules["m"]["rows"].tolist() == [3, 1]
    blocks = Selection({"m": {"blocks": [(0, 1)], "block_size": 8}})
    assert blocks.block_size == 8 and blocks.has_blocks and not selection.has_blocks
    with pytest.raises(UserError, match="block_size=4, but other modules have 8"):
        Selection({"m": {"blocks": [(0, 1)], "block_size": 8}, "n": {"blocks": [(0, 1)], "block_size": 4}})
    assert blocks.trainable({"m": (4, 12)}) == {"m": 4 * 4}


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"m": {"row": [1]}}, "expected rows, columns, blocks, grid, got 'row'"),
        ({"m": {"rows": [0.5]}}, "integer rows"),
        ({"m": {"rows": [[1]]}}, "a list of indices"),
        ({"m": {"blocks": [1, 2]}}, "pairs"),
        ({"m": {"blocks": [[1, 2], [3]]}}, "cannot be read as indices"),
        ({"m": {"rows": ["a"]}}, "cannot be read as indices"),
        ({"m": {"blocks": [[0, 0]], "block_size": 0}}, "block_size=0: expected a whole number"),
        ({"m": {"blocks": [[0, 0]], "block_size": 2.5}}, "block_size=2.5: expected a whole number"),
        ({"m": {"blocks": [[0, 0]], "block_size": "8"}}, "block_size='8': expected a whole number"),
        ({"m": {"rows": []}}, "names no index"),
        ({"m": [1, 2]}, "expected {'rows'"),
    ],
)
def test_bad_indices(modules: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Selection(modules)


def same(left: Selection, right: Selection) -> bool:
    return left.block_size == right.block_size and {
        m: {k: i.tolist() for k, i in kinds.items()} for m, kinds in left.modules.items()
    } == {m: {k: i.tolist() for k, i in kinds.items()} for m, kinds in right.modules.items()}


def test_round_trip(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model("llama")
    for config in (S2FTConfig(v_ratio=0.5, d_ratio=0.1), SylvaConfig(importance="weight", block_size=8, sparsity=0.9)):
        selection = compute_selection(model, config)
        folder = selection.save(tmp_path / "a" / "b")
        assert sorted(p.name for p in folder.iterdir()) == ["selection.json", "selection.safetensors"]
        loaded = Selection.load(folder)
        assert same(loaded, selection) and loaded.digest() == selection.digest()
        for key in ("method", "method_config", "scope_parameters", "trainable_parameters", "total_parameters"):
            assert loaded.meta[key] == selection.meta[key]
        again = Selection.load(loaded.save(tmp_path / "again"))  # over what lies there
        assert same(again, selection) and again.meta == loaded.meta
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_round_trip_of_the_callers_own(tmp_path: Path) -> None:
    strided = torch.tensor([[0, 1], [1, 0]]).t()
    own = Selection({"m": {"rows": [3, 1], "blocks": [[0, 1]]}, "n": {"blocks": strided}}, block_size=4)
    once = Selection.load(own.save(tmp_path / "one"))
    twice = Selection.load(once.save(tmp_path / "two"))
    assert same(own, twice)
    with pytest.raises(UserError, match="needs its block_size"):
        Selection({"m": {"blocks": [[0, 1]]}}).save(tmp_path / "three")
    assert not (tmp_path / "three").exists()


def test_file_format(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    Selection({"a.b": {"rows": [3, 1]}, "c": {"blocks": [[0, 1]]}}, block_size=4).save(tmp_path / "s")
    tensors = load_file(tmp_path / "s" / "selection.safetensors")
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == {
        "a.b.rows.index": (torch.int32, (2,)),
        "c.blocks.index": (torch.int32, (1, 2)),
    }


def edit_json(folder: Path, **changes: Any) -> None:
    file = folder / "selection.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def renamed(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "selection.safetensors"
    save_file({name.replace("m.", "n."): tensor for name, tensor in load_file(file).items()}, file)


TAMPERING: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped": (lambda f: flip(f / "selection.safetensors"), "altered"),
    "truncated": (lambda f: (f / "selection.safetensors").write_bytes(b"\0" * 20), "truncated or damaged"),
    "empty": (lambda f: (f / "selection.safetensors").write_bytes(b""), "truncated or damaged"),
    "no tensors": (lambda f: (f / "selection.safetensors").unlink(), "no such file"),
    "no json": (lambda f: (f / "selection.json").unlink(), "no such file"),
    "not json": (lambda f: (f / "selection.json").write_text("{"), "cannot be read as JSON"),
    "a list": (lambda f: (f / "selection.json").write_text("[]"), "expected a JSON object"),
    "format": (lambda f: edit_json(f, format_version=99), "format 99"),
    "block size": (lambda f: edit_json(f, block_size="4"), "block_size='4'"),
    "other block size": (lambda f: edit_json(f, block_size=8), "altered"),
    "modules": (lambda f: edit_json(f, modules=[1]), "needs modules"),
    "renamed": (renamed, "altered"),
}


@pytest.mark.parametrize("case", list(TAMPERING))
def test_damaged_files_are_refused(tmp_path: Path, case: str) -> None:
    damage, message = TAMPERING[case]
    folder = Selection({"m": {"blocks": [[0, 1], [2, 3]]}}, block_size=4).save(tmp_path / "s")
    damage(folder)
    with pytest.raises(UserError, match=message):
        Selection.load(folder)


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sparseft.selection.selection as module

    old = Selection({"m": {"rows": [1]}})
    folder = old.save(tmp_path / "s")

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(OSError, match="no space"):
        Selection({"m": {"rows": [2]}}).save(folder)
    assert same(Selection.load(folder), old) and [p.name for p in tmp_path.iterdir()] == ["s"]


def test_other_peoples_folders_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    selection = Selection({"m": {"rows": [1]}})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        selection.save(tmp_path / "notes")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds other files"):
        selection.save(tmp_path / "adapter")
    assert (tmp_path / "adapter/adapter_config.json").is_file()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="this is a file"):
        selection.save(tmp_path / "file")
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work" and (tmp_path / "file").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "file", "notes"]
    (tmp_path / "empty").mkdir()
    assert same(Selection.load(selection.save(tmp_path / "empty")), selection)
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match=r"\.: cannot be replaced, as you are in it"):
        selection.save(".")

"""`method.max_rank`: nothing needs a higher rank, what is cut goes elsewhere, a cap that fits changes nothing."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseft.adapters.lifecycle import attach
from sparseft.adapters.state import state_of
from sparseft.errors import UserError
from sparseft.importance.units import Candidate
from sparseft.kernels import reference
from sparseft.methods.base import SparseConfig
from sparseft.methods.full import FullConfig
from sparseft.methods.lora import DoraConfig, LoraConfig
from sparseft.methods.losia import LosiaConfig
from sparseft.methods.paca import PacaConfig
from sparseft.methods.s2ft import S2FTConfig
from sparseft.methods.sylva import SylvaConfig
from sparseft.models.spec import ModelSpec
from sparseft.selection import engine_ranks
from sparseft.selection.budget import Budget
from sparseft.selection.cache import selection_key
from sparseft.selection.choose import choose
from sparseft.selection.compute import compute_selection, reselect
from sparseft.selection.cover import needed_rank
from sparseft.selection.engine_ranks import describe_export, engines_note, file_rank, largest_need
from sparseft.selection.max_rank import check_units
from sparseft.selection.selection import Selection
from support.models import KINDS

ORDERS = ["largest", "smallest", "sampled"]


def needs(selection: Selection, shapes: dict[str, tuple[int, int]]) -> dict[str, int]:
    """The rank of random values on each weight's pattern."""
    found = {}
    for module, kinds in selection.modules.items():
        weight = torch.zeros(shapes[module], dtype=torch.float64)
        for kind, index in kinds.items():
            old = reference.gather(weight, kind, index, selection.block_size)
            reference.scatter_(weight, kind, index, torch.randn_like(old), selection.block_size)
        found[module] = int(torch.linalg.matrix_rank(weight))
        assert found[module] == needed_rank(kinds, shapes[module], selection.block_size)
    return found


def draw_units(draw: random.Random, minimum: int) -> tuple[Budget, dict[str, Tensor], int]:
    """Weights with one to three roles of heads or channels, a budget, scores; and the widest unit."""
    candidates, scores = [], {}
    unit = draw.choice([1, 1, 2, 3])
    for layer in range(draw.randint(1, 4)):
        for name in ("a", "b")[: draw.randint(1, 2)]:
            roles = ["x", "y", "z"][: draw.randint(1, 3)] if not minimum else ["x"]
            counts = [draw.randint(1, 5) for _ in roles]
            kind, start = draw.choice(["rows", "columns"]), 0
            other = draw.randint(1, 20)
            shape = (unit * sum(counts), other) if kind == "rows" else (other, unit * sum(counts))
            for role, count in zip(roles, counts, strict=True):
                c = Candidate(f"{layer}.{name}", kind, shape, start, unit, count, f"{name}{role}")
                start += unit * count
                candidates.append(c)
                scores[c.key] = torch.tensor([draw.random() for _ in range(count)], dtype=torch.float64)
    pooled: dict[str, int] = {}
    per = {}
    for c in candidates:
        per[c.key] = draw.randint(1, c.count)
        pooled[str(c.role)] = pooled.get(str(c.role), 0) + per[c.key]
    return Budget(candidates, per, pooled, minimum, 1), scores, unit


def draw_blocks(draw: random.Random) -> tuple[Budget, dict[str, Tensor], int]:
    candidates, scores, size = [], {}, draw.choice([2, 3, 4])
    for layer in range(draw.randint(1, 3)):
        shape = (draw.randint(size, 6 * size), draw.randint(size, 6 * size))
        count = -(-shape[0] // size) * -(-shape[1] // size)
        c = Candidate(f"{layer}.a", "blocks", shape, 0, size, count)
        candidates.append(c)
        scores[c.key] = torch.tensor([draw.random() ** 4 for _ in range(count)], dtype=torch.float64)
    per = {c.key: draw.randint(1, max(1, c.count // 2)) for c in candidates}
    return Budget(candidates, per, {"": sum(per.values())}, 1, 1, size), scores, size


@given(
    seed=st.integers(0, 10**9),
    blocks=st.booleans(),
    minimum=st.integers(0, 1),
    order=st.sampled_from(ORDERS),
    allocation=st.sampled_from(["per_layer", "global"]),
    spare=st.integers(0, 12),
    exclude=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_the_cap_holds_and_takes_no_more_than_it_must(
    seed: int, blocks: bool, minimum: int, order: str, allocation: str, spare: int, exclude: bool
) -> None:
    draw = random.Random(seed)
    budget, scores, unit = draw_blocks(draw) if blocks else draw_units(draw, minimum)
    if exclude:  # what is left is at least what is asked for, as `leave_out` sees to
        for c in budget.candidates:
            order_of_units = draw.sample(range(c.count), c.count)
            taken = torch.zeros(c.count, dtype=torch.bool)
            taken[order_of_units[: draw.randint(0, c.count - budget.per_candidate[c.key])]] = True
            budget.taken[c.key] = taken
    there = {c.key: c.count - int(budget.taken[c.key].sum()) if exclude else c.count for c in budget.candidates}
    shapes = {c.module: c.shape for c in budget.candidates}
    cap = unit + spare
    how: dict[str, Any] = {"order": order, "allocation": allocation, "seed": seed}
    free, capped = choose(budget, scores, **how), choose(budget, scores, **how, max_rank=cap)
    assert max(needs(capped, shapes).values()) <= cap
    most = max(needs(free, shapes).values())
    assert choose(budget, scores, **how, max_rank=most).digest() == free.digest()
    if most <= cap:
        assert capped.digest() == free.digest() and "placed" not in capped.meta
    kept = {c.key: 0 for c in budget.candidates}
    for c in budget.candidates:
        index = capped.modules.get(c.module, {}).get(c.kind)
        if index is not None:
            inside = (index >= c.start) & (index < c.start + c.unit * c.count)
            kept[c.key] = len(index) if c.kind == "blocks" else int(inside.sum()) // c.unit
            if exclude:
                wide = -(-c.shape[1] // c.unit)
                units = index[:, 0] * wide + index[:, 1] if blocks else (index[inside] - c.start) // c.unit
                assert not budget.taken[c.key][units].any()
    groups = [[c] for c in budget.candidates]
    wanted = [budget.per_candidate[c.key] for c in budget.candidates]
    if allocation == "global":
        roles = sorted({c.role or "" for c in budget.candidates})
        groups = [[c for c in budget.candidates if (c.role or "") == role] for role in roles]
        wanted = [budget.pooled[role] for role in roles]
    used = dict.fromkeys(shapes, 0)
    for c in budget.candidates:
        used[c.module] += kept[c.key] * c.unit
    for members, count in zip(groups, wanted, strict=True):
        got = sum(kept[c.key] for c in members)
        assert got <= count
        if blocks and allocation == "per_layer" and not exclude:
            assert got >= min(count, room(members[0], cap))
        elif not blocks and got < count:  # then there is no room left for any other of them
            for c in members:
                assert kept[c.key] == there[c.key] or (cap < min(c.shape) and used[c.module] + c.unit > cap)
    placed, asked = capped.meta.get("placed", (sum(kept.values()), sum(wanted)))
    assert (placed, asked) == (sum(kept.values()), sum(wanted))


def room(c: Candidate, cap: int) -> int:
    """The most blocks that any block rows and columns of at most `cap` in all hold, where these are all of one size."""
    if cap >= min(c.shape):
        return c.count
    if any(side % c.unit for side in c.shape):
        return 0
    high, wide = (side // c.unit for side in c.shape)
    lines = cap // c.unit
    return max(rows * wide + (lines - rows) * (high - rows) for rows in range(lines + 1))


@pytest.mark.parametrize("seed", range(20))
def test_what_is_cut_goes_to_the_next_best_elsewhere(seed: int) -> None:
    """Against the rule in plain words: down the ranking, each unit is taken whose weight has room."""
    draw = random.Random(seed)
    unit, cap, total = 2, 6, 14
    candidates = [Candidate(f"{i}.a", "rows", (20, 30), 0, unit, 10, "x") for i in range(5)]
    scores = {c.key: torch.tensor([draw.random() / (i + 1) for _ in range(10)]) for i, c in enumerate(candidates)}
    budget = Budget(candidates, {c.key: 1 for c in candidates}, {"x": total}, 0, 1)
    capped = choose(budget, scores, order="largest", allocation="global", seed=0, max_rank=cap)
    ranked = sorted(((-float(s), i, u) for i, c in enumerate(candidates) for u, s in enumerate(scores[c.key])))
    taken: dict[int, list[int]] = {i: [] for i in range(5)}
    for _, i, u in ranked:
        if len(taken[i]) < cap // unit and sum(map(len, taken.values())) < total:
            taken[i].append(u)
    expected = {f"{i}.a": sorted(u * 2 + f for u in units for f in (0, 1)) for i, units in taken.items() if units}
    assert {m: kinds["rows"].tolist() for m, kinds in capped.modules.items()} == expected


def test_roles_that_share_a_weight_are_cut_alike() -> None:
    """4 of q's heads, 2 of k's and 2 of v's in a weight with room for 4: half of each."""
    shape = (120, 90)
    candidates = [
        Candidate("qkv", "rows", shape, 60 * i, 10, count, role)
        for i, (role, count) in enumerate([("q", 6), ("k", 3), ("v", 3)])
    ]
    scores = {c.key: torch.arange(c.count).double() for c in candidates}
    budget = Budget(candidates, {"qkv:q": 4, "qkv:k": 2, "qkv:v": 2}, {}, 0, 1)
    capped = choose(budget, scores, order="largest", allocation="per_layer", seed=0, max_rank=45)
    heads = sorted({int(row) // 10 for row in capped.modules["qkv"]["rows"]})
    assert heads == [4, 5, 8, 14]
    assert capped.meta["placed"] == [4, 8]


@pytest.mark.parametrize("allocation", ["per_layer", "global"])
def test_blocks_keep_most_of_the_importance_that_a_cap_allows(allocation: str) -> None:
    """Against the best of all sets of 3 block rows and columns of a 5 × 6 grid."""
    kept = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(5, 6, generator=generator, dtype=torch.float64).exp()
        c = Candidate("w", "blocks", (20, 24), 0, 4, 30)
        budget = Budget([c], {"w": 10}, {"": 10}, 1, 1, 4)
        capped = choose(budget, {"w": scores.flatten()}, order="largest", allocation=allocation, seed=0, max_rank=12)
        index = capped.modules["w"]["blocks"]
        assert len(index) == 10
        best = 0.0
        for lines in itertools.combinations(range(11), 3):
            inside = torch.zeros(5, 6, dtype=torch.bool)
            inside[[line for line in lines if line < 5]] = True
            inside[:, [line - 5 for line in lines if line >= 5]] = True
            best = max(best, float(scores[inside].sort(descending=True).values[:10].sum()))
        kept.append(float(scores[index[:, 0], index[:, 1]].sum()) / best)
    assert min(kept) > 0.75 and sum(kept) / len(kept) > 0.95, (min(kept), sum(kept) / len(kept))


@pytest.mark.parametrize("allocation", ["per_layer", "global"])
def test_blocks_that_others_train_make_no_room_under_a_cap(allocation: str) -> None:
    """Two of four block rows are all taken: the lines of the cap are spent on the other two, which hold the budget."""
    c = Candidate("w", "blocks", (16, 16), 0, 4, 16)
    taken = torch.zeros(4, 4, dtype=torch.bool)
    taken[:2] = True
    budget = Budget([c], {"w": 8}, {"": 8}, 1, 1, 4, {"w": taken.flatten()})
    scores = {"w": torch.linspace(1, 2, 16)}
    capped = choose(budget, scores, order="largest", allocation=allocation, seed=0, max_rank=8)
    assert capped.modules["w"]["blocks"].tolist() == [[row, column] for row in (2, 3) for column in range(4)]
    assert "placed" not in capped.meta
    # of a scattered rest nearly as much as the best lines hold
    kept, most = 0, 0
    for seed in range(40):
        free = torch.rand(5, 6, generator=torch.Generator().manual_seed(seed)) > 0.5
        c = Candidate("w", "blocks", (20, 24), 0, 4, 30)
        budget = Budget([c], {"w": 15}, {"": 15}, 1, 1, 4, {"w": ~free.flatten()})
        scores = {"w": torch.rand(30, generator=torch.Generator().manual_seed(seed))}
        capped = choose(budget, scores, order="largest", allocation=allocation, seed=0, max_rank=12)
        kept += len(capped.modules["w"]["blocks"])
        most += max(line_sum(free, lines) for lines in itertools.combinations(range(11), 3))
    assert kept >= 0.97 * most, (kept, most)


def line_sum(free: Tensor, lines: tuple[int, ...]) -> int:
    """How many free blocks lie in block rows (numbers below 5) and block columns (5 and up)."""
    inside = torch.zeros_like(free)
    inside[[line for line in lines if line < 5]] = True
    inside[:, [line - 5 for line in lines if line >= 5]] = True
    return min(15, int(free[inside].sum()))


CONFIGS: list[SparseConfig] = [
    S2FTConfig(sparsity=0.9),
    S2FTConfig(sparsity=0.8, roles=["q", "k", "v", "gate", "up"]),
    S2FTConfig(sparsity=0.8, roles=["q", "k", "v", "gate", "up"], allocation="global"),
    S2FTConfig(o_ratio=0.5, d_ratio=0.4, allocation="global", importance="weight"),
    PacaConfig(sparsity=0.7),
    PacaConfig(sparsity=0.7, allocation="global", importance="weight", order="sampled"),
    SylvaConfig(sparsity=0.9, importance="random", block_size=4),
    SylvaConfig(sparsity=0.9, importance="weight", block_size=8, allocation="global"),
    SylvaConfig(sparsity=0.9, importance="weight", order="smallest", block_size=4),
]


def build_other(kind: str) -> Any:
    """Phi-3 with fused projections, or Mixtral, whose experts' weights are each a linear."""
    sizes = {"vocab_size": 32, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    if kind == "phi3":
        return transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes, **heads, bos_token_id=1, eos_token_id=2))
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads, num_local_experts=3))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "phi3", "mixtral"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.name}-{c.allocation}-{c.importance}")
def test_every_method_stays_within_the_cap_on_real_architectures(
    make_model: Callable[..., Any], kind: str, config: SparseConfig
) -> None:
    """Fused projections add up: q, k and v of Phi-3 and GPT-2 are one weight."""
    model = make_model(kind) if kind in KINDS else build_other(kind)
    spec = ModelSpec.of(model)
    if isinstance(config, S2FTConfig) and kind == "gpt2":
        config = replace(config, roles=[role for role in config.roles or [] if role != "gate"] or None)
    free = compute_selection(model, config)
    most = max(needs(free, spec.linears).values())
    assert largest_need(free, spec.linears)[0] == most
    assert compute_selection(model, replace(config, max_rank=most)).digest() == free.digest()
    cap = max(most // 2, max(min(c.unit, *c.shape) for c in config.budget(spec).candidates))
    capped = compute_selection(model, replace(config, max_rank=cap))
    assert max(needs(capped, spec.linears).values()) <= cap
    assert capped.meta["trainable_parameters"] <= free.meta["trainable_parameters"] * 1.3


def test_a_given_selection_is_held_against_the_cap(make_model: Callable[..., Any]) -> None:
    config = S2FTConfig(d_ratio=0.5)
    free = compute_selection(make_model("llama"), config)
    needed, module = largest_need(free, ModelSpec.of(make_model("llama")).linears)
    model = attach(make_model("llama"), replace(config, max_rank=needed), free)
    assert state_of(model) is not None
    with pytest.raises(UserError, match=rf"method\.max_rank={needed - 1}: .* needs rank {needed} \({module}\)"):
        attach(plain := make_model("llama"), replace(config, max_rank=needed - 1), free)
    assert state_of(plain) is None


def test_a_selection_from_a_file_names_the_same_linear(make_model: Callable[..., Any]) -> None:
    """Where several need the highest rank: a file has its tensors in an order of its own."""
    spec = ModelSpec.of(make_model("llama"))
    made = compute_selection(make_model("llama"), S2FTConfig(d_ratio=0.5))
    needed, module = largest_need(made, spec.linears)
    assert list(needs(made, spec.linears).values()).count(needed) > 1
    backwards = Selection(dict(reversed(made.modules.items())), block_size=made.block_size, meta=made.meta)
    assert largest_need(backwards, spec.linears) == (needed, module)


# ---- settings ----


def test_a_cap_below_one_unit_is_refused(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    with pytest.raises(
        UserError, match=r"max_rank=4: one head of model\.layers\.0\.self_attn\.o_proj alone needs rank"
    ):
        compute_selection(model, S2FTConfig(o_ratio=0.5, max_rank=4))
    with pytest.raises(UserError, match=r"max_rank=4: one block of .* needs rank 16; use method\.max_rank=16 or more"):
        compute_selection(model, SylvaConfig(importance="random", block_size=16, max_rank=4))
    # A weight that is narrower than a block needs no more than its side.
    check_units(Budget([Candidate("w", "blocks", (3, 90), 0, 16, 6)], {}, {}, 0, 1, 16), 3)


def test_reselection_excludes_a_cap(make_model: Callable[..., Any]) -> None:
    """What has trained stays in the adapter, so a cap on each selection would be none on the export."""
    for method in (S2FTConfig, SylvaConfig, PacaConfig):
        with pytest.raises(UserError, match=r"method\.max_rank=64 and method\.reselect_steps=5"):
            method(max_rank=64, reselect_steps=5).validate()
    with pytest.raises(UserError, match="method.max_rank=0: expected at least 1"):
        S2FTConfig(max_rank=0).validate()
    with pytest.raises(UserError, match="reselect without it"):
        reselect(make_model("llama"), S2FTConfig(max_rank=64), None, seed=0)


def test_the_cached_selection_depends_on_the_cap() -> None:
    keys = {selection_key("base", "data", S2FTConfig(max_rank=cap)) for cap in (None, 64, 128)}
    assert len(keys) == 3


# ---- what is said ----


def test_what_each_engine_needs() -> None:
    assert [file_rank(n) for n in (1, 8, 9, 257, 320, 321, 512, 513)] == [8, 8, 16, 320, 320, 512, 512, 528]
    assert engines_note(100, "what", "a=1") == (
        "export: what: fits vllm (--max-lora-rank 128), sglang, tgi, lorax, llama.cpp, peft"
    )
    assert "vllm (--max-lora-rank 320), sglang, llama.cpp, peft, tgi without its fast kernels (up to 128)" in (
        engines_note(300, "what", "a=1")
    )
    assert engines_note(600, "what", "method.rank=512").endswith("not vllm (up to 512): method.rank=512 would fit")


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        (LosiaConfig(), "method.max_rank=512 method.reselect_steps=0 would fit; every new selection adds to it\n"),
        (LosiaConfig(reselect_steps=0), "method.max_rank=512 would fit\n"),
        (S2FTConfig(reselect_steps=5), "method.max_rank=512 method.reselect_steps=0 would fit; every"),
    ],
    ids=["losia", "losia, once", "s2ft, anew"],
)
def test_the_settings_that_would_fit_go_together(
    make_model: Callable, config: Any, advice: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Choosing anew goes beyond any rank, so a cap beside it is refused."""
    monkeypatch.setattr(engine_ranks, "needed_rank", lambda *_: 518)
    model = make_model("llama")
    describe_export(compute_selection(model, config), ModelSpec.of(model), config)
    assert advice in capsys.readouterr().err
    fitting = dict(word.split("=") for word in re.findall(r"method\.(\w+=\d+)", advice))
    replace(config, **{name: int(value) for name, value in fitting.items()}).validate()


@pytest.mark.parametrize(
    ("method", "rank", "said"),
    [
        (LoraConfig(rank=6), 6, "export: a LoRA of rank 6: fits vllm (--max-lora-rank 8), sglang, tgi, lorax,"),
        (LoraConfig(rank=600), 600, "not vllm (up to 512): method.rank=512 would fit"),
        (DoraConfig(rank=6), None, ""),
        (FullConfig(), None, ""),
    ],
)
def test_methods_without_a_selection_say_their_rank(
    make_model: Callable, method: Any, rank: int | None, said: str, capsys: Any
) -> None:
    assert describe_export(None, ModelSpec.of(make_model("llama")), method) == rank
    found = capsys.readouterr().err
    assert said in found and bool(found) == (rank is not None)

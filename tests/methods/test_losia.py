"""LoSiA: how large its grids are, by what the first ones are chosen, and what is refused. The contract suite holds what
is every method's, tests/training/reselection/test_turns.py what re-selection does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparseft
from sparseft.errors import UserError
from sparseft.kernels import grid
from sparseft.layers import sparse_layers
from sparseft.models.spec import ModelSpec
from sparseft.selection.compute import reselect
from support.running import sparseft as command

Make = Callable[..., Any]
Sides = tuple[list[int], list[int]]


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 96, (1, 10), generator=generator) for _ in range(count)]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one.clone()} for one in ids]


def chosen(model: Any, data: Any = None, **settings: Any) -> dict[str, Sides]:
    selection = sparseft.compute_selection(model, sparseft.LosiaConfig(**settings), data)
    found = {}
    for name, kinds in selection.modules.items():
        ((rows, columns),) = grid.parts(kinds["grid"])
        found[name] = rows.tolist(), columns.tolist()
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("sparsity", [0.99, 0.984, 0.9, 0.5, 0.001])
def test_both_sides_have_their_share(make_model: Make, kind: str, sparsity: float) -> None:
    model = make_model(kind)
    linears = ModelSpec.of(model).linears
    grids = chosen(model, sparsity=sparsity)
    assert grids.keys() == linears.keys()  # lm_head is none of them
    part = (1 - sparsity) ** 0.5
    for name, (out, into) in linears.items():
        rows, columns = grids[name]
        assert rows == sorted(set(rows)) and columns == sorted(set(columns))
        assert abs(len(rows) - part * out) <= 0.5 + (part * out < 1)
        assert abs(len(rows) * len(columns) - (1 - sparsity) * out * into) <= len(rows) / 2 + 1e-9 or len(columns) == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_cap_on_the_rank_is_one_on_the_shorter_side(make_model: Make, kind: str) -> None:
    model = make_model(kind)
    free, capped = (chosen(model, sparsity=0.8, reselect_steps=0, max_rank=most) for most in (None, 16))
    for name, (rows, columns) in capped.items():
        assert min(len(rows), len(columns)) == min(16, *map(len, free[name]))
        before = len(free[name][0]) * len(free[name][1])
        assert abs(len(rows) * len(columns) - before) <= 0.5 * max(len(rows), len(columns)) + 16


def test_the_seed_draws(make_model: Make) -> None:
    model = make_model("llama")
    first = chosen(model, seed=1, sparsity=0.9)
    assert first == chosen(model, seed=1, sparsity=0.9) != chosen(model, seed=2, sparsity=0.9)
    assert len({str(rows) for rows, _ in first.values()}) > 1  # not the same everywhere


def top(sums: Tensor, count: int) -> list[int]:
    return sorted(sorted(range(len(sums)), key=lambda place: (-float(sums[place]), place))[:count])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("order", ["largest", "smallest"])
@pytest.mark.parametrize("importance", ["weight", "gradient", "fisher"])
def test_the_first_grids_are_the_best_greedy_ones(make_model: Make, importance: str, order: str, kind: str) -> None:
    """Against autograd's dense gradients, a sample at a time."""
    model = make_model(kind)
    linears = ModelSpec.of(model).linears
    wanted = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in linears.items()}
    for one in batches():
        model.zero_grad()
        model(**one).loss.backward()
        for name, total in wanted.items():
            weight = model.get_submodule(name).weight
            own = (weight if importance == "weight" else weight.grad).detach().double()
            own = own.t() if kind == "gpt2" else own
            total += own.square() if importance == "fisher" else own.abs()
    model.zero_grad()
    grids = chosen(model, batches(), importance=importance, order=order, sparsity=0.9)
    for name, (rows, columns) in grids.items():
        scores = wanted[name] if order == "largest" else -wanted[name]
        height, width = len(rows), len(columns)
        by_rows, by_columns = top(scores.sum(1), height), top(scores.sum(0), width)
        every = [
            (by_rows, top(scores[by_rows].sum(0), width)),
            (top(scores[:, by_columns].sum(1), height), by_columns),
            (by_rows, by_columns),
        ]
        best = max(float(scores[r][:, c].sum()) for r, c in every)
        assert float(scores[rows][:, columns].sum()) == pytest.approx(best, rel=1e-4)


def test_samples_are_drawn_towards_the_large(make_model: Make) -> None:
    model = make_model("llama")
    weight = {n: m.weight.detach().abs() for n, m in model.named_modules() if n in ModelSpec.of(model).linears}

    def kept(grids: dict[str, Sides]) -> float:
        return sum(float(weight[n][r][:, c].sum()) for n, (r, c) in grids.items())

    drawn = [kept(chosen(model, importance="weight", order="sampled", sparsity=0.9, seed=s)) for s in range(3)]
    least, most = (kept(chosen(model, importance="weight", order=o, sparsity=0.9)) for o in ("smallest", "largest"))
    assert least < min(drawn) and max(drawn) < most and len(set(drawn)) == 3


def test_all_at_once_from_python(make_model: Make) -> None:
    config = sparseft.LosiaConfig(sparsity=0.9)
    model = sparseft.attach(make_model("llama"), config)
    again = reselect(model, config, None, seed=5)
    for name, layer in sparse_layers(model).items():
        assert grid.sides(again.modules[name]["grid"]) == grid.sides(layer.grid.index)
        assert not torch.equal(again.modules[name]["grid"], layer.grid.index.cpu())


def test_a_selection_of_ones_own_travels(make_model: Make, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    selection = sparseft.Selection({name: {"grid": ([3, 1], [0, 79, 5])}})
    again = sparseft.Selection.load(selection.save(tmp_path / "s", {name: (48, 80)}))
    assert again.digest() == selection.digest() and again.trainable({name: (48, 80)}) == {name: 6}
    model = sparseft.attach(make_model("llama"), sparseft.LosiaConfig(), again)
    (delta,) = sparseft.trainable_parameters(model).values()
    assert delta.shape == (6,)
    assert torch.equal(
        sparse_layers(model)[name].base_values.view(2, 3), make_weight(make_model, name)[[3, 1]][:, [0, 79, 5]]
    )


def make_weight(make_model: Make, name: str) -> Tensor:
    return make_model("llama").get_submodule(name).weight.detach()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (([0, 0], [1]), "a row or a column occurs twice"),
        (([0], [1, 1]), "a row or a column occurs twice"),
        (([48], [1]), "an index lies outside rows 0 … 47 and columns 0 … 79"),
        (([0], [80]), "an index lies outside rows 0 … 47 and columns 0 … 79"),
        (([-1], [0]), "an index lies below 0"),
        (([0.5], [0]), "a pair of lists of integers"),
        ([-1, -2], "expected rows, and behind them columns"),
        ([1, 2], "expected rows, and behind them columns"),
        ([1, -1, 1, -2], "a row or a column occurs twice"),
    ],
)
def test_wrong_grids_are_refused(make_model: Make, index: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        selection = sparseft.Selection({"model.layers.0.mlp.down_proj": {"grid": index}})
        sparseft.attach(make_model("llama"), sparseft.LosiaConfig(), selection)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"allocation": "global"}, "method.allocation=global: losia gives every linear the same share"),
        ({"max_rank": 8}, "method.max_rank=8 and method.reselect_steps=100: an export holds all"),
        ({"exclude": ["runs/a"]}, "method.exclude: a grid cannot go round"),
    ],
)
def test_wrong_settings_are_refused(make_model: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sparseft.attach(make_model("llama"), sparseft.LosiaConfig(**settings))


def test_what_takes_gradients_elsewhere_is_refused(tmp_path: Path) -> None:
    for word, why in (("hardware.zero_stage=2", "method=losia with"), ("trainer.compile=layers", "method.reselect_by")):
        found = command(tmp_path, "train", "method=losia", word, code=2)
        assert f"{word}: {why}" in found.err

"""Re-selection in turn: whose turn it is, what is seen in it, what is chosen by it, and what of it is kept."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sparseft
from sparseft.errors import UserError
from sparseft.importance.sensitivity import Sensitivity
from sparseft.importance.units import generator_for
from sparseft.kernels import grid
from sparseft.layers import sparse_layers
from sparseft.models.spec import ModelSpec
from sparseft.selection.grids import best_grid, drawn_grid
from sparseft.training.reselection.turns import Turns, turns_of

Sides = tuple[list[int], list[int]]


def sides(index: torch.Tensor) -> Sides:
    ((rows, columns),) = grid.parts(index)
    return rows.tolist(), columns.tolist()


# ---- the choice ----


def greedy(scores: torch.Tensor, height: int, width: int) -> tuple[Sides, float]:
    """The best of the three greedy grids, by plain loops."""
    out, into = scores.shape

    def top(values: list[float], count: int) -> list[int]:
        return sorted(range(len(values)), key=lambda place: (-values[place], place))[:count]

    rows = top([sum(scores[r, c].item() for c in range(into)) for r in range(out)], height)
    columns = top([sum(scores[r, c].item() for r in range(out)) for c in range(into)], width)
    found = [
        (rows, top([sum(scores[r, c].item() for r in rows) for c in range(into)], width)),
        (top([sum(scores[r, c].item() for c in columns) for r in range(out)], height), columns),
        (rows, columns),
    ]
    sums = [sum(scores[r, c].item() for r in rs for c in cs) for rs, cs in found]
    best = max(range(3), key=lambda n: (round(sums[n], 9), -n))
    return (sorted(found[best][0]), sorted(found[best][1])), sums[best]


@pytest.mark.parametrize("seed", range(20))
def test_the_grid_is_the_best_greedy_one_and_near_the_best_of_all(seed: int) -> None:
    scores = torch.rand(6, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    wanted, total = greedy(scores, 2, 3)
    assert sides(best_grid(scores, (2, 3))) == wanted
    every = [
        float(scores[list(rows)][:, list(columns)].sum())
        for rows in itertools.combinations(range(6), 2)
        for columns in itertools.combinations(range(7), 3)
    ]
    assert sum(one > total + 1e-12 for one in every) <= 0.1 * len(every)  # of 525


def test_one_grid_stands_out() -> None:
    scores = torch.rand(9, 11, generator=torch.Generator().manual_seed(0))
    rows, columns = [1, 4, 8], [0, 2, 3, 10]
    scores[torch.tensor(rows)[:, None], torch.tensor(columns)] += 5.0
    assert sides(best_grid(scores, (3, 4))) == (rows, columns)
    only = torch.zeros(9, 11)
    only[torch.tensor(rows)[:, None], torch.tensor(columns)] = 1.0
    assert sides(drawn_grid(only, (3, 4), torch.Generator().manual_seed(1))) == (rows, columns)


def test_ties_go_to_the_lower_index() -> None:
    assert sides(best_grid(torch.ones(4, 4), (2, 2))) == ([0, 1], [0, 1])


# ---- the sensitivity ----


def test_the_averages_are_those_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    own = Sensitivity((3, 5), torch.device("cpu"))
    weight = torch.randn(3, 5, generator=generator)
    average = spread = torch.zeros(3, 5, dtype=torch.float64)
    for _ in range(4):
        parts = [torch.randn(3, 5, generator=generator) for _ in range(2)]
        for part in parts:
            own.add(part)
        own.step(weight)
        product = weight.double() * (parts[0] + parts[1]).double()
        now = (product - product**2 / 2).abs()
        average = 0.85 * average + 0.15 * now
        spread = 0.85 * spread + 0.15 * (now - average).abs()
    torch.testing.assert_close(own.scores().double(), average * spread, rtol=1e-5, atol=1e-9)
    before = own.scores().clone()
    own.add(torch.full((3, 5), float("nan")))
    own.step(weight)
    assert torch.equal(own.scores(), before)  # as the step itself changed nothing


# ---- turns ----


def attached(make_model: Any, kind: str = "llama") -> tuple[Any, Any]:
    model = make_model(kind)
    spec = ModelSpec.of(model)
    return sparseft.attach(model, sparseft.LosiaConfig(sparsity=0.9)), spec


def go(model: Any, turns: Turns, optimizer: Any, steps: int, start: int = 0, of: int = 99) -> list[dict[str, Any]]:
    """The loop that a Trainer makes, two micro-steps a step; of each step what trains after it."""
    found = []
    state = SimpleNamespace(global_step=start, max_steps=of)
    known: dict[str, Any] = {"model": model, "optimizer": optimizer}
    if start == 0:
        turns.on_train_begin(None, state, None, **known)
    for step in range(start, start + steps):
        turns.on_step_begin(None, state, None, **known)
        for micro in range(2):
            ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(2 * step + micro))
            (model(input_ids=ids, labels=ids).loss / 2).backward()
        turns.on_pre_optimizer_step(None, state, None, **known)
        optimizer.step()
        turns.on_optimizer_step(None, state, None, **known)
        optimizer.zero_grad()
        state.global_step += 1
        turns.on_step_end(None, state, None, **known)
        found.append({name: sides(layer.grid.index) for name, layer in sparse_layers(model).items()})
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_layers_take_turns(make_model: Any, kind: str) -> None:
    model, spec = attached(make_model, kind)
    first = {name: sides(layer.grid.index) for name, layer in sparse_layers(model).items()}
    optimizer = sparseft.SparseAdamW(sparseft.trainable_parameters(model).values(), lr=1e-2)
    turns = Turns(3, model, turns_of(model, spec), order="largest", seed=0)
    found = go(model, turns, optimizer, 8)
    for step, (before, after) in enumerate(itertools.pairwise([first, *found]), 1):
        changed = {spec.layer_of[name] for name in after if after[name] != before[name]}
        assert changed == {3: {0}, 6: {1}}.get(step, set())
        assert all(tuple(map(len, after[n])) == tuple(map(len, before[n])) for n in after)
    turns.on_train_end(None, None, None)
    assert not any(layer._forward_hooks for layer in sparse_layers(model).values())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_turn_sees_the_dense_gradient_and_chooses_by_it(make_model: Any, kind: str) -> None:
    """Against autograd on a plain model that is given the same weights before every step."""
    model, spec = attached(make_model, kind)
    plain = make_model(kind)
    optimizer = sparseft.SparseAdamW(sparseft.trainable_parameters(model).values(), lr=1e-2)
    turns = Turns(3, model, turns_of(model, spec), order="largest", seed=0)
    names = [name for name in sparse_layers(model) if spec.layer_of[name] == 0]
    average = {name: torch.zeros(1) for name in names}
    spread = {name: torch.zeros(1) for name in names}
    for step in range(3):
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(model.get_parameter(name))
        plain.zero_grad()
        for micro in range(2):
            ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(2 * step + micro))
            (plain(input_ids=ids, labels=ids).loss / 2).backward()
        for name in names:
            weight = plain.get_submodule(name).weight
            product = (weight * weight.grad).detach()
            product = product.t() if kind == "gpt2" else product
            now = (product - product.square() / 2).abs()
            average[name] = 0.85 * average[name] + 0.15 * now
            spread[name] = 0.85 * spread[name] + 0.15 * (now - average[name]).abs()
        found = go(model, turns, optimizer, 1, start=step)
        if step < 2:
            assert turns.sums.keys() == set(names)  # of one layer alone
            for name in names:
                torch.testing.assert_close(turns.sums[name].average, average[name], rtol=2e-4, atol=1e-9)
    for name in names:
        scores = average[name] * spread[name]
        size = tuple(map(len, found[-1][name]))
        rows, columns = found[-1][name]
        best = greedy(scores, *size)[1]
        assert float(scores[rows][:, columns].sum()) == pytest.approx(best, rel=1e-3)
    assert not turns.sums


@pytest.mark.parametrize("order", ["smallest", "sampled"])
def test_a_turn_chooses_in_the_order_of_the_first_choice(make_model: Any, order: str) -> None:
    model, spec = attached(make_model)
    optimizer = sparseft.SparseAdamW(sparseft.trainable_parameters(model).values(), lr=1e-2)
    turns = Turns(3, model, turns_of(model, spec), order=order, seed=7)
    go(model, turns, optimizer, 2)
    scores = {name: own.scores() for name, own in turns.sums.items()}
    sizes = {name: tuple(map(len, sides(layer.grid.index))) for name, layer in sparse_layers(model).items()}
    chosen = turns._choose(3).modules
    assert scores.keys() == chosen.keys()
    for name, own in scores.items():
        if order == "smallest":
            wanted = best_grid(-own, sizes[name])
        else:
            wanted = drawn_grid(own, sizes[name], generator_for(10, "choose", name))
        assert torch.equal(chosen[name]["grid"], wanted)


def test_what_no_step_has_shown_stays(make_model: Any) -> None:
    """All steps of the turn were bad."""
    model, spec = attached(make_model)
    first = {name: layer.grid.index.clone() for name, layer in sparse_layers(model).items()}
    turns = Turns(3, model, turns_of(model, spec), order="largest", seed=0)
    turns.on_step_begin(None, SimpleNamespace(global_step=0, max_steps=9), None)
    for name, layer in turns.turn(0).items():
        turns.sums[name].add(torch.full((layer.out_features, layer.in_features), float("nan")))
    turns.on_pre_optimizer_step(None, SimpleNamespace(global_step=0, max_steps=9), None)
    chosen = turns._choose(3).modules
    assert chosen and all(torch.equal(kinds["grid"], first[name].cpu()) for name, kinds in chosen.items())


def test_after_its_turn_a_layers_rate_climbs_and_the_others_stays(make_model: Any) -> None:
    """Against SGD by hand: the layer takes 1/4, 2/4, 3/4 of its steps, and its weight holds what its deltas say."""
    model, spec = attached(make_model)
    optimizer = torch.optim.SGD(sparseft.trainable_parameters(model).values(), lr=0.5)
    turns = Turns(3, model, turns_of(model, spec), order="largest", seed=0)
    go(model, turns, optimizer, 3)
    layers = sparse_layers(model)
    for step in range(3, 6):
        before = {name: layer.delta.detach().clone() for name, layer in layers.items()}
        gradients: dict[str, torch.Tensor] = {}
        taken = optimizer.step

        def note(taken: Any = taken, gradients: dict[str, torch.Tensor] = gradients) -> Any:
            gradients |= {name: layer.delta.grad.clone() for name, layer in layers.items()}
            return taken()

        optimizer.step = note  # type: ignore[method-assign]
        go(model, turns, optimizer, 1, start=step, of=step + 1)  # the last step: nothing is chosen
        optimizer.step = taken  # type: ignore[method-assign]
        for name, layer in layers.items():
            part = (step - 2) / 4 if spec.layer_of[name] == 0 else 1.0
            wanted = before[name] - 0.5 * part * gradients[name]
            torch.testing.assert_close(layer.delta.detach(), wanted, rtol=1e-5, atol=1e-7)
            assert layer.is_written


def test_what_has_trained_is_the_adapter(make_model: Any, tmp_path: Path) -> None:
    model, spec = attached(make_model)
    base = make_model("llama").state_dict()
    seen: dict[str, set[tuple[int, int]]] = {}

    def note() -> None:
        for name, layer in sparse_layers(model).items():
            rows, columns = sides(layer.grid.index)
            seen.setdefault(name, set()).update(itertools.product(rows, columns))

    note()
    optimizer = sparseft.SparseAdamW(sparseft.trainable_parameters(model).values(), lr=1e-2)
    turns = Turns(1, model, turns_of(model, spec), order="largest", seed=0)
    for step in range(6):
        go(model, turns, optimizer, 1, start=step)
        note()
    ids = torch.randint(3, 90, (2, 9))
    logits = model(ids).logits
    sparseft.save_adapter(model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    several = 0
    for name, entries in seen.items():
        index, delta = tensors[f"{name}.grid.index"], tensors[f"{name}.grid.delta"]
        several += len(grid.parts(index)) > 1
        assert index.dtype == torch.int32 and delta.shape == (len(entries),)  # no more than what has trained
        assert set(map(tuple, grid.pairs(index).tolist())) == entries
    assert several
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert described["modules"].keys() == seen.keys()
    other = sparseft.load_adapter(make_model("llama"), tmp_path / "adapter")
    assert torch.equal(other(ids).logits, logits)
    other(input_ids=ids, labels=ids).loss.backward()  # and trains on, as grids without a common row
    dense = sparseft.merge(sparseft.load_adapter(make_model("llama"), tmp_path / "adapter")).requires_grad_(True)
    assert torch.equal(dense(ids).logits, logits)
    dense(input_ids=ids, labels=ids).loss.backward()
    for name, layer in sparse_layers(other).items():
        gradient = dense.get_submodule(name).weight.grad
        rows, columns = grid.pairs(layer.grid.index).unbind(1)
        torch.testing.assert_close(layer.delta.grad, gradient[rows, columns], rtol=1e-4, atol=1e-6)
    sparseft.detach(model)
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())


def test_averages_of_another_model_are_refused(make_model: Any, tmp_path: Path) -> None:
    model, spec = attached(make_model)
    turns = Turns(3, model, turns_of(model, spec), order="largest", seed=0)
    go(model, turns, torch.optim.SGD(sparseft.trainable_parameters(model).values(), lr=0.1), 2)
    turns.save(tmp_path)
    again = Turns(3, model, turns_of(model, spec), order="largest", seed=0, resumed=str(tmp_path))
    assert again.sums.keys() == turns.sums.keys()
    assert all(torch.equal(again.sums[n].scores(), turns.sums[n].scores()) for n in again.sums)
    with pytest.raises(UserError, match="does not fit the model's linear|other linears"):
        other, its = attached(make_model, "gpt2")
        Turns(3, other, turns_of(other, its), order="largest", seed=0, resumed=str(tmp_path))

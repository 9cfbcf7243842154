"""What is measured of a model with an adapter: losses and slopes, each beside a second way to them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import sparseft
from sparseft.adapters.lifecycle import units
from sparseft.adapters.units import Units
from sparseft.data.tokenized import TokenizedDataset
from sparseft.evaluation import held_out
from sparseft.evaluation.held_out import batch_losses, held_out_loss, mean_loss
from sparseft.kernels.kinds import KINDS
from sparseft.memory import SavedBytes
from sparseft.trim.measured import TOGETHER, Measured, difference, turn
from support.adapters import METHODS, build, randomise
from support.training import CPU, examples


def measured(batch_size: int = 4, method: str = "s2ft") -> Measured:
    model = randomise(sparseft.attach(build("llama"), METHODS[method](0)), scale=0.1)
    target, source, held_out = (list(examples(count, seed)) for seed, count in enumerate((19, 10, 21)))
    return Measured(model, units(model), target, source, held_out, pad=0, device=CPU, batch_size=batch_size)


def token_loss(model: Any, rows: list[Any]) -> torch.Tensor:
    """The mean over all labelled tokens, an example at a time."""
    total, count = torch.zeros(()), 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        logits = model(input_ids=ids).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    return total / count


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_losses_are_means_over_tokens_whatever_the_batch(batch_size: int) -> None:
    one = measured(batch_size)
    plain = build("llama")
    with torch.no_grad():
        expected = float(token_loss(plain, list(one.held_out)))
    assert mean_loss(one.base) == pytest.approx(expected, rel=1e-5)
    assert sum(count for _, count in one.base) == sum(sum(x != -100 for x in row["labels"]) for row in one.held_out)
    assert held_out_loss(plain, one.held_out, 0, CPU, batch_size) == pytest.approx(expected, rel=1e-5)
    assert one.forgetting(torch.zeros(one.count)) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_slopes_are_those_of_the_mean_over_a_steps_tokens(method: str) -> None:
    one = measured(3, method)
    factors = torch.rand(one.count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = one.slopes(factors, step=1)
    for slopes, rows in zip(found, (one.target, one.source), strict=True):
        one.apply(factors)
        token_loss(one.model, turn(rows, 1)).backward()
        torch.testing.assert_close(
            slopes, torch.cat([each.slopes() for each in one.units.values()]), rtol=1e-3, atol=1e-6
        )
        for each in one.units.values():
            each.parameter.grad = None


def test_dropping_each_unit_in_turn_is_what_its_slope_says_where_the_delta_is_small() -> None:
    """First order, against brute force: a tenth of the delta, and each unit's part of it taken away."""
    one = measured()
    for each in one.units.values():
        each.learnt *= 0.1
    whole = torch.ones(one.count, dtype=torch.float64)
    rows = turn(one.target, 0)
    slopes, _ = one.slopes(whole, 0)
    before = mean_loss(one.losses(whole, rows))
    dropped = []
    for unit in range(one.count):
        factors = whole.clone()
        factors[unit] = 0
        dropped.append(before - mean_loss(one.losses(factors, rows)))
    together = torch.stack([slopes, torch.tensor(dropped, dtype=torch.float64)])
    assert torch.corrcoef(together)[0, 1] > 0.98


def test_only_the_units_take_gradients_and_none_is_left() -> None:
    one = measured()
    one.slopes(torch.ones(one.count), 0)
    own = {id(each.parameter) for each in one.units.values()}
    assert all(p.requires_grad == (id(p) in own) for p in one.model.parameters())
    assert all(p.grad is None for p in one.model.parameters())
    assert not one.model.training


def test_factors_go_to_their_parameters() -> None:
    one = measured()
    factors = torch.arange(one.count, dtype=torch.float64) / one.count
    assert torch.equal(torch.cat(list(one.of_each(factors).values())), factors)
    one.apply(factors)
    for name, part in one.of_each(factors).items():
        each = one.units[name]
        assert torch.equal(
            each.parameter.movedim(each.dim, 0)[3], each.learnt.movedim(each.dim, 0)[3] * part[3].float()
        )


def test_steps_take_turns_and_begin_again() -> None:
    rows = list(range(19))
    assert turn(rows, 0) == rows[:TOGETHER]
    assert turn(rows, 2) == [16, 17, 18, 0, 1, 2, 3, 4]
    assert sorted(turn(rows[:3], 5)) == rows[:3]


def test_the_error_of_a_difference_is_of_the_batches_of_both() -> None:
    before, after = [(2.0, 10), (3.0, 30), (1.0, 20)], [(2.5, 10), (3.1, 30), (1.4, 20)]
    mean, error = difference(before, after)
    rises = [0.5] * 10 + [0.1] * 30 + [0.4] * 20
    assert mean == pytest.approx(sum(rises) / 60)
    squares = [(10 * (0.5 - mean)) ** 2, (30 * (0.1 - mean)) ** 2, (20 * (0.4 - mean)) ** 2]
    assert error == pytest.approx(math.sqrt(3 / 2 * sum(squares)) / 60)
    assert difference(before, [(loss + 0.25, count) for loss, count in before])[1] == pytest.approx(0, abs=1e-12)
    assert difference(before[:1], after[:1])[1] is None


def test_batches_without_a_label_are_left_out() -> None:
    rows = [{"input_ids": [5, 6], "labels": [-100, -100]}, {"input_ids": [5, 6], "labels": [-100, 6]}]
    assert [count for _, count in batch_losses(build("llama"), rows, 0, CPU, 1)] == [1]


def test_a_row_of_a_grid_is_a_unit() -> None:
    """Of three rows of which two are one grid and one another: each row's entries are scaled together."""
    entries = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    index = torch.tensor([4, 9, -1, -3, 2, -1, -2, -6])  # rows 4 and 9 with columns 0 and 2, row 2 with 0, 1 and 5
    unit_of = KINDS["grid"].unit_of(index)
    units = Units.of(torch.nn.Parameter(entries.clone()), 0, unit_of)
    assert len(units) == 3
    units.scale(torch.tensor([10.0, 1.0, 0.0], dtype=torch.float64))  # in the order of the rows: 2, 4, 9
    assert units.parameter.tolist() == [1.0, 2.0, 0.0, 0.0, 50.0, 60.0, 70.0]
    units.parameter.grad = torch.ones(7)
    assert units.slopes().tolist() == [18.0, 3.0, 7.0]


@pytest.mark.parametrize("method", METHODS)
def test_slopes_are_the_same_where_layers_are_computed_again(method: str) -> None:
    """In less memory; the model is left as it was."""
    one = measured(3, method)
    factors = torch.rand(one.count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for one.recomputed in (False, True):
        with SavedBytes(one.model).counting() as saved:
            slopes = one.slopes(factors, step=1)
        found.append((slopes, saved.total))
    (plain, kept), (again, kept_less) = found
    torch.testing.assert_close(again, plain)
    assert kept_less < 0.7 * kept
    assert not any("forward" in vars(module) for module in one.model.modules())


def test_held_out_examples_of_similar_lengths_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no example before its batch: as lists they take many times the memory."""
    rows = [([1] * length, [1] * length) for length in (9, 2, 8, 3)]
    read, seen = [], []

    class Rows(TokenizedDataset):
        def __getitem__(self, index: int) -> dict[str, list[int]]:
            read.append(index)
            return super().__getitem__(index)

    def losses(_model: Any, given: Any, *_: Any) -> list[tuple[float, int]]:
        assert not read and len(given) == 4
        seen.extend(len(given[position]["input_ids"]) for position in range(4))
        return [(2.0, 1)]

    monkeypatch.setattr(held_out, "batch_losses", losses)
    data = Rows.from_lists(rows)
    for held in (data, list(TokenizedDataset.from_lists(rows))):
        assert held_out_loss(torch.nn.Module(), held, 0, CPU, 2) == 2.0
        assert seen == [2, 3, 8, 9]
        read.clear(), seen.clear()

"""The search for factors, on losses whose best factors are known by brute force, and on ones made to trip it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseft.trim.search import CLOSE, TRIES, adjust, on_the_way, price_of, search, within

ONE = torch.ones(4, dtype=torch.float64)


class Quadratic:
    """Target ½ (1 − s)ᵀ A (1 − s), source ½ sᵀ B s: units that depend on each other, in both."""

    def __init__(self, units: int, seed: int, noise: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.noise, self.generator, self.measured = noise, generator, 0
        parts = [torch.randn(units, units, generator=generator, dtype=torch.float64) for _ in range(2)]
        widths = [torch.rand(units, generator=generator, dtype=torch.float64) ** 2 for _ in range(2)]
        self.a, self.b = (
            part @ part.T / units * width.outer(width).sqrt() + 0.3 * torch.diag(width)
            for part, width in zip(parts, widths, strict=True)
        )

    def target(self, s: Tensor) -> float:
        return float((1 - s) @ self.a @ (1 - s)) / 2

    def forgetting(self, s: Tensor) -> float:
        self.measured += 1
        return float(s @ self.b @ s) / 2

    def slopes(self, s: Tensor, step: int) -> tuple[Tensor, Tensor]:
        noisy = [1 + self.noise * torch.randn(len(s), generator=self.generator, dtype=torch.float64) for _ in range(2)]
        return -self.a @ (1 - s) * noisy[0], self.b @ s * noisy[1]

    def best(self, budget: float) -> float:
        """The lowest target loss within the budget: projected gradient descent at every price, thousands of steps."""
        found = []
        for price in torch.logspace(-1.5, 1.5, 31, dtype=torch.float64):
            s, rate = torch.full_like(self.a[0], 0.5), 1 / float(torch.linalg.matrix_norm(self.a + price * self.b, 2))
            for _ in range(400):
                s = (s - rate * (-self.a @ (1 - s) + price * self.b @ s)).clamp(0, 1)
            if self.forgetting(s) <= budget:
                found.append(self.target(s))
        return min(found)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_most_of_what_one_factor_leaves_on_the_table_is_found(seed: int, noise: float) -> None:
    problem = Quadratic(30, seed, noise)
    budget = 0.2 * problem.forgetting(torch.ones(30, dtype=torch.float64))
    found = search(problem, 30, budget)
    best, alike, apart = problem.best(budget), problem.target(found.alike), problem.target(found.apart)
    assert best < alike
    assert (alike - apart) / (alike - best) > 0.6
    for factors in found:
        assert 0.9 * budget < problem.forgetting(factors) <= budget
        assert 0 <= factors.min() and factors.max() <= 1
    assert (found.alike == found.alike[0]).all()


def test_a_larger_budget_forgets_more_and_keeps_more() -> None:
    problem = Quadratic(30, 0)
    whole = problem.forgetting(torch.ones(30, dtype=torch.float64))
    found = [search(problem, 30, share * whole).apart for share in (0.02, 0.1, 0.3, 0.6, 0.9)]
    forgetting, target = ([f(s) for s in found] for f in (problem.forgetting, problem.target))
    assert forgetting == sorted(forgetting) and target == sorted(target, reverse=True)
    assert (search(problem, 30, 1.01 * whole).apart == 1).all()


def test_losses_are_measured_a_few_times() -> None:
    problem = Quadratic(30, 1)
    budget = 0.1 * problem.forgetting(torch.ones(30, dtype=torch.float64))
    problem.measured, rounds = 0, []
    search(problem, 30, budget, rounds.append)
    assert problem.measured <= 3 * (TRIES + 2)
    assert rounds == [1, 2]


@pytest.mark.parametrize("power", [0.5, 1, 2, 4])
@pytest.mark.parametrize("budget", [0.01, 0.2, 0.9])
def test_within_comes_close_to_the_budget_from_below(power: float, budget: float) -> None:
    factors = within(lambda s: float(s.mean()) ** power, ONE, budget)
    assert (1 - 2 * CLOSE) * budget < float(factors.mean()) ** power <= budget


def test_within_gives_back_on_the_way_to_the_whole_what_the_budget_allows() -> None:
    factors = torch.tensor([0.0, 0.2, 0.5, 1.0], dtype=torch.float64)
    found = within(lambda s: float(s.mean()), factors, 0.7)
    assert 0.7 * (1 - CLOSE) < float(found.mean()) <= 0.7
    assert (found >= factors).all() and found[-1] == 1


def test_within_of_what_is_within_or_never_is() -> None:
    assert torch.equal(within(lambda s: -1.0, ONE, 0.1), ONE)
    assert float(within(lambda s: 1.0 if s.any() else 0.0, ONE, 0.1).max()) < 0.01  # nothing but the base is
    falls = within(lambda s: -0.05 * float(s.mean()) + float(s.mean()) ** 2, ONE, 0.1)  # the source gains at first
    assert 0.09 < -0.05 * float(falls.mean()) + float(falls.mean()) ** 2 <= 0.1


def test_the_way_leads_from_the_base_over_the_factors_to_the_whole() -> None:
    factors = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    ends = [on_the_way(factors, place) for place in (0.0, 1.0, 2.0)]
    assert torch.equal(ends[0], 0 * factors) and torch.equal(ends[1], factors)
    assert torch.equal(ends[2], torch.ones(3, dtype=torch.float64))
    places = torch.stack([on_the_way(factors, place / 10) for place in range(21)])
    assert (places.diff(dim=0) >= 0).all()


def test_a_unit_that_only_costs_is_dropped_and_one_that_only_gains_stays() -> None:
    class Apart(Quadratic):
        def __init__(self) -> None:
            super().__init__(3, 0)
            self.a = torch.diag(torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
            self.b = torch.diag(torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))

    found = search(Apart(), 3, 0.1).apart
    assert found[0] > 0.9 and found[1] < 0.25 and 0.1 < found[2] < 0.6


def test_the_price_is_of_scaling_everything_and_survives_noise() -> None:
    target, source, s = (torch.tensor(v, dtype=torch.float64) for v in ([-3.0, -1.0], [1.0, 1.0], [0.5, 1.0]))
    assert price_of(target, source, s) == pytest.approx(2.5 / 1.5)
    assert price_of(-target, source, s) > 0 and price_of(target, -source, s) > 0
    assert price_of(target, 0 * source, s) > 1e6  # nothing is forgotten: the source decides nothing
    steps = adjust(Quadratic(2, 0), s)
    assert ((steps >= 0) & (steps <= 1)).all()

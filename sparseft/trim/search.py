"""The factors of an adapter's units that keep the most of the target within a budget of forgetting.

Two ways of scaling are put together:

- all units by one number, as WiSE-FT does: the largest whose measured forgetting is within the budget (`within`);
- each unit by its own, along the slopes of target + price × source at the present factors (`adjust`). The price is what
  scaling everything pays at the budget: the target's loss gained for a nat of the source's.

Units are not judged one at a time: what one of them costs depends on the others, and a choice by separate gains and
costs, to second order, was no better than scaling all of them (docs/benchmarks/trim.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

ROUNDS, STEPS = 2, 6  # the price is found anew in each round
STEP = 0.1  # of a factor, at first; it falls to nothing
BETA1, BETA2 = 0.9, 0.98  # of the running means of slopes and of their squares
CLOSE = 0.05  # share of the budget that may be left unused
TRIES, MOST = 7, 20  # losses that are measured for one number; as many as MOST where nothing was within before


class Problem(Protocol):
    """What is searched: losses as functions of the factors (units,), float64, from 0 (the base) to 1 (as trained)."""

    def forgetting(self, factors: Tensor) -> float:
        """The source's loss, measured, less the base's."""

    def slopes(self, factors: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The derivatives of the target's and of the source's loss by each factor, on the calibration examples of a
        step."""


class Found(NamedTuple):
    """Factors (units,) whose measured forgetting is within the budget: one for all units, and one for each."""

    alike: Tensor
    apart: Tensor


def search(problem: Problem, units: int, budget: float, done: Callable[[int], None] = lambda _: None) -> Found:
    """Factors whose measured forgetting is at most `budget` (nats a token, above 0). `done` is told how many rounds
    are over."""
    alike = apart = within(problem.forgetting, torch.ones(units, dtype=torch.float64), budget)
    for round in range(ROUNDS):
        # all 1: the whole adapter is within; all 0: nothing of it is, and there is nothing to scale
        if apart.any() and not (alike == 1).all():
            apart = within(problem.forgetting, adjust(problem, apart, round), budget)
        done(round + 1)
    return Found(alike, apart)


def within(forgetting: Callable[[Tensor], float], factors: Tensor, budget: float) -> Tensor:
    """The last factors within `budget` on the way from none (the base) over `factors` to all 1 (as trained), to within
    `CLOSE` of it: by false position, some `TRIES` measurements. Zeros where nothing else is within."""

    def excess(place: float) -> float:
        return forgetting(on_the_way(factors, place)) - budget

    low, under, high, over = 0.0, -budget, 1.0, excess(1.0)
    if over <= 0:
        low, under, high = 1.0, over, 2.0
        if under <= -CLOSE * budget and (over := excess(2.0)) <= 0:
            return on_the_way(factors, 2.0)
    left = under  # what the nearer end is judged by: less of it, the more often the other one has moved (Illinois)
    for tried in range(MOST):
        if under > -CLOSE * budget or (tried >= TRIES and low > 0):
            break
        # forgetting rises as a square at first: between the squares of the ends it is nearly straight
        share = min(max(-left / (over - left), 0.1), 0.9)
        middle = (low**2 + (high**2 - low**2) * share) ** 0.5
        if (found := excess(middle)) > 0:
            high, over, left = middle, found, left / 2
        else:
            low, under, left = middle, found, found
    return on_the_way(factors, low)


def on_the_way(factors: Tensor, place: float) -> Tensor:
    """From 0 to 1: from all 0 to `factors`, by one number; from 1 to 2: on to all 1, what was taken away by one."""
    return factors * place if place <= 1 else 1 - (1 - factors) * (2 - place)


def adjust(problem: Problem, factors: Tensor, round: int = 0) -> Tensor:
    """Factors after `STEPS` steps down target + price × source from `factors`, kept from 0 to 1.

    Adam's steps: a factor moves by the sign of its slope and by how steady that is, so that units of a thousandth of
    the effect are not left where they are.
    """
    mean, square, price = torch.zeros_like(factors), torch.zeros_like(factors), 0.0
    for step in range(STEPS):
        target, source = problem.slopes(factors, round * STEPS + step)
        if step == 0:
            price = price_of(target, source, factors)
        slope = target + price * source
        mean = BETA1 * mean + (1 - BETA1) * slope
        square = BETA2 * square + (1 - BETA2) * slope**2
        size = STEP * (1 - (round * STEPS + step) / (ROUNDS * STEPS))
        direction = mean / (1 - BETA1 ** (step + 1))
        direction /= (square / (1 - BETA2 ** (step + 1))).sqrt().clamp_min(1e-12)
        factors = (factors - size * direction).clamp(0, 1)
    return factors


def price_of(target: Tensor, source: Tensor, factors: Tensor) -> float:
    """What the target's loss gains for a nat of the source's where all factors grow alike. Where one of both does not
    change as it should, by noise, the units' own changes say it, each without its sign."""
    gain, cost = -float(target @ factors), float(source @ factors)
    if gain > 0 and cost > 0:
        return gain / cost
    return float((target * factors).abs().sum()) / max(float((source * factors).abs().sum()), 1e-12)

"""Fronts and what is read off them, against brute force; bootstrap intervals, against all resamples weighed by hand."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest

from sparseft.bench.pareto import beaten, bootstrap, loss_at, read_off, verdict


def test_beaten_points_by_comparing_all_pairs() -> None:
    draw = random.Random(0)
    for count in (1, 2, 5, 12):
        for _ in range(50):
            points = [(draw.randint(0, 6) / 2, draw.randint(0, 6) / 2) for _ in range(count)]
            lower = np.array([[a < x and b < y for a, b in points] for x, y in points])
            assert beaten(points) == lower.any(axis=1).tolist()


def test_what_is_no_number_is_beaten_and_beats_nothing() -> None:
    assert beaten([(math.nan, 1.0), (5.0, 5.0), (0.0, math.inf), (math.nan, math.nan)]) == [True, False, True, True]
    assert beaten([(1.0, 1.0), (1.0, 1.0), (1.0, 2.0)]) == [False, False, False]  # lower in one only


def test_a_loss_between_two_points_is_on_the_line() -> None:
    """Oracle: numpy's interpolation, which is constant outside; below the first point there is none."""
    draw = random.Random(1)
    for count in (1, 2, 5):
        front = [(draw.uniform(-0.2, 1), draw.uniform(2, 4)) for _ in range(count)]
        xs, ys = zip(*sorted(front), strict=True)
        for at in np.linspace(-0.5, 1.5, 401):
            found = loss_at(front, at)
            assert (found is None) == (at < xs[0])
            if found is not None:
                assert found == pytest.approx(np.interp(at, xs, ys))
        for x, y in front:
            assert loss_at(front, x) == pytest.approx(y)
    assert loss_at([], 0.1) is None and loss_at([(0.0, 1.0)], math.nan) is None


def test_only_the_front_is_read() -> None:
    entry = {
        "points": [
            {"front": True, "forgetting": [0.0, 0.1], "target": [3.0, 4.0]},
            {"front": False, "forgetting": [0.5, 0.5], "target": [0.0, 0.0]},
            {"front": True, "forgetting": [1.0, 1.1], "target": [2.0, 2.0]},
        ]
    }
    assert read_off(entry, 0, 0.5) == 2.5 and read_off(entry, 1, 0.6) == 3.0 and read_off(entry, 1, 0.05) is None


def weighed(values: Sequence[float], share: float) -> float:
    """The quantile over the multisets of seeds, each as often as it is drawn: n! / (k1! k2! …) of n ** n times."""
    count, by_mean = len(values), []
    for taken in itertools.combinations_with_replacement(range(count), count):
        times = math.factorial(count)
        for position in range(count):
            times //= math.factorial(taken.count(position))
        by_mean.append((sum(values[position] for position in taken) / count, times))
    below = 0
    for mean, times in sorted(by_mean):
        below += times
        if below >= share * count**count - 1e-9:
            return mean
    raise AssertionError


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_the_bootstrap_takes_every_resample(count: int) -> None:
    draw = random.Random(count)
    for _ in range(10):
        values = [draw.gauss(0, 1) for _ in range(count)]
        assert bootstrap(values) == pytest.approx((weighed(values, 0.025), weighed(values, 0.975)))


def test_of_many_seeds_resamples_are_drawn() -> None:
    """As a normal distribution has it, within the tenth that 10,000 draws and 40 values leave."""
    values = np.random.default_rng(3).normal(size=40)
    low, high = bootstrap(list(values))
    half = 1.96 * values.std() / math.sqrt(40)
    assert low == pytest.approx(values.mean() - half, abs=half / 10)
    assert high == pytest.approx(values.mean() + half, abs=half / 10)
    assert bootstrap(list(values)) == (low, high)


def test_verdicts_need_three_seeds_and_both_intervals() -> None:
    assert verdict([-0.1, -0.11, -0.09]) == "ahead" and verdict([0.1, 0.11, 0.09]) == "behind"
    assert verdict([-0.1, -0.1]) == "cannot tell from 2 seeds" and verdict([0.5]) == "cannot tell from 1 seed"
    wide = [-0.1, -0.02, -0.09]  # no resample's mean is above 0, but Student's t says it could be
    assert bootstrap(wide)[1] < 0 and verdict(wide) == "cannot tell"
    assert verdict([-0.1, 0.1, 0.0]) == "cannot tell"

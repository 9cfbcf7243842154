"""Two losses to be low at once: which points no other beats, what lies between them, how sure a difference is.

A point is (forgetting, target loss), in nats; a front is what a contender's points at several learning rates make up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparseft.bench.intervals import FEWEST_SEEDS, interval

Point = tuple[float, float]
RESAMPLES = 10_000  # where there are too many to take every one
EVERY_UP_TO = 6  # seeds: their 6 ** 6 resamples are all taken
AHEAD, BEHIND, CANNOT_TELL = "ahead", "behind", "cannot tell"


def beaten(points: Sequence[Point]) -> list[bool]:
    """Of each point, whether another one is lower in both, or it is no number."""
    return [
        not (math.isfinite(x) and math.isfinite(y)) or any(a < x and b < y for a, b in points if math.isfinite(a + b))
        for x, y in points
    ]


def loss_at(front: Sequence[Point], forgetting: float) -> float | None:
    """The target loss at no more than that forgetting: straight between two neighbours; beyond the point that forgets
    most, that point's. None below the one that forgets least: nothing was measured there."""
    ordered = sorted(front)
    if not ordered or not forgetting >= ordered[0][0]:
        return None
    for (left, above), (right, below) in itertools.pairwise(ordered):
        if forgetting < right:
            return above + (below - above) * (forgetting - left) / (right - left)
    return ordered[-1][1]


def read_off(entry: Mapping[str, Any], seed: int, forgetting: float) -> float | None:
    """A variant's target loss at a forgetting, with the seed at that position: `loss_at` of its front."""
    return loss_at([(p["forgetting"][seed], p["target"][seed]) for p in entry["points"] if p["front"]], forgetting)


def bootstrap(differences: Sequence[float]) -> tuple[float, float]:
    """The 95 % percentile interval of the mean over resamples of the seeds, drawn with replacement.

    All n ** n resamples up to six seeds, else 10,000 of a fixed generator. Of few seeds it is too narrow (of normal
    values it covers the mean in 75 % of cases with 3, in 85 % with 5), so `verdict` asks Student's t too.
    """
    values, count = np.asarray(differences, float), len(differences)
    if count <= EVERY_UP_TO:
        drawn = np.array(list(itertools.product(range(count), repeat=count)))
    else:
        drawn = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    low, high = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)


def verdict(differences: Sequence[float]) -> str:
    """What losses minus the first variant's, seed by seed, say: from 3 seeds on, ahead or behind where both the
    bootstrap interval and Student's t leave out 0."""
    count = len(differences)
    if count < FEWEST_SEEDS:
        return f"{CANNOT_TELL} from {count} {'seed' if count == 1 else 'seeds'}"
    low, high = bootstrap(differences)
    found = interval(differences)
    assert found is not None
    mean, half = found
    if high < 0 and mean + half < 0:
        return AHEAD
    return BEHIND if low > 0 and mean - half > 0 else CANNOT_TELL

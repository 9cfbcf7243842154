"""Means over seeds with 95 % intervals, by Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

FEWEST_SEEDS = 3  # for a verdict

# 97.5 % quantiles of Student's t, by degrees of freedom from 1: half the width of a 95 % interval in standard errors.
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093,
)  # fmt: skip


def interval(values: Iterable[float | None]) -> tuple[float, float] | None:
    """The mean over seeds and half the width of its 95 % interval (NaN of a single value); None without values."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if len(known) == 1:
        return known[0], math.nan
    quantile = T_QUANTILES[min(len(known) - 1, len(T_QUANTILES)) - 1]
    return statistics.fmean(known), quantile * statistics.stdev(known) / math.sqrt(len(known))


def shown(values: Sequence[float | None], scale: float, form: str) -> str:
    """The mean, times `scale`, as `form` says, with the half width where there is one; `-` without values."""
    found = interval(values)
    if found is None:
        return "-"
    mean, half = (scale * value for value in found)
    return f"{mean:{form}}" + ("" if math.isnan(half) else f" ± {half:{form.lstrip('+')}}")

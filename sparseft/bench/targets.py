"""Targets of a benchmark, one line each: what was measured <= what is allowed; and what makes a benchmark a failed one.

    s2ft / floor <= 1.00          median step times of two contenders; the same as `step s2ft / floor <= 1.00`
    saved s2ft / lora <= 0.70     bytes kept for the backward pass
    peak s2ft / full <= 0.50      the most memory at once
    peak s2ft <= bound            the weights, 1.03 x the floor's activations and 20 bytes for each trained weight
    peak s2ft <= 17.5 GB          or GiB, MB, MiB; a step in s or ms
    besides sylva / floor <= 0.02 a step's optimizer, clipping, logging and hooks, of the other's whole step (on a CPU)

Of `bench host`: `passes sylva / floor <= 1.20` (forward and backward; `passes` may be left out), `reference` (the same
with plain torch's products) and `update sylva <= 0.5 ms` (the optimizer's step). Of `bench serve`: `switch s2ft / lora
<= 0.50` at `bench.width`, and `mixed s2ft / lora <= 0.83` in each mixed batch.

The bound's 20 bytes are a delta, its gradient, two moments and the base value, in fp32; the floor's activations are
what its peak has beyond the weights (parameters and buffers of the plain model).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sparseft.bench.timing import absent, comparable, measured
from sparseft.errors import UserError, nearest

BESIDES = "besides_seconds"
STEP = ("step", "peak", "saved", "besides")  # what a benchmark measures; the first is meant where a target names none
HOST = ("passes", "reference", "update")
SERVE = ("switch", "mixed")
FIELDS = {quantity: f"{quantity}_seconds" for quantity in (*STEP, *HOST, *SERVE)}  # of a row, by quantity
FIELDS |= {"peak": "peak_memory_bytes", "saved": "saved_bytes"}
BYTES = {"GB": 1e9, "GiB": 2.0**30, "MB": 1e6, "MiB": 2.0**20}
SECONDS = {"s": 1.0, "ms": 1e-3}
UNITS = {quantity: BYTES if quantity in ("peak", "saved") else SECONDS for quantity in FIELDS}
BOUND, FLOOR = "bound", "floor"
ACTIVATIONS, TRAINED = 1.03, 20  # times the floor's; bytes for each trained weight
EXPECTED = {
    STEP: "expected 'one / other <= 1.00', 'saved one / other <= 0.70', 'peak one <= bound' or 'peak one <= 17.5 GB'",
    HOST: "expected 'one / other <= 1.00', 'reference one / other <= 1.00' or 'update one <= 0.5 ms'",
    SERVE: "expected 'switch one / other <= 0.10' or 'mixed one / other <= 0.83'",
}

MOST_DIGITS = 15  # after the point; a float has no more
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


@dataclass(frozen=True)
class Target:
    """One line of `bench.targets`."""

    text: str  # as written, but for its spaces: one at a time, none at the ends
    quantity: str  # one of FIELDS
    one: str
    other: str | None  # None: not a ratio
    limit: float | None  # a ratio, seconds or bytes; None: the bound


def parse(text: str, names: Iterable[str], quantities: tuple[str, ...] = STEP) -> Target:
    """A line as a `Target`; `UserError` where it is none, or names no contender of `names`.

    quantities: STEP, HOST or SERVE, those that are measured.
    """
    known, text = list(names), " ".join(text.split())

    def wrong(why: str) -> UserError:
        return UserError(f"bench.targets: '{text}'{why}")

    left, sign, right = (part.strip() for part in text.partition("<="))
    number = _NUMBER.fullmatch(right)
    if not (left and sign and (right == BOUND or number)):
        raise wrong(f" is no target: {EXPECTED[quantities]}.")
    first, _, rest = left.partition(" ")
    if first in quantities:
        quantity, left = first, rest.strip()
    elif rest.partition("/")[0].strip() in known:
        raise wrong(f": unknown quantity '{first}': expected {', '.join(quantities)}.{nearest(first, quantities)}")
    else:
        quantity = quantities[0]
    one, slash, other = (part.strip() for part in left.partition("/"))
    named = (one, other) if slash else (one,)
    if not all(named):
        raise wrong(f" is no target: {EXPECTED[quantities]}.")
    for name in named:
        if name not in known:
            raise wrong(f": no contender '{name}'.{nearest(name, known)}")
    if number is None:
        if slash or quantity != "peak":
            raise wrong(f": the bound is one of a contender's peak: expected 'peak {one} <= {BOUND}'.")
        if FLOOR not in known:
            raise wrong(": the bound counts from the floor: name floor in bench.methods.")
        return Target(text, quantity, one, None, None)
    value, unit = float(number[1]), number[2]
    if slash:
        if unit:
            raise wrong(f": a ratio has no unit, '{unit}' is none.")
        return Target(text, quantity, one, other, value)
    if unit not in UNITS[quantity]:
        said = f"unknown unit '{unit}'" if unit else "the limit has no unit"
        raise wrong(f": {said}: expected {', '.join(UNITS[quantity])}, or a ratio '{quantity} {one} / other <= 1.00'.")
    return Target(text, quantity, one, None, value * UNITS[quantity][unit])


def judge(
    targets: Iterable[str],
    methods: Mapping[str, Mapping[str, Any]],
    weights_bytes: int,
    quantities: tuple[str, ...] = STEP,
) -> list[dict[str, Any]]:
    """Each target with what was measured, its limit (both a ratio, seconds or bytes: `unit`), and whether it is met.

    Where something was not measured, `met` and `measured` are null and `reason` says why. weights_bytes: of the plain
    model's parameters and buffers.
    """
    judged: list[dict[str, Any]] = []
    for text in targets:
        target = parse(text, methods, quantities)
        needed = [target.one, *([target.other] if target.other else []), *([FLOOR] if target.limit is None else [])]
        field, in_seconds = FIELDS[target.quantity], UNITS[target.quantity] is SECONDS
        beside = FIELDS["step"] if target.quantity == "besides" else field  # of the one that it is a ratio to
        reasons = [
            f"{name}: {absent(methods[name]) or f'{target.quantity} is not counted in this way'}"
            for name in dict.fromkeys(needed)
            if methods[name].get(field if name == target.one else beside) is None
        ]
        unit = "ratio" if target.other else "seconds" if in_seconds else "bytes"
        entry = {"target": target.text, "measured": None, "limit": target.limit, "unit": unit, "met": None}
        if reasons:
            judged.append(entry | {"reason": "; ".join(reasons)})
            continue
        value = methods[target.one][field]
        if target.other:
            of = [(methods[target.one], field), (methods[target.other], beside)]
            one, other = (comparable(row, name) if in_seconds else row[name] for row, name in of)
            value = one / other
        limit = target.limit
        if limit is None:
            activations, trained = methods[FLOOR][field] - weights_bytes, methods[target.one]["trainable_parameters"]
            limit = weights_bytes + ACTIVATIONS * activations + TRAINED * trained
        judged.append(entry | {"measured": value, "limit": limit, "met": value <= limit})
    return judged


def lines(judged: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for each judged target, and one that says what the bound is where there is one."""
    shown, bounded = [], False
    for entry in judged:
        bounded = bounded or _limit(entry) == BOUND
        if entry["met"] is None:
            shown.append(f"NOT MEASURED: {entry['target']} ({entry['reason']})")
            continue
        found, limit = _amounts(entry)
        figures = f"measured {found}" + ("" if entry["unit"] == "ratio" else f", limit {limit}")
        shown.append(f"{'met' if entry['met'] else 'MISSED'}: {entry['target']} ({figures})")
    if bounded:
        shown.append(f"bound: weights + {ACTIVATIONS} x the floor's activations + {TRAINED} bytes a trained weight")
    return shown


def _limit(entry: Mapping[str, Any]) -> str:
    """What stands right of a judged target's `<=`."""
    return entry["target"].partition("<=")[2].strip()


def _amounts(entry: Mapping[str, Any]) -> list[str]:
    """What was measured and the limit, in the unit that the target is written in; bytes in MiB where that names none.

    With three significant digits or more: as many as tell the two apart.
    """
    unit, scale = "", 1.0
    if entry["unit"] != "ratio":
        written = _NUMBER.fullmatch(_limit(entry))
        unit = written[2] if written else "MiB"
        scale = (SECONDS | BYTES)[unit]
    values = [entry[key] / scale for key in ("measured", "limit")]
    least = min((abs(value) for value in values if value), default=1.0)
    digits = max(3 if entry["unit"] == "ratio" else 2, 2 - math.floor(math.log10(least)))
    while len({f"{value:.{digits}f}" for value in values}) < len(set(values)) and digits < MOST_DIGITS:
        digits += 1
    return [f"{value:,.{digits}f} {unit}".rstrip() for value in values]


def beside_its_figures(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What failed of a contender that was timed: (doing what, why)."""
    after = {"memory": "while its memory was counted", "profile": "under the profiler"}
    return [(doing, why) for name, doing in after.items() if (why := absent(row.get(name, {})))]


def failure(result: dict[str, Any]) -> str | None:
    """What makes a benchmark a failed one: contenders that raised, nothing to measure at all, and targets that do not
    hold or were not measured."""
    groups = {"" if way == "eager" else f"{way}: ": rows for way, rows in result.get("ways", {}).items()}
    if "ways" not in result and "methods" in result:
        groups[""] = result["methods"]
    groups |= {f"{at['axis']} {at['value']:g}: ": at["methods"] for at in result.get("points", ())}
    without = {f"{where}{name}": row for where, rows in groups.items() for name, row in rows.items() if absent(row)}
    sentences = []
    if groups and not any(measured(rows) for rows in groups.values()):
        reasons = "; ".join(f"{name}: {absent(row)}" for name, row in without.items())
        sentences.append(f"Nothing was measured: every method is missing or has failed ({reasons}).")
    else:
        raised = [f"{name} ({row['failed']})" for name, row in without.items() if "failed" in row]
        raised += [
            f"{where}{name} {doing} ({why})"
            for where, rows in groups.items()
            for name, row in rows.items()
            for doing, why in beside_its_figures(row)
        ]
        raised += [
            f"the step of {name} ({row['step_failed']})"  # of the time to a loss
            for name, row in result.get("variants", {}).items()
            if "step_failed" in row
        ]
        sentences += [f"Failed while measured: {'; '.join(raised)}."] if raised else []
    judged = result.get("targets", ())
    for met, said in ((False, "missed"), (None, "not measured")):
        named = [entry["target"] for entry in judged if entry["met"] is met]
        if named:
            sentences.append(f"{len(named)} of {len(judged)} targets {said}: {'; '.join(named)}.")
    stages = result.get("stages", {})  # of the loader
    if slow := [name for name, stage in stages.items() if not stage["met"]]:
        sentences.append(f"{len(slow)} of {len(stages)} stages below the target: {'; '.join(slow)}.")
    return " ".join(sentences) or None

"""How much of what may be chosen."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from sparseft.errors import UserError
from sparseft.importance.units import Candidate
from sparseft.models.spec import ModelSpec, RoleSlice


@dataclass
class Budget:
    """How many units to keep of each group of candidates; `per_candidate` is the uniform way to spend it."""

    candidates: list[Candidate]
    per_candidate: dict[str, int]  # by Candidate.key
    pooled: dict[str, int]  # by role ("" for blocks): what `allocation: global` and `flops` spend over all layers
    minimum: int  # units that every candidate keeps under `allocation: global`
    scope_parameters: int
    block_size: int | None = None
    taken: dict[str, Tensor] = field(default_factory=dict)  # units not to choose, (units,) bool, by Candidate.key
    grids: dict[str, tuple[int, int]] = field(default_factory=dict)  # of candidates that are such: rows and columns


def keep_count(share: float, units: int) -> int:
    """`max(1, round(share × units))`, at most all."""
    return min(units, max(1, round(share * units)))


def _candidates(slots: Iterable[RoleSlice], spec: ModelSpec) -> list[Candidate]:
    return [
        Candidate(slot.module, slot.side, spec.linears[slot.module], slot.start, slot.unit, slot.count, slot.role)
        for slot in slots
    ]


def _require_roles(spec: ModelSpec, roles: Iterable[str], scope: str | None) -> list[RoleSlice]:
    slots = spec.slots_in(scope)
    present = sorted({slot.role for slot in slots})
    for role in roles:
        if role not in present:
            without = set(spec.linears_in(scope)) - {slot.module for slot in slots}
            names = sorted({spec.path_of(name).rpartition(".")[2] for name in without})
            by_name = f" {', '.join(names)} can train by name, as in method.rows=[{names[0]}]." if names else ""
            raise UserError(f"the model has no '{role}' projection in scope (it has {', '.join(present)}).{by_name}")
    return slots


def ratio_budget(spec: ModelSpec, ratios: Mapping[str, float], *, scope: str | None) -> Budget:
    """A share of the units of each role in every layer that may train: the S2FT paper's `v_ratio, o_ratio, …`."""
    ratios = {role: ratio for role, ratio in ratios.items() if ratio > 0}
    slots = [slot for slot in _require_roles(spec, ratios, scope) if slot.role in ratios]
    candidates = _candidates(slots, spec)
    per = {c.key: keep_count(ratios[c.role], c.count) for c in candidates}
    totals = {role: sum(c.count for c in candidates if c.role == role) for role in ratios}
    pooled = {role: keep_count(ratio, totals[role]) for role, ratio in ratios.items()}
    return Budget(candidates, per, pooled, 0, spec.weights_in(scope))


def sparsity_budget(spec: ModelSpec, roles: list[str], sparsity: float, *, scope: str | None) -> Budget:
    """(1 − sparsity) of the linear weights in scope, spent in equal shares on the units of `roles`.

    Heads are coarse: what rounding them leaves or overdraws is made up by the finest role, of the same layer or with
    `allocation: global` of all, so that the budget is met there to within one unit of that role.
    """
    slots = [slot for slot in _require_roles(spec, roles, scope) if slot.role in roles]
    candidates = _candidates(slots, spec)
    scope_parameters = spec.weights_in(scope)
    weights = sum(slot.count * slot.unit * slot.other for slot in slots)
    share = (1.0 - sparsity) * scope_parameters / weights
    if share > 1.0:
        where, more = "in scope", "method.roles"
        if spec.layers is not None:
            where, more = "in the layers of method.layers", "layers or method.roles"
        raise UserError(
            f"sparsity={sparsity} asks for {(1 - sparsity) * scope_parameters:,.0f} trainable weights, but the roles "
            f"{', '.join(roles)} have only {weights:,} {where}: raise sparsity or name more {more}."
        )
    entries = {slot.module + ":" + slot.role: slot.unit * slot.other for slot in slots}
    per: dict[str, int] = {}
    by_layer: dict[int, list[Candidate]] = defaultdict(list)
    for slot, candidate in zip(slots, candidates, strict=True):
        by_layer[slot.layer].append(candidate)
    for members in by_layer.values():
        per |= _coarse_first(share, {c.key: (c.count, c.count * entries[c.key]) for c in members})
    units = {role: [0, 0] for role in roles}
    for c in candidates:
        units[c.role][0] += c.count
        units[c.role][1] += c.count * entries[c.key]
    pooled = _coarse_first(share, units)
    return Budget(candidates, per, pooled, 0, scope_parameters)


def _coarse_first(share: float, groups: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """How many units of each group make up `share` of the weights of all; groups are (units, weights of them all)."""
    kept: dict[str, int] = {}
    rest = sum(weights for _, weights in groups.values())
    wanted = share * rest
    for name, (units, weights) in sorted(groups.items(), key=lambda item: -item[1][1] / item[1][0]):
        kept[name] = keep_count(max(0.0, wanted) / rest, units)
        wanted -= kept[name] * weights / units
        rest -= weights
    return kept


def block_budget(spec: ModelSpec, block_size: int, sparsity: float, *, scope: str | None) -> Budget:
    """The same share of the B×B blocks of every linear that may train, edge blocks included, at least one each:
    together (1 − sparsity) of the weights in scope."""
    share = spec.share_of(sparsity, scope)
    candidates = []
    for name, (rows, columns) in spec.linears_in(scope).items():
        count = math.ceil(rows / block_size) * math.ceil(columns / block_size)
        candidates.append(Candidate(name, "blocks", (rows, columns), 0, block_size, count))
    per = {c.key: keep_count(share, c.count) for c in candidates}
    pooled = {"": keep_count(share, sum(c.count for c in candidates))}
    return Budget(candidates, per, pooled, 1, spec.weights_in(scope), block_size)


def block_weights(candidate: Candidate) -> Counter[int]:
    """How many of a candidate's blocks have how many weights: those at the lower and right edges may have fewer."""
    size, found = candidate.unit, Counter[int]()
    high, wide = ({size: side // size, side % size: 1} for side in candidate.shape)
    for h, rows in high.items():
        for w, columns in wide.items():
            if h and w and rows and columns:
                found[h * w] += rows * columns
    return found


def blocks_spent(budget: Budget, allocation: str) -> tuple[float, int]:
    """The weights that spending a budget of blocks trains: in the mean over all choices, and at most.

    They differ where blocks at the edges are smaller; scores that are sums over a block tend to choose the larger.
    """
    sizes = {c.key: block_weights(c) for c in budget.candidates}
    mean = {c.key: math.prod(c.shape) / c.count for c in budget.candidates}
    kept = budget.per_candidate
    if allocation != "per_layer":
        minimum = budget.minimum if allocation == "global" else 0
        kept = {c.key: min(minimum, c.count) for c in budget.candidates}
    average = sum(mean[key] * count for key, count in kept.items())
    most = sum(_take_largest(sizes[key], count) for key, count in kept.items())
    pooled = budget.pooled[""] - sum(kept.values()) if allocation != "per_layer" else 0
    if pooled > 0:
        left = {c.key: c.count - kept[c.key] for c in budget.candidates}
        average += pooled * sum(mean[key] * count for key, count in left.items()) / sum(left.values())
        most += _take_largest(sum(sizes.values(), Counter[int]()), pooled)
    return average, most


def _take_largest(blocks: Counter[int], count: int) -> int:
    """Takes the `count` largest out of `blocks` and returns their weights."""
    total = 0
    for weights in sorted(blocks, reverse=True):
        taken = min(blocks[weights], count)
        blocks[weights] -= taken
        total += weights * taken
        count -= taken
    return total

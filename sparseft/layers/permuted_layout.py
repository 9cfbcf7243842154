"""`layout: permuted`: the selected heads and channels moved to the front of both coupled matrices (S2FT §3.2).

| structure | rows moved | columns moved | unit |
| --- | --- | --- | --- |
| attention | q, k, v (and their biases) | o | a key/value head with all its query heads |
| MLP | gate, up (and their biases) | down | a channel |

Moving the units of all of a structure's matrices alike leaves the model's function as it was; each trained slice
is then consecutive in its weight, so that a view reaches it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseft.distributed.shards import full_shape
from sparseft.layers.beside import stands_beside
from sparseft.layers.convert import convert, replace_modules, sparse_layers, tied_names
from sparseft.layers.permutation import inverse
from sparseft.layers.sparse_linear import SparseLinear
from sparseft.models.spec import ModelSpec, RoleSlice

Modules = Mapping[str, Mapping[str, Tensor]]  # indices by module and kind, in the checkpoint's order

ATTENTION = ("o", "v", "q", "k")  # in the order in which their selected units are moved to the front
MLP = ("down", "up", "gate")
# What a model's config calls things that tell heads apart, or let a layer read another's keys and values.
HEADS_DIFFER = ("alibi", "num_kv_shared_layers")


class _Stays(Exception):
    """Why a structure cannot be permuted."""


@dataclass
class Plan:
    """By module the permutations of its rows and columns ("rows", "columns" -> (n,)), and by reason what stays."""

    permutations: dict[str, dict[str, Tensor]]
    stays: dict[str, list[str]]


def convert_permuted(
    model: nn.Module, modules: Modules, spec: ModelSpec, block_size: int | None = None
) -> dict[str, list[str]]:
    """`convert`, and moves what is selected to the front where it can be moved.

    Returns what stays in the original order, names of attentions, MLPs or single modules by the reason.
    All or nothing, as `convert`; siblings without a delta of their own become sparse layers without a pattern.
    """
    plan = plan_permutations(model, modules, spec)
    convert(model, in_stored_order(modules, plan), block_size)
    carry_out(model, plan)
    return plan.stays


def in_stored_order(modules: Modules, plan: Plan) -> dict[str, dict[str, Tensor]]:
    """The same indices in the order in which they are stored, so that a run of them is one; a file says which is
    which."""
    arranged = {}
    for name, kinds in modules.items():
        inverses = {kind: inverse(permutation) for kind, permutation in plan.permutations.get(name, {}).items()}
        arranged[name] = {
            kind: index[inverses[kind][index].argsort()] if kind in inverses and _fits(index, inverses[kind]) else index
            for kind, index in kinds.items()
        }
    return arranged


def carry_out(model: nn.Module, plan: Plan) -> None:
    """Stores the weights of an attached model permuted by the plan, and those it does not name in the original order.

    What the weights hold stays as it is, so the model's function does too.
    """
    for name, layer in sparse_layers(model).items():
        if layer.is_permuted and name not in plan.permutations:
            layer.permute()
    for name, permutations in plan.permutations.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, SparseLinear):
            plain, layer = layer, SparseLinear.wrap(layer)
            replace_modules(model, [(plain, layer)])
        layer.permute(permutations.get("rows"), permutations.get("columns"))


def plan_permutations(model: nn.Module, modules: Modules, spec: ModelSpec) -> Plan:
    """The permutations that bring what is selected to the front; nothing of the model is changed."""
    structures: dict[tuple[str, bool], list[RoleSlice]] = defaultdict(list)
    for slot in spec.slots:
        structures[slot.module.rpartition(".")[0], slot.role in ATTENTION].append(slot)
    plan = Plan({}, {})
    seen: set[str] = set()
    for (parent, is_attention), slots in structures.items():
        names = list(dict.fromkeys(slot.module for slot in slots))
        chosen = [name for name in names if name in modules]
        seen.update(chosen)
        if not chosen:
            continue
        try:
            _check_structure(model, parent, slots, spec, is_attention=is_attention)
            permutations = _permutations(slots, modules, spec, is_attention=is_attention)
        except _Stays as reason:
            plan.stays.setdefault(str(reason), []).append(parent)
        else:
            plan.permutations |= permutations
    for name in modules:
        if name not in seen:
            plan.stays.setdefault("its role is not known", []).append(name)
    return plan


def _permutations(
    slots: list[RoleSlice], modules: Modules, spec: ModelSpec, *, is_attention: bool
) -> dict[str, dict[str, Tensor]]:
    by_role = {slot.role: slot for slot in slots}
    for slot in slots:
        if modules.get(slot.module, {}).keys() - {slot.side}:
            raise _Stays("more is trained in it than heads or channels")
    units = by_role["v" if is_attention else "up"].count  # key/value groups, or channels
    chosen = {role: _chosen_units(slot, modules, units) for role, slot in by_role.items()}
    unit_order = front_order([chosen[role] for role in (ATTENTION if is_attention else MLP) if role in chosen])
    permutations: dict[str, dict[str, Tensor]] = {}
    for slot in slots:
        features = slot.unit * slot.count // units  # a unit's, in this matrix: of q and o all heads of the group
        moved = (unit_order[:, None] * features + torch.arange(features)).reshape(-1) + slot.start
        side = permutations.setdefault(slot.module, {}).setdefault(slot.side, torch.arange(_side(spec, slot)))
        side[slot.start : slot.start + len(moved)] = moved
    return permutations


def _side(spec: ModelSpec, slot: RoleSlice) -> int:
    """Features on the slot's side of its module: in a fused projection more than the slot's own."""
    rows, columns = spec.linears[slot.module]
    return rows if slot.side == "rows" else columns


def _fits(index: Tensor, inverse: Tensor) -> bool:
    """Whether all indices lie inside, which `convert` checks and reports."""
    return bool(((index >= 0) & (index < len(inverse))).all())


def _chosen_units(slot: RoleSlice, modules: Modules, units: int) -> Tensor:
    """Which units (units,) of the slot are selected, as a mask; one that is selected in part cannot be moved."""
    index = modules.get(slot.module, {}).get(slot.side)
    mask = torch.zeros(slot.count * slot.unit, dtype=torch.bool)
    if index is not None:
        own = index[(index >= slot.start) & (index < slot.start + len(mask))]
        mask[own - slot.start] = True
    by_unit = mask.view(units, -1)
    if (by_unit.any(1) != by_unit.all(1)).any():
        groups = "key/value groups" if slot.count != units else "heads"
        raise _Stays(f"the selection does not fill whole {groups}")
    return by_unit.all(1)


def front_order(chosen: list[Tensor]) -> Tensor:
    """Unit (units,) at each place, such that as many of the sets `chosen` (masks (units,)) as can be are consecutive.

    The first two that select anything always are: first what only the first has, then what both have, then what only
    the second has, then the rest. Inside each of these the further sets come first, then the order is the original.
    """
    sets = [mask for mask in chosen if mask.any()] or [torch.zeros_like(chosen[0])]
    first, second, *others = [*sets, torch.zeros_like(sets[0])] if len(sets) == 1 else sets
    region = torch.full((len(first),), 3)
    region[second] = 2
    region[first] = 0
    region[first & second] = 1
    keys = [region.tolist(), *[(~mask).tolist() for mask in others]]
    return torch.tensor(sorted(range(len(first)), key=lambda unit: [key[unit] for key in keys]), dtype=torch.int64)


def _check_structure(
    model: nn.Module, parent: str, slots: list[RoleSlice], spec: ModelSpec, *, is_attention: bool
) -> None:
    """Raises `_Stays` unless the units of this attention or MLP are known to be alike, so that moving them is exact."""
    by_role = {slot.role: slot for slot in slots}
    if any(slot.module in spec.stacked for slot in slots):
        raise _Stays("its experts are kept as one parameter")
    needed = set("qkvo") if is_attention else {"up", "down"}
    if not needed <= by_role.keys() or len(by_role) < len(slots):
        raise _Stays("the roles of its projections are not known")
    names = {slot.module for slot in slots}
    if any(stands_beside(model.get_submodule(name)) for name in names):
        raise _Stays("its weights cannot be rewritten (quantized, or in shards)")
    if names & spec.transposed:
        raise _Stays("its weights are stored transposed (Conv1D)")
    if tied_names(model, names):
        raise _Stays("its weights are shared with another module")
    config = model.config.get_text_config()
    if is_attention:
        # transformers' MPT adds ALiBi whatever its config says.
        if config.model_type == "mpt" or any(getattr(config, field, None) for field in HEADS_DIFFER):
            raise _Stays("its heads differ by more than their weights, or other layers read them")
        expected = {"q": spec.num_heads, "o": spec.num_heads, "k": spec.num_kv_heads, "v": spec.num_kv_heads}
        if any(by_role[role].count != count for role, count in expected.items()) or spec.num_heads % spec.num_kv_heads:
            raise _Stays("its projections do not have the heads that the model's config says")
    elif len({slot.count for slot in slots}) > 1:
        raise _Stays("its projections differ in their number of channels")
    # Anything else below the parent with weights of its own may treat units differently: attention sinks, norms over
    # all heads, an MLP that is no module of its own (OPT). Norms over one head's features treat all heads alike.
    linears = {id(model.get_submodule(name)) for name in names}
    for path, module in model.get_submodule(parent).named_modules():
        if id(module) in linears or getattr(module, "sparseft_pattern", False):
            continue
        shapes = [full_shape(t) for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
        if is_attention and path and "." not in path:
            head_norm = "norm" in path and all(shape == (by_role["k"].unit,) for shape in shapes)
            if head_norm or "Rotary" in type(module).__name__:
                continue
        if any(path == "" or is_attention or shape.numel() > 1 for shape in shapes):
            what = (
                f"a {type(module).__name__} beside its projections has" if path else "it has, beside its projections,"
            )
            raise _Stays(f"{what} weights that may tell units apart")

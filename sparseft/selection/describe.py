"""How much trains, in words: of any method in all, of a selection by role."""

from __future__ import annotations

from typing import Any

from sparseft import console
from sparseft.models.spec import ModelSpec
from sparseft.selection import TOLERANCE
from sparseft.selection.selection import Selection

HEAD_ROLES = ("q", "k", "v", "o")  # their units are heads, every other role's channels


def describe_trainable(trainable: int, spec: ModelSpec, settings: Any, unit: str) -> None:
    """Says how much trains by a method's `settings`, in which `unit`, and warns where it is off by more than a tenth
    from the share asked for: what a method trains whole cannot meet every share. Linears in scope that cannot train
    are named."""
    if note := spec.frozen_note(settings.scope):
        console.warn(note)
    scope = spec.weights_in(settings.scope)
    console.log(
        f"trainable: {trainable:,} of {scope:,} weights in scope (sparsity {1 - trainable / scope:.2%} in scope, "
        f"{1 - trainable / spec.total_parameters:.2%} of the whole model), in {unit}"
    )
    sparsity = settings.wanted_sparsity
    if sparsity is not None:
        wanted = (1 - sparsity) * scope
        if abs(trainable - wanted) > TOLERANCE * wanted:
            console.warn(
                f"sparsity {sparsity} asks for {wanted:,.0f} trainable weights; with {unit} it is {trainable:,} "
                f"(sparsity {1 - trainable / scope:.4f})"
            )


def describe_selection(selection: Selection, spec: ModelSpec, settings: Any) -> None:
    """`describe_trainable` of a sparse method's selection, and what trains of each role."""
    describe_trainable(selection.meta["trainable_parameters"], spec, settings, settings.granularity(selection))
    if not settings.by_role:
        return
    roles = [
        f"{role} {chosen:,} of {there:,} {'heads' if role in HEAD_ROLES else 'channels'} ({entries:,} weights)"
        for role, (chosen, there, entries) in units_by_role(selection, spec).items()
    ]
    if roles:
        console.log(f"trainable by role: {', '.join(roles)}")


def units_by_role(selection: Selection, spec: ModelSpec) -> dict[str, tuple[int, int, int]]:
    """Of each role that trains: its units chosen, its units in all layers, and the weights that the chosen ones have.

    Empty of linears whose roles are not known.
    """
    totals: dict[str, list[int]] = {}
    for slot in spec.slots:
        index = selection.modules.get(slot.module, {}).get(slot.side)
        features = 0
        if index is not None:
            features = int(((index >= slot.start) & (index < slot.start + slot.unit * slot.count)).sum())
        total = totals.setdefault(slot.role, [0, 0, 0])
        for position, value in enumerate((features // slot.unit, slot.count, features * slot.other)):
            total[position] += value
    return {role: (chosen, there, entries) for role, (chosen, there, entries) in totals.items() if entries}

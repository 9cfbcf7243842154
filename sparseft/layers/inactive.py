"""Re-selection: a layer swaps entries it has trained for others, while the weight keeps what was learnt.

Inactive deltas (fp32) and base values wait on the host, so the device's memory stays that of one selection. Entries
that come back find their own delta and base again; the adapter is the union of all that was ever trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseft.errors import UserError
from sparseft.kernels import reference
from sparseft.layers.pattern import Entries, Pattern, entry_dim, index_keys, index_of_keys, positions_of
from sparseft.layers.sparse_linear import SparseLinear


@torch.no_grad()
def swap(layer: SparseLinear, kind: str, index: Tensor) -> Tensor:
    """Trains the entries `index` from now on, as many as before; returns where each one was (-1: a newcomer).

    Entries that stay keep their delta, those that leave become inactive, those that come back go on from their
    inactive delta, and new ones start from the weight as it is. The weight does not change.
    """
    if len(layer.patterns) != 1:
        raise UserError("re-selection needs a layer with one kind of pattern: fused adapters cannot change theirs.")
    if layer.beside:
        raise UserError(
            "re-selection keeps what was learnt in the weights, which quantized or sharded ones cannot; use "
            "method.reselect_steps=0."
        )
    pattern = layer.patterns[kind]
    if index.shape != pattern.index.shape or reference.values_shape(
        kind, index, (layer.out_features, layer.in_features), pattern.block_size
    ) != tuple(pattern.delta.shape):
        raise UserError(
            f"re-selection keeps the number of {kind}: expected {tuple(pattern.index.shape)}, got {tuple(index.shape)}."
        )
    layer.write_back()
    dim = entry_dim(kind)
    old, new = index_keys(kind, pattern.index), index_keys(kind, index)
    source, back = positions_of(new, old), positions_of(old, new)
    index = index.to(pattern.delta.device)
    base = reference.gather(layer.logical_weight, kind, pattern.stored(index), pattern.block_size)
    chosen = Entries(index, torch.zeros_like(pattern.delta), base)
    stays = (source >= 0).nonzero().flatten()
    _copy(chosen, stays, pattern.active, source[stays], dim)
    inactive = pattern.inactive
    if inactive is not None:
        place = torch.where(source < 0, positions_of(new, index_keys(kind, inactive.index)), -1)
        returns = (place >= 0).nonzero().flatten()
        _copy(chosen, returns, inactive, place[returns], dim)
        left = torch.ones(inactive.delta.shape[dim], dtype=torch.bool)
        left[place[returns]] = False
        inactive = _pick(kind, inactive, left.nonzero().flatten())
    leaves = (back < 0).nonzero().flatten()
    pattern.inactive = _joined(kind, inactive, _pick(kind, pattern.active, leaves))
    pattern.delta.copy_(chosen.delta)
    pattern.delta.grad = None  # of entries that no longer train
    pattern.set_index(chosen.index, chosen.base)
    return source


def _copy(target: Entries, at: Tensor, source: Entries, place: Tensor, dim: int) -> None:
    """Copies the values of entries `place` of `source` to entries `at` of `target`."""
    for values, found in ((target.delta, source.delta), (target.base, source.base)):
        chosen = found.index_select(dim, place.to(found.device)).to(values)
        values.index_copy_(dim, at.to(values.device), chosen)


def _pick(kind: str, entries: Entries, which: Tensor) -> Entries | None:
    """The entries `which`, copied to the host; None where there are none."""
    if not len(which):
        return None
    dim = entry_dim(kind)
    index, order = index_of_keys(kind, index_keys(kind, entries.index)[which])
    values = (v.detach().index_select(dim, which[order].to(v.device)).cpu() for v in (entries.delta, entries.base))
    return Entries(index, *values)


def _joined(kind: str, first: Entries | None, second: Entries | None) -> Entries | None:
    if first is None or second is None:
        return first or second
    dim = entry_dim(kind)
    index, order = index_of_keys(kind, torch.cat([index_keys(kind, first.index), index_keys(kind, second.index)]))
    both = (first.delta, second.delta), (first.base, second.base)
    return Entries(index, *(torch.cat(values, dim).index_select(dim, order) for values in both))


def union(pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Index and delta of all that the pattern ever trained, sorted by index: what an adapter's file holds."""
    if pattern.inactive is None:
        return pattern.index, pattern.delta.detach()
    dim = entry_dim(pattern.kind)
    keys = torch.cat([index_keys(pattern.kind, part) for part in (pattern.index, pattern.inactive.index)])
    delta = torch.cat([pattern.delta.detach().cpu(), pattern.inactive.delta], dim=dim)
    ascending = keys.argsort()
    index, order = index_of_keys(pattern.kind, keys[ascending])
    return index, delta.index_select(dim, ascending[order])


@torch.no_grad()
def restore_active(layer: SparseLinear, kind: str, active: Tensor, index: Tensor, delta: Tensor) -> None:
    """Continues where a saved run stood: of the union (`index`, `delta`) `active` trains, the rest is inactive.

    `active` keeps its order, which the optimizer's moments go by; it has as many entries as the pattern has now.
    """
    pattern = layer.patterns[kind]
    dim = entry_dim(kind)
    keys = index_keys(kind, index)
    place = positions_of(index_keys(kind, active), keys)
    if active.shape != pattern.index.shape or (place < 0).any():
        raise UserError(f"the {kind} in training are no part of the saved adapter, or not as many as the layer trains.")
    layer.restore_base()
    pattern.inactive = None
    active = active.to(pattern.delta.device)
    rest = torch.ones(len(keys), dtype=torch.bool)
    rest[place] = False
    which = rest.nonzero().flatten()
    weight = layer.logical_weight
    if len(which):
        others, order = index_of_keys(kind, keys[which])
        base = reference.gather(weight, kind, pattern.stored(others), pattern.block_size)
        pattern.inactive = Entries(others, delta.index_select(dim, which[order]).cpu(), base.cpu())
    pattern.delta.copy_(delta.index_select(dim, place))
    pattern.set_index(active, reference.gather(weight, kind, pattern.stored(active), pattern.block_size))
    layer.write_back()
    layer.write_inactive()

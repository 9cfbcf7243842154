"""Re-selection: a layer parks entries it has trained and takes others, while the weight keeps what was learnt.

Parked deltas (fp32) and base values wait on the host, so the device's memory stays that of one selection. Entries that
come back find their own delta and base again; the adapter is the union of all that was ever trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseft.errors import UserError
from sparseft.kernels import reference

if TYPE_CHECKING:
    from sparseft.layers.pattern import Pattern
    from sparseft.layers.sparse_linear import SparseLinear


@dataclass
class Parked:
    """Entries out of training, on the host: index (p,) or (p, 2), delta in fp32 and base values, shaped as values."""

    index: Tensor
    delta: Tensor
    base: Tensor


def entry_dim(kind: str) -> int:
    """The dimension of a pattern's values that its index counts."""
    return 1 if kind == "columns" else 0


def index_keys(kind: str, index: Tensor) -> Tensor:
    """One int64 number for each entry of an index, on the CPU."""
    index = index.cpu()
    return (index[:, 0] << 32) + index[:, 1] if kind == "blocks" else index


def positions_of(wanted: Tensor, among: Tensor) -> Tensor:
    """Where each key of `wanted` lies among the distinct keys `among`; -1 where it does not."""
    if len(among) == 0:
        return torch.full_like(wanted, -1)
    order = among.argsort()
    place = torch.searchsorted(among[order], wanted).clamp_max(len(among) - 1)
    return torch.where(among[order][place] == wanted, order[place], -1)


@torch.no_grad()
def exchange(layer: SparseLinear, kind: str, index: Tensor) -> Tensor:
    """Trains the entries `index` from now on, as many as before; returns where each one was (-1: a newcomer).

    Entries that stay keep their delta, those that leave are parked, those that come back take up their parked delta,
    and new ones start from the weight as it is. The weight does not change.
    """
    if len(layer.patterns) != 1:
        raise UserError("re-selection needs a layer with one kind of pattern: fused adapters cannot change theirs.")
    pattern = layer.patterns[kind]
    if index.shape != pattern.index.shape:
        raise UserError(
            f"re-selection keeps the number of {kind}: expected {tuple(pattern.index.shape)}, got {tuple(index.shape)}."
        )
    layer.write_back()
    dim, device = entry_dim(kind), pattern.delta.device
    old, new = index_keys(kind, pattern.index), index_keys(kind, index)
    source, back = positions_of(new, old), positions_of(old, new)
    index = index.to(device)
    base = reference.gather(layer.logical_weight, kind, pattern.stored(index), pattern.block_size)
    delta = torch.zeros_like(pattern.delta)
    stays = (source >= 0).nonzero().flatten()
    _copy(delta, base, dim, stays, pattern.delta, pattern.base_values, source[stays])
    parked = pattern.parked
    if parked is not None:
        place = torch.where(source < 0, positions_of(new, index_keys(kind, parked.index)), -1)
        returns = (place >= 0).nonzero().flatten()
        _copy(delta, base, dim, returns, parked.delta, parked.base, place[returns])
        left = torch.ones(len(parked.index), dtype=torch.bool)
        left[place[returns]] = False
        parked = _pick(parked.index, parked.delta, parked.base, dim, left.nonzero().flatten())
    leaves = (back < 0).nonzero().flatten()
    gone = _pick(pattern.index, pattern.delta, pattern.base_values, dim, leaves)
    pattern.parked = _joined(parked, gone, dim)
    pattern.delta.copy_(delta)
    pattern.delta.grad = None  # of entries that no longer train
    pattern.set_index(index, base)
    return source


def _copy(
    delta: Tensor, base: Tensor, dim: int, at: Tensor, from_delta: Tensor, from_base: Tensor, place: Tensor
) -> None:
    """Copies entries `place` of another pattern's values to entries `at`."""
    for target, values in ((delta, from_delta), (base, from_base)):
        chosen = values.index_select(dim, place.to(values.device)).to(target)
        target.index_copy_(dim, at.to(target.device), chosen)


def _pick(index: Tensor, delta: Tensor, base: Tensor, dim: int, which: Tensor) -> Parked:
    """The entries `which`, copied to the host."""
    picked = (values.detach().index_select(dim, which.to(values.device)).cpu() for values in (delta, base))
    return Parked(index.cpu()[which], *picked)


def _joined(first: Parked | None, second: Parked, dim: int) -> Parked | None:
    if first is not None and len(first.index):
        second = Parked(
            torch.cat([first.index, second.index]),
            torch.cat([first.delta, second.delta], dim=dim),
            torch.cat([first.base, second.base], dim=dim),
        )
    return second if len(second.index) else None


def union(pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Index and delta of all that the pattern ever trained, sorted by index: what an adapter's file holds."""
    if pattern.parked is None:
        return pattern.index, pattern.delta.detach()
    dim = entry_dim(pattern.kind)
    index = torch.cat([pattern.index.cpu(), pattern.parked.index])
    delta = torch.cat([pattern.delta.detach().cpu(), pattern.parked.delta], dim=dim)
    order = index_keys(pattern.kind, index).argsort()
    return index[order], delta.index_select(dim, order)


@torch.no_grad()
def take_up(layer: SparseLinear, kind: str, active: Tensor, index: Tensor, delta: Tensor) -> None:
    """Continues where a saved run stood: of the union (`index`, `delta`) `active` trains, the rest is parked.

    `active` keeps its order, which the optimizer's moments go by; it has as many entries as the pattern has now.
    """
    pattern = layer.patterns[kind]
    dim = entry_dim(kind)
    place = positions_of(index_keys(kind, active), index_keys(kind, index))
    if active.shape != pattern.index.shape or (place < 0).any():
        raise UserError(f"the {kind} in training are no part of the saved adapter, or not as many as the layer trains.")
    layer.restore_base()
    pattern.parked = None
    active = active.to(pattern.delta.device)
    rest = torch.ones(len(index), dtype=torch.bool)
    rest[place] = False
    which = rest.nonzero().flatten()
    weight = layer.logical_weight
    if len(which):
        parked = reference.gather(weight, kind, pattern.stored(index[which]), pattern.block_size)
        pattern.parked = Parked(index[which].cpu(), delta.index_select(dim, which).cpu(), parked.cpu())
    pattern.delta.copy_(delta.index_select(dim, place))
    pattern.set_index(active, reference.gather(weight, kind, pattern.stored(active), pattern.block_size))
    layer.write_back()
    layer.write_parked()


def move_moments(optimizer: torch.optim.Optimizer, pattern: Pattern, source: Tensor) -> None:
    """Rearranges the optimizer's state after `exchange`: entries that stayed keep their moments, newcomers start at 0.

    State of another shape than the delta (Adafactor's factored moments) cannot be taken apart and starts anew.
    """
    state = optimizer.state.get(pattern.delta)
    if not state:
        return
    stays = (source >= 0).nonzero().flatten()
    dim = entry_dim(pattern.kind)
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.numel() <= 1:
            continue  # step counts
        if value.shape != pattern.delta.shape:
            del optimizer.state[pattern.delta]
            return
        moved = torch.zeros_like(value)
        kept = value.index_select(dim, source[stays].to(value.device))
        state[name] = moved.index_copy_(dim, stays.to(value.device), kept)

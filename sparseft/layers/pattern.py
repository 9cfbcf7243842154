"""`Pattern`: which entries of one weight train, with their base values and deltas."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.errors import UserError
from sparseft.kernels import dispatch, grid, reference
from sparseft.kernels.block_group import joint_tokens
from sparseft.kernels.kinds import KINDS
from sparseft.layers.product import Blocks, Columns, Grid, Plan, Rows, SharedSlice, slice_of

# A layer of blocks that stands alone saves the needed column blocks of x when they are at most this share of it: a
# larger slice of its own may cost more than x itself, which others may save too. In a model
# `layers/saved_inputs.py` knows.
SLICE_SHARE = 0.5

INACTIVE = "parked_"  # how a state dict's names of inactive entries begin; checkpoints hold them
BlockRuns = list[tuple[Tensor, Tensor]]  # see `block_runs`


class Count:
    """How often something has happened, for all that want to know whether it has since they looked."""

    def __init__(self) -> None:
        self.count = 0


# What happens to any pattern, of any layer, that makes a plan of how to train it out of date. That is seldom, and a
# plan is made quickly; to know in each forward pass that nothing happened takes one comparison.
changes = Count()

# Optimizers' steps and changes of mode. Either may have changed any delta without a trace in its version: fused steps
# and `.data` leave none. One count for all, since to tell each pattern in each step would take time.
updates = Count()


@dataclass
class Entries:
    """Some entries of a pattern: its index, their deltas in fp32 and base values, shaped as values are."""

    index: Tensor
    delta: Tensor
    base: Tensor


class Pattern(nn.Module):
    """The trained entries of one kind: `index` (int64), `base_values` (the weight's dtype), `delta` (fp32).

    `index` is (k,) for rows and columns, (n, 2) for blocks and as `kernels/grid.py` has it for grids, in the order of
    the checkpoint; the values have the shapes of `kernels/reference.py`. Casting the model leaves `delta` in fp32.

    Where the weight is stored permuted, `inverse` says at which stored row (column) each original one lies, and
    `at` is where the entries lie in the stored weight. Of blocks, `needed_columns` are the distinct block columns
    (those of all layers that share a slice: `share`) and `position` (n,) each block's place among them. Of rows or
    columns that are consecutive in the stored weight, `run` is (start, length).
    `inactive` holds, on the host, entries that have trained before and wait (`layers/inactive.py`).
    """

    residual = False  # whether it starts from what quantization took of its entries (`layers/beside.py`)
    slices: SharedSlice | None = None  # of blocks: shared with layers that read the same input
    compact: Tensor | None  # base values + delta in the compute dtype, where no weight holds them (`layers/beside.py`)
    written_delta: Tensor | None = None  # what the weight was last written with, at its `written_version`
    written_version: int
    sparseft_pattern = True  # how modules below this one tell deltas from the base's parameters

    def __init__(
        self, kind: str, index: Tensor, weight: Tensor, block_size: int | None = None, inverse: Tensor | None = None
    ) -> None:
        super().__init__()
        self.kind = kind
        self.block_size = block_size
        check_index(kind, index, tuple(weight.shape), block_size)
        self.shape = reference.values_shape(kind, index, tuple(weight.shape), block_size)
        index = index.to(device=weight.device, dtype=torch.int64)
        self.register_buffer("index", index)
        self.register_buffer("inverse", inverse, persistent=False)
        self.register_buffer("needed_columns", None, persistent=False)
        self.register_buffer("position", None, persistent=False)
        self._locate()
        self.register_buffer("base_values", self._read(weight))
        self.register_buffer("compact", None, persistent=False)
        self.delta = nn.Parameter(torch.zeros(self.shape, dtype=torch.float32, device=weight.device))
        self.wrote(self.delta)
        self.inactive: Entries | None = None

    @property
    def active(self) -> Entries:
        """The entries that train, live."""
        return Entries(self.index, self.delta, self.base_values)

    def permute(self, inverse: Tensor | None) -> None:
        """The weight is stored in another order from now on: original row (column) i lies at `inverse[i]`."""
        self.inverse = inverse
        self._locate()

    @property
    def at(self) -> reference.At:
        """Where the entries lie in the stored weight: (start, length) where consecutive, a grid's rows and columns,
        else as `index` has them."""
        if self.kind == "grid":
            return self.grids
        # To a compiler the numbers are part of the code, which would serve no layer whose entries start elsewhere. In a
        # permuted layout they start at 0 in all of them.
        by_chance = self.inverse is None and torch.compiler.is_compiling()
        return self.stored(self.index) if by_chance or self.run is None else self.run

    def stored(self, index: Tensor) -> Tensor:
        """Where the entries `index` of the checkpoint lie in the stored weight, on the pattern's device."""
        index = index.to(self.index.device)
        return index if self.inverse is None else self.inverse.index_select(0, index)

    def set_index(self, index: Tensor, base_values: Tensor) -> None:
        """Other entries under the same delta, which the weight holds already."""
        self.index, self.base_values = index, base_values
        self.share(None)  # until `share_inputs` has seen the new index
        self.wrote(self.delta)

    def take_base(self, weight: Tensor) -> None:
        """Reads `base_values` anew from a weight (out, in) that holds the base's entries."""
        if self.index.device != weight.device or self.delta.device != weight.device:
            self.to(weight.device)
        self.base_values = self._read(weight)
        changes.count += 1
        if self.inactive is not None:
            at = self.stored(self.inactive.index)
            self.inactive.base = reference.gather(weight.detach(), self.kind, at, self.block_size).cpu()

    def _read(self, weight: Tensor) -> Tensor:
        if weight.is_meta:
            return weight.new_empty(self.shape)
        return reference.gather(weight.detach(), self.kind, self.at, self.block_size)

    def columns_needed(self, in_features: int, keeps_input: bool | None = None) -> tuple[Tensor, Tensor] | None:
        """For blocks: (unique block columns, each block's position among them), or None where x itself is saved.

        `keeps_input` says which; None: as a layer that stands alone decides.
        """
        if self.needed_columns is None:
            return None
        if keeps_input is None:
            keeps_input = len(self.needed_columns) > SLICE_SHARE * math.ceil(in_features / self.block_size)
        return None if keeps_input else (self.needed_columns, self.position)

    def plan(self, transposed: bool, in_features: int, keeps_input: bool | None) -> Plan:
        """How the product trains this pattern of a weight (stored `transposed` or not); up to date until `changes`
        counts. `keeps_input` is as in `columns_needed`."""
        if self.kind == "rows":
            return Rows(transposed, self.at)
        if self.kind == "columns":
            return Columns(transposed, self.at if self.padded is None else self.padded, len(self.index))
        if self.kind == "grid":
            return Grid(transposed, self.grids)
        assert self.block_size is not None
        assert self.sides is not None
        rows, columns = self.sides
        needed, columns = self.columns_needed(in_features, keeps_input) or (None, columns)
        # A compiler finds by itself what is computed twice.
        alone = self.slices is None or torch.compiler.is_compiling()
        take = slice_of if alone else self.slices.take
        return Blocks(
            transposed, rows, columns, self.block_size, needed, take, joint_tokens(self.block_size, rows.device)
        )

    def share(self, slices: SharedSlice | None) -> None:
        """Of blocks: saves a slice together with other layers, from which it takes its own columns; None: alone."""
        self.slices = slices
        self._locate()

    def block_runs(self, side: int) -> BlockRuns:
        """The blocks by their block row (side 0) or block column (side 1); worked out when first asked for."""
        if side not in self._block_runs:
            self._block_runs[side] = block_runs(self.index[:, side])
        return self._block_runs[side]

    def _locate(self) -> None:
        """Ahead of the forward pass: what depends on the index's values cannot be compiled into a graph."""
        changes.count += 1
        self.needed_columns = self.position = None
        self._block_runs: dict[int, BlockRuns] = {}
        self.run: reference.Run | None = None
        self.padded: Tensor | None = None
        self.sides = tuple(one.contiguous() for one in self.index.unbind(1)) if self.kind == "blocks" else None
        self.grids: Any = None
        if self.index.is_meta:
            return
        if self.kind == "grid":
            self.grids = grid.located(self.index, reference.padded)
            return
        if self.kind == "blocks":
            self.needed_columns, self.position = torch.unique(self.index[:, 1], return_inverse=True)
            if self.slices is not None:
                shared = self.slices.columns.to(self.index.device)
                if not torch.isin(self.needed_columns, shared).all():  # loaded with another index
                    self.slices = None
                    return
                self.needed_columns = shared
                self.position = torch.searchsorted(shared, self.sides[1])
            return
        position = self.at
        start = int(position[0])
        if torch.equal(position, torch.arange(start, start + len(position), device=position.device)):
            self.run = (start, len(position))
        elif self.kind == "columns":
            self.padded = reference.padded(position)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.written_version = -1  # a copy's delta counts its versions anew: to be written once more

    def wrote(self, delta: Tensor) -> None:
        """The weight holds base + `delta`, the pattern's own as it is now. One that is computed is not remembered, as
        it holds a graph: each forward pass writes it."""
        own = self.__dict__  # nn.Module's own way takes 1 µs, for each layer in each step, and registers parameters
        own["written_delta"] = delta if delta.is_leaf else None
        own["written_version"] = version_of(delta)

    def holds(self, delta: Tensor) -> bool:
        """Whether the weight was last written with this very tensor, which has not been changed in place since."""
        return delta is self.written_delta and version_of(delta) == self.written_version

    @property
    def stale(self) -> bool:
        """Whether `delta` was changed in place, or exchanged, since the weight was last written."""
        return not self.holds(self.delta)

    def _apply(self, fn, recurse: bool = True):
        def keep_fp32(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            keeps = tensor is self.delta or tensor is self.delta.grad or not tensor.is_floating_point()
            # The device moves, the precision stays: a delta in bf16 would lose small updates, and indices are integers
            # also where `model.type(torch.float32)` makes numbers of all that there is.
            return tensor.to(result.device) if keeps and result.dtype != tensor.dtype else result

        stale = self.stale
        super()._apply(keep_fp32, recurse)
        self._locate()
        if self.inactive is not None:
            self.inactive.base = self.inactive.base.to(self.base_values.dtype)
        if stale:
            self.written_version = -1
        else:
            self.wrote(self.delta)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.inactive is not None:
            destination |= {f"{prefix}{INACTIVE}{name}": value for name, value in vars(self.inactive).items()}

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if any(key.startswith(prefix) for key in state_dict):  # else a plain weight is loaded: SparseLinear handles it
            parts = {name: state_dict.pop(f"{prefix}{INACTIVE}{name}", None) for name in ("index", "delta", "base")}
            self.inactive = None if any(value is None for value in parts.values()) else Entries(**parts)
            super()._load_from_state_dict(state_dict, prefix, *args)
            self._locate()
            self.written_version = -1  # with assign=True the delta is another tensor, with versions of its own

    def extra_repr(self) -> str:
        size = f", block_size={self.block_size}" if self.kind == "blocks" else ""
        return f"{len(self.index)}{size}, trainable={self.delta.numel()}"


def block_runs(places: Tensor) -> BlockRuns:
    """The blocks that lie in each block row, from `places` (n,), the block row of each: all rows that have as many, m,
    together, as (rows (r,), numbers of their blocks (r, m) in the order of `places`)."""
    rows, counts = torch.unique(places.cpu(), return_counts=True)
    order, first = places.cpu().argsort(stable=True), counts.cumsum(0) - counts
    runs = []
    for count in counts.unique().tolist():
        alike = counts == count
        members = order[first[alike, None] + torch.arange(count, device="cpu")]
        runs.append((rows[alike].to(places.device), members.to(places.device)))
    return runs


def version_of(delta: Tensor) -> int:
    """How often `delta` was changed in place; a tensor made under `torch.inference_mode` keeps no count of it."""
    return 0 if delta.is_inference() else delta._version


def states_of(patterns: Iterable[Pattern]) -> tuple[int, ...]:
    """Another one once a delta of `patterns` was exchanged, or may have been changed; in this process alone."""
    return updates.count, *(number for each in patterns for number in (id(each.delta), version_of(each.delta)))


def entry_dim(kind: str) -> int:
    """The dimension of a pattern's values that its index counts."""
    return KINDS[kind].dim


def index_keys(kind: str, index: Tensor) -> Tensor:
    """One int64 number for each entry of an index, on the CPU: for each position of `entry_dim`."""
    return KINDS[kind].keys(index)


def index_of_keys(kind: str, keys: Tensor) -> tuple[Tensor, Tensor]:
    """What `index_keys` undoes: the index of entries with these keys (n,), and in which order they come in it (n,)."""
    return KINDS[kind].of_keys(keys)


def positions_of(wanted: Tensor, among: Tensor) -> Tensor:
    """Where each key of `wanted` lies among the distinct keys `among`; -1 where it does not."""
    if len(among) == 0:
        return torch.full_like(wanted, -1)
    order = among.argsort()
    place = torch.searchsorted(among[order], wanted).clamp_max(len(among) - 1)
    return torch.where(among[order][place] == wanted, order[place], -1)


def as_index(kind: str, index: Any) -> Tensor:
    """The caller's indices as an int64 tensor on the CPU: (k,), or (n, 2) for blocks; of a grid also a pair."""
    tensor = KINDS[kind].index(index)
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise UserError(f"{kind}: expected integer indices, got {tensor.dtype}.")
    return tensor.to(device="cpu", dtype=torch.int64)


def check_index(kind: str, index: Tensor, shape: tuple[int, int], block_size: int | None) -> None:
    """Raises `UserError` where indices have the wrong shape, repeat, or lie outside a weight of `shape` (out, in)."""
    if kind == "blocks":
        dispatch.mode()  # a wrong SPARSEFT_KERNELS is said here, not in the first backward pass
    KINDS[kind].check(index, shape, block_size)


def same_entries(patterns: Mapping[str, Mapping[str, Pattern]], others: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether patterns train exactly the entries that `others` (each with `index` and `block_size`) name, in the same
    order; both by module and kind."""
    mine = {(module, kind): pattern for module, kinds in patterns.items() for kind, pattern in kinds.items()}
    theirs = {(module, kind): other for module, kinds in others.items() for kind, other in kinds.items()}
    return mine.keys() == theirs.keys() and all(
        pattern.inactive is None
        and pattern.block_size == theirs[key].block_size
        and torch.equal(pattern.index.cpu(), theirs[key].index.cpu())
        for key, pattern in mine.items()
    )

"""Whole weights that were written, held against base + delta, parameter by parameter, experts one by one.

The checkpoint's tensors are read as transformers makes parameters of them, and each linear's matrix is compared as a
whole: an entry that is missing, one too many and one that differs in a bit are all seen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sparseft.errors import RunError, shown
from sparseft.export.changed_tensors import FLOATS, base_model, base_of, bits, merged_model
from sparseft.export.changes import SparseChange
from sparseft.export.source import Source
from sparseft.files.tensors import Stored
from sparseft.models.checkpoint import Checkpoint, Places, Weight, weight_of, without_weights


class Wanted(NamedTuple):
    """The values (n,) of a piece (`Places.pieces`) of a parameter of `shape`, the first of them at `start`. terms (n,):
    where several differences meet in an entry, which may be added in any order, the sum of the sizes of all that is
    added up there, else 0; None: they meet nowhere."""

    name: str
    shape: torch.Size
    start: int
    values: Tensor
    terms: Tensor | None = None


def check_values(
    source: Source,
    read: Callable[[str], Tensor],
    dtype: torch.dtype | None = None,
    checkpoint: Checkpoint | None = None,
) -> None:
    """RunError where a parameter, made of the tensors that `read` gives by the names of the base's checkpoint, is not
    the base's with the source's differences, rounded once (to `dtype`, None: to the dtype of the base's). checkpoint:
    the base's, as it is stored where none is given."""
    checkpoint = checkpoint or Checkpoint.of(base_of(source))
    places = Places(without_weights(base_of(source), packed=True), checkpoint.tensors)
    wanted = _of_sparse if source.kind == "sparse" else _of_merged
    stored = {name: Stored(_written(each.dtype, dtype), each.shape) for name, each in checkpoint.tensors.items()}
    at, written = "", iter(())
    for name, shape, start, values, terms in wanted(source, places, checkpoint, dtype):
        if name != at and places.holds(name):
            at, written = name, places.pieces(name, _as_stored(read, stored))
        elif name != at:
            own = _as_stored(read, {name: Stored(values.dtype, shape)})
            at, written = name, iter([(0, own(name).reshape(-1))])
        place, there = next(written)
        assert (place, len(there), there.dtype) == (start, len(values), values.dtype)
        _check_part(name, there, values, terms)
        del there, values, terms  # before the next ones are made


def _written(stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which what the base stores in one is to be written."""
    return dtype if dtype is not None and stored in FLOATS else stored


def _as_stored(read: Callable[[str], Tensor], stored: Mapping[str, Stored]) -> Callable[[str], Tensor]:
    """`read`, whose tensors have to have these dtypes and shapes: those that become one parameter would hide theirs."""

    def checked(name: str) -> Tensor:
        there, (dtype, shape) = read(name), stored[name]
        for found, expected in ((there.dtype, dtype), (tuple(there.shape), tuple(shape))):
            if found != expected:
                raise RunError(
                    f"the export is not what was trained: {shown(name)} is {found} there, expected {expected}. "
                    "Nothing was kept."
                )
        return there

    return checked


def _check_part(name: str, there: Tensor, values: Tensor, terms: Tensor | None) -> None:
    differs = bits(there) != bits(values)
    if terms is not None:  # each addition rounds to what it has so far, which may be far more than what is left
        rounding = torch.finfo(terms.dtype).eps * terms + torch.finfo(values.dtype).eps * values.abs()
        differs &= ~((terms > 0) & ((there - values).abs() <= rounding))
    if count := int(differs.count_nonzero()):
        raise RunError(
            f"the export is not what was trained: {count:,} of the {differs.numel():,} values of {shown(name)} are "
            "not base + delta. Nothing was kept."
        )


def _of_sparse(source: Source, places: Places, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Iterator[Wanted]:
    model = without_weights(base_of(source), packed=True)
    linears: dict[str, dict[int, tuple[Weight, SparseChange]]] = defaultdict(dict)
    for module, change in source.changes.items():
        weight = weight_of(model, module)
        linears[weight.parameter][weight.offset] = weight, change
    for name in filter(places.holds, places.parameters):
        shape = places.parameters[name].shape
        for start, base in places.pieces(name, checkpoint.read):
            target = _written(base.dtype, dtype)
            if start in linears[name]:
                yield Wanted(name, shape, start, *_changed(base, *linears[name].pop(start), target))
            else:
                yield Wanted(name, shape, start, base.to(target))
            del base  # before the next one is read
        assert not linears[name]


def _changed(base: Tensor, weight: Weight, change: SparseChange, target: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The values (n,) of one linear of the values (n,) of its base, and their `terms`."""
    wide = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
    own = weight._replace(offset=0)
    matrix, terms = own.within(wide), None
    if len(change.kinds) > 1:
        terms = torch.zeros_like(wide)
        parts = [SparseChange(change.shape, {kind: value}) for kind, value in change.kinds.items()]
        count = sum(_touched(part, weight.shape).int() for part in parts)
        sizes = matrix.abs() + sum(part.dense().abs() for part in parts)
        own.within(terms).copy_(torch.where(count > 1, sizes, 0.0))
    touched = _touched(change, weight.shape)
    matrix.copy_(torch.where(touched, matrix + change.dense(), matrix))  # -0.0 + 0.0 is another zero
    return wide.to(target), terms


def _touched(change: SparseChange, shape: tuple[int, int]) -> Tensor:
    touched = torch.zeros(shape, dtype=torch.bool)
    touched.view(-1)[change.entries()] = True
    return touched


def _of_merged(source: Source, places: Places, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Iterator[Wanted]:
    model = merged_model(source, base_model(source, dtype, checkpoint), dtype)
    merged = dict(model.named_parameters(remove_duplicate=False))
    own = Places(model, checkpoint.tensors)
    for name, value in own.parameters.items():
        if not own.holds(name):  # a head that is not tied any more
            yield Wanted(name, value.shape, 0, value.detach().cpu().flatten())
    for name in filter(places.holds, places.parameters):
        value = merged[name].detach().reshape(-1)
        for start, base in places.pieces(name, checkpoint.read):
            ours = value[start : start + len(base)].cpu()
            target = _written(base.dtype, dtype)
            # A tensor that is wider in the files keeps what did not change.
            same = bits(base.to(ours.dtype)) == bits(ours)
            yield Wanted(name, merged[name].shape, start, torch.where(same, base.to(target), ours.to(target)))
            del base, ours, same

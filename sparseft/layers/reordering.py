"""Weights stored in another order of their rows and columns than the checkpoint's (S2FT §3.2's co-permutation).

An *order* (n,) int64 says which original row (or column) each stored one is; null that none was moved. Its inverse,
the *place*, says where each original one is stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparseft.distributed.zero3 import gathered

if TYPE_CHECKING:
    from sparseft.layers.sparse_linear import SparseLinear


def inverse(order: Tensor | None) -> Tensor | None:
    """The inverse of a permutation (n,); null, that nothing was moved, is its own."""
    return order.argsort() if order is not None else None


def fits_order(kind: str, rows: Tensor | None, columns: Tensor | None) -> bool:
    """Whether a pattern can train a weight in these orders: rows need the columns in place, blocks need both."""
    return (kind == "rows" or rows is None) and (kind == "columns" or columns is None)


def arranged(tensor: Tensor, rows: Tensor | None, columns: Tensor | None, *, transposed: bool) -> Tensor:
    """A weight as its layer stores it, or a bias (out,), with its rows and columns picked in the given orders."""
    row_dim = 1 if transposed and tensor.dim() == 2 else 0
    if rows is not None:
        tensor = tensor.index_select(row_dim, rows.to(tensor.device))
    if columns is not None and tensor.dim() == 2:
        tensor = tensor.index_select(1 - row_dim, columns.to(tensor.device))
    return tensor


def arrange_entries(layer: SparseLinear, entries: dict[str, Any], prefix: str, *, stored: bool) -> None:
    """Brings a state dict's weight and bias of `layer` into its stored or the original order, in place.

    What does not fit the layer is left as it is, for torch to report.
    """
    rows, columns = layer.row_order, layer.column_order
    if not stored:
        rows, columns = inverse(rows), inverse(columns)
    for name, parameter in (("weight", layer.weight), ("bias", layer.bias)):
        tensor = entries.get(prefix + name)
        # ZeRO-3 has sharded a weight without entries away.
        if parameter is not None and tensor is not None and tensor.shape == parameter.shape and tensor.numel():
            entries[prefix + name] = arranged(tensor, rows, columns, transposed=layer.transposed)


def make_way(layers: Mapping[str, SparseLinear], patterns: Mapping[str, Mapping[str, Any]]) -> None:
    """Brings all layers into the original order if any could not train its `patterns` (by module and kind) as it is.

    All, because coupled layers are in one order.
    """
    if not all(
        fits_order(kind, layer.row_order, layer.column_order)
        for module, layer in layers.items()
        for kind in patterns.get(module, {})
    ):
        for layer in layers.values():
            reorder(layer)


@contextlib.contextmanager
def original_order(layers: Iterable[SparseLinear]) -> Iterator[None]:
    """Inside, the layers store their weights in the checkpoint's order; afterwards in their own again."""
    orders = [(layer, layer.row_order, layer.column_order) for layer in layers if layer.reordered]
    try:
        for layer, _, _ in orders:
            reorder(layer)
        yield
    finally:
        for layer, rows, columns in orders:
            reorder(layer, rows, columns)


@torch.no_grad()
def reorder(layer: SparseLinear, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Stores the original's row `rows[i]` (and bias entry) as row i, and its column `columns[j]` as column j.

    `rows` (out,) and `columns` (in,) are permutations; null is the original order. What the weight holds and the
    deltas stay as they are, bit for bit. Raises ValueError where an order is no permutation of the layer's features,
    or a pattern of the layer needs its other side in place (`fits_order`).
    """
    for order, length in ((rows, layer.out_features), (columns, layer.in_features)):
        if order is not None and not torch.equal(order.sort().values.cpu(), torch.arange(length)):
            raise ValueError(f"expected a permutation of 0 … {length - 1}")
    for kind in layer.patterns:
        if not fits_order(kind, rows, columns):
            raise ValueError(f"a layer that trains {kind} keeps the order of its other side")
    device = layer.weight.device
    rows, columns = (order.to(device) if order is not None else None for order in (rows, columns))
    if not layer.weight.is_meta:
        old = inverse(layer.row_order), inverse(layer.column_order)
        for tensor in (layer.weight, layer.bias):
            if tensor is not None:
                with gathered([tensor], changed=True):
                    original = arranged(tensor.detach(), *old, transposed=layer.transposed)
                    tensor.detach().copy_(arranged(original, rows, columns, transposed=layer.transposed))
    layer.row_order, layer.column_order = rows, columns
    for kind, pattern in layer.patterns.items():
        pattern.put(layer.place_of(kind))

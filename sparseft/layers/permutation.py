"""Weights stored with their rows and columns permuted (S2FT §3.2's co-permutation).

A *permutation* (n,) int64 says which original row (or column) each stored one is; None that none was moved. Its
*inverse* says where each original one is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def inverse(permutation: Tensor | None) -> Tensor | None:
    """The inverse of a permutation (n,); None, that nothing was moved, is its own."""
    return permutation.argsort() if permutation is not None else None


def can_train(kind: str, rows: Tensor | None, columns: Tensor | None) -> bool:
    """Whether a weight so permuted can train a pattern: rows need the columns in place, blocks and grids need
    both."""
    return (kind == "rows" or rows is None) and (kind == "columns" or columns is None)


def permuted(tensor: Tensor, rows: Tensor | None, columns: Tensor | None, *, transposed: bool) -> Tensor:
    """A weight as its layer stores it, or a bias (out,), with its rows and columns picked by the permutations."""
    row_dim = 1 if transposed and tensor.dim() == 2 else 0
    if rows is not None:
        tensor = tensor.index_select(row_dim, rows.to(tensor.device))
    if columns is not None and tensor.dim() == 2:
        tensor = tensor.index_select(1 - row_dim, columns.to(tensor.device))
    return tensor


def permute_entries(
    entries: dict[str, Any],
    parameters: Mapping[str, Tensor | None],
    rows: Tensor | None,
    columns: Tensor | None,
    *,
    transposed: bool,
) -> None:
    """Permutes those of a state dict's entries that belong to a layer's `parameters` (by their names there), in place.

    What does not fit its parameter is left as it is, for torch to report.
    """
    for name, parameter in parameters.items():
        tensor = entries.get(name)
        # ZeRO-3 has sharded a weight without entries away.
        if parameter is not None and tensor is not None and tensor.shape == parameter.shape and tensor.numel():
            entries[name] = permuted(tensor, rows, columns, transposed=transposed)

"""Linear layers that train a pattern of their own weight, and the conversion of whole models."""

from __future__ import annotations

from sparseft.layers.beside import BesideLinear
from sparseft.layers.convert import convert, put_beside, restore, sparse_layers, start_at_checkpoint
from sparseft.layers.kinds import BlockSparseLinear, GridLinear, S2ColumnLinear, S2RowLinear
from sparseft.layers.pattern import Pattern
from sparseft.layers.permuted_layout import convert_permuted
from sparseft.layers.saved_inputs import share_inputs
from sparseft.layers.sparse_linear import SparseLinear
from sparseft.layers.write_back import write_back

__all__ = [
    "BesideLinear",
    "BlockSparseLinear",
    "GridLinear",
    "Pattern",
    "S2ColumnLinear",
    "S2RowLinear",
    "SparseLinear",
    "convert",
    "convert_permuted",
    "put_beside",
    "restore",
    "share_inputs",
    "sparse_layers",
    "start_at_checkpoint",
    "write_back",
]

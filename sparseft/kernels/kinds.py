"""The kinds of patterns, by name.

| kind | index | values |
| --- | --- | --- |
| rows | (k,) output features | (k, in) |
| columns | (k,) input features | (out, k) |
| blocks | (n, 2) block row, block column | (n, B, B); an edge block's part outside the weight is zero |
| grid | rows, then columns as -1 - column | (entries,), row by row |

A new one is a class in a file of its own, a line below, and what has a form of its own for it: its product
(`layers/product.py`, `layers/beside_product.py`, `layers/by_row.py`) and its low rank (`selection/cover.py`,
`export/low_rank.py`).
"""

from __future__ import annotations

from sparseft.kernels.blocks import Blocks
from sparseft.kernels.features import Columns, Rows
from sparseft.kernels.grid import Grid
from sparseft.kernels.kind import Kind

KINDS: dict[str, Kind] = {kind.name: kind for kind in (Rows(), Columns(), Blocks(), Grid())}

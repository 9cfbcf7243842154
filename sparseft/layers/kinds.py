"""A layer for each kind of pattern: S2FT's rows or columns (arXiv 2412.06289, §3.2), Sylva's blocks (doi
10.1145/3650200.3656619), LoSiA's grid (arXiv 2507.04487)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from sparseft.layers.sparse_linear import SparseLinear


class S2ColumnLinear(SparseLinear):
    """Trains `rows` of the weight: output features (S2FT's q, k, v, gate and up projections).

    Usable as `nn.Linear` is. `rows` (k,): distinct output features; their delta is (k, in) in fp32.
    Saves x itself for the backward pass, which siblings that read the same x share.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None,
                 *, rows: Sequence[int] | Tensor) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        self.add_pattern("rows", rows)

    @classmethod
    def from_linear(cls, linear: nn.Module, rows: Any) -> S2ColumnLinear:
        """Converts an `nn.Linear` or `Conv1D`; the layer shares (and training writes) its parameters."""
        layer = cls.wrap(linear)
        layer.add_pattern("rows", rows)
        return layer


class S2RowLinear(SparseLinear):
    """Trains `columns` of the weight: input features (S2FT's o and down projections).

    Usable as `nn.Linear` is. `columns` (k,): distinct input features; their delta is (out, k) in fp32.
    Saves only `x[..., columns]` for the backward pass, in storage of its own.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None,
                 *, columns: Sequence[int] | Tensor) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        self.add_pattern("columns", columns)

    @classmethod
    def from_linear(cls, linear: nn.Module, columns: Any) -> S2RowLinear:
        """Converts an `nn.Linear` or `Conv1D`; the layer shares (and training writes) its parameters."""
        layer = cls.wrap(linear)
        layer.add_pattern("columns", columns)
        return layer


class BlockSparseLinear(SparseLinear):
    """Trains `blocks` (n, 2) of the weight: pairs (block row, block column) of B×B blocks, B = `block_size`.

    Usable as `nn.Linear` is. The delta is (n, B, B) in fp32; where B does not divide the weight's shape, an edge
    block's part outside the weight stays zero.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None,
                 *, blocks: Sequence[Sequence[int]] | Tensor, block_size: int) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        self.add_pattern("blocks", blocks, block_size)

    @classmethod
    def from_linear(cls, linear: nn.Module, blocks: Any, block_size: int) -> BlockSparseLinear:
        """Converts an `nn.Linear` or `Conv1D`; the layer shares (and training writes) its parameters."""
        layer = cls.wrap(linear)
        layer.add_pattern("blocks", blocks, block_size)
        return layer


class GridLinear(SparseLinear):
    """Trains the entries of the weight where `rows` (output features) cross `columns` (input features): LoSiA's subnet.

    Usable as `nn.Linear` is. `rows` (k,) and `columns` (m,): distinct features; their delta is (k · m,) in fp32, row by
    row. Saves only `x[..., columns]` for the backward pass, in storage of its own.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None,
                 *, rows: Sequence[int] | Tensor, columns: Sequence[int] | Tensor) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        self.add_pattern("grid", (rows, columns))

    @classmethod
    def from_linear(cls, linear: nn.Module, grid: Any) -> GridLinear:
        """Converts an `nn.Linear` or `Conv1D`; the layer shares (and training writes) its parameters. `grid` is (rows,
        columns), or an index (`kernels/grid.py`)."""
        layer = cls.wrap(linear)
        layer.add_pattern("grid", grid)
        return layer

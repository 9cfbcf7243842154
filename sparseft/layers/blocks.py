"""Sylva's layer (doi 10.1145/3650200.3656619): training of chosen B×B blocks of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from sparseft.layers.sparse_linear import SparseLinear


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

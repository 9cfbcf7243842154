"""`Hodlr`: the second moment of streamed vectors, kept hierarchically (HODLR) instead of as a dense n×n matrix.

The vectors are seen once, in batches of any size. What is kept are sums that are linear in x xᵀ: the dense diagonal
blocks of the smallest nodes, and of each larger off-diagonal block B = Σ x₁ x₂ᵀ two random sketches, B Ω₂ and Bᵀ Ω₁.
The sketches are turned into rank-r factors only when the matrix is asked for (`hodlr_factors.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseft.importance.hodlr_factors import Hierarchy, truncate_block, truncate_sketch
from sparseft.importance.second_moment import SecondMoment, add_product, gaussian
from sparseft.importance.slots import Layout, relaid, relaid_blocks
from sparseft.kernels.reference import product

# Levels beyond those that leave this many rows to a leaf are dropped: halving further costs more than it saves.
SMALLEST_LEAF_ROWS = 4

# A level is sketched where its blocks are more than so many sketches wide: below that the blocks themselves, which are
# exact, are summed in no more time.
SKETCHES_WIDE = 3


def sketch_width(rank: int) -> int:
    """Columns of Ω₁ and of Ω₂ for truncation to `rank`.

    So wide, the error in the Frobenius norm was at most 1.25 times the best one over flat, slowly and fast decaying and
    spiked spectra and ranks 1 to 16 (for rank 1 1.15 times, 1.05 in the mean). Two thirds as wide, the blocks that were
    chosen on real data moved noticeably further from those of the exact truncation.
    """
    return 4 * rank + 20


class Hodlr(SecondMoment):
    """Streaming M = mean of x xᵀ over tokens, as a hierarchical matrix. With no token seen, M is zero.

    Args:
        n: features, any number from 1.
        num_partition: levels of halving, clamped so that leaves keep a few rows; 0: dense and exact.
        rank: rank of each off-diagonal block, clamped to the block's size.
        device: where the sums are kept and the products run (default: torch's default device).
        seed: of the random sketches; equal on all ranks whose sums are to be added.

    Sums are float32 (range about 1e-38 to 3e38 for x²) and the factors made of them float64. The sums' rounding is
    about 1e-7 of the largest eigenvalue, which itself can reach n · mean(diag): a damping below n · 1e-7 drowns in it.
    Blocks of up to `SKETCHES_WIDE` sketches are summed densely, and truncated exactly. Memory is
    O(n · (rank · levels + leaf)), with a constant of about 60 + 12 · rank; a rank near n gives the exact matrix, at the
    price of the dense one.

    Truncation can leave the matrix indefinite: `inverse_diagonal` then raises its damping tenfold until it is positive
    definite. A damping of 0 tries the matrix as it is first.
    """

    def __init__(
        self,
        n: int,
        num_partition: int = 8,
        rank: int = 1,
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(n, num_partition, rank, device, seed)
        levels = 0
        while levels < num_partition and n >> (levels + 1) >= SMALLEST_LEAF_ROWS:
            levels += 1
        self._layout = layout = Layout(n, levels)
        width = sketch_width(rank)
        # From the last sketched level down, dense diagonal blocks hold it all.
        self._sketched = sum(layout.node(level) > SKETCHES_WIDE * width for level in range(1, levels + 1))
        # The sums have slots of their own: fewer levels leave fewer of them empty, mostly none.
        self._summed = summed = Layout(n, self._sketched)
        self._gram = torch.zeros(2**self._sketched, summed.leaf, summed.leaf, device=device)
        self._sketches = [  # (B Ω₂)ᵀ and (Bᵀ Ω₁)ᵀ of level 1, 2, ...: (pairs, 2, width, node)
            torch.zeros(2 ** (level - 1), 2, width, summed.node(level), device=device)
            for level in range(1, self._sketched + 1)
        ]
        self._test = gaussian(summed.slots, width, seed, self.device) if self._sketched else None

    def _add(
        self,
        x: Tensor,  # (tokens, slots), float32, or halves where their products come in float32
    ) -> None:
        nodes = self._at(x, self._sketched)
        add_product(self._gram, nodes, nodes)
        if self._test is None:
            return
        # x times the test matrix, by node of the finest sketched level; a coarser node is the sum of its two halves.
        test = self._test.view(len(nodes), -1, self._test.shape[1])
        tested = product(nodes, test.to(x.dtype))  # (nodes, tokens, width) float32
        x = x.float()  # what was multiplied so is no half any more
        for level in range(self._sketched, 0, -1):
            halves = self._at(x, level).unflatten(0, (-1, 2))  # (pairs, 2, tokens, node)
            tested = tested.unflatten(0, (-1, 2))
            for half in (0, 1):
                self._sketches[level - 1][:, half].baddbmm_(tested[:, 1 - half].mT, halves[:, half])
            tested = tested.sum(1)

    def _at(self, x: Tensor, level: int) -> Tensor:
        """(tokens, slots) -> (nodes, tokens, node), a view."""
        return x.view(len(x), 2**level, -1).transpose(0, 1)

    def _factored(self, gram: Tensor, *sketches: Tensor) -> Hierarchy:
        layout, factored = self._layout, []
        for level, sketch in enumerate(sketches, 1):
            assert self._test is not None
            shape = (len(sketch), 2, layout.node(level), -1)
            seen = relaid(sketch.mT.reshape(self._summed.slots, -1), self._summed, layout).view(shape)
            tests = relaid(self._test.to(gram), self._summed, layout).view(shape)
            factored.append(truncate_sketch(seen, tests, self.rank))
        gram = relaid_blocks(gram, self._summed, layout)
        for level in range(self._sketched + 1, self.levels + 1):
            node = layout.node(level)
            pairs = _diagonal_blocks(gram, 2 * node)
            factored.append(truncate_block(pairs[:, :node, node:], min(self.rank, node)))
        leaves = _diagonal_blocks(gram, layout.leaf)
        leaves = (leaves + leaves.mT) / 2  # the product's two triangles may be summed in different order
        return Hierarchy(layout, leaves, [bases for bases, _ in factored], [sigma for _, sigma in factored])

    def _sums(self) -> list[Tensor]:
        return [self._gram, *self._sketches]


def _diagonal_blocks(gram: Tensor, size: int) -> Tensor:
    """(blocks, side, side) -> (blocks * side / size, size, size): the diagonal blocks of each."""
    cut = gram.view(len(gram), gram.shape[1] // size, size, -1, size)
    return cut.diagonal(dim1=1, dim2=3).movedim(-1, 1).reshape(-1, size, size)

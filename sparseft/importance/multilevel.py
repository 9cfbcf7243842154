"""`Multilevel`: the second moment of streamed vectors as a multilevel low-rank matrix, positive semidefinite always
(Parshakova, Hastie, Darve, Boyd 2023, "Factor fitting, rank allocation, and partitioning in multilevel low rank
matrices", arXiv 2310.19214).

The rows are halved `levels` times. Every node ν above the leaves has a low-rank matrix F_ν F_νᵀ over its rows, every
leaf a dense block, and M is their sum: what the whole has in common comes first, each half's own next, and what is left
of the diagonal blocks is kept as it is.

How one pass suffices. Let M_ν be the diagonal block of M at node ν and Ω_ν a random matrix of its own. Kept are the
sketches Y_ν = M_ν Ω_ν and the leaves' blocks, all linear in x xᵀ. From the whole down, the residual R_ν is M_ν less the
low ranks of the nodes above, restricted to ν's rows; its sketch R_ν Ω_ν is Y_ν less the products of those with Ω_ν, so
no second pass is needed to know it. F_ν F_νᵀ is the Nyström approximation

    R Ω (Ωᵀ R Ω)⁺ Ωᵀ R  =  R^½ P R^½,    P the orthogonal projection onto the range of R^½ Ω.

Why it is positive semidefinite. M is, so R of the whole is. Where R_ν is, 0 ⪯ F_ν F_νᵀ = R^½ P R^½ ⪯ R_ν as P is a
projection: the low rank is, and so is what it leaves, R_ν - F_ν F_νᵀ, and each diagonal block of that: the residuals of
ν's halves. So by induction every residual is, the leaves' among them. Nothing of it depends on how good the sketches
are. In floating point the sums' rounding remains (float32, about 1e-7 of M's trace), by which a leaf's eigenvalues can
fall short of 0; where that is more than the damping, the inverse counts them as 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseft.errors import UserError
from sparseft.importance.second_moment import SecondMoment, add_product, gaussian
from sparseft.importance.slots import Layout
from sparseft.kernels.reference import product

# Halving ends where leaves would have fewer rows: below, low ranks of halves cost more than the dense block they spare.
LEAST_LEAF_ROWS = 128

# Directions of a sketch in which Ωᵀ R Ω is less than so much of M's trace are left to the levels below: they are of the
# size of the sums' rounding (float32).
SKETCH_ROUNDING = 16 * torch.finfo(torch.float32).eps

# Elements that a product works on at a time: on the CPU what stays in a core's cache, elsewhere what keeps the launches
# few.
CHUNK_ELEMENTS_CPU, CHUNK_ELEMENTS = 2**19, 2**24
LEAF_ELEMENTS_CPU = 2**17  # of a quadratic form, a leaf at a time


class Multilevel(SecondMoment):
    """Streaming M = mean of x xᵀ over tokens, as a multilevel low-rank matrix. With no token seen, M is zero.

    Args:
        n: features, any number from 1.
        num_partition: levels of halving, clamped so that leaves keep `LEAST_LEAF_ROWS` and `rank` rows; 0: dense and
            exact.
        rank: columns of each node's low rank: its sketch's.
        device: where the sums are kept and the products run (default: torch's default device).
        seed: of the random sketches; equal on all ranks whose sums are to be added.

    The leaves' diagonal blocks are exact, and the whole is positive semidefinite up to rounding, so `inverse_diagonal`
    takes the damping it is given. Sums are float32 (range about 1e-38 to 3e38 for x²) and the factors made of them
    float64. Memory is n · (leaf + rank · levels). A rank of more than half of n gives the exact matrix.
    """

    def __init__(
        self,
        n: int,
        num_partition: int = 8,
        rank: int = 8,
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(n, num_partition, rank, device, seed)
        levels = 0
        while levels < num_partition and n >> (levels + 1) >= max(LEAST_LEAF_ROWS, rank):
            levels += 1
        self._layout = self._summed = layout = Layout(n, levels)
        self._half = half = layout.leaf // 2
        # Of the leaves [A B; Bᵀ C]: A and B, and C, which is three quarters of the work.
        self._upper = torch.zeros(2**levels, half, layout.leaf, device=device)
        self._lower = torch.zeros(2**levels, layout.leaf - half, layout.leaf - half, device=device)
        # Y_νᵀ of all levels, by leaf: (leaves, levels · rank, leaf)
        self._sketches = torch.zeros(2**levels, levels * rank, layout.leaf, device=device) if levels else None
        # Each level's test matrix is its own: a residual annihilates the one it was made with.
        self._test = gaussian(layout.slots, levels * rank, seed, self.device) if levels else None

    def _tests(self, level: int) -> Tensor:
        """Ω_ν of a level's nodes (nodes, node, rank)."""
        assert self._test is not None
        return self._test[:, level * self.rank : (level + 1) * self.rank].unflatten(0, (2**level, -1))

    def _add(
        self,
        x: Tensor,  # (tokens, slots), float32, or halves where their products come in float32
    ) -> None:
        leaves = x.view(len(x), 2**self.levels, -1).transpose(0, 1)  # (leaves, tokens, leaf)
        first, second = leaves[..., : self._half], leaves[..., self._half :]
        add_product(self._upper, first, leaves)
        add_product(self._lower, second, second)
        if self._test is None or self._sketches is None:
            return
        # x times the test matrices, by leaf; that of a node is the sum over its leaves, which all of them take.
        tested = product(leaves, self._test.view(len(leaves), -1, self._test.shape[1]).to(x.dtype))
        for level in range(self.levels):
            of_level = tested[..., level * self.rank : (level + 1) * self.rank].unflatten(0, (2**level, -1))
            of_level.copy_(of_level.sum(1, keepdim=True).expand_as(of_level))
        self._sketches.baddbmm_(tested.mT, leaves.float())  # what was multiplied so is no half any more

    def _sums(self) -> list[Tensor]:
        return [self._upper, self._lower, *([] if self._sketches is None else [self._sketches])]

    def _factored(self, upper: Tensor, lower: Tensor, sketches: Tensor | None = None) -> LowRanks:
        layout, half = self._layout, self._half
        gram = upper.new_empty(len(upper), layout.leaf, layout.leaf)
        gram[:, :half], gram[:, half:, half:] = upper, lower
        gram[:, half:, :half] = upper[..., half:].mT
        traces = gram.diagonal(dim1=1, dim2=2).sum(1)
        bases: list[Tensor] = []
        for level in range(self.levels):
            assert sketches is not None
            tests = self._tests(level).to(gram)
            sketch = sketches[:, level * self.rank : (level + 1) * self.rank].mT.reshape(tests.shape)
            residual = sketch - _restricted(bases, level, tests)
            rounding = SKETCH_ROUNDING * traces.view(2**level, -1).sum(1)
            bases.append(nystrom(residual, tests, rounding))
        for basis in bases:
            cut = basis.reshape(len(gram), layout.leaf, -1)
            gram.baddbmm_(cut, cut.mT, alpha=-1)
        leaves = (gram + gram.mT).mul_(0.5)  # the product's two triangles may be summed in different order
        return LowRanks(layout, leaves, bases)


def _restricted(bases: list[Tensor], level: int, tests: Tensor) -> Tensor:
    """Σ over the levels above of F Fᵀ, restricted to the rows of each node of `level`, times its tests -> (nodes, node,
    rank)."""
    total = torch.zeros_like(tests)
    for basis in bases:
        cut = basis.reshape(2**level, tests.shape[1], -1)
        total += cut @ (cut.mT @ tests)
    return total


def nystrom(
    sketch: Tensor,  # (nodes, s, r): R Ω of positive semidefinite R (s, s)
    test: Tensor,  # (nodes, s, r): Ω
    rounding: Tensor,  # (nodes,): eigenvalues of Ωᵀ R Ω up to here say nothing
) -> Tensor:
    """F (nodes, s, r) with F Fᵀ = R Ω V (Vᵀ Ωᵀ R Ω V)⁻¹ Vᵀ Ωᵀ R, V the eigenvectors of Ωᵀ R Ω that count; for every
    other a column is zero. Never more than R, whatever is left out: Ω V is a test matrix as well."""
    core = test.mT @ sketch
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    counts = values > rounding[:, None]
    scale = torch.where(counts, values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt(), 0)
    return (sketch @ vectors) * scale[:, None, :]


@dataclass(frozen=True)
class LowRanks:
    """The finished matrix M."""

    layout: Layout
    leaves: Tensor  # (2^levels, c, c)
    bases: list[Tensor]  # F of level 0, 1, ...: (2^level, node, r)

    def to(self, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> LowRanks:
        """The matrix times `scale`, elsewhere or in another precision; scaled before it is rounded."""

        def moved(x: Tensor) -> Tensor:
            return x.to(dtype).to(device)

        root = math.sqrt(scale)
        return LowRanks(self.layout, moved(self.leaves * scale), [moved(basis * root) for basis in self.bases])

    def diagonal(self) -> Tensor:
        """(n,)"""
        total = self.leaves.diagonal(dim1=1, dim2=2).reshape(-1)
        for basis in self.bases:
            total = total + basis.square().sum(2).reshape(-1)
        return self.layout.gather(total, 0)

    def matmul(self, v: Tensor) -> Tensor:
        """M v, (n, m) -> (n, m), in the dtype and on the device that the factors and `v` share."""
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        for columns in self._chunks(v):
            part = self.layout.spread(v[:, columns], 0)
            m = part.shape[1]
            product = torch.bmm(self.leaves, part.reshape(*self.leaves.shape[:2], m)).view(-1, m)
            for basis in self.bases:
                nodes, node, _ = basis.shape
                product.view(nodes, node, m).baddbmm_(basis, basis.mT @ part.reshape(nodes, node, m))
            out[:, columns] = self.layout.gather(product, 0)
        return out

    def for_quadratic(self) -> LowRanks:
        """The matrix itself."""
        return self

    def quadratic(self, v: Tensor) -> Tensor:
        """vᵢᵀ M vᵢ of every column, (n, m) -> (m,) float64, without another (n, m) matrix.

        A leaf [A B; Bᵀ C] gives aᵀ(A a + 2 B b) + bᵀ C b, which is a quarter less to multiply.
        """
        count, rows = self.leaves.shape[:2]
        half = rows // 2
        upper = torch.cat([self.leaves[:, :half, :half], 2 * self.leaves[:, :half, half:]], 2)
        upper = torch.cat([upper, *(basis.reshape(count, rows, -1).mT for basis in self.bases)], 1)
        lower = self.leaves[:, half:, half:].contiguous()
        by_leaf = v.device.type == "cpu"
        at_once, chunks = (1, self._chunks(v, rows, LEAF_ELEMENTS_CPU)) if by_leaf else (count, self._chunks(v))
        total = torch.empty(v.shape[1], dtype=torch.float64, device=v.device)
        for columns in chunks:
            cut = self.layout.spread(v[:, columns], 0).unflatten(0, (count, rows))
            value, tested = v.new_zeros(cut.shape[2]), []
            for one, first, second in zip(*(x.split(at_once) for x in (cut, upper, lower)), strict=True):
                inner = _along(first, one)
                value += inner[:, :half].mul_(one[:, :half]).sum((0, 1))
                value += _along(second, one[:, half:]).mul_(one[:, half:]).sum((0, 1))
                tested.append(inner[:, half:])
            inner = torch.cat(tested)  # Fᵀ v by leaf, the finest level's last
            for basis in reversed(self.bases):
                above = inner.shape[1] - basis.shape[2]
                inner = inner.unflatten(0, (-1, 2)).sum(1)
                value += inner[:, above:].square().sum((0, 1))
                inner = inner[:, :above]
            total[columns] = value.double()
        return total

    def _chunks(self, v: Tensor, rows: int | None = None, elements: int | None = None) -> list[slice]:
        """Cuts the columns of `v` so that a product's temporaries of so many rows (default: all) stay small."""
        if elements is None:
            elements = CHUNK_ELEMENTS_CPU if v.device.type == "cpu" else CHUNK_ELEMENTS
        step = max(1, elements // (rows or self.layout.slots))
        return [slice(start, start + step) for start in range(0, v.shape[1], step)]

    def to_dense(self) -> Tensor:
        """(n, n)"""
        dense = torch.block_diag(*self.leaves)
        for basis in self.bases:
            dense += torch.block_diag(*(basis @ basis.mT))
        return self.layout.gather(self.layout.gather(dense, 0), 1)

    def inverse_diagonal(self, damping: float) -> tuple[Tensor, float]:
        """diag((M + damping · mean(diag M) · I)⁻¹) (n,), positive and finite, and the damping.

        Where M has a zero diagonal, the mean is taken as 1.
        """
        if not (math.isfinite(damping) and damping > 0):
            raise UserError(
                f"damping is {damping}; expected a finite number above 0: a positive semidefinite matrix has an "
                "inverse only with some."
            )
        diagonal = self.diagonal()
        unit = float(diagonal.mean())
        if unit <= 0:
            unit = 1.0
        inverse = self.layout.gather(self._inverse_diagonal(unit, damping), 0)
        # Of any positive semidefinite M; only rounding can lead beyond.
        least, most = 1 / (diagonal / unit + damping), torch.full_like(inverse, 1 / damping)
        return inverse.clamp(least, most) / unit, damping

    def _inverse_diagonal(self, unit: float, damping: float) -> Tensor:
        """diag((M / unit + damping · I)⁻¹) by slot. Bottom up, by Woodbury's identity:

        Let D be a node's two halves (damped) side by side, and M = D + F Fᵀ. With the eigenvectors V and eigenvalues Λ
        of I + Fᵀ D⁻¹ F (r × r), all at least 1, and Z = D⁻¹ F V Λ^-½,

            M⁻¹ = D⁻¹ - Z Zᵀ.

        What the levels above need of M⁻¹ is only its product with their bases, which is carried along: memory is
        O(slots · sum of the ranks), and one level is a handful of batched products.
        """
        layout = self.layout
        inverse = damped_inverse(self.leaves / unit, damping)
        diagonal = inverse.diagonal(dim1=1, dim2=2).reshape(-1).clone()
        if not self.bases:
            return diagonal
        bases = [basis / math.sqrt(unit) for basis in self.bases]
        side_by_side = [basis.reshape(*inverse.shape[:2], -1) for basis in bases]
        solved = (inverse @ torch.cat(side_by_side, 2)).reshape(layout.slots, -1)  # D⁻¹ times the bases of all levels
        del inverse, side_by_side
        above = solved.shape[1]
        for basis in reversed(bases):
            nodes, node, rank = basis.shape
            above -= rank
            here = solved[:, above : above + rank].view(nodes, node, rank)  # D⁻¹ F
            capacitance = basis.mT @ here
            values, vectors = torch.linalg.eigh((capacitance + capacitance.mT) / 2)
            turn = vectors * (1 + values.clamp_min(0)).rsqrt()[:, None, :]
            z = here @ turn
            diagonal -= z.square().sum(2).reshape(-1)
            if above:
                rest = solved[:, :above].view(nodes, node, above)
                rest -= z @ (turn.mT @ (basis.mT @ rest))
        return diagonal


def _along(factor: Tensor, v: Tensor) -> Tensor:
    """factor (nodes, a, b) times v (nodes, b, m), with the rows or the columns in memory as those of `v` are."""
    return factor @ v if v.stride(2) == 1 else (v.mT @ factor.mT).mT


def damped_inverse(
    blocks: Tensor,  # (count, c, c), symmetric, positive semidefinite up to rounding; spoilt
    damping: float,
) -> Tensor:
    """(block + damping · I)⁻¹ of each. Where rounding outweighs the damping, eigenvalues below 0 count as 0."""
    damped = blocks.diagonal(dim1=1, dim2=2)
    damped += damping
    factor, failed = torch.linalg.cholesky_ex(blocks)
    bad = failed.nonzero().flatten()
    if len(bad):
        factor[bad] = torch.eye(blocks.shape[1]).to(blocks)
    inverse = torch.cholesky_inverse(factor)
    if len(bad):
        damped -= damping
        values, vectors = torch.linalg.eigh(blocks[bad])
        inverse[bad] = (vectors / (values.clamp_min(0) + damping)[:, None, :]) @ vectors.mT
    return inverse

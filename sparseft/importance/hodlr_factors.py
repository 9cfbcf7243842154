"""A symmetric matrix in hierarchical off-diagonal low-rank (HODLR) form: products, quadratic forms, inverse diagonal.

The rows are halved `levels` times. The diagonal blocks of the last level (leaves) are dense. The off-diagonal block of
each pair of siblings on the way is `Q₁ Σ Q₂ᵀ` of rank r, with orthonormal Q₁, Q₂; its mirror image is not stored.

The matrix lives in slots (`slots.py`), so that a whole level is one batch whatever the size.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseft.errors import UserError
from sparseft.importance.slots import Layout, relaid, relaid_blocks

# How near the largest singular value of a scaled off-diagonal block may come to 1, where the matrix becomes singular.
# It is known to about 1e-15, and 1 - s² divides: nearer than this the inverse would lose its fourth digit.
SINGULAR_MARGIN = 1e-11

# Columns beyond the one looked for, and squarings of the matrix, of a subspace iteration. With these the largest
# eigenvalue was found to 1e-13 for blocks of random numbers, and to 1e-2 where all of them lie within a hundredth.
SPARE, SQUARINGS = 8, 5

# Leaves and low-rank blocks are put together into dense blocks of at most so many rows before a quadratic form.
PRODUCT_LEAF_ROWS = 64

# Elements that a product works on at a time (16 MiB in float32): few rounds, and no second matrix of its input's size.
CHUNK_ELEMENTS = 2**22
# Of a quadratic form: on the CPU what stays in a core's cache, elsewhere what keeps the launches few.
QUADRATIC_ELEMENTS_CPU, QUADRATIC_ELEMENTS = 2**19, 2**24


def truncate_block(
    block: Tensor,  # (..., s, s)
    rank: int,
) -> tuple[Tensor, Tensor]:
    """The best approximation of rank `rank` of each block -> bases (..., 2, s, rank), singular values (..., rank).

    The left singular vectors are the eigenvectors of B Bᵀ, which takes half the time of a singular value decomposition
    of B. Singular values below 1e-8 of the largest lose their order so, not their share of the matrix.
    """
    left = leading(block @ block.mT, rank)
    basis, r = torch.linalg.qr(block.mT @ left)  # B ≈ left rᵀ basisᵀ
    turn, sigma, right = _svd(r.mT)
    return torch.stack([left @ turn, basis @ right.mT], -3), sigma


def leading(
    gram: Tensor,  # (..., s, s), positive semidefinite, float64
    rank: int,
) -> Tensor:
    """The eigenvectors (..., s, rank) of the largest eigenvalues, ascending.

    A single one comes by subspace iteration, where that is cheaper than all of them: gram^32 leaves in a few random
    columns next to nothing of an eigenvalue that is half as large, and of those nearer to it a mixture that serves as
    well. (A second one that is a third as large would be lost in the rounding of the first.)
    """
    width = rank + SPARE
    if rank > 1 or gram.shape[-1] < 2 * width:
        return torch.linalg.eigh(gram)[1][..., -rank:]
    power = gram
    for _ in range(SQUARINGS):
        trace = power.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(torch.finfo(gram.dtype).tiny)
        power = power / trace[..., None, None]
        power = power @ power
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(gram.shape[-1], width, generator=generator, dtype=torch.float64).to(gram)
    basis = torch.linalg.qr(power @ start)[0]
    return basis @ torch.linalg.eigh(basis.mT @ gram @ basis)[1][..., -rank:]


def _svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.linalg.svd` of (..., r, r), without a call to LAPACK for each of hundreds of single numbers."""
    if x.shape[-1] > 1:
        return torch.linalg.svd(x)
    return torch.where(x < 0, -1, 1).to(x), x.abs().squeeze(-1), torch.ones_like(x)


def truncate_sketch(
    sketches: Tensor,  # (..., 2, s, w): B Ω₂ and Bᵀ Ω₁ of a block B (s, s)
    tests: Tensor,  # (..., 2, s, w): Ω₁ and Ω₂, standard normal
    rank: int,
) -> tuple[Tensor, Tensor]:
    """A near-best approximation of rank `rank` of blocks that were seen once -> as `truncate_block`.

    After Tropp, Yurtsever, Udell, Cevher 2017 ("Practical sketching algorithms for low-rank matrix approximation"), but
    both sketches serve both ends. Their leading k singular vectors U and V, k a third of the width, so that what is
    left of it tells signal from noise, span the approximation; its core C is what both sketches agree on best:
    ‖Uᵀ (B Ω₂) - C Vᵀ Ω₂‖² + ‖Vᵀ (Bᵀ Ω₁) - Cᵀ Uᵀ Ω₁‖² is least. Then the best rank-r approximation of U C Vᵀ.
    """
    kept = max(rank, sketches.shape[-1] // 3)
    weights = torch.linalg.eigh(sketches.mT @ sketches)[1][..., -kept:]
    bases = torch.linalg.qr(sketches @ weights)[0]  # U and V, (..., 2, s, k)
    seen, tested = bases.mT @ sketches, bases.mT @ tests  # (..., 2, k, w)
    (here, there), (left, right) = seen.unbind(-3), tested.unbind(-3)
    # The least squares' equations: (left leftᵀ) C + C (right rightᵀ) = here rightᵀ + left thereᵀ.
    values, vectors = torch.linalg.eigh(tested @ tested.mT)
    (low, high), (first, second) = values.unbind(-2), vectors.unbind(-3)
    core = first.mT @ (here @ right.mT + left @ there.mT) @ second
    sums = low[..., :, None] + high[..., None, :]
    # A block of less than k ranks leaves directions to chance: such as that of an empty slot, which no test reaches.
    core = first @ (core / torch.maximum(sums, 1e-9 * sums.amax((-2, -1), keepdim=True))) @ second.mT
    turn, sigma, back = torch.linalg.svd(core)
    turns = torch.stack([turn, back.mT], -3)[..., :rank]
    return bases @ turns, sigma[..., :rank]


@dataclass(frozen=True)
class Hierarchy:
    """The finished matrix M. Levels are counted from the top: `bases[0]` belongs to the pair of halves."""

    layout: Layout
    leaves: Tensor  # (2^levels, c, c)
    bases: list[Tensor]  # of level l: (2^(l-1), 2, node, r): Q₁ and Q₂ of each pair, r <= node
    sigmas: list[Tensor]  # of level l: (2^(l-1), r), descending, >= 0

    def to(self, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Hierarchy:
        """The matrix times `scale`, elsewhere or in another precision; scaled before it is rounded."""

        def moved(x: Tensor) -> Tensor:
            return x.to(dtype).to(device)

        sigmas = [moved(sigma * scale) for sigma in self.sigmas]
        return Hierarchy(self.layout, moved(self.leaves * scale), [moved(base) for base in self.bases], sigmas)

    def diagonal(self) -> Tensor:
        """(n,)"""
        return self.layout.gather(self.leaves.diagonal(dim1=1, dim2=2).reshape(-1), 0)

    def matmul(self, v: Tensor) -> Tensor:
        """M v, (n, m) -> (n, m), in the dtype and on the device that the factors and `v` share."""
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        for columns in self._chunks(v):
            part = self.layout.spread(v[:, columns], 0)
            m = part.shape[1]
            product = torch.bmm(self.leaves, part.reshape(*self.leaves.shape[:2], m)).view(-1, m)
            for base, sigma in zip(self.bases, self.sigmas, strict=True):
                pairs, _, node, _ = base.shape
                inner = base.mT @ part.reshape(pairs, 2, node, m)  # (pairs, 2, r, m)
                crossed = inner.flip(1) * sigma[:, None, :, None]  # what one half sends the other
                product.view(pairs, 2, node, m).add_(base @ crossed)
            out[:, columns] = self.layout.gather(product, 0)
        return out

    def for_quadratic(self) -> Hierarchy:
        """The same matrix with larger leaves: a few well-shaped products instead of many thin ones."""
        return self.coarsened(PRODUCT_LEAF_ROWS)

    def coarsened(self, rows: int) -> Hierarchy:
        """The same matrix with dense leaves as large as `rows` allows, and a layout of those: for products."""
        leaves, levels = self.leaves, len(self.bases)
        while levels and self.layout.node(levels - 1) <= rows:
            levels -= 1
            base, sigma = self.bases[levels], self.sigmas[levels]
            side = leaves.shape[1]
            merged = leaves.new_zeros(len(leaves) // 2, 2 * side, 2 * side)
            block = (base[:, 0] * sigma[:, None, :]) @ base[:, 1].mT
            merged[:, :side, :side], merged[:, side:, side:] = leaves[0::2], leaves[1::2]
            merged[:, :side, side:], merged[:, side:, :side] = block, block.mT
            leaves = merged
        layout = Layout(self.layout.n, levels)
        bases = [
            relaid(base.reshape(self.layout.slots, -1), self.layout, layout).view(len(base), 2, -1, base.shape[-1])
            for base in self.bases[:levels]
        ]
        return Hierarchy(layout, relaid_blocks(leaves, self.layout, layout), bases, self.sigmas[:levels])

    def quadratic(self, v: Tensor) -> Tensor:
        """vᵢᵀ M vᵢ of every column, (n, m) -> (m,) float64, without another (n, m) matrix."""
        total = torch.empty(v.shape[1], dtype=torch.float64, device=v.device)
        inner = self._inner_of_columns if v.stride(1) == 1 else self._inner_of_rows
        for columns in self._chunks(v, QUADRATIC_ELEMENTS_CPU if v.device.type == "cpu" else QUADRATIC_ELEMENTS):
            total[columns] = inner(v[:, columns]).double()
        return total

    def _inner_of_columns(self, v: Tensor) -> Tensor:
        """(n, m) -> (m,)"""
        part = self.layout.spread(v, 0)
        cut = part.view(*self.leaves.shape[:2], -1)
        value = torch.bmm(self.leaves, cut).mul_(cut).sum((0, 1))
        for base, sigma in zip(self.bases, self.sigmas, strict=True):
            inner = base.mT @ part.view(*base.shape[:3], -1)  # (pairs, 2, r, columns)
            value += 2 * (inner[:, 0] * sigma[:, :, None] * inner[:, 1]).sum((0, 1))  # squares alone may underflow
        return value

    def _inner_of_rows(self, v: Tensor) -> Tensor:
        """The same where the columns of `v` are runs of memory: they stay so. Leaves and bases in one product."""
        nodes, rows = self.leaves.shape[:2]
        cut = self.layout.spread(v.T, 1).view(-1, nodes, rows).transpose(0, 1)
        inner = cut @ torch.cat([self.leaves, *(base.reshape(nodes, rows, -1) for base in self.bases)], 2)
        value = inner[..., :rows].mul_(cut).sum((0, 2))
        inner = inner[..., rows:]  # (nodes, columns, sum of the ranks), the finest level's last
        for sigma in reversed(self.sigmas):
            above = inner.shape[2] - sigma.shape[1]
            halves = inner.unflatten(0, (-1, 2))
            value += 2 * (halves[:, 0, :, above:] * sigma[:, None, :] * halves[:, 1, :, above:]).sum((0, 2))
            inner = halves[..., :above].sum(1)
        return value

    def _chunks(self, v: Tensor, elements: int = CHUNK_ELEMENTS) -> list[slice]:
        """Cuts the columns of `v` so that a product's temporaries stay in the cache."""
        step = max(1, elements // self.layout.slots)
        return [slice(start, start + step) for start in range(0, v.shape[1], step)]

    def to_dense(self) -> Tensor:
        """(n, n)"""
        dense = self.leaves.new_zeros(self.layout.slots, self.layout.slots)
        for base, sigma in zip(self.bases, self.sigmas, strict=True):
            for i, block in enumerate((base[:, 0] * sigma[:, None, :]) @ base[:, 1].mT):
                low, middle, high = (2 * i * block.shape[0] + j * block.shape[0] for j in range(3))
                dense[low:middle, middle:high] = block
                dense[middle:high, low:middle] = block.T
        for i, leaf in enumerate(self.leaves):
            low, high = i * self.layout.leaf, (i + 1) * self.layout.leaf
            dense[low:high, low:high] = leaf
        return self.layout.gather(self.layout.gather(dense, 0), 1)

    def inverse_diagonal(self, damping: float) -> tuple[Tensor, float]:
        """diag((M + d · mean(diag M) · I)⁻¹) (n,), positive and finite, and the damping d it took.

        d is `damping`, or the first of 10, 100, ... times it with which the matrix is positive definite (after a
        damping of 0: of 1e-8). Where M has a zero diagonal, the mean is taken as 1.
        """
        if not (math.isfinite(damping) and damping >= 0):
            raise UserError(f"damping is {damping}; expected a finite number that is not negative.")
        unit = float(self.diagonal().mean())
        if unit <= 0:
            unit = 1.0
        scaled = self.to(self.leaves.device, self.leaves.dtype, 1 / unit)
        # It ends: the leaves are positive semidefinite up to rounding, and a damping above the sum over the levels of
        # the largest singular value outweighs everything off the diagonal.
        trials = (damping * 10**i for i in itertools.count()) if damping else (10.0**i for i in itertools.count(-8))
        least = scaled._least_damping()
        for trial in itertools.chain([damping], trials):
            inverse = _inverse_diagonal(scaled, trial) if trial >= least else None
            if inverse is not None:
                return self.layout.gather(inverse, 0) / unit, trial
        raise AssertionError("unreachable: the dampings do not end")

    def _least_damping(self) -> float:
        """A damping below this cannot make the matrix positive definite: each trial
        that this rules out costs several times as much.

        For each pair of halves and each column of its bases: v = (q₁, -q₂) / √2 has norm 1, and a damping has to lift
        vᵀ M v = (q₁ᵀ M₁ q₁ + q₂ᵀ M₂ q₂) / 2 - σ above 0.
        """
        if not self.bases:
            return 0.0
        layout, least = self.layout, 0.0
        bases = torch.cat([base.reshape(layout.slots, -1) for base in self.bases], 1)  # (slots, sum of ranks)
        cut = bases.view(len(self.leaves), layout.leaf, -1)
        energy = torch.bmm(self.leaves, cut).mul_(cut).sum(1)  # qᵀ M q of each node and column, (nodes, sum of ranks)
        above = energy.shape[1]
        for base, sigma in zip(reversed(self.bases), reversed(self.sigmas), strict=True):
            pairs, _, node, rank = base.shape
            above -= rank
            energy = energy.view(pairs, 2, -1).sum(1)
            least = max(least, float((sigma - energy[:, above:] / 2).max()))
            if above:
                inner = base.mT @ bases[:, :above].reshape(pairs, 2, node, above)  # (pairs, 2, r, above)
                energy = energy[:, :above] + 2 * (inner[:, 0] * inner[:, 1] * sigma[:, :, None]).sum(1)
        return least


def _inverse_diagonal(matrix: Hierarchy, damping: float) -> Tensor | None:
    """diag((M + damping · I)⁻¹) by slot, or None where that matrix is not positive definite. Bottom up:

    Let M₁, M₂ (damped) be the halves of a node and Q₁ Σ Q₂ᵀ its off-diagonal block. With Cholesky factors
    Lᵢ Lᵢᵀ = Qᵢᵀ Mᵢ⁻¹ Qᵢ and the singular value decomposition P S Rᵀ = L₁ᵀ Σ L₂ (r × r), the columns of
    A₁ = M₁⁻¹ Q₁ L₁⁻ᵀ P and A₂ = M₂⁻¹ Q₂ L₂⁻ᵀ R are orthonormal in M₁ and M₂, and Woodbury's identity becomes

        M⁻¹ = [M₁⁻¹ + A₁ G A₁ᵀ, -A₁ H A₂ᵀ; -A₂ H A₁ᵀ, M₂⁻¹ + A₂ G A₂ᵀ],   G = S²/(1 - S²),  H = S/(1 - S²).

    So M is positive definite exactly when M₁ and M₂ are and every S is below 1, and its inverse's diagonal is a sum of
    positive numbers: nothing cancels. What the levels above need of M⁻¹ is only its product with their bases, which is
    carried along: memory is O(slots · sum of the ranks), and one level is a handful of batched products.
    """
    layout, leaves = matrix.layout, matrix.leaves
    factor, failed = torch.linalg.cholesky_ex(leaves + damping * torch.eye(layout.leaf).to(leaves))
    if failed.any():
        return None
    diagonal = torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2).reshape(-1).clone()
    if not matrix.bases:
        return diagonal

    bases = torch.cat([base.reshape(layout.slots, -1) for base in matrix.bases], 1)  # (slots, sum of ranks)
    solved = torch.cholesky_solve(bases.view(len(leaves), layout.leaf, -1), factor).reshape(layout.slots, -1)
    del bases
    above = solved.shape[1]
    for base, sigma in zip(reversed(matrix.bases), reversed(matrix.sigmas), strict=True):
        pairs, _, node, rank = base.shape
        above -= rank
        here = solved[:, above : above + rank].view(pairs, 2, node, rank)  # Mᵢ⁻¹ Qᵢ
        capacitance = base.mT @ here
        factor, failed = torch.linalg.cholesky_ex((capacitance + capacitance.mT) / 2)
        if failed.any():
            return None
        left, s, right = _svd((factor[:, 0].mT * sigma[:, None, :]) @ factor[:, 1])
        if (s >= 1 - SINGULAR_MARGIN).any():
            return None
        rotation = torch.stack([left, right.mT], 1)  # P and R, (pairs, 2, r, r)
        conjugate = torch.linalg.solve_triangular(factor.mT, here, upper=True, left=False) @ rotation  # A₁ and A₂
        gain = s.square() / ((1 - s) * (1 + s))
        diagonal.view(pairs, 2, node).add_((conjugate.square() * gain[:, None, None, :]).sum(-1))
        if above:
            rest = solved[:, :above].view(pairs, 2, node, above)  # Mᵢ⁻¹ times the bases above, to become M⁻¹ times them
            first, second = (rotation.mT @ torch.linalg.solve_triangular(factor, base.mT @ rest, upper=False)).unbind(1)
            # (G, -H; -H, G) by its eigenvectors, the sum and the difference of the halves. Near s = 1 the difference is
            # divided by almost nothing: its rounding error must reach both halves alike, to stay in a direction that
            # the levels above hardly see. Products with G and H themselves cost all but the first three digits.
            even = (first + second) * (-s / (1 + s) / 2)[..., None]
            odd = (first - second) * (s / (1 - s) / 2)[..., None]
            rest += conjugate @ torch.stack([even + odd, even - odd], 1)
    return diagonal

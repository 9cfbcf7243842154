"""`Hodlr`: the second moment of streamed vectors, kept hierarchically (HODLR) instead of as a dense n×n matrix.

The vectors are seen once, in batches of any size. What is kept are sums that are linear in x xᵀ: the dense diagonal
blocks of the smallest nodes, and of each larger off-diagonal block B = Σ x₁ x₂ᵀ two random sketches, B Ω₂ and Bᵀ Ω₁. So
batches can be split in any way, and the sums of several data-parallel ranks added. The sketches are turned into rank-r
factors only when the matrix is asked for (`hodlr_factors.py`).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from sparseft.errors import RunError, UserError
from sparseft.importance.hodlr_factors import (
    Hierarchy,
    Layout,
    relaid,
    relaid_blocks,
    truncate_block,
    truncate_sketch,
)
from sparseft.kernels.reference import FP32_PRODUCTS, product

# Levels beyond those that leave this many rows to a leaf are dropped: halving further costs more than it saves.
SMALLEST_LEAF_ROWS = 4

# Tokens that one pass of `update` takes at a time: bounds its float32 copies when a caller gives a whole epoch. On a
# CPU they are then small enough for the allocator to use again (about 1.3 times as fast as 4,096); elsewhere each chunk
# costs some dozens of launches.
CHUNK_TOKENS_CPU, CHUNK_TOKENS = 512, 4096

# Leaves and low-rank blocks are put together into dense blocks of at most so many rows before a large product: a few
# well-shaped products instead of many thin ones.
PRODUCT_LEAF_ROWS = 64

# The matrix of a quadratic form is divided by the square of the vectors' largest entry, taken to be no less than this.
LEAST_PEAK = 1e-16

# The test matrices depend on the shape and the seed only, so the statistics of all layers share them.
_shared_tests: weakref.WeakValueDictionary[tuple, Tensor] = weakref.WeakValueDictionary()


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


class Hodlr:
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
    """

    def __init__(
        self,
        n: int,
        num_partition: int = 8,
        rank: int = 1,
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        for name, value, least in (("n", n, 1), ("num_partition", num_partition, 0), ("rank", rank, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"Hodlr: {name} is {value!r}; expected a whole number of at least {least}.")
        self.n, self.num_partition, self.rank, self.seed = n, num_partition, rank, seed
        levels = 0
        while levels < num_partition and n >> (levels + 1) >= SMALLEST_LEAF_ROWS:
            levels += 1
        self._layout = layout = Layout(n, levels)
        width = sketch_width(rank)
        # From the last sketched level down, dense diagonal blocks hold it all.
        self._sketched = sum(layout.node(level) > SKETCHES_WIDE * width for level in range(1, levels + 1))
        self._tokens = torch.zeros(1, dtype=torch.int64, device=device)
        self.device = self._tokens.device
        # The sums have slots of their own: fewer levels leave fewer of them empty, mostly none.
        self._summed = summed = Layout(n, self._sketched)
        self._gram = torch.zeros(2**self._sketched, summed.leaf, summed.leaf, device=device)
        self._sketches = [  # (B Ω₂)ᵀ and (Bᵀ Ω₁)ᵀ of level 1, 2, ...: (pairs, 2, width, node)
            torch.zeros(2 ** (level - 1), 2, width, summed.node(level), device=device)
            for level in range(1, self._sketched + 1)
        ]
        self._test = _test_matrix(summed.slots, width, seed, self.device) if self._sketched else None
        self._hierarchy: Hierarchy | None = None
        self._inverses: dict[float, tuple[Tensor, float]] = {}
        self.effective_damping: float | None = None  # of the last inverse_diagonal; None before the first

    @property
    def levels(self) -> int:
        """Levels of halving that are really used: `num_partition`, clamped."""
        return self._layout.levels

    @property
    def tokens(self) -> int:
        """Tokens counted so far."""
        return int(self._tokens)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Adds the vectors `x` (..., n), of any floating dtype and any number of them, none included."""
        if x.dim() == 0 or x.shape[-1] != self.n:
            raise ValueError(f"Hodlr.update: x has shape {tuple(x.shape)}; expected (..., {self.n}).")
        self._forget()
        x = x.detach().reshape(-1, self.n)
        exact = FP32_PRODUCTS and self.device.type == "cuda" and x.dtype.itemsize == 2  # products of halves, in float32
        with full_precision(self.device):
            for chunk in x.split(CHUNK_TOKENS_CPU if self.device.type == "cpu" else CHUNK_TOKENS):
                if len(chunk):
                    chunk = chunk.to(self.device, x.dtype if exact else torch.float32)
                    self._add(self._summed.spread(chunk, 1).contiguous())
        self._tokens += len(x)

    def _add(
        self,
        x: Tensor,  # (tokens, slots), float32, or halves where their products come in float32
    ) -> None:
        nodes = self._at(x, self._sketched)
        if x.dtype == torch.float32:
            self._gram.baddbmm_(nodes.mT, nodes)
        else:
            self._gram += product(nodes.mT, nodes)
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

    # -- what the sums amount to ------------------------------------------------------------------------------------

    def matmul(self, v: Tensor) -> Tensor:
        """M v, (n, m) -> (n, m) or (n,) -> (n,), in float64 for float64 and in float32 for every other dtype."""
        if v.dim() not in (1, 2) or v.shape[0] != self.n:
            raise ValueError(f"Hodlr.matmul: v has shape {tuple(v.shape)}; expected ({self.n}, any).")
        dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
        matrix = self._factors().to(self.device, dtype)
        with torch.no_grad(), full_precision(self.device):
            out = matrix.matmul(v.detach().to(self.device, dtype).reshape(self.n, -1))
        return out.reshape(v.shape)

    def quadratic(self, v: Tensor) -> Tensor:
        """vᵢᵀ M vᵢ of each column, (n, m) -> (m,) float64: `(v * matmul(v)).sum(0)` without a second (n, m) matrix.

        Computed in float64 for float64 `v`, else in float32, scaled so that neither tiny `v` nor tiny M underflow; a
        column 1e-19 times as large as the largest counts as zero. Truncation can leave M indefinite, so a value may be
        negative.
        """
        if v.dim() != 2 or v.shape[0] != self.n:
            raise ValueError(f"Hodlr.quadratic: v has shape {tuple(v.shape)}; expected ({self.n}, any).")
        dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
        factors = self._factors()
        unit = float(factors.diagonal().mean()) or 1.0
        v = v.detach().to(self.device, dtype)
        if v.numel():
            lying = v if v.stride(1) == 1 else v.T  # across the lines of memory it would copy all first
            peak = max(abs(float(end)) for end in lying.aminmax())
            unit *= min(max(peak, LEAST_PEAK), 1 / LEAST_PEAK) ** 2
        with torch.no_grad(), full_precision(self.device):
            return factors.coarsened(PRODUCT_LEAF_ROWS).to(self.device, dtype, 1 / unit).quadratic(v) * unit

    def inverse_diagonal(self, damping: float = 1e-3) -> Tensor:
        """diag((M + d · mean(diag M) · I)⁻¹), (n,) float64, finite and positive; `effective_damping` says which d.

        d is `damping`, raised tenfold until the matrix, which truncation can make indefinite, is positive definite. A
        damping of 0 tries the matrix as it is first. Of a zero matrix the result is 1 / damping.
        """
        damping = float(damping)
        if damping not in self._inverses:
            factors = self._factors()
            with torch.no_grad(), self._one_thread():
                self._inverses[damping] = factors.inverse_diagonal(damping)
        inverse, self.effective_damping = self._inverses[damping]
        return inverse.to(self.device, copy=True)

    def to_dense(self) -> Tensor:
        """M as (n, n) float64: exactly the matrix that `matmul` and `inverse_diagonal` work with. For tests."""
        return self._factors().to_dense().to(self.device)

    @torch.no_grad()
    def _factors(self) -> Hierarchy:
        """The matrix in float64, kept until the next update. RunError where the data held inf or NaN.

        On the CPU: hundreds of small decompositions, which LAPACK does in milliseconds and an accelerator one by one.
        The dense matrix of num_partition=0 stays where it is.
        """
        if self._hierarchy is None:
            device = "cpu" if self.levels else self.device
            with self._one_thread():
                sums = [x.to(device).double() / max(1, self.tokens) for x in self._sums()]
                if not all(x.sum().isfinite() for x in sums):  # float64: a sum of float32 numbers does not overflow
                    raise RunError(
                        "the second-order statistics are not finite: an activation or a gradient was inf or NaN, "
                        "or too large for float32 once squared and summed."
                    )
                self._hierarchy = self._factored(*sums)
        return self._hierarchy

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

    @contextlib.contextmanager
    def _one_thread(self) -> Iterator[None]:
        """For batches of small decompositions: threads would meet thousands of times for microseconds of work.

        At n = 4096 it took 0.1 s on one thread, and 0.4 s (idle cores) to 5 s (busy ones) on two. A single large matrix
        (num_partition=0) keeps its threads.
        """
        threads = torch.get_num_threads()
        if self.levels:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def _sums(self) -> list[Tensor]:
        return [self._gram, *self._sketches]

    def release(self) -> None:
        """Frees the factors and inverses made of the sums; they are made anew when they are asked for."""
        self._forget()

    def _forget(self) -> None:
        self._hierarchy = None
        self._inverses.clear()

    # -- the raw sums: to reduce, to save ---------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """The raw sums, token count (int64) first, in an order fixed by (n, num_partition, rank).

        They are the live tensors: sum each in place over the data-parallel ranks (all-reduce), or fill it with what
        was saved, before asking for anything else. Both need a matrix of the same arguments, the seed among them.
        """
        self._forget()
        return [self._tokens, *self._sums()]


def sums_bytes(n: int, num_partition: int, rank: int) -> int:
    """What the raw sums of a `Hodlr` of these arguments take."""
    return sum(x.nbytes for x in Hodlr(n, num_partition, rank, device="meta").tensors())


def _diagonal_blocks(gram: Tensor, size: int) -> Tensor:
    """(blocks, side, side) -> (blocks * side / size, size, size): the diagonal blocks of each."""
    cut = gram.view(len(gram), gram.shape[1] // size, size, -1, size)
    return cut.diagonal(dim1=1, dim2=3).movedim(-1, 1).reshape(-1, size, size)


def _test_matrix(slots: int, width: int, seed: int, device: torch.device) -> Tensor:
    """Standard normal in steps of 1/32 (slots, width), float32, the same for equal arguments on every device (drawn on
    the CPU). In such steps each is a number of bf16 and of fp16 too (8 bits, as it is below 8), so that halves can be
    multiplied by it as they are.
    """
    if device.type == "meta":
        return torch.empty(slots, width, device=device)
    key = (slots, width, seed, device)
    test = _shared_tests.get(key)
    if test is None:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(slots, width, generator=generator, device="cpu")
        test = _shared_tests[key] = drawn.mul_(32).round_().div_(32).to(device)
    return test


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products in true float32: no autocast, and no TF32 on CUDA, whose rounding of 1e-3 is as large as the damping."""
    # Entered thousands of times, so not where it changes nothing.
    casts = torch.is_autocast_enabled(device.type)
    with torch.autocast(device.type, enabled=False) if casts else contextlib.nullcontext():
        if device.type != "cuda":
            yield
            return
        # Where PyTorch has the newer switch (2.9), reading the older one raises once anybody has set the newer.
        switch = torch.backends.cuda.matmul
        name, full = ("fp32_precision", "ieee") if hasattr(switch, "fp32_precision") else ("allow_tf32", False)
        before = getattr(switch, name)
        setattr(switch, name, full)
        try:
            yield
        finally:
            setattr(switch, name, before)

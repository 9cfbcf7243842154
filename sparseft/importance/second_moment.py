"""What the forms of a streamed second moment share (`hodlr.Hodlr`, `multilevel.Multilevel`): taking vectors in, and
asking for the matrix that their sums come to.

What is kept are sums that are linear in x xᵀ. So batches can be split in any way, and the sums of several data-parallel
ranks added.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Protocol, Self

import torch
from torch import Tensor

from sparseft.errors import RunError, UserError
from sparseft.importance.slots import Layout
from sparseft.kernels.reference import FP32_PRODUCTS, product

# Tokens that one pass of `update` takes at a time: bounds its float32 copies when a caller gives a whole epoch. On a
# CPU they are then small enough for the allocator to use again (about 1.3 times as fast as 4,096); elsewhere each chunk
# costs some dozens of launches.
CHUNK_TOKENS_CPU, CHUNK_TOKENS = 512, 4096

# The matrix of a quadratic form is divided by the square of the vectors' largest entry, taken to be no less than this.
LEAST_PEAK = 1e-16

# The test matrices depend on the shape and the seed only, so the statistics of all layers share them.
_shared_tests: weakref.WeakValueDictionary[tuple, Tensor] = weakref.WeakValueDictionary()


class Factors(Protocol):
    """A finished matrix M (n, n), symmetric, in whatever form."""

    def to(self, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Self:
        """The matrix times `scale`, elsewhere or in another precision; scaled before it is rounded."""

    def diagonal(self) -> Tensor:
        """(n,)"""

    def matmul(self, v: Tensor) -> Tensor:
        """M v, (n, m) -> (n, m), in the dtype and on the device that the factors and `v` share."""

    def for_quadratic(self) -> Self:
        """The same matrix in the form that `quadratic` is fastest with."""

    def quadratic(self, v: Tensor) -> Tensor:
        """vᵢᵀ M vᵢ of every column, (n, m) -> (m,) float64, without another (n, m) matrix."""

    def inverse_diagonal(self, damping: float) -> tuple[Tensor, float]:
        """diag((M + d · mean(diag M) · I)⁻¹) (n,), positive and finite, and the damping d it took."""

    def to_dense(self) -> Tensor:
        """(n, n)"""


class SecondMoment:
    """Streaming M = mean of x xᵀ over tokens. With no token seen, M is zero.

    A form says what it sums (`_sums`, `_add`) and what matrix its sums come to (`_factored`).
    """

    _layout: Layout  # of the finished matrix
    _summed: Layout  # of what is summed

    def __init__(self, n: int, num_partition: int, rank: int, device: torch.device | str | None, seed: int) -> None:
        for name, value, least in (("n", n, 1), ("num_partition", num_partition, 0), ("rank", rank, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(
                    f"{type(self).__name__}: {name} is {value!r}; expected a whole number of at least {least}."
                )
        self.n, self.num_partition, self.rank, self.seed = n, num_partition, rank, seed
        self._tokens = torch.zeros(1, dtype=torch.int64, device=device)
        self.device = self._tokens.device
        self._finished: Factors | None = None
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
            raise ValueError(f"{type(self).__name__}.update: x has shape {tuple(x.shape)}; expected (..., {self.n}).")
        self.release()
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
        raise NotImplementedError

    def _sums(self) -> list[Tensor]:
        """Float32, in an order fixed by (n, num_partition, rank)."""
        raise NotImplementedError

    def _factored(self, *means: Tensor) -> Factors:
        """The matrix that the sums, over the tokens and in float64, come to."""
        raise NotImplementedError

    # -- what the sums amount to ------------------------------------------------------------------------------------

    def matmul(self, v: Tensor) -> Tensor:
        """M v, (n, m) -> (n, m) or (n,) -> (n,), in float64 for float64 and in float32 for every other dtype."""
        if v.dim() not in (1, 2) or v.shape[0] != self.n:
            raise ValueError(f"{type(self).__name__}.matmul: v has shape {tuple(v.shape)}; expected ({self.n}, any).")
        dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
        matrix = self._factors().to(self.device, dtype)
        with torch.no_grad(), full_precision(self.device):
            out = matrix.matmul(v.detach().to(self.device, dtype).reshape(self.n, -1))
        return out.reshape(v.shape)

    def quadratic(self, v: Tensor) -> Tensor:
        """vᵢᵀ M vᵢ of each column, (n, m) -> (m,) float64: `(v * matmul(v)).sum(0)` without a second (n, m) matrix.

        Computed in float64 for float64 `v`, else in float32, scaled so that neither tiny `v` nor tiny M underflow; a
        column 1e-19 times as large as the largest counts as zero. Where M is indefinite, a value may be negative.
        """
        if v.dim() != 2 or v.shape[0] != self.n:
            raise ValueError(
                f"{type(self).__name__}.quadratic: v has shape {tuple(v.shape)}; expected ({self.n}, any)."
            )
        dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
        factors = self._factors()
        unit = float(factors.diagonal().mean()) or 1.0
        v = v.detach().to(self.device, dtype)
        if v.numel():
            lying = v if v.stride(1) == 1 else v.T  # across the lines of memory it would copy all first
            peak = max(abs(float(end)) for end in lying.aminmax())
            unit *= min(max(peak, LEAST_PEAK), 1 / LEAST_PEAK) ** 2
        with torch.no_grad(), full_precision(self.device):
            return factors.for_quadratic().to(self.device, dtype, 1 / unit).quadratic(v) * unit

    def inverse_diagonal(self, damping: float = 1e-3) -> Tensor:
        """diag((M + d · mean(diag M) · I)⁻¹), (n,) float64, finite and positive; `effective_damping` says which d.

        Of a zero matrix the result is 1 / damping.
        """
        damping = float(damping)
        if damping not in self._inverses:
            factors = self._factors()
            with torch.no_grad(), self._one_thread():
                self._inverses[damping] = factors.inverse_diagonal(damping)
        inverse, self.effective_damping = self._inverses[damping]
        return inverse.to(self.device, copy=True)

    def to_dense(self) -> Tensor:
        """M as (n, n) float64: the matrix that `matmul` and `inverse_diagonal` work with. For tests."""
        return self._factors().to_dense().to(self.device)

    @torch.no_grad()
    def _factors(self) -> Factors:
        """The matrix in float64, kept until the next update. RunError where the data held inf or NaN.

        On the CPU: hundreds of small decompositions, which LAPACK does in milliseconds and an accelerator one by one.
        The dense matrix of num_partition=0 stays where it is.
        """
        if self._finished is None:
            device = "cpu" if self.levels else self.device
            with self._one_thread():
                means = [x.to(device).double() / max(1, self.tokens) for x in self._sums()]
                if not all(x.sum().isfinite() for x in means):  # float64: a sum of float32 numbers does not overflow
                    raise RunError(
                        "the second-order statistics are not finite: an activation or a gradient was inf or NaN, "
                        "or too large for float32 once squared and summed."
                    )
                self._finished = self._factored(*means)
        return self._finished

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

    def release(self) -> None:
        """Frees the factors and inverses made of the sums; they are made anew when they are asked for."""
        self._finished = None
        self._inverses.clear()

    # -- the raw sums: to reduce, to save ---------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """The raw sums, token count (int64) first, in an order fixed by (n, num_partition, rank).

        They are the live tensors: sum each in place over the data-parallel ranks (all-reduce), or fill it with what
        was saved, before asking for anything else. Both need a matrix of the same arguments, the seed among them.
        """
        self.release()
        return [self._tokens, *self._sums()]


def add_product(
    total: Tensor,  # (nodes, a, b)
    left: Tensor,  # (nodes, tokens, a), float32, or halves where their products come in float32
    right: Tensor,  # (nodes, tokens, b)
) -> None:
    """Adds leftᵀ right of each node."""
    if left.dtype == torch.float32:
        total.baddbmm_(left.mT, right)
    else:
        total += product(left.mT, right)


def gaussian(slots: int, width: int, seed: int, device: torch.device) -> Tensor:
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
        switch = torch.backends.cuda.matmul
        before, switch.fp32_precision = switch.fp32_precision, "ieee"
        try:
            yield
        finally:
            switch.fp32_precision = before

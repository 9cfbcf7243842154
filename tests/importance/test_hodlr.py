"""`Hodlr` and the importance made of it, against dense matrices in NumPy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sparseft.errors import RunError, UserError
from sparseft.importance.hodlr import SKETCHES_WIDE, Hodlr, sketch_width
from sparseft.importance.hodlr_factors import leading
from sparseft.importance.kfac import block_scores, entry_importance
from support.second_moments import check_inverse, data, moment, relative

SPECTRA = ("flat", "slow", "decaying", "fast", "spiked", "low rank")
properties = settings(max_examples=40, deadline=None)
pytestmark = pytest.mark.usefixtures("one_thread")


def fed(n: int, x: torch.Tensor, **options) -> Hodlr:
    hodlr = Hodlr(n, **options)
    hodlr.update(x)
    return hodlr


def off_diagonal(n: int, levels: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of every off-diagonal block above the diagonal, halves rounded down first."""
    nodes = [(0, n)]
    for _ in range(levels):
        halves = [(low, low + (high - low) // 2, high) for low, high in nodes]
        yield from ((slice(low, middle), slice(middle, high)) for low, middle, high in halves)
        nodes = [half for low, middle, high in halves for half in ((low, middle), (middle, high))]


# -- the matrix -------------------------------------------------------------------------------------------------------


@properties
@given(
    n=st.one_of(st.integers(1, 100), st.sampled_from([161, 200, 333])),
    num_partition=st.integers(0, 9),
    rank=st.integers(1, 12),
    tokens=st.integers(1, 200),
    decay=st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0]),
    damping=st.sampled_from([1e-1, 1e-3, 1e-5]),
    seed=st.integers(0, 99),
)
def test_the_matrix_its_products_and_its_inverse_agree(
    n: int, num_partition: int, rank: int, tokens: int, decay: float, damping: float, seed: int
) -> None:
    x = data(n, tokens, seed, decay)
    hodlr = fed(n, x, num_partition=num_partition, rank=rank)
    dense, exact = hodlr.to_dense().numpy(), moment(x)
    np.testing.assert_array_equal(dense, dense.T)
    outside = np.ones((n, n), dtype=bool)  # of every truncated block: the leaves, which are exact
    for rows, columns in off_diagonal(n, hodlr.levels):
        outside[rows, columns] = outside[columns, rows] = False
        assert np.linalg.matrix_rank(dense[rows, columns], tol=1e-9 * np.abs(exact).max()) <= rank
    np.testing.assert_allclose(dense[outside], exact[outside], atol=1e-6 * np.abs(exact).max())

    v = np.random.default_rng(seed).standard_normal((n, 3))
    np.testing.assert_allclose(hodlr.matmul(torch.from_numpy(v)), dense @ v, atol=1e-10 * np.abs(dense).sum())
    assert relative(hodlr.matmul(torch.from_numpy(v).float()), dense @ v) < 1e-4
    forms = (v * (dense @ v)).sum(0)
    np.testing.assert_allclose(hodlr.quadratic(torch.from_numpy(v)), forms, atol=1e-10 * np.abs(dense).sum())
    check_inverse(hodlr, damping)


@pytest.mark.parametrize(("n", "num_partition", "rank"), [(300, 1, 150), (301, 4, 301), (400, 8, 200), (64, 8, 32)])
def test_full_rank_reproduces_the_matrix(n: int, num_partition: int, rank: int) -> None:
    x = data(n, n + 50, seed=1, decay=0.3)
    hodlr = fed(n, x, num_partition=num_partition, rank=rank)
    assert relative(hodlr.to_dense(), moment(x)) < 1e-6
    check_inverse(hodlr, 1e-3)
    assert hodlr.effective_damping == 1e-3  # nothing was cut off, so nothing became indefinite


def test_a_rank_that_the_data_really_has_is_found_through_the_sketches() -> None:
    rng = np.random.default_rng(0)
    n, rank = 600, 4
    assert n // 4 > SKETCHES_WIDE * sketch_width(rank)  # two levels of it are sketched
    x = torch.from_numpy((rng.standard_normal((900, rank)) @ rng.standard_normal((rank, n))).astype(np.float32))
    assert relative(fed(n, x, num_partition=6, rank=rank).to_dense(), moment(x)) < 1e-5


def block_data(size: int, spectrum: str, rank: int, seed: int) -> torch.Tensor:
    """(size, 2 · size) vectors: the off-diagonal block of their second moment has exactly this spectrum."""
    rng = np.random.default_rng(seed)
    i = np.arange(1, size + 1, dtype=float)
    values = {
        "flat": np.ones(size),
        "slow": i**-0.5,
        "decaying": i**-1.0,
        "fast": 0.7**i,
        "spiked": np.where(i <= rank, 1000.0, 1.0),
        "low rank": np.where(i <= rank, 1.0, 1e-3 / i),
    }[spectrum]
    tokens, left, right = (np.linalg.qr(rng.standard_normal((size, size)))[0] for _ in range(3))
    return torch.from_numpy((tokens * np.sqrt(values * size) @ np.hstack([left.T, right.T])).astype(np.float32))


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("size", "rank"), [(181, 1), (200, 2), (320, 8)])
def test_every_block_is_within_half_again_of_the_best_of_its_rank(spectrum: str, size: int, rank: int) -> None:
    x = block_data(size, spectrum, rank, seed=size)
    hodlr = fed(2 * size, x, num_partition=4, rank=rank)
    assert size > SKETCHES_WIDE * sketch_width(rank)  # the largest block, whose spectrum this is, is sketched
    dense, exact = hodlr.to_dense().numpy(), moment(x)
    for rows, columns in off_diagonal(2 * size, hodlr.levels):
        block = exact[rows, columns]
        best = np.linalg.norm(np.linalg.svd(block, compute_uv=False)[rank:])
        # The second term is what the float32 sums have lost.
        assert np.linalg.norm(dense[rows, columns] - block) <= 1.5 * best + 1e-7 * np.linalg.norm(exact)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("spectrum", [*SPECTRA, "nearly flat", "zero"])
def test_leading_eigenvectors_are_those_of_all_of_them(spectrum: str, rank: int) -> None:
    """Where eigenvalues lie too near each other to be told apart, any of their vectors truncate a block as well."""
    size, i = 64, np.arange(1, 65, dtype=float)
    values = {
        "flat": np.ones(size),
        "slow": i**-0.5,
        "decaying": i**-1.0,
        "fast": 0.7**i,
        "low rank": 1.0 * (i <= rank),
        "spiked": np.where(i <= rank, 1000.0, 1.0),
        "nearly flat": 1 - 0.01 * i / size,
        "zero": 0 * i,
    }[spectrum]
    basis = np.linalg.qr(np.random.default_rng(rank).standard_normal((size, size)))[0]
    gram = torch.from_numpy(1e-30 * (basis * values) @ basis.T)[None]
    found = leading(gram, rank)[0].numpy()
    np.testing.assert_allclose(found.T @ found, np.eye(rank), atol=1e-12)
    kept = np.diag(found.T @ gram[0].numpy() @ found)[::-1] / 1e-30
    digits = 1e-2 if spectrum == "nearly flat" else 1e-9
    np.testing.assert_allclose(kept, np.sort(values)[::-1][:rank], rtol=digits, atol=1e-12)


def test_the_error_falls_with_the_rank() -> None:
    x = data(512, 1500, seed=3, decay=1.5)
    x[:, 1:] += 0.8 * x[:, :-1]  # neighbours resemble each other, as low-rank blocks need it
    exact = moment(x)
    errors = [relative(fed(512, x, num_partition=5, rank=rank).to_dense(), exact) for rank in (1, 2, 4, 8, 16, 32)]
    assert all(later < 0.9 * earlier for earlier, later in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.1 * errors[0]


# -- what comes in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("n", [161, 400])
def test_the_inverse_keeps_its_digits_near_a_singular_matrix(n: int, rank: int) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((50, rank)) @ rng.standard_normal((rank, n))  # all but singular without its damping
    hodlr = fed(n, torch.from_numpy(x.astype(np.float32)), rank=rank)
    for damping in (1e-2, 1e-4, 1e-6):
        check_inverse(hodlr, damping)
        assert hodlr.effective_damping <= max(damping, 1e-3)


# -- damping, cost ----------------------------------------------------------------------------------------------------


def test_damping_grows_until_the_truncated_matrix_is_positive_definite() -> None:
    hodlr = fed(200, data(200, 60, seed=16, decay=0.5), num_partition=4)
    assert hodlr.effective_damping is None
    dense = hodlr.to_dense().numpy()
    lowest = np.linalg.eigvalsh(dense)[0] / np.diag(dense).mean()
    assert lowest < -1e-2  # so this is a case of it
    check_inverse(hodlr, 1e-4)
    assert hodlr.effective_damping == pytest.approx(10 ** math.ceil(math.log10(-lowest)))
    hodlr.inverse_diagonal(50.0)
    assert hodlr.effective_damping == 50.0


@pytest.mark.parametrize(("n", "rank"), [(8, 1), (129, 1), (200, 3), (300, 20)])
def test_no_damping_that_could_do_is_left_out(n: int, rank: int) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        hodlr = Hodlr(n, 8, rank)
        hodlr.update(torch.from_numpy(rng.standard_normal((n // 2, n)).astype(np.float32)) + rng.standard_normal())
        dense = hodlr.to_dense()
        unit = float(dense.diagonal().mean())
        needed = -float(torch.linalg.eigvalsh(dense)[0]) / unit
        factors = hodlr._factors()
        bound = factors.to(factors.leaves.device, torch.float64, 1 / unit)._least_damping()
        assert bound <= max(needed, 0) + 1e-12
        hodlr.inverse_diagonal(1e-6)
        first = next(d for d in (1e-6 * 10**i for i in range(20)) if d > needed)
        assert hodlr.effective_damping == pytest.approx(first)


def test_no_damping_at_all() -> None:
    x = data(48, 500, seed=17)
    hodlr = fed(48, x, rank=48)
    np.testing.assert_allclose(hodlr.inverse_diagonal(0.0), np.diag(np.linalg.inv(moment(x))), rtol=1e-3)
    assert hodlr.effective_damping == 0
    singular = fed(48, x[:5], rank=48)
    assert (singular.inverse_diagonal(0.0) > 0).all() and singular.effective_damping > 0


class LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_nothing_of_the_dense_size_is_ever_made() -> None:
    n = 4097
    x, v = torch.randn(64, n, generator=torch.Generator().manual_seed(0)), torch.ones(n, 8)
    with LargestTensor() as largest:
        hodlr = fed(n, x)
        inverse = hodlr.inverse_diagonal()
        hodlr.matmul(v)
        hodlr.quadratic(v)
    assert largest.elements < n * n / 20
    assert sum(tensor.numel() for tensor in hodlr.tensors()) < n * n / 10
    assert torch.isfinite(inverse).all() and (inverse > 0).all()


# -- importance -------------------------------------------------------------------------------------------------------


def brute_force(gradient: np.ndarray, A: np.ndarray, G: np.ndarray, damping_a: float, damping_g: float) -> np.ndarray:
    """Scores of all entries (out, in), entry by entry as the definition reads."""
    inverse_a = np.linalg.inv(A + damping_a * np.diag(A).mean() * np.eye(len(A)))
    inverse_g = np.linalg.inv(G + damping_g * np.diag(G).mean() * np.eye(len(G)))
    rows = [max(0.0, g @ A @ g) / inverse_g[o, o] for o, g in enumerate(gradient)]
    columns = [max(0.0, g @ G @ g) / inverse_a[i, i] for i, g in enumerate(gradient.T)]
    return np.array([[row * column for column in columns] for row in rows])


def brute_blocks(scores: np.ndarray, size: int) -> np.ndarray:
    rows, columns = (range(0, length, size) for length in scores.shape)
    return np.array([[scores[r : r + size, c : c + size].sum() for c in columns] for r in rows])


def top(scores: np.ndarray, count: int) -> set[int]:
    return set(np.argsort(-scores.ravel(), kind="stable")[:count].tolist())


@pytest.mark.parametrize(("num_partition", "rank"), [(0, 1), (3, 1), (8, 4)])
@pytest.mark.parametrize(("out", "in_", "size"), [(90, 130, 16), (64, 32, 8), (33, 250, 64), (5, 3, 4)])
def test_importance_is_the_brute_force_one(num_partition: int, rank: int, out: int, in_: int, size: int) -> None:
    a, g = data(in_, 200, seed=1), data(out, 200, seed=2) * 1e-5
    gradient = g.t() @ a / 200
    A = fed(in_, a, num_partition=num_partition, rank=rank)
    G = fed(out, g, num_partition=num_partition, rank=rank)
    O, I = entry_importance(gradient, A, G, damping=1e-3)  # noqa: E741
    blocks = block_scores(O, I, size)

    exact = num_partition == 0
    dense = (moment(a), moment(g)) if exact else (A.to_dense().numpy(), G.to_dense().numpy())
    if exact:
        assert A.effective_damping == G.effective_damping == 1e-3
    expected = brute_force(gradient.double().numpy(), *dense, A.effective_damping, G.effective_damping)
    np.testing.assert_allclose(torch.outer(O, I), expected, rtol=1e-2, atol=1e-5 * expected.max())
    expected_blocks = brute_blocks(expected, size)
    assert blocks.shape == expected_blocks.shape == (-(-out // size), -(-in_ // size))
    np.testing.assert_allclose(blocks, expected_blocks, rtol=2e-3, atol=1e-6 * expected_blocks.max())
    for count in (1, blocks.numel() // 10, blocks.numel() // 3):
        assert top(blocks.numpy(), count) == top(expected_blocks, count)


def test_importance_is_never_negative() -> None:
    hodlr = fed(200, data(200, 60, seed=16, decay=0.5), num_partition=4)
    value, vector = np.linalg.eigh(hodlr.to_dense().numpy())
    assert value[0] < 0
    gradient = torch.from_numpy(np.outer(vector[:, 0], vector[:, -1])).float()  # columns along a negative direction
    O, I = entry_importance(gradient, hodlr, hodlr)  # noqa: E741
    assert (O >= 0).all() and (I == 0).all()


def test_importance_refuses_what_does_not_fit() -> None:
    A, G = fed(6, data(6, 9, seed=0)), fed(4, data(4, 9, seed=0))
    with pytest.raises(ValueError, match=r"\(6, 4\); expected \(out, in\) = \(4, 6\)"):
        entry_importance(torch.zeros(6, 4), A, G)
    with pytest.raises(RunError, match="not finite"):
        entry_importance(torch.full((4, 6), float("nan")), A, G)
    with pytest.raises(UserError, match="block_size"):
        block_scores(torch.ones(4), torch.ones(6), 0)

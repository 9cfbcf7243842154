"""`Multilevel` against dense matrices in NumPy: below the second moment itself, positive always, its inverse exact."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft.importance import multilevel
from sparseft.importance.hodlr import Hodlr
from sparseft.importance.hooks import Observation
from sparseft.importance.kfac import RANKS, FactorSettings, KroneckerFactors, entry_importance, statistics_bytes
from sparseft.importance.multilevel import Multilevel, nystrom
from sparseft.importance.second_moment import SecondMoment
from support.second_moments import check_inverse, data, moment, relative

properties = settings(max_examples=40, deadline=None)
pytestmark = pytest.mark.usefixtures("one_thread", "small_leaves")


def fed(n: int, x: torch.Tensor, **options) -> Multilevel:
    matrix = Multilevel(n, **options)
    matrix.update(x)
    return matrix


def nodes(n: int, level: int) -> list[slice]:
    """The rows of each node of a level, halves rounded down first."""
    sizes = [n]
    for _ in range(level):
        sizes = [half for size in sizes for half in (size // 2, size - size // 2)]
    ends = list(itertools.accumulate(sizes))
    return [slice(low, high) for low, high in zip([0, *ends], ends, strict=False)]


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
def test_it_is_positive_below_the_second_moment_level_by_level_and_its_own_inverse(
    n: int, num_partition: int, rank: int, tokens: int, decay: float, damping: float, seed: int
) -> None:
    """With fewer tokens than features too. What float32 sums lose is 1e-7 of the trace, up to a factor."""
    x = data(n, tokens, seed, decay)
    matrix = fed(n, x, num_partition=num_partition, rank=rank)
    dense, exact = matrix.to_dense().numpy(), moment(x)
    lost = 3e-6 * np.trace(exact)
    np.testing.assert_allclose(dense, dense.T, atol=1e-14 * np.trace(exact))
    assert np.linalg.eigvalsh(dense)[0] >= -lost
    for leaf in nodes(n, matrix.levels):
        np.testing.assert_allclose(dense[leaf, leaf], exact[leaf, leaf], atol=1e-6 * np.abs(exact).max())
    # What levels from the top have taken leaves their diagonal blocks positive.
    left, bases = exact.copy(), matrix._factors().bases
    for level, basis in enumerate(bases):
        for rows, taken in zip(nodes(n, level), basis, strict=True):
            taken = matrix._layout.gather(_placed(matrix, level, rows, taken), 0).numpy()
            left[rows, rows] -= (taken @ taken.T)[rows, rows]
            assert np.linalg.eigvalsh(left[rows, rows])[0] >= -lost

    v = np.random.default_rng(seed).standard_normal((n, 3))
    np.testing.assert_allclose(matrix.matmul(torch.from_numpy(v)), dense @ v, atol=1e-10 * np.abs(dense).sum())
    assert relative(matrix.matmul(torch.from_numpy(v).float()), dense @ v) < 1e-4
    forms = (v * (dense @ v)).sum(0)
    for lying in (torch.from_numpy(v), torch.from_numpy(v.T.copy()).T):
        np.testing.assert_allclose(matrix.quadratic(lying), forms, atol=1e-10 * np.abs(dense).sum())
    if damping * np.diag(exact).mean() > lost:
        check_inverse(matrix, damping)


def _placed(matrix: Multilevel, level: int, rows: slice, taken: torch.Tensor) -> torch.Tensor:
    """A node's basis (node, r) in the slots of the whole."""
    node = matrix._layout.node(level)
    whole = taken.new_zeros(matrix._layout.slots, taken.shape[1])
    index = nodes(matrix.n, level).index(rows)
    whole[index * node : (index + 1) * node] = taken
    return whole


def test_a_rank_that_the_data_really_has_is_found_at_once_and_nothing_is_made_of_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(multilevel, "LEAST_LEAF_ROWS", 64)  # smaller products are summed less exactly
    rng = np.random.default_rng(0)
    n, rank = 1200, 4
    x = torch.from_numpy((rng.standard_normal((900, rank)) @ rng.standard_normal((rank, n))).astype(np.float32))
    matrix = fed(n, x, rank=rank + 2)
    assert matrix.levels > 3 and relative(matrix.to_dense(), moment(x)) < 1e-5
    first, *rest = matrix._factors().bases
    assert int(first.any(1).sum()) == rank and not any(basis.any() for basis in rest)
    check_inverse(matrix, 1e-3, 1e-4)


def test_what_a_half_has_of_its_own_is_found_below_the_whole() -> None:
    """Rank 3 in common and rank 3 in each quarter: a sketch that used one test matrix for all levels would see none of
    the quarters' (a residual annihilates the test matrix it was made with)."""
    rng = np.random.default_rng(1)
    n, tokens = 256, 4000
    x = 10 * rng.standard_normal((tokens, 3)) @ rng.standard_normal((3, n))
    for rows in nodes(n, 2):
        x[:, rows] += rng.standard_normal((tokens, 3)) @ rng.standard_normal((3, 64))
    x = torch.from_numpy(x.astype(np.float32))
    errors = [relative(fed(n, x, num_partition=levels, rank=6).to_dense(), moment(x)) for levels in (1, 3)]
    dense, exact = fed(n, x, num_partition=3, rank=6).to_dense().numpy(), moment(x)
    for block in nodes(n, 2):
        assert relative(dense[block, block], exact[block, block]) < 2e-3
    assert errors[1] < 0.1


def test_the_leading_eigenpairs_are_most_of_it() -> None:
    """The low rank is never above the matrix, and leaves in the mean at most what theory says of r columns: (1 + k /
    (r - k - 1)) times what the best k eigenpairs leave, for any k (Halko, Martinsson, Tropp 2011, theorem 10.5)."""
    n, rank, left = 200, 12, []
    exact = moment(data(n, 3000, seed=2, decay=2.0))
    for seed in range(20):
        test = torch.randn(1, n, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        basis = nystrom(torch.from_numpy(exact) @ test, test, torch.zeros(1))[0].numpy()
        rest = exact - basis @ basis.T
        assert np.linalg.eigvalsh(rest)[0] > -1e-12
        left.append(np.trace(rest))
    values = np.sort(np.linalg.eigvalsh(exact))
    assert values[:-rank].sum() <= min(left)
    assert np.mean(left) <= min((1 + k / (rank - k - 1)) * values[:-k].sum() for k in range(1, rank - 1))


def test_the_error_falls_with_the_rank() -> None:
    x = data(300, 1500, seed=3, decay=1.5)
    exact = moment(x)
    errors = [relative(fed(300, x, num_partition=5, rank=rank).to_dense(), exact) for rank in (2, 4, 8, 16, 32)]
    assert all(later < 0.9 * earlier for earlier, later in itertools.pairwise(errors)), errors


# -- what comes in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1e-2, 1e-6, 1e-9, 1e-30, 1e-300])
@pytest.mark.parametrize("tokens", [1, 20, 500])
def test_the_damping_is_the_one_asked_for_whatever_rounding_has_left(damping: float, tokens: int) -> None:
    """Singular without it, and far below what float32 sums hold: finite, positive and within what any positive matrix
    of this diagonal allows."""
    x = data(200, tokens, seed=tokens, decay=1.0) + 3
    x[:, 17] *= 300  # as models' massive activations
    matrix = fed(200, x)
    inverse, dense = matrix.inverse_diagonal(damping), matrix.to_dense().diagonal()
    assert matrix.effective_damping == damping
    assert torch.isfinite(inverse).all() and (inverse > 0).all()
    shift = damping * dense.mean()
    assert (inverse >= 0.999 / (dense + shift)).all() and (inverse <= 1.001 / shift).all()


# -- what sylva makes of it -------------------------------------------------------------------------------------------


def test_the_structures() -> None:
    def made(n: int = 1000, **options) -> SecondMoment:
        return FactorSettings(**options).matrix(n, "cpu")

    assert isinstance(made(), Multilevel) and made().rank == RANKS["multilevel"] and made().levels > 1
    assert isinstance(made(structure="hodlr"), Hodlr) and made(structure="hodlr").rank == 1
    assert made(rank=5).rank == made(rank=5, structure="hodlr").rank == 5
    assert made(structure="dense", rank=5).levels == made(num_partition=0).levels == 0
    assert made(num_partition=1).levels == 1
    shapes = [(400, 300), (300, 300)]
    for options in ({}, {"structure": "hodlr"}, {"structure": "dense"}):
        settings = FactorSettings(**options)
        held = sum(x.nbytes for n in (400, 300, 300, 300) for x in settings.matrix(n, "cpu").tensors())
        assert statistics_bytes(settings, shapes) == held + 4 * (400 * 300 + 300 * 300)


@pytest.mark.parametrize("structure", ["multilevel", "hodlr", "dense"])
def test_statistics_are_taken_up_again(structure: str) -> None:
    seen = [Observation("m", data(333, 60, seed), None, data(200, 60, seed + 9), "m", 2) for seed in (0, 1)]
    whole, begun, gone_on = (
        KroneckerFactors(FactorSettings(structure=structure), 0, {"m": (200, 333)}, torch.device("cpu"))
        for _ in range(3)
    )
    begun(seen[0])
    tensors, meta = begun.state()
    gone_on.load({name: x.clone() for name, x in tensors.items()}, meta)
    gone_on(seen[1])
    for one in seen:
        whole(one)
    for name, x in whole.state()[0].items():
        assert torch.equal(gone_on.state()[0][name], x), name


def test_it_chooses_nearer_to_the_exact_matrices_than_hodlr() -> None:
    """Layers of 400 inputs and 300 outputs with a few leading directions: entries scored as the exact matrices do."""
    inputs, outputs = (data(n, 2000, seed, decay=1.3) for n, seed in ((400, 20), (300, 21)))
    inputs = inputs @ torch.diag(torch.logspace(-1, 0.5, 400))
    gradient = outputs.T @ (inputs * torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))) / 2000

    def best(form: type[SecondMoment], **options) -> set[int]:
        a, g = form(400, **options), form(300, **options)
        a.update(inputs)
        g.update(outputs)
        rows, columns = entry_importance(gradient, a, g)
        return set(torch.outer(rows, columns).flatten().topk(6000).indices.tolist())

    exact = best(Multilevel, num_partition=0)
    overlap = {form: len(best(form) & exact) / 6000 for form in (Multilevel, Hodlr)}
    assert overlap[Multilevel] > 0.9 and overlap[Multilevel] > overlap[Hodlr] + 0.05, overlap

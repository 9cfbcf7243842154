"""`Multilevel` against dense matrices in NumPy: below the second moment itself, positive always, its inverse exact."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft.errors import RunError, UserError
from sparseft.importance import multilevel
from sparseft.importance.hodlr import Hodlr
from sparseft.importance.hooks import Observation
from sparseft.importance.kfac import RANKS, FactorSettings, KroneckerFactors, entry_importance, statistics_bytes
from sparseft.importance.multilevel import Multilevel, nystrom
from sparseft.importance.second_moment import SecondMoment

properties = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny products: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def small_leaves() -> Iterator[None]:
    """So that small matrices have several levels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multilevel, "LEAST_LEAF_ROWS", 8)
        yield


def data(n: int, tokens: int, seed: int, decay: float = 1.0) -> torch.Tensor:
    """(tokens, n) float32 vectors whose second moment has eigenvalues that fall as i^-decay in a random basis."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((n, n)))
    scale = np.arange(1, n + 1) ** (-decay / 2)
    return torch.from_numpy((rng.standard_normal((tokens, n)) * scale @ basis.T).astype(np.float32))


def moment(x: torch.Tensor) -> np.ndarray:
    x = x.reshape(-1, x.shape[-1]).double().numpy()
    return x.T @ x / max(1, len(x))


def fed(n: int, x: torch.Tensor, **options) -> Multilevel:
    matrix = Multilevel(n, **options)
    matrix.update(x)
    return matrix


def relative(found: np.ndarray | torch.Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found) - expected) / max(np.linalg.norm(expected), 1e-300))


def nodes(n: int, level: int) -> list[slice]:
    """The rows of each node of a level, halves rounded down first."""
    sizes = [n]
    for _ in range(level):
        sizes = [half for size in sizes for half in (size // 2, size - size // 2)]
    ends = list(itertools.accumulate(sizes))
    return [slice(low, high) for low, high in zip([0, *ends], ends, strict=False)]


def check_inverse(matrix: SecondMoment, damping: float, tolerance: float = 1e-6) -> None:
    """The inverse's diagonal is the dense one's, with the damping that was asked for."""
    found = matrix.inverse_diagonal(damping).numpy()
    dense = matrix.to_dense().numpy()
    unit = np.diag(dense).mean() or 1.0
    assert matrix.effective_damping == damping
    assert found.shape == (matrix.n,) and np.isfinite(found).all() and (found > 0).all()
    wanted = np.diag(np.linalg.inv(dense + damping * unit * np.eye(matrix.n)))
    np.testing.assert_allclose(found, wanted, rtol=tolerance)


# -- the matrix -------------------------------------------------------------------------------------------------------


@properties
@given(n=st.integers(1, 90), tokens=st.integers(1, 120), seed=st.integers(0, 99))
def test_without_levels_it_is_the_dense_matrix(n: int, tokens: int, seed: int) -> None:
    x = data(n, tokens, seed)
    matrix = fed(n, x, num_partition=0)
    assert matrix.levels == 0 and relative(matrix.to_dense(), moment(x)) < 1e-6
    check_inverse(matrix, 1e-3)


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


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 333])
@pytest.mark.parametrize("num_partition", [1, 3, 30])
def test_any_size_with_levels_and_ranks_beyond_it(n: int, num_partition: int) -> None:
    x = data(n, 2 * n, seed=n)
    matrix = fed(n, x, num_partition=num_partition, rank=2)
    assert matrix.levels <= num_partition and n >> matrix.levels >= min(n, 8)
    check_inverse(matrix, 1e-3)
    full = fed(n, x, num_partition=num_partition, rank=n + 5)
    assert full.levels == 0 and relative(full.to_dense(), moment(x)) < 1e-6


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


# -- streaming --------------------------------------------------------------------------------------------------------


@properties
@given(
    n=st.sampled_from([1, 5, 64, 99, 250]),
    num_partition=st.integers(0, 6),
    cuts=st.lists(st.integers(0, 300), max_size=8),
)
def test_batches_can_be_split_in_any_way(n: int, num_partition: int, cuts: list[int]) -> None:
    x = data(n, 300, seed=n)
    whole, split = fed(n, x, num_partition=num_partition), Multilevel(n, num_partition)
    for low, high in itertools.pairwise([0, *sorted(cuts), 300]):
        split.update(x[low:high])  # empty ones among them
    assert split.tokens == 300
    assert relative(split.to_dense(), whole.to_dense().numpy()) < 1e-5
    np.testing.assert_allclose(split.inverse_diagonal(1e-1), whole.inverse_diagonal(1e-1), rtol=1e-3)


def test_sums_of_several_ranks_are_one_matrix() -> None:
    x = data(250, 400, seed=5)
    parts = [fed(250, part, num_partition=4) for part in x.split([100, 0, 250, 50])]
    whole = fed(250, x, num_partition=4).to_dense().numpy()
    reduced = Multilevel(250, 4)
    reduced.inverse_diagonal()  # a result that must not outlive the reduction
    for target, *sources in zip(reduced.tensors(), *(part.tensors() for part in parts), strict=True):
        target.copy_(torch.stack(sources).sum(0))  # what an all-reduce leaves on each rank
    assert reduced.tokens == 400 and reduced.levels > 2
    assert relative(reduced.to_dense(), whole) < 1e-5


def test_the_seed_decides_and_nothing_else() -> None:
    x = data(250, 100, seed=7, decay=0.2)
    first = fed(250, x, seed=3).to_dense()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(fed(250, x, seed=3).to_dense(), first)
    assert torch.equal(torch.get_rng_state(), state)  # and the caller's random numbers are not used up
    assert not torch.equal(fed(250, x, seed=4).to_dense(), first)


# -- what comes in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_floating_dtype(dtype: torch.dtype) -> None:
    x = data(60, 200, seed=9).to(dtype)
    assert relative(fed(60, x, num_partition=0).to_dense(), moment(x)) < 1e-6
    assert torch.equal(fed(60, x).to_dense(), fed(60, x.float()).to_dense())


@pytest.mark.parametrize("n", [1, 7, 64, 200])
@pytest.mark.parametrize("num_partition", [0, 4])
@pytest.mark.parametrize("value", [0.0, 1.0, -3e3, 1e-9])
def test_zero_and_constant_inputs_stay_finite(n: int, num_partition: int, value: float) -> None:
    matrix = fed(n, torch.full((50, n), value), num_partition=num_partition)
    np.testing.assert_allclose(matrix.to_dense(), np.full((n, n), value**2), rtol=1e-4)
    unit = value**2 or 1.0
    for damping in (1e-1, 1e-3):
        exact = (1 - value**2 / (n * value**2 + damping * unit)) / damping / unit
        np.testing.assert_allclose(matrix.inverse_diagonal(damping), exact, rtol=1e-2)
        assert matrix.effective_damping == damping
    matrix.update(data(n, 50, seed=0))
    check_inverse(matrix, 1e-3)


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


def test_without_tokens_the_matrix_is_zero() -> None:
    matrix = Multilevel(40)
    matrix.update(torch.zeros(0, 40))
    matrix.update(torch.zeros(3, 0, 40))
    assert matrix.tokens == 0 and not matrix.to_dense().any() and not matrix.matmul(torch.ones(40, 2)).any()
    assert not matrix.quadratic(torch.ones(40, 2)).any()
    np.testing.assert_allclose(matrix.inverse_diagonal(1e-2), 100.0)


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e12])
def test_the_units_of_the_data_do_not_matter(scale: float) -> None:
    x = data(200, 300, seed=12)
    plain, scaled = fed(200, x), fed(200, x * scale)
    np.testing.assert_allclose(scaled.inverse_diagonal() * scale**2, plain.inverse_diagonal(), rtol=1e-3)
    v = data(7, 200, seed=13)
    tiny = scaled.quadratic(v * 1e-25) / 1e-50 / scale**2  # squares far below float32's range
    np.testing.assert_allclose(tiny, plain.quadratic(v), rtol=1e-3, atol=1e-6 * float(plain.quadratic(v).max()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25])
def test_data_that_is_not_finite_is_reported(value: float) -> None:
    x = data(200, 30, seed=15)
    x[3, 150] = value
    with pytest.raises(RunError, match="not finite"):
        fed(200, x).inverse_diagonal()


def test_wrong_input_is_refused() -> None:
    matrix = Multilevel(10)
    for wrong in (torch.zeros(4, 11), torch.zeros(10, 4), torch.zeros(())):
        with pytest.raises(ValueError, match=r"Multilevel.update: x has shape .*expected \(\.\.\., 10\)"):
            matrix.update(wrong)
    for arguments in ({"n": 0}, {"n": 10, "rank": 0}, {"n": 10, "num_partition": -1}, {"n": 10, "rank": 1.5}):
        with pytest.raises(UserError, match="Multilevel: .*whole number"):
            Multilevel(**arguments)
    for damping in (0.0, -1e-3, float("nan"), float("inf")):
        with pytest.raises(UserError, match="damping"):
            matrix.inverse_diagonal(damping)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_can_be_multiplied_as_they_are(dtype: torch.dtype) -> None:
    """As on CUDA, where their products come in float32: what `update` otherwise casts first."""
    x = torch.randn(70, 333, generator=torch.Generator().manual_seed(0)).to(dtype)
    cast, direct = Multilevel(333), Multilevel(333)
    cast.update(x)
    direct._add(direct._summed.spread(x, 1).contiguous())
    assert direct.levels > 3
    for one, other in zip(direct.tensors()[1:], cast.tensors()[1:], strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


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

"""What `Hodlr` and `Multilevel` have in common: taking vectors in, and what their sums are asked for."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft.errors import RunError, UserError
from sparseft.importance.hodlr import Hodlr
from sparseft.importance.multilevel import Multilevel
from sparseft.importance.second_moment import SecondMoment
from support.second_moments import check_inverse, data, moment, relative

properties = settings(max_examples=40, deadline=None)
pytestmark = pytest.mark.usefixtures("one_thread", "small_leaves")
each = pytest.mark.parametrize("form", [Hodlr, Multilevel])
Form = Callable[..., SecondMoment]


def fed(form: Form, n: int, x: torch.Tensor, **options) -> SecondMoment:
    matrix = form(n, **options)
    matrix.update(x)
    return matrix


@each
@properties
@given(n=st.integers(1, 90), tokens=st.integers(1, 120), seed=st.integers(0, 99))
def test_without_levels_it_is_the_dense_matrix(form: Form, n: int, tokens: int, seed: int) -> None:
    x = data(n, tokens, seed)
    matrix = fed(form, n, x, num_partition=0)
    assert matrix.levels == 0 and relative(matrix.to_dense(), moment(x)) < 1e-6
    check_inverse(matrix, 1e-3)
    assert matrix.effective_damping == 1e-3


@each
@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 333])
@pytest.mark.parametrize("num_partition", [1, 3, 30])
def test_any_size_with_levels_and_ranks_beyond_it(form: Form, n: int, num_partition: int) -> None:
    x = data(n, 2 * n, seed=n)
    matrix = fed(form, n, x, num_partition=num_partition, rank=2)
    assert matrix.levels <= num_partition and n >> matrix.levels >= min(n, 4 if form is Hodlr else 8)
    check_inverse(matrix, 1e-3)
    if n <= 100:
        full = fed(form, n, x, num_partition=num_partition, rank=n + 5)
        assert relative(full.to_dense(), moment(x)) < 1e-6
        assert full.levels == 0 or form is Hodlr


# -- streaming --------------------------------------------------------------------------------------------------------


@each
@properties
@given(
    n=st.sampled_from([1, 5, 64, 99, 250]),
    num_partition=st.integers(0, 6),
    cuts=st.lists(st.integers(0, 300), max_size=8),
)
def test_batches_can_be_split_in_any_way(form: Form, n: int, num_partition: int, cuts: list[int]) -> None:
    x = data(n, 300, seed=n)
    whole, split = fed(form, n, x, num_partition=num_partition), form(n, num_partition)
    for low, high in itertools.pairwise([0, *sorted(cuts), 300]):
        split.update(x[low:high])  # empty ones among them
    assert split.tokens == 300
    assert relative(split.to_dense(), whole.to_dense().numpy()) < 1e-5
    np.testing.assert_allclose(split.inverse_diagonal(1e-1), whole.inverse_diagonal(1e-1), rtol=1e-3)


@each
def test_a_batch_longer_than_one_pass_takes(form: Form) -> None:
    x = data(40, 10_000, seed=0)
    assert relative(fed(form, 40, x, rank=40).to_dense(), moment(x)) < 1e-6


@each
def test_sums_of_several_ranks_are_one_matrix(form: Form) -> None:
    x = data(250, 400, seed=5)
    parts = [fed(form, 250, part, num_partition=4) for part in x.split([100, 0, 250, 50])]
    whole = fed(form, 250, x, num_partition=4).to_dense().numpy()
    reduced = form(250, 4)
    reduced.inverse_diagonal()  # a result that must not outlive the reduction
    for target, *sources in zip(reduced.tensors(), *(part.tensors() for part in parts), strict=True):
        target.copy_(torch.stack(sources).sum(0))  # what an all-reduce leaves on each rank
    assert reduced.tokens == 400 and reduced.levels > 2
    assert relative(reduced.to_dense(), whole) < 1e-5


@each
def test_saved_sums_continue_where_they_were(form: Form) -> None:
    x = data(250, 300, seed=6)
    matrix = fed(form, 250, x[:200], num_partition=5)
    saved = [tensor.clone() for tensor in matrix.tensors()]
    matrix.update(x[200:])
    loaded = form(250, 5)
    loaded.inverse_diagonal()  # a result that must not outlive the loading
    for target, source in zip(loaded.tensors(), saved, strict=True):
        target.copy_(source)
    loaded.update(x[200:])
    assert torch.equal(loaded.to_dense(), matrix.to_dense()) and loaded.tokens == 300


@each
def test_the_seed_decides_and_nothing_else(form: Form) -> None:
    x = data(250, 100, seed=7, decay=0.2)
    first = fed(form, 250, x, seed=3).to_dense()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(fed(form, 250, x, seed=3).to_dense(), first)
    assert torch.equal(torch.get_rng_state(), state)  # and the caller's random numbers are not used up
    assert not torch.equal(fed(form, 250, x, seed=4).to_dense(), first)


@each
def test_updating_after_an_inverse_changes_it(form: Form) -> None:
    x = data(100, 400, seed=8)
    matrix = fed(form, 100, x[:50])
    early = matrix.inverse_diagonal()
    early += 1  # the caller's own
    assert torch.equal(matrix.inverse_diagonal() + 1, early)
    matrix.update(x[50:])
    assert relative(matrix.to_dense(), fed(form, 100, x).to_dense().numpy()) < 1e-5
    check_inverse(matrix, 1e-3)


# -- what comes in ----------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_floating_dtype(form: Form, dtype: torch.dtype) -> None:
    x = data(60, 200, seed=9).to(dtype)
    assert relative(fed(form, 60, x, rank=60).to_dense(), moment(x)) < 1e-6
    assert torch.equal(fed(form, 60, x).to_dense(), fed(form, 60, x.float()).to_dense())


@each
def test_any_leading_shape_and_stride(form: Form) -> None:
    x = data(61, 120, seed=10)
    expected = fed(form, 61, x).to_dense()
    for given_ in (x.view(4, 5, 6, 61), x.t().contiguous().t(), x.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(fed(form, 61, given_).to_dense(), expected)
    one = fed(form, 61, x[0])
    assert one.tokens == 1
    assert relative(one.to_dense(), fed(form, 61, x[:1]).to_dense().numpy()) < 1e-6


@each
def test_activations_that_carry_a_graph_leave_none_behind(form: Form) -> None:
    x = data(61, 20, seed=10).requires_grad_()
    matrix = fed(form, 61, x * 1)
    assert not any(tensor.requires_grad for tensor in matrix.tensors())
    assert not matrix.matmul(x.t()).requires_grad and not matrix.inverse_diagonal().requires_grad


@each
def test_autocast_does_not_reach_the_sums(form: Form) -> None:
    x = data(250, 100, seed=11)
    expected = fed(form, 250, x)
    v = torch.randn(250, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fed(form, 250, x)
        product = inside.matmul(v)
    assert torch.equal(inside.to_dense(), expected.to_dense())
    assert torch.equal(product, expected.matmul(v))


@each
@pytest.mark.parametrize("n", [1, 7, 64, 200])
@pytest.mark.parametrize("num_partition", [0, 4])
@pytest.mark.parametrize("value", [0.0, 1.0, -3e3, 1e-9])
def test_zero_and_constant_inputs_stay_finite(form: Form, n: int, num_partition: int, value: float) -> None:
    matrix = fed(form, n, torch.full((50, n), value), num_partition=num_partition)
    np.testing.assert_allclose(matrix.to_dense(), np.full((n, n), value**2), rtol=1e-5 if form is Hodlr else 1e-4)
    unit = value**2 or 1.0
    for damping in (1e-1, 1e-3):
        if form is Hodlr:
            check_inverse(matrix, damping)
        exact = (1 - value**2 / (n * value**2 + damping * unit)) / damping / unit
        np.testing.assert_allclose(matrix.inverse_diagonal(damping), exact, rtol=1e-2)
        assert matrix.effective_damping == damping  # rank 1: nothing is cut off
    matrix.update(data(n, 50, seed=0))
    check_inverse(matrix, 1e-3)


@each
def test_without_tokens_the_matrix_is_zero(form: Form) -> None:
    matrix = form(40)
    matrix.update(torch.zeros(0, 40))
    matrix.update(torch.zeros(3, 0, 40))
    assert matrix.tokens == 0 and not matrix.to_dense().any() and not matrix.matmul(torch.ones(40, 2)).any()
    assert not matrix.quadratic(torch.ones(40, 2)).any()
    np.testing.assert_allclose(matrix.inverse_diagonal(1e-2), 100.0)


@each
@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e12])
def test_the_units_of_the_data_do_not_matter(form: Form, scale: float) -> None:
    x = data(200, 300, seed=12)
    plain, scaled = fed(form, 200, x), fed(form, 200, x * scale)
    wanted = plain.inverse_diagonal()
    np.testing.assert_allclose(scaled.inverse_diagonal() * scale**2, wanted, rtol=1e-4 if form is Hodlr else 1e-3)
    v = data(7, 200, seed=13)
    tiny = scaled.quadratic(v * 1e-25) / 1e-50 / scale**2  # squares far below float32's range
    np.testing.assert_allclose(tiny, plain.quadratic(v), rtol=1e-3, atol=1e-6 * float(plain.quadratic(v).max()))


@each
def test_single_vectors(form: Form) -> None:
    matrix = fed(form, 30, data(30, 40, seed=14))
    v = torch.randn(30)
    assert torch.equal(matrix.matmul(v), matrix.matmul(v[:, None])[:, 0])
    assert matrix.matmul(v.bfloat16()).dtype == torch.float32


@each
def test_wrong_input_is_refused(form: Form) -> None:
    matrix, name = form(10), form.__name__
    for wrong in (torch.zeros(4, 11), torch.zeros(10, 4), torch.zeros(())):
        with pytest.raises(ValueError, match=rf"{name}.update: x has shape .*expected \(\.\.\., 10\)"):
            matrix.update(wrong)
    for method in (matrix.matmul, matrix.quadratic):
        with pytest.raises(ValueError, match=f"{name}.*expected"):
            method(torch.zeros(9, 10))
    for arguments in ({"n": 0}, {"n": 10, "rank": 0}, {"n": 10, "num_partition": -1}, {"n": 10, "rank": 1.5}):
        with pytest.raises(UserError, match=f"{name}: .*whole number"):
            form(**arguments)
    for damping in (-1e-3, float("nan"), float("inf"), *([0.0] if form is Multilevel else [])):
        with pytest.raises(UserError, match="damping"):
            matrix.inverse_diagonal(damping)


@each
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25])
def test_data_that_is_not_finite_is_reported(form: Form, value: float) -> None:
    x = data(200, 30, seed=15)
    x[3, 150] = value
    with pytest.raises(RunError, match="not finite"):
        fed(form, 200, x).inverse_diagonal()


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_can_be_multiplied_as_they_are(form: Form, dtype: torch.dtype) -> None:
    """As on CUDA, where their products come in float32: what `update` otherwise casts first."""
    n = 1001 if form is Hodlr else 333
    x = torch.randn(70, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    cast, direct = form(n), form(n)
    if form is Hodlr:  # so large that its blocks are sketched
        assert direct._test is not None and torch.equal(direct._test.to(dtype).float(), direct._test)
    cast.update(x)
    direct._add(direct._summed.spread(x, 1).contiguous())
    assert direct.levels > 3
    for one, other in zip(direct.tensors()[1:], cast.tensors()[1:], strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@each
def test_the_number_of_threads_is_the_callers_again(form: Form) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fed(form, 100, data(100, 50, seed=0)).inverse_diagonal()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

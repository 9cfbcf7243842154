"""The gradients of blocks of several weights in one product, against the dense ones: in plain torch, and by the kernel
in Triton's interpreter or on a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from support.blocks import DEVICE, block_parts, dense_gradient, operands, some_blocks

pytest.importorskip("triton", reason="needs triton, which Linux has")
from sparseft.kernels import block_group, blocks_triton, group_triton
from sparseft.kernels.block_group import BlockGroup, joint_tokens

SHAPES = [(37, 53), (48, 32), (5, 70)]

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not blocks_triton.INTERPRETED, reason="triton was imported without its interpreter"
)


@pytest.fixture(params=["triton", "reference"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SPARSEFT_KERNELS", request.param)
    return request.param


def group_of(shapes: Sequence[tuple[int, int]], size: int) -> tuple[BlockGroup, list[Tensor]]:
    indices = [some_blocks(shape, size, seed=number) for number, shape in enumerate(shapes)]
    return BlockGroup([tuple(index.to(DEVICE).unbind(1)) for index in indices], size), indices


def check(found: Sequence[Tensor], grads: Sequence[Tensor], xs: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    for gradient, grad, x, index in zip(found, grads, xs, indices, strict=True):
        size = gradient.shape[1]
        expected = block_parts(dense_gradient(grad.flatten(0, -2), x.flatten(0, -2)), index, size)
        scale = expected.abs().max().item() or 1.0
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5 * scale)
        ones = block_parts(torch.ones(grad.shape[-1], x.shape[-1]), index, size).to(gradient.device)
        assert not gradient[ones == 0].any()


@pytest.mark.parametrize(
    ("size", "tokens", "dtype"),
    [
        (16, 0, torch.float32), (16, 33, torch.float16), (16, 33, torch.bfloat16), (16, 65, torch.float32),
        (12, 1, torch.float32), (5, 7, torch.bfloat16),
    ],
)  # fmt: skip
def test_weights_of_different_shapes(size: int, tokens: int, dtype: torch.dtype) -> None:
    group, indices = group_of(SHAPES, size)
    grads, xs = zip(*(operands(tokens, shape, dtype) for shape in SHAPES), strict=True)
    found = group.gradients(grads, xs)
    check(found, grads, xs, indices)
    assert len({gradient.untyped_storage().data_ptr() for gradient in found}) == 1  # one product
    for again, gradient in zip(group.gradients(grads, xs), found, strict=True):
        assert torch.equal(again, gradient)


def test_operands_that_move_and_change_their_strides(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aligned or not, in three dimensions, expanded, slices of x; the table follows."""
    made: list[Any] = []
    real = group_triton.is_aligned
    monkeypatch.setattr(group_triton, "is_aligned", lambda *given: made.append(real(*given)) or made[-1])
    shapes = [(32, 16), (16, 32)]
    group, indices = group_of(shapes, 16)
    plain = [operands(30, shape) for shape in shapes]
    for form in (
        lambda t: t,
        lambda t: t.clone(),
        lambda t: t.view(5, 6, -1),
        lambda t: t.view(5, 6, -1).transpose(0, 1),  # tokens in another order, which needs a copy
        lambda t: t.t().contiguous().t(),
        lambda t: F.pad(t, (3, 2))[:, 3:-2],
        lambda t: t[:1].expand(30, -1),
    ):
        grads, xs = [form(grad) for grad, _ in plain], [form(x) for _, x in plain]
        check(group.gradients(grads, xs), grads, xs, indices)
    assert {True, False} == set(made) if way == "triton" else not made


def test_what_cannot_be_one_product_is_several() -> None:
    group, indices = group_of(SHAPES[:2], 16)
    grads, xs = zip(operands(5, SHAPES[0]), operands(8, SHAPES[1]), strict=True)
    check(group.gradients(grads, xs), grads, xs, indices)


def test_float64_stays_out_of_the_kernel() -> None:
    group, indices = group_of(SHAPES, 16)
    grads, xs = zip(*(operands(9, shape, torch.float64) for shape in SHAPES), strict=True)
    check(group.gradients(grads, xs), grads, xs, indices)


def test_where_waiting_pays() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert joint_tokens(64, cuda) == blocks_triton.SPLIT_FROM == block_group.JOINT_TOKENS
    assert joint_tokens(64, cpu) == 16 and joint_tokens(4, cpu) == 256
    assert joint_tokens(5, cuda) == 0  # gradients would not begin at multiples of 16 bytes

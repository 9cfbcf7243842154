"""Blocks of a weight, what a product gets, and the dense gradient that blocks of one are compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def some_blocks(shape: tuple[int, int], size: int, share: float = 0.4, seed: int = 0) -> Tensor:
    """A share of a weight's blocks (n, 2), unsorted, the last (an edge block where there is one) among them."""
    down, across = -(-shape[0] // size), -(-shape[1] // size)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(down * across - 1, generator=generator)[: round(share * down * across)]
    order = torch.cat([torch.tensor([down * across - 1]), order])
    return torch.stack([order // across, order % across], dim=1)


def block_parts(dense: Tensor, index: Tensor, size: int) -> Tensor:
    """The blocks of a dense (out, in) matrix by plain slicing, zero outside of it."""
    parts = dense.new_zeros(len(index), size, size)
    for block, (row, column) in enumerate(index.tolist()):
        part = dense[row * size : (row + 1) * size, column * size : (column + 1) * size]
        parts[block, : part.shape[0], : part.shape[1]] = part
    return parts


def dense_gradient(grad_output: Tensor, x: Tensor) -> Tensor:
    """What autograd gives a dense weight of `F.linear` in float64."""
    weight = torch.zeros(grad_output.shape[1], x.shape[1], dtype=torch.float64, device=x.device, requires_grad=True)
    F.linear(x.double(), weight).backward(grad_output.double())
    assert weight.grad is not None
    return weight.grad


def operands(tokens: int, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(tokens)
    return tuple(torch.randn(tokens, features, device=DEVICE).to(dtype) for features in shape)

"""Sylva's importance from the mean gradient and the second moments of a linear layer's inputs and output gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseft.errors import RunError, UserError
from sparseft.importance.hodlr import Hodlr


def entry_importance(
    mean_gradient: Tensor,  # (out, in)
    A: Hodlr,  # mean a aᵀ of the inputs, (in, in)
    G: Hodlr,  # mean g gᵀ of the output gradients, (out, out)
    damping: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """O (out,) and I (in,), float64 on the statistics' device; the score of entry (o, i) is their product O_o · I_i.

        O_o = Ḡ_{o,:} A Ḡ_{o,:}ᵀ / [G⁻¹]_oo,    I_i = Ḡ_{:,i}ᵀ G Ḡ_{:,i} / [A⁻¹]_ii

    Both are sizes of a squared quantity, so never negative: where truncation has left A or G indefinite and a
    numerator falls below zero, it counts as zero (two negative factors would otherwise make a high score).
    ValueError where the shapes do not fit, RunError where the mean gradient is not finite.
    """
    if mean_gradient.shape != (G.n, A.n):
        raise ValueError(f"mean_gradient has shape {tuple(mean_gradient.shape)}; expected (out, in) = ({G.n}, {A.n}).")
    output = A.quadratic(mean_gradient.t()).clamp_min(0) / G.inverse_diagonal(damping)
    input = G.quadratic(mean_gradient).clamp_min(0) / A.inverse_diagonal(damping)
    if not (torch.isfinite(output).all() and torch.isfinite(input).all()):
        raise RunError("the second-order importance is not finite: the mean gradient holds inf or NaN.")
    return output, input


def block_scores(
    O: Tensor,  # (out,)  # noqa: E741
    I: Tensor,  # (in,)  # noqa: E741
    block_size: int,
) -> Tensor:
    """Σ O_o · I_i over each B×B block -> (ceil(out / B), ceil(in / B)), edge blocks included."""
    if block_size < 1:
        raise UserError(f"block_size is {block_size}; expected at least 1.")

    def summed(side: Tensor) -> Tensor:
        return F.pad(side, (0, -len(side) % block_size)).view(-1, block_size).sum(1)

    return torch.outer(summed(O), summed(I))

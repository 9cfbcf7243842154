"""Sylva's importance from the mean gradient and the second moments of a linear layer's inputs and output gradients
(doi 10.1145/3650200.3656619)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseft.errors import RunError, UserError
from sparseft.importance.hodlr import Hodlr
from sparseft.importance.units import Unitised, sum_features


@dataclass(frozen=True)
class SecondOrder:
    """How the second moments are kept: `Hodlr`'s levels and rank, and the damping of their inverses."""

    num_partition: int = 8
    rank: int = 1
    damping: float = 1e-3


class SecondOrderStatistics:
    """An observer of `statistics.observe`: per linear, A of its inputs, G of its output gradients, and Σ of its
    per-sample gradients. Modules with the same input share one A. The gradients' sums lie in host memory, in fp32.
    """

    def __init__(self, settings: SecondOrder, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.inputs: dict[str, Hodlr] = {}  # by source
        self.gradients: dict[str, Hodlr] = {}  # by module
        self.sources: dict[str, str] = {}
        self.sums: dict[str, Tensor] = {}  # (out, in)
        self.samples: dict[str, int] = {}

    def __call__(self, name: str, x: Tensor, y: Tensor, grad: Tensor | None, source: str) -> None:
        assert grad is not None
        if name not in self.sources:
            self.sources[name] = source
            if source not in self.inputs:
                self.inputs[source] = self._matrix(x.shape[1], x.device, f"{source} A")
            self.gradients[name] = self._matrix(grad.shape[1], x.device, f"{name} G")
            self.sums[name] = torch.zeros(grad.shape[1], x.shape[1])
            self.samples[name] = 0
        if name == self.sources[name]:
            self.inputs[name].update(x)
        self.gradients[name].update(grad)
        self.sums[name] += (grad.float().t() @ x.float()).cpu()
        self.samples[name] += 1

    def _matrix(self, n: int, device: torch.device, name: str) -> Hodlr:
        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:4], "little")
        return Hodlr(n, self.settings.num_partition, self.settings.rank, device=device, seed=seed)

    def unit_scores(self, name: str, candidates: Sequence[Unitised]) -> dict[str, Tensor]:
        """Σ O_o · I_i over each unit of one module's candidates, float64 on the CPU, by candidate key."""
        if name not in self.sources:  # a module that no gradient reached
            return {c.key: torch.zeros(c.count, dtype=torch.float64) for c in candidates}
        A, G = self.inputs[self.sources[name]], self.gradients[name]
        mean = (self.sums[name] / self.samples[name]).to(A.device)
        output, input = (side.cpu() for side in entry_importance(mean, A, G, self.settings.damping))
        scores = {}
        for c in candidates:
            if c.kind == "blocks":
                scores[c.key] = block_scores(output, input, c.unit).reshape(-1)
            elif c.kind == "rows":
                scores[c.key] = sum_features(output, c) * input.sum()
            else:
                scores[c.key] = sum_features(input, c) * output.sum()
        return scores


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

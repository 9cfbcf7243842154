"""Units by their scores: the best first."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseft.errors import RunError


def rank_units(scores: Tensor, order: str, generator: torch.Generator) -> Tensor:
    """All units, the best first: ties broken by index; `sampled` draws without replacement, in proportion."""
    scores = scores.detach().double().cpu()
    if not torch.isfinite(scores).all():
        raise RunError("an importance score is not finite: the model's weights or activations overflow.")
    if order == "largest":
        return torch.argsort(scores, descending=True, stable=True)
    if order == "smallest":
        return torch.argsort(scores, stable=True)
    # Gumbel top-k: log(score) + noise ranks as successive draws in proportion to the score do.
    uniform = torch.rand(len(scores), generator=generator, dtype=torch.float64).clamp_min(1e-300)
    noise = -torch.log(-torch.log(uniform))
    # Scores of 0 come last, in random order: by index, re-selection would draw the same ones each time.
    keys = torch.where(scores > 0, torch.log(scores), -1e6) + noise
    return torch.argsort(keys, descending=True, stable=True)

"""The loss's gradient by what a model's decoder gives, in chunks of tokens: with a vocabulary of a hundred thousand the
logits of a few samples would take more memory than all else."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseft.models.head import cross_entropy, head_of, tokens_at_once


def loss_gradient(
    model: nn.Module,
    hidden: Tensor,  # what the decoder gave (samples, tokens, features)
    labels: Tensor,  # (samples, tokens); -100: not counted
) -> Tensor:
    """The gradient by `hidden` of the sum over samples of the mean cross-entropy of their labelled tokens, each
    predicted by those before it. Of tokens that predict no label no logits are computed."""
    targets = labels[:, 1:]
    labelled = targets != -100
    shares = (labelled / labelled.sum(1, keepdim=True).clamp_min(1))[labelled]  # float32
    rows = F.pad(labelled, (0, 1)).reshape(-1).nonzero().squeeze(1)
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    gradient = torch.zeros_like(flat)
    step = tokens_at_once(model, flat.device)
    with head_of(model) as logits_of:
        for at, target, share in zip(rows.split(step), targets[labelled].split(step), shares.split(step), strict=True):
            gradient[at] = cross_entropy(logits_of, flat[at], target, share, step, by_x=True)[1]
    return gradient.view_as(hidden)

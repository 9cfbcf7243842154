"""Label smoothing of a model's own loss: of each target's probability a share goes to all tokens in equal parts.

The cross-entropy with smoothed labels exceeds the plain one by share × (the target's logit - the mean logit of the
token), whatever else the model adds to its loss. Held-out losses have no smoothing, so that they can be compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseft.models.decoder import language_model
from sparseft.models.labelled_loss import forward_of
from sparseft.models.labels import IGNORED


@contextlib.contextmanager
def smoothed_loss(model: nn.Module, smoothing: float) -> Iterator[None]:
    """Inside, the model (also wrapped) given labels in training returns its loss with smoothed labels.

    smoothing: the share, 0 to below 1."""
    inner = language_model(model)
    own = inner.forward

    def forward(*args: Any, **given: Any) -> Any:
        output = own(*args, **given)
        labels = given.get("labels")
        if labels is not None and inner.training:
            output.loss = output.loss + smoothing * _excess(output.logits, labels, given.get("num_items_in_batch"))
        return output

    with forward_of(inner, forward):
        yield


def _excess(logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
    """The labelled tokens' logits less the mean logits of their places, summed ÷ items (None: the labelled tokens)."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).to(logits.device)
    counted = targets != IGNORED  # a mask, as a list of places would wait for the device
    of_target = logits.gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1).to(torch.float32)
    excess = (of_target - logits.mean(-1, dtype=torch.float32)) * counted
    return excess.sum() / (counted.sum() if items is None else items)

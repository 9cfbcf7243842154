"""The loss on examples that were held out, in batches, as a run's evaluation has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from sparseft.data.packing import Collator
from sparseft.models.decoder import runnable
from sparseft.models.labelled_loss import fewest_logits
from sparseft.models.labels import IGNORED
from sparseft.models.masks import unasked
from sparseft.models.router_loss import router_loss


@torch.no_grad()
def batch_losses(
    model: nn.Module, rows: Any, pad: int, device: torch.device, batch_size: int = 8
) -> list[tuple[float, int]]:
    """Of each batch of examples the mean loss over its labelled tokens, and how many it has; those without are left
    out, as is what routers add to a loss. `rows`: a `TokenizedDataset`, or a list of what it gives."""
    collate, found = Collator(pad), []
    with runnable(model), router_loss(model, 0.0), fewest_logits(model):
        for start in range(0, len(rows), batch_size):
            batch = collate([rows[position] for position in range(start, min(start + batch_size, len(rows)))])
            batch = {name: value.to(device) for name, value in batch.items()}
            labelled = int((batch["labels"][:, 1:] != IGNORED).sum())
            if labelled:
                with unasked(batch):
                    found.append((float(model(**batch, use_cache=False).loss), labelled))
    return found


def mean_loss(losses: Sequence[tuple[float, int]]) -> float:
    """The mean over all labelled tokens of `batch_losses`."""
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def held_out_loss(model: nn.Module, rows: Any, pad: int, device: torch.device, batch_size: int = 8) -> float:
    """The mean loss over all labelled tokens of examples, those of similar lengths in one batch: padding is computed
    too."""
    lengths = [len(row["input_ids"]) for row in rows] if isinstance(rows, list) else rows.lengths.tolist()
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    return mean_loss(batch_losses(model, Subset(rows, order), pad, device, batch_size))

"""The loss on examples that were held out, in batches, as a run's evaluation has it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from sparseft.data.packing import Collator
from sparseft.models.decoder import runnable
from sparseft.models.labelled_loss import fewest_logits
from sparseft.models.labels import IGNORED
from sparseft.models.masks import unasked
from sparseft.models.router_loss import router_loss


@torch.no_grad()
def losses(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> list[tuple[float, int]]:
    """Of each batch the mean loss over its labelled tokens, and how many it has; those without are left out, as is what
    routers add to a loss. Each lies where the model does."""
    found = []
    with runnable(model), router_loss(model, 0.0):
        for batch in batches:
            with unasked(batch):
                loss = model(**batch, use_cache=False).loss
            if labelled := int((batch["labels"][:, 1:] != IGNORED).sum()):
                found.append((float(loss), labelled))
    return found


def batch_losses(
    model: nn.Module, rows: Any, pad: int, device: torch.device, batch_size: int = 8
) -> list[tuple[float, int]]:
    """`losses` of examples in batches. `rows`: a `TokenizedDataset`, or a list of what it gives."""

    def batches() -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(rows), batch_size):
            batch = collate([rows[position] for position in range(start, min(start + batch_size, len(rows)))])
            yield {name: value.to(device) for name, value in batch.items()}

    collate = Collator(pad)
    with fewest_logits(model):
        return losses(model, batches())


def mean_loss(losses: Sequence[tuple[float, int]]) -> float:
    """The mean over all labelled tokens of `batch_losses`."""
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def held_out_loss(model: nn.Module, rows: Any, pad: int, device: torch.device, batch_size: int = 8) -> float:
    """The mean loss over all labelled tokens of examples, those of similar lengths in one batch: padding is computed
    too."""
    lengths = [len(row["input_ids"]) for row in rows] if isinstance(rows, list) else rows.lengths.tolist()
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    return mean_loss(batch_losses(model, Subset(rows, order), pad, device, batch_size))

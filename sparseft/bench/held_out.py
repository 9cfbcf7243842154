"""The loss of a loaded model on held-out examples, as a run's own evaluation has it."""

from __future__ import annotations

from typing import Any

import torch

from sparseft.config import BUNDLED, RunConfig
from sparseft.data.loading import LoadedData, load_datasets
from sparseft.data.packing import Collator
from sparseft.models.decoder import runnable


def data_of(config: RunConfig, tokenizer: Any) -> LoadedData:
    """What a run trains on and is evaluated on."""
    return load_datasets(
        config.dataset, tokenizer, max_length=config.trainer.max_length, seed=config.seed,
        bundled=config.model.path.startswith(BUNDLED), cache_dir=config.cache_dir,
    )  # fmt: skip


def held_out(config: RunConfig, tokenizer: Any) -> Any:
    """A run's evaluation examples."""
    data = data_of(config, tokenizer)
    assert data.eval is not None
    return data.eval


@torch.no_grad()
def held_out_loss(model: Any, rows: Any, pad: int, device: torch.device, batch_size: int = 8) -> float:
    """The mean loss over all labelled tokens of examples, as a run's evaluation has it."""
    collate, total, count = Collator(pad), 0.0, 0
    with runnable(model):
        for start in range(0, len(rows), batch_size):
            batch = collate([rows[position] for position in range(start, min(start + batch_size, len(rows)))])
            batch = {name: value.to(device) for name, value in batch.items()}
            labelled = int((batch["labels"][:, 1:] != -100).sum())
            if labelled:
                total += float(model(**batch, use_cache=False).loss) * labelled
                count += labelled
    return total / count

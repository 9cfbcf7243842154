"""Samples to calibrate on."""

from __future__ import annotations

import torch
from torch import Tensor

LENGTHS = (9, 5, 12, 7, 2, 12)


def samples(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches of one; the first third of each is prompt."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(3, 96, (1, length), generator=generator)
        labels = ids.clone()
        labels[:, : length // 3] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made

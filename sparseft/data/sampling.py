"""Which examples are taken, and in which order: splits and samples by a seed, and the same number for each process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from sparseft import console
from sparseft.data.packing import Collator
from sparseft.data.tokenized import IGNORED, TokenizedDataset
from sparseft.distributed.ranks import rank_and_world
from sparseft.errors import UserError

CALIBRATION_SHARE = 0.01  # of the training data, as in the S2FT paper


def seeded_first(count: int, total: int, seed: int, purpose: str) -> list[int]:
    """The first `count` of a permutation of range(total) that depends on `seed` and `purpose` alone.

    By hash and not by a library's generator: splits and calibration samples stay the same across versions of Python,
    numpy and torch. Different purposes give unrelated orders under one seed.
    """

    def rank(index: int) -> bytes:
        return hashlib.blake2b(f"{purpose}:{seed}:{index}".encode(), digest_size=16).digest()

    with console.working("choosing examples"):
        ranks = np.fromiter(map(rank, range(total)), "S16", total)
        return np.argsort(ranks, kind="stable")[:count].tolist()


def calibration_count(num_samples: float | None, examples: int) -> int:
    """How many of `examples` calibrate: a whole number (all, if there are fewer), or a share of them below 1, at least
    one; None is 1 %, as in the S2FT paper."""
    if isinstance(num_samples, int):
        count = num_samples
    else:
        share = CALIBRATION_SHARE if num_samples is None else num_samples
        count = max(1, round(share * examples)) if 0.0 < share < 1.0 else 0
    if count < 1:
        raise UserError(f"method.num_samples must be at least 1, or a share between 0 and 1, not {num_samples}.")
    return min(count, examples)


def calibration_batches(
    dataset: TokenizedDataset, num_samples: float | None, seed: int, pad_token_id: int
) -> list[dict[str, Tensor]]:
    """`calibration_count` distinct examples, chosen and ordered by `seed`, one a batch.

    Each batch is what `Collator` gives for one example: int64 tensors of shape (1, length) without padding.
    """
    count = calibration_count(num_samples, len(dataset))
    collate = Collator(pad_token_id)
    return [collate([dataset[index]]) for index in seeded_first(count, len(dataset), seed, "calibration")]


class PaddedDataset(Dataset):
    """`dataset` lengthened by empty examples (one token without a label) to a multiple of `multiple`.

    Every process then gets as many batches as the others, no example counts twice, and the sums over labelled tokens
    are those of one process. Without `fillable` it is lengthened by its first examples: for a model that takes the mean
    of each micro-batch, which does not exist where no token has a label.
    """

    def __init__(self, dataset: Any, multiple: int, *, fillable: bool = True) -> None:
        self.dataset, self.fillable = dataset, fillable
        self.lengths = getattr(dataset, "lengths", None)  # without what it is lengthened by
        self.length = -(-len(dataset) // multiple) * multiple
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """accelerate's loader says the epoch before it iterates: to the data, as where a run goes on in the middle of
        an epoch the sampler lies too deep for it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < len(self.dataset):
            return self.dataset[index]
        if not self.fillable:
            return self.dataset[index % len(self.dataset)]
        return {"input_ids": [0], "labels": [IGNORED]}


class PaddedSampler(Sampler[int]):
    """The order that one process would take (accelerate's seeded sampler), then what the dataset was lengthened by."""

    def __init__(self, dataset: PaddedDataset, seed: int) -> None:
        from accelerate.data_loader import SeedableRandomSampler  # several processes alone need it

        self.dataset, self.order = dataset, SeedableRandomSampler(dataset.dataset, data_seed=seed)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        self.order.set_epoch(self.dataset.epoch)
        yield from self.order
        yield from range(len(self.dataset.dataset), len(self.dataset))


def pad_to_world(dataset: Any, batch_size: int, *, fillable: bool = True) -> Any:
    """The dataset with as many batches for each of several processes; with one process as it is."""
    world = rank_and_world()[1]
    return dataset if world == 1 or dataset is None else PaddedDataset(dataset, batch_size * world, fillable=fillable)

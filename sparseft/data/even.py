"""As many examples for each process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Dataset, Sampler

from sparseft.distributed.ranks import rank_and_world


class EvenDataset(Dataset):
    """`dataset` lengthened by empty examples (one token without a label) to a multiple of `multiple`.

    So every process gets as many batches as the others, no example counts twice, and the sums over labelled tokens are
    those of one process. Without `fillable` (a model that takes the mean of each micro-batch, where none labelled has
    none) it is lengthened by its first examples.
    """

    def __init__(self, dataset: Any, multiple: int, *, fillable: bool = True) -> None:
        self.dataset, self.fillable = dataset, fillable
        self.length = -(-len(dataset) // multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < len(self.dataset):
            return self.dataset[index]
        if not self.fillable:
            return self.dataset[index % len(self.dataset)]
        return {"input_ids": [0], "labels": [-100]}


class EvenSampler(Sampler[int]):
    """The order of one process (that of accelerate's seeded sampler), then what the dataset was lengthened by."""

    def __init__(self, dataset: EvenDataset, seed: int) -> None:
        from accelerate.data_loader import SeedableRandomSampler

        self.dataset, self.order = dataset, SeedableRandomSampler(dataset.dataset, data_seed=seed)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        yield from self.order
        yield from range(len(self.dataset.dataset), len(self.dataset))

    def set_epoch(self, epoch: int) -> None:
        """accelerate's loader says the epoch before it iterates."""
        self.order.set_epoch(epoch)


def even(dataset: Any, batch_size: int, *, fillable: bool = True) -> Any:
    """The dataset as several processes share it; of one process as it is."""
    world = rank_and_world()[1]
    return dataset if world == 1 or dataset is None else EvenDataset(dataset, batch_size * world, fillable=fillable)

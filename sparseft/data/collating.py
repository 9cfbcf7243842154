"""Examples to padded tensors, and the seeded orders by which examples are chosen."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparseft.errors import UserError

CALIBRATION_SHARE = 0.01  # of the training data, as in the S2FT paper

if TYPE_CHECKING:
    from torch import Tensor

    from sparseft.data.tokenized import TokenizedDataset


def padding_id(tokenizer: Any, rows: int | None = None) -> int:
    """The id to pad with: the tokenizer's pad token, else its EOS, else 0. Padding is masked, so any id serves that the
    model can read: with `rows`, those of its embeddings, a pad token added without a row is passed over."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and (rows is None or 0 <= token < rows):
            return int(token)
    return 0


class Collator:
    """Pads examples on the right into one batch.

    Returns int64 tensors of shape (batch, length): `input_ids` padded with `pad_token_id`, `attention_mask` 1 on
    tokens and 0 on padding, `labels` -100 on padding. The mask and the labels come from the lengths, never from
    comparing ids: where EOS pads, the real EOS keeps its label. `length` is the longest example's, rounded up to a
    multiple of `pad_to_multiple_of`. Without a pad token the ids are padded with `eos_token_id`, else with 0.

    Packed rows (`packing.py`) bring `position_ids`, which take the place of `attention_mask`: a mask would keep
    transformers from reading the borders of examples off the positions. Padding has position 0 throughout, which makes
    every padding token an example of its own.
    """

    def __init__(
        self, pad_token_id: int | None, pad_to_multiple_of: int | None = None, *, eos_token_id: int | None = None
    ) -> None:
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be at least 1, not {pad_to_multiple_of}")
        choices = [token for token in (pad_token_id, eos_token_id) if token is not None]
        self.pad_token_id = choices[0] if choices else 0
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: Sequence[dict[str, Sequence[int]]]) -> dict[str, Tensor]:
        import torch

        length = max(len(example["input_ids"]) for example in examples)
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(examples), length)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        packed = "position_ids" in examples[0]
        positions = torch.zeros(shape, dtype=torch.long)  # packed: of each token; else 1 for a token
        labels = torch.full(shape, -100, dtype=torch.long)
        for row, example in enumerate(examples):
            count = len(example["input_ids"])
            input_ids[row, :count] = torch.tensor(example["input_ids"], dtype=torch.long)
            positions[row, :count] = torch.tensor(example["position_ids"], dtype=torch.long) if packed else 1
            labels[row, :count] = torch.tensor(example["labels"], dtype=torch.long)
        return {"input_ids": input_ids, "position_ids" if packed else "attention_mask": positions, "labels": labels}


def seeded_order(count: int, seed: int, purpose: str) -> list[int]:
    """A permutation of range(count) that depends on `seed` and `purpose` alone.

    By hash and not by a library's generator: splits and calibration samples stay the same across versions of Python,
    numpy and torch. Different purposes give unrelated orders under one seed.
    """

    return seeded_first(count, count, seed, purpose)


def seeded_first(count: int, total: int, seed: int, purpose: str) -> list[int]:
    """The first `count` of `seeded_order(total, …)`, in memory for so many."""

    def rank(index: int) -> bytes:
        return hashlib.blake2b(f"{purpose}:{seed}:{index}".encode(), digest_size=16).digest()

    return heapq.nsmallest(count, range(total), key=rank)  # sorts where all are wanted


def calibration_count(num_samples: float | None, examples: int) -> int:
    """How many of `examples` calibrate: a whole number (all, if there are fewer), or a share of them below 1, at least
    one; null is 1 %, as in the S2FT paper."""
    if isinstance(num_samples, int):
        count = num_samples
    else:
        share = CALIBRATION_SHARE if num_samples is None else num_samples
        count = max(1, round(share * examples)) if 0.0 < share < 1.0 else 0
    if count < 1:
        raise UserError(f"method.num_samples must be at least 1, or a share between 0 and 1, not {num_samples}.")
    return min(count, examples)


def calibration_batches(
    dataset: TokenizedDataset, num_samples: float | None, seed: int, pad_token_id: int | None
) -> list[dict[str, Tensor]]:
    """`calibration_count` distinct examples, chosen and ordered by `seed`, one a batch.

    Each batch is what `Collator` gives for one example: int64 tensors of shape (1, length) without padding.
    """
    count = calibration_count(num_samples, len(dataset))
    collate = Collator(pad_token_id)
    return [collate([dataset[index]]) for index in seeded_first(count, len(dataset), seed, "calibration")]

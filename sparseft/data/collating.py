"""Examples to one batch of padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparseft.data.tokenized import IGNORED


def padding_id(tokenizer: Any, rows: int | None = None) -> int:
    """The id to pad with: the tokenizer's pad token, else its EOS, else 0. Padding is masked, so any id that the model
    can read will do: with `rows`, the rows of its embeddings, a pad token without a row is passed over."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and (rows is None or 0 <= token < rows):
            return int(token)
    return 0


class Collator:
    """Pads examples on the right into one batch.

    Returns int64 tensors of shape (batch, length): `input_ids` padded with `pad_token_id`, `attention_mask` 1 on
    tokens and 0 on padding, `labels` -100 on padding. The mask and the labels come from the lengths, never from
    comparing ids: where EOS pads, the real EOS keeps its label. `length` is the longest example's.

    Packed rows (`packing.py`) bring `position_ids`, which take the place of `attention_mask`: with a mask, transformers
    would not read the borders of examples off the positions. Padding has position 0 throughout, which makes every
    padding token an example of its own.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[dict[str, Sequence[int]]]) -> dict[str, Tensor]:
        shape = (len(examples), max(len(example["input_ids"]) for example in examples))
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        packed = "position_ids" in examples[0]
        positions = torch.zeros(shape, dtype=torch.long)  # packed: of each token; else 1 for a token
        labels = torch.full(shape, IGNORED, dtype=torch.long)
        for row, example in enumerate(examples):
            count = len(example["input_ids"])
            input_ids[row, :count] = torch.tensor(example["input_ids"], dtype=torch.long)
            positions[row, :count] = torch.tensor(example["position_ids"], dtype=torch.long) if packed else 1
            labels[row, :count] = torch.tensor(example["labels"], dtype=torch.long)
        return {"input_ids": input_ids, "position_ids" if packed else "attention_mask": positions, "labels": labels}

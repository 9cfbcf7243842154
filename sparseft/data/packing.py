"""Rows and batches: several examples in one row of at most `max_length` tokens, rows as one batch of padded tensors.

In a packed row each example is as if it stood alone. Such a row goes to the model without an attention mask and with
positions that start at 0 at every example; transformers then masks attention block by block. Not every architecture
does (ALiBi, recurrent states, masks of their own), so `check_packing` tries it on the model at hand before anything is
trained.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparseft import console
from sparseft.data.tokenized import IGNORED, TokenizedDataset
from sparseft.errors import UserError
from sparseft.models import probing

WORD = 512  # bits, of the two levels in which rows are found by their room


class PackedDataset:
    """Rows of whole examples: a map-style data set like the `TokenizedDataset` that it is made of.

    `packed[i]` is `{"input_ids", "labels", "position_ids"}`, lists of one length, at most `max_length`; the first token
    of each example has no label. Examples are laid by best fit, the longest first: each into the fullest row that still
    has room for it. Which example goes where depends on the lengths alone.
    """

    def __init__(self, dataset: TokenizedDataset, max_length: int) -> None:
        self.dataset, self.max_length = dataset, max_length
        row_of, rows = best_fit(dataset.lengths, max_length)
        self._order = np.argsort(row_of, kind="stable")
        self._edges = np.searchsorted(row_of[self._order], np.arange(rows + 1))

    def __len__(self) -> int:
        return len(self._edges) - 1

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        position = operator.index(index)
        if position < 0:
            position += len(self)
        if not 0 <= position < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        for member in self.members(position):
            example = self.dataset[member]
            row["input_ids"] += example["input_ids"]
            row["labels"] += example["labels"]
            row["position_ids"] += range(len(example["input_ids"]))
        return row

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self[index] for index in range(len(self)))

    def members(self, row: int) -> list[int]:
        """The examples of a row."""
        return self._order[self._edges[row] : self._edges[row + 1]].tolist()

    @property
    def lengths(self) -> np.ndarray:
        """int64 (rows,): tokens of each row."""
        total = np.concatenate([[0], np.cumsum(self.dataset.lengths[self._order])])
        return np.diff(total[self._edges])

    def note(self, batch_size: int, accumulation: int) -> str:
        """What packing does to a training of `batch_size` rows × `accumulation` a step."""
        examples, rows = len(self.dataset), len(self)
        lengths = self.lengths
        before, after = (padding_share(each, batch_size) for each in (self.dataset.lengths, lengths))
        return (
            f"packing: {examples:,} examples in {rows:,} rows of at most {self.max_length} tokens, "
            f"{lengths.sum() / (rows * self.max_length):.1%} full; a step of {batch_size} x {accumulation} rows takes "
            f"{batch_size * accumulation * examples / rows:.1f} examples on average; padding {after:.1%} of a batch "
            f"instead of {before:.1%}"
        )


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """The row of each example, int64 (examples,), and the number of rows; no length is over `capacity`."""
    with console.working("packing"):
        return _best_fit(lengths, capacity)


def _best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    assert len(lengths) == 0 or lengths.max() <= capacity
    row_of = np.empty(len(lengths), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room that is left
    there = [0] * (capacity // WORD + 1)  # bit b of word w: some row has room w * WORD + b
    words = 0  # bit w: word w has a bit; one number of `capacity` bits would be copied for every example
    rows = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        word, bit = divmod(length, WORD)
        fitting = there[word] >> bit << bit
        if not fitting and (above := words >> (word + 1)):
            word += 1 + _lowest(above)
            fitting = there[word]
        if fitting:
            room = word * WORD + _lowest(fitting)
            row = open_rows[room].pop()
            if not open_rows[room]:
                there[word] &= ~(1 << room % WORD)
                words &= ~((not there[word]) << word)
        else:
            room, row = capacity, rows
            rows += 1
        row_of[index] = row
        left = room - length
        open_rows[left].append(row)
        there[left // WORD] |= 1 << left % WORD
        words |= 1 << left // WORD
    return row_of, rows


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def padding_share(lengths: np.ndarray, batch_size: int) -> float:
    """The share of padding in batches of `batch_size` drawn in a random order, each padded to its longest."""
    drawn = np.random.default_rng(0).permutation(lengths)
    whole = len(drawn) // batch_size * batch_size
    rest = drawn[whole:]
    filled = int(drawn[:whole].reshape(-1, batch_size).max(1).sum()) * batch_size
    filled += int(rest.max(initial=0)) * len(rest)
    return 1 - int(lengths.sum()) / filled if filled else 0.0


def check_packing(model: nn.Module, batch_size: int) -> None:
    """Refuses a model that would let an example of a packed row see another one.

    Two random examples in a row: the second one's logits must not depend on the first (the gradient is exactly zero
    where attention is masked) and must be those that it has alone. Weights and modes are left as they were.
    """
    rows, border, length = min(batch_size, 2), 7, 16
    ids = probing.plain_tokens(model, rows, length)
    positions = torch.cat([torch.arange(border), torch.arange(length - border)]).to(ids.device).expand(rows, -1)
    second = (slice(None), slice(border, None))
    try:
        with probing.undisturbed(model):
            logits, strength = probing.dependence(model, ids, second, position_ids=positions)
            with torch.no_grad():
                alone = probing.run(model, ids[second], position_ids=positions[second]).float()
    except TypeError as error:  # a forward without position_ids
        raise _refusal(model, f"its forward pass cannot be given positions ({error})") from error
    except probing.Untraceable as error:
        raise _refusal(model, "how its logits depend on its tokens cannot be seen") from error
    if strength[:, :border].max() != 0.0:
        flash = "flash" in str(getattr(model.config, "_attn_implementation", "")) and rows > 1
        hint = "; with this attention use trainer.batch_size=1" if flash else ""
        raise _refusal(model, f"its attention reaches across the examples of a row{hint}")
    single = next(model.parameters()).dtype in (torch.float32, torch.float64)
    if not (logits - alone).abs().max() <= (1e-3 if single else 5e-2) * alone.abs().max():
        raise _refusal(model, "an example in a row gets other logits than alone")


def _refusal(model: nn.Module, why: str) -> UserError:
    name = type(model).__name__
    return UserError(f"dataset.packing=true: {name} cannot be packed: {why}. Use dataset.packing=false.")


def padding_id(tokenizer: Any, rows: int | None = None) -> int:
    """The id to pad with: the tokenizer's pad token, else its EOS, else 0. Padding is masked, so any id that the model
    can read will do: with `rows`, the rows of its embeddings, a pad token without a row is passed over."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and (rows is None or 0 <= token < rows):
            return int(token)
    return 0


class Collator:
    """Pads examples on the right into one batch.

    Returns int64 tensors of shape (batch, length): `input_ids` padded with `pad_token_id`, `labels` -100 on padding
    and, where there is padding, `attention_mask`, 1 on tokens and 0 on padding. The mask and the labels come from the
    lengths, never from comparing ids: where EOS pads, the real EOS keeps its label. `length` is the longest example's,
    or `pad_to` where that is more.

    Rows that hold several examples bring `position_ids`, which take the place of `attention_mask`: with a mask,
    transformers would not read the borders of examples off the positions. Padding has position 0 throughout, which
    makes every padding token an example of its own.
    """

    def __init__(self, pad_token_id: int, pad_to: int = 0) -> None:
        self.pad_token_id, self.pad_to = pad_token_id, pad_to

    def __call__(self, examples: Sequence[dict[str, Sequence[int]]]) -> dict[str, Tensor]:
        counts = [len(example["input_ids"]) for example in examples]
        shape = (len(examples), max(self.pad_to, *counts))
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        labels = torch.full(shape, IGNORED, dtype=torch.long)
        for row, (example, count) in enumerate(zip(examples, counts, strict=True)):
            input_ids[row, :count] = torch.tensor(example["input_ids"], dtype=torch.long)
            labels[row, :count] = torch.tensor(example["labels"], dtype=torch.long)
        batch = {"input_ids": input_ids, "labels": labels}
        padded = min(counts) < shape[1]
        # A row's last position says how many examples it holds: positions start anew at each.
        if any(
            "position_ids" in each and each["position_ids"][-1] < n - 1
            for each, n in zip(examples, counts, strict=True)
        ):
            batch["position_ids"] = torch.zeros(shape, dtype=torch.long)
            for row, (example, count) in enumerate(zip(examples, counts, strict=True)):
                own = example.get("position_ids", range(count))  # what fills a batch up is one example, and has none
                batch["position_ids"][row, :count] = torch.tensor(own, dtype=torch.long)
        elif padded:
            batch["attention_mask"] = (torch.arange(shape[1]) < torch.tensor(counts)[:, None]).long()
        return batch

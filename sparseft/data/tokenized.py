"""Data sets of token ids and labels, and what is known of them."""

from __future__ import annotations

import hashlib
import itertools
import operator
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from sparseft.models.labels import IGNORED

RUN = 2**22  # tokens that are looked at together


class TokenizedDataset:
    """Token ids and labels of examples: a map-style data set for torch's DataLoader and transformers' Trainer.

    `dataset[i]` is `{"input_ids": list[int], "labels": list[int]}`, both of example i's length; labels are the ids
    where the loss counts and -100 elsewhere. The first position has no label ever, since nothing predicts it.
    Kept as flat int32 arrays of 8 bytes a token, which may lie in files mapped into memory; a subset shares them.
    """

    def __init__(self, input_ids: np.ndarray, labels: np.ndarray, offsets: np.ndarray) -> None:
        """`input_ids`, `labels`: int32 (num_tokens,). `offsets`: int64 (examples + 1,), where each example starts."""
        assert input_ids.shape == labels.shape and offsets[-1] == len(input_ids)
        self._input_ids = input_ids
        self._labels = labels
        self._starts, self._stops = offsets[:-1], offsets[1:]

    @classmethod
    def from_lists(cls, examples: Iterable[tuple[Sequence[int], Sequence[int]]]) -> TokenizedDataset:
        """From pairs of input ids and labels."""
        input_ids, labels, offsets = array("i"), array("i"), array("q", [0])
        for ids, targets in examples:
            input_ids.extend(ids)
            labels.extend(targets)
            offsets.append(len(input_ids))
        return cls(np.array(input_ids, np.int32), np.array(labels, np.int32), np.array(offsets, np.int64))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        position = operator.index(index)
        if position < 0:
            position += len(self)
        if not 0 <= position < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        start, stop = self._starts[position], self._stops[position]
        return {"input_ids": self._input_ids[start:stop].tolist(), "labels": self._labels[start:stop].tolist()}

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self[index] for index in range(len(self)))

    def flat(self, name: str) -> np.ndarray:
        """int32 (num_tokens,): the `input_ids` or the `labels` of all examples, one after another."""
        values = self._input_ids if name == "input_ids" else self._labels
        return np.concatenate([np.empty(0, np.int32), *(values[a:b] for a, b in self._runs())])

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def num_labelled(self) -> int:
        """Tokens where the loss counts."""
        return sum(int((self._labels[start:stop] != IGNORED).sum()) for start, stop in self._runs())

    @property
    def lengths(self) -> np.ndarray:
        """int64 (examples,): tokens of each example."""
        return self._stops - self._starts

    @property
    def places(self) -> np.ndarray:
        """int64: indices of the examples without those that stand at the same place as an earlier one: a mix takes an
        example again where its source is too small."""
        return np.sort(np.unique(self._starts, return_index=True)[1])

    def beyond(self, rows: int, name: str = "input_ids") -> list[int]:
        """The ids of `input_ids` or of `labels` that a table of `rows` rows does not have, in ascending order."""
        values = self._input_ids if name == "input_ids" else self._labels
        least = 0 if name == "input_ids" else IGNORED
        found: set[int] = set()
        for start, stop in self._runs():
            part = values[start:stop]
            if part.max() >= rows or part.min() < least:
                found.update(np.unique(part[(part >= rows) | (part < least)]).tolist())
        return sorted(found)

    def subset(self, indices: Sequence[int] | np.ndarray) -> TokenizedDataset:
        """The examples at `indices`, in that order; no token is copied."""
        chosen = np.asarray(indices, np.int64)
        part = TokenizedDataset.__new__(TokenizedDataset)
        part._input_ids, part._labels = self._input_ids, self._labels
        part._starts, part._stops = self._starts[chosen], self._stops[chosen]
        return part

    def fingerprint(self) -> str:
        """sha256 over lengths, ids and labels: equal for equal training examples, whatever file they came from."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        digest = hashlib.sha256(offsets.astype("<i8", copy=False).tobytes())
        for values in (self._input_ids, self._labels):
            for start, stop in self._runs():
                digest.update(np.ascontiguousarray(values[start:stop], "<i4"))
        return digest.hexdigest()

    def example_keys(self) -> Iterator[bytes]:
        """A hash of each example's ids, to tell whether two examples are the same."""
        for start, stop in zip(self._starts, self._stops, strict=True):
            ids = np.ascontiguousarray(self._input_ids[start:stop], "<i4")
            yield hashlib.blake2b(ids, digest_size=16).digest()

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Where the examples lie, neighbours together, at most `RUN` tokens at a time."""
        breaks = np.flatnonzero(self._stops[:-1] != self._starts[1:]) + 1
        edges = np.concatenate([[0], breaks, [len(self)]]) if len(self) else np.zeros(1, np.int64)
        for first, last in itertools.pairwise(edges):
            for start in range(int(self._starts[first]), int(self._stops[last - 1]), RUN):
                yield start, min(start + RUN, int(self._stops[last - 1]))


@dataclass
class Facts:
    """What is known of tokenised records besides their tokens."""

    records: int = 0  # read
    examples: int = 0  # converted
    dropped: int = 0  # examples left out: no token to learn fits, or too long with `drop`
    cut: int = 0  # of the examples kept, how many had their answer cut
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    mixed: str | None = None  # names the first record that is of another format, where there is one


@dataclass
class Tokens:
    """Tokenised records: a whole data set, or a chunk of it."""

    dataset: TokenizedDataset
    records: np.ndarray  # int64 (examples,): the record that each came from
    questions: np.ndarray  # uint64: hashes of what the examples ask
    question_records: np.ndarray  # int64: the record of each question
    facts: Facts  # of all that was read, also in a part

    def part(self, examples: np.ndarray, questions: np.ndarray) -> Tokens:
        """Those that two masks, bool (examples,) and (questions,), choose; no token is copied."""
        return Tokens(
            self.dataset.subset(np.flatnonzero(examples)),
            self.records[examples],
            self.questions[questions],
            self.question_records[questions],
            self.facts,
        )

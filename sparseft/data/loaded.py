"""What a `DatasetConfig` comes to: examples in tokens, and what there is to say of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from sparseft import console
from sparseft.data.packing import PackedDataset
from sparseft.data.question_hashes import QuestionHashes
from sparseft.data.tokenized import TokenizedDataset, Tokens


@dataclass
class Preferences:
    """What is better and what is worse: of pairs, example i of `better` and of `worse` answer one prompt; else answers
    for themselves, which `better` and `worse` have any number of."""

    paired: bool
    better: TokenizedDataset
    worse: TokenizedDataset
    left_out: int = 0  # pairs of an evaluation file that hold nothing to compare within the length

    def __len__(self) -> int:
        """Pairs, or answers."""
        return len(self.better) if self.paired else len(self.better) + len(self.worse)


@dataclass
class LoadedData:
    """What a `DatasetConfig` names, in tokens."""

    train: TokenizedDataset
    eval: TokenizedDataset | None  # None: no evaluation examples
    format: str  # given or detected; of several sets that of the largest part, of preferences that of each answer
    train_source: str  # as the user or the config named it
    eval_source: str  # empty without evaluation examples
    fingerprint: str  # sha256 over the tokenised training examples, labels included
    dropped: int  # training and split-off examples left out as too long or without a token to learn
    cut: int  # of those kept, how many had their answer cut
    questions: QuestionHashes  # of the training examples
    eval_tokens: Tokens | None  # the evaluation examples and what they ask; of preferences the better answers'
    eval_overlap: int  # questions of the evaluation examples that are training questions too, by their normalised text
    formats: list[str] = field(default_factory=list)  # of all sets, each once
    sources: list[str] = field(default_factory=list)  # the parts of `train_source`
    preferences: Preferences | None = None  # of a preference objective, whose `train` and `eval` are the better answers
    eval_preferences: Preferences | None = None
    packed: PackedDataset | None = None  # the training examples, several a row, with `packing`
    notes: list[str] = field(default_factory=list)  # sentences to tell the user: format, counts, overlap
    warnings: list[str] = field(default_factory=list)  # such sentences that should worry them

    def parts(self) -> Iterator[tuple[TokenizedDataset, str]]:
        """All examples there are, with the name of their source."""
        worse = (None if both is None else both.worse for both in (self.preferences, self.eval_preferences))
        sources = (self.train_source, self.eval_source)
        for part, source in zip((self.train, self.eval, *worse), sources * 2, strict=True):
            if part is not None:
                yield part, source

    @property
    def trained(self) -> list[TokenizedDataset]:
        """The training examples; of preferences the better and the worse answers."""
        both = self.preferences
        return [self.train] if both is None else [both.better, both.worse]

    def tell(self) -> None:
        """Says the notes and the warnings."""
        for note in self.notes:
            console.log(f"data: {note}")
        for warning in self.warnings:
            console.warn(f"data: {warning}")


def overlap_sentences(train: TokenizedDataset, evaluation: TokenizedDataset, questions: int, of: int) -> list[str]:
    """What evaluation and training examples have in common, as sentences."""
    wanted = list(evaluation.example_keys())
    there = set(wanted)
    seen = {key for key in train.example_keys() if key in there}
    shared = sum(key in seen for key in wanted)
    found = []
    if shared:
        found.append(f"{shared} of {len(evaluation)} evaluation examples are also training examples, token for token")
    if questions:
        found.append(f"{questions} of {of} questions of the evaluation examples are training questions too")
    return found

"""What is held out of the training data to evaluate on: a share of the records, by whole questions; and its halves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparseft.data.sampling import seeded_first
from sparseft.data.tokenized import Tokens


def split_off(
    tokens: Tokens, fraction: float, seed: int, *, texts: bool = False
) -> tuple[np.ndarray, np.ndarray] | None:
    """Which examples to evaluate on, bool (examples,), and which questions the others ask, bool (questions,).

    Examples of one record go to one side, so a conversation does not evaluate itself; with a single record the examples
    are split one by one, and so are those of one of several `texts` that has more than half of all: a book beside its
    title page. `fraction` is a share of the records (or such examples), see `held_out_of`. None
    if there is one example only.
    """
    names, groups, sizes = np.unique(tokens.records, return_inverse=True, return_counts=True)
    long = 2 * sizes > sizes.sum() if texts else np.full(len(names), len(names) == 1)
    alone = 1 + max(tokens.records.max(initial=0), tokens.question_records.max(initial=0)) + np.arange(len(groups))
    names, groups = np.unique(np.where(long[groups], alone, tokens.records), return_inverse=True)
    if len(names) == 1:
        return None
    held_out = np.zeros(len(names), bool)
    held_out[held_out_of(names, tokens.questions, tokens.question_records, fraction, seed)] = True
    held_out = held_out[groups]
    return held_out, np.isin(tokens.question_records, tokens.records[~held_out])


def held_out_of(
    records: np.ndarray, questions: np.ndarray, question_records: np.ndarray, fraction: float, seed: int
) -> np.ndarray:
    """The places of the held-out ones among two or more `records` (ascending numbers), ascending, chosen by `seed`.

    `fraction`, a share of the records in (0, 1), is rounded, at least one and never all. Records whose first question
    is the same (conversations of one tree, answers to one prompt) go to one side, so that it may come to somewhat
    fewer; but those of a question that more of them ask than are to be held out (one prompt for all) go one by one.

    questions, question_records: the hash of each question, and the record that asks it, in the records' order.
    """
    count = min(max(1, round(fraction * len(records))), len(records) - 1)
    alike = _asked_alike(records, questions, question_records)
    alike = np.where(np.bincount(alike)[alike] > count, np.arange(len(records)), alike)
    groups, of, sizes = np.unique(alike, return_inverse=True, return_counts=True)
    chosen, left = np.zeros(len(groups), bool), count
    for at in seeded_first(len(groups), len(groups), seed, "evaluation"):
        if sizes[at] <= left:
            chosen[at] = True
            left -= int(sizes[at])
        if not left:
            break
    return np.flatnonzero(chosen[of])


def halves(tokens: Tokens) -> np.ndarray:
    """In which of two halves examples are, bool (examples,).

    A hash says it, so that an example held out with one seed and another is in the same half: of the first question of
    its record, so that all who ask it are in one half; of the example itself where it asks nothing, where more than
    half of all ask what it does, and where else a half would be empty.
    """
    own = np.array([key[0] % 2 == 1 for key in tokens.dataset.example_keys()], bool)
    asking, questions = _first_questions(tokens.questions, tokens.question_records)
    asks = np.isin(tokens.records, asking)
    _, of, times = np.unique(
        questions[np.searchsorted(asking, tokens.records[asks])], return_inverse=True, return_counts=True
    )
    together = asks.copy()
    together[asks] = 2 * times[of] <= len(own)
    found = own.copy()
    found[together] = questions[np.searchsorted(asking, tokens.records[together])] % 2 == 1
    return own if found.all() or not found.any() else found


def _asked_alike(records: np.ndarray, questions: np.ndarray, question_records: np.ndarray) -> np.ndarray:
    """For each record the place of the first one whose first question is the same: its own where it asks nothing."""
    asking, asked = _first_questions(questions, question_records)
    here = np.isin(asking, records)
    asking = np.searchsorted(records, asking[here])
    _, leader, of = np.unique(asked[here], return_index=True, return_inverse=True)
    alike = np.arange(len(records))
    alike[asking] = asking[leader[of]]
    return alike


def _first_questions(questions: np.ndarray, question_records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The records that ask something, ascending, and the first question of each."""
    asking, first = np.unique(question_records, return_index=True)
    return asking, questions[first]


def kept_apart(
    parts: Sequence[Tokens], trained: Sequence[np.ndarray], held_out: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Which of the examples `trained` (places) of each of several parts ask no question that another part holds out,
    bool; `held_out` are the places of those.

    A record's question is its first one, as where one part is split. A question that more than half of a part's several
    records ask (one prompt for all) takes none of them away, nor does one on both sides of its own part.
    """
    asked = [_first_questions(tokens.questions, tokens.question_records) for tokens in parts]

    def of(part: int, places: np.ndarray) -> np.ndarray:
        asking, questions = asked[part]
        return questions[np.isin(asking, parts[part].records[places])]

    held = [np.setdiff1d(of(part, held_out[part]), of(part, trained[part])) for part in range(len(parts))]
    every = np.unique(np.concatenate(held))
    kept = []
    for (asking, questions), part, at in zip(asked, parts, trained, strict=True):
        _, kind, times = np.unique(questions, return_inverse=True, return_counts=True)
        taken = np.isin(questions, every) & (times[kind] <= max(1, len(np.unique(part.records)) // 2))
        kept.append(~np.isin(part.records[at], asking[taken]))
    return kept

"""Several sources in one training set: in given shares, or all of each; and old data replayed beside new ones."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sparseft.data.sampling import seeded_first
from sparseft.data.token_cache import Cache, Damaged
from sparseft.data.tokenized import Facts, Tokens
from sparseft.errors import UserError

CHUNK = 2**16  # examples that are copied at once


@dataclass(frozen=True)
class Share:
    """A source, and its share of the training examples before shares are made to add up to 1; None: none was given."""

    path: str
    weight: float | None


def parse_share(key: str, text: str) -> Share:
    """`SOURCE:WEIGHT` or `SOURCE`; UserError, naming `key`, for a weight that is none."""
    path, colon, rest = text.rpartition(":")
    try:
        weight = float(rest) if colon else None
    except ValueError:  # a colon of the path's own
        return Share(text, None)
    if weight is None:
        return Share(text, None)
    if not path or not 0.0 < weight < math.inf:
        raise UserError(f"{key}: '{text}' has no share above 0: expected SOURCE:SHARE, as in my.jsonl:0.3.")
    return Share(path, weight)


def parse_mix(texts: Sequence[str]) -> list[Share]:
    """The sources of `dataset.mix`, each once, all with a share or none."""
    shares = [parse_share("dataset.mix", text) for text in texts]
    if len(shares) < 2:
        raise UserError("dataset.mix: name at least two sources; one alone is dataset.train_path.")
    paths = [share.path for share in shares]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"dataset.mix: '{path}' is named twice.")
    bare = [share.path for share in shares if share.weight is None]
    if bare and len(bare) < len(shares):
        raise UserError(f"dataset.mix: '{bare[0]}' has no share and others have: give all of them one, or none.")
    return shares


def parse_replay(text: str) -> Share:
    """The source of `dataset.replay` and its share of all training examples, above 0 and below 1."""
    share = parse_share("dataset.replay", text)
    if share.weight is None or share.weight >= 1.0:
        raise UserError(
            f"dataset.replay: '{text}' has no share between 0 and 1: expected FILE:SHARE, as in old.jsonl:0.1."
        )
    return share


def counts(sizes: Sequence[int], weights: Sequence[float] | None, stopping: str) -> list[int]:
    """How many examples of each source an epoch has, of `sizes` that there are; at least one of each.

    weights: the sources' shares; None: all examples, each once. stopping: `first`: as many as there are before the
    first source would have to repeat itself; `all`: so many that no example of any source is left out.
    """
    if weights is None:
        return list(sizes)
    total = sum(weights)
    shares = [weight / total for weight in weights]
    limits = [size / share for size, share in zip(sizes, shares, strict=True)]
    whole = min(limits) if stopping == "first" else max(limits)
    return [max(1, round(whole * share)) for share in shares]


def replayed(examples: int, share: float) -> int:
    """How many replayed examples are `share` of all, beside so many new ones; at least one."""
    return max(1, round(examples * share / (1.0 - share)))


def drawn(count: int, size: int, seed: int, purpose: str) -> np.ndarray:
    """int64 (count,): indices into range(size), ascending, each as often as any other or once more; which are more is
    decided by `seed` and `purpose`."""
    times, more = divmod(count, size)
    extra = np.array(seeded_first(more, size, seed, purpose), np.int64)
    return np.sort(np.concatenate([np.tile(np.arange(size), times), extra]))


@dataclass
class Taken:
    """What one side of a split, or a share of it, has of a piece."""

    piece: int  # which one
    examples: np.ndarray  # int64: places of its examples, in the order that they are taken
    questions: np.ndarray  # bool: those of its questions that these examples ask


def take(pieces: Sequence[tuple[str, Tokens]], chosen: Sequence[Taken], cache: Cache) -> Tokens:
    """The chosen examples of one piece or more, one piece after another; `facts` are of all that their pieces hold.

    pieces: tokens with the names of their cache entries. Of several pieces all are joined, whatever is chosen of them,
    so that their files serve any seed and any shares.
    """
    used = sorted({each.piece for each in chosen})
    if len(used) == 1:
        whole, first = pieces[used[0]][1], {used[0]: (0, 0)}
    else:
        whole = joined(pieces, cache)
        sizes = np.array([(0, 0), *((len(tokens.dataset), len(tokens.questions)) for _, tokens in pieces)])
        first = dict(enumerate(map(tuple, np.cumsum(sizes, axis=0))))
    places = np.concatenate([each.examples + first[each.piece][0] for each in chosen])
    asked = np.concatenate([np.flatnonzero(each.questions) + first[each.piece][1] for each in chosen])
    facts = Facts(**{
        name: sum(getattr(pieces[piece][1].facts, name) for piece in used)
        for name in ("records", "examples", "dropped", "cut")
    })  # fmt: skip
    return Tokens(
        whole.dataset.subset(places),
        whole.records[places],
        whole.questions[asked],
        whole.question_records[asked],
        facts,
    )


def joined(pieces: Sequence[tuple[str, Tokens]], cache: Cache) -> Tokens:
    """All pieces, one after another, in files of the cache: memory does not grow with the data."""
    key = f"joined-{hashlib.sha256(' '.join(name for name, _ in pieces).encode()).hexdigest()[:20]}"
    try:
        found = cache.load(key)
    except Damaged:  # it is made of the pieces again
        found = None
    if found is None:
        with cache.making(key) as writer:
            first = 0
            for _, tokens in pieces:
                for chunk in _chunks(tokens, first):
                    writer.add(chunk)
                first += 1 + int(max(tokens.records.max(initial=0), tokens.question_records.max(initial=0)))
        found = cache.load(key)
        assert found is not None
    return found


def _chunks(tokens: Tokens, first: int) -> Iterator[Tokens]:
    """Tokens in pieces, their records counted from `first`; their questions come with the first one."""
    questions, question_records = tokens.questions, tokens.question_records + first
    for start in range(0, max(1, len(tokens.dataset)), CHUNK):
        places = np.arange(start, min(start + CHUNK, len(tokens.dataset)))
        yield Tokens(
            tokens.dataset.subset(places), tokens.records[places] + first, questions, question_records, Facts()
        )
        questions, question_records = questions[:0], question_records[:0]

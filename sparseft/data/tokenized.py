"""Examples to token ids and labels.

A prompt's ids are those that the tokenizer gives for the prompt alone, as generation and evaluation feed it. What
follows is tokenised where it stands, behind the text before it; only where a token would span the border (a tokenizer
may merge the prompt's last characters with the answer's first ones) it is tokenised apart, since the model would else
be trained on a prompt that it is never shown.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparseft.data.formats import Example
from sparseft.data.question_hashes import question_hash
from sparseft.errors import UserError

IGNORED = -100  # the label that torch's cross entropy skips

Run = tuple[list[int], bool]  # token ids of one segment, and whether it is an answer


class Encoder:
    """Token ids of segments, such that an example's prompt ids are `tokenizer(prompt).input_ids`.

    `prefix` holds what the tokenizer itself puts before a text (BOS for Llama, nothing for GPT-2 or Qwen2): lm-eval
    and `generate` feed prompts with the tokenizer's own defaults, so training follows them; a rendered chat that spells
    BOS out does not get a second one. What it puts behind a text is left off, because answers follow prompts. `eos` is
    the end-of-text id, None if the tokenizer has none; `ends` are all ids that end generation.

    Added tokens (`<|im_start|>`, `</s>`) cut a text: what stands before one has no influence on the ids behind it. So a
    segment is tokenised with the text from the last added token on, and that text's ids are taken off again. Without an
    added token before it, it is tokenised without the space that SentencePiece-like tokenizers put before a text (`▁`),
    as it would be in the middle of one; a slow tokenizer gets the whole text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.prefix = _prefix(tokenizer)
        self.eos: int | None = tokenizer.eos_token_id
        self.ends = generation_ends(tokenizer)
        self._fast = bool(getattr(tokenizer, "is_fast", False))
        self._continuing = _without_leading_space(tokenizer)
        added = {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
        added |= set(getattr(tokenizer, "all_special_tokens", []))
        longest_first = sorted(filter(None, added), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def encode(self, examples: Sequence[Example], *, batch: int = 8192) -> Iterator[list[Run]]:
        """One list of runs an example, in order; the first run starts with `prefix`. Empty segments are left out."""
        for start in range(0, len(examples), batch):
            yield from self._encode_batch(examples[start : start + batch])

    def joins(self, segments: Sequence[tuple[str, bool]]) -> bool:
        """Whether no token of the whole text spans a border of two segments."""
        contexts, texts, whole = [], [], ""
        for text, _ in segments:
            if whole and text:
                context = self._since_added(whole)
                contexts.append(context)
                # What stands behind an added token has no influence on a border before it.
                texts.append(context + text[: match.end() if (match := self._added.search(text)) else None])
            whole += text
        ids = self._encode_texts([*contexts, *texts])
        return all(_begins(long, short) for short, long in zip(ids, ids[len(contexts) :], strict=False))

    def _since_added(self, text: str) -> str:
        """`text` from its last added token on; all of it if there is none."""
        starts = [match.start() for match in self._added.finditer(text)]
        return text[starts[-1] :] if starts else text

    def _encode_batch(self, examples: Sequence[Example]) -> Iterator[list[Run]]:
        plan: list[list[tuple[str, str, bool]]] = []  # per example and segment: context, text, is an answer
        for example in examples:
            steps: list[tuple[str, str, bool]] = []
            whole = ""  # since the last added token
            for text, answer in example.segments:
                if text:
                    plain = self._fast and not self._added.match(whole) and not self._added.search(text)
                    steps.append((_MIDDLE if whole and plain else whole, text, answer))
                    whole = self._since_added(whole + text)
            plan.append(steps)
        every = [step for steps in plan for step in steps]
        behind = [(context, text) for context, text, _ in every if context not in ("", _MIDDLE)]
        starts = iter(self._encode_texts([text for context, text, _ in every if not context]))
        contexts = iter(self._encode_texts([context for context, _ in behind]))
        joined = iter(self._encode_texts([context + text for context, text in behind]))

        def ids(context: str, text: str) -> list[int]:
            if not context:
                return next(starts)
            if context == _MIDDLE:
                return next(middles)
            before, both = next(contexts), next(joined)
            return both[len(before) :] if _begins(both, before) else self._encode_middles([text])[0]

        middles = iter(self._encode_middles([text for context, text, _ in every if context == _MIDDLE]))
        for steps in plan:
            runs = [(ids(context, text), answer) for context, text, answer in steps]
            # A rendered chat may spell BOS out; it must not stand there twice.
            if self.prefix and runs and runs[0][0][: len(self.prefix)] != self.prefix:
                runs.insert(0, (list(self.prefix), False))
            yield runs

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about texts longer than the context: they are cut below
        )
        return encoded["input_ids"]

    def _encode_middles(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that continue another one."""
        if self._continuing is None or not texts:
            return self._encode_texts(texts)
        cuts = [match.start() if (match := self._added.search(text)) else len(text) for text in texts]
        heads = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
        tails = self._encode_texts([text[cut:] for text, cut in zip(texts, cuts, strict=True)])
        encoded = self._continuing.encode_batch_fast(heads, add_special_tokens=False)
        return [head.ids + tail for head, tail in zip(encoded, tails, strict=True)]


_MIDDLE = "\0"  # stands for a text before a segment that has no influence on its ids


def _begins(ids: list[int], start: list[int]) -> bool:
    return ids[: len(start)] == start


def generation_ends(tokenizer: Any) -> set[int]:
    """Ids that end generation: the tokenizer's EOS, and those of the model's `generation_config.json` beside it."""
    from transformers import GenerationConfig

    ends = [tokenizer.eos_token_id]
    if getattr(tokenizer, "name_or_path", None):
        try:
            own = GenerationConfig.from_pretrained(tokenizer.name_or_path, local_files_only=True).eos_token_id
        except (OSError, ValueError):  # there is none, or none that can be read
            own = None
        ends += own if isinstance(own, list) else [own]
    return {int(end) for end in ends if end is not None}


def _prefix(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before any text by default."""
    probe = "a"
    full = list(tokenizer(probe)["input_ids"])
    bare = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    raise UserError(
        f"The tokenizer {getattr(tokenizer, 'name_or_path', '')!r} tokenises a text differently with and without "
        "special tokens, so prompts and answers cannot be joined; expected a causal language model's tokenizer."
    )


def _without_leading_space(tokenizer: Any) -> Any | None:
    """A `tokenizers.Tokenizer` that puts no space before a text, or None if `tokenizer` puts none itself."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    from tokenizers import Tokenizer

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    before = json.dumps([spec["normalizer"], spec["pre_tokenizer"]])
    spec["normalizer"] = _drop_prepend(spec["normalizer"])
    _keep_start(spec["pre_tokenizer"])
    if json.dumps([spec["normalizer"], spec["pre_tokenizer"]]) == before:
        return None
    spec["truncation"] = spec["padding"] = None
    return Tokenizer.from_str(json.dumps(spec))


def _drop_prepend(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
    if normalizer is None or normalizer["type"] == "Prepend":
        return None
    if normalizer["type"] == "Sequence":
        kept = [each for each in map(_drop_prepend, normalizer["normalizers"]) if each is not None]
        return {**normalizer, "normalizers": kept} if kept else None
    return normalizer


def _keep_start(pre_tokenizer: dict[str, Any] | None) -> None:
    """Turns off, in place, what pre-tokenizers put before a text."""
    if pre_tokenizer is None:
        return
    if pre_tokenizer["type"] == "Sequence":
        for each in pre_tokenizer["pretokenizers"]:
            _keep_start(each)
    elif pre_tokenizer["type"] == "Metaspace":
        pre_tokenizer["prepend_scheme"] = "never"
    elif pre_tokenizer["type"] == "ByteLevel":
        pre_tokenizer["add_prefix_space"] = False


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
    def num_labelled_tokens(self) -> int:
        return sum(int((self._labels[a:b] != IGNORED).sum()) for a, b in self._runs())

    @property
    def lengths(self) -> np.ndarray:
        """int64 (examples,): tokens of each example."""
        return self._stops - self._starts

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

    def _runs(self, most: int = 2**22) -> Iterator[tuple[int, int]]:
        """Where the examples lie, neighbours together, at most `most` tokens at a time."""
        breaks = np.flatnonzero(self._stops[:-1] != self._starts[1:]) + 1
        edges = np.concatenate([[0], breaks, [len(self)]]) if len(self) else np.zeros(1, np.int64)
        for first, last in itertools.pairwise(edges):
            for start in range(int(self._starts[first]), int(self._stops[last - 1]), most):
                yield start, min(start + most, int(self._stops[last - 1]))


@dataclass
class Tokenized:
    """What came of a list of examples."""

    dataset: TokenizedDataset
    records: list[int]  # per example of `dataset`, the index of the record it came from
    dropped: int  # examples left out: no answer token fits, or too long with `drop`
    cut: int  # examples whose end was cut away
    questions: list[int] = field(default_factory=list)  # hashes of what the kept examples ask
    question_records: list[int] = field(default_factory=list)  # the record of each question


def tokenize(
    examples: Sequence[Example],
    encoder: Encoder,
    *,
    max_length: int,
    too_long: str = "cut_answer",
    loss_on_prompt: bool = False,
    chunk: bool = False,
) -> Tokenized:
    """Token ids and labels of `examples`, none longer than `max_length` tokens.

    EOS, with loss, follows the last answer unless the text brings its own end; what follows the last answer in an
    example is left out. `too_long`: `cut_answer` cuts at the end, but a question of which only a part would fit goes
    whole, and so does an example without room for one answer token; `drop` leaves the whole example out. With `chunk`
    (plain text) an example becomes consecutive pieces instead, which overlap by one token so that every token but the
    first is predicted exactly once.
    """
    pairs: list[tuple[list[int], list[int]]] = []
    records: list[int] = []
    questions: list[int] = []
    question_records: list[int] = []
    dropped = cut = 0
    for example, runs in zip(examples, encoder.encode(examples), strict=True):
        runs = _end(runs, encoder.eos, example.closed)
        too_many = sum(len(ids) for ids, _ in runs) > max_length
        if too_many and not chunk:
            runs = [] if too_long == "drop" else _cut(runs, max_length)
        ids, labels = _flatten(runs)
        stride = max_length - 1 if chunk else max(len(ids), 1)
        kept = 0
        for start in range(0, max(len(ids) - 1, 1), stride):
            pair = _label(ids[start : start + max_length], labels[start : start + max_length], loss_on_prompt)
            if pair is not None:
                pairs.append(pair)
                kept += 1
        records += [example.record] * kept
        dropped += not kept
        cut += bool(kept) and too_many and not chunk
        if kept:
            found = [value for text in example.questions if (value := question_hash(text)) is not None]
            questions += found
            question_records += [example.record] * len(found)
    return Tokenized(TokenizedDataset.from_lists(pairs), records, dropped, cut, questions, question_records)


def _end(runs: list[Run], eos: int | None, closed: bool) -> list[Run]:
    """`runs` up to the last answer, with EOS behind it unless it is `closed` or ends with EOS already."""
    while runs and not (runs[-1][1] and runs[-1][0]):
        runs = runs[:-1]
    if not runs or eos is None or closed or runs[-1][0][-1] == eos:
        return runs
    return [*runs[:-1], ([*runs[-1][0], eos], True)]


def _cut(runs: list[Run], max_length: int) -> list[Run]:
    """The first `max_length` tokens of `runs`, less what then stands behind the last answer token."""
    kept: list[Run] = []
    room = max_length
    for ids, answer in runs:
        kept.append((ids[:room], answer))
        room -= len(kept[-1][0])
        if room == 0:
            break
    return _end(kept, None, closed=True)


def _flatten(runs: list[Run]) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for run, answer in runs:
        ids += run
        labels += run if answer else [IGNORED] * len(run)
    return ids, labels


def _label(ids: list[int], labels: list[int], loss_on_prompt: bool) -> tuple[list[int], list[int]] | None:
    """Ids and final labels, or None if no token of an answer can be predicted."""
    labels = [IGNORED, *labels[1:]]  # nothing stands before the first token to predict it
    if labels.count(IGNORED) == len(labels):
        return None
    return ids, [IGNORED, *ids[1:]] if loss_on_prompt else labels

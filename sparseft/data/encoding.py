"""Examples to token ids and labels.

A prompt's ids are those that the tokenizer gives for the prompt alone, as generation and evaluation feed it. What
follows is tokenised where it stands, behind the text before it; only where a token would span the border (a tokenizer
may merge the prompt's last characters with the answer's first ones) it is tokenised apart, since otherwise the model
would be trained on a prompt that it is never shown.
"""

from __future__ import annotations

import itertools
import json
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from tokenizers import Tokenizer
from transformers import GenerationConfig

from sparseft.data.formats import Example
from sparseft.data.question_hashes import question_hash
from sparseft.data.sections import CONTEXT, cuts
from sparseft.data.tokenized import IGNORED, Facts, TokenizedDataset, Tokens
from sparseft.errors import UserError

Ids: TypeAlias = "array[int]"  # 4 bytes an id, where a list takes some 40: one value of a record may be all of a book
EncodedSegment: TypeAlias = "tuple[Ids, bool]"  # token ids of one segment, and whether it is an answer

BATCH = 8192  # examples that are tokenised together, at most
BATCH_CHARACTERS = 2**22  # whose ids are in memory together
TOGETHER = 2**20  # characters that the tokenizer has at once: it takes some 160 times as many bytes
PIECE = 2**16  # characters of one text that it has at once


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

    A long text is tokenised in pieces, each behind the end of the one before it, cut where no token spans the cut. So
    the ids are those of the whole text, for a tokenizer whose cuts depend on no more than `CONTEXT` characters to
    either side of them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.prefix = array("i", _prefix(tokenizer))
        self.eos: int | None = tokenizer.eos_token_id
        self.ends = generation_ends(tokenizer)
        self._fast = bool(getattr(tokenizer, "is_fast", False))
        self._continuing = _without_leading_space(tokenizer)
        added = {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
        added |= set(getattr(tokenizer, "all_special_tokens", []))
        longest_first = sorted(filter(None, added), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def encode(self, examples: Sequence[Example]) -> Iterator[list[EncodedSegment]]:
        """The encoded segments of each example, in order, without empty ones; the first one starts with `prefix`, that
        of a later section of a text with the last token before it."""
        for batch in _batches(examples, lambda example: len(example.text), BATCH_CHARACTERS, BATCH):
            yield from self._encode_batch(batch)

    def joins(self, segments: Sequence[tuple[str, bool]]) -> bool:
        """Whether no token of the whole text spans a border of two segments."""
        contexts, texts, whole = [], [], ""  # the last: since the last added token
        for text, _ in segments:
            if whole and text:
                contexts.append(whole)
                # What stands behind an added token has no influence on a border before it.
                texts.append(whole + text[: match.end() if (match := self._added.search(text)) else None])
            whole = self._since_added(whole + text)
        ids = self._encode_texts([*contexts, *texts])
        return all(_begins(long, short) for short, long in zip(ids, ids[len(contexts) :], strict=False))

    def _since_added(self, text: str) -> str:
        """`text` from its last added token on; all of it if there is none."""
        starts = [match.start() for match in self._added.finditer(text)]
        return text[starts[-1] :] if starts else text

    def _encode_batch(self, examples: Sequence[Example]) -> Iterator[list[EncodedSegment]]:
        plan: list[list[tuple[str, str, bool]]] = []  # per example and segment: context, text, is an answer
        for example in examples:
            steps: list[tuple[str, str, bool]] = []
            whole = example.before  # later: since the last added token
            segments = [segment for segment in example.segments if segment[0]]
            for at, (text, answer) in enumerate(segments):
                plain = self._fast and not example.before and not self._added.match(whole)
                middle = whole and plain and not self._added.search(text)
                edges = [0, *self._cuts(text), len(text)]
                steps.append((_MIDDLE if middle else whole, text[: edges[1]], answer))
                for start, end in itertools.pairwise(edges[1:]):
                    steps.append((text[start - CONTEXT : start], text[start:end], answer))
                if at < len(segments) - 1:
                    whole = self._since_added(whole + text)
            plan.append(steps)
        every = [step for steps in plan for step in steps]
        behind = [(context, text) for context, text, _ in every if context not in ("", _MIDDLE)]
        starts = iter(self._encode_texts([text for context, text, _ in every if not context]))
        contexts = iter(self._encode_texts([context for context, _ in behind]))
        joined = iter(self._encode_texts([context + text for context, text in behind]))

        def ids(context: str, text: str) -> Ids:
            if not context:
                return next(starts)
            if context == _MIDDLE:
                return next(middles)
            before, both = next(contexts), next(joined)
            return both[len(before) :] if _begins(both, before) else self._encode_middles([text])[0]

        middles = iter(self._encode_middles([text for context, text, _ in every if context == _MIDDLE]))
        for example, steps in zip(examples, plan, strict=True):
            encoded = [(ids(context, text), answer) for context, text, answer in steps]
            if example.before:
                encoded.insert(0, (self._encode_texts([example.before])[0][-1:], False))
            # A rendered chat may spell BOS out; it must not stand there twice.
            elif self.prefix and encoded and encoded[0][0][: len(self.prefix)] != self.prefix:
                encoded.insert(0, (self.prefix, False))
            yield encoded

    def _cuts(self, text: str) -> Iterator[int]:
        """Where to cut a long text: at most `PIECE` characters apart, where no token of the text around spans a cut."""
        start = 0
        while len(text) - start > PIECE:
            part = text[start : start + PIECE + CONTEXT]
            start += next((cut for cut in cuts(part, PIECE) if self._parts_at(part, cut)), PIECE)
            yield start

    def _parts_at(self, text: str, cut: int) -> bool:
        around = text[max(0, cut - CONTEXT) : cut + CONTEXT]
        before, whole = self._encode_texts([text[max(0, cut - CONTEXT) : cut], around])
        return _begins(whole, before)

    def _encode_texts(self, texts: list[str]) -> list[Ids]:
        ids: list[Ids] = []
        for batch in _batches(texts, len, TOGETHER, len(texts)):
            encoded = self.tokenizer(
                batch,
                add_special_tokens=False,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # no warning about texts longer than the context: they are cut below
            )
            ids += [array("i", each) for each in encoded["input_ids"]]
        return ids

    def _encode_middles(self, texts: list[str]) -> list[Ids]:
        """Ids of texts that continue another one."""
        if self._continuing is None or not texts:
            return self._encode_texts(texts)
        cuts = [match.start() if (match := self._added.search(text)) else len(text) for text in texts]
        heads = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
        tails = self._encode_texts([text[cut:] for text, cut in zip(texts, cuts, strict=True)])
        ids = [
            array("i", encoded.ids)
            for batch in _batches(heads, len, TOGETHER, len(heads))
            for encoded in self._continuing.encode_batch_fast(batch, add_special_tokens=False)
        ]
        return [head + tail for head, tail in zip(ids, tails, strict=True)]


Item = TypeVar("Item")


def _batches(items: Sequence[Item], size: Callable[[Item], int], most: int, count: int) -> Iterator[list[Item]]:
    """`items` in order, so many together that they are at most `count` and, but for a single one, at most `most` in
    size."""
    batch: list[Item] = []
    total = 0
    for item in items:
        if batch and (len(batch) == count or total + size(item) > most):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size(item)
    if batch:
        yield batch


_MIDDLE = "\0"  # stands for a text before a segment that has no influence on its ids


def _begins(ids: Ids, start: Ids) -> bool:
    return ids[: len(start)] == start


def generation_ends(tokenizer: Any) -> set[int]:
    """Ids that end generation: the tokenizer's EOS, and those of the model's `generation_config.json` beside it."""
    ends = [tokenizer.eos_token_id]
    file = getattr(tokenizer, "generation_config_file", None)  # as `load_tokenizer` has found it
    place = str(Path(file).parent) if file else getattr(tokenizer, "name_or_path", None)
    if place:
        try:
            own = GenerationConfig.from_pretrained(place, local_files_only=True).eos_token_id
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


def tokenize(
    examples: Sequence[Example],
    encoder: Encoder,
    *,
    max_length: int,
    too_long: str = "cut_answer",
    loss_on_prompt: bool = False,
    chunk: bool = False,
) -> Tokens:
    """Token ids and labels of `examples`, none longer than `max_length` tokens.

    EOS, with loss, follows the last answer unless the text brings its own end; what follows the last answer in an
    example is left out. `too_long`: `cut_answer` cuts at the end, but a question of which only a part would fit goes
    whole, and so does an example without room for one answer token; `drop` leaves the whole example out. With `chunk`
    (plain text) an example becomes consecutive pieces instead, which overlap by one token so that every token but the
    first is predicted exactly once.
    """
    records, questions, question_records = array("q"), array("Q"), array("q")
    facts = Facts(examples=len(examples))

    def pairs() -> Iterator[tuple[Ids, Ids]]:
        for example, segments in zip(examples, encoder.encode(examples), strict=True):
            segments = _end(segments, encoder.eos, example.closed)
            too_many = sum(len(ids) for ids, _ in segments) > max_length
            if too_many and not chunk:
                segments = [] if too_long == "drop" else _cut(segments, max_length)
            ids, labels = _flatten(segments)
            stride = max_length - 1 if chunk else max(len(ids), 1)
            kept = 0
            for start in range(0, max(len(ids) - 1, 1), stride):
                pair = _label(ids[start : start + max_length], labels[start : start + max_length], loss_on_prompt)
                if pair is not None:
                    yield pair
                    kept += 1
            records.extend([example.record] * kept)
            facts.dropped += not kept
            facts.cut += bool(kept) and too_many and not chunk
            if kept:
                found = [value for text in example.questions if (value := question_hash(text)) is not None]
                questions.extend(found)
                question_records.extend([example.record] * len(found))

    dataset = TokenizedDataset.from_lists(pairs())
    return Tokens(
        dataset,
        np.array(records, np.int64),
        np.array(questions, np.uint64),
        np.array(question_records, np.int64),
        facts,
    )


def _end(segments: list[EncodedSegment], eos: int | None, closed: bool) -> list[EncodedSegment]:
    """`segments` up to the last answer, with EOS behind it unless it is `closed` or ends with EOS already."""
    while segments and not (segments[-1][1] and segments[-1][0]):
        segments = segments[:-1]
    if not segments or eos is None or closed or segments[-1][0][-1] == eos:
        return segments
    return [*segments[:-1], (segments[-1][0] + array("i", [eos]), True)]


def _cut(segments: list[EncodedSegment], max_length: int) -> list[EncodedSegment]:
    """The first `max_length` tokens, less what then stands behind the last answer token."""
    kept: list[EncodedSegment] = []
    room = max_length
    for ids, answer in segments:
        kept.append((ids[:room], answer))
        room -= len(kept[-1][0])
        if room == 0:
            break
    return _end(kept, None, closed=True)


def _flatten(segments: list[EncodedSegment]) -> tuple[Ids, Ids]:
    ids, labels = array("i"), array("i")
    for segment, answer in segments:
        ids += segment
        labels += segment if answer else _UNLABELLED * len(segment)
    return ids, labels


_UNLABELLED = array("i", [IGNORED])


def _label(ids: Ids, labels: Ids, loss_on_prompt: bool) -> tuple[Ids, Ids] | None:
    """Ids and final labels, or None if no token of an answer can be predicted."""
    labels = _UNLABELLED + labels[1:]  # nothing stands before the first token to predict it
    if labels.count(IGNORED) == len(labels):
        return None
    return ids, _UNLABELLED + ids[1:] if loss_on_prompt else labels

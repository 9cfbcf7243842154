"""Examples to token ids and labels.

A prompt's ids are those that the tokenizer gives for the prompt alone, as generation and evaluation feed it. What
follows is tokenised where it stands, behind the text before it; only where a token would span the border (a tokenizer
may merge the prompt's last characters with the answer's first ones) it is tokenised apart, since otherwise the model
would be trained on a prompt that it is never shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import GenerationConfig

from sparseft.data.formats import Example
from sparseft.data.question_hashes import question_hash
from sparseft.data.tokenized import IGNORED, Facts, TokenizedDataset, Tokens
from sparseft.errors import UserError

EncodedSegment = tuple[list[int], bool]  # token ids of one segment, and whether it is an answer

BATCH = 8192  # examples that are tokenised together


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

    def encode(self, examples: Sequence[Example]) -> Iterator[list[EncodedSegment]]:
        """The encoded segments of each example, in order, without empty ones; the first one starts with `prefix`."""
        for start in range(0, len(examples), BATCH):
            yield from self._encode_batch(examples[start : start + BATCH])

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
            encoded = [(ids(context, text), answer) for context, text, answer in steps]
            # A rendered chat may spell BOS out; it must not stand there twice.
            if self.prefix and encoded and encoded[0][0][: len(self.prefix)] != self.prefix:
                encoded.insert(0, (list(self.prefix), False))
            yield encoded

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
    pairs: list[tuple[list[int], list[int]]] = []
    records: list[int] = []
    questions: list[int] = []
    question_records: list[int] = []
    facts = Facts(examples=len(examples))
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
                pairs.append(pair)
                kept += 1
        records += [example.record] * kept
        facts.dropped += not kept
        facts.cut += bool(kept) and too_many and not chunk
        if kept:
            found = [value for text in example.questions if (value := question_hash(text)) is not None]
            questions += found
            question_records += [example.record] * len(found)
    return Tokens(
        TokenizedDataset.from_lists(pairs),
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
    return [*segments[:-1], ([*segments[-1][0], eos], True)]


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


def _flatten(segments: list[EncodedSegment]) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for segment, answer in segments:
        ids += segment
        labels += segment if answer else [IGNORED] * len(segment)
    return ids, labels


def _label(ids: list[int], labels: list[int], loss_on_prompt: bool) -> tuple[list[int], list[int]] | None:
    """Ids and final labels, or None if no token of an answer can be predicted."""
    labels = [IGNORED, *labels[1:]]  # nothing stands before the first token to predict it
    if labels.count(IGNORED) == len(labels):
        return None
    return ids, [IGNORED, *ids[1:]] if loss_on_prompt else labels

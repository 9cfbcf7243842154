"""What would be learnt from a data set, for a person to read: examples with what counts marked, lengths, losses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sparseft.config import RunConfig
from sparseft.data.loaded import LoadedData
from sparseft.data.preferences import KEYS, SIDES
from sparseft.data.tokenized import IGNORED, TokenizedDataset

TURNS = "turns that begin with ### Human: and ### Assistant:"
TEMPLATES = {  # what stands around a record's own text, by its format
    "alpaca": "the Alpaca prompt",
    "guanaco": f"{TURNS}, as in the text",
    "oasst_trees": TURNS,
    "prompt_completion": "none: prompt and completion follow each other",
    "text": "none",
    **dict.fromkeys(KEYS, "of chats the tokenizer's or plain text (see the notes), of texts none"),
}

RANGES = 12  # of lengths, at most
Part = tuple[str, bool]  # text, and whether it is learnt


def preview(data: LoadedData, tokenizer: Any, config: RunConfig, examples: int) -> dict[str, Any]:
    """All there is to say of `data`, with so many training examples in full: evenly spread, from the first on, as in a
    mix one source stands after another."""
    train, parts_of = data.train, data.preferences
    trained = data.trained
    values = np.concatenate([part.lengths for part in trained])
    return {
        "source": data.train_source,
        "format": ", ".join(data.formats),
        "template": "; ".join(template(each, tokenizer, config.dataset.plain_chat) for each in data.formats),
        "examples": len(train if parts_of is None else parts_of),
        "eval_examples": len(data.eval_preferences or data.eval or ()),
        "tokens": sum(part.num_tokens for part in trained),
        "learnt_tokens": sum(part.num_labelled for part in trained),
        "max_length": config.trainer.max_length,
        "cut": data.cut,
        "dropped": data.dropped,
        "duplicates": duplicates(train),
        "repeated": len(train) - len(train.places),
        "eval_overlap": data.eval_overlap,
        "lengths": lengths(values),
        "histogram": histogram(values),
        "shown": [
            {
                **({"answer": answer} if answer else {}),
                "tokens": len(example["input_ids"]),
                "learnt_tokens": sum(label != IGNORED for label in example["labels"]),
                "parts": [{"text": text, "learnt": learnt} for text, learnt in parts(example, tokenizer)],
            }
            for answer, example in shown(trained, examples)
        ],
        "notes": data.notes,
        "warnings": data.warnings,
    }


def shown(trained: Sequence[TokenizedDataset], examples: int) -> Iterator[tuple[str | None, dict[str, list[int]]]]:
    """So many examples, evenly spread; of preferences as many of the better and the worse answers, each with which it
    is."""
    names = [None] if len(trained) == 1 else SIDES
    for turn in range(examples):
        for name, part in zip(names, trained, strict=True):
            if turn < min(examples, len(part)):
                yield name, part[turn * len(part) // min(examples, len(part))]


def template(format: str, tokenizer: Any, plain_chat: bool) -> str:
    """What writes the text around a record's own, in words."""
    if format != "messages":
        return TEMPLATES[format]
    if plain_chat or not getattr(tokenizer, "chat_template", None):
        return "plain User: and Assistant: text"
    return "the tokenizer's chat template"


def duplicates(dataset: TokenizedDataset) -> int:
    """How many examples say again, token for token, what another one before them says. One that a mix takes more than
    once counts once."""
    places = dataset.places
    return len(places) - len(set(dataset.subset(places).example_keys()))


def lengths(values: np.ndarray) -> dict[str, float]:
    """Of the tokens of examples: the shortest, the median, the mean, what 95 % do not exceed, the longest."""
    at = np.percentile(values, [50, 95], method="inverted_cdf")
    return {
        "min": int(values.min()),
        "median": int(at[0]),
        "mean": float(values.mean()),
        "p95": int(at[1]),
        "max": int(values.max()),
    }


def histogram(values: np.ndarray) -> list[dict[str, int]]:
    """How many of `values` (integers, at least 1) lie from `from` to `to`: at most a dozen ranges of equal, round
    width, those from the first that has any to the last."""
    widths = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    width = next(width for width in widths if int(values.max()) // width - int(values.min()) // width < RANGES)
    first = int(values.min()) // width
    counts = np.bincount(values // width - first)
    return [
        {"from": max(1, (first + place) * width), "to": (first + place + 1) * width - 1, "examples": int(count)}
        for place, count in enumerate(counts)
    ]


def parts(example: dict[str, list[int]], tokenizer: Any) -> list[Part]:
    """An example's text, cut where what is learnt begins and ends; special tokens are spelt out."""
    return list(_texts(example["input_ids"], [label != IGNORED for label in example["labels"]], tokenizer))


def _texts(ids: Sequence[int], learnt: Sequence[bool], tokenizer: Any) -> Iterator[Part]:
    before, stop = "", 0
    for counts, run in itertools.groupby(learnt):
        start, stop = stop, stop + len(list(run))
        whole = _text(ids[:stop], tokenizer)
        # The text behind what stands before, which keeps spaces; where a character spans the border, the tokens' own.
        yield whole[len(before) :] if whole.startswith(before) else _text(ids[start:stop], tokenizer), counts
        before = whole


def _text(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

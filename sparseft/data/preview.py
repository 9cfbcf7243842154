"""What would be learnt from a data set, for a person to read: examples with what counts marked, lengths, losses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sparseft.config import RunConfig
from sparseft.data.loaded import LoadedData
from sparseft.data.tokenized import IGNORED, TokenizedDataset

TURNS = "turns that begin with ### Human: and ### Assistant:"
TEMPLATES = {  # what stands around a record's own text, by its format
    "alpaca": "the Alpaca prompt",
    "guanaco": f"{TURNS}, as in the text",
    "oasst_trees": TURNS,
    "prompt_completion": "none: prompt and completion follow each other",
    "text": "none",
}

RANGES = 12  # of lengths, at most
Part = tuple[str, bool]  # text, and whether it is learnt


def preview(data: LoadedData, tokenizer: Any, config: RunConfig, examples: int) -> dict[str, Any]:
    """All there is to say of `data`, with so many training examples in full: evenly spread, from the first on, as in a
    mix one source stands after another."""
    train, count = data.train, min(examples, len(data.train))
    shown = [train[place * len(train) // count] for place in range(count)]
    return {
        "source": data.train_source,
        "format": ", ".join(data.formats),
        "template": "; ".join(template(each, tokenizer, config.dataset.plain_chat) for each in data.formats),
        "examples": len(train),
        "eval_examples": 0 if data.eval is None else len(data.eval),
        "tokens": train.num_tokens,
        "learnt_tokens": train.num_labelled,
        "max_length": config.trainer.max_length,
        "cut": data.cut,
        "dropped": data.dropped,
        "duplicates": duplicates(train),
        "repeated": len(train) - len(train.places),
        "eval_overlap": data.eval_overlap,
        "lengths": lengths(train),
        "histogram": histogram(train.lengths),
        "shown": [
            {
                "tokens": len(example["input_ids"]),
                "learnt_tokens": sum(label != IGNORED for label in example["labels"]),
                "parts": [{"text": text, "learnt": learnt} for text, learnt in parts(example, tokenizer)],
            }
            for example in shown
        ],
        "notes": data.notes,
        "warnings": data.warnings,
    }


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


def lengths(dataset: TokenizedDataset) -> dict[str, float]:
    """Tokens of an example: the shortest, the median, the mean, what 95 % do not exceed, the longest."""
    values = dataset.lengths
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

"""What a preview says of a data set, against counting by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from sparseft.config import BUNDLED_ROOT
from sparseft.data.preview import RANGES, duplicates, histogram, lengths, parts
from sparseft.data.tokenized import TokenizedDataset


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(Path(BUNDLED_ROOT) / "tiny")


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40))
def test_the_ranges_hold_all_lengths(values: list[int]) -> None:
    rows = histogram(np.array(values))
    counted = Counter()
    for value in values:
        (row,) = [row for row in rows if row["from"] <= value <= row["to"]]
        counted[row["from"]] += 1
    assert len(rows) <= RANGES and rows[0]["examples"] and rows[-1]["examples"]
    assert [row["examples"] for row in rows] == [counted[row["from"]] for row in rows]
    assert all(after["from"] == before["to"] + 1 for before, after in zip(rows, rows[1:], strict=False))


def test_numbers_of_a_data_set() -> None:
    pairs = [([1, 2, 3], [-100, 2, 3]), ([1, 2, 3], [-100, -100, 3]), ([4] * 9, [-100] * 8 + [4]), ([1, 2], [-100, 2])]
    dataset = TokenizedDataset.from_lists(pairs)
    assert duplicates(dataset) == 1
    assert lengths(dataset.lengths) == {"min": 2, "median": 3, "mean": 4.25, "p95": 9, "max": 9}


def test_the_parts_are_the_text(tokenizer: Any) -> None:
    texts = ["### Human: hi there", " Héllo, 日本 🙂!", "\n\nmore  spaces ", "bye"]
    ids: list[int] = []
    labels: list[int] = []
    for place, text in enumerate(texts):
        found = tokenizer(text, add_special_tokens=False).input_ids
        ids += found
        labels += found if place % 2 else [-100] * len(found)
    found = parts({"input_ids": [*ids, tokenizer.eos_token_id], "labels": [*labels, tokenizer.eos_token_id]}, tokenizer)
    assert [learnt for _, learnt in found] == [False, True, False, True]
    assert "".join(text for text, _ in found) == tokenizer.decode(ids) + tokenizer.eos_token
    assert found[-1][0].endswith("bye" + tokenizer.eos_token)


def test_a_character_across_a_border_is_shown_on_both_sides(tokenizer: Any) -> None:
    ids = tokenizer("🙂", add_special_tokens=False).input_ids
    assert len(ids) > 1
    (first, learnt), (second, _) = parts({"input_ids": ids, "labels": [ids[0]] + [-100] * (len(ids) - 1)}, tokenizer)
    assert learnt and (first, second) == (tokenizer.decode(ids[:1]), tokenizer.decode(ids[1:]))

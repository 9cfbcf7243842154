"""Tokens that a model has no row of: found in examples and prompts, and passed over where they only pad."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from sparseft.data.loading import check_tokens
from sparseft.data.packing import padding_id
from sparseft.data.tokenized import TokenizedDataset
from sparseft.errors import UserError
from sparseft.models.loading import vocabulary_rows
from support.running import on, refused, sparseft


def test_ids_beyond_a_table_are_found_in_every_part() -> None:
    data = TokenizedDataset.from_lists([([1, 2], [-100, 2]), ([9, 3, 7], [-100, -100, 7]), ([5], [-100])])
    assert data.beyond(10) == [] and data.beyond(8) == [9] and data.beyond(5) == [5, 7, 9]
    assert data.beyond(8, "labels") == [] and data.beyond(7, "labels") == [7]
    assert data.subset([0, 2]).beyond(5) == [5]  # only what the examples hold
    assert TokenizedDataset.from_lists([([1, -1], [-100, -100])]).beyond(5) == [-1]


def test_padding_takes_a_token_that_the_model_can_read() -> None:
    known: Any = SimpleNamespace(pad_token_id=9, eos_token_id=2)
    assert padding_id(known) == padding_id(known, 10) == 9 and padding_id(known, 9) == 2
    assert padding_id(SimpleNamespace(pad_token_id=9, eos_token_id=8), 8) == 0
    assert padding_id(SimpleNamespace(pad_token_id=None, eos_token_id=0), 8) == 0


def with_tokens(folder: Path, source: Path, *, used: bool) -> list[str]:
    """A model's folder in `folder`, whose tokenizer has ten tokens more than it has rows and pads with one of them; and
    the overrides for it on a file that holds such a token, or none."""
    shutil.copytree(source, folder / "model")
    own = transformers.AutoTokenizer.from_pretrained(source)
    extra = [f"<|extra{number}|>" for number in range(18)]  # the model has 8 rows to spare
    own.add_special_tokens({"pad_token": "<|pad|>", "additional_special_tokens": extra})
    own.save_pretrained(folder / "model")
    word = "<|extra16|>" if used else "three"
    records = [{"prompt": f"{n}, {word}: ", "completion": "x" * n} for n in range(1, 9)]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return on(folder / "model", folder / "data.jsonl")


@pytest.mark.parametrize("command", ["train", "preprocess"])
def test_a_token_beyond_the_embeddings_is_named(command: str, tmp_path: Path, model_folder: Any, in_tmp: Path) -> None:
    words = with_tokens(tmp_path, model_folder("llama"), used=True)
    rows = json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"]
    for _ in range(2):  # of cached tokens too
        message = refused(tmp_path, command, *words, "method=s2ft", *(["output_dir=run"] if command == "train" else []))
        named = rf"data.jsonl: token '<\|extra16\|>' has the id \d+, but the model's embeddings have {rows} rows"
        assert re.search(named, message), message
        assert f"of {rows - 8 + 19} tokens that the tokenizer knows" in message
        assert not (tmp_path / "run").exists() and not (tmp_path / ".cache/sparseft/selections").exists()


def test_tokens_that_do_not_occur_are_no_fault(tmp_path: Path, model_folder: Any, in_tmp: Path) -> None:
    words = with_tokens(tmp_path, model_folder("llama"), used=False)
    # Batches of unequal examples, padded: with the tokenizer's own pad token it would be an IndexError.
    sparseft(tmp_path, "train", *words, "method=lora", "trainer.max_steps=2", "output_dir=run")


def test_a_head_with_fewer_rows_than_the_embeddings(make_model: Any) -> None:
    model = make_model("llama")
    rows = model.get_input_embeddings().weight.shape[0]
    assert vocabulary_rows(model) == (rows, rows)
    model.lm_head = torch.nn.Linear(48, rows - 5)
    assert vocabulary_rows(model) == (rows, rows - 5)
    asks = TokenizedDataset.from_lists([([rows - 1, 3], [-100, 3])])
    learns = TokenizedDataset.from_lists([([3, rows - 1], [-100, rows - 1])])
    known = type("Known", (), {"convert_ids_to_tokens": staticmethod(str), "__len__": lambda self: rows})()
    for data, refuses in ((asks, False), (learns, True)):
        loaded = SimpleNamespace(parts=lambda data=data: [(asks, "a"), (data, "b")])
        if refuses:
            with pytest.raises(UserError, match=f"^b: token '{rows - 1}' .* the model's head has {rows - 5} rows"):
                check_tokens(loaded, known, *vocabulary_rows(model))
        else:
            check_tokens(loaded, known, *vocabulary_rows(model))


def test_a_prompt_with_a_token_beyond_the_embeddings_is_refused(make_model: Any, tokenizer: Any) -> None:
    from sparseft.evaluation.harness import LanguageModel

    model = make_model("llama")  # of fewer rows than the tokenizer has tokens
    rows = model.get_input_embeddings().weight.shape[0]
    lm = LanguageModel(model, tokenizer, 1, None)
    assert max(lm.tok_encode("abc")) < rows
    unknown = max(tokenizer(" answer").input_ids)
    message = f"a prompt cannot be read: token 'Ġanswer' has the id {unknown}, but .* have {rows} rows"
    with pytest.raises(UserError, match=message):
        lm.tok_encode("a answer")
    with pytest.raises(UserError, match=message):
        lm._loglikelihood_tokens([(("", ""), [3], [unknown])])

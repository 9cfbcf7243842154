"""Packing: rows, batches, and that an example in a row trains as it does alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from sparseft.data import packing
from sparseft.data.packing import Collator, PackedDataset, best_fit, check_packing, padding_share
from sparseft.data.sampling import PaddedDataset
from sparseft.data.tokenized import TokenizedDataset
from sparseft.errors import UserError
from support.running import METHODS, metrics, on, refused, sparseft, summary, write_data


def examples(lengths: list[int], vocabulary: int = 90, seed: int = 0) -> TokenizedDataset:
    """Random ids; the first third of each example has no label."""
    random = np.random.default_rng(seed)
    pairs = []
    for length in lengths:
        ids = random.integers(3, vocabulary, length).tolist()
        prompt = max(1, length // 3)
        pairs.append((ids, [-100] * prompt + ids[prompt:]))
    return TokenizedDataset.from_lists(pairs)


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 64))
def test_rows_hold_every_example_once_and_are_never_too_long(lengths: list[int], capacity: int) -> None:
    row_of, rows = best_fit(np.array(lengths, np.int64), capacity)
    filled = np.bincount(row_of, weights=lengths, minlength=rows) if lengths else np.zeros(0)
    assert len(filled) == rows and (filled <= capacity).all() and (filled > 0).all()
    # First and best fit, longest first, need at most 11/9 of the best possible number of rows and one more.
    assert rows <= 11 / 9 * np.ceil(sum(lengths) / capacity) * 2 + 1
    # No two rows would fit into one: the later one's longest example would have gone to the earlier one.
    if rows > 1:
        assert np.sort(filled)[:2].sum() > capacity


@given(st.lists(st.integers(1, 70), max_size=80), st.integers(70, 90), st.sampled_from([1, 4, 64, 512]))
def test_best_fit_is_that_of_a_search_over_all_rows(lengths: list[int], capacity: int, word: int) -> None:
    """Into the row with the least room that is enough, of several such rows the one that came to it last."""
    rooms: list[int] = []
    since: list[int] = []  # when each row came to its room
    expected = [0] * len(lengths)
    for step, index in enumerate(sorted(range(len(lengths)), key=lambda index: -lengths[index])):
        fitting = [row for row, room in enumerate(rooms) if room >= lengths[index]]
        if not fitting:
            rooms, since, fitting = [*rooms, capacity], [*since, 0], [len(rooms)]
        row = min(fitting, key=lambda row: (rooms[row], -since[row]))
        rooms[row], since[row] = rooms[row] - lengths[index], step
        expected[index] = row
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WORD", word)
        row_of, rows = best_fit(np.array(lengths, np.int64), capacity)
    assert (row_of.tolist(), rows) == (expected, len(rooms))


def test_best_fit_by_hand() -> None:
    # 7 opens row 0 (3 left), 6 row 1 (4 left); 4 fits row 1 exactly, 3 row 0 exactly; 2 opens row 2, 2 joins it.
    row_of, rows = best_fit(np.array([2, 6, 3, 7, 4, 2]), 10)
    assert (row_of.tolist(), rows) == ([2, 1, 0, 0, 1, 2], 3)


def test_a_row_is_its_examples_with_positions_that_start_again() -> None:
    data = examples([4, 8, 5, 2])
    packed = PackedDataset(data, 10)
    assert [packed.members(row) for row in range(len(packed))] == [[1, 3], [0, 2]]
    row = packed[1]
    assert row["input_ids"] == data[0]["input_ids"] + data[2]["input_ids"]
    assert row["labels"] == data[0]["labels"] + data[2]["labels"]
    assert row["position_ids"] == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert packed[-1] == row and list(packed.lengths) == [10, 9] and len(list(packed)) == 2
    with pytest.raises(IndexError):
        packed[2]


def test_batches_of_rows_have_positions_instead_of_a_mask() -> None:
    packed = PackedDataset(examples([4, 8, 5, 2]), 10)
    batch = Collator(0)([packed[0], packed[1]])
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[*range(8), 0, 1], [*range(4), *range(5), 0]]
    assert batch["labels"][1, 9:].tolist() == [-100]
    # Rows of one example each are what they were before packing.
    alone = PackedDataset(examples([10, 10, 9]), 10)
    assert set(Collator(0)([alone[0], alone[1]])) == {"input_ids", "labels"}
    assert Collator(0)([alone[0], alone[2]])["attention_mask"].tolist() == [[1] * 10, [1] * 9 + [0]]
    assert Collator(0)([packed[0], alone[0]])["position_ids"].tolist() == [[*range(8), 0, 1], [*range(10)]]
    filler = PaddedDataset(packed, 8)[7]  # what several processes' data are lengthened by
    assert Collator(0)([packed[0], filler])["position_ids"].tolist() == [[*range(8), 0, 1], [0] * 10]


def test_padding_share_by_hand() -> None:
    assert padding_share(np.array([4, 4, 4]), 2) == 0.0
    assert padding_share(np.array([2, 6]), 2) == pytest.approx(4 / 12)
    assert padding_share(np.array([2, 6]), 1) == 0.0
    note = PackedDataset(examples([5, 5, 4, 6]), 10).note(1, 2)
    assert "4 examples in 2 rows of at most 10 tokens, 100.0% full" in note
    assert "a step of 1 x 2 rows takes 4.0 examples" in note


def trained(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_loss_and_gradients_of_packed_rows_are_those_of_the_examples_alone(
    kind: str, attention: str, make_model: Any
) -> None:
    model = make_model(kind, dtype=torch.float64)
    model.set_attn_implementation(attention)
    data = examples([3, 11, 7, 2, 9, 5])
    packed = PackedDataset(data, 16)
    assert len(packed) < len(data)
    collate = Collator(0)
    loss, gradients = trained(model, collate(list(packed)))  # rows of unequal length: padding among them
    alone_loss, alone = trained(model, collate(list(data)))
    # The model is float64, but transformers computes the loss (and eager its softmax) in float32.
    assert loss == pytest.approx(alone_loss, rel=1e-6)
    assert gradients.keys() == alone.keys()
    for name, gradient in gradients.items():
        error = (gradient - alone[name]).abs().max() / alone[name].abs().max()
        assert error < 1e-5, f"{name}: {error}"
    # The oracle can fail: read as one text, the same rows train otherwise.
    joined = collate(list(packed))
    joined["position_ids"] = torch.arange(joined["input_ids"].shape[1]).expand_as(joined["input_ids"])
    assert abs(trained(model, joined)[0] - alone_loss) > 1e-3


def test_a_sliding_window_stays_a_window_inside_each_example() -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    data = examples([9, 7])
    loss, _ = trained(model, Collator(0)(list(PackedDataset(data, 16))))
    assert loss == pytest.approx(trained(model, Collator(0)(list(data)))[0], rel=1e-6)


SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LEAKING = {
    "opt": transformers.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32),
    "bloom": transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
    "falcon, ALiBi": transformers.FalconConfig(**SMALL, alibi=True),
}


@pytest.mark.parametrize("name", LEAKING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_architectures_that_would_attend_across_are_refused(name: str, dtype: torch.dtype) -> None:
    model = transformers.AutoModelForCausalLM.from_config(LEAKING[name], dtype=dtype)
    with pytest.raises(UserError, match="dataset.packing=true: .*ForCausalLM cannot be packed: its attention reaches"):
        check_packing(model, 2)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_passes_others_and_leaves_them_alone(kind: str, dtype: torch.dtype, make_model: Any) -> None:
    model = make_model(kind, dtype=dtype).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_packing(model, 4)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.get_input_embeddings()._forward_hooks


def test_positions_that_do_not_start_again_are_refused(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gpt2")
    forward = model.transformer.wpe.forward
    monkeypatch.setattr(
        model.transformer.wpe, "forward", lambda ids: forward(torch.arange(ids.shape[1])[None] + 0 * ids)
    )
    with pytest.raises(UserError, match="other logits than alone"):
        check_packing(model, 1)


def test_a_packed_run_counts_rows_and_trains_on_every_token(tmp_path: Path, model_folder: Any, in_tmp: Path) -> None:
    data = write_data(tmp_path)["oasst1"]
    words = [*on(model_folder("llama"), data, "oasst1"), *METHODS["s2ft"], "trainer.num_epochs=2", "seed=1"]
    packed = sparseft(tmp_path, "train", *words, "dataset.packing=true", "output_dir=packed", "--json")
    plain = sparseft(tmp_path, "train", *words, "output_dir=plain", "--json")
    assert "data: packing: 23 examples in" in packed.err and "examples on average" in packed.err
    # Both see each training token once an epoch, padding never counted; the rows are fewer, so the steps are.
    assert packed.json["tokens"] == plain.json["tokens"] > 0
    assert packed.json["steps"] < plain.json["steps"]
    assert packed.json["eval_loss_before"] == pytest.approx(plain.json["eval_loss_before"], rel=1e-6)
    assert packed.json["eval_loss_after"] < packed.json["eval_loss_before"]
    assert metrics(tmp_path / "packed")[-1]["step"] == summary(tmp_path / "packed")["steps"]


def test_a_model_that_cannot_be_packed_leaves_nothing_behind(tmp_path: Path, tokenizer: Any, in_tmp: Path) -> None:
    config = transformers.OPTConfig(**{**SMALL, "vocab_size": len(tokenizer) + 8}, ffn_dim=48, word_embed_proj_dim=32)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    words = on(tmp_path / "opt", write_data(tmp_path)["json"])
    message = refused(tmp_path, "train", *words, "dataset.packing=true", "method=s2ft", "output_dir=run")
    assert "OPTForCausalLM cannot be packed" in message and "dataset.packing=false" in message
    assert not (tmp_path / "run").exists()

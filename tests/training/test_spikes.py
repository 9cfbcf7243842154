"""Loss spikes: which steps are named, with which rows, and that a continued run counts on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseft import console
from sparseft.data.packing import PackedDataset
from sparseft.training.spikes import FAR, LEAST, NAMED, SPREAD, WINDOW, Spikes
from sparseft.training.trainer import train
from support.training import attached, examples, trainer_of


def brute(losses: list[float], tokens: list[int] | None = None) -> list[int]:
    """The steps that are spikes, from 1, by numpy over all that came before."""
    found, tokens = [], tokens or [100] * len(losses)
    for place, loss in enumerate(losses):
        before = np.array(losses[max(0, place - WINDOW) : place])
        if len(before) < LEAST:
            continue
        median = np.median(before)
        spread = max(1.4826 * np.median(np.abs(before - median)), SPREAD * abs(median))
        usual = np.median(tokens[max(0, place - WINDOW) : place])
        if loss > median + FAR * spread * max(1.0, usual / tokens[place]) ** 0.5:
            found.append(place + 1)
    return found


@given(st.lists(st.tuples(st.floats(0.01, 20, allow_nan=False), st.integers(1, 200)), min_size=1, max_size=150))
def test_spikes_are_those_far_above_the_median(steps: list[tuple[float, int]]) -> None:
    spikes, expected = Spikes(), brute(*map(list, zip(*steps, strict=True)))
    assert [step for step, made_of in enumerate(steps, 1) if spikes.judge(step, *made_of, [])] == expected
    assert spikes.count == len(expected)


def test_what_is_a_spike_and_what_is_not() -> None:
    noise = np.random.default_rng(0).normal(size=400)
    falling = 2 + 3 * np.exp(-np.arange(400) / 50) + 0.2 * noise
    assert brute(falling.tolist()) == []  # noise on a loss that falls
    spiked = falling.copy()
    spiked[[100, 101, 300]] += 4
    assert brute(spiked.tolist()) == [101, 102, 301]
    level = np.r_[falling[:200], falling[200:] + 3]  # it diverges, and stays up there: named until that is the median
    assert len(brute(level.tolist())) <= WINDOW // 2 + 1 and brute(level.tolist())[0] == 201


def test_a_mean_over_few_tokens_may_lie_farther_off() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(4, 200, 2000)
    losses = 2 + 3 * generator.normal(size=2000) / np.sqrt(tokens)  # as means over so many are
    assert brute(losses.tolist(), tokens.tolist()) == []
    assert brute(losses.tolist()) != []


def test_going_on_is_as_if_nothing_had_happened() -> None:
    losses = [2.0, 2.1] * 40 + [9.0] + [2.0, 2.1] * 10 + [9.0]
    whole, first = Spikes(), Spikes()
    for step, loss in enumerate(losses, 1):
        whole.judge(step, loss, 100, [])
    for step, loss in enumerate(losses[:90], 1):
        first.judge(step, loss, 100, [])
    second = Spikes(**json.loads(json.dumps(first.kept())))
    for step, loss in enumerate(losses[90:], 91):
        second.judge(step, loss, 100, [])
    assert (first.count, second.count, whole.count) == (1, 2, 2) and second.kept() == whole.kept()


def spiky(trainer: Any, steps: set[int]) -> dict[int, list[list[int]]]:
    """Makes the loss of some optimizer steps (1-based) ten times larger; what each was made of, as it trains."""
    plain, seen = trainer.compute_loss, {}

    def compute_loss(model: Any, inputs: Any, **options: Any) -> Any:
        step = trainer.state.global_step + 1
        mask = inputs.get("attention_mask", np.ones(inputs["input_ids"].shape))
        for ids, kept in zip(inputs["input_ids"].tolist(), np.asarray(mask).tolist(), strict=True):
            seen.setdefault(step, []).append(ids[: int(sum(kept))])
        loss = plain(model, inputs, **options)
        return loss * 10 if step in steps else loss

    trainer.compute_loss = compute_loss
    return seen


@pytest.mark.parametrize("packed", [False, True])
def test_a_spike_is_named_with_its_step_and_rows(
    make_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], packed: bool
) -> None:
    console.clear_warnings()
    data: Any = PackedDataset(examples(40), 24) if packed else examples(40)
    trainer = trainer_of(attached(make_model("llama"), "s2ft"), tmp_path, data, max_steps=24, batch_size=2,
                         gradient_accumulation=2, learning_rate=1e-4, logging_steps=100)  # fmt: skip
    seen = spiky(trainer, {20})
    train(trainer, None, 24)
    assert trainer.run_state.spikes.count == 1
    (warning,) = [text for text in console.recorded_warnings() if "far above" in text]
    assert warning.startswith("step 20: the loss is")
    rows = [int(word) for word in warning.partition("(rows ")[2].partition(" of the")[0].split(", ")]
    assert len(rows) == 4 and [data[row]["input_ids"] for row in rows] == [
        ids[: len(data[row]["input_ids"])] for row, ids in zip(rows, seen[20], strict=True)
    ]


def test_no_more_than_some_are_named_and_all_are_counted(make_model: Any, tmp_path: Path) -> None:
    console.clear_warnings()
    trainer = trainer_of(attached(make_model("llama"), "lora"), tmp_path, examples(40), max_steps=64, batch_size=1,
                         gradient_accumulation=1, learning_rate=1e-5, logging_steps=100)  # fmt: skip
    spiky(trainer, set(range(20, 64, 3)))
    train(trainer, None, 64)
    named = [text for text in console.recorded_warnings() if "far above" in text]
    assert trainer.run_state.spikes.count == 15 and len(named) == NAMED
    assert named[-1].endswith("; more of them are counted only")


def test_a_continued_run_counts_on(make_model: Any, tmp_path: Path) -> None:
    counts = []
    for name, stops in (("whole", [24]), ("parts", [22, 24])):
        run, resume = tmp_path / name, None
        for stop in stops:
            trainer = trainer_of(attached(make_model("llama"), "s2ft"), run, examples(40), max_steps=stop,
                                 gradient_accumulation=1, learning_rate=1e-4, save_steps=22,
                                 scheduler="constant", save_total_limit=9)  # fmt: skip
            spiky(trainer, {20, 24})
            train(trainer, resume, stop)
            resume = str(run / "checkpoints" / "checkpoint-22")
        counts.append((trainer.run_state.spikes.count, trainer.run_state.spikes.recent))
    assert counts[0] == counts[1] and counts[0][0] == 2

"""What `sparseft bench train` counts of a step besides its passes, and where."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from sparseft.bench import besides, contenders, targets
from sparseft.bench.models import random_llama
from sparseft.bench.sharing import SharedWeights
from sparseft.compose.run_config import compose
from sparseft.errors import UserError
from sparseft.training.optimizer import SparseAdamW
from support.running import sparseft

SLEEP = 0.2


def made(name: str = "sylva") -> contenders.Contender:
    config = compose("bench", ["sparsity=0.9", "method=sylva", "method.block_size=8"])
    return contenders.contender(name, SharedWeights(random_llama(64, 2, torch.float32, seed=0)), config)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(2048, (2, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize(
    ("where", "counts"), [("optimizer", True), ("clipping", True), ("forward", False), ("backward", False)]
)
def test_a_pause_counts_where_it_is_no_pass(where: str, counts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(besides, "STEPS", 3)
    c = made()

    def paused(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def slow(*args: Any, **options: Any) -> Any:
            time.sleep(SLEEP)
            return plain(*args, **options)

        monkeypatch.setattr(owner, name, slow)

    if where == "optimizer":
        paused(SparseAdamW, "step")
    elif where == "clipping":
        paused(torch.nn.utils, "clip_grad_norm_")
    elif where == "forward":
        c.model.register_forward_pre_hook(lambda *_: time.sleep(SLEEP))
    else:
        next(p for p in c.model.parameters() if p.requires_grad).register_hook(lambda _: time.sleep(SLEEP))
    found = besides.measure(c, batch(), accumulation=1)
    assert len(found) == 3 and min(found) > 0
    assert (median(found) > SLEEP) == counts


def test_the_base_is_what_it_was_when_all_have_had_their_turn() -> None:
    weights = SharedWeights(random_llama(64, 2, torch.float32, seed=0))
    before = {key: value.clone() for key, value in weights.base.state_dict().items()}
    config = compose("bench", ["sparsity=0.9", "method=sylva", "method.block_size=8"])
    c = contenders.contender("sylva", weights, config)
    besides.measure(c, batch(), accumulation=2)
    assert not all(torch.equal(value, before[key]) for key, value in weights.base.state_dict().items())  # it trained
    assert all(p.grad is None for p in c.model.parameters())
    weights.give(None)
    for key, value in weights.base.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_target_is_of_the_other_ones_whole_step() -> None:
    rows = {
        "floor": {"step_seconds": 2.0},
        "sylva": {"step_seconds": 3.0, "besides_seconds": 0.05},
        "full": {"step_seconds": 6.0, "besides_seconds": 0.9, "pace": 2.0},
    }
    judged = targets.judge(
        ["besides sylva / floor <= 0.02", "besides sylva <= 60 ms", "besides full / floor <= 0.3"], rows, 0
    )
    assert [entry["measured"] for entry in judged] == [pytest.approx(0.025), 0.05, pytest.approx(0.225)]
    assert [entry["met"] for entry in judged] == [False, True, True]
    assert targets.judge(["besides floor / sylva <= 1"], rows, 0)[0]["reason"] == (
        "floor: besides is not counted in this way"
    )
    with pytest.raises(UserError, match="update sylva"):
        targets.parse("update sylva / floor <= 1", rows)


def test_the_command_measures_it_of_those_that_a_target_names(in_tmp: Path) -> None:
    words = ["bench.width=64", "bench.depth=1", "bench.length=8", "bench.steps=2", "bench.warmup_steps=0"]
    words += ["hardware=cpu", "sparsity=0.9", "method=sylva", "method.block_size=8"]
    words += ["bench.methods=[floor,sylva,lora]", "bench.targets=['besides sylva / floor <= 1000']"]
    result = sparseft(in_tmp, "bench", "train", *words, "--json").json
    rows = result["methods"]
    assert "besides_seconds" in rows["sylva"] and not any("besides_seconds" in rows[name] for name in ("floor", "lora"))
    assert result["targets"][0]["met"]
    shown = rows["sylva"]["besides_seconds"] / rows["floor"]["step_seconds"]
    assert result["targets"][0]["measured"] == pytest.approx(shown)

"""What a run in several processes decides by all of them, and what it refuses; without processes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import sparseft
from sparseft.compose.run_config import compose
from sparseft.config import HardwareConfig
from sparseft.distributed import ranks
from sparseft.errors import UserError
from sparseft.methods import get_method
from sparseft.models.spec import ModelSpec
from sparseft.selection.compute import Request
from sparseft.training.checks import check_hardware
from sparseft.training.distributed_trainer import check_one_base, check_shards, trains_beside_text
from sparseft.training.run_state import RunState
from sparseft.training.trainer import COUNT
from support.experts import build
from support.training import attached, examples, trainer_of


@pytest.mark.parametrize(
    ("method", "eager", "stage", "message"),
    [
        ("losia", False, 2, "as grids of them train"),
        ("s2ft", True, 1, "by the way of this model"),
        ("s2ft", False, 2, None),
        ("losia", True, 0, None),
        ("s2ft", True, 3, "cannot be sharded"),
    ],
)
def test_experts_that_may_have_no_gradient(method: str, eager: bool, stage: int, message: str | None) -> None:
    """ZeRO takes the gradients that there are, as they come: the processes have to have the same ones."""
    model = build("mixtral")
    if eager:
        model.config._experts_implementation = "eager"
    settings = {"reselect_steps": 0, "importance": "weight"} if method == "losia" else {"importance": "weight"}
    request = Request.of(ModelSpec.of(model), get_method(method)(sparsity=0.9, **settings))
    assert request.has_experts
    hardware = HardwareConfig(zero_stage=stage, num_processes=2)
    if message is None:
        return check_shards(request, hardware, model)
    with pytest.raises(UserError, match=f"hardware.zero_stage={stage}: experts.*{message}"):
        check_shards(request, hardware, model)


def test_several_processes_count_what_one_does(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the examples that the data are lengthened by, neither tokens nor lengths."""
    monkeypatch.setattr("sparseft.data.sampling.rank_and_world", lambda: (0, 4))
    data = examples(5)
    trainer = trainer_of(attached(make_model("llama"), "s2ft"), tmp_path, data, max_steps=1)
    assert len(trainer.train_dataset) == 8
    assert trainer.memory.longest == data.lengths.max()
    batch = trainer.data_collator([trainer.train_dataset[4], trainer.train_dataset[5]])
    assert batch[COUNT] == data.lengths[4]


def test_processes_that_read_other_weights_are_refused(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparseft.training.distributed_trainer.all_gather_object", lambda mine: [mine, theirs or mine])
    model, theirs = attached(make_model("llama"), "s2ft"), None
    check_one_base(model)
    theirs = ["another"]
    with pytest.raises(UserError, match="the weights that process 1 has read are not those of process 0"):
        check_one_base(model)


def test_text_gives_a_tower_no_gradient(make_model: Any) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Gemma3Config(
        text_config=sizes | {"vocab_size": 96, "num_key_value_heads": 2, "head_dim": 8},
        vision_config=sizes | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4,
    )  # fmt: skip
    with torch.device("meta"):
        towered = transformers.AutoModelForImageTextToText.from_config(config)
    assert trains_beside_text(towered)
    towered.requires_grad_(False)
    assert not trains_beside_text(towered)
    for kind in ("llama", "gpt2"):
        assert not trains_beside_text(sparseft.attach(make_model(kind), sparseft.FullConfig()))


def test_a_spike_is_judged_by_the_tokens_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At an epoch's end this process may have hardly any, and the mean is of the others' too."""
    monkeypatch.setattr(ranks, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(ranks, "mean_over_ranks", lambda own: (own + torch.tensor([2.0, 100.0])) / 2)
    run = RunState(tmp_path, 10, torch.device("cpu"))
    for step, learnt in ((1, 100), (2, 1)):
        run.step_loss += 3.0
        run.step_learnt = learnt
        run.judge(step, 1.0)
    run.settle()
    assert run.spikes.recent == [(2.5, 200), (2.5, 101)]


def test_without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    words = ["hardware=cpu", "hardware.num_processes=2"]
    with pytest.raises(UserError, match=r"zero_stage=2: needs the package deepspeed.*pip install deepspeed, or.*fsdp"):
        check_hardware(compose("train", [*words, "hardware.zero_stage=2"]))
    check_hardware(compose("train", [*words, "hardware.fsdp=true"]))

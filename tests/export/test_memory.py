"""The memory that an export of experts takes, which lie in the files one by one and are one parameter in the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import sparseft
from sparseft.compose.run_config import compose
from sparseft.export import values as values_
from sparseft.export.changed_tensors import ChangedTensors
from sparseft.export.job import check_base
from sparseft.export.source import Source
from sparseft.export.values import check_values
from sparseft.memory import AllocationCounter
from sparseft.models.checkpoint import Checkpoint
from sparseft.selection.selection import Selection
from support import adapted, experts

EXPERTS, HIDDEN, INSIDE = 8, 64, 128


class Counter(AllocationCounter):
    """Without tensors of the meta device."""

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type != "meta":
            super()._count(storage)


def base_and_adapter(folder: Path) -> tuple[Path, Path]:
    config = experts.MODELS["mixtral"]()
    sizes = {"vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": INSIDE, "num_hidden_layers": 1}
    for name, value in {**sizes, "num_local_experts": EXPERTS, "head_dim": None}.items():
        setattr(config, name, value)
    model: Any = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    model.save_pretrained(folder / "base")
    model = adapted.load(folder / "base")
    names = [f"model.layers.0.mlp.experts.{side}_proj.{n}" for side in ("gate_up", "down") for n in range(EXPERTS)]
    sparseft.attach(model, sparseft.S2FTConfig(), Selection({name: {"rows": [3, 7]} for name in names}))
    with torch.no_grad():
        for delta in sparseft.trainable_parameters(model).values():
            delta += 1.0
    sparseft.save_adapter(model, folder / "adapter")
    return folder / "base", folder / "adapter"


def test_it_is_bounded_by_the_weights_of_an_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = base_and_adapter(tmp_path)
    source = Source.find(str(adapter), compose("export", [f"model.path={base}"]))
    size = EXPERTS * 2 * INSIDE * HIDDEN * 2  # bytes of gate_up_proj, the largest parameter
    assert len(source.changes) == 2 * EXPERTS  # read

    with Counter() as counter:
        changes = list(ChangedTensors(source)())
    assert {change.name.rpartition("experts.")[2] for change in changes} >= {"0.w1.weight", "7.w2.weight"}
    assert counter.peak <= 1.0 * size

    checkpoint = Checkpoint.of_folder(base)
    written: dict[str, Tensor] = {name: checkpoint.read(name).clone() for name in checkpoint.tensors}
    for change in changes:
        written[change.name].view(-1)[change.index] = change.values
    with Counter() as counter:
        check_values(source, written.__getitem__)
    assert counter.peak <= size  # an eighth of which is an expert, a few times in fp32

    with Counter() as counter:
        check_base(source)
    assert counter.peak <= 0.1 * size

    parameters = dict(adapted.load(base).named_parameters())
    places = ChangedTensors(source).places
    with Counter() as counter:
        for name, values in places.stored(lambda name: parameters[name].detach()):
            assert torch.equal(values, checkpoint.read(name))
    assert counter.peak <= 1.3 * size

    monkeypatch.setattr(values_, "base_model", lambda *_: None)
    monkeypatch.setattr(values_, "merged_model", lambda *_: adapted.load(base))
    wanted = values_._of_merged(source, places, checkpoint, None)
    next(wanted)  # the model is there
    with Counter() as counter:
        for name, _, start, values, _ in wanted:
            assert torch.equal(values, parameters[name].detach().view(-1)[start : start + len(values)])
    assert counter.peak <= 0.6 * size


def test_large_parameters_in_a_row_are_compared_one_by_one(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=HIDDEN, intermediate_size=512, num_hidden_layers=1,
                                      num_attention_heads=4)  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model = adapted.load(tmp_path / "base")
    sparseft.attach(model, sparseft.S2FTConfig(), Selection({"model.layers.0.self_attn.q_proj": {"rows": [3]}}))
    sparseft.save_adapter(model, tmp_path / "adapter")
    source = Source.find(str(tmp_path / "adapter"), compose("export", [f"model.path={tmp_path / 'base'}"]))
    checkpoint = Checkpoint.of_folder(tmp_path / "base")
    size = 512 * HIDDEN * 4
    with Counter() as counter:
        check_values(source, lambda name: checkpoint.read(name).clone())
    assert counter.peak <= 1.5 * size  # the written one, and where it differs

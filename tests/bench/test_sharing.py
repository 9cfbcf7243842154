"""Contenders that share a model's weights: each one's steps are those of one that is alone, and the model stays."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparseft.bench import contenders, sharing, targets, timing, train
from sparseft.bench.contenders import Contender, contender, loss_of, measure_memory, step
from sparseft.bench.models import random_llama
from sparseft.bench.sharing import SharedWeights
from sparseft.compose.run_config import compose
from sparseft.layers import SparseLinear, sparse_layers
from sparseft.memory import tensor_bytes
from support.running import sparseft

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
CPU = torch.device("cpu")
OWN: dict[str, dict[str, Any]] = {
    "floor": {},
    "s2ft": {},
    "s2ft rows": {"q_ratio": 1.0, "g_ratio": 0.1},
    "s2ft permuted": {"o_ratio": 1.0, "d_ratio": 0.1, "layout": "permuted"},
    "sylva": {"block_size": 8},
    "paca": {},
    "losia": {},
    "lora": {},
    "dora": {},
}
TINY = ["bench.width=64", "bench.depth=1", "bench.length=16", "bench.batch_size=1", "bench.warmup_steps=0",
        "sparsity=0.9", "method.block_size=8"]  # fmt: skip


def base_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = random_llama(64, 2, dtype, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::3] = -0.0  # base + 0 would be +0
    return model


def made(entry: str, weights: SharedWeights) -> Contender:
    torch.manual_seed(0)  # LoRA's start
    return contender(entry, weights, compose("bench", ["sparsity=0.9"]), OWN[entry])


def batch(turn: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(2048, (2, 16), generator=torch.Generator().manual_seed(turn))
    return {"input_ids": ids, "labels": ids}


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    return {name: value.view(torch.int16 if value.element_size() == 2 else torch.int32) for name, value in kept.items()}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_turns_do_not_mix(dtype: torch.dtype) -> None:
    """Losses and trained weights are those of one with a model of its own, bit for bit; the base stays as it was."""
    base = base_model(dtype)
    before = bits(base)
    weights = SharedWeights(base)
    together = {entry: made(entry, weights) for entry in OWN}
    assert not sparse_layers(weights.base)
    losses: dict[str, list[torch.Tensor]] = {entry: [] for entry in OWN}
    for turn in range(3):
        for entry in list(OWN) if turn % 2 else reversed(OWN):
            losses[entry].append(loss_of(together[entry], batch(turn)).detach())
            step(together[entry], batch(turn))
    assert any(layer.is_permuted for layer in sparse_layers(together["s2ft permuted"].model).values())
    for entry in OWN:
        alone = made(entry, SharedWeights(base_model(dtype)))
        for turn in range(3):
            assert torch.equal(losses[entry][turn], loss_of(alone, batch(turn))), (entry, turn)
            step(alone, batch(turn))
        together[entry].take_turn()
        # a permuted layer's state dict is in the original order: of all weights, deltas in them
        assert same(bits(together[entry].model), bits(alone.model)), entry
        changed = not same(bits(base), before)  # a sparse one's own weights are the base's
        assert changed == bool(sparse_layers(alone.model)), entry
    weights.give(None)
    assert same(bits(base), before)


def test_frozen_weights_are_in_memory_once() -> None:
    base = base_model()
    weights = SharedWeights(base)
    together = [made(entry, weights) for entry in OWN]
    frozen = [[p for p in c.model.parameters() if not p.requires_grad] for c in together]
    own = {p.untyped_storage().data_ptr() for p in base.parameters()}
    for c, parameters in zip(together, frozen, strict=True):
        assert {p.untyped_storage().data_ptr() for p in parameters} == own, c.name
    assert tensor_bytes(p for parameters in frozen for p in parameters) == tensor_bytes(base.parameters())
    assert all(p.requires_grad for p in base.parameters())  # each freezes its own
    full = contender("full", weights, compose("bench", []))
    assert not own & {p.untyped_storage().data_ptr() for p in full.model.parameters()}


@pytest.mark.parametrize("entry", ["floor", "s2ft", "sylva", "lora"])
def test_memory_is_what_it_would_be_alone(entry: str) -> None:
    gc.collect()  # layers of other tests that go in the middle of a step would let it make its plans anew
    weights = SharedWeights(base_model())
    together = [made(other, weights) for other in OWN]
    shared, alone = together[list(OWN).index(entry)], made(entry, SharedWeights(base_model()))
    for c in (shared, alone):
        step(c, batch(0))  # its optimizer has its state
        if c is shared:
            step(together[1 if entry != "s2ft" else 4], batch(1))  # another sparse one has the turn
        measure_memory(c, batch(0), CPU)
    assert (shared.peak_bytes, shared.saved_bytes) == (alone.peak_bytes, alone.saved_bytes)


def test_tied_weights_stay_tied() -> None:
    import transformers

    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**settings, vocab_size=64, tie_word_embeddings=True)
    weights = SharedWeights(transformers.AutoModelForCausalLM.from_config(config))
    model = weights.copy()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.get_input_embeddings().weight is not weights.base.get_input_embeddings().weight
    assert model.get_input_embeddings().weight.data_ptr() == weights.base.get_input_embeddings().weight.data_ptr()


# ---- one with weights of its own ----


def fake_clock(
    monkeypatch: pytest.MonkeyPatch, seconds: Mapping[str, float], slower: float, end: int = 99
) -> list[str]:
    """Contenders take these seconds, `slower` times as many once full has begun; its step `end` is interrupted."""
    told: list[str] = []

    def seconds_of(call: Any, _device: Any) -> float:
        call()
        told.append(call.args[0].name)
        if told.count("full") == end:
            raise KeyboardInterrupt
        return seconds[told[-1]] * (slower if "full" in told else 1.0)

    monkeypatch.setattr(timing, "seconds_of", seconds_of)
    return told


def test_full_runs_last_beside_the_floor_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is half as fast by then: its own times say so, and ratios to it do not."""
    models: dict[str, Any] = {}
    alive: list[set[str]] = []
    base: list[tuple[nn.Module, dict[str, torch.Tensor]]] = []
    plain = train.contender

    def contender(entry: str, weights: SharedWeights, *rest: Any) -> Contender:
        base.append((weights.base, bits(weights.base)) if not base else base[0])
        if entry == "full":
            alive.append({name for name, model in models.items() if model() is not None})
        c = plain(entry, weights, *rest)
        models[entry] = weakref.ref(c.model)
        return c

    monkeypatch.setattr(train, "contender", contender)
    told = fake_clock(monkeypatch, {"floor": 1.0, "s2ft": 1.1, "lora": 2.0, "full": 3.0}, slower=2.0)
    config = compose("bench", [*TINY, "bench.steps=2", "bench.methods=[full,floor,s2ft,lora]",
                               "bench.targets=['s2ft / full <= 0.4','step full <= 7 s']"])  # fmt: skip
    result = train.run(config)
    assert "full" not in told[:6] and sorted(told[6:]) == ["floor", "floor", "full", "full"]
    assert alive == [{"floor"}]
    rows = result["methods"]
    assert list(rows) == ["full", "floor", "s2ft", "lora"]
    assert (rows["full"]["step_seconds"], rows["full"]["beside"], rows["full"]["pace"]) == (6.0, "floor", 1.5)
    assert rows["floor"]["step_seconds"] == 1.0 and "pace" not in rows["floor"]
    assert rows["s2ft"]["ratio_to"]["full"] == pytest.approx(1.1 / (6.0 / 1.5))
    assert rows["full"]["ratio_to"] == {"full": 1.0, "floor": pytest.approx(4.0), "lora": pytest.approx(2.0)}
    assert [entry["measured"] for entry in result["targets"]] == [pytest.approx(1.1 / 4.0), 6.0]
    assert rows["full"]["peak_memory_bytes"] > 4 * result["weights_bytes"]
    (note,) = [line for line in train.notes(result) if line.startswith("full has weights")]
    assert "beside floor, which by then took 1.50 of its time" in note
    assert same(bits(base[0][0]), base[0][1])


def test_the_one_beside_it_may_fail_and_keeps_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = train.step, []

    def breaks(c: Contender, *rest: Any) -> Any:
        calls.append(c.name)
        if c.name == "floor" and "full" in calls:
            raise RuntimeError("no room")
        return plain(c, *rest)

    monkeypatch.setattr(train, "step", breaks)
    result = train.run(compose("bench", [*TINY, "bench.steps=2", "bench.methods=[floor,s2ft,full]"]))
    rows = result["methods"]
    assert all(row["step_seconds"] > 0 and row["peak_memory_bytes"] > 0 for row in rows.values())
    assert rows["full"]["beside"] is None or rows["full"]["pace"] > 0  # it may have had one turn
    assert targets.failure(result) is None


def test_an_interrupt_of_full_leaves_the_others(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_clock(monkeypatch, {"floor": 1.0, "s2ft": 1.1, "full": 3.0}, slower=1.0, end=2)
    words = ["bench.steps=3", "bench.methods=[floor,s2ft,full]", "bench.targets=['s2ft / floor <= 2']"]
    sparseft(in_tmp, "bench", *TINY, *words, "output_dir=out", code=130)
    result = json.loads((in_tmp / "out/bench.json").read_text())
    rows = result["methods"]
    assert result["complete"] is False and rows["full"]["rounds"] == 1 and rows["full"]["step_seconds"] == 3.0
    assert "rounds" not in rows["s2ft"] and rows["s2ft"]["peak_memory_bytes"] > 0
    fake_clock(monkeypatch, {"floor": 1.0, "s2ft": 1.1, "full": 3.0}, slower=1.0, end=1)
    sparseft(in_tmp, "bench", *TINY, *words, "output_dir=other", code=130)
    result = json.loads((in_tmp / "other/bench.json").read_text())
    assert result["methods"]["full"] == {"missing": "not measured yet"} and result["targets"][0]["met"] is True


def test_a_failed_step_leaves_nothing_in_the_weights() -> None:
    """An error in the middle of a turn: what it has written is put back before another one steps."""
    base = base_model()
    before = copy.deepcopy(bits(base))
    weights = SharedWeights(base)
    sylva, floor = made("sylva", weights), made("floor", weights)
    expected = loss_of(floor, batch(0)).detach()
    step(sylva, batch(0))
    with pytest.raises(IndexError):
        loss_of(sylva, {name: value + 5000 for name, value in batch(0).items()})
    assert not same(bits(base), before)
    weights.give(None)
    sylva.free()
    assert same(bits(base), before) and torch.equal(loss_of(floor, batch(0)), expected)
    assert contenders.owns_weights("full") and not contenders.owns_weights("floor")


@pytest.mark.parametrize(
    ("module", "name"), [(sharing, "_reorder"), (SparseLinear, "write_back")], ids=["order", "deltas"]
)
def test_a_turn_that_cannot_begin_leaves_nothing_in_the_weights(
    module: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_model()
    before = copy.deepcopy(bits(base))
    weights = SharedWeights(base)
    one = made("s2ft permuted", weights)
    step(one, batch(0))
    weights.give(None)
    with monkeypatch.context() as patched:
        patched.setattr(module, name, ending(getattr(module, name), calls=6))
        with pytest.raises(torch.OutOfMemoryError):
            one.take_turn()
    assert not same(bits(base), before)
    weights.give(None)
    assert same(bits(base), before)
    one.take_turn()  # it may begin another time
    assert weights.holder is one.model and not same(bits(base), before)


def test_a_contender_that_cannot_be_attached_leaves_the_weights_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_model()
    before = copy.deepcopy(bits(base))
    weights = SharedWeights(base)
    with monkeypatch.context() as patched:
        patched.setattr(SparseLinear, "permute", ending(SparseLinear.permute, calls=4))
        with pytest.raises(torch.OutOfMemoryError):
            made("s2ft permuted", weights)
    assert not same(bits(base), before)
    weights.give(None)
    assert same(bits(base), before)


def ending(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """The function until its call number `calls`, for which memory runs out."""
    count = itertools.count(1)

    def run(*args: Any, **options: Any) -> Any:
        if next(count) == calls:
            raise torch.OutOfMemoryError("no memory")
        return function(*args, **options)

    return run

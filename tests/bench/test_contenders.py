"""Contenders: the ways they run in, what cannot be had or fails, their profile, what they save for backward."""

from __future__ import annotations

import functools
import gc
import gzip
import importlib.machinery
import json
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from sparseft.bench import contenders, profiling, targets, train
from sparseft.bench.models import random_llama
from sparseft.bench.sharing import SharedWeights
from sparseft.bench.timing import held_bytes
from sparseft.compose.run_config import compose
from sparseft.errors import UserError
from sparseft.memory import AllocationCounter, SavedBytes
from support.running import files, sparseft

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
SMALL = ["bench.width=64", "bench.depth=2", "bench.length=32", "bench.batch_size=1", "bench.steps=1",
         "bench.warmup_steps=0", "sparsity=0.9", "method.block_size=8"]  # fmt: skip
CPU = torch.device("cpu")


def made(name: str, depth: int = 2, width: int = 64) -> contenders.Contender:
    config = compose("bench", ["sparsity=0.9", "method=sylva", "method.block_size=8"])
    return contenders.contender(name, SharedWeights(random_llama(width, depth, torch.float32, seed=0)), config)


def batch(length: int = 48) -> dict[str, torch.Tensor]:
    ids = torch.randint(2048, (2, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def loss_and_gradients(c: contenders.Contender) -> tuple[float, list[torch.Tensor]]:
    """Of a batch; the model's gradients are gone afterwards."""
    loss = contenders.loss_of(c, batch())
    loss.backward()
    found = [p.grad for p in c.model.parameters() if p.grad is not None]
    c.model.zero_grad(set_to_none=True)
    return loss.item(), found


# ---- ways ----


@pytest.mark.parametrize("name", ["floor", "s2ft", "sylva", "lora"])
def test_compiled_methods_compute_the_same_in_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "BACKEND", "aot_eager")
    c = made(name, depth=1)
    loss, gradients = loss_and_gradients(c)
    contenders.put_in_way("compile", c, functools.partial(loss_and_gradients, c))
    assert c.call is not None and c.facts["graph_breaks"] == 0 and c.facts["graphs"] == 1
    compiled_loss, compiled = loss_and_gradients(c)
    assert compiled_loss == pytest.approx(loss, abs=1e-6)
    assert bool(gradients) == (name != "floor")
    for one, other in zip(gradients, compiled, strict=True):
        torch.testing.assert_close(one, other)
    contenders.forget_compiled()


def test_graph_breaks_are_counted_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "BACKEND", "eager")

    class Breaks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + 1
            torch._dynamo.graph_break()
            return x * 2

    c = contenders.Contender("breaks", Breaks(), None, 0)
    contenders.put_in_way("compile", c, lambda: c.call(torch.ones(2)))
    assert c.facts["graph_breaks"] == 1 and c.facts["graphs"] == 2 and len(c.facts["graph_break_reasons"]) == 1
    contenders.forget_compiled()


@pytest.mark.parametrize("name", ["floor", "s2ft", "lora", "full"])
def test_logits_of_labelled_tokens_alone_are_the_same_step(name: str) -> None:
    plain, labelled = made(name, depth=1), made(name, depth=1)
    contenders.put_in_way("labelled", labelled, lambda: None)
    loss, gradients = loss_and_gradients(plain)
    found, ours = loss_and_gradients(labelled)
    assert found == pytest.approx(loss, rel=1e-6)
    for one, other in zip(gradients, ours, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="joins checkpointing only"):
        contenders.check_ways(["labelled+compile"])


@pytest.mark.parametrize("name", ["floor", "s2ft", "sylva", "lora", "full"])
def test_recomputing_activations_holds_less_and_computes_the_same(name: str) -> None:
    plain, recomputing = made(name, depth=4), made(name, depth=4)
    contenders.put_in_way("checkpointing", recomputing, lambda: None)
    loss, gradients = loss_and_gradients(plain)
    again, recomputed = loss_and_gradients(recomputing)
    assert again == loss
    for one, other in zip(gradients, recomputed, strict=True):
        assert torch.equal(one, other)
    contenders.measure_memory(plain, batch(), CPU)
    contenders.measure_memory(recomputing, batch(), CPU, recomputes=True)
    assert recomputing.saved_bytes < 0.75 * plain.saved_bytes  # the head's part is not recomputed
    if name == "full":  # its peak is the optimizer's step, where no activation is left
        assert recomputing.peak_bytes <= plain.peak_bytes
    else:
        assert recomputing.peak_bytes < plain.peak_bytes


def test_what_is_held_is_what_is_saved() -> None:
    """Two ways of counting: what autograd says it saves, and what the allocations of the forward pass leave."""
    c = made("floor")
    saved = SavedBytes(c.model)
    with saved.counting():
        contenders.loss_of(c, batch())
    held = held_bytes(lambda: contenders.loss_of(c, batch()), CPU)
    assert held == pytest.approx(saved.total, rel=0.02)


@pytest.mark.parametrize("name", ["floor", "s2ft", "sylva", "lora"])
def test_counting_memory_leaves_none_behind(name: str) -> None:
    """A pack hook that returns its input ties a graph's node to what that node saves: no collector frees it."""
    c = made(name)
    contenders.measure_memory(c, batch(), CPU)  # brings the optimizer's state
    with AllocationCounter() as counter:
        contenders.measure_memory(c, batch(), CPU)
        gc.collect()
    assert counter.live < 0.01 * c.saved_bytes


def test_every_way_has_its_columns(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "BACKEND", "aot_eager")
    chosen = "bench.ways=[eager,checkpointing,liger,compile]"
    done = sparseft(in_tmp, "bench", *SMALL, "bench.depth=1", chosen, "bench.methods=[floor,s2ft]", "output_dir=out")
    result = json.loads((in_tmp / "out/bench.json").read_text())
    assert list(result["ways"]) == ["eager", "checkpointing", "liger", "compile"]
    assert result["methods"] == result["ways"]["eager"]
    for name in ("floor", "s2ft"):
        assert result["ways"]["compile"][name]["graph_breaks"] == 0
        assert result["ways"]["compile"][name]["ratio_to"]["floor"] > 0
        assert result["ways"]["checkpointing"][name]["peak_memory_bytes"] > 0
        assert result["ways"]["liger"][name] == {"missing": "liger-kernel is not installed"}
    header = done.out.splitlines()[1]
    for column in ("checkpointing ms", "÷ compile floor", "graph breaks", "liger ms"):
        assert column in header
    assert "missing: liger: every method: liger-kernel is not installed" in done.out


def test_a_compiler_that_is_not_there_is_said(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler here")

    monkeypatch.setattr(contenders, "BACKEND", no_compiler)
    words = ["bench.ways=[eager,compile]", "bench.methods=[floor,s2ft]", "bench.depth=1", "--json"]
    result = sparseft(in_tmp, "bench", *SMALL, *words).json
    for entry in result["ways"]["compile"].values():
        assert entry.keys() == {"missing"} and "no C++ compiler here" in entry["missing"]
    assert all("step_seconds" in entry for entry in result["methods"].values())


def test_liger_is_of_its_own_way_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides the model it changes, Liger exchanges the rotary function of transformers' module."""
    package, kernels = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    package.__spec__ = importlib.machinery.ModuleSpec("liger_kernel", None)
    kernels._apply_liger_kernel_to_instance = lambda model: setattr(modeling_llama, "apply_rotary_pos_emb", len)
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", kernels)
    plain, c = modeling_llama.apply_rotary_pos_emb, made("floor")
    c.model.to("meta")  # no CPU
    for _ in range(2):
        contenders.put_in_way("liger", c, lambda: None)
    assert modeling_llama.apply_rotary_pos_emb is len
    contenders.forget_liger()
    assert modeling_llama.apply_rotary_pos_emb is plain


def test_a_missing_peer_is_named(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without peft the rows of LoRA say so, the others are measured, and its targets are not met."""
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it now fails as if it were not there
    words = ["bench.methods=[floor,s2ft,lora]", "bench.targets=['s2ft / lora <= 100','s2ft / floor <= 100']"]
    done = sparseft(in_tmp, "bench", *SMALL, *words, "output_dir=out", code=1)
    result = json.loads((in_tmp / "out/bench.json").read_text())
    assert result["methods"]["lora"] == {"missing": "peft is not installed"}
    assert result["methods"]["s2ft"]["ratio_to"].keys() == {"floor"}
    assert [entry["met"] for entry in result["targets"]] == [None, True]
    assert "missing: lora: peft is not installed" in done.out
    assert "NOT MEASURED: s2ft / lora <= 100 (lora: peft is not installed)" in done.out
    assert "1 of 2 targets not measured: s2ft / lora <= 100." in done.err


def test_nothing_measured_at_all_is_a_failure(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    done = sparseft(in_tmp, "bench", *SMALL, "bench.methods=[lora,dora]", "output_dir=out", code=1)
    assert done.err.splitlines()[-1] == (
        "error: Nothing was measured: every method is missing or has failed "
        "(lora: peft is not installed; dora: peft is not installed)."
    )
    assert "missing: every method: peft is not installed" in done.out
    assert json.loads((in_tmp / "out/bench.json").read_text())["complete"] is True


@pytest.mark.parametrize("place", ["contender", "measure_memory", "step"])
def test_a_method_that_raises_is_named_and_the_others_go_on(
    place: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is made, in its second step, or while its memory is counted."""
    plain, calls = getattr(train, place), []

    def breaks(first: Any, *rest: Any) -> Any:
        name = first if place == "contender" else first.name
        calls.append(name)
        if name == "s2ft" and (place != "step" or calls.count("s2ft") == 2):
            raise RuntimeError("no room\nfor this")
        return plain(first, *rest)

    monkeypatch.setattr(train, place, breaks)
    words = ["bench.methods=[floor,s2ft,sylva]", "bench.steps=3", "bench.targets=['s2ft / floor <= 100']"]
    done = sparseft(in_tmp, "bench", *SMALL, *words, "output_dir=out", code=1)
    result = json.loads((in_tmp / "out/bench.json").read_text())
    row = result["methods"]["s2ft"]
    counting = place == "measure_memory"  # its times hold
    raised = row["memory"] if counting else row
    assert raised["failed"] == "RuntimeError: no room for this" and raised["where"].startswith("sparseft/bench/t")
    assert [entry["step_seconds"] > 0 for name, entry in result["methods"].items() if name != "s2ft"] == [True, True]
    doing = " while its memory was counted" if counting else ""
    assert f"failed: s2ft{',' * counting}{doing}: RuntimeError: no room for this" in done.out
    missed = "" if counting else " 1 of 1 targets not measured: s2ft / floor <= 100."
    assert done.err.splitlines()[-1] == (
        f"error: Failed while measured: s2ft{doing} (RuntimeError: no room for this).{missed}"
    )
    assert place != "step" or calls.count("s2ft") == 2  # it took no further turns


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("the disk is gone"), 1)])
def test_ways_measured_before_an_end_are_kept(
    error: BaseException, code: int, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train.measure

    def measure(way: str, *rest: Any) -> Any:
        if way == "liger":
            raise error
        return plain(way, *rest)

    monkeypatch.setattr(train, "measure", measure)
    words = ["bench.ways=[eager,checkpointing,liger]", "bench.methods=[floor,s2ft]", "bench.targets=[]"]
    done = sparseft(in_tmp, "bench", *SMALL, *words, "output_dir=out", code=code)
    assert done.out == "" and "kept in out/bench.json, marked incomplete" in done.err
    result = json.loads((in_tmp / "out/bench.json").read_text())
    assert result["complete"] is False and list(result["ways"]) == ["eager", "checkpointing"]
    assert files(in_tmp) == {"out/bench.json", "out/config.yaml"}


def test_an_interrupt_leaves_the_rounds_that_all_have_finished(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseft.bench import timing

    spent, told = iter(range(1, 100)), []

    def seconds_of(call: Any, _device: Any) -> float:
        told.append(call)
        if len(told) == 6:  # the second one of the third round
            raise KeyboardInterrupt
        return float(next(spent))

    monkeypatch.setattr(timing, "seconds_of", seconds_of)
    words = ["bench.steps=9", "bench.methods=[floor,s2ft]", "bench.targets=['s2ft / floor <= 100']", "output_dir=out"]
    done = sparseft(in_tmp, "bench", *SMALL, *words, code=130)
    assert done.out == "" and "kept in out/bench.json, marked incomplete" in done.err
    result = json.loads((in_tmp / "out/bench.json").read_text())
    assert result["complete"] is False and result["targets"][0]["met"] is True
    # Rounds of two turn about: floor 1, s2ft 2; s2ft 3, floor 4; the fifth turn is of a round that never ended.
    assert {name: (row["step_seconds"], row["rounds"]) for name, row in result["methods"].items()} == {
        "floor": (2.5, 2),
        "s2ft": (2.5, 2),
    }
    (in_tmp / "out/bench.json").unlink()
    told[:] = [None] * 4  # in the first round
    sparseft(in_tmp, "bench", *SMALL, *words, code=130)
    assert not (in_tmp / "out/bench.json").exists()


@pytest.mark.parametrize("place", ["measure_memory", "step"])
def test_a_method_that_fails_gives_its_memory_back_at_once(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models, after = {}, []
    plain, plain_contender = getattr(train, place), train.contender

    def contender(entry: str, *rest: Any) -> contenders.Contender:
        made = plain_contender(entry, *rest)
        made.model.cycle = [made.model]  # as PEFT's models have them
        models[entry] = weakref.ref(made.model)
        return made

    def breaks(c: Any, *rest: Any) -> Any:
        if c.name == "s2ft":
            raise RuntimeError("no room")
        after.append((c.name, models["s2ft"]() is None))
        return plain(c, *rest)

    monkeypatch.setattr(train, "contender", contender)
    monkeypatch.setattr(train, place, breaks)
    result = train.run(compose("bench", [*SMALL, "bench.methods=[floor,s2ft,sylva]"]))
    row = result["methods"]["s2ft"]
    if place == "step":
        assert row["failed"] == "RuntimeError: no room"
    else:  # its times hold
        assert row["memory"]["failed"] == "RuntimeError: no room" and row["peak_memory_bytes"] is None
        assert row["step_seconds"] > 0 and row["ratio_to"]["floor"] > 0
        assert "failed: s2ft, while its memory was counted: RuntimeError: no room" in train.notes(result)
        assert "s2ft while its memory was counted (RuntimeError: no room)" in targets.failure(result)
    assert [gone for name, gone in after if name == "sylva"] == [True]


# ---- the profile ----


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("profile")
    words = [*SMALL, "bench.length=48", "bench.batch_size=2", "output_dir=out"]
    done = sparseft(folder, "bench", "train", "--profile", *words)
    return folder, json.loads((folder / "out/bench.json").read_text()), done.out


def test_a_profile_adds_up_to_the_step(profiled: tuple[Path, dict[str, Any], str]) -> None:
    _, result, out = profiled
    for name, entry in result["methods"].items():
        profile = entry["profile"]
        assert list(profile["parts"]) == list(profiling.PARTS)
        assert sum(profile["parts"].values()) == pytest.approx(profile["step_seconds"])
        assert min(profile["parts"].values()) >= -1e-9, name  # else something is counted twice
        assert profile["parts"][profiling.MATMUL] > 0 and profile["parts"][profiling.ATTENTION] > 0
        assert any(operation.endswith("mm") for operation in profile["operations"])
    assert "Where the time goes" in out and profiling.WEIGHT_GRADIENT in out


def test_a_profile_knows_what_only_some_methods_do(profiled: tuple[Path, dict[str, Any], str]) -> None:
    methods = {name: entry["profile"]["parts"] for name, entry in profiled[1]["methods"].items()}
    assert methods["floor"][profiling.WEIGHT_GRADIENT] == methods["floor"][profiling.OPTIMIZER] == 0
    for name in ("s2ft", "sylva", "lora", "full"):
        assert methods[name][profiling.WEIGHT_GRADIENT] > 0 and methods[name][profiling.OPTIMIZER] > 0, name
    assert methods["s2ft"][profiling.WEIGHT_GRADIENT] < methods["full"][profiling.WEIGHT_GRADIENT]


def test_traces_can_be_opened(profiled: tuple[Path, dict[str, Any], str]) -> None:
    folder, result, _ = profiled
    traces = {f"out/{entry['profile']['trace']}" for entry in result["methods"].values()}
    assert len(traces) == 5 and traces == {name for name in files(folder) if "trace" in name}
    for trace in traces:
        events = json.loads(gzip.decompress((folder / trace).read_bytes()))["traceEvents"]
        assert any(event.get("name") == profiling.STEP for event in events)


def test_figures_outlive_a_profiler_that_fails(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = profiling._record, []

    def record(call: Any, device: Any) -> Any:
        seen.append(json.loads((in_tmp / "out/bench.json").read_text()))  # already there: a kill leaves it too
        if call.args[0].name == "s2ft":
            raise RuntimeError("no room")
        return plain(call, device)

    monkeypatch.setattr(profiling, "_record", record)
    words = ["bench.methods=[floor,s2ft,sylva]", "output_dir=out"]
    done = sparseft(in_tmp, "bench", "--profile", *SMALL, *words, code=1)
    result = json.loads((in_tmp / "out/bench.json").read_text())
    assert seen[0]["complete"] is False and result["complete"] is True
    for name, entry in result["methods"].items():
        assert entry["step_seconds"] == seen[0]["methods"][name]["step_seconds"] and entry["peak_memory_bytes"] > 0
        assert entry["profile"].keys() >= ({"failed", "where"} if name == "s2ft" else {"parts", "trace"})
    assert "failed: s2ft, under the profiler: RuntimeError: no room" in done.out
    assert done.err.splitlines()[-1] == "error: Failed while measured: s2ft under the profiler (RuntimeError: no room)."
    assert {name for name in files(in_tmp) if "trace" in name} == {"out/trace-floor.json.gz", "out/trace-sylva.json.gz"}


def test_figures_outlive_an_interrupted_profile(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(profiling, "_record", record)
    words = ["bench.methods=[floor,s2ft]", "output_dir=out", "bench.ways=[eager,checkpointing]"]
    done = sparseft(in_tmp, "bench", "--profile", *SMALL, *words, code=130)
    assert "kept in out/bench.json, marked incomplete" in done.err
    result = json.loads((in_tmp / "out/bench.json").read_text())
    assert result["complete"] is False and list(result["ways"]) == ["eager"]
    assert all(entry["peak_memory_bytes"] > 0 and "rounds" not in entry for entry in result["methods"].values())


def test_products_that_sum_over_tokens_are_weight_gradients() -> None:
    tokens = 96
    cases = [
        ([[64, 96], [96, 192]], False, True),  # dYᵀ X
        ([[96, 192], [192, 64]], True, False),  # dY W
        ([[96, 96], [96, 64]], True, False),  # as many features as tokens: the input's gradient comes first
        ([[96, 96], [96, 64]], False, True),
        ([[3, 16, 96], [3, 96, 16]], True, True),  # blocks
        ([[64], [96, 192], [192, 64], [], []], True, False),  # addmm
        ([[], []], True, False),
    ]
    for shapes, first, expected in cases:
        assert profiling.sums_over_tokens(shapes, tokens, first) == expected, shapes


# ---- what is saved ----


def duplicates(c: contenders.Contender) -> int:
    """Bytes saved for the backward pass of which another saved storage, or the model, has a copy."""
    own = {t.untyped_storage().data_ptr() for t in (*c.model.parameters(), *c.model.buffers())}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            seen.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        contenders.loss_of(c, batch())
    contents: set[bytes] = set()
    twice = 0
    for tensor in seen.values():
        content = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy().tobytes()
        twice += len(content) if content in contents and content.strip(b"\0") else 0
        contents.add(content)
    return twice


@pytest.mark.parametrize("name", ["s2ft", "sylva"])
def test_nothing_is_saved_twice(name: str) -> None:
    """The sparse layers save no second copy of a whole: neither of what they share nor of what the model saves."""
    assert duplicates(made(name, width=128)) == duplicates(made("floor", width=128)) == 0


def test_the_duplicates_test_sees_a_copy() -> None:
    class Twice(nn.Module):
        def get_input_embeddings(self) -> Any:
            return lambda ids: ids.float()

        def forward(self, inputs_embeds: torch.Tensor, labels: Any, use_cache: bool) -> Any:
            loss = (inputs_embeds * inputs_embeds.clone()).sum()
            return type("Output", (), {"loss": loss})

    assert duplicates(contenders.Contender("floor", Twice(), None, 0)) == 2 * 48 * 4


def test_what_is_computed_again_is_not_kept(in_tmp: Path) -> None:
    """In the ways of `trainer.checkpointing`, and one by a single kind."""
    words = ["bench.methods=[floor,sylva]", "bench.targets=[]", "bench.ways=[eager,activations,selective,selective_up]"]
    sparseft(in_tmp, "bench", *SMALL, "bench.depth=2", *words, "output_dir=out")
    ways = json.loads((in_tmp / "out" / "bench.json").read_text())["ways"]
    for method in ("floor", "sylva"):
        saved = [ways[way][method]["saved_bytes"] for way in ("eager", "activations", "selective")]
        assert saved == sorted(saved, reverse=True) and len(set(saved)) >= 2
    assert ways["selective_up"]["floor"]["saved_bytes"] < ways["selective"]["floor"]["saved_bytes"]

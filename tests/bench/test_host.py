"""`sparseft bench host`: what it leaves out and what not, and its table."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseft.bench import contenders, host
from sparseft.bench.models import random_llama
from sparseft.bench.sharing import SharedWeights
from sparseft.compose.run_config import compose
from sparseft.kernels import dispatch
from sparseft.layers import sparse_layers
from sparseft.training.optimizer import SparseAdamW
from support.running import refused, sparseft

CPU = torch.device("cpu")
SYLVA = "sylva block_size=8"


def made(name: str) -> contenders.Contender:
    config = compose("bench", ["sparsity=0.9", "method=sylva", "method.block_size=8"])
    return contenders.contender(name, SharedWeights(random_llama(64, 2, torch.float32, seed=0)), config)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(2048, (1, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


# ---- what is left out ----


@pytest.mark.parametrize("name", ["s2ft", "sylva"])
def test_a_step_goes_the_kernels_way_up_to_the_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    jit = pytest.importorskip("triton.runtime.jit")
    launched: list[Any] = []
    monkeypatch.setattr(host, "no_launch", lambda kernel, *_, grid, **__: launched.append(kernel.fn.__name__))
    plain = (dispatch.kernel_for, SparseAdamW.kernel_devices, jit.JITFunction.run)
    c = made(name)
    before = {key: value.clone() for key, value in c.model.state_dict().items()}
    spent = host.without_launches(c, batch(), CPU)
    assert list(spent) == ["passes", "update"] and min(spent.values()) > 0
    assert 1 <= launched.count("_adamw_kernel") <= 2  # for all deltas together, which have one kind
    assert len(c.optimizer.state) == len(sparse_layers(c.model))
    for key, value in c.model.state_dict().items():  # nothing was computed
        assert torch.equal(value, before[key]), key
    assert plain == (dispatch.kernel_for, SparseAdamW.kernel_devices, jit.JITFunction.run)
    for parameter in contenders.trainable_parameters(c.model).values():
        assert parameter.grad is None


def test_gradients_left_out_are_as_real_ones_but_for_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    c = made("sylva")
    contenders.loss_of(c, batch()).backward()
    real = {name: p.grad for name, p in contenders.trainable_parameters(c.model).items()}
    c.model.zero_grad(set_to_none=True)
    launched: list[str] = []
    monkeypatch.setattr(host, "no_launch", lambda kernel, *_, grid, **__: launched.append(kernel.fn.__name__))
    with host.launches_left_out():
        contenders.loss_of(c, batch()).backward()
    assert launched and not any("adamw" in name for name in launched)
    for name, parameter in contenders.trainable_parameters(c.model).items():
        assert parameter.grad.shape == real[name].shape and parameter.grad.dtype == real[name].dtype
        assert parameter.grad.stride() == real[name].stride()


def test_reference_products_are_real_and_nothing_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    c = made("sylva")
    contenders.loss_of(c, batch()).backward()
    real = {name: p.grad for name, p in contenders.trainable_parameters(c.model).items()}
    c.model.zero_grad(set_to_none=True)
    plain, seen = host.passes, []

    def passes(*arguments: Any) -> None:
        plain(*arguments)
        found = contenders.trainable_parameters(c.model)
        seen.append((dispatch.mode(), all(torch.equal(real[name], p.grad) for name, p in found.items())))

    monkeypatch.setattr(host, "passes", passes)
    monkeypatch.setenv(dispatch.VARIABLE, "auto")
    assert host.with_reference(c, batch(), CPU) > 0
    assert seen == [("reference", True)] and dispatch.mode() == "auto"
    assert not c.optimizer.state and all(p.grad is None for p in c.model.parameters())
    monkeypatch.delenv(dispatch.VARIABLE)
    host.with_reference(c, batch(), CPU)
    assert dispatch.VARIABLE not in os.environ


# ---- the command ----


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str, str]:
    folder = tmp_path_factory.mktemp("host")
    targets = ["s2ft d_ratio=0.03 / floor <= 100", f"update {SYLVA} <= 0.0001 ms"]
    words = ["bench.steps=4", "bench.warmup_steps=1", f"bench.targets=[{','.join(map(repr, targets))}]"]
    done = sparseft(folder, "bench", "host", *words, "output_dir=out", code=1)
    return folder, json.loads((folder / "out/bench.json").read_text()), done.out, done.err


def test_by_itself_it_measures_a_model_as_deep_as_a_7b(measured: tuple[Path, dict[str, Any], str, str]) -> None:
    result = measured[1]
    assert result["model"] == "llama-64x32, random weights" and result["batch_size"] * result["length"] == 8
    tensors = {name: entry["trained_tensors"] for name, entry in result["methods"].items()}
    assert tensors["floor"] == 0 and tensors["lora"] == 2 * 7 * 32
    s2ft = [count for name, count in tensors.items() if name.startswith("s2ft")]
    assert sorted(s2ft) == [32, 64] and tensors[SYLVA] == 7 * 32  # in every layer, as at the size of a 7B
    assert result["threads"] == 1 and torch.get_num_threads() == result["environment"]["threads"]


def test_its_figures_agree(measured: tuple[Path, dict[str, Any], str, str]) -> None:
    methods = measured[1]["methods"]
    floor = methods["floor"]["passes_seconds"]
    for name, entry in methods.items():
        assert 0 < entry["passes_seconds_p20"] <= entry["passes_seconds"] <= entry["passes_seconds_p80"]
        assert entry["ratio_to"] == {"floor": pytest.approx(entry["passes_seconds"] / floor)}
        assert entry["reference_ratio_to"] == {"floor": pytest.approx(entry["reference_seconds"] / floor)}
        assert ("update_seconds" in entry) == (name != "floor")
        assert (entry["reference_seconds"] == entry["passes_seconds"]) == (name != SYLVA)
    judged = measured[1]["targets"]
    assert [entry["met"] for entry in judged] == [True, False]
    assert judged[1]["measured"] == methods[SYLVA]["update_seconds"]


def test_its_table(measured: tuple[Path, dict[str, Any], str, str]) -> None:
    _, result, out, err = measured
    lines = out.splitlines()
    assert lines[0].startswith("Host's part of a step: llama-64x32") and "1 thread)" in lines[0]
    assert "launches left out" in lines[0] and "passes ms" in lines[1] and "reference ms" in lines[1]
    assert [line.split()[0] for line in lines[3:8]] == ["floor", "s2ft", "s2ft", "sylva", "lora"]
    assert lines[3].split()[-3:] == ["-", "-", "0"]
    assert f"{1000 * result['methods'][SYLVA]['update_seconds']:.2f}" in lines[6]
    assert f"MISSED: update {SYLVA} <= 0.0001 ms" in out and "met: s2ft d_ratio=0.03 / floor <= 100" in out
    assert err.splitlines()[-1] == f"error: 1 of 2 targets missed: update {SYLVA} <= 0.0001 ms."


def test_another_experiment_or_model_is_measured_instead(in_tmp: Path) -> None:
    words = ["bench.shape=null", "bench.width=64", "bench.depth=1", "bench.steps=1", "bench.warmup_steps=0",
             "bench.targets=[]", "--json"]  # fmt: skip
    result = sparseft(in_tmp, "bench", "host", "experiment=step_llama2_7b", "hardware.device=cpu",
                      "bench.methods=[s2ft]", "bench.length=8", "sparsity=0.9", *words).json  # fmt: skip
    assert result["model"] == "llama 64x1" and result["dtype"] == "bfloat16"
    assert list(result["methods"]) == ["s2ft"] and result["methods"]["s2ft"]["ratio_to"] == {}
    assert sparseft(in_tmp, "bench", "host", "--cfg").out.count("llama-64x32") == 1


def test_a_method_that_raises_takes_no_further_turns(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = host.loss_of, []

    def breaks(c: contenders.Contender, *rest: Any) -> Any:
        calls.append(c.name)
        if c.name == SYLVA and calls.count(SYLVA) == 7:
            raise RuntimeError("no room")
        return plain(c, *rest)

    monkeypatch.setattr(host, "loss_of", breaks)
    words = ["bench.shape=null", "bench.width=64", "bench.depth=1", "bench.steps=3", "bench.targets=[]"]
    done = sparseft(in_tmp, "bench", "host", *words, "output_dir=out", code=1)
    methods = json.loads((in_tmp / "out/bench.json").read_text())["methods"]
    assert methods[SYLVA]["failed"] == "RuntimeError: no room" and methods["lora"]["passes_seconds"] > 0
    assert calls.count(SYLVA) == 7 and f"failed: {SYLVA}: RuntimeError: no room" in done.out
    assert f"Failed while measured: {SYLVA} (RuntimeError: no room)." in done.err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["bench.targets=['peak lora <= 1 GB']"], ["peak lora", "expected passes, reference, update"]),
        (["bench.targets=['update lroa <= 1 ms']"], ["no contender 'lroa'", "lora"]),
        (["bench.ways=[compile]"], ["bench.ways", "bench train"]),
        (["bench.methods=[]"], ["bench.methods"]),
        (["trainer.compile=model"], ["trainer.compile=model", "plain steps only"]),
        (["experiment=step_llama2_7b"], ["bench.targets", "peak s2ft <= bound"]),
    ],
)
def test_what_it_refuses(words: list[str], parts: list[str], in_tmp: Path) -> None:
    message = refused(in_tmp, "bench", "host", *words)
    for part in parts:
        assert part in message

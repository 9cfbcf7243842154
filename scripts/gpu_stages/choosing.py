"""What choosing costs beside plain passes, and that the device chooses what the CPU chooses."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch

from gpu_stages.clock import wait
from gpu_stages.findings import Expected, Findings, at_least, at_most
from gpu_stages.models import SPARSITY, made, shape_of
from sparseft.bench.preprocess import forward_backward
from sparseft.methods import get_method
from sparseft.selection.compute import compute_selection
from support.oracles import chosen_units

RATIO: dict[str, Expected] = {"sylva": at_most(1.8)}


def work(findings: Findings) -> None:
    with findings.attempt("the device's selection"):
        _alike(findings)
    layers, samples, length = (2, 4, 16) if findings.dry else (4, 16, 512)
    shape = shape_of("llama2-7b", findings.dry, num_hidden_layers=layers)
    model = made(shape, findings.device).requires_grad_(True)
    batches = batches_of(shape["vocab_size"], samples, length, findings.device)
    reference = _seconds(lambda: forward_backward(model, batches))
    findings.number(f"forward and backward, {layers} layers, {samples} samples", reference, "s")
    for importance in ("activation", "gradient", "fisher", "sylva"):
        with findings.attempt(importance):
            name = "sylva" if importance == "sylva" else "s2ft"
            config = get_method(name)(sparsity=SPARSITY, importance=importance, num_samples=samples)
            seconds = _seconds(lambda config=config: compute_selection(model, config, batches))
            findings.number(f"{name} by {importance}", seconds, "s")
            findings.number(f"{name} by {importance} ÷ passes", seconds / reference, "", RATIO.get(importance))


def batches_of(vocabulary: int, samples: int, length: int, device: str) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, vocabulary, (samples, length), generator=torch.Generator().manual_seed(1)).to(device)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in ids.split(4)]


def _seconds(call: Any) -> float:
    """Seconds of the second of two calls."""
    call()
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def _alike(findings: Findings) -> None:
    """Of a small model in fp32: the units that both choose, as a share of those that the CPU chooses."""
    shape = shape_of("llama2-7b", True)
    model = made(shape, "cpu", torch.float32).requires_grad_(True)
    batches = batches_of(shape["vocab_size"], 8, 32, "cpu")
    for name, settings in (("sylva", {"block_size": 16}), ("s2ft", {"importance": "fisher"})):
        config = get_method(name)(sparsity=0.9, num_samples=8, **settings)
        expected = chosen_units(compute_selection(model, config, batches))
        there = copy.deepcopy(model).to(findings.device)
        moved = [{key: value.to(findings.device) for key, value in batch.items()} for batch in batches]
        found = chosen_units(compute_selection(there, config, moved))
        share = len(expected & found) / len(expected)
        findings.number(f"{name}: units chosen as on the CPU", 100 * share, "%", at_least(99))

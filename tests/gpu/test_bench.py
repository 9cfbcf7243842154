"""Contenders of `bench train` on the device: one model's weights for all of them, and nothing left behind by a step."""

from __future__ import annotations

import gc

import pytest
import torch

from sparseft.bench.contenders import contender, measure_memory, step
from sparseft.bench.models import random_model
from sparseft.bench.sharing import SharedWeights
from sparseft.compose.run_config import compose

SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
         "num_key_value_heads": 2, "vocab_size": 4096}  # fmt: skip


@pytest.mark.gpu
def test_contenders_share_weights_and_leave_nothing_behind() -> None:
    config = compose("bench", ["sparsity=0.984", "model.dtype=bfloat16", "hardware.device=cuda"])
    base = random_model(SHAPE, torch.bfloat16, 0, "cuda")
    weights, whole = SharedWeights(base), sum(p.numel() * p.element_size() for p in base.parameters())
    ids = torch.randint(SHAPE["vocab_size"], (4, 512), device="cuda")
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    contenders = []
    for name in ("floor", "s2ft", "sylva", "lora"):
        before = torch.cuda.memory_allocated()
        contenders.append(contender(name, weights, config))
        gc.collect()
        assert torch.cuda.memory_allocated() - before < 0.2 * whole, f"{name} has weights of its own"
    for made in contenders:
        step(made, batch)  # brings the optimizer's state
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        step(made, batch)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() - before < 0.01 * whole, f"a step of {made.name} keeps something"
        measure_memory(made, batch, torch.device("cuda"))
        gc.collect()
        assert torch.cuda.memory_allocated() - before < 0.01 * whole, f"counting {made.name}'s memory keeps something"

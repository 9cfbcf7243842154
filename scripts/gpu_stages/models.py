"""Random models of published shapes, each trained by one method after another without a copy of its weights."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparseft.adapters.lifecycle import attach, detach, trainable_parameters
from sparseft.bench.models import SHAPES, random_model, square_shape
from sparseft.methods import get_method
from sparseft.training.optimizer import SparseAdamW

SPARSITY = 0.984  # of the papers' budgets: 1.6 % of the linear weights
DRY_SHAPE = square_shape(128, 2)  # as `bench.width=128 bench.depth=2`
# Methods by the names that the tables have: settings, and whether peft's adapters are in the model's dtype.
METHODS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "s2ft, down 0.03": ("s2ft", {"d_ratio": 0.03}, False),
    "s2ft, o and down": ("s2ft", {"sparsity": SPARSITY}, False),
    "sylva": ("sylva", {"sparsity": SPARSITY}, False),
    "lora, adapters in fp32": ("lora", {"sparsity": SPARSITY}, False),
    "lora rank 40, in bf16": ("lora", {"rank": 40}, True),
}


def shape_of(name: str, dry: bool, **changes: Any) -> dict[str, Any]:
    return (DRY_SHAPE if dry else SHAPES[name]) | changes


def made(shape: Mapping[str, Any], device: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A Llama of random weights, made where it is to be, frozen."""
    return random_model(dict(shape), dtype, 0, device).requires_grad_(False).train()


def batch_of(model: nn.Module, rows: int, length: int) -> dict[str, torch.Tensor]:
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(next(model.parameters()).device)
    return {"input_ids": ids, "labels": ids}


def floor_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Forward and backward of the frozen model, the gradient flowing to its embeddings."""

    def step() -> None:
        embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
        model(inputs_embeds=embedded, labels=batch["labels"], use_cache=False).loss.backward()

    return step


@contextmanager
def trained_by(name: str, model: nn.Module, batch: dict[str, torch.Tensor]) -> Iterator[Callable[[], None]]:
    """A step of the method; afterwards the model is plain again, bit for bit, and nothing of the method is left."""
    method, settings, narrow = METHODS[name]
    cls = get_method(method)
    attached = attach(model, cls(**settings).for_benchmark()).train()
    parameters = list(trainable_parameters(attached).values())
    if narrow:
        for parameter in parameters:
            parameter.data = parameter.data.to(model.dtype)
    optimizer: torch.optim.Optimizer
    if cls.sparse:
        optimizer = SparseAdamW(parameters, lr=1e-4, weight_decay=0.0)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    held = [(attached, optimizer)]  # what the caller still has of the step afterwards holds nothing

    def step() -> None:
        trained, updates = held[0]
        trained(**batch, use_cache=False).loss.backward()
        updates.step()
        updates.zero_grad(set_to_none=True)

    try:
        yield step
    finally:
        held.clear()
        detach(attached).requires_grad_(False)
        del attached, parameters, optimizer
        free()


def free() -> None:
    """Gives back what nothing holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

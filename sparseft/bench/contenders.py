"""One method's model and optimizer, made for measuring, and the step that is measured.

`floor` is the same model frozen, with the gradient flowing to the embeddings: what fine-tuning in place cannot beat
unless layers need no backward at all. No method has dropout; all use AdamW: sparse methods the one that training takes
for them, the others torch's fused one.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.adapters.lifecycle import attach, trainable_count, trainable_parameters
from sparseft.bench.timing import held_bytes, peak_bytes
from sparseft.config import RunConfig
from sparseft.memory import SavedBytes, tensor_bytes
from sparseft.methods import get_method
from sparseft.training.optimizer import SparseAdamW

FLOOR = "floor"


@dataclass
class Contender:
    """One method's model, optimizer and measurements."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    trainable: int
    call: Callable[..., Any] | None = None  # what runs in the model's place (it, compiled); null: the model
    facts: dict[str, Any] = field(default_factory=dict)  # further figures of its row
    seconds: list[float] = field(default_factory=list)
    saved_bytes: int | None = None  # null: not counted
    peak_bytes: int | None = None


def method_config(name: str, config: RunConfig, own: Mapping[str, Any] | None = None) -> Any:
    """The run's own settings for its method, the defaults for the others; nothing that needs data, no dropout.

    `own` are the contender's, which win: with a budget of its own (a rank, ratios) the run's sparsity does not count.
    """
    cls = get_method(name)
    own = dict(own or {})
    settings = dataclasses.asdict(config.method) if name == config.method_name else {}
    for key, value in (("sparsity", config.sparsity), ("scope", config.scope)):
        if key in {f.name for f in dataclasses.fields(cls)} and value is not None:
            settings[key] = value
    made = cls(**settings | own)
    if "sparsity" in settings and own and "sparsity" not in own and cls(**own).wanted_sparsity is None:
        made.sparsity = None
    return made.for_benchmark()


def contender(entry: str, base: nn.Module, config: RunConfig, own: Mapping[str, Any] | None = None) -> Contender:
    """A copy of `base` made trainable by the method that `entry` starts with, with its optimizer.

    own: settings of the method, as the rest of the entry gives them.
    """
    name = entry.split()[0]
    model = copy.deepcopy(base)
    if name == FLOOR:
        return Contender(entry, model.requires_grad_(False).train(), None, 0)
    model = attach(model, method_config(name, config, own)).train()
    parameters = list(trainable_parameters(model).values())
    optimizer: torch.optim.Optimizer
    if get_method(name).sparse:  # as training does
        optimizer = SparseAdamW(parameters, lr=1e-4, weight_decay=0.0)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    return Contender(entry, model, optimizer, trainable_count(model))


def loss_of(c: Contender, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a batch; the floor's gradient begins at its embeddings.

    They are looked up before the model is called: a compiler cannot follow a tensor that begins to ask for a gradient.
    """
    if c.name == FLOOR:
        embedded = c.model.get_input_embeddings()(batch["input_ids"]).requires_grad_(True)
        batch = {"inputs_embeds": embedded, **{name: value for name, value in batch.items() if name != "input_ids"}}
    return (c.model if c.call is None else c.call)(**batch, use_cache=False).loss


def step(c: Contender, batch: dict[str, Tensor], accumulation: int = 1) -> None:
    """One optimizer step: `accumulation` times forward and backward, then the update (the floor has none)."""
    for _ in range(accumulation):
        loss_of(c, batch).backward()
    if c.optimizer is not None:
        c.optimizer.step()
        c.optimizer.zero_grad(set_to_none=True)


def measure_memory(
    c: Contender, batch: dict[str, Tensor], device: torch.device, accumulation: int = 1, recomputes: bool = False
) -> None:
    """Saved bytes of a forward pass, and the peak of a step: the method's resident tensors plus what the step adds.

    recomputes: the activations are recomputed in the backward pass: autograd does not see what is kept for that.
    """
    if recomputes:
        c.saved_bytes = held_bytes(lambda: loss_of(c, batch), device)
    else:
        saved = SavedBytes(c.model)
        with saved.counting():
            loss = loss_of(c, batch)
        c.saved_bytes = saved.total
        del loss
    states = c.optimizer.state.values() if c.optimizer is not None else ()
    state = [value for entry in states for value in entry.values() if isinstance(value, Tensor)]
    resident = tensor_bytes([*c.model.parameters(), *c.model.buffers(), *state])
    c.peak_bytes = resident + peak_bytes(lambda: step(c, batch, accumulation), device)

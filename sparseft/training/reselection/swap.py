"""Re-selection during training: every so many optimizer steps the layers swap their units for others."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from sparseft import console
from sparseft.adapters.description import read_config
from sparseft.adapters.sparse import read_sparse
from sparseft.adapters.state import state_of
from sparseft.distributed.deepspeed import whole_moments
from sparseft.layers import share_inputs, sparse_layers
from sparseft.layers.inactive import restore_active, swap
from sparseft.layers.pattern import Pattern, entry_dim
from sparseft.layers.permuted_layout import Plan, carry_out, in_stored_order
from sparseft.layers.saved_inputs import share_inputs_in_training
from sparseft.runs.folder import ADAPTER, SELECTION  # of a checkpoint: what was trained, what trained when it was saved
from sparseft.selection.selection import Selection

WARMUP_STEPS = 5  # after a re-selection, at most a third of the steps until the next


def apply_selection(model: nn.Module, selection: Selection, optimizer: Any = None) -> float:
    """Trains `selection` from now on, in every layer as many entries as before; returns the share of newcomers.

    With the optimizer, entries that stay keep their moments and newcomers start at zero.
    """
    layers = sparse_layers(model)
    plan = _plan(model, selection)
    modules = selection.modules if plan is None else in_stored_order(selection.modules, plan)
    new = total = 0
    for module, kinds in modules.items():
        for kind, index in kinds.items():
            source = swap(layers[module], kind, index)
            if optimizer is not None:
                move_moments(optimizer, layers[module].patterns[kind], source)
            new += int((source < 0).sum())
            total += len(source)
    share_inputs(model)  # a compiled pass does not look for itself
    share_inputs_in_training(model)  # others may make again what is saved here (`recomputing`)
    if plan is not None:
        carry_out(model, plan)
    return new / total


def move_moments(optimizer: torch.optim.Optimizer, pattern: Pattern, source: Tensor) -> None:
    """Rearranges the optimizer's state after `swap`: entries that stayed keep their moments, newcomers start at 0.

    State of another shape than the delta (Adafactor's factored moments) cannot be taken apart and starts anew.
    """
    state = optimizer.state.get(pattern.delta)
    if not state:
        return
    stays = (source >= 0).nonzero().flatten()
    dim = entry_dim(pattern.kind)
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.numel() <= 1:
            continue  # step counts
        if value.shape != pattern.delta.shape:
            del optimizer.state[pattern.delta]
            return
        moved = torch.zeros_like(value)
        kept = value.index_select(dim, source[stays].to(value.device))
        state[name] = moved.index_copy_(dim, stays.to(value.device), kept)


def _plan(model: nn.Module, selection: Selection) -> Plan | None:
    """What brings the selected units to the front, as at attach; None where the layout is not permuted."""
    state = state_of(model)
    return None if state is None else state.config.layout_plan(model, selection, state.spec)


class Reselection(transformers.TrainerCallback):
    """Chooses anew every `steps` optimizer steps; the learning rate then climbs back over a few steps.

    `choose(step)` gives the selection. What happens at a step depends on its number alone, so a resumed run does the
    same. After a run's last step there is none: `ended_at` is the step where a run ended that now goes on, and it
    makes up for it.
    """

    def __init__(
        self, steps: int, choose: Callable[[int], Selection], clock: Any = None, ended_at: int | None = None
    ) -> None:
        self.steps, self.choose, self.clock, self.ended_at = steps, choose, clock, ended_at
        self.warmup = min(WARMUP_STEPS, steps // 3)
        self.rates: list[float] = []
        self.seconds = 0.0  # spent on choosing, in this process: of a resumed run since then

    def save(self, folder: Path) -> None:
        """Writes what the next choice depends on, beside the step's number, into a checkpoint's folder."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step and state.global_step == self.ended_at:
            self.on_step_end(args, state, control, **kwargs)

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        # Not right before the update: under DeepSpeed that is part of the last backward pass.
        since = state.global_step % self.steps
        if state.global_step >= self.steps and since < self.warmup:
            self.rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * (since + 1) / (self.warmup + 1)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        for group, rate in zip(optimizer.param_groups, self.rates, strict=False):
            group["lr"] = rate
        self.rates = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        if state.global_step % self.steps == 0 and state.global_step < state.max_steps:
            start = time.perf_counter()
            with self.clock.paused() if self.clock is not None else contextlib.nullcontext():
                selection = self.choose(state.global_step)
                deltas = [p.delta for layer in sparse_layers(model).values() for p in layer.patterns.values()]
                with whole_moments(optimizer, deltas) as moments:
                    share = apply_selection(model, selection, moments)
            self.seconds += time.perf_counter() - start
            console.log(f"re-selection at step {state.global_step}: {share:.0%} of the units are others than before")


def save_active(model: nn.Module, folder: Path) -> None:
    """Writes what trains at the moment, where re-selection has left inactive entries beside it."""
    layers = sparse_layers(model)
    patterns = [p for layer in layers.values() for p in layer.patterns.values()]
    if any(p.inactive is not None for p in patterns):
        sizes = {p.block_size for p in patterns if p.block_size}
        active = {
            name: {kind: p.index.cpu() for kind, p in layer.patterns.items()}
            for name, layer in layers.items()
            if layer.patterns
        }
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        Selection(active, block_size=max(sizes, default=None)).save(folder / SELECTION, shapes)


def load_active(model: nn.Module, folder: Path) -> bool:
    """Continues where `save_active` stood; false where the checkpoint's adapter is all that trains."""
    if not (folder / SELECTION).is_dir():
        return False
    active = Selection.load(folder / SELECTION)
    values = read_sparse(folder / ADAPTER, read_config(folder / ADAPTER))
    layers = sparse_layers(model)
    for module, kinds in active.modules.items():
        for kind, index in kinds.items():
            value = values[module][kind]
            restore_active(layers[module], kind, index, value.index, value.delta)
    share_inputs(model)
    plan = _plan(model, active)
    if plan is not None:  # as the uninterrupted run has it, to the bit
        carry_out(model, plan)
    return True

"""Re-selection one decoder layer at a time, by the sensitivity of its weights (LoSiA, arXiv 2507.04487, §3.2).

Each layer has a turn of so many optimizer steps, one after another and then again from the first. In its turn the whole
gradients of its linears are made beside those of what trains; at the end its grids are chosen by them. So choosing
takes no pass of its own, and never more memory than for one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.distributed import ranks
from sparseft.errors import UserError
from sparseft.files.tensors import read_tensors
from sparseft.importance.sensitivity import Sensitivity
from sparseft.importance.units import generator_for
from sparseft.kernels import grid
from sparseft.kernels.reference import token_product
from sparseft.layers import SparseLinear, sparse_layers
from sparseft.models.spec import ModelSpec
from sparseft.runs.folder import SENSITIVITY
from sparseft.selection.grids import chosen_grid
from sparseft.selection.selection import Selection
from sparseft.training.reselection.running import operands
from sparseft.training.reselection.swap import Reselection


def turns_of(model: nn.Module, spec: ModelSpec) -> list[list[str]]:
    """The linears that train, by decoder layer, from the first that has any."""
    by_layer: dict[int, list[str]] = {}
    for name, layer in sparse_layers(model).items():
        if layer.patterns:
            by_layer.setdefault(spec.layer_of[name], []).append(name)
    return [by_layer[number] for number in sorted(by_layer)]


class Turns(Reselection):
    """Chooses the grids of one decoder layer anew every `steps` optimizer steps.

    After its turn a layer's learning rate climbs from near zero over the next `steps` steps; the others' stays. What
    happens at a step depends on its number and on the averages, which checkpoints hold, so a resumed run does the same.

    Args:
        turns: of each layer the linears that train.
        order, seed: as for the first selection; the seed changes with the step.
        resumed: the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        steps: int,
        model: nn.Module,
        turns: Sequence[Sequence[str]],
        *,
        order: str,
        seed: int,
        clock: Any = None,
        ended_at: int | None = None,
        resumed: str | None = None,
    ) -> None:
        super().__init__(steps, self._choose, clock, ended_at)
        self.order, self.seed = order, seed
        layers = sparse_layers(model)
        self.turns = [{name: layers[name] for name in names} for names in turns]
        self.sums: dict[str, Sensitivity] = {}  # of the layer whose turn it is
        self._hooks: list[Any] = []
        self._before: dict[Tensor, Tensor] = {}  # deltas that take a part of the step alone
        if resumed is not None and (file := Path(resumed) / SENSITIVITY).is_file():
            self._load(file)

    def turn(self, step: int) -> dict[str, SparseLinear]:
        """The linears of the layer whose turn is at a step, counted from 0."""
        return self.turns[step // self.steps % len(self.turns)]

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        step = state.global_step
        if not self._hooks:
            self._watch(self.turn(step))
        if step >= self.steps:
            chosen = self.turn(step - self.steps).values()
            deltas = [pattern.delta for layer in chosen for pattern in layer.patterns.values()]
            self._before = {delta: delta.detach().clone() for delta in deltas}

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        for name, layer in self.turn(state.global_step).items():
            self.sums[name].step(layer.logical_weight)

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        # A step of AdamW is proportional to the learning rate, so a part of it is one at that part of the rate.
        if not self._before:
            return
        part = (state.global_step % self.steps + 1) / (self.steps + 1)
        for delta, before in self._before.items():
            delta.copy_(before.lerp(delta, part))
        self._before = {}
        for layer in self.turn(state.global_step - self.steps).values():
            layer.write_back()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step % self.steps == 0 and state.global_step < state.max_steps:
            self._leave()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._unhook()

    def save(self, folder: Path) -> None:
        """Writes the averages into a checkpoint's folder; right after a choice there are none."""
        from safetensors.torch import save_file

        found = {}
        for name, own in self.sums.items():
            found |= {f"{name}.average": own.average.cpu(), f"{name}.spread": own.spread.cpu()}
        if found:
            save_file(found, folder / SENSITIVITY)

    def _load(self, file: Path) -> None:
        tensors = read_tensors(file, "checkpoint")
        layers = {name: layer for turn in self.turns for name, layer in turn.items()}
        names = {name.rpartition(".")[0] for name in tensors}
        wanted = {f"{name}.{part}" for name in names for part in ("average", "spread")}
        if not names <= layers.keys() or wanted != tensors.keys():
            raise UserError(f"{file}: holds the sensitivity of other linears than the model trains.")
        for name in names:
            own = self._fresh(layers[name])
            for part in ("average", "spread"):
                value = tensors[f"{name}.{part}"]
                if value.shape != own.average.shape or value.dtype != torch.float32:
                    raise UserError(f"{file}: '{name}.{part}' does not fit the model's linear.")
                setattr(own, part, value.to(own.average.device))
            self.sums[name] = own

    @staticmethod
    def _fresh(layer: SparseLinear) -> Sensitivity:
        return Sensitivity((layer.out_features, layer.in_features), layer.weight.device)

    def _watch(self, layers: dict[str, SparseLinear]) -> None:
        for name, layer in layers.items():
            if name not in self.sums:
                self.sums[name] = self._fresh(layer)
            self._hooks.append(layer.register_forward_hook(operands(_adding_to(self.sums[name]))))

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _leave(self) -> None:
        """The turn is over."""
        self._unhook()
        self.sums = {}

    def _choose(self, step: int) -> Selection:
        """The grids of the layer whose turn ends with `step`, of the same sizes."""
        chosen = {}
        for name, layer in self.turn(step - 1).items():
            index, scores = layer.patterns["grid"].index.cpu(), self.sums[name].scores()
            if scores.any():  # else every step was bad, and what trains stays
                index = chosen_grid(
                    scores, grid.sides(index), self.order, generator_for(self.seed + step, "choose", name)
                )
            chosen[name] = {"grid": index}
        return ranks.broadcast_object(Selection(chosen))


def _adding_to(own: Sensitivity) -> Callable[[Tensor, Tensor], None]:
    """Makes a linear's whole gradient of what the backward pass shows, and adds it."""
    return lambda x, gradient: own.add(token_product(gradient, x))

"""Re-selection by the gradients that training computes anyway: no calibration pass, no sample beyond its own.

The backward pass of a step has what a linear was given and the gradient of what it gave, which is all that its whole
weight's gradient is made of. So the layers take turns: between two selections each decoder layer is looked at in some
of the steps, one layer at a time where there are steps enough, and every unit of it, trained or not, scores the norm of
its part of the whole gradient, summed over the micro-steps looked at. Only units of one linear compete, and those are
seen by the same steps. No whole gradient outlives its linear's place in the backward pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.distributed import ranks
from sparseft.errors import UserError
from sparseft.files.tensors import read_tensors
from sparseft.importance.scores import UnitSums, gradient_norms
from sparseft.importance.units import Candidate, units_of
from sparseft.kernels.reference import flat
from sparseft.layers import sparse_layers
from sparseft.layers.permutation import inverse
from sparseft.models.spec import ModelSpec
from sparseft.runs.folder import RUNNING
from sparseft.selection.budget import Budget
from sparseft.selection.choose import choose
from sparseft.selection.compute import Request
from sparseft.selection.selection import Selection
from sparseft.training.reselection.swap import Reselection


class Running(Reselection):
    """Chooses anew every `steps` optimizer steps, by the gradients of the steps since the last time.

    What happens at a step depends on its number and on the sums, which checkpoints hold: a resumed run does the same.

    Args:
        budget: what may be chosen and how much of it: as many of each candidate as train (`compute.as_trained`).
        order, seed: as for the first selection; the seed changes with the step.
        resumed: the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        steps: int,
        model: nn.Module,
        spec: ModelSpec,
        budget: Budget,
        *,
        order: str,
        seed: int,
        clock: Any = None,
        ended_at: int | None = None,
        resumed: str | None = None,
    ) -> None:
        super().__init__(steps, self._choose, clock, ended_at)
        self.budget, self.order, self.seed = budget, order, seed
        self.layers = sparse_layers(model)
        self.by_module: dict[str, list[Candidate]] = defaultdict(list)
        for c in budget.candidates:
            self.by_module[c.module].append(c)
        numbers = sorted({spec.layer_of[name] for name in self.by_module})
        self.turns = [[name for name in self.by_module if spec.layer_of[name] == number] for number in numbers]
        self.device = next(model.parameters()).device
        self.sums = UnitSums("gradient", self.by_module, self.device)  # since the last selection
        self._step: UnitSums | None = None  # of the step that is on its way
        self._hooks: list[Any] = []
        if resumed is not None and (file := Path(resumed) / RUNNING).is_file():
            self._load(file)

    def turn(self, step: int) -> list[str]:
        """The linears that are looked at in a step, counted from 0: of one decoder layer, or of several where there are
        more layers than steps between two selections."""
        count, offset = len(self.turns), step % self.steps
        first = offset * count // self.steps
        last = max(first + 1, (offset + 1) * count // self.steps)
        return [name for names in self.turns[first:last] for name in names]

    def look(self, step: int) -> None:
        """From here on backward passes show the linears whose turn is at a step."""
        names = self.turn(step)
        self._step = UnitSums("gradient", {name: self.by_module[name] for name in names}, self.device)
        self._hooks = [self.layers[name].register_forward_hook(operands(self._seen(name))) for name in names]

    def look_away(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        self.look(state.global_step)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.look_away()
        if self._step is not None:
            self._step.reduce()
            # Each rank's loss is as many times its share as there are ranks. A run may go on with another number.
            count = ranks.rank_and_world()[1]
            for key, found in self._step.totals.items():  # a step that is not finite counts as little as it trains
                self.sums.totals[key] += torch.where(found.isfinite().all(), found / count, 0.0)
            self._step = None
        super().on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.look_away()

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file({key: total.cpu() for key, total in self.sums.totals.items()}, folder / RUNNING)

    def _load(self, file: Path) -> None:
        tensors, totals = read_tensors(file, "checkpoint"), self.sums.totals
        if tensors.keys() != totals.keys():
            raise UserError(f"{file}: holds the scores of other linears than the model trains.")
        for key, value in tensors.items():
            if value.shape != totals[key].shape or value.dtype != torch.float64:
                raise UserError(f"{file}: '{key}' does not fit the model's linear.")
        self.sums.load(tensors, {})

    def _seen(self, name: str) -> Callable[[Tensor, Tensor], None]:
        layer, step = self.layers[name], self._step
        assert step is not None

        def seen(x: Tensor, gradient: Tensor) -> None:
            # Units are counted as in the checkpoint.
            x, gradient = _in_order(x, layer.column_permutation), _in_order(gradient, layer.row_permutation)
            for c, squares in gradient_norms(x, gradient, self.by_module[name]):
                step.totals[c.key] += squares.sqrt()

        return seen

    def _as_now(self, c: Candidate) -> Tensor:
        """Scores by which a candidate keeps the units that train."""
        present = torch.zeros(c.count, dtype=torch.float64)
        present[units_of(c, self.layers[c.module].patterns[c.kind].index.cpu())] = 1.0
        return 1.0 - present if self.order == "smallest" else present

    def _choose(self, step: int) -> Selection:
        scores, seed = self.sums.scores(), self.seed + step
        for c in self.budget.candidates:
            if not scores[c.key].any():  # not seen: every step was bad, or the run goes on from an earlier version's
                scores[c.key] = self._as_now(c)
        chosen = choose(self.budget, scores, order=self.order, allocation="per_layer", seed=seed)
        for total in self.sums.totals.values():  # what is looked at from here on is another choice's
            total.zero_()
        return ranks.broadcast_object(chosen)


def operands(seen: Callable[[Tensor, Tensor], None]) -> Callable[..., None]:
    """A forward hook that shows in the backward pass what a linear was given (tokens, in) and its output's gradient
    (tokens, out), in the gradient's dtype; it keeps the input until then."""

    def hook(layer: nn.Module, inputs: Any, y: Tensor) -> None:
        if torch.is_grad_enabled() and y.requires_grad:
            x = inputs[0].detach()

            def made(gradient: Tensor) -> None:
                seen(flat(x).to(gradient.dtype), flat(gradient))

            y.register_hook(made)

    return hook


def check_seen(request: Request, method: Any) -> None:
    """UserError where `method` looks at gradients as they pass and is to choose from linears that are none that are
    called, so that no hook sees what they are given."""
    if method.reselects_running and request.has_experts:
        raise UserError(
            "method.reselect_by=running: this model's experts are kept as one 3-D parameter, of which training shows "
            "no single expert's gradient; use method.reselect_by=calibration."
        )


def _in_order(features: Tensor, permutation: Tensor | None) -> Tensor:
    """(tokens, features) as the checkpoint orders them, from a layer that stores them permuted."""
    back = inverse(permutation)
    return features if back is None else features.index_select(1, back.to(features.device))

"""The mean over steps of what trains, which is left at the end: of the last steps, or exponentially decaying.

`last:SHARE` is the plain mean over that share of the run's steps, its last ones (stochastic weight averaging, arXiv
1803.05407), `ema:DECAY` a mean of all in which a step counts DECAY times as much as the next. Both are one rule: with
each step w ← DECAY·w + 1 (DECAY 1 for the plain mean) and m ← m + (θ − m)/w, so that no start needs a correction.

Training sees nothing of it. Where re-selection changes what trains, the mean is over all that has ever trained: an
entry that waits counts with the delta that it waits with, one that has not trained yet with 0.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from sparseft import console
from sparseft.adapters.lifecycle import trainable_parameters
from sparseft.errors import UserError
from sparseft.files.tensors import read_described
from sparseft.files.untrusted import parse_json
from sparseft.layers import sparse_layers
from sparseft.layers.pattern import Pattern, changes, entry_dim, index_keys, positions_of
from sparseft.runs.folder import AVERAGE


@dataclass
class Part:
    """One parameter that trains: `mean` (its shape, fp32) since the last re-selection, of a pattern's delta with the
    entries (`keys`) that it is of; and the mean of the time before (`earlier`, with `earlier_keys`)."""

    parameter: nn.Parameter
    pattern: Pattern | None
    mean: Tensor
    keys: Tensor | None = None
    earlier: Tensor | None = None
    earlier_keys: Tensor | None = None

    @property
    def present_keys(self) -> Tensor | None:
        return None if self.pattern is None else index_keys(self.pattern.kind, self.pattern.index)

    def fold(self, weight: float, earlier_weight: float) -> None:
        """The mean goes into the earlier one, by their weights; of a pattern over all that has trained by now, whose
        deltas have to be those of the last step that counted."""
        if self.pattern is None:
            present, self.earlier_keys = self.mean.clone(), None
            earlier = self.earlier
        else:
            kind = self.pattern.kind
            dim, waiting = entry_dim(kind), self.pattern.inactive
            known = [self.pattern.active, *([waiting] if waiting is not None else [])]
            keys = torch.cat([index_keys(kind, entries.index) for entries in known])
            present = torch.cat([entries.delta.detach().cpu() for entries in known], dim)
            assert self.keys is not None
            present.index_copy_(dim, positions_of(self.keys, keys), self.mean.cpu())
            earlier = torch.zeros_like(present)
            if self.earlier is not None:
                earlier.index_copy_(dim, positions_of(self.earlier_keys, keys), self.earlier)
            self.earlier_keys = keys
        total = weight + earlier_weight
        self.earlier = present if earlier is None else earlier.lerp(present, weight / total)

    @torch.no_grad()
    def write(self) -> None:
        """What trains, and what has trained, becomes the mean (which has been folded)."""
        assert self.earlier is not None
        if self.pattern is None:
            self.parameter.copy_(self.earlier)
            return
        kind = self.pattern.kind
        for entries in (self.pattern.active, self.pattern.inactive):
            if entries is not None:
                place = positions_of(index_keys(kind, entries.index), self.earlier_keys)
                entries.delta.copy_(self.earlier.index_select(entry_dim(kind), place))


class Average(transformers.TrainerCallback):
    """Keeps the mean by `rule` (`last:SHARE` or `ema:DECAY`) while a model trains, beside it in fp32 on its device.

    To be called before re-selection changes what trains (the order of callbacks). Checkpoints hold the mean: a resumed
    run comes to the same.

    Args:
        total_steps: of the run.
        resumed: the checkpoint that the run goes on from.
    """

    def __init__(self, rule: str, model: nn.Module, total_steps: int, resumed: str | None = None) -> None:
        kind, _, number = rule.partition(":")
        self.rule, self.model = rule, model
        self.keep = 1.0 if kind == "last" else float(number)
        self.first = total_steps - max(1, round(float(number) * total_steps)) if kind == "last" else 0
        self.count = 0  # of steps that the mean is of
        self.weight = self.earlier_weight = 0.0  # since the last re-selection, and before
        self.parts: dict[str, Part] = {}
        self._changes = -1
        if resumed is not None:
            self._resume(Path(resumed))

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self.parts and self._changes != changes.count:
            self._changes = changes.count
            if any(
                part.keys is not None and not torch.equal(part.keys, part.present_keys) for part in self.parts.values()
            ):
                self._fold()

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = False  # the mean is evaluated once it is taken
        if state.global_step <= self.first:
            return
        if not self.parts:
            self.parts = self._fresh()
        self.weight = self.keep * self.weight + 1.0
        self.earlier_weight *= self.keep
        self.count += 1
        for part in self.parts.values():
            part.mean.lerp_(part.parameter.to(part.mean.dtype), 1.0 / self.weight)

    def take(self) -> bool:
        """Puts the mean into the model and says so; False, and said, where there is none as the run ended before."""
        if not self.parts:
            console.warn(f"trainer.average={self.rule}: the run ended before the first step that counts")
            return False
        self._fold()
        for part in self.parts.values():
            part.write()
        for layer in sparse_layers(self.model).values():
            layer.write_back()
            layer.write_inactive()
        console.log(f"average: what is left is the mean over {self.count} steps (trainer.average={self.rule})")
        return True

    def save(self, folder: Path) -> None:
        """Writes the mean into a checkpoint's folder; before the first step that counts there is none."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            for field in FIELDS:
                value = getattr(part, field)
                if value is not None:
                    tensors[f"{name}.{field}"] = value.cpu().contiguous()
        if tensors:
            about = {name: getattr(self, name) for name in NUMBERS}
            save_file(tensors, folder / AVERAGE, {"average": json.dumps({"rule": self.rule} | about)})

    def _fresh(self) -> dict[str, Part]:
        patterns = {id(p.delta): p for layer in sparse_layers(self.model).values() for p in layer.patterns.values()}
        found = {}
        for name, parameter in trainable_parameters(self.model).items():
            mean = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
            part = Part(parameter, patterns.get(id(parameter)), mean.requires_grad_(False))
            part.keys = part.present_keys
            found[name] = part
        self._changes = changes.count
        return found

    def _fold(self) -> None:
        for part in self.parts.values():
            part.fold(self.weight, self.earlier_weight)
            part.mean.zero_()
            part.keys = part.present_keys
        self.earlier_weight += self.weight
        self.weight = 0.0

    def _resume(self, checkpoint: Path) -> None:
        file = checkpoint / AVERAGE
        if not file.is_file():
            return
        tensors, about = read_described(file, "checkpoint")
        try:
            known = parse_json(about["average"])
            numbers = {name: type(getattr(self, name))(known[name]) for name in NUMBERS}
            rule = known["rule"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file}: holds no average of a run.") from error
        if rule != self.rule or numbers["first"] != self.first:
            console.log(f"average: {checkpoint.name} holds that of {rule} of another length, so it begins anew")
            return
        parts = self._fresh()
        if {name.rpartition(".")[0] for name in tensors} != parts.keys():
            raise UserError(f"{file}: holds the average of other parameters than the model trains.")
        for name, part in parts.items():
            part.mean, device = tensors[f"{name}.mean"], part.mean.device
            for field in FIELDS[1:]:
                setattr(part, field, tensors.get(f"{name}.{field}"))
            if part.mean.shape != part.parameter.shape or (part.keys is None) != (part.pattern is None):
                raise UserError(f"{file}: '{name}' does not fit what the model trains.")
            part.mean = part.mean.to(device)
        self.parts, self._changes = parts, -1
        for name, value in numbers.items():
            setattr(self, name, value)


FIELDS = ("mean", "keys", "earlier", "earlier_keys")
NUMBERS = ("first", "count", "weight", "earlier_weight")

"""A checkpoint as a base that was packed on loading computes with it: the values that its packed weights stand for.

Deltas that were learnt beside packed weights belong to these. Unpacking rounds no more than the model's own dtype does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sparseft.config import ModelConfig
from sparseft.errors import UserError, shown
from sparseft.files.mapped import move_to_file
from sparseft.models.checkpoint import Checkpoint, Places, Weight, weight_of, without_weights
from sparseft.models.loading import QUANTIZED_FROM, load_model
from sparseft.models.packed.quantized import dequantized, is_packed

Kept = Mapping[str, Callable[[], Tensor]]


@dataclass
class Unpacked(Checkpoint):
    """A checkpoint in its own names, shapes and dtypes, whose tensors hold what they became when they were packed.

    base: how it was packed (`model.quantize`); device: where. kept: by linear, a function that gives the flat indices
    (row · in + column) of the entries that start at the checkpoint's own values instead (`method.residual`). room: a
    folder for as much as the checkpoint's linears take, where a model that is given these weights works on the CPU.

    The packed model is loaded when the first such tensor is read, and gone with this object.
    """

    base: ModelConfig
    device: torch.device
    kept: Kept
    room: Path

    @staticmethod
    def of_base(base: ModelConfig, device: torch.device, kept: Kept, room: Path) -> Unpacked:
        found = Checkpoint.of(base)
        return Unpacked(found.folder, found.tensors, found.files, base, device, kept, room)

    @functools.cached_property
    def _weights(self) -> dict[str, tuple[nn.Module, str, Weight]]:
        """By the checkpoint's name: the packed linear, its name, and where its weight lies."""
        model = without_weights(replace(self.base, quantize="none"))
        places = Places(model, self.tensors)
        found = {}
        for name, module in load_model(self.base, self.device).named_modules():
            if is_packed(module):
                weight = weight_of(model, name)
                group = places.group_of(weight.parameter)
                if group.pattern is not None:
                    raise UserError(f"{self.base.path}: {shown(name)} was packed out of several tensors of the files.")
                found |= dict.fromkeys([*group.names, *group.twins], (module, name, weight))
        return found

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own where it was packed."""
        stored = super().read(name)
        if name not in self._weights:
            return stored
        module, linear, weight = self._weights[name]
        values = dequantized(module).detach().to("cpu", stored.dtype)
        flat = (values.t() if weight.transposed else values).contiguous().view(-1)
        if linear in self.kept:
            entries = weight.flat(self.kept[linear]())
            flat[entries] = stored.flatten()[entries]
        return flat.view(stored.shape)

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        """Gives a model, loaded unpacked from the same checkpoint, these weights. It still counts as the checkpoint's,
        so that adapters of that fit.

        On a CPU they lie in files, as the checkpoint's own do: the packed model and the unpacked one would not fit into
        the memory that was enough to train. RunError where the disk has no room for them.
        """
        places = Places(model, self.tensors)
        for name in self._weights:
            parameter = places.parameters[places.group_with[name].parameters[0]]
            if parameter.device.type == "cpu":
                move_to_file(parameter, self.room)
            parameter.copy_(self.read(name))
        setattr(model, QUANTIZED_FROM, self.base)

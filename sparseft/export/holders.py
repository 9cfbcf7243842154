"""What holds a checkpoint's weights and can take a patch: a model of transformers, or a plain state dict.

Both are asked in the checkpoint's own names, shapes and places.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparseft.adapters.state import state_of
from sparseft.errors import UserError, shown
from sparseft.files.tensors import Stored
from sparseft.models.checkpoint import Places
from sparseft.models.fingerprint import SAMPLES


class Slot(NamedTuple):
    """Entries of one tensor of the holder: flat `index` (k,); `which` (k,): their places among those asked for, None:
    all of them, in their order. Both lie on the tensor's device, as they are used step after step."""

    tensor: Tensor
    index: Tensor
    which: Tensor | None

    def read(self, out: Tensor) -> None:
        """Copies the entries to their places in `out`."""
        values = _flat(self.tensor).index_select(0, self.index).to(out.device)
        if self.which is None:
            out.copy_(values)
        else:
            out.index_copy_(0, self.which.to(out.device), values)

    def write(self, values: Tensor) -> None:
        """Sets the entries to theirs among `values`."""
        values = values.to(self.tensor.device)
        if self.which is not None:
            values = values.index_select(0, self.which)
        _flat(self.tensor).index_copy_(0, self.index, values)


def _slot(name: str, tensor: Tensor, index: Tensor, which: Tensor | None = None) -> Slot:
    """The slot of entries of a tensor that can be written; else a `UserError`."""
    tensor = _writable(name, tensor)
    return Slot(tensor, index.to(tensor.device), None if which is None else which.to(tensor.device))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1)


class Holder:
    """Weights by the names of a checkpoint."""

    def stored(self, name: str) -> Stored | None:
        """A tensor's dtype and shape; None where there is none of that name."""
        raise NotImplementedError

    def slots(self, name: str, index: Tensor) -> list[Slot]:
        """Where entries (k,) of a tensor lie, to be read and written again and again."""
        raise NotImplementedError

    def read(self, name: str, index: Tensor) -> Tensor:
        """Entries (k,) of a tensor, on the CPU."""
        found = self.stored(name)
        assert found is not None
        values = torch.empty(len(index), dtype=found.dtype)
        for slot in self.slots(name, index):
            slot.read(values)
        return values


class DictHolder(Holder):
    """A plain state dict, with the checkpoint's names: also those of a file that has them without the model's prefix
    (`h.0…` for `transformer.h.0…`), which only some checkpoints have."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def stored(self, name: str) -> Stored | None:
        tensor = self.tensors.get(self._own(name))
        return None if tensor is None else Stored(tensor.dtype, tuple(tensor.shape))

    def slots(self, name: str, index: Tensor) -> list[Slot]:
        return [_slot(name, self.tensors[self._own(name)], index)]

    def _own(self, name: str) -> str:
        bare = name.partition(".")[2]
        return name if name in self.tensors or bare not in self.tensors else bare


class ModelHolder(Holder):
    """A plain model of transformers, whose parameters may be named and cut otherwise than its checkpoint's tensors.

    checkpoint: the names and shapes of all the tensors of the checkpoint that are parameters.
    """

    def __init__(self, model: nn.Module, checkpoint: Mapping[str, tuple[int, ...]]) -> None:
        self.places = Places(model, {name: Stored(torch.float32, shape) for name, shape in checkpoint.items()})

    def stored(self, name: str) -> Stored | None:
        group = self.places.group_with.get(name)
        if group is None or (parameter := self.places.parameters.get(group.parameters[0])) is None:
            return None
        own = tuple(parameter.shape) if group.pattern is None else self.places.tensors[name].shape
        return Stored(parameter.dtype, own)

    def slots(self, name: str, index: Tensor) -> list[Slot]:
        found = []
        for part in self.places.in_model(name, index):
            which = None if torch.equal(part.which, torch.arange(len(index))) else part.which
            found.append(_slot(part.name, self.places.parameters[part.name], part.index, which))
        return found


def _writable(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous() or tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter):
        raise UserError(f"'{shown(name)}' is no plain tensor in memory of its own, so no patch can be written into it.")
    return tensor


def holder_of(target: Any, checkpoint: Mapping[str, tuple[int, ...]]) -> Holder:
    """The holder for a model or a state dict; an attached model, and anything else, is a `UserError`."""
    if isinstance(target, Mapping):
        return DictHolder(target)
    target = getattr(target, "_orig_mod", target)  # inside what torch.compile made
    if not isinstance(target, nn.Module) or not hasattr(target, "config"):
        raise UserError(f"expected a model of transformers or a state dict to patch, got {type(target).__name__}.")
    if state_of(target) is not None or hasattr(target, "peft_config"):
        raise UserError("the model to patch has an adapter attached: detach or merge it first.")
    return ModelHolder(target, checkpoint)


def sampled_places(shape: tuple[int, ...]) -> Tensor:
    """The flat places of a tensor's entries that `rest_fingerprint` looks at."""
    count = torch.Size(shape).numel()
    return torch.linspace(0, max(count - 1, 0), min(SAMPLES, count), dtype=torch.float64).long()


def rest_fingerprint(
    checkpoint: Mapping[str, tuple[int, ...]],
    read: Callable[[str, Tensor], Tensor],
    patched: Mapping[str, Tensor],
) -> str:
    """A hash over all that a patch does not change of a base: names, shapes, and of each tensor up to `SAMPLES` evenly
    spaced values, those left out that the patch sets. It is the same before the patch and after it.

    Values are rounded to bf16, so that the dtype in which a checkpoint was loaded does not count.
    read: entries of a tensor; patched: by name, flat indices that the patch sets.
    """
    digest = hashlib.sha256()
    for name, shape in sorted(checkpoint.items()):
        places = sampled_places(shape)
        if name in patched:
            places = places[~torch.isin(places, patched[name].cpu())]
        values = read(name, places).to(torch.bfloat16).float()
        values = values.masked_fill(values.abs() < 2.0**-14, 0.0)  # this also leaves one sign of zero
        digest.update(f"{name}{tuple(shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()

"""What an adapter of any kind makes of its base's checkpoint: the entries that change, with their new values.

A sparse adapter needs no model in memory: its entries are read from the files, the deltas added. LoRA and DoRA are
merged into the model, once in memory, and every entry that then differs counts. Of a fully trained model the two
checkpoints are compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparseft.adapters.lifecycle import load_adapter, merge
from sparseft.config import ModelConfig
from sparseft.errors import UserError, shown
from sparseft.export.changes import SparseChange
from sparseft.export.source import Source
from sparseft.kernels import reference
from sparseft.models.checkpoint import Checkpoint, Places, Weight, weight_of, without_weights
from sparseft.models.fingerprint import base_fingerprint
from sparseft.models.loading import load_config, load_model, model_dtype, resolve_device
from sparseft.models.packed.checkpoint import PackedCheckpoint
from sparseft.models.packed.unpacked import Unpacked

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Changed(NamedTuple):
    """Entries of one checkpoint tensor: flat `index` (k,) int64, sorted; `values` (k,) new, in the dtype to be written;
    `former` (k,) of the base, in its own."""

    name: str
    index: Tensor
    values: Tensor
    former: Tensor


def base_of(source: Source) -> ModelConfig:
    """The base model that a source was trained from; a fully trained model that does not say is a `UserError`."""
    if source.kind != "full":
        return source.target.model
    base = source.target.base
    if base is None and isinstance(known := source.content.get("base_model"), str) and known:
        base = replace(source.target.model, path=known, tokenizer=None)
    if base is None:
        raise UserError(f"{source.folder}: it does not say which base it was trained from.")
    return base


class ChangedTensors:
    """The changed entries of a source, as often as they are asked for.

    checkpoint: the base's, as it is stored where none is given; places: of the model's parameters in it. dtype: of the
    new values, None: each tensor's own.
    extra: tensors that the checkpoint lacks (a head that was tied in the base and is not any more), by name.
    fingerprint: the base's.

    Raises:
        UserError: a base that is quantized or has no safetensors, an adapter that does not fit it.
    """

    def __init__(self, source: Source, dtype: torch.dtype | None = None, checkpoint: Checkpoint | None = None) -> None:
        self.base, self.dtype = base_of(source), dtype
        packed = isinstance(checkpoint, PackedCheckpoint)
        load_config(self.base, packed=packed)  # refuses what is quantized otherwise
        self.checkpoint = checkpoint or Checkpoint.of(self.base)
        self.extra: dict[str, Tensor] = {}
        self.fingerprint = source.fingerprint
        self._source, self._merged = source, None
        if source.kind == "peft":
            model = base_model(source, dtype, checkpoint)
            self.fingerprint = base_fingerprint(model)
            self._merged = merged_model(source, model, dtype)
            self.places = Places(self._merged, self.checkpoint.tensors)
            for name, parameter in self.places.parameters.items():
                if not self.places.holds(name):
                    self.extra[name] = parameter.detach().cpu()
            return
        model = without_weights(self.base, packed=packed)
        self.places = Places(model, self.checkpoint.tensors)
        if source.kind == "full":
            self._trained = Checkpoint.of_folder(source.folder)
            stored = replace(self.base, dtype="auto")
            self._whole_dtype = dtype or model_dtype(stored, load_config(stored, packed=packed))
            self._names = _pairs(self.places, Places(model, self._trained.tensors))
        else:
            self._weights = {module: weight_of(model, module) for module in source.changes}
            for module, weight in self._weights.items():
                if (shape := source.changes[module].shape) != weight.shape:
                    raise UserError(f"{source.folder}: {shown(module)} is {shape}, in {self.base.path} {weight.shape}.")
                if not self.places.holds(weight.parameter):
                    raise UserError(f"{self.base.path}: its checkpoint has no tensor for {shown(weight.parameter)}.")

    def target(self, name: str) -> torch.dtype:
        """The dtype in which a checkpoint's tensor is to be written."""
        stored = self.checkpoint.tensors[name].dtype
        return self.dtype if self.dtype is not None and stored in FLOATS else stored

    def __call__(self, names: Collection[str] | None = None) -> Iterator[Changed]:
        """Each changed tensor once (of `names` alone, where given), those of one parameter after another."""
        found = self._of_merged if self._merged is not None else self._of_sparse
        for changed in self._of_whole(names) if self._source.kind == "full" else found(names):
            if not changed.values.isfinite().all():
                raise UserError(f"{self._source.folder}: {changed.name} would hold values that are not finite.")
            if len(changed.index):
                yield changed

    def _of_sparse(self, names: Collection[str] | None) -> Iterator[Changed]:
        members: dict[int, list[tuple[SparseChange, Weight]]] = defaultdict(list)
        for module, weight in self._weights.items():
            group = self.places.group_of(weight.parameter)
            if names is None or not set(names).isdisjoint(group.names):
                members[id(group)].append((self._source.changes[module], weight))
        for linears in members.values():
            found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
            for change, weight in linears:
                for name, *parts in self._of_linear(change, weight):
                    if names is None or name in names:
                        found[name].append((parts[0], parts[1], parts[2]))
            for name, pieces in found.items():
                index, values, former = (torch.cat(part) for part in zip(*pieces, strict=True))
                order = index.argsort()
                yield Changed(name, index[order], values[order], former[order])

    def _of_linear(self, change: SparseChange, weight: Weight) -> Iterator[Changed]:
        entries = change.entries()
        parts = self.places.in_checkpoint(weight.parameter, weight.flat(entries))
        formers = [self.checkpoint.read(part.name).flatten()[part.index] for part in parts]
        wide = torch.promote_types(formers[0].dtype, torch.float32)
        base = torch.empty(len(entries), dtype=wide)
        for part, former in zip(parts, formers, strict=True):
            base[part.which] = former.to(wide)
        values = added(change, entries, base)
        for part, former in zip(parts, formers, strict=True):
            yield Changed(part.name, part.index, values[part.which].to(self.target(part.name)), former)

    def _of_merged(self, names: Collection[str] | None) -> Iterator[Changed]:
        held = self.places.parameters
        for name, value in self.places.stored(lambda parameter: held[parameter].detach().cpu(), names):
            if names is None or name in names:
                yield self._differing(name, value)

    def _of_whole(self, names: Collection[str] | None) -> Iterator[Changed]:
        """Of the trained model in the dtype in which the base is loaded: one that has trained in a narrower one differs
        from its base in nearly every value."""
        for name, own in self._names.items():
            if names is None or name in names:
                yield self._differing(name, self._trained.read(own).to(self._whole_dtype))

    def _differing(self, name: str, value: Tensor) -> Changed:
        """The entries in which a tensor differs from the base's, as both are in the dtype of the one or the other."""
        former = self.checkpoint.read(name)
        narrow = former.dtype if former.dtype.itemsize < value.dtype.itemsize and self.dtype is None else value.dtype
        index = (bits(former.to(narrow)) != bits(value.to(narrow))).flatten().nonzero().flatten()
        return Changed(name, index, value.flatten()[index].to(self.target(name)), former.flatten()[index])


def base_model(source: Source, dtype: torch.dtype | None = None, checkpoint: Checkpoint | None = None) -> nn.Module:
    """The base as stored, or in `dtype` where that is wider: what deltas are added to, to be rounded once. checkpoint:
    one that is unpacked gives it its weights."""
    if isinstance(checkpoint, PackedCheckpoint):
        return checkpoint.unpacked(dtype)
    model = replace(base_of(source), dtype="auto")
    if dtype is not None:
        stored = load_config(model).dtype or torch.float32
        model = replace(model, dtype=str(torch.promote_types(stored, dtype)).removeprefix("torch."))
    loaded = load_model(model, resolve_device(source.config.hardware.device))
    if isinstance(checkpoint, Unpacked):
        checkpoint.fill(loaded)
    return loaded


def merged_model(source: Source, base: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """What a source makes of its `base_model`, which is changed in place: the plain model in the base's dtype, or in
    `dtype`."""
    stored = next(base.parameters()).dtype
    if source.target.adapter is None:  # a whole model: the base's memory is needed for it
        base.to("meta")
        merged = load_model(replace(source.target.model, dtype="auto"), resolve_device(source.config.hardware.device))
        dtype = dtype or stored
    else:
        merged = merge(load_adapter(base, source.target.adapter)).eval()
    if dtype is not None:
        for parameter in merged.parameters():  # not the buffers: rotary frequencies stay in fp32
            parameter.data = parameter.data.to(dtype)
    return merged


def added(change: SparseChange, entries: Tensor, base: Tensor) -> Tensor:
    """base + delta of the entries (k,) of one linear that a change touches, summed as an attached layer does, in the
    dtype of `base` (k,)."""
    total = torch.zeros(change.shape, dtype=base.dtype)
    total.view(-1)[entries] = base
    for kind in reference.KINDS:
        if kind in change.kinds:
            value = change.kinds[kind]
            old = reference.gather(total, kind, value.index, value.block_size)
            reference.scatter_(total, kind, value.index, old + value.delta, value.block_size)
    return total.view(-1)[entries]


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bits as whole numbers: what `!=` then says holds for NaN and for the sign of zero."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


def _pairs(base: Places, trained: Places) -> dict[str, str]:
    """For each tensor of a base that is a parameter its name among a trained model's files."""
    pairs = {}
    for target, group in base.groups.items():
        if group.parameters[0] not in base.parameters:  # a buffer
            continue
        other = trained.groups.get(target)
        for name in (*group.names, *group.twins):
            if name in trained.tensors:
                pairs[name] = name
            elif other is not None and other.pattern is None and group.pattern is None:
                pairs[name] = other.names[0]
            else:
                raise UserError(f"the trained model has no tensor '{shown(name)}', which its base has.")
            if trained.tensors[pairs[name]].shape != base.tensors[name].shape:
                raise UserError(f"{shown(name)} has another shape in the trained model than in its base.")
    return pairs

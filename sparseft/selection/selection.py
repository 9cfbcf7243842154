"""Scores -> `Selection`: which rows, columns or blocks of which module train; its files, and how much it is in words.

A `Budget` says what may be chosen (candidates), how much of it, and over which candidates the choice is pooled.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseft import console
from sparseft.errors import UserError, shown
from sparseft.files.atomic import check_replaceable, replaced_folder, write_json
from sparseft.files.hashing import body_hash
from sparseft.files.tensors import SELECTION_CONFIG, SELECTION_TENSORS, read_described, split_name
from sparseft.files.untrusted import read_json_object
from sparseft.kernels.blocks import is_size
from sparseft.kernels.kinds import KINDS
from sparseft.kernels.reference import trainable_entries
from sparseft.models.spec import ModelSpec
from sparseft.selection import TOLERANCE

FORMAT_VERSION = 1


@dataclass
class Selection:
    """Indices by module and kind: `{"rows" | "columns": (k,), "blocks": (n, 2)}`, in the checkpoint's order; `"grid"`:
    (rows, columns), kept as one list (`kernels/grid.py`).

    Built from anything that `torch.as_tensor` takes. `meta` travels with the files: method, key, shapes, counts.
    """

    modules: Mapping[str, Mapping[str, Any]]
    block_size: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        modules: dict[str, dict[str, Tensor]] = {}
        for module, kinds in self.modules.items():
            if not isinstance(kinds, Mapping):
                raise UserError(f"selection of {module}: expected {{'rows': […]}}, got {type(kinds).__name__}.")
            chosen: dict[str, Tensor] = {}
            for kind, index in kinds.items():
                if kind == "block_size":
                    if self.block_size not in (None, index):
                        raise UserError(
                            f"selection of {module}: block_size={index}, but other modules have {self.block_size}: "
                            "a selection has one block size."
                        )
                    self.block_size = index
                    continue
                if kind not in KINDS:
                    raise UserError(f"selection of {module}: expected {', '.join(KINDS)}, got '{kind}'.")
                try:
                    tensor = KINDS[kind].index(index)
                except UserError as error:
                    raise UserError(f"selection of {module}: {error}") from None
                if tensor.numel() == 0:
                    raise UserError(f"selection of {module}: {kind} names no index: leave it out.")
                if tensor.is_floating_point() or tensor.dtype == torch.bool or tensor.is_complex():
                    raise UserError(f"selection of {module}: expected integer {kind}, got {tensor.dtype}.")
                if tensor.dim() != (2 if kind == "blocks" else 1) or (kind == "blocks" and tensor.shape[1] != 2):
                    wanted = "pairs (block row, block column)" if kind == "blocks" else "a list of indices"
                    raise UserError(f"selection of {module}: {kind} must be {wanted}, got {tuple(tensor.shape)}.")
                chosen[kind] = tensor.to(device="cpu", dtype=torch.int64).contiguous()
            if chosen:
                modules[module] = chosen
        self.modules = modules
        if self.block_size is not None:
            if not is_size(self.block_size):
                raise UserError(f"selection: block_size={self.block_size!r}: expected a whole number of at least 1.")
            self.block_size = int(self.block_size)

    @property
    def has_blocks(self) -> bool:
        """Whether any module trains blocks, which need a `block_size`."""
        return any("blocks" in kinds for kinds in self.modules.values())

    def trainable(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """Trainable entries by module, on logical weights of `shapes` (out, in)."""
        return {
            module: sum(
                trainable_entries(kind, index, shapes[module], self.block_size) for kind, index in kinds.items()
            )
            for module, kinds in self.modules.items()
        }

    def digest(self) -> str:
        """A hash over what is chosen."""
        digest = hashlib.sha256(f"{self.block_size}".encode())
        for module in sorted(self.modules):
            for kind in sorted(self.modules[module]):
                digest.update(f"{module}.{kind}".encode() + self.modules[module][kind].numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path, shapes: Mapping[str, tuple[int, int]] | None = None) -> Path:
        """Writes `selection.json` and `selection.safetensors` into `folder`, whole or not at all.

        Raises:
            UserError: blocks without a size; `folder` is a file, holds other files, or cannot be replaced.
        """
        from safetensors.torch import save_file

        folder = Path(folder).expanduser()
        check_replaceable(folder, (SELECTION_CONFIG,), (SELECTION_TENSORS,))
        if self.has_blocks and self.block_size is None:
            raise UserError("a selection of blocks needs its block_size: Selection({…}, block_size=64).")
        if shapes is None:
            known = self.meta.get("modules", {})
            shapes = {name: tuple(info["shape"]) for name, info in known.items() if "shape" in info}
        modules: dict[str, dict[str, Any]] = {}
        trainable = self.trainable(shapes) if shapes.keys() >= self.modules.keys() else {}
        for module, kinds in self.modules.items():
            modules[module] = {kind: len(index) for kind, index in kinds.items()}
            if module in trainable:
                modules[module] |= {"shape": list(shapes[module]), "trainable": trainable[module]}
        content = {
            **self.meta,
            "format_version": FORMAT_VERSION,
            "block_size": self.block_size,
            "digest": self.digest(),
            "modules": modules,
        }
        tensors = {
            f"{module}.{kind}.index": index.to(torch.int32)
            for module, kinds in self.modules.items()
            for kind, index in kinds.items()
        }
        with replaced_folder(folder, (SELECTION_CONFIG,), (SELECTION_TENSORS,)) as aside:
            save_file(tensors, aside / SELECTION_TENSORS, {"config_sha256": body_hash(content)})
            write_json(aside / SELECTION_CONFIG, content)
        return folder

    @staticmethod
    def load(folder: str | Path) -> Selection:
        """Reads a selection's folder; a missing, truncated or altered file is a `UserError`."""
        folder = Path(folder).expanduser()
        content = read_json_object(folder / SELECTION_CONFIG, "selection")
        if content.get("format_version") != FORMAT_VERSION:
            known = shown(content.get("format_version"))
            raise UserError(f"{folder}: selection format {known}, this version reads {FORMAT_VERSION}.")
        tensors, texts = read_described(folder / SELECTION_TENSORS, "selection")
        modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            module, kind, last = split_name(name, folder)
            if last != "index":
                raise UserError(f"{folder}: unexpected tensor '{name}' in a selection.")
            modules[module][kind] = tensor
        block_size = content.get("block_size")
        if block_size is not None and (type(block_size) is not int or block_size < 1):
            raise UserError(f"{folder}: block_size={shown(repr(block_size))} in selection.json is not a block size.")
        described = content.get("modules")
        if not isinstance(described, dict) or not all(isinstance(info, dict) for info in described.values()):
            raise UserError(f"{folder}: selection.json needs modules, an object of objects.")
        meta = {key: value for key, value in content.items() if key not in ("format_version", "block_size", "digest")}
        selection = Selection(dict(modules), block_size=block_size, meta=meta)
        if selection.digest() != content.get("digest"):
            raise UserError(f"{folder}: selection.safetensors is not the file that selection.json describes (altered).")
        if texts.get("config_sha256") != body_hash(content):
            raise UserError(f"{folder}: selection.json is not the one that was written with its tensors (altered).")
        return selection


HEAD_ROLES = ("q", "k", "v", "o")  # their units are heads, every other role's channels


def describe_trainable(trainable: int, spec: ModelSpec, settings: Any, unit: str) -> None:
    """Says how much trains by a method's `settings`, in which `unit`, and warns where it is off by more than a tenth
    from the share asked for: what a method trains whole cannot meet every share. Linears in scope that cannot train
    are named."""
    if note := spec.frozen_note(settings.scope):
        console.warn(note)
    scope = spec.weights_in(settings.scope)
    console.log(
        f"trainable: {trainable:,} of {scope:,} weights in scope (sparsity {1 - trainable / scope:.2%} in scope, "
        f"{1 - trainable / spec.total_parameters:.2%} of the whole model), in {unit}"
    )
    sparsity = settings.wanted_sparsity
    if sparsity is not None:
        wanted = (1 - sparsity) * scope
        if abs(trainable - wanted) > TOLERANCE * wanted:
            console.warn(
                f"sparsity {sparsity} asks for {wanted:,.0f} trainable weights; with {unit} it is {trainable:,} "
                f"(sparsity {1 - trainable / scope:.4f})"
            )


def describe_selection(selection: Selection, spec: ModelSpec, settings: Any) -> None:
    """`describe_trainable` of a sparse method's selection, and what trains of each role."""
    describe_trainable(selection.meta["trainable_parameters"], spec, settings, settings.granularity(selection))
    warn_of_cap(selection, settings)
    if "flops" in selection.meta:
        facts = selection.meta["flops"]
        console.log(
            f"allocation=flops: nothing below decoder layer {facts['layer']} trains: {facts['kept']:.0%} of the "
            f"importance of the best units of all layers, for {facts['cost']:.0%} of a step's arithmetic with those"
        )
    if not settings.by_role:
        return
    roles = [
        f"{role} {chosen:,} of {there:,} {'heads' if role in HEAD_ROLES else 'channels'} ({entries:,} weights)"
        for role, (chosen, there, entries) in units_by_role(selection, spec).items()
    ]
    if roles:
        console.log(f"trainable by role: {', '.join(roles)}")


def warn_of_cap(selection: Selection, settings: Any) -> None:
    """Says how much of the budget `method.max_rank` leaves unspent, where it does."""
    if "placed" in selection.meta:
        placed, asked = selection.meta["placed"]
        console.warn(
            f"method.max_rank={settings.max_rank} has room for {placed:,} of the {asked:,} "
            f"{settings.granularity(selection)} that the budget asks for"
        )


def units_by_role(selection: Selection, spec: ModelSpec) -> dict[str, tuple[int, int, int]]:
    """Of each role that trains: its units chosen, its units in all layers, and the weights that the chosen ones have.

    Empty of linears whose roles are not known.
    """
    totals: dict[str, list[int]] = {}
    for slot in spec.slots:
        index = selection.modules.get(slot.module, {}).get(slot.side)
        features = 0
        if index is not None:
            features = int(((index >= slot.start) & (index < slot.start + slot.unit * slot.count)).sum())
        total = totals.setdefault(slot.role, [0, 0, 0])
        for position, value in enumerate((features // slot.unit, slot.count, features * slot.other)):
            total[position] += value
    return {role: (chosen, there, entries) for role, (chosen, there, entries) in totals.items() if entries}

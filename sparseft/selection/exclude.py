"""`method.exclude`: a selection that takes no weight of what other adapters train, so that
their sum disturbs none.

A unit is left where none of its entries is taken: a row is lost to any column of the same weight, and to each block
that it crosses.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseft import console
from sparseft.errors import UserError, nearest_path, shown, where_looked
from sparseft.files.hashing import file_hash
from sparseft.files.tensors import (
    ADAPTER_CONFIG,
    ADAPTER_FORMAT,
    ADAPTER_TENSORS,
    WHOLE_CONFIG,
    read_described,
    split_name,
)
from sparseft.files.untrusted import read_json_object
from sparseft.importance.units import Candidate
from sparseft.kernels.kinds import KINDS
from sparseft.models.fingerprint import base_fingerprints, check_base
from sparseft.runs.folder import ADAPTER
from sparseft.selection.budget import Budget
from sparseft.selection.selection import Selection


@dataclass(frozen=True)
class Excluded:
    """What an adapter trains, and what its description says."""

    folder: Path
    content: dict[str, Any]
    selection: Selection


def find_excluded(path: str | Path) -> Path:
    """The adapter's folder that a run's or an adapter's folder means.

    UserError where there is none, or where it leaves nothing: LoRA and full fine-tuning train every entry.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"method.exclude: {folder}: no such folder{where_looked(folder)}.{nearest_path(folder)}")
    folder = folder / ADAPTER if (folder / ADAPTER).is_dir() else folder
    whole = (folder / WHOLE_CONFIG).is_file()
    if not whole and not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"method.exclude: {folder}: no adapter and no finished run (it has no {ADAPTER_CONFIG}).")
    content = {} if whole else read_json_object(folder / ADAPTER_CONFIG, "adapter")
    if whole or "peft_type" in content:
        kind = "a fully trained model" if whole else f"a peft adapter ({shown(content['peft_type'])})"
        raise UserError(
            f"method.exclude: {folder}: {kind} trains every entry of its weights, so that nothing of them is left."
        )
    return folder


def read_excluded(paths: Iterable[str] | None) -> tuple[Excluded, ...]:
    """What the adapters of `method.exclude` train. UserError where a folder is none of a sparse adapter, or damaged."""
    return tuple(_read(find_excluded(path)) for path in paths or ())


def _read(folder: Path) -> Excluded:
    content = read_json_object(folder / ADAPTER_CONFIG, "adapter")
    if (known := content.get("format_version")) != ADAPTER_FORMAT:
        raise UserError(f"{folder}: adapter format {shown(known)}, this version reads {ADAPTER_FORMAT}.")
    tensors, _ = read_described(folder / ADAPTER_TENSORS, "adapter")
    if "sha256" in content and file_hash(folder / ADAPTER_TENSORS) != content["sha256"]:  # others may leave it out
        raise UserError(f"{folder}: {ADAPTER_TENSORS} is not the file that {ADAPTER_CONFIG} describes (altered).")
    size = content.get("block_size")
    if size is not None and (type(size) is not int or size < 1):
        raise UserError(f"{folder}: block_size={shown(repr(size))} in {ADAPTER_CONFIG} is not a block size.")
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        module, kind, part = split_name(name, folder)
        if part == "index":
            modules[module][kind] = tensor
        elif kind == "blocks" and size is None and tensor.dim() == 3 and tensor.shape[-1]:
            size = tensor.shape[-1]
    try:
        selection = Selection(dict(modules), block_size=size)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if not selection.modules or (selection.has_blocks and size is None):
        raise UserError(f"{folder}: the adapter holds no module, or blocks of no size.")
    return Excluded(folder, content, selection)


def check_bases(model: nn.Module, excluded: Sequence[Excluded]) -> None:
    """Refuses adapters that were made for other weights than the model's."""
    if not excluded:
        return
    fingerprints, dtype = base_fingerprints(model), str(next(model.parameters()).dtype).removeprefix("torch.")
    for each in excluded:
        check_base(fingerprints, dtype, each.folder, each.content)


def _rectangles(selection: Selection, module: str, shape: tuple[int, int], folder: Path) -> Tensor:
    """The entries of a weight of `shape` that train, as rectangles (n, 4): top, bottom, left, right (ends excluded)."""
    found = []
    for kind, index in selection.modules.get(module, {}).items():
        own = KINDS[kind].rectangles(index, shape, selection.block_size or 1)
        inside = (own[:, 0] < shape[0]) & (own[:, 2] < shape[1]) & (own[:, [0, 2]] >= 0).all(1)
        if not inside.all():
            raise UserError(f"{folder}: {module}.{kind} has an index outside the weight's {shape[0]}×{shape[1]}.")
        found.append(torch.minimum(own, torch.tensor([shape[0], shape[0], shape[1], shape[1]])))
    return torch.cat(found) if found else torch.zeros(0, 4, dtype=torch.int64)


def taken_units(candidate: Candidate, excluded: Iterable[Excluded]) -> Tensor:
    """Which of a candidate's units have an entry that one of the adapters trains: (units,), bool."""
    rows, columns = candidate.shape
    parts = [_rectangles(each.selection, candidate.module, candidate.shape, each.folder) for each in excluded]
    top, bottom, left, right = torch.cat(parts).unbind(1)
    # The units are the cells of a grid over the weight, or over a part of it.
    height = rows if candidate.kind == "columns" else candidate.unit
    width = columns if candidate.kind == "rows" else candidate.unit
    down = candidate.start if candidate.kind == "rows" else 0
    aside = candidate.start if candidate.kind == "columns" else 0
    high = candidate.count if candidate.kind == "rows" else -(-rows // height)
    wide = candidate.count if candidate.kind == "columns" else -(-columns // width)
    first, after = ((top - down) // height).clamp(0, high), ((bottom - 1 - down) // height + 1).clamp(0, high)
    begin, end = ((left - aside) // width).clamp(0, wide), ((right - 1 - aside) // width + 1).clamp(0, wide)
    changes = torch.zeros(high + 1, wide + 1, dtype=torch.int64)  # of how many rectangles cover a cell
    one = torch.ones_like(first)
    for row, column, change in ((first, begin, one), (after, end, one), (first, end, -one), (after, begin, -one)):
        changes.index_put_((row, column), change, accumulate=True)
    return changes.cumsum(0).cumsum(1)[:high, :wide].reshape(-1) > 0


def leave_out(budget: Budget, excluded: Sequence[Excluded], allocation: str) -> None:
    """Notes in the budget which units are taken. UserError where fewer are left than it takes; with `allocation=global`
    linears of which nothing is left train nothing, which is said."""
    if not excluded:
        return
    budget.taken = {c.key: taken_units(c, excluded) for c in budget.candidates}
    left = {c.key: c.count - int(budget.taken[c.key].sum()) for c in budget.candidates}
    if allocation == "per_layer":
        needs = [(c.module, left[c.key], c.count, budget.per_candidate[c.key]) for c in budget.candidates]
    else:
        needs = []
        for role, count in budget.pooled.items():
            members = [c for c in budget.candidates if (c.role or "") == role]
            there = sum(c.count for c in members)
            needs.append((role or "the scope", sum(left[c.key] for c in members), there, count))
    short = [need for need in needs if need[1] < need[3]]
    if short:
        name, free, there, count = min(short, key=lambda need: need[1] / need[3])
        others = f" ({len(short) - 1} more are short of units too)" if len(short) > 1 else ""
        ways = "method.allocation=global, " if allocation == "per_layer" else ""
        raise UserError(
            f"method.exclude leaves {f'{free:,}' if free else 'none'} of the {there:,} units of {name}, and the budget "
            f"takes {count:,}{others}: use {ways}a higher sparsity, another scope, or exclude less."
        )
    empty = [c.module for c in budget.candidates if not left[c.key]]
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        console.warn(f"method.exclude leaves nothing of {empty[0]}{more}: it is all taken, and trains nothing")

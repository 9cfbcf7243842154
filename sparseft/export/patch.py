"""Weight patches: new values for some entries of a checkpoint's tensors, in two files that anybody can read.

`patch.safetensors` holds `<tensor name>.indices` (flat, sorted, unique) and `<tensor name>.values` (new values, no
differences), `patch.json` says what of. Applying one gives back the patch that undoes it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseft.errors import UserError, nearest, nearest_path, shown, where_looked
from sparseft.export import NOTE, README
from sparseft.export.changed_tensors import Changed
from sparseft.export.holders import DictHolder, Holder, holder_of, rest_fingerprint, sampled_places
from sparseft.files.atomic import check_replaceable, replaced_folder, write_json
from sparseft.files.hashing import BODY, body_hash, file_hash
from sparseft.files.tensors import WHOLE_CONFIG, Stored, read_described, write_streamed
from sparseft.files.untrusted import read_json_object
from sparseft.models.checkpoint import Checkpoint

FORMAT_VERSION = 1
TENSORS, CONFIG = "patch.safetensors", "patch.json"
WHAT = "patch"
# Of a description. Not `base_model`: a base may be moved, or be published under another name, which is written here.
HASHED = ("format_version", "base_fingerprint", "method", "tensors", "checkpoint", "rest_fingerprint")


class Entries(NamedTuple):
    """What a patch sets of one tensor of `shape`: flat `index` (k,) sorted, int32 or int64, and the new `values` (k,).

    replaces: the SHA-256 of the values that it is made to replace.
    """

    shape: tuple[int, ...]
    index: Tensor
    values: Tensor
    replaces: str


@dataclass
class Patch:
    """A weight patch in memory.

    about: base_model, base_fingerprint and method, as a run's adapter has them; checkpoint: the names and shapes of all
    the base's tensors that are parameters; rest: `rest_fingerprint`.
    """

    tensors: dict[str, Entries]
    about: dict[str, Any]
    checkpoint: dict[str, tuple[int, ...]]
    rest: str

    @staticmethod
    def load(folder: str | Path) -> Patch:
        """A patch's folder; one that is damaged, altered or none is a `UserError`."""
        return _read(Path(folder).expanduser())

    def save(self, folder: str | Path) -> Path:
        """Writes the two files into a new folder (or in place of another patch), whole or not at all."""
        folder = Path(folder).expanduser()
        with replaced_folder(folder, (CONFIG,), (TENSORS,)) as aside:
            write_patch(aside, self.about, self.checkpoint, self.tensors.items, lambda _: self.rest)
        return folder


def apply_patch(target: Any, patch: Patch | str | Path, *, out: str | Path | None = None) -> Patch:
    """Sets the entries that a patch names to its values, and returns the patch that puts the former ones back, bit for
    bit: `undo = apply_patch(model, "patch"); …; apply_patch(model, undo)`.

    target: a plain model of transformers or a state dict with the checkpoint's names, on any device, changed in place;
    or a model folder, which stays as it is: the patched one is written to the new folder `out`, whole or not at all.
    patch: a folder, or what `Patch.load` and this function return.
    Values are new values, no differences: applying a patch again changes nothing.

    Raises:
        UserError: another base, another patch on it, a tensor that is missing or of another shape or dtype, a damaged
            patch. Nothing was changed then.
    """
    patch = patch if isinstance(patch, Patch) else Patch.load(patch)
    if isinstance(target, str | Path):
        return _apply_to_folder(Path(target).expanduser(), patch, out)
    if out is not None:
        raise UserError("out is for the patch of a model folder: a model or a state dict is changed in place.")
    holder = holder_of(target, patch.checkpoint)
    undo = _checked(holder, patch)
    slots = [(entries, holder.slots(name, entries.index.long())) for name, entries in patch.tensors.items()]
    with torch.no_grad():
        for entries, places in slots:
            for slot in places:
                slot.write(entries.values)
    return undo


def _checked(holder: Holder, patch: Patch) -> Patch:
    """Refuses what the patch was not made for; returns the patch that undoes it."""
    for name, entries in patch.tensors.items():
        there, wanted = holder.stored(name), Stored(entries.values.dtype, entries.shape)
        if there is None:
            near = nearest(name, holder.tensors) if isinstance(holder, DictHolder) else ""
            raise UserError(f"the patch sets '{shown(name)}', which is not there: it is of another model.{near}")
        if there.shape != wanted.shape:
            raise UserError(f"'{shown(name)}' is {there.shape}, in the patch {wanted.shape}: it is of another model.")
        if there.dtype != wanted.dtype:
            dtypes = [str(each.dtype).removeprefix("torch.") for each in (there, wanted)]
            raise UserError(
                f"'{shown(name)}' is {dtypes[0]}, the patch's values are {dtypes[1]}: load it in {dtypes[1]}."
            )
    base = patch.about.get("base_model") or "unknown"
    for name, shape in patch.checkpoint.items():
        if (there := holder.stored(name)) is None or there.shape != shape:
            found = "is not here" if there is None else f"is {there.shape} here"
            raise UserError(f"the patch is for another base model ({shown(base)}): its '{shown(name)}' {found}.")
    patched = {name: entries.index for name, entries in patch.tensors.items()}
    if rest_fingerprint(patch.checkpoint, holder.read, patched) != patch.rest:
        raise UserError(
            f"the patch is for another base model ({shown(base)}), or another patch was applied before: weights that "
            "it does not set are not those it was made for."
        )
    undo = {}
    for name, entries in patch.tensors.items():
        former = holder.read(name, entries.index.long())
        if digest(former) not in (entries.replaces, digest(entries.values)):
            raise UserError(
                f"'{shown(name)}' holds neither the values of the base ({shown(base)}) nor the patch's: undo the patch "
                "that was applied before."
            )
        undo[name] = entries._replace(values=former, replaces=digest(entries.values))
    return Patch(undo, patch.about, patch.checkpoint, patch.rest)


def _apply_to_folder(folder: Path, patch: Patch, out: str | Path | None) -> Patch:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder{where_looked(folder)}.{nearest_path(folder)}")
    if out is None:
        raise UserError(
            f"{folder}: a model folder is not changed in place: name a new one, apply_patch(…, out=FOLDER)."
        )
    out = Path(out).expanduser()
    check_replaceable(out, ())
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{out}: lies in the folder that is patched: name one beside it.")
    checkpoint = Checkpoint.of_folder(folder)
    undo = _checked(DictHolder(_Lazy(checkpoint)), patch)
    shards = {checkpoint.files[name] for name in patch.tensors}
    left_out = {*shards, WHOLE_CONFIG, *((NOTE, README) if (folder / NOTE).is_file() else ())}
    with replaced_folder(out, ()) as aside:
        # The hashes of a fully trained model's files are no longer those of these, and what an export says of itself is
        # no longer true. Modes stay behind: a model that is shared is read-only, down to its folder.
        for place, _, names in os.walk(folder, followlinks=True):
            for file in (Path(place, name) for name in names):
                name = file.relative_to(folder)
                if file.is_file() and str(name) not in left_out:
                    (aside / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, aside / name)
        for shard in sorted(shards):
            inside = {name: checkpoint.tensors[name] for name, file in checkpoint.files.items() if file == shard}
            values = ((name, with_entries(checkpoint.read(name), patch.tensors.get(name))) for name in inside)
            write_streamed(aside / shard, inside, values, {"format": "pt"})
    return undo


class _Lazy(Mapping[str, Tensor]):
    """A checkpoint's tensors, each mapped from its file when it is asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def __getitem__(self, name: str) -> Tensor:
        return self.checkpoint.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.tensors)

    def __len__(self) -> int:
        return len(self.checkpoint.tensors)


def with_entries(tensor: Tensor, entries: Entries | None) -> Tensor:
    """A tensor with a patch's values; itself where there are none."""
    if entries is None:
        return tensor
    flat = tensor.flatten().clone()
    flat[entries.index.long()] = entries.values
    return flat.view(tensor.shape)


def digest(values: Tensor) -> str:
    """The SHA-256 of some values' bytes."""
    return hashlib.sha256(memoryview(values.cpu().contiguous().view(torch.uint8).numpy())).hexdigest()


def index_dtype(shape: Iterable[int]) -> torch.dtype:
    """int32 where the flat places of a tensor fit, else int64."""
    return torch.int32 if torch.Size(tuple(shape)).numel() <= 2**31 else torch.int64


def entries_of(changed: Changed, shape: tuple[int, ...]) -> Entries:
    """What a patch holds of a changed tensor of `shape`."""
    return Entries(shape, changed.index.to(index_dtype(shape)), changed.values, digest(changed.former))


# ---- files ----


def write_patch(
    folder: Path,
    about: Mapping[str, Any],
    checkpoint: Mapping[str, tuple[int, ...]],
    entries: Callable[[], Iterable[tuple[str, Entries]]],
    rest: Callable[[Mapping[str, Tensor]], str],
) -> dict[str, int]:
    """Writes a patch's two files into an existing folder, with one tensor's entries in memory.

    entries: gives (name, `Entries`) of each tensor; it is called twice. rest: makes the `rest_fingerprint`, told which
    of the sampled places the patch sets. Returns how many `tensors` and `entries` there are.
    """
    described: dict[str, Any] = {}
    tensors: dict[str, Stored] = {}
    sampled: dict[str, Tensor] = {}
    for name, each in entries():
        places = sampled_places(each.shape)
        sampled[name] = places[torch.isin(places, each.index)]
        count = len(each.index)
        dtype = str(each.values.dtype).removeprefix("torch.")
        described[name] = {"shape": list(each.shape), "dtype": dtype, "count": count, "replaces": each.replaces}
        tensors[f"{name}.indices"] = Stored(each.index.dtype, (count,))
        tensors[f"{name}.values"] = Stored(each.values.dtype, (count,))
    content = {
        "format_version": FORMAT_VERSION,
        **{key: about.get(key) for key in ("base_model", "base_fingerprint", "method")},
        "tensors": described,
        "checkpoint": {name: list(shape) for name, shape in checkpoint.items()},
        "rest_fingerprint": rest(sampled),
    }
    values = (
        item for name, each in entries() for item in ((f"{name}.indices", each.index), (f"{name}.values", each.values))
    )
    write_streamed(folder / TENSORS, tensors, values, {BODY: body_hash(content, HASHED)})
    write_json(folder / CONFIG, content | {"sha256": file_hash(folder / TENSORS)})
    return {"tensors": len(described), "entries": sum(each["count"] for each in described.values())}


def _read(folder: Path) -> Patch:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder{where_looked(folder)}.{nearest_path(folder)}")
    content = read_json_object(folder / CONFIG, WHAT)
    if content.get("format_version") != FORMAT_VERSION:
        known = shown(content.get("format_version"))
        raise UserError(f"{folder}: patch format {known}, this version reads {FORMAT_VERSION}.")
    tensors, texts = read_described(folder / TENSORS, WHAT)
    sha256 = content.pop("sha256", None)
    if file_hash(folder / TENSORS) != sha256:
        raise UserError(f"{folder}: {TENSORS} is not the file that {CONFIG} describes (altered).")
    known = (body_hash(content, HASHED), body_hash(content))  # the second: patches once hashed the base's name too
    if texts.get(BODY) not in known:
        raise UserError(f"{folder}: {CONFIG} is not what was written with {TENSORS} (altered).")
    # From here on the files are what was written: by whom is not known, so that all is checked all the same.
    described, checkpoint = content.get("tensors"), content.get("checkpoint")
    if not isinstance(described, dict) or not isinstance(checkpoint, dict):
        raise UserError(f"{folder}: {CONFIG} needs tensors and checkpoint, two objects.")
    found: dict[str, Entries] = {}
    for name, facts in described.items():
        try:
            index, values = tensors.pop(f"{name}.indices"), tensors.pop(f"{name}.values")
            shape = tuple(facts["shape"])
            entries = Entries(shape, index, values, str(facts["replaces"]))
            dtype = str(values.dtype).removeprefix("torch.")
            right = (dtype, len(index), len(values)) == (facts["dtype"], facts["count"], facts["count"])
            count = torch.Size(shape).numel()
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder}: '{shown(name)}' lacks a part ({shown(error)}).") from None
        if not right or index.dim() != 1 or values.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
            raise UserError(f"{folder}: '{shown(name)}' is not as {CONFIG} describes it.")
        if len(index) and (not (index.diff() > 0).all() or index[0] < 0 or index[-1] >= count):
            raise UserError(f"{folder}: the indices of '{shown(name)}' are not sorted, unique and within {shape}.")
        if values.isnan().any():
            raise UserError(f"{folder}: '{shown(name)}' holds values that are not a number.")
        found[name] = entries
    if tensors:
        raise UserError(f"{folder}: '{shown(next(iter(tensors)))}' is not in {CONFIG}.")
    about = {key: content.get(key) for key in ("base_model", "base_fingerprint", "method")}
    for name, shape in checkpoint.items():
        if not isinstance(shape, list) or not all(type(side) is int for side in shape):
            raise UserError(f"{folder}: the shape of '{shown(name)}' in {CONFIG} is not a list of whole numbers.")
    shapes = {name: tuple(shape) for name, shape in checkpoint.items()}
    return Patch(found, about, shapes, str(content.get("rest_fingerprint")))

"""`patch`: the new values of the entries that changed, in the checkpoint's own names, shapes and places."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sparseft.errors import RunError, UserError
from sparseft.export.changed_tensors import ChangedTensors, base_model, base_of, merged_model
from sparseft.export.formats.base import Format, Options
from sparseft.export.holders import rest_fingerprint
from sparseft.export.patch import CONFIG, TENSORS, Entries, entries_of, write_patch
from sparseft.export.proof import HuggingFace
from sparseft.export.source import Source
from sparseft.export.values import check_values
from sparseft.files.hashing import file_hash
from sparseft.files.untrusted import read_json_object
from sparseft.models.checkpoint import Checkpoint, without_weights
from sparseft.models.loading import load_config


class PatchFormat(Format):
    """`patch.safetensors` and `patch.json`, as `sparseft.apply_patch` and engines with sparse updates take them."""

    name = "patch"
    rounded = True

    def check(self, source: Source, options: Options) -> list[str]:
        if options.dtype is not None:
            raise UserError("--dtype: a patch's values have the dtypes of the base's checkpoint; leave it out.")
        load_config(base_of(source))  # refuses what is quantized
        Checkpoint.of(base_of(source))
        if source.kind == "sparse":
            ChangedTensors(source)
        return []

    def write(self, source: Source, options: Options, folder: Path) -> dict[str, Any]:
        changed = ChangedTensors(source)
        if changed.extra:
            raise UserError(
                f"{source.folder}: it changes {next(iter(changed.extra))}, which the base ties to its embeddings and "
                "has no tensor for: a patch cannot hold it; use --format merged."
            )
        checkpoint = changed.checkpoint
        shapes = {name: checkpoint.tensors[name].shape for name in changed.places.names()}

        def entries() -> Iterator[tuple[str, Entries]]:
            for each in changed():
                yield each.name, entries_of(each, shapes[each.name])

        def read(name: str, index: Tensor) -> Tensor:
            return checkpoint.read(name).flatten()[index]

        about = {
            "base_model": base_of(source).path,
            "base_fingerprint": changed.fingerprint,
            "method": source.method,
        }
        facts = write_patch(folder, about, shapes, entries, lambda places: rest_fingerprint(shapes, read, places))
        return facts | {"bytes": sum(file.stat().st_size for file in folder.iterdir())}

    def verify(self, source: Source, options: Options, folder: Path) -> None:
        """Reads the files with safetensors alone, by the rules that are written in the documentation."""
        described = read_json_object(folder / CONFIG)
        checkpoint = Checkpoint.of(base_of(source))
        if file_hash(folder / TENSORS) != described["sha256"]:
            raise RunError(f"{TENSORS} is not the file that was written (altered meanwhile). Nothing was kept.")
        with safe_open(folder / TENSORS, "pt") as file:
            found = {name.rpartition(".")[0] for name in file.keys()}
            if found != set(described["tensors"]):
                raise RunError(f"{CONFIG} does not list the tensors that {TENSORS} holds. Nothing was kept.")
            for name, facts in described["tensors"].items():
                index, stored = file.get_tensor(f"{name}.indices"), checkpoint.tensors[name]
                count = torch.Size(stored.shape).numel()
                fits = torch.int32 if count <= 2**31 else torch.int64
                if (
                    (facts["shape"], facts["dtype"]) != (list(stored.shape), str(stored.dtype).removeprefix("torch."))
                    or index.dtype != fits
                    or not len(index)
                    or not (index.diff() > 0).all()
                    or not 0 <= int(index[0]) <= int(index[-1]) < count
                ):
                    raise RunError(f"{name} is not described as the base's checkpoint has it. Nothing was kept.")

            check_values(source, lambda name: _patched(file, described, checkpoint.read(name), name))

    def base(self, source: Source, options: Options) -> nn.Module:
        return base_model(source)

    def attached(self, source: Source, options: Options, base: nn.Module) -> nn.Module:
        return merged_model(source, base)

    def load(self, source: Source, options: Options, folder: Path) -> HuggingFace:
        """The patched checkpoint as a plain state dict, loaded by transformers."""
        import transformers

        checkpoint = Checkpoint.of(base_of(source))
        described = read_json_object(folder / CONFIG)
        with safe_open(folder / TENSORS, "pt") as file:
            tensors = {name: _patched(file, described, checkpoint.read(name), name) for name in checkpoint.tensors}
        plain = without_weights(base_of(source))
        model = type(plain).from_pretrained(None, config=plain.config, state_dict=tensors, dtype="auto")  # type: ignore[attr-defined]
        return HuggingFace(model.eval(), f"transformers {transformers.__version__}")


def _patched(file: Any, described: dict[str, Any], tensor: Tensor, name: str) -> Tensor:
    """A checkpoint's tensor with the values that the patch's file has for it."""
    if name not in described["tensors"]:
        return tensor
    flat = tensor.flatten().clone()
    flat[file.get_tensor(f"{name}.indices").long()] = file.get_tensor(f"{name}.values")
    return flat.view(tensor.shape)

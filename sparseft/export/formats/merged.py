"""`merged`: a Hugging Face model folder with the adapter in its weights.

The base's own files are copied, its weights one tensor after another with what changes in them: names, shapes and the
values of everything else are the base's to the bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.config import ModelConfig
from sparseft.errors import RunError
from sparseft.export.changed_tensors import ChangedTensors, base_model, base_of, merged_model
from sparseft.export.formats.base import Format, Options
from sparseft.export.proof import HuggingFace
from sparseft.export.source import Source
from sparseft.export.values import check_values
from sparseft.files.atomic import write_json, write_text
from sparseft.files.hub import TEMPLATES, TOKENIZER_FILES, check_inside
from sparseft.files.tensors import Stored, write_streamed
from sparseft.files.untrusted import read_json_object
from sparseft.models.checkpoint import BESIDE, FILE, INDEX, Checkpoint, fetch_beside
from sparseft.models.loading import load_config, load_model, resolve_device
from sparseft.models.packed.checkpoint import PackedCheckpoint
from sparseft.models.packed.unpacked import Unpacked

SHARD = 5 * 10**9  # bytes of a file at most, where no single tensor is larger

# Of a model folder, beside its tokenizer: all else that lies there is the user's own, and an export is published.
# Code comes along only where it is trusted.
KEPT = ("config.json", *BESIDE, "LICENSE*", "NOTICE*")
CODE = "*.py"


class Merged(Format):
    """`model.safetensors` (in shards where it is large), config, generation config and tokenizer."""

    name = "merged"
    rounded = whole = True

    def check(self, source: Source, options: Options) -> list[str]:
        load_config(base_of(source), packed=True)  # refuses what is quantized otherwise
        checkpoint = _base(source, options)
        if source.kind == "sparse":
            ChangedTensors(source, options.dtype, checkpoint)
        files_beside(source, checkpoint.folder)
        return []

    def write(self, source: Source, options: Options, folder: Path) -> dict[str, Any]:
        tokenizer = source.tokenizer  # of a hub id: its files are in the cache then
        changed = ChangedTensors(source, options.dtype, _base(source, options))
        checkpoint = changed.checkpoint
        tensors = {name: Stored(changed.target(name), each.shape) for name, each in checkpoint.tensors.items()}
        tensors |= {name: Stored(each.dtype, tuple(each.shape)) for name, each in changed.extra.items()}
        files = shards(tensors, SHARD)
        for file, names in files.items():
            inside = {name: tensors[name] for name in names}
            write_streamed(folder / file, inside, _values(changed, names), {"format": "pt"})
        size = sum(torch.Size(each.shape).numel() * each.dtype.itemsize for each in tensors.values())
        if len(files) > 1:
            weight_map = {name: file for file, names in files.items() for name in names}
            write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        self.copy_files(source, options, tokenizer, checkpoint.folder, folder, untied=bool(changed.extra))
        return {"files": len(files), "bytes": size}

    def copy_files(
        self, source: Source, options: Options, tokenizer: Any, base: Path, folder: Path, *, untied: bool
    ) -> None:
        """All else that makes the model work: the base's own files, and the tokenizer that was trained with."""
        fetch_beside(base_of(source))
        for entry in files_beside(source, base):
            place = folder / entry.relative_to(base)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(entry, place)
        if _has_another_tokenizer(source):
            tokenizer.save_pretrained(folder)
        content = read_json_object(folder / "config.json", numbers=False)
        if options.dtype is not None:
            content.pop("torch_dtype", None)
            content["dtype"] = str(options.dtype).removeprefix("torch.")
        content.pop("quantization_config", None)  # of a packed base, of which these are the plain values
        if not source.target.model.trust_remote_code:
            content.pop("auto_map", None)  # names code that is not there
        if untied:
            for part in (content, *(value for value in content.values() if isinstance(value, dict))):
                if part is content or "tie_word_embeddings" in part:
                    part["tie_word_embeddings"] = False
        _write_config(folder / "config.json", content)
        _forget_origin(folder)

    def verify(self, source: Source, options: Options, folder: Path) -> None:
        written, base = Checkpoint.of_folder(folder), _base(source, options)
        if missing := sorted(base.tensors.keys() - written.tensors.keys()):
            raise RunError(f"the export lacks {missing[0]} of the base. Nothing was kept.")
        check_values(source, written.read, options.dtype, base)

    def base(self, source: Source, options: Options) -> nn.Module:
        return base_model(source, options.dtype, _base(source, options))

    def attached(self, source: Source, options: Options, base: nn.Module) -> nn.Module:
        return merged_model(source, base, options.dtype)

    def load(self, source: Source, options: Options, folder: Path) -> HuggingFace:
        import transformers

        trusted = source.target.model.trust_remote_code
        model = load_model(ModelConfig(path=str(folder), trust_remote_code=trusted))
        return HuggingFace(model, f"transformers {transformers.__version__}")


def _has_another_tokenizer(source: Source) -> bool:
    """Than the base's, of which no file may stay."""
    return bool(source.target.model.tokenizer) or source.kind == "full"


def files_beside(source: Source, base: Path) -> list[Path]:
    """The files of the base that come along beside its weights. UserError where one is a link out of its folder."""
    of_tokenizer = [] if _has_another_tokenizer(source) else TOKENIZER_FILES
    others = (*KEPT, *((CODE,) if source.target.model.trust_remote_code else ()))
    found = []
    for entry in sorted(base.iterdir()):
        patterns = of_tokenizer if _is_one_of(entry.name, TOKENIZER_FILES) else others
        if entry.is_file() and _is_one_of(entry.name, patterns):
            found.append(entry)
        elif entry.is_dir() and entry.name == TEMPLATES and of_tokenizer:
            found += sorted(each for each in entry.iterdir() if each.is_file())
    check_inside(found, base)
    return found


def _forget_origin(folder: Path) -> None:
    """Takes out of a model's files where it was loaded from when they were written, often somebody's own folder."""
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        content = read_json_object(folder / name, numbers=False)
        parts = [content, *(part for part in content.values() if isinstance(part, dict))]
        known = [(part, key) for part in parts for key in ("_name_or_path", "name_or_path") if key in part]
        for part, key in known:
            del part[key]
        if known:
            _write_config(folder / name, content)


def _write_config(path: Path, content: dict[str, Any]) -> None:
    """Infinities stay what they are, as transformers writes and reads them: strict JSON has none."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def _is_one_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _base(source: Source, options: Options) -> Checkpoint:
    """The weights that differences are added to: what a packed base computed with, or the checkpoint's own."""
    device, room = resolve_device(source.config.hardware.device), Path(source.config.cache_dir).expanduser()
    if source.stored_packed:
        return PackedCheckpoint.of_base(base_of(source), device, room)
    if source.packed is None or options.base == "checkpoint":
        return Checkpoint.of(base_of(source))
    kept = {module: change.entries for module, change in source.changes.items()} if source.residual else {}
    return Unpacked.of_base(source.packed, device, kept, room)


def shards(tensors: dict[str, Stored], limit: int) -> dict[str, list[str]]:
    """The files that tensors are written to, in their order, each at most `limit` bytes (or one tensor)."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, each in tensors.items():
        own = torch.Size(each.shape).numel() * each.dtype.itemsize
        if parts[-1] and size + own > limit:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += own
    if len(parts) == 1:
        return {FILE: parts[0]}
    stem, suffix = Path(FILE).stem, Path(FILE).suffix
    return {f"{stem}-{i + 1:05d}-of-{len(parts):05d}{suffix}": names for i, names in enumerate(parts)}


def _values(changed: ChangedTensors, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The merged tensors of those names, each once."""
    left = set(names)
    for name, index, values, _ in changed(left):
        left.remove(name)
        tensor = changed.checkpoint.read(name).to(changed.target(name), copy=True)
        tensor.view(-1)[index] = values
        yield name, tensor
    for name in sorted(left):
        yield (
            name,
            changed.extra[name] if name in changed.extra else changed.checkpoint.read(name).to(changed.target(name)),
        )

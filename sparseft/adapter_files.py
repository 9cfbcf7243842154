"""The files of an adapter folder: safetensors and JSON, nothing that executes."""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.errors import UserError
from sparseft.files import read_json, read_tensors, split_name
from sparseft.fusing import Values
from sparseft.runs import write_json

FORMAT_VERSION = 1
TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def write_sparse(
    values: dict[str, dict[str, Values]], shapes: dict[str, tuple[int, int]], header: dict[str, Any], folder: Path
) -> None:
    """Writes a sparse adapter's two files into an existing folder: int32 indices, float32 deltas."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    modules: dict[str, Any] = {}
    block_size = None
    for module, kinds in values.items():
        modules[module] = {"shape": list(shapes[module])}
        for kind, value in kinds.items():
            modules[module][kind] = len(value.index)
            block_size = value.block_size or block_size
            tensors[f"{module}.{kind}.index"] = value.index.to("cpu", torch.int32).contiguous()
            tensors[f"{module}.{kind}.delta"] = value.delta.to("cpu", torch.float32).contiguous()
    save_file(tensors, folder / TENSORS)
    content = {"format_version": FORMAT_VERSION, **header, "block_size": block_size}
    write_json(folder / CONFIG, content | {"sha256": file_hash(folder / TENSORS), "modules": modules})


def write_whole(model: nn.Module, header: dict[str, Any], folder: Path) -> None:
    """Writes a fully fine-tuned model as a Hugging Face folder, with `adapter_config.json` beside its files."""
    model.save_pretrained(folder)
    write_json(folder / CONFIG, {"format_version": FORMAT_VERSION, **header, "modules": {}})


def write_peft(model: nn.Module, name: str, header: dict[str, Any], folder: Path) -> None:
    """Writes peft's own files, with a `sparseft` key in `adapter_config.json`."""
    model.save_pretrained(folder, selected_adapters=[name])
    if name != "default":  # peft puts every other adapter into a folder of its own
        for file in (folder / name).iterdir():
            file.rename(folder / file.name)
        (folder / name).rmdir()
    content = read_json(folder / CONFIG, "adapter")
    write_json(folder / CONFIG, content | {"sparseft": {"format_version": FORMAT_VERSION, **header}})


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` of a sparse adapter, a full model or a peft adapter, its format checked."""
    content = read_json(folder / CONFIG, "adapter")
    if "peft_type" not in content and content.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder}: adapter format {content.get('format_version')}, this version reads {FORMAT_VERSION}."
        )
    return content


def is_whole_model(folder: Path) -> bool:
    """Whether an adapter's folder is a Hugging Face model, as full fine-tuning leaves one."""
    return (folder / "config.json").is_file()


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_sparse(folder: Path, content: dict[str, Any]) -> dict[str, dict[str, Values]]:
    """The indices and deltas of a sparse adapter's folder, by module and kind, checked against its config."""
    tensors = read_tensors(folder / TENSORS, "adapter")
    if file_hash(folder / TENSORS) != content.get("sha256"):
        raise UserError(f"{folder}: {TENSORS} is not the file that {CONFIG} describes (altered).")
    found: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for tensor_name, tensor in tensors.items():
        module, kind, part = split_name(tensor_name, folder)
        found[module][kind][part] = tensor
    values: dict[str, dict[str, Values]] = {}
    block_size = content.get("block_size")
    if block_size is not None and (type(block_size) is not int or not 1 <= block_size <= 1 << 16):
        raise UserError(f"{folder}: block_size={block_size!r} in {CONFIG} is not a block size.")
    for module, kinds in found.items():
        values[module] = {}
        for kind, parts in kinds.items():
            if set(parts) != {"index", "delta"}:
                raise UserError(f"{folder}: {module}.{kind} needs index and delta, got {', '.join(sorted(parts))}.")
            if parts["index"].is_floating_point() or parts["delta"].dtype != torch.float32:
                raise UserError(f"{folder}: {module}.{kind} needs an integer index and a float32 delta.")
            if not torch.isfinite(parts["delta"]).all():
                raise UserError(f"{folder}: {module}.{kind}.delta holds values that are not finite.")
            values[module][kind] = Values(parts["index"].long(), parts["delta"], block_size)
    if not values:
        raise UserError(f"{folder}: the adapter holds no module.")
    return values


def load_peft(model: nn.Module, folder: Path, name: str) -> nn.Module:
    """Loads a folder that peft reads, onto a plain model or peft's wrapper; returns the wrapper, `name` active."""
    import peft

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unexpected keyword arguments")  # `sparseft`, our own
            if not isinstance(model, peft.PeftModel):
                return peft.PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=True)
            if name in model.peft_config:
                model.delete_adapter(name)
            model.load_adapter(str(folder), adapter_name=name, is_trainable=True)
            model.set_adapter(name)
            return model
    except Exception as error:  # peft raises many kinds for a folder that does not fit; all of them are the folder's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: peft cannot load it on this model: {reason}") from error

"""The files of an adapter folder: safetensors and JSON, nothing that executes."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.adapters.combine import Values
from sparseft.errors import UserError, shown
from sparseft.files.atomic import move, write_json
from sparseft.files.hashing import BODY, HASHED, body_hash, describe_whole, file_hash
from sparseft.files.tensors import ADAPTER_CONFIG as CONFIG
from sparseft.files.tensors import ADAPTER_TENSORS as TENSORS
from sparseft.files.tensors import KINDS, WHOLE_CONFIG, read_described, read_tensors, split_name
from sparseft.files.untrusted import read_json_object
from sparseft.methods.exact_targets import portable

FORMAT_VERSION = 1


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
    content = {"format_version": FORMAT_VERSION, **header, "block_size": block_size, "modules": modules}
    save_file(tensors, folder / TENSORS, {BODY: body_hash(content, HASHED)})
    write_json(folder / CONFIG, content | {"sha256": file_hash(folder / TENSORS)})


def write_whole(model: nn.Module, header: dict[str, Any], folder: Path) -> None:
    """Writes a fully fine-tuned model as a Hugging Face folder, with `sparseft_config.json` beside its files."""
    model.save_pretrained(folder)
    content = {"format_version": FORMAT_VERSION, **header, "modules": {}}
    write_json(folder / WHOLE_CONFIG, describe_whole(folder, content))


def write_peft(model: nn.Module, name: str, header: dict[str, Any], folder: Path) -> None:
    """Writes peft's own files, with a `sparseft` key in `adapter_config.json`."""
    model.save_pretrained(folder, selected_adapters=[name])
    if name != "default":  # peft puts every other adapter into a folder of its own
        for file in (folder / name).iterdir():
            move(file, folder)
        (folder / name).rmdir()
    content = portable(read_json_object(folder / CONFIG, "adapter"), model, name)
    own = {"format_version": FORMAT_VERSION, **header, "sha256": file_hash(folder / TENSORS)}
    own[BODY] = _peft_hash(content, own)
    write_json(folder / CONFIG, content | {"sparseft": own})


def _peft_hash(content: dict[str, Any], own: dict[str, Any]) -> str:
    """`body_hash` of peft's description and of what sparseft adds to it, but for the base's name."""
    peft = {key: value for key, value in content.items() if key not in ("sparseft", "base_model_name_or_path")}
    return body_hash(peft | {"own": {key: value for key, value in own.items() if key not in (BODY, "base_model")}})


def read_config(folder: Path) -> dict[str, Any]:
    """What a sparse adapter, a full model or a peft adapter says of itself, its format checked."""
    content = read_json_object(folder / (WHOLE_CONFIG if (folder / WHOLE_CONFIG).is_file() else CONFIG), "adapter")
    if "peft_type" not in content and content.get("format_version") != FORMAT_VERSION:
        known = shown(content.get("format_version"))
        raise UserError(f"{folder}: adapter format {known}, this version reads {FORMAT_VERSION}.")
    return content


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds what `read_config` reads."""
    return (folder / CONFIG).is_file() or (folder / WHOLE_CONFIG).is_file()


def is_whole_model(folder: Path) -> bool:
    """Whether an adapter's folder is a Hugging Face model, as full fine-tuning leaves one."""
    return (folder / "config.json").is_file()


def read_sparse(folder: Path, content: dict[str, Any]) -> dict[str, dict[str, Values]]:
    """The indices and deltas of a sparse adapter's folder, by module and kind, checked against its config."""
    tensors, texts = read_described(folder / TENSORS, "adapter")
    if file_hash(folder / TENSORS) != content.get("sha256", file_hash(folder / TENSORS)):  # others may leave it out
        raise UserError(f"{folder}: {TENSORS} is not the file that {CONFIG} describes (altered).")
    found: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for tensor_name, tensor in tensors.items():
        module, kind, part = split_name(tensor_name, folder)
        found[module][kind][part] = tensor
    values: dict[str, dict[str, Values]] = {}
    block_size = content.get("block_size")
    if block_size is not None and (type(block_size) is not int or not 1 <= block_size <= 1 << 16):
        raise UserError(f"{folder}: block_size={shown(repr(block_size))} in {CONFIG} is not a block size.")
    for module, kinds in found.items():
        values[module] = {}
        for kind, parts in kinds.items():
            if set(parts) != {"index", "delta"}:
                raise UserError(f"{folder}: {module}.{kind} needs index and delta, got {', '.join(sorted(parts))}.")
            if parts["index"].dtype != torch.int32 or parts["delta"].dtype != torch.float32:
                raise UserError(f"{folder}: {module}.{kind} needs an int32 index and a float32 delta.")
            if parts["index"].dim() == 0:
                raise UserError(f"{folder}: {module}.{kind}.index must be a list of indices, got a single number.")
            if not torch.isfinite(parts["delta"]).all():
                raise UserError(f"{folder}: {module}.{kind}.delta holds values that are not finite.")
            size = block_size
            if kind == "blocks" and size is None and parts["delta"].dim() == 3:
                size = parts["delta"].shape[-1]
            count, shape = len(parts["index"]), tuple(parts["delta"].shape)
            if kind == "blocks" and shape != (count, size, size):  # before memory is taken for what the config says
                raise UserError(f"{folder}: {module}: a delta of shape {shape} does not fit {count} blocks of {size}.")
            values[module][kind] = Values(parts["index"].long(), parts["delta"], size)
    if not values:
        raise UserError(f"{folder}: the adapter holds no module.")
    _check_described(folder, content.get("modules"), values)
    if body_hash(content, HASHED) != texts.get(BODY, body_hash(content, HASHED)):
        raise UserError(f"{folder}: {CONFIG} is not what was written with {TENSORS} (altered).")
    return values


def _check_described(folder: Path, described: Any, values: dict[str, dict[str, Values]]) -> None:
    """Raises `UserError` where the tensors are not those that the config's `modules` lists."""
    if not isinstance(described, dict) or not all(isinstance(info, dict) for info in described.values()):
        raise UserError(f"{folder}: {CONFIG} needs modules, an object of objects.")
    for module in described.keys() ^ values.keys():
        raise UserError(f"{folder}: '{shown(module)}' is only in {CONFIG if module in described else TENSORS}.")
    for module, kinds in values.items():
        found = {kind: len(value.index) for kind, value in kinds.items()}
        listed = {kind: described[module][kind] for kind in KINDS if kind in described[module]}
        if found != listed:
            raise UserError(f"{folder}: {module} has {found}, but {CONFIG} lists {shown(listed)}.")


# What a LoRA's description may set: nothing that makes peft import a module by its name (`megatron_config`), change the
# base's weights (`init_lora_weights`), repeat its layers or take memory that the file's own tensors do not account for.
PLAIN_PEFT = (
    "alpha_pattern auto_mapping base_model_name_or_path bias ensure_weight_tying exclude_modules fan_in_fan_out "
    "inference_mode layers_pattern layers_to_transform lora_alpha lora_bias lora_dropout megatron_core modules_to_save "
    "peft_type peft_version qalora_group_size r rank_pattern revision runtime_config sparseft target_modules "
    "target_parameters task_type trainable_token_indices use_dora use_rslora"
).split()

INITIAL = (True, False, "gaussian", "orthogonal")  # values that the file's replace; the base stays as it is


def check_peft(folder: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    """Refuses a peft adapter that is no plain LoRA (DoRA included), or not what was written. Returns its tensors."""
    import peft

    if (kind := content.get("peft_type")) != "LORA":
        raise UserError(f"{folder}: a peft adapter of type {shown(kind)}: only LORA (DoRA included) can be loaded.")
    usual = peft.LoraConfig().to_dict()
    for key, value in content.items():
        known = key in PLAIN_PEFT or key not in usual or (key == "init_lora_weights" and value in INITIAL)
        if not known and value and value != usual[key]:
            raise UserError(f"{folder}: {shown(key)} in {CONFIG} is not supported: only plain LoRA and DoRA are.")
    tensors = read_tensors(folder / TENSORS, "adapter")
    own = content.get("sparseft")
    if isinstance(own, dict):
        if file_hash(folder / TENSORS) != own.get("sha256", file_hash(folder / TENSORS)):
            raise UserError(f"{folder}: {TENSORS} is not the file that {CONFIG} describes (altered).")
        if _peft_hash(content, own) != own.get(BODY, _peft_hash(content, own)):
            raise UserError(f"{folder}: {CONFIG} is not what was written with {TENSORS} (altered).")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{folder}: {shown(name)} holds values that are not finite.")
    ranks = [len(t) for name, t in tensors.items() if t.dim() and ("lora_A" in name or "lora_embedding_A" in name)]
    pattern = content.get("rank_pattern") or {}
    given = [content.get("r", usual["r"]), *(pattern.values() if isinstance(pattern, dict) else [None])]
    largest = max(ranks, default=0)
    if not all(type(rank) is int and 1 <= rank <= largest for rank in given):
        ranks = shown(given[:3])
        raise UserError(f"{folder}: {CONFIG} gives the ranks {ranks}, but the tensors' largest is {largest}.")
    return tensors


def adapter_hash(path: Path | None) -> str | None:
    """SHA-256 of the adapter's tensors."""
    from sparseft.adapters.files import TENSORS, file_hash

    return file_hash(path / TENSORS) if path is not None and (path / TENSORS).is_file() else None

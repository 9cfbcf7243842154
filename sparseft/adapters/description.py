"""What an adapter's folder says of itself (`adapter_config.json`): safetensors and JSON, nothing that executes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparseft.errors import UserError, shown
from sparseft.files.hashing import BODY, body_hash, file_hash
from sparseft.files.tensors import ADAPTER_CONFIG as CONFIG
from sparseft.files.tensors import ADAPTER_FORMAT as FORMAT_VERSION
from sparseft.files.tensors import ADAPTER_TENSORS as TENSORS
from sparseft.files.tensors import WHOLE_CONFIG, read_tensors
from sparseft.files.untrusted import read_json_object
from sparseft.rules import Rule


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


def peft_hash(content: dict[str, Any], own: dict[str, Any]) -> str:
    """`body_hash` of peft's description and of what sparseft adds to it, but for the base's name."""
    peft = {key: value for key, value in content.items() if key not in ("sparseft", "base_model_name_or_path")}
    return body_hash(peft | {"own": {key: value for key, value in own.items() if key not in (BODY, "base_model")}})


# What a LoRA's description may set: nothing that makes peft import a module by its name (`megatron_config`), change the
# base's weights (`init_lora_weights`), repeat its layers or take memory that the file's own tensors do not account for.
PLAIN_PEFT = (
    "alpha_pattern auto_mapping base_model_name_or_path bias ensure_weight_tying exclude_modules fan_in_fan_out "
    "inference_mode layers_pattern layers_to_transform lora_alpha lora_bias lora_dropout megatron_core modules_to_save "
    "peft_type peft_version qalora_group_size r rank_pattern revision runtime_config sparseft target_modules "
    "target_parameters task_type trainable_token_indices use_dora use_rslora"
).split()

INITIAL = (True, False, "gaussian", "orthogonal")  # values that the file's replace; the base stays as it is

# What peft takes as it comes, or looks at late or not at all.
SWITCH = Rule(lambda value: value is None or isinstance(value, bool), "true or false")
PEFT_RULES = {
    "bias": Rule(lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "lora_alpha": Rule(lambda value: type(value) in (int, float) and abs(value) < 1e9, "a number below 1e9"),
    "lora_dropout": Rule(lambda value: type(value) in (int, float) and 0 <= value <= 1, "a probability"),
} | dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying"), SWITCH)

EXPRESSIONS = ("exclude_modules", "layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern")


def is_bounded(expression: object) -> bool:
    """Whether a regular expression is matched against a name in at most some ten thousand steps: it repeats little, and
    no group, and has few alternatives. peft matches a description's against every module's name."""
    text = str(expression)
    return len(re.findall(r"[*+?{]", text)) <= 2 and text.count("(") <= 3 and not re.search(r"\)[*+?{]", text)


def check_peft(folder: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    """Refuses a peft adapter that is no plain LoRA (DoRA included), or not what was written. Returns its tensors."""
    import peft

    if (kind := content.get("peft_type")) != "LORA":
        raise UserError(f"{folder}: a peft adapter of type {shown(kind)}: only LORA (DoRA included) can be loaded.")
    usual = peft.LoraConfig().to_dict()
    for key, value in content.items():
        known = key in PLAIN_PEFT or key not in usual or (key == "init_lora_weights" and value in INITIAL)
        if not known and value is not None and value is not False and value != usual[key]:
            raise UserError(f"{folder}: {shown(key)} in {CONFIG} is not supported: only plain LoRA and DoRA are.")
    for key, rule in PEFT_RULES.items():
        if key in content and not rule.holds(content[key]):
            raise UserError(f"{folder}: {key}={shown(repr(content[key]))} in {CONFIG}: expected {rule.expected}.")
    tensors = read_tensors(folder / TENSORS, "adapter")
    own = content.get("sparseft")
    if isinstance(own, dict):
        if file_hash(folder / TENSORS) != own.get("sha256", file_hash(folder / TENSORS)):
            raise UserError(f"{folder}: {TENSORS} is not the file that {CONFIG} describes (altered).")
        if peft_hash(content, own) != own.get(BODY, peft_hash(content, own)):
            raise UserError(f"{folder}: {CONFIG} is not what was written with {TENSORS} (altered).")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{folder}: {shown(name)} holds values that are not finite.")
    for key in EXPRESSIONS:
        value = content.get(key)
        texts = [value] if isinstance(value, str) else list(value) if isinstance(value, list | dict) else []
        unbounded = [text for text in texts if not is_bounded(text)]
        expressions = [text for text in texts if re.search(r"[*+?{(\[|\\]", str(text))]
        if unbounded or len(expressions) > max(1, len(tensors)):
            example = shown((unbounded or texts)[0])
            raise UserError(
                f"{folder}: matching {key} in {CONFIG} ({example}) could take without end: expected names of modules."
            )
    largest = largest_rank(tensors)
    pattern = content.get("rank_pattern") or {}
    given = list(pattern.values()) if isinstance(pattern, dict) else [None]
    usually = content.get("r", usual["r"])  # beside patterns it may be no linear's
    whole = all(type(rank) is int and rank >= 1 for rank in (usually, *given))
    if not whole or max(given or [usually]) > largest:
        ranks = shown([usually, *given][:3])
        raise UserError(f"{folder}: {CONFIG} gives the ranks {ranks}, but the tensors' largest is {largest}.")
    return tensors


def largest_rank(tensors: Mapping[str, Tensor]) -> int:
    """Of a LoRA's tensors; 0 where none is of a low rank."""
    ranks = [len(t) for name, t in tensors.items() if t.dim() and ("lora_A" in name or "lora_embedding_A" in name)]
    return max(ranks, default=0)

"""What a LoRA folder changes, linear by linear, by PEFT's rules: rank and alpha patterns and rsLoRA become scales."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from sparseft.adapters.description import check_peft
from sparseft.errors import UserError, shown
from sparseft.export.changes import LowRankChange

HELP = "--format merged holds it"
KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


def lora_changes(folder: Path, content: dict[str, Any]) -> dict[str, LowRankChange]:
    """The changes of a LoRA folder by linear. DoRA, biases, embeddings and modules trained whole are no product of two
    factors of one linear: a `UserError` that names them. content: the folder's `adapter_config.json`."""
    tensors = check_peft(folder, content)
    if content.get("use_dora"):
        raise UserError(f"{folder}: DoRA scales whole weights, which is no low-rank change: {HELP}.")
    if content.get("trainable_token_indices"):
        raise UserError(f"{folder}: trains single tokens of the embeddings, which no low-rank format holds: {HELP}.")
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None or tensor.dim() != 2:
            raise UserError(f"{folder}: {shown(key)} is not a linear's LoRA, and no low-rank format holds it: {HELP}.")
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    changes = {}
    for module, pair in sides.items():
        if set(pair) != {"A", "B"} or len(pair["A"]) != pair["B"].shape[1]:
            raise UserError(f"{folder}: {shown(module)} needs lora_A (r, in) and lora_B (out, r) of one r.")
        changes[module] = LowRankChange(pair["A"], pair["B"], _scale(content, module, len(pair["A"])))
    return changes


def _scale(content: dict[str, Any], module: str, rank: int) -> float:
    """alpha / r of one linear, or alpha / √r."""
    alpha = float(_by_pattern(content.get("alpha_pattern"), module, content.get("lora_alpha", 8)))
    return alpha / math.sqrt(rank) if content.get("use_rslora") else alpha / rank


def _by_pattern(patterns: dict[str, Any] | None, module: str, usual: Any) -> Any:
    """The value of the first pattern, a regular expression, that a module's name ends in."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return usual

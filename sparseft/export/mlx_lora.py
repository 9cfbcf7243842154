"""A LoRA as mlx-lm takes it: `fine_tune_type: lora`, one rank and one scale for all linears, named in full."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import pad

from sparseft.errors import RunError, UserError, reason_of
from sparseft.export.formats.base import rounding
from sparseft.export.low_rank import factors, rank
from sparseft.export.low_rank_forward import LowRank
from sparseft.export.skeleton import Skeleton
from sparseft.export.source import Source
from sparseft.files.atomic import write_json
from sparseft.files.tensors import Stored, write_streamed
from sparseft.files.untrusted import read_json_object

TENSORS, CONFIG = "adapters.safetensors", "adapter_config.json"
TINY = 2.0**-25  # the smallest that fp16 holds rounds by half of it
Naming = Callable[[str], str]  # mlx-lm's name of a linear of ours


def check(source: Source) -> None:
    """A `UserError` where the LoRA is on something else than dense linears of decoder layers."""
    spec = Skeleton.of(source).spec
    for linear in sorted(source.low_rank):
        if linear not in spec.known or linear in spec.stacked:
            raise UserError(
                f"{linear} is no dense linear of the model's decoder layers, which is all that --format mlx holds of a "
                "LoRA; --format merged holds it."
            )


def write(source: Source, dtype: torch.dtype, folder: Path, naming: Naming) -> dict[str, Any]:
    """lora_a (in, r) and lora_b (r, out) of each linear, filled up with zeros to the highest rank; the scale is 1."""
    changes = source.low_rank
    most = max(map(rank, changes.values()))
    described: dict[str, Stored] = {}
    for linear, change in changes.items():
        out_features, in_features = change.shape
        described[f"{naming(linear)}.lora_a"] = Stored(dtype, (in_features, most))
        described[f"{naming(linear)}.lora_b"] = Stored(dtype, (most, out_features))

    def tensors() -> Any:
        for linear, change in changes.items():
            b, a = factors(change)
            yield f"{naming(linear)}.lora_a", pad(a, (0, 0, 0, most - len(a))).t().contiguous().to(dtype)
            yield f"{naming(linear)}.lora_b", pad(b, (0, most - b.shape[1])).t().contiguous().to(dtype)

    write_streamed(folder / TENSORS, described, tensors(), {})
    settings = {
        "fine_tune_type": "lora",
        "num_layers": source.text_config.num_hidden_layers,
        "lora_parameters": {"rank": most, "scale": 1.0, "dropout": 0.0, "keys": sorted(map(naming, changes))},
        "model": source.target.model.path,
    }
    write_json(folder / CONFIG, settings)
    return {"rank": most, "linears": len(changes), "bytes": (folder / TENSORS).stat().st_size}


def verify(source: Source, dtype: torch.dtype, folder: Path, naming: Naming) -> None:
    """Every product against the adapter's, within the rounding of the files' dtype."""
    found = read(folder, {naming(linear): linear for linear in source.low_rank})
    for linear, change in source.low_rank.items():
        if linear not in found:
            raise RunError(f"{TENSORS} lacks {linear}. Nothing was kept.")
        _, b, a, scale = found[linear]
        if (len(b), a.shape[1]) != change.shape:
            raise RunError(f"{TENSORS}: {linear} is {(len(b), a.shape[1])}, not {change.shape}. Nothing was kept.")
        allowed = scale * (b.abs() @ a.abs()) * (rounding(source, dtype) + 2.0**-20)
        if dtype != torch.float32:
            allowed += TINY * scale * (b.abs().sum(1, keepdim=True) + a.abs().sum(0))
        wrong = ~((scale * (b @ a) - change.dense()).abs() <= allowed)  # NaN too
        if bool(wrong.any()):
            raise RunError(
                f"{TENSORS} is not what was trained: {int(wrong.sum())} of the {wrong.numel()} entries of {linear} "
                "differ beyond rounding. Nothing was kept."
            )


def read(folder: Path, linears: dict[str, str]) -> dict[str, LowRank]:
    """The differences in the file by our names of their linears. linears: mlx-lm's names to ours."""
    try:
        settings = read_json_object(folder / CONFIG, "adapter")
        if settings.get("fine_tune_type") != "lora":
            raise RunError(f"{CONFIG} says fine_tune_type {settings.get('fine_tune_type')!r}, not 'lora'.")
        most, scale, keys = (settings["lora_parameters"][name] for name in ("rank", "scale", "keys"))
        with safe_open(folder / TENSORS, "pt") as file:
            sides: dict[str, dict[str, Tensor]] = {}
            for name in file.keys():
                linear, _, side = name.rpartition(".")
                sides.setdefault(linear, {})[side] = file.get_tensor(name).float()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise RunError(f"{folder.name} cannot be read: {reason_of(error)}") from error
    if sides.keys() != set(keys):
        raise RunError(f"{CONFIG} names {len(keys)} linears, {TENSORS} holds others. Nothing was kept.")
    found = {}
    for name, pair in sides.items():
        a, b = pair.get("lora_a"), pair.get("lora_b")
        if name not in linears or len(pair) != 2 or a is None or b is None or a.shape[1] != most or len(b) != most:
            raise RunError(f"{TENSORS}: {name} has no lora_a and lora_b of rank {most}, or was not trained.")
        found[linears[name]] = LowRank(torch.arange(b.shape[1]), b.t().contiguous(), a.t().contiguous(), scale)
    return found

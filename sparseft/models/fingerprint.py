"""The base model's fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.distributed.shards import full_shape, gathered
from sparseft.errors import UserError, shown
from sparseft.models.checkpoint import Entries
from sparseft.models.decoder import base_parameters
from sparseft.models.packed.quantized import numbers_of
from sparseft.models.packed.unquantized import Unquantized

SAMPLES = 64  # values of each weight
STANDS_FOR = "_sparseft_fingerprints"  # the attribute of a model that is another one unpacked: that one's


def base_fingerprint(model: nn.Module) -> str:
    """A hash over the base weights' names, shapes and `SAMPLES` evenly spaced values each.

    Values are rounded to bf16, and those below fp16's smallest normal number to zero, so that a checkpoint loaded in
    fp32 or bf16 has the same fingerprint, and in fp16 too if it is stored in half precision.
    To be taken before any delta is written.
    """
    return base_fingerprints(model)[0]


def base_fingerprints(model: nn.Module) -> list[str]:
    """`base_fingerprint`, and where it differs, the one that the same weights have once they are loaded in fp16: there
    fp32 values are rounded twice. Two models are of one base where the lists share an entry. Of a model that was
    quantized on loading they are those of its checkpoint, of one that was unpacked those of the packed one.
    """
    if (known := vars(model).get(STANDS_FOR)) is not None:
        return list(known)
    if (checkpoint := Unquantized.of(model)) is not None:
        return fingerprints_of(checkpoint.parameters())
    return fingerprints_of(sorted(base_parameters(model), key=lambda item: item[0]))


def fingerprints_of(parameters: Iterable[tuple[str, Tensor | Entries]]) -> list[str]:
    """`base_fingerprints` of the model that has these parameters, in the order of their names, tied ones once."""
    digest, as_fp16 = hashlib.sha256(), hashlib.sha256()
    for name, parameter in parameters:
        shape = parameter.shape if isinstance(parameter, Entries) else full_shape(parameter)
        for each in (digest, as_fp16):
            each.update(f"{name}{tuple(shape)}".encode())
        if shape.numel() == 0 or (isinstance(parameter, Tensor) and parameter.is_meta):
            continue
        positions = torch.linspace(0, shape.numel() - 1, min(SAMPLES, shape.numel()), dtype=torch.float64).long()
        if isinstance(parameter, Entries):
            sampled = parameter.at(positions)
        else:
            with gathered([parameter]) as (whole,):
                flat = numbers_of(whole.detach()).reshape(-1)
                sampled = flat[positions.to(flat.device)].cpu()
        for each, values in ((digest, sampled), (as_fp16, sampled.half())):
            values = values.to(torch.bfloat16).float()
            values = values.masked_fill(values.abs() < 2.0**-14, 0.0)  # this also leaves one sign of zero
            each.update(values.numpy().tobytes())
    return list(dict.fromkeys((digest.hexdigest(), as_fp16.hexdigest())))


def check_base(fingerprints: list[str], dtype: str, folder: Path, content: dict[str, Any]) -> None:
    """Refuses an adapter whose fingerprints say that it was made for other weights than a model's.

    fingerprints, dtype: the model's own, as it was loaded.
    """
    first, others = content.get("base_fingerprint"), content.get("other_fingerprints")
    known = [first, *(others if isinstance(others, list) else [])]
    if isinstance(first, str) and any(entry in known for entry in fingerprints):
        return
    base, then = shown(content.get("base_model") or "unknown"), content.get("base_dtype")
    message = f"{folder}: made for another base model ({base}): the weights' fingerprints differ."
    if then != dtype:
        before = shown(then) if isinstance(then, str) else "another dtype"
        message += f" If it is this one: it was loaded in {before} then, in {dtype} now (model.dtype)."
    raise UserError(message)

"""Writes a safetensors file tensor by tensor: the header first, so that one tensor is in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Header = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def write_stream(
    path: Path, header: Header, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes `tensors` (name, tensor), on whatever device, to a new file.

    header: the dtype and shape of each tensor, in the order in which they come. metadata: texts for the header.
    """
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in header.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    expected = iter(header.items())
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            told = next(expected, None)
            assert told == (name, (tensor.dtype, tuple(tensor.shape))), f"{name} is not what the header says: {told}"
            raw = tensor.detach().cpu().contiguous().flatten()
            file.write(raw.view(torch.uint8).numpy().data if raw.numel() else b"")
        assert next(expected, None) is None, "tensors that the header names are missing"

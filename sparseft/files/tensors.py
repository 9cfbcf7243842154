"""Reading and writing the folders of tensors that sparseft leaves: safetensors and JSON only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparseft.errors import UserError, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What such a folder is known by. A whole model has another description than an adapter: transformers would take a
# folder with an adapter_config.json for a peft adapter.
ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"
WHOLE_CONFIG = "sparseft_config.json"
ADAPTER_FORMAT = 1  # version of a sparse adapter's folder
SELECTION_CONFIG, SELECTION_TENSORS = "selection.json", "selection.safetensors"
DESCRIPTIONS = (ADAPTER_CONFIG, WHOLE_CONFIG)  # of an adapter

KINDS = ("rows", "columns", "blocks", "grid")

MAX_NAME = 1000  # characters of a tensor's name: the longest that models have are a tenth of it


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a missing or damaged one is a `UserError` naming it."""
    return read_described(path, what)[0]


def read_described(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `read_tensors`, with the texts in the file's header."""
    with opened(path, what) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})


@contextmanager
def opened(path: Path, what: str, framework: str = "pt") -> Iterator[Any]:
    """A safetensors file, of which only what is asked for is read; a missing or damaged one is a `UserError`.

    framework: "pt" for torch's tensors, "np" for numpy's, which is imported faster.
    """
    from safetensors import SafetensorError, safe_open

    if path.exists() and not path.is_file():  # a device or a pipe may never end
        raise UserError(f"{path}: not a regular file, so this is no {what} folder.")
    try:
        with safe_open(path, framework) as file:
            yield file
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, so this is no {what} folder.") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = shown(str(error).partition("\n")[0], 300)  # safetensors may quote a whole broken header
        raise UserError(f"{path}: truncated or damaged ({reason}).") from error


def split_name(name: str, source: Path) -> tuple[str, str, str]:
    """`<module>.rows.delta` -> (module, rows, delta)."""
    parts = name.rsplit(".", 2)
    if len(name) > MAX_NAME:
        raise UserError(f"{source}: a tensor's name of {len(name):,} characters: no module's is so long.")
    if len(parts) != 3 or parts[1] not in KINDS:
        expected = f"<module>.<{'|'.join(KINDS)}>.<index|delta>"
        raise UserError(f"{source}: unexpected tensor '{shown(name)}': expected {expected}.")
    return parts[0], parts[1], parts[2]


# ---- files larger than memory ----


class Stored(NamedTuple):
    """A tensor of a file, without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def dtypes() -> dict[str, torch.dtype]:
    """safetensors' names of the dtypes that models are kept in."""
    import torch

    return {
        **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
        **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
        **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    }


def stored_tensors(path: Path, what: str) -> dict[str, Stored]:
    """What a safetensors file holds, by name, of its header alone."""
    known = dtypes()
    with opened(path, what) as file:
        parts = {name: file.get_slice(name) for name in file.keys()}
        return {name: Stored(known[part.get_dtype()], tuple(part.get_shape())) for name, part in parts.items()}


def write_streamed(
    path: Path, tensors: Mapping[str, Stored], values: Iterable[tuple[str, Tensor]], texts: Mapping[str, str]
) -> None:
    """Writes a new safetensors file of which never more than one tensor is in memory.

    tensors: all that it is to hold; values: each of them once, in any order, on any device; texts: for the header.
    """
    import torch

    names = {dtype: name for name, dtype in dtypes().items()}
    header: dict[str, Any] = {"__metadata__": dict(texts)} if texts else {}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):  # so that each is aligned
        dtype, shape = tensors[name]
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    left = set(tensors)
    with open(path, "xb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, value in values:
            assert tensors.get(name) == Stored(value.dtype, tuple(value.shape)), name
            left.remove(name)
            file.seek(8 + len(head) + header[name]["data_offsets"][0])
            file.write(memoryview(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    assert not left, left

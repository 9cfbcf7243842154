"""Where llama.cpp keeps a model's linears: the architecture, the tensors' names, and how it orders rows of q and k."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseft.errors import UserError
from sparseft.export.expert_parts import parts_of

# transformers' model_type -> llama.cpp's architecture, where its converter keeps every linear whole or only splits
# experts: by the source of its conversion/*.py. tests/export runs most of them in llama.cpp.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "phi3": "phi3",
    "gpt2": "gpt2",
    "smollm3": "smollm3",
}
# Their rotary embedding turns pairs of neighbours (2i, 2i + 1), where transformers turns (i, i + head_dim / 2).
NEIGHBOURS = ("llama", "smollm3")


@dataclass(frozen=True)
class Place:
    """Rows [start, stop) of one linear in the tensor `name` (without `.weight`); expert: which of a 3-D one.

    heads: into how many its rows are divided, each reordered for the rotary embedding; None: as they are.
    """

    name: str
    module: str
    start: int
    stop: int
    expert: int | None
    heads: int | None

    def ordered(self, b: Tensor) -> Tensor:
        """The rows of b (out, r) that belong here, in llama.cpp's order."""
        rows = b[self.start : self.stop]
        if self.heads is None:
            return rows
        return rows.reshape(self.heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def architecture_of(config: Any) -> str:
    """llama.cpp's name for a Hugging Face config's architecture; one that is not known here is a `UserError`."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise UserError(
            f"--format gguf-lora: how llama.cpp keeps the weights of '{config.model_type}' is not known here (known: "
            f"{', '.join(ARCHITECTURES)}); --format merged and llama.cpp's convert_hf_to_gguf.py take any model that "
            "it knows."
        )
    return found


def places_of(config: Any, shapes: dict[str, tuple[int, int]]) -> dict[str, list[Place]]:
    """The places of linears with these shapes (out, in), by tensor; one without a tensor is a `UserError`."""
    import gguf

    architecture = architecture_of(config)
    known = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    found: dict[str, list[Place]] = {}
    for module, (rows, _) in shapes.items():
        for part in parts_of(module, rows):
            name = names.get_name(part.linear)
            if name is None:
                raise UserError(f"--format gguf-lora: llama.cpp's {architecture} has no tensor for {module}.")
            if not name.startswith("blk."):
                raise UserError(
                    f"--format gguf-lora holds changes of the layers' linears, and {module} lies outside the layers; "
                    "--format merged holds it."
                )
            place = Place(name, module, part.start, part.stop, part.expert, _heads(config, architecture, part.linear))
            found.setdefault(name, []).append(place)
    return found


def _heads(config: Any, architecture: str, linear: str) -> int | None:
    leaf = linear.rpartition(".")[2]
    if architecture not in NEIGHBOURS or leaf not in ("q_proj", "k_proj"):
        return None
    return int(config.num_attention_heads if leaf == "q_proj" else config.num_key_value_heads)


def experts_of(config: Any) -> int:
    """How many experts a layer has."""
    return int(getattr(config, "num_local_experts", None) or config.num_experts)


def check_gguf() -> None:
    """A `UserError` where the package that reads and writes GGUF files is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("--format gguf-lora needs the package gguf: pip install 'sparseft[export]'.")


def stored(tensor: Tensor, dtype: torch.dtype) -> Any:
    """The tensor in `dtype` as the array that `GGUFWriter` takes; bf16, which numpy lacks, as its bytes."""
    tensor = tensor.to(dtype).contiguous()
    if dtype == torch.bfloat16:
        return tensor.view(torch.uint8).numpy()
    return tensor.numpy()

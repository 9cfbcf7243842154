"""Reads a llama.cpp adapter back into differences of a Hugging Face model's linears, by the format's own rules.

It is the check of what `formats/gguf_lora.py` writes, so it shares nothing with it: names, the order of rows and the
scale are spelt out here once more.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseft.errors import RunError, reason_of
from sparseft.export.low_rank_forward import LowRank

LLAMA = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PHI3 = LLAMA | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
GPT2 = {"attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
# Which part of which 3-D parameter a tensor of all experts is: gate before up.
EXPERTS = {"ffn_gate_exps": ("gate_up_proj", 0), "ffn_up_exps": ("gate_up_proj", 1), "ffn_down_exps": ("down_proj", 0)}
NAME = re.compile(r"blk\.(\d+)\.(\w+)\.weight\.lora_([ab])")
TINY = 2.0**-24  # the smallest number of float16: below it differences round to steps of this


class GgufAdapter:
    """The differences in a file for a model of the given config; a file that is no such adapter is a `RunError`."""

    def __init__(self, path: Path, config: Any) -> None:
        import gguf

        try:
            file = gguf.GGUFReader(path)
            text = {name: field.contents() for name, field in file.fields.items()}
            tensors = {t.name: _values(t.data, t.tensor_type) for t in file.tensors}
        except (OSError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise RunError(f"{path.name} cannot be read: {reason_of(error)}") from error
        kind = [text.get("general.type"), text.get("adapter.type")]
        if kind != ["adapter", "lora"]:
            raise RunError(f"{path.name} says that it is {kind}, not ['adapter', 'lora'].")
        self.architecture = text.get("general.architecture")
        self.config = config
        self.pieces: dict[str, list[LowRank]] = {}
        alpha = float(text.get("adapter.lora.alpha", 0.0))
        for name in sorted({key.removesuffix(".lora_a").removesuffix(".lora_b") for key in tensors}):
            sides = [tensors.get(f"{name}.lora_{side}") for side in "ab"]
            found = NAME.fullmatch(f"{name}.lora_a")
            if found is None or sides[0] is None or sides[1] is None:
                raise RunError(f"{path.name}: {name} is no pair lora_a and lora_b of a layer's tensor.")
            a, b = sides
            if a.shape[-2] != b.shape[-1]:
                raise RunError(f"{path.name}: {name} has rank {a.shape[-2]} in lora_a and {b.shape[-1]} in lora_b.")
            scale = alpha / b.shape[-1] if alpha else 1.0  # as llama.cpp takes it: by the tensor's own rank
            self._place(int(found[1]), found[2], a, b, scale)

    def _place(self, layer: int, tensor: str, a: Tensor, b: Tensor, scale: float) -> None:
        kind = self.config.model_type
        linears = {"gpt2": GPT2, "phi3": PHI3}.get(kind, LLAMA)
        prefix = f"transformer.h.{layer}" if kind == "gpt2" else f"model.layers.{layer}"
        if tensor in EXPERTS and a.dim() == 3:
            parameter, half = EXPERTS[tensor]
            for number in range(len(a)):
                rows = torch.arange(b.shape[1]) + half * b.shape[1]
                module = f"{prefix}.mlp.experts.{parameter}.{number}"
                self.pieces.setdefault(module, []).append(LowRank(rows, b[number], a[number], scale))
        elif tensor in linears and a.dim() == 2:
            rows = self._rows(tensor, len(b))
            self.pieces.setdefault(f"{prefix}.{linears[tensor]}", []).append(LowRank(rows, b, a, scale))
        else:
            raise RunError(f"blk.{layer}.{tensor} is no linear of a {kind}.")

    def _rows(self, tensor: str, count: int) -> Tensor:
        """Which row of the Hugging Face weight each row of a tensor is. Where llama.cpp turns pairs of neighbours, its
        rows 2j and 2j + 1 of a head are the rows j and j + head_dim / 2 there."""
        index = torch.arange(count)
        neighbours = self.config.model_type in ("llama", "mistral", "mixtral", "smollm3")
        if not neighbours or tensor not in ("attn_q", "attn_k"):
            return index
        heads = self.config.num_attention_heads if tensor == "attn_q" else self.config.num_key_value_heads
        head = count // heads
        within = index % head
        return index - within + within // 2 + (within % 2) * (head // 2)

    def dense(self, module: str, shape: tuple[int, int]) -> Tensor:
        """ΔW (out, in) of a linear in fp32; zeros where the file has nothing for it."""
        total = torch.zeros(shape)
        for rows, b, a, scale in self.pieces.get(module, []):
            if a.shape[1] != shape[1] or int(rows.max()) >= shape[0]:
                raise RunError(f"{module}: the file's {tuple(b.shape)} @ {tuple(a.shape)} does not fit {shape}.")
            total[rows] += (b @ a) * scale
        return total

    def rounding(self, module: str, shape: tuple[int, int], resolution: float) -> Tensor:
        """How much of `dense` rounding may explain: entries that nothing is added to must be zero."""
        total = torch.zeros(shape)
        for rows, b, a, scale in self.pieces.get(module, []):
            total[rows] += (b.abs() @ a.abs()) * scale * (resolution + 2.0**-20)
            if resolution:
                total[rows] += TINY * scale * (b.abs().sum(1, keepdim=True) + a.abs().sum(0))
        return total


def _values(data: Any, kind: Any) -> Tensor:
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(data, kind).copy()).float()

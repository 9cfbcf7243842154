"""A linear in four bits, in plain torch: what quantized bases are tested with where no package is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseft.config import ModelConfig
from sparseft.models.loading import QUANTIZED_FROM, load_model

GROUP = 64  # weights with one scale
# The 16 levels of NF4 (QLoRA, arXiv 2305.14314, appendix E).
LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


class Packed4(nn.Parameter):
    """A class of its own, as packages have them: no plain numbers."""


class NF4Linear(nn.Module):
    """y = x Wᵀ + b with W (out, in) in two numbers a byte and a scale for each `GROUP` of them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.dtype = linear.weight.dtype
        flat = linear.weight.detach().float().flatten()
        self.count = len(flat)
        groups = F.pad(flat, (0, -len(flat) % (2 * GROUP))).view(-1, GROUP)
        scales = groups.abs().amax(1, keepdim=True)
        codes = (groups / scales.clamp_min(1e-12)).unsqueeze(-1).sub(LEVELS).abs().argmin(-1).to(torch.uint8)
        pairs = codes.view(-1, 2)
        self.weight = Packed4((pairs[:, 0] << 4) | pairs[:, 1], requires_grad=False)
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def dequantize(self) -> Tensor:
        """(out, in), in the dtype that the linear had."""
        codes = torch.stack([self.weight.detach() >> 4, self.weight.detach() & 15], 1).view(-1, GROUP)
        values = LEVELS.to(self.scales)[codes.long()] * self.scales
        return values.flatten()[: self.count].view(self.out_features, self.in_features).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.dequantize(), self.bias
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def quantize(model: nn.Module) -> nn.Module:
    """The linears of a model's decoder layers in NF4, in place."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "layers" in name:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, NF4Linear(module))
    return model.requires_grad_(False)


def load(folder: Any, dtype: str = "auto") -> nn.Module:
    """A model folder as `model.quantize=nf4` loads it, but packed by the class above."""
    model = load_model(ModelConfig(path=str(folder), dtype=dtype))
    setattr(model, QUANTIZED_FROM, ModelConfig(path=str(folder), dtype=dtype, quantize="nf4"))
    return quantize(model)

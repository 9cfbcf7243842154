"""What a base packed by `model.quantize` takes of memory, on the meta device: the bytes of its linears' packed weights,
and those that unpacking them takes for the time of a product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparseft.models.packed.quantize import GROUP

NF4_GROUP, NF4_SCALES = 64, 256  # weights with a scale, and scales with one of their own: bitsandbytes' own


class PackedShape(nn.Linear):
    """A linear of the meta device with the storages of a packed one, and without its values."""

    def __init__(self, linear: nn.Linear, quantize: str) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta", dtype=linear.weight.dtype)
        self.dtype = linear.weight.dtype
        self.bias = linear.bias
        count = linear.weight.numel()
        size, parts = {
            "nf4": (count // 2, {"scales": -(-count // NF4_GROUP), "outer": 4 * -(-count // NF4_GROUP // NF4_SCALES)}),
            "int8": (count, {"scales": 4 * linear.out_features, "zeros": linear.out_features}),
            "int4": (count // 2, {"scales": 4 * -(-count // GROUP)}),  # a scale and a zero point in two bytes each
        }[quantize]
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
        for name, each in parts.items():
            self.register_buffer(name, torch.empty(each, dtype=torch.uint8, device="meta"))

    def dequantize(self) -> Tensor:
        return self.weight.new_empty(self.out_features, self.in_features, dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """x Wᵀ with W unpacked for the time of each pass: bitsandbytes' and torchao's products."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        return x @ module.dequantize().to(x.dtype).t()

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.module.dequantize().to(grad.dtype), None


def pack_shapes(model: nn.Module, quantize: str) -> None:
    """Gives a model on the meta device, in place, packed linears where `model.quantize` would: all but the head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, PackedShape(module, quantize))

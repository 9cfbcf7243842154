"""The product of all experts with their tokens, whose weight gradient is the experts' patterns only.

All experts of a kind are gathered and multiplied together, so that the work on the host does not grow with their
number, and where tokens went is known on the device alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparseft.kernels import dispatch, reference
from sparseft.layers.pattern import version_of

ALIGNED = 4  # each delta's gradient begins at a multiple of so many fp32 entries: 16 bytes, as one of its own would
EVEN = 8  # sides of gathered operands are filled up to a multiple of it: 16 bytes of bf16, as fast loads want them


@dataclass(frozen=True)
class Group:
    """All experts' patterns of one kind and block size.

    Args:
        kind: Of the patterns.
        block_size: Of blocks; 0 for rows and columns.
        taken: Of rows and columns (experts of the stack, k): which features of a token are taken, by its expert;
            shorter lists, and those of experts that do not train, are filled up with any.
        parts, sizes, total: What `dispatch.experts_gradient` is told of the result.
        shapes: Of the deltas, in the order of `parts`.
    """

    kind: str
    block_size: int
    taken: Tensor | None
    parts: Tensor
    sizes: tuple[int, int]
    total: int
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, kind: str, block_size: int, members: list[tuple[int, Any]], shape: torch.Size) -> Group:
        """Of (expert, pattern) pairs on a parameter of `shape` (experts, out, in)."""
        indices = [pattern.index for _, pattern in members]
        shapes = tuple(tuple(pattern.delta.shape) for _, pattern in members)
        starts, total = [], 0
        for own in shapes:
            starts.append(total)
            total += _aligned(own)
        if kind == "blocks":
            numbers = torch.tensor([number for number, _ in members], device="cpu")
            lengths = torch.tensor([len(index) for index in indices], device="cpu")
            experts = numbers.repeat_interleave(lengths)
            within = torch.cat([torch.arange(len(index), device="cpu") for index in indices]) * block_size**2
            places = (torch.tensor(starts, device="cpu").repeat_interleave(lengths) + within)[:, None]
            sides = torch.full((len(experts), 2), block_size, device="cpu")
            where = torch.cat(indices).to("cpu") if not indices[0].is_meta else torch.zeros_like(sides)
            parts = torch.cat([experts[:, None], where, sides, places], dim=1)
            taken, sizes = None, (block_size, block_size)
        else:
            longest = max(len(index) for index in indices)
            spare = 0 if indices[0].device.type == "cpu" else -longest % EVEN
            taken = indices[0].new_zeros(shape[0], longest + spare)
            for (number, _), index in zip(members, indices, strict=True):
                taken[number, : len(index)] = index
            rows = [
                (number, 0, 0, *sides, start) for (number, _), sides, start in zip(members, shapes, starts, strict=True)
            ]
            parts = torch.tensor(rows, device="cpu")
            sizes = max(height for height, _ in shapes), max(width for _, width in shapes)
        return cls(kind, block_size, taken, parts.to(indices[0].device), sizes, total, shapes)

    def gradients(self, grad: Tensor, x: Tensor, offs: Tensor, experts: Tensor) -> Iterable[Tensor]:
        """Each delta's gradient in fp32, from grad (tokens, out), x (tokens, in; of columns what was taken of it),
        where each expert's tokens end and each token's expert."""
        if self.kind == "rows":
            assert self.taken is not None
            grad = reference.take_columns(grad, self.taken, experts)
        found = dispatch.experts_gradient(grad, x, offs, self.parts, self.sizes, self.total, self.block_size)
        if len(set(self.shapes)) == 1 and math.prod(self.shapes[0]) == _aligned(self.shapes[0]):
            return found.view(-1, *self.shapes[0]).unbind(0)
        pieces = found.split([_aligned(shape) for shape in self.shapes])
        return [part[: math.prod(shape)].view(shape) for part, shape in zip(pieces, self.shapes, strict=True)]


def _aligned(shape: tuple[int, ...]) -> int:
    """The entries that a gradient of this shape takes of the joint result."""
    return -(-math.prod(shape) // ALIGNED) * ALIGNED


class Grouping:
    """What a stack's product needs to know of its patterns, worked out when one of them changes.

    layers: the stack's layers by expert; shape: of its parameter (experts, out, in).
    """

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, int]] = []
        self._groups: list[Group] = []

    def of(self, layers: dict[int, Any], shape: torch.Size) -> tuple[list[Group], list[Tensor]]:
        """The groups, and the deltas that train in the order of the groups' shapes."""
        members: dict[tuple[str, int], list[tuple[int, Any]]] = {}
        for number, layer in layers.items():
            for kind, pattern in layer.patterns.items():
                if pattern.delta.requires_grad:
                    members.setdefault((kind, pattern.block_size or 0), []).append((number, pattern))
        patterns = [pattern for own in members.values() for _, pattern in own]
        seen = [(pattern.index, version_of(pattern.index)) for pattern in patterns]  # loading fills an index in place
        if len(seen) != len(self._seen) or any(
            left is not right or old != new for (left, old), (right, new) in zip(self._seen, seen, strict=True)
        ):
            self._groups = [Group.of(kind, size, own, shape) for (kind, size), own in members.items()]
            self._seen = seen
        return self._groups, [pattern.delta for pattern in patterns]

    def __reduce__(self) -> Any:
        return Grouping, ()  # copies work theirs out


class GroupedProduct(torch.autograd.Function):
    """y[t] = W[e] x[t] for the tokens of each expert e: those up to `offs[e]`, from where the expert before ends.

    x (tokens, in) sorted by expert, weight (experts, out, in), offs (experts,) int32. The deltas enter for their
    gradients' sake: their values are already in the weight. An expert without a token gives its deltas a gradient of
    zeros, as training the 3-D parameter itself would: that it had none is known on the device alone, and asking would
    make the host wait in every layer. (The loop over experts does not call such an expert: there the gradient is None,
    and AdamW leaves the delta as it is.)
    """

    @staticmethod
    def forward(ctx, x, weight, offs, product, groups, *deltas):
        ctx.product, ctx.groups = product, groups
        if all(group.kind == "columns" for group in groups):  # only slices of x, in storage of their own
            experts = _experts(offs, x)
            slices = [reference.take_columns(x, group.taken, experts) for group in groups]
            ctx.whole = False
            ctx.save_for_backward(weight, offs, *slices)
        else:
            ctx.whole = True
            ctx.save_for_backward(weight, offs, x)
        return product(x, weight.transpose(-2, -1), offs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        weight, offs, *saved = ctx.saved_tensors
        grad_output = grad_output.to(weight.dtype).contiguous()
        grad_x = ctx.product(grad_output, weight, offs) if ctx.needs_input_grad[0] else None
        experts = _experts(offs, grad_output) if ctx.whole else None
        gradients: list[Tensor] = []
        for position, group in enumerate(ctx.groups):
            x = saved[0 if ctx.whole else position].to(grad_output.dtype)
            if ctx.whole and group.kind == "columns":
                x = reference.take_columns(x, group.taken, experts)
            gradients += group.gradients(grad_output, x, offs, experts)
        return grad_x, None, None, None, None, *gradients


def _experts(offs: Tensor, tokens: Tensor) -> Tensor:
    """Each token's expert (tokens,); of those that lie here for no expert, whose results nobody reads, the last."""
    numbers = torch.arange(len(tokens), device=offs.device, dtype=offs.dtype)
    return torch.searchsorted(offs, numbers, right=True).clamp_(max=len(offs) - 1)


def grouped_product(
    func: Any, x: Tensor, weight: Tensor, offs: Tensor, layers: dict[int, Any], grouping: Grouping
) -> Tensor:
    """`func(x, weightᵀ, offs=offs)` with gradients for the deltas of `layers` (by expert)."""

    def product(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        return func(x, weight, offs=offs)

    if torch.is_grad_enabled():
        groups, deltas = grouping.of(layers, weight.shape)
        if deltas:
            return GroupedProduct.apply(x, weight, offs, product, groups, *deltas)
    return product(x, weight.transpose(-2, -1), offs)

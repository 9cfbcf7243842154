"""An adapter's units: parts of it that can be scaled or dropped one by one, since what it adds to the weights is their
sum. Of a sparse adapter a row, a column, a block, or a row of a grid; of a LoRA one rank of one linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Units:
    """The units of one parameter: its slices along `dim`, or several of them together. What they add to the model is
    linear in each of them.

    learnt: the parameter's values as they were trained, which factors are of.
    unit_of: the unit of each slice (slices,), numbered from 0; None: each slice is one.
    """

    parameter: nn.Parameter
    dim: int
    learnt: Tensor
    unit_of: Tensor | None = None

    @staticmethod
    def of(parameter: nn.Parameter, dim: int, unit_of: Tensor | None = None) -> Units:
        """Of a parameter that holds what was trained."""
        return Units(parameter, dim, parameter.detach().clone(), unit_of)

    def __len__(self) -> int:
        return self.learnt.shape[self.dim] if self.unit_of is None else int(self.unit_of.max()) + 1

    @torch.no_grad()
    def scale(self, factors: Tensor) -> None:
        """Makes unit u `factors[u]` times what it was trained to, in place; `factors` (units,)."""
        if self.unit_of is not None:
            factors = factors[self.unit_of.to(factors.device)]
        shape = [1] * self.learnt.dim()
        shape[self.dim] = len(factors)
        self.parameter.copy_(self.learnt * factors.to(self.learnt).view(shape))

    def slopes(self) -> Tensor:
        """The derivative of what was differentiated by each unit's factor, from the parameter's gradient: (units,) in
        float64, on the CPU; zeros where there is no gradient."""
        if self.parameter.grad is None:
            return torch.zeros(len(self), dtype=torch.float64)
        product = self.parameter.grad.double() * self.learnt.double()
        by_slice = product.movedim(self.dim, 0).reshape(self.learnt.shape[self.dim], -1).sum(1).cpu()
        if self.unit_of is None:
            return by_slice
        return torch.zeros(len(self), dtype=torch.float64).index_add_(0, self.unit_of.cpu(), by_slice)

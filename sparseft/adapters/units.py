"""An adapter's units: parts of it that can be scaled or dropped one by one, since what it adds to the weights is their
sum. Of a sparse adapter a row, a column or a block; of a LoRA one rank of one linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Units:
    """The units of one parameter: its slices along `dim`. What they add to the model is linear in each of them.

    learnt: the parameter's values as they were trained, which factors are of.
    """

    parameter: nn.Parameter
    dim: int
    learnt: Tensor

    @staticmethod
    def of(parameter: nn.Parameter, dim: int) -> Units:
        """Of a parameter that holds what was trained."""
        return Units(parameter, dim, parameter.detach().clone())

    def __len__(self) -> int:
        return self.learnt.shape[self.dim]

    @torch.no_grad()
    def scale(self, factors: Tensor) -> None:
        """Makes unit u `factors[u]` times what it was trained to, in place; `factors` (units,)."""
        shape = [1] * self.learnt.dim()
        shape[self.dim] = len(self)
        self.parameter.copy_(self.learnt * factors.to(self.learnt).view(shape))

    def slopes(self) -> Tensor:
        """The derivative of what was differentiated by each unit's factor, from the parameter's gradient: (units,) in
        float64, on the CPU; zeros where there is no gradient."""
        if self.parameter.grad is None:
            return torch.zeros(len(self), dtype=torch.float64)
        product = self.parameter.grad.double() * self.learnt.double()
        return product.movedim(self.dim, 0).flatten(1).sum(1).cpu()

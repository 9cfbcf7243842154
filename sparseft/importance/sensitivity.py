"""How sensitive the loss is to each weight of a linear while it trains, from the gradients of the steps themselves.

Of one step, I = |w·g - (w·g)²/2|: what the loss would change by, to second order with the gradient's square for the
curvature, were the weight zero. Of several, LoSiA's averages (arXiv 2507.04487, §3.1), which are AdaLoRA's: I̅ of I, and
U̅ of how far I was from it. The score is I̅·U̅.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseft.distributed import ranks

DECAY = 0.85  # of both averages, as in the authors' code


class Sensitivity:
    """The averages of one linear's weights, and the gradient of the step that is on its way: three times the weight
    (out, in) in fp32, on its device."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.average, self.spread, self.gradient = (torch.zeros(shape, device=device) for _ in range(3))

    def add(self, gradient: Tensor) -> None:
        """Adds the gradient (out, in) of one use of the linear."""
        self.gradient += gradient

    def step(self, weight: Tensor) -> None:
        """Takes the gradients that were added, those of all ranks in the mean, into the averages; `weight` (out, in) is
        what they were taken at. A step whose gradient is not finite changes nothing, as in training. A call of all
        ranks; the device is not waited for."""
        ranks.all_reduce_sum(self.gradient)
        product = weight.float() * self.gradient.div_(ranks.rank_and_world()[1])
        finite = product.isfinite().all()
        now = (product - 0.5 * product.square()).abs()
        average = self.average.lerp(now, 1.0 - DECAY)
        spread = self.spread.lerp((now - average).abs(), 1.0 - DECAY)
        self.average = torch.where(finite, average, self.average)
        self.spread = torch.where(finite, spread, self.spread)
        self.gradient.zero_()

    def scores(self) -> Tensor:
        """(out, in), fp32."""
        return self.average * self.spread

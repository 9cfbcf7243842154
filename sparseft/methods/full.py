"""Full fine-tuning: the baseline that trains every weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparseft.methods.base import Method, check_choice

if TYPE_CHECKING:
    from torch import nn

    from sparseft.selection.selection import Selection


@dataclass
class FullConfig:
    """AdamW on bf16 weights loses updates smaller than half a unit in the last place, so they are fp32 by default."""

    dtype: str = "float32"  # of the weights while training: float32 | model (as loaded)

    def validate(self) -> None:
        """Raises `UserError` on an unknown dtype."""
        check_choice("method.dtype", self.dtype, ("float32", "model"))


class Full(Method):
    name = "full"
    kind = "whole"
    config_class = FullConfig
    learning_rate = 2e-5

    def convert(self, model: nn.Module, config: Any, selection: Selection | None) -> nn.Module:
        if config.dtype == "float32":
            import torch

            from sparseft.distributed.zero3 import cast

            cast(model, torch.float32)
        return model.requires_grad_(True)

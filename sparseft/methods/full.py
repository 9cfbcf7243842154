"""Full fine-tuning: the baseline that trains every weight."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from sparseft.methods.base import Layers, MethodConfig
from sparseft.models.chosen_layers import ALL, chosen_layers

if TYPE_CHECKING:
    from typing import Self

    import torch
    from torch import nn

    from sparseft.models.spec import ModelSpec
    from sparseft.selection.selection import Selection


@dataclass
class FullConfig(MethodConfig):
    """AdamW on bf16 weights loses updates smaller than half a unit in the last place, so they are fp32 by default."""

    name = "full"
    kind = "full"
    learning_rate = 2e-5
    trains_all = True
    separable = False

    dtype: Literal["float32", "model"] = "float32"
    layers: Layers = field(default=ALL, kw_only=True)  # positions are those of earlier versions

    def convert(self, model: nn.Module, selection: Selection | None, spec: ModelSpec | None) -> nn.Module:
        if self.dtype == "float32":
            import torch

            from sparseft.distributed.shards import cast

            cast(model, torch.float32)
        from sparseft.models.decoder import decoder_layers

        layers = decoder_layers(model)[1]
        chosen = chosen_layers(self.layers, len(layers))
        model.requires_grad_(chosen is None)
        for number in chosen or ():  # not the head: it may be tied to the embeddings, below all layers
            layers[number].requires_grad_(True)
        return model

    def frozen_experts(self, spec: ModelSpec) -> list[str]:
        return []

    def widens(self, dtype: torch.dtype) -> bool:
        return self.dtype == "float32" and dtype.itemsize == 2

    def for_benchmark(self) -> Self:
        return replace(self, dtype="model")

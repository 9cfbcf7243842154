"""The checkpoint behind a model that was quantized while it was loaded.

Adapters are of the checkpoint, however its base was loaded, and a part can start at its full precision.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from sparseft.config import ModelConfig
from sparseft.models.checkpoint import Checkpoint, Entries, Places, weight_of, without_weights
from sparseft.models.loading import QUANTIZED_FROM

KNOWN = "_sparseft_unquantized"  # the attribute that keeps it, as finding a checkpoint's tensors takes its time


@dataclass
class Unquantized:
    """What a checkpoint holds, read from its files as it is asked for."""

    config: ModelConfig
    quantize: str  # how it was packed

    @staticmethod
    def of(model: nn.Module) -> Unquantized | None:
        """The checkpoint that a model was quantized from; None of one that was loaded as it is stored."""
        config = getattr(model, QUANTIZED_FROM, None)
        if config is None:
            return None
        found = vars(model).get(KNOWN)
        if found is None:
            found = vars(model)[KNOWN] = Unquantized(replace(config, quantize="none"), config.quantize)
        return found

    @functools.cached_property
    def _places(self) -> tuple[nn.Module, Checkpoint, Places]:
        model, checkpoint = without_weights(self.config), Checkpoint.of(self.config)
        return model, checkpoint, Places(model, checkpoint.tensors)

    def parameters(self) -> Iterator[tuple[str, Entries]]:
        """The model's parameters in the order of their names, tied ones once, in the files."""
        _, checkpoint, places = self._places
        return places.entries(checkpoint.read)

    def weight(self, module: str) -> Tensor:
        """The weight (out, in) of a linear."""
        model, checkpoint, places = self._places
        weight = weight_of(model, module)
        return weight.within(places.parameter(weight.parameter, checkpoint.read).contiguous())

"""The base model without weights: what an export asks of its linears before anything large is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from sparseft.export.source import Source
from sparseft.models.checkpoint import without_weights
from sparseft.models.decoder import decoder_layers
from sparseft.models.spec import ModelSpec


@dataclass
class Skeleton:
    """model: on the meta device; prefix: the name of its list of decoder layers."""

    model: nn.Module
    spec: ModelSpec
    prefix: str

    @staticmethod
    def of(source: Source) -> Skeleton:
        """The skeleton of the source's base model."""
        model = without_weights(source.target.model)
        return Skeleton(model, ModelSpec.of(model, tried=False), decoder_layers(model)[0])

    def place(self, linear: str) -> tuple[int, str]:
        """A linear's decoder layer and its name within it."""
        number, _, rest = linear.removeprefix(f"{self.prefix}.").partition(".")
        return int(number), rest

    def targets(self, linears: Iterable[str]) -> list[str]:
        """The shortest ends of names, or whole names, that PEFT takes for exactly these linears: `target_modules`."""
        meant = set(linears)
        others = [name for name, _ in self.model.named_modules() if name not in meant]
        first = 2 + self.prefix.count(".")  # behind the layer's number
        targets = set()
        for name in meant:
            pieces = name.split(".")
            ends = [".".join(pieces[start:]) for start in range(len(pieces) - 1, first - 1, -1)]
            fitting = [end for end in ends if not any(other == end or other.endswith(f".{end}") for other in others)]
            targets.add(fitting[0] if fitting else name)
        return sorted(targets)

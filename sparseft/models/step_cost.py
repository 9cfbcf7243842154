"""What a training step costs, in multiplications and additions (FLOPs) a token, before it has run.

Counted are matrix products: linears, attention, the head, and the gradients of what trains. A frozen linear costs its
product forward and another one for the gradient by its input, the latter only where something below it trains. Norms,
activations, the optimizer and what the host does are left out. The unit to say it in is the *floor*: the frozen model,
logits of all tokens, the gradient flowing to the embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from sparseft.distributed.shards import full_shape
from sparseft.models.decoder import in_experts, input_embeddings
from sparseft.models.spec import ModelSpec, role_of

# The stages of a decoder layer, in the order of its forward pass, by role; linears whose role is not known come first.
STAGES = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 2, "up": 2, "down": 3}
BEFORE_ATTENTION = 0

Place = tuple[int, int]  # a decoder layer, and a stage in it


@dataclass(frozen=True)
class Trained:
    """What trains: how many weights of or beside each linear, and what else wants a gradient to reach it."""

    weights: Mapping[str, int]
    layers: frozenset[int] = frozenset()  # decoder layers of which other parameters train: norms
    embeddings: bool = False
    head: bool = False

    @staticmethod
    def of(model: nn.Module, spec: ModelSpec) -> Trained:
        """Reads an attached model. spec: the plain model's."""
        tables = [input_embeddings(model), getattr(model, "get_output_embeddings", lambda: None)()]
        trains = [table is not None and any(p.requires_grad for p in table.parameters()) for table in tables]
        some, number = next(iter(spec.layer_of.items()))
        prefix = some.partition(f".{number}.")[0] + "."
        others = {
            int(name.removeprefix(prefix).partition(".")[0])
            for name, _ in _trainable(model)
            if name.startswith(prefix) and _linear_of(name, spec) is None
        }
        return Trained(trained_by_linear(model, spec), frozenset(others), *trains)


def trained_by_linear(model: nn.Module, spec: ModelSpec) -> dict[str, int]:
    """How many parameters train of each linear that has any: deltas, an adapter's own, or the weight's entries."""
    found: dict[str, int] = {}
    for name, parameter in _trainable(model):
        if (linear := _linear_of(name, spec)) is not None:
            found[linear] = found.get(linear, 0) + full_shape(parameter).numel()
    return found


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's wrapper adds to the names
    return ((name, p) for name, p in inner.named_parameters() if p.requires_grad)


def _linear_of(parameter: str, spec: ModelSpec) -> str | None:
    while parameter:
        parameter = parameter.rpartition(".")[0]
        if parameter in spec.known:
            return parameter
    return None


class StepCost:
    """FLOPs a token of one model's steps."""

    def __init__(self, spec: ModelSpec, length: int = 0) -> None:
        """length: tokens of a sequence, each of which attends to half of them in the mean; 0: without attention."""
        self.spec = spec
        self.products: dict[str, float] = {}  # of each linear, forward
        for name, (rows, columns) in spec.known.items():
            self.products[name] = 2.0 * rows * columns * self._reached(name)
        with_attention = {spec.layer_of[name] for name in spec.known if "attn" in name or "attention" in name}
        own = 2.0 * length * spec.num_heads * spec.head_dim  # two products with half of the tokens
        self.attention = dict.fromkeys(sorted(with_attention), own)
        self.head = 2.0 * spec.head_weights

    def _reached(self, name: str) -> float:
        """The share of tokens that go through a linear."""
        return self.spec.active_experts if in_experts(name) else 1.0

    def place_of(self, name: str) -> Place:
        """Where a linear stands in the order of the forward pass."""
        role = role_of(self.spec.path_of(name))
        first = role[0] if isinstance(role, tuple) else role
        return self.spec.layer_of[name], STAGES.get(first or "", BEFORE_ATTENTION)

    def forward(self) -> float:
        """The decoder's."""
        return sum(self.products.values()) + sum(self.attention.values())

    def above(self, lowest: Place | None) -> float:
        """The gradients by the inputs of all that stands above `lowest`, the lowest place where something trains; None:
        something trains at the embeddings."""
        if lowest is None:
            return sum(self.products.values()) + 2.0 * sum(self.attention.values())
        linears = sum(own for name, own in self.products.items() if self.place_of(name) > lowest)
        attention = sum(own for layer, own in self.attention.items() if (layer, BEFORE_ATTENTION) >= lowest)
        return linears + 2.0 * attention

    def floor(self) -> float:
        """The frozen model's forward and backward pass, with the logits of all tokens."""
        return self.forward() + self.above(None) + 2.0 * self.head

    def step(self, trained: Trained, *, products: int = 1, labelled: float = 1.0, checkpointing: bool = False) -> float:
        """Forward, backward and the gradients of what trains.

        products: those that a trained weight takes part in (`MethodConfig.products`). labelled: the share of tokens
        whose logits are made. checkpointing: each layer is computed again as far down as gradients are wanted.
        """
        own = sum(2.0 * count * products * self._reached(name) for name, count in trained.weights.items())
        lowest = self.lowest(trained)
        total = self.forward() + self.above(lowest) + own + self.head * labelled * (3.0 if trained.head else 2.0)
        if checkpointing:
            first = lowest[0] if lowest else 0
            total += sum(own for name, own in self.products.items() if self.spec.layer_of[name] >= first)
            total += sum(own for layer, own in self.attention.items() if layer >= first)
        return total

    def lowest(self, trained: Trained) -> Place | None:
        """The lowest place where something trains; None where that is at the embeddings, or nothing does."""
        if trained.embeddings:
            return None
        places = [*map(self.place_of, trained.weights), *((layer, -1) for layer in trained.layers)]
        return min(places, default=None)

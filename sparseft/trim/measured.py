"""The losses of a model with an adapter as functions of its units' factors: `search.Problem`, measured."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparseft.adapters.units import Units
from sparseft.data.packing import Collator
from sparseft.evaluation.held_out import batch_losses, mean_loss
from sparseft.models.decoder import decoder_layers
from sparseft.models.labelled_loss import fewest_logits
from sparseft.models.labels import IGNORED
from sparseft.models.masks import unasked
from sparseft.models.router_loss import router_loss

Example = Mapping[str, Any]  # input_ids and labels, as data sets give them
Losses = list[tuple[float, int]]  # of `batch_losses`

TOGETHER = 8  # calibration examples of a step, of target and source each


class Measured:
    """An adapter that is active on `model`, its calibration examples, and source text that is held out from them.

    The model is put into evaluation mode, and of its parameters only those of `units` take gradients from now on.
    recomputed: backward passes compute each decoder layer's forward pass again, in less memory and more time.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Mapping[str, Units],
        target: Sequence[Example],
        source: Sequence[Example],
        held_out: Sequence[Example],
        *,
        pad: int,
        device: torch.device,
        batch_size: int,
        recomputed: bool = False,
    ) -> None:
        self.recomputed = recomputed
        self.model, self.units = model, units
        self.target, self.source, self.held_out = target, source, held_out
        self.pad, self.device, self.batch_size = pad, device, batch_size
        own = {id(each.parameter) for each in units.values()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in own)
        model.eval()
        self._measured: dict[tuple[int, bytes], Losses] = {}
        self.base = self.losses(torch.zeros(self.count, dtype=torch.float64), held_out)

    @property
    def count(self) -> int:
        """How many units there are."""
        return sum(map(len, self.units.values()))

    def of_each(self, factors: Tensor) -> dict[str, Tensor]:
        """The factors (units,) by the name of the parameter that they are of."""
        return dict(zip(self.units, factors.split([len(each) for each in self.units.values()]), strict=True))

    def apply(self, factors: Tensor) -> None:
        """Scales the adapter, in place."""
        for name, part in self.of_each(factors).items():
            self.units[name].scale(part)

    def losses(self, factors: Tensor, rows: Sequence[Example]) -> Losses:
        """Of the scaled adapter on each batch of examples; measured once."""
        key = (id(rows), factors.double().numpy().tobytes())
        if key not in self._measured:
            self.apply(factors)
            self._measured[key] = batch_losses(self.model, rows, self.pad, self.device, self.batch_size)
        return self._measured[key]

    def forgetting(self, factors: Tensor) -> float:
        """The loss on the held-out source text less the base's, in nats a token."""
        return mean_loss(self.losses(factors, self.held_out)) - mean_loss(self.base)

    def slopes(self, factors: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The derivatives (units,), float64, of both mean losses on the examples of a step."""
        self.apply(factors)
        return self._slopes(turn(self.target, step)), self._slopes(turn(self.source, step))

    def _slopes(self, rows: Sequence[Example]) -> Tensor:
        collate = Collator(self.pad)
        batches = [collate(rows[at : at + self.batch_size]) for at in range(0, len(rows), self.batch_size)]
        labelled = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches]
        for each in self.units.values():
            each.parameter.grad = None
        aside = checkpointed(self.model) if self.recomputed else contextlib.nullcontext()
        with aside, router_loss(self.model, 0.0), fewest_logits(self.model):
            for batch, count in zip(batches, labelled, strict=True):
                if count:
                    batch = {name: value.to(self.device) for name, value in batch.items()}
                    with unasked(batch):
                        loss = self.model(**batch, use_cache=False).loss
                        (loss * (count / sum(labelled))).backward()
        found = torch.cat([each.slopes() for each in self.units.values()])
        for each in self.units.values():
            each.parameter.grad = None
        return found


@contextlib.contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Inside, each decoder layer keeps its input alone for the backward pass. transformers' own switch does nothing in
    evaluation mode, where nothing is drawn at random."""
    layers = [layer for layer in decoder_layers(model)[1] if "forward" not in vars(layer)]
    try:
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def turn(rows: Sequence[Example], step: int) -> list[Example]:
    """The `TOGETHER` examples of a step, from the beginning again where they are used up."""
    return [rows[(step * TOGETHER + at) % len(rows)] for at in range(min(TOGETHER, len(rows)))]


def difference(before: Losses, after: Losses) -> tuple[float, float | None]:
    """The mean loss of `after` less that of `before`, of the same batches, and its standard error; None of one batch.

    That of a ratio of sums: batches count by their tokens.
    """
    mean, total = mean_loss(after) - mean_loss(before), sum(count for _, count in before)
    if len(before) < 2:
        return mean, None
    squares = sum((c * (b - a - mean)) ** 2 for (a, c), (b, _) in zip(before, after, strict=True))
    return mean, math.sqrt(squares * len(before) / (len(before) - 1)) / total

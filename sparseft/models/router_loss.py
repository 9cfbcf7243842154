"""What a router adds to the loss so that experts are used evenly: once a step in training, never in what is measured.

transformers divides a step's loss on tokens by the labels of the whole step, and adds the router's term, a mean over a
batch, undivided in each micro-step of each process: that many times too much. Here it counts with its mean over them.
A held-out loss leaves it out: it says nothing of the data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from sparseft.models.decoder import language_model
from sparseft.replaced import replaced

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # as models, or their configurations, call its weight


@contextlib.contextmanager
def router_loss(model: nn.Module, share: float) -> Iterator[None]:
    """Inside, the model (also wrapped) adds `share` of its router's term to its loss."""
    inner = language_model(model)
    places = [(place, name) for place in (inner, inner.config.get_text_config()) for name in COEFFICIENTS]
    usual = [(place, name, getattr(place, name)) for place, name in places if getattr(place, name, None)]
    with replaced(*((place, name, share * weight) for place, name, weight in usual if share != 1.0)):
        yield

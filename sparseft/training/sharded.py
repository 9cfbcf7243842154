"""Taking up what was trained where ZeRO-3 has sharded the model: every process takes part, none holds all of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from sparseft.adapters.files import read_config, read_sparse
from sparseft.adapters.lifecycle import state_of
from sparseft.distributed.zero3 import any_sharded, gathered
from sparseft.errors import UserError
from sparseft.layers import sparse_layers
from sparseft.layers.pattern import entry_dim, index_keys, positions_of
from sparseft.training.checkpoints import load_trained


def take_up(model: nn.Module, folder: Path) -> None:
    """`load_trained`, also for a model in shards, whose optimizer knows nothing of it: for after the last step.

    UserError where the files are not what the same method has written of the same model.
    """
    state = state_of(model)
    assert state is not None
    if not any_sharded(model) or state.kind == "whole":
        load_trained(model, folder)
    else:
        with gathered([p for p in model.parameters() if p.requires_grad], changed=True):
            if state.kind == "sparse":
                _take_up_deltas(model, folder)
            else:
                load_trained(model, folder)


@torch.no_grad()
def _take_up_deltas(model: nn.Module, folder: Path) -> None:
    """Fills the deltas, gathered, each entry by its index."""
    values = read_sparse(folder, read_config(folder))
    for module, layer in sparse_layers(model).items():
        for kind, pattern in layer.patterns.items():
            value = values.get(module, {}).get(kind)
            place = positions_of(index_keys(kind, pattern.index), index_keys(kind, value.index)) if value else None
            if place is None or len(place) != len(value.index) or (place < 0).any():
                raise UserError(f"{folder}: {module}.{kind} does not hold the entries that the model trains.")
            pattern.delta.copy_(value.delta.index_select(entry_dim(kind), place))

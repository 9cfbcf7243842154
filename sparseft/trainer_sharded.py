"""Taking up what was trained where ZeRO-3 has sharded the model: every process takes part, none holds all of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from sparseft.adapter import state_of
from sparseft.adapter_files import read_config, read_sparse
from sparseft.errors import UserError, shown
from sparseft.files import check_whole, read_tensors
from sparseft.layers import sparse_layers
from sparseft.layers.parking import entry_dim, index_keys, positions_of
from sparseft.trainer_checkpoints import load_trained
from sparseft.trainer_distributed import from_first, is_first


def any_sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 has taken charge of a model's parameters: all processes must run its passes together."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def take_up(model: nn.Module, folder: Path) -> None:
    """`load_trained`, also for a model in shards, whose optimizer knows nothing of it: for after the last step.

    UserError where the files are not what the same method has written of the same model.
    """
    state = state_of(model)
    assert state is not None
    if not any_sharded(model):
        load_trained(model, folder)
    elif state.kind == "whole":
        _take_up_whole(model, folder)
    else:
        import deepspeed

        with deepspeed.zero.GatheredParameters([p for p in model.parameters() if p.requires_grad], modifier_rank=0):
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


@torch.no_grad()
def _take_up_whole(model: nn.Module, folder: Path) -> None:
    """Fills a fully trained model, one parameter after another, from files that only the first process reads."""
    import deepspeed

    if is_first():
        check_whole(folder)
    parameters = dict(model.named_parameters())
    for file in from_first(sorted(folder.glob("model*.safetensors"))):
        tensors = read_tensors(file, "model") if is_first() else {}
        for name in from_first(list(tensors)):
            if name not in parameters:
                raise UserError(f"{folder}: the weights do not fit the model ({shown(name)}).")
            with deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0):
                if is_first():
                    parameters[name].copy_(tensors[name])

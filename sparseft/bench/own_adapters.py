"""`bench.adapters`: adapters from folders, PEFT's of others too, on their base `model.path`.

Timed are a switch from each to the next (of one alone: to the base and back, half of it), and a forward pass of a batch
in which row i has adapter i, beside the same batch on the base.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseft import console
from sparseft.adapters.description import is_adapter
from sparseft.adapters.lifecycle import load_adapter, set_adapter
from sparseft.bench.models import random_tokens
from sparseft.bench.timing import seconds_of, spread, take_turns
from sparseft.config import RunConfig
from sparseft.errors import UserError, nearest_path, where_looked
from sparseft.models.loading import load_model
from sparseft.runs.folder import ADAPTER

OWN, BASE = "adapters", "base"
Rows = dict[str, dict[str, Any]]


def folders(config: RunConfig) -> list[Path]:
    """The adapter folder of each run or adapter of `bench.adapters`; UserError where one is none."""
    found = []
    for given in config.bench.adapters:
        path = Path(given).expanduser()
        if not path.is_dir():
            raise UserError(f"bench.adapters: {given}: no such folder{where_looked(given)}.{nearest_path(given)}")
        path = path / ADAPTER if is_adapter(path / ADAPTER) else path
        if not is_adapter(path):
            raise UserError(f"bench.adapters: {given}: no adapter and no finished run.")
        found.append(path)
    return found


def measure(config: RunConfig, device: torch.device) -> tuple[Rows, dict[int, Rows]]:
    """A row with `switch_seconds`; and for each of `bench.lengths` one with `mixed_seconds`, beside the base's, unless
    an adapter is of no use in such a batch.

    UserError where an adapter does not fit the model, or beside the others on it.
    """
    model: Any = load_model(config.model, device)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and max(config.bench.lengths) > longest:
        raise UserError(f"bench.lengths: {max(config.bench.lengths)}: the model's context is {longest} tokens.")
    names = []
    for number, folder in enumerate(folders(config)):
        names.append(f"adapter{number}")
        model = load_adapter(model, folder, names[-1], activate=False)
    model.eval()
    switch = _timed({OWN: _around(model, names)}, config, device, "switch_seconds", lambda call, _: call())
    set_adapter(model, None)
    try:
        with torch.inference_mode():
            model(input_ids=random_tokens(model, len(names), 1, config.seed, device), adapter_names=names)
    except UserError as error:  # DoRA, adapters of experts
        console.warn(f"no batch in which each row has its own adapter: {error}")
        return switch, {}
    return switch, {length: _mixed(model, names, length, config, device) for length in config.bench.lengths}


def _around(model: nn.Module, names: list[str]) -> Callable[[], float]:
    device = next(model.parameters()).device
    stops = [*names, None] if len(names) == 1 else names

    def turn() -> float:
        set_adapter(model, stops[-1])
        return seconds_of(lambda: [set_adapter(model, name) for name in stops], device) / len(stops)

    return turn


def _mixed(model: Any, names: list[str], length: int, config: RunConfig, device: torch.device) -> Rows:
    ids = random_tokens(model, len(names), length, config.seed, device)
    calls: dict[str, Callable[[], Any]] = {
        BASE: lambda: model(input_ids=ids, use_cache=False),
        OWN: lambda: model(input_ids=ids, adapter_names=names, use_cache=False),
    }
    with torch.inference_mode():
        rows = _timed(calls, config, device, "mixed_seconds")
    for row in rows.values():
        row["tokens_per_second"] = len(names) * length / row["mixed_seconds"]
    return rows


def _timed(
    calls: dict[str, Callable[[], Any]], config: RunConfig, device: torch.device, name: str, clock: Any = None
) -> Rows:
    return {key: spread(name, times) for key, times in take_turns(calls, config.bench, device, clock=clock).items()}

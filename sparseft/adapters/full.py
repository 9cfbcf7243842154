"""Full fine-tuning as an adapter: the model itself, of which there is one."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparseft.adapters.description import FORMAT_VERSION
from sparseft.adapters.state import DEFAULT, Kind, Names, Now, State
from sparseft.adapters.units import Units
from sparseft.distributed.ranks import is_main
from sparseft.distributed.shards import any_sharded, load_state
from sparseft.errors import UserError, shown
from sparseft.files.atomic import write_json
from sparseft.files.hashing import check_whole, describe_whole
from sparseft.files.tensors import WHOLE_CONFIG, read_tensors
from sparseft.methods.base import MethodConfig
from sparseft.models.decoder import STATE
from sparseft.models.packed.quantized import is_packed
from sparseft.models.spec import ModelSpec
from sparseft.selection.selection import Selection


class Full(Kind):
    """Every weight trains; files are a Hugging Face model's."""

    trains_all = True
    called = "a whole model"

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        config: MethodConfig,
        selection: Selection | None,
        spec: ModelSpec | None,
        fingerprints: list[str] | None = None,
    ) -> nn.Module:
        if any(map(is_packed, model.modules())):
            raise UserError(f"method={config.name} trains every weight, which quantized ones cannot.")
        state = State.of(model, cls(), config.name, spec, fingerprints)
        state.config, state.active, state.method_config = config, DEFAULT, asdict(config)
        model = config.convert(model, None, spec)
        setattr(model, STATE, state)
        return model

    @classmethod
    def load(
        cls, model: nn.Module, folder: Path, content: dict[str, Any], name: str, keep: str, activate: bool
    ) -> nn.Module:
        raise UserError(f"{folder}: a whole model, not an adapter: load it as one (model.path={folder}).")

    def names(self, model: nn.Module) -> Collection[str]:
        return [DEFAULT]

    def save(
        self, model: nn.Module, state: State, name: str, folder: Path, state_dict: dict[str, Tensor] | None
    ) -> None:
        """A Hugging Face folder, with `sparseft_config.json` beside its files."""
        model.save_pretrained(folder, state_dict=state_dict)
        content = {"format_version": FORMAT_VERSION, **state.header, "modules": {}}
        write_json(folder / WHOLE_CONFIG, describe_whole(folder, content))

    def switch(self, model: nn.Module, state: State, name: str | None) -> None:
        raise UserError("full fine-tuning has no adapters to switch.")

    def fuse(self, model: nn.Module, state: State, weights: dict[str, float], name: str) -> None:
        raise UserError("full fine-tuning has no adapters to fuse.")

    def units(self, model: nn.Module, state: State) -> dict[str, Units]:
        raise UserError("full fine-tuning has no adapter whose units could be scaled.")

    def by_row(
        self,
        model: nn.Module,
        state: State,
        names: Names,
        now: Now,
    ) -> contextlib.AbstractContextManager[dict[str, Any]]:
        raise UserError("full fine-tuning has no adapters that rows could have.")

    def leave(self, model: nn.Module, state: State, *, merged: bool) -> nn.Module:
        if not merged:
            raise UserError("full fine-tuning keeps no copy of the base: load it again instead of detaching.")
        delattr(model, STATE)
        return model

    def load_trained(self, model: nn.Module, state: State, folder: Path) -> None:
        check_whole(folder)
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise UserError(f"{folder}: no model*.safetensors, so this is no fully fine-tuned model.")
        reads = is_main() or not any_sharded(model)  # of a sharded model, for all
        missing, unexpected = load_state(model, (read_tensors(file, "model") if reads else {} for file in files))
        tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
        if unexpected or set(missing) - tied:
            raise UserError(f"{folder}: the weights do not fit the model ({shown([*unexpected, *missing][0])}).")

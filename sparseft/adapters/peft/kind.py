"""Adapters in peft's wrapper around the model: what each act of `adapters.lifecycle` is for them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparseft.adapters.description import CONFIG, FORMAT_VERSION, TENSORS, peft_hash
from sparseft.adapters.peft.base_values import Overwritten, quiet, switch
from sparseft.adapters.peft.fusing import fuse
from sparseft.adapters.peft.leaving import drop_hooks, unmergeable, unwrap
from sparseft.adapters.peft.loading import check_telling, load
from sparseft.adapters.state import BASE, DEFAULT, Kind, Names, Now, State, state_for, state_of
from sparseft.adapters.tied_weights import tell_untied, untie
from sparseft.adapters.units import Units
from sparseft.distributed.shards import any_sharded, gathered
from sparseft.errors import UserError
from sparseft.files.atomic import move, write_json
from sparseft.files.hashing import BODY, file_hash
from sparseft.files.tensors import read_tensors
from sparseft.files.untrusted import read_json_object
from sparseft.methods.base import MethodConfig
from sparseft.methods.exact_targets import portable
from sparseft.models.decoder import STATE
from sparseft.models.fingerprint import check_base
from sparseft.models.spec import ModelSpec
from sparseft.selection.selection import Selection


class Peft(Kind):
    """Adapters of peft's wrapper around the model."""

    called = "a peft adapter"

    def __init__(self, kept: Overwritten) -> None:
        self.kept = kept
        self.described: dict[str, tuple[str, dict[str, Any]]] = {}  # method and settings, by the adapter's name

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        config: MethodConfig,
        selection: Selection | None,
        spec: ModelSpec | None,
        fingerprints: list[str] | None = None,
    ) -> nn.Module:
        if not hasattr(model, "prepare_inputs_for_generation"):  # which peft's wrapper takes over
            raise UserError(
                f"method {config.name}: {type(model).__name__} does not generate: expected a causal language model "
                "(AutoModelForCausalLM)."
            )
        spec = ModelSpec.of(model) if spec is None else spec
        state = State.of(model, cls(Overwritten.of(model)), config.name, spec, fingerprints)
        state.config, state.active, state.method_config = config, DEFAULT, dataclasses.asdict(config)
        state.kind.described[DEFAULT] = config.name, state.method_config
        model = config.convert(model, None, spec)
        setattr(model, STATE, state)
        return model

    @classmethod
    def load(
        cls, model: nn.Module, folder: Path, content: dict[str, Any], name: str, keep: str, activate: bool
    ) -> nn.Module:
        if keep != "device":
            raise UserError(f"{folder}: keep='{keep}' is for sparse adapters: peft keeps its own beside the weights.")
        if state_of(model) is None and hasattr(model, "peft_config"):
            raise UserError(
                f"{folder}: the model has peft's layers from elsewhere: merge them, or load all by sparseft."
            )
        state = state_for(model, cls, folder)
        own = content["sparseft"] if isinstance(content.get("sparseft"), dict) else {}
        method = str(own.get("method") or content["peft_type"]).lower()
        if state is None:
            state = State.of(model, cls(Overwritten.of(model)), method)
        if own:
            check_base(state.fingerprints, state.dtype, folder, own)
        check_telling(state.kind.kept, name)
        before = state.active
        model = load(model, folder, content, name, state.kind.kept, before)
        state.active = name
        state.kind.described[name] = method, dict(own.get("method_config") or {})
        setattr(model, STATE, state)
        if not activate and before != name:
            switch(model, state.kind.kept, name, before)
            state.active = before
        return model

    def names(self, model: Any) -> Collection[str]:
        return model.peft_config

    def save(self, model: Any, state: State, name: str, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        """peft's own files, with the adapter's values of the base's parameters."""
        active = state.active
        if name != active:
            switch(model, self.kept, active, name)
        try:
            with quiet():
                method, settings = self.described.get(name, (state.method, {}))  # none of what peft itself has added
                _write(model, name, state.header | {"method": method, "method_config": settings}, folder)
        finally:
            if name != active:
                switch(model, self.kept, name, active)

    def switch(self, model: Any, state: State, name: str | None) -> None:
        if name is not None:
            self.check_name(model, name)
        switch(model, self.kept, state.active, name)

    def fuse(self, model: Any, state: State, weights: dict[str, float], name: str) -> None:
        for known in weights:
            self.check_name(model, known)
        check_telling(self.kept, name)
        fuse(model, self.kept, state.active, weights, name)
        switch(model, self.kept, None, name)
        state.active = name
        methods = {self.described[known][0] for known in weights if known in self.described}
        method = methods.pop() if len(methods) == 1 else state.method
        self.described[name] = method, {"fused": dict(weights)}

    def units(self, model: Any, state: State) -> dict[str, Units]:
        """A rank of a linear is a column of its second factor. DoRA's magnitudes, biases, embeddings and whole modules
        have no such units."""
        name = state.active
        config = model.peft_config[name]
        others = [key for key, value in model.named_parameters() if value.requires_grad and ".lora_" not in key]
        others += [key for key, _ in model.named_parameters() if ".lora_embedding_" in key and name in key.split(".")]
        whole = bool(config.modules_to_save or config.trainable_token_indices)
        if config.use_dora or config.lora_bias or whole or self.kept.own.get(name) or others:
            raise UserError(
                f"'{name}' is more than a plain LoRA (DoRA, biases, embeddings, whole modules): it is no sum of parts "
                "that could be scaled one by one."
            )
        return {
            key: Units.of(parameter, 1)
            for key, parameter in model.named_parameters()
            if ".lora_B." in key and name in key.split(".")
        }

    @contextlib.contextmanager
    def by_row(self, model: Any, state: State, names: Names, now: Now) -> Iterator[dict[str, Any]]:
        """By peft's own way, which wants an adapter to be active, and none of those that differ by more than layers."""
        used = list(dict.fromkeys(name for name in names if name is not None))
        for name in used:
            if model.peft_config[name].use_dora:
                raise UserError(f"'{name}' is a DoRA adapter, which peft cannot mix in one batch: use it alone.")
            if name in self.kept.own:
                parameter = next(iter(self.kept.own[name]))
                raise UserError(f"'{name}' trained the base's own {parameter}, which all rows share: use it alone.")
        before = state.active
        switch(model, self.kept, before, used[0] if used else None)
        try:
            yield {"adapter_names": [BASE if name is None else name for name in names]} if used else {}
        finally:
            switch(model, self.kept, used[0] if used else None, before)

    def leave(self, model: Any, state: State, *, merged: bool) -> nn.Module:
        """A head or embedding that only the adapter's part of a tied pair changed is untied, in the config too."""
        base = model.get_base_model()
        if merged and state.active is not None:
            if (reason := self.unmergeable(model, state)) is not None:
                raise UserError(f"'{state.active}' cannot be merged: {reason}.")
            untie(base, state.active)
            with quiet():
                unwrap(base, state.active)
            tell_untied(base)
        else:
            switch(model, self.kept, state.active, None)
            unwrap(base, None)
        drop_hooks(base, self.kept)
        delattr(model, STATE)  # the wrapper is left behind: saved, it would be an empty adapter
        return base

    def unmergeable(self, model: Any, state: State) -> str | None:
        return None if state.active is None else unmergeable(model, state.active)

    def load_trained(self, model: nn.Module, state: State, folder: Path) -> None:
        import peft

        tensors = read_tensors(folder / TENSORS, "adapter")
        whole = contextlib.nullcontext()
        if any_sharded(model):
            whole = gathered([p for p in model.parameters() if p.requires_grad], changed=True)
        with whole:
            peft.set_peft_model_state_dict(model, tensors, adapter_name=state.active or DEFAULT)


def _write(model: nn.Module, name: str, header: dict[str, Any], folder: Path) -> None:
    """Writes peft's own files, with a `sparseft` key in `adapter_config.json`."""
    model.save_pretrained(folder, selected_adapters=[name])
    if name != "default":  # peft puts every other adapter into a folder of its own
        for file in (folder / name).iterdir():
            move(file, folder)
        (folder / name).rmdir()
    content = portable(read_json_object(folder / CONFIG, "adapter"), model, name)
    own = {"format_version": FORMAT_VERSION, **header, "sha256": file_hash(folder / TENSORS)}
    own[BODY] = peft_hash(content, own)
    write_json(folder / CONFIG, content | {"sparseft": own})

"""What is exported: a run's or an adapter's folder, and the base model that it was made for."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from sparseft.adapters.description import is_whole_model, read_config
from sparseft.adapters.lifecycle import load_adapter
from sparseft.config import ModelConfig, RunConfig
from sparseft.errors import UserError, nearest_path, where_looked
from sparseft.evaluation.target import Target, find_target, load_target
from sparseft.export.changes import Change, LowRankChange, SparseChange, sparse_changes
from sparseft.export.lora_changes import lora_changes
from sparseft.files.hub import adapter_folder
from sparseft.models.loading import check_model_path, load_config, load_tokenizer
from sparseft.models.packed.quantized import quantized_by
from sparseft.runs import folder as runs


@dataclass
class Source:
    """A run's or an adapter's folder.

    folder: the adapter's, or a fully trained model's; content: what it says of itself. packed: the base as it was
    trained on, where `model.quantize` packed it; `target` names its checkpoint.
    """

    target: Target
    config: RunConfig
    folder: Path
    content: dict[str, Any]
    packed: ModelConfig | None = None

    @staticmethod
    def find(folder: str, config: RunConfig, overrides: Sequence[str] = ()) -> Source:
        """The source in a run's folder, or an adapter's, here or on the hub; what is neither is a `UserError`."""
        path = adapter_folder(folder)
        if not path.is_dir():
            raise UserError(f"{folder}: no such folder{where_looked(folder)}.{nearest_path(folder)}")
        run = runs.is_run(path) and not runs.is_checkpoint(path)
        given = {"run": folder if run else None, "adapter": None if run else folder}
        target = find_target(config, **given, base=False, overrides=overrides)
        # Of a base that was packed on loading what is written is of its checkpoint: packed weights hold no deltas.
        packed = target.model if target.model.quantize != "none" else None
        base = None if target.base is None else replace(target.base, quantize="none")
        target = replace(target, model=replace(target.model, quantize="none"), base=base)
        place = target.adapter or Path(check_model_path(target.model.path))
        return Source(target, config, place, read_config(place), packed)

    @functools.cached_property
    def stored_packed(self) -> str | None:
        """The package that packed the base's own checkpoint; None of one in plain numbers."""
        return None if self.kind == "full" else quantized_by(load_config(self.target.model, "model", packed=True))

    @property
    def beside(self) -> ModelConfig | None:
        """The packed base beside whose weights it was trained, as it was loaded then; None of a plain one."""
        return self.packed or (self.target.model if self.stored_packed else None)

    @property
    def kind(self) -> str:
        """sparse | peft | full"""
        return "peft" if "peft_type" in self.content else "full" if is_whole_model(self.folder) else "sparse"

    @property
    def method(self) -> str:
        """The method that trained it; of a peft folder made by others the type that it says."""
        own = self.content.get("sparseft") or {}
        known = self.content.get("method") or own.get("method")
        return str(known or self.content["peft_type"]).lower()

    @property
    def residual(self) -> bool:
        """Whether its entries started at the checkpoint's own values on a packed base (`method.residual`)."""
        return bool(self._setting("residual"))

    @property
    def reselects(self) -> bool:
        """Whether it was trained to choose anew (`method.reselect_steps`)."""
        return bool(self._setting("reselect_steps"))

    def _setting(self, name: str) -> Any:
        """One of the method's settings that it was trained with; None where it says nothing of them."""
        settings = self.content.get("method_config")
        return settings.get(name) if isinstance(settings, dict) else None

    @property
    def fingerprint(self) -> str | None:
        """The base's, as the adapter knows it; None of a peft folder made by others."""
        own = self.content if self.kind != "peft" else self.content.get("sparseft") or {}
        known = own.get("base_fingerprint")
        return known if isinstance(known, str) else None

    @functools.cached_property
    def changes(self) -> dict[str, SparseChange]:
        """What a sparse adapter changes, by linear."""
        return sparse_changes(self.folder)

    @functools.cached_property
    def low_rank(self) -> dict[str, LowRankChange]:
        """What a LoRA changes, by linear."""
        return lora_changes(self.folder, self.content)

    @property
    def linears(self) -> Mapping[str, Change]:
        """What it changes, by linear, sparse or as a LoRA; of a model trained whole that is a `UserError`."""
        if self.kind == "full":
            raise UserError(f"{self.folder}: every weight was trained, which LoRA cannot hold: use --format merged.")
        return self.low_rank if self.kind == "peft" else self.changes

    @functools.cached_property
    def text_config(self) -> Any:
        """transformers' config of the base's language model."""
        return load_config(self.target.model, "model").get_text_config()

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.target.model)

    def base(self) -> nn.Module:
        """The base model as stored, on the configured device. A fully trained model is its own."""
        return load_target(replace(self.target, adapter=None), self.config)[0]

    def attached(self, base: nn.Module) -> nn.Module:
        """`base()` with the adapter active; of a fully trained model that itself."""
        return base if self.target.adapter is None else load_adapter(base, self.target.adapter).eval()

"""What `preprocess` and `train` share: model, data, and the cached selection."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn

from sparseft import console
from sparseft.config import RunConfig
from sparseft.data import contents
from sparseft.data.loading import check_tokens, data_of
from sparseft.data.packing import padding_id
from sparseft.data.templates import chat_date
from sparseft.distributed import ranks
from sparseft.kernels.dispatch import kernel_for
from sparseft.models.decoder import base_parameter_count
from sparseft.models.loading import (
    load_config,
    load_in_shards,
    load_tokenizer,
    model_dtype,
    resolve_device,
    vocabulary_rows,
)
from sparseft.models.spec import ModelSpec
from sparseft.selection import cache
from sparseft.selection.cache import Selected
from sparseft.selection.compute import Request
from sparseft.training.distributed_trainer import check_shards
from sparseft.training.reselection.running import check_seen


@dataclass
class Prepared:
    """A loaded model with its tokenizer and data."""

    model: nn.Module
    tokenizer: Any
    data: Any  # data.LoadedData
    device: Any
    dtype: torch.dtype  # of the base model
    sharding: Any = None  # transformers' settings of ZeRO-3, to live as long as a model in shards does

    @property
    def rows(self) -> Any:
        """What the Trainer draws batches from: training examples, packed where that is asked for; of a preference
        objective pairs, or answers."""
        return self.data.preferences or (self.data.train if self.data.packed is None else self.data.packed)

    @property
    def pad(self) -> int:
        """The id to pad with."""
        return padding_id(self.tokenizer, vocabulary_rows(self.model)[0])


def prepare(config: RunConfig) -> Prepared:
    """Loads tokenizer, data and model, the cheapest to check first, and says what they are.

    `checks.check_data` and `checks.check_model` come before, once, by the command.
    """
    transformers.logging.disable_progress_bar()
    device = resolve_device(config.hardware.device)
    kernel_for(torch.empty(0, device=device))  # an unusable SPARSEFT_KERNELS is said before anything is computed
    tokenizer = load_tokenizer(config.model)
    # Kept in config.yaml: who reads these data again, a run that goes on, trimming, evaluation, has the same examples.
    config.dataset.chat_date = ranks.from_main(lambda: config.dataset.chat_date or chat_date(config.dataset, tokenizer))
    data = ranks.main_first(lambda: data_of(config, tokenizer), contents.KNOWN)  # tokenised once on each machine
    data.tell()
    stored = model_dtype(config.model, load_config(config.model, packed=True))
    wide = config.hardware.fsdp and config.method.widens(stored)  # what FSDP2 has sharded cannot be cast any more
    settings = replace(config.model, dtype="float32") if wide else config.model
    model, sharding = load_in_shards(settings, config.hardware, device)
    check_tokens(data, tokenizer, *vocabulary_rows(model))
    dtype = stored if wide else next(model.parameters()).dtype
    total = base_parameter_count(model)
    console.log(f"model: {config.model.path}, {total:,} parameters, {str(dtype).removeprefix('torch.')} on {device}")
    return Prepared(model, tokenizer, data, device, dtype, sharding)


def select(config: RunConfig, prepared: Prepared, spec: ModelSpec) -> Selected:
    """The cached selection with this run's key, or a new one, which is then cached."""
    request = Request.of(spec, config.method)
    check_shards(request, config.hardware, prepared.model)
    check_seen(request, config.method)
    return cache.select(prepared.model, request, prepared.data, prepared.pad, config.cache_dir)

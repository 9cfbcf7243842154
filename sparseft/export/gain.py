"""What an adapter that was learnt on a packed base is still worth once it is written.

Its deltas were learnt beside quantized weights (`model.quantize`); what is written adds them to these as plain numbers,
or to the weights that these were packed from. Both are measured on the run's own held-out examples, each against its
own base.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseft import console
from sparseft.adapters.lifecycle import load_adapter
from sparseft.compose.run_config import from_dict
from sparseft.config import ModelConfig
from sparseft.data.loading import data_of
from sparseft.data.packing import padding_id
from sparseft.data.sampling import seeded_first
from sparseft.errors import reason_of
from sparseft.evaluation.held_out import held_out_loss
from sparseft.export.source import Source
from sparseft.files.untrusted import read_yaml_object
from sparseft.models.loading import load_model, resolve_device, vocabulary_rows
from sparseft.runs import folder as runs

EXAMPLES = 128  # of the held-out ones, at most


def gain(source: Source, written: Path, base: str) -> dict[str, Any] | None:
    """The losses of the packed base, of it with the adapter, and of the model folder `written`; `survived`: the share
    of what the adapter brought on the packed base that is in `written`, over the packed base itself (`base`: trained),
    or over the checkpoint, whose loss is then given too.

    One model is in memory at a time. None where the base was not packed, no run says what it was trained on, it learnt
    from preferences, or the measurement fails, whatever by: what is exported is whole without it.
    """
    try:
        return _measured(source, written, base)
    except Exception as error:  # the run's own files may be elsewhere by now; two models may be more than fits
        console.warn(f"how much of what was learnt survived is not measured: {reason_of(error)}")
        return None


def _measured(source: Source, written: Path, base: str) -> dict[str, Any] | None:
    beside = source.beside
    if beside is None or source.target.folder is None or source.target.adapter is None:
        return None
    own = from_dict(read_yaml_object(source.target.folder / runs.CONFIG))
    if own.by_preference:
        return None  # what it brought is no loss of imitation
    own.model = beside
    data = data_of(own, source.tokenizer)
    rows = data.train if data.eval is None else data.eval
    chosen = [rows[index] for index in seeded_first(min(EXAMPLES, len(rows)), len(rows), own.seed, "gain")]
    device = resolve_device(source.config.hardware.device)

    def loss(model: nn.Module) -> float:
        pad = padding_id(source.tokenizer, vocabulary_rows(model)[0])
        return held_out_loss(model.eval(), chosen, pad, device, own.trainer.batch_size)

    def losses() -> Iterator[Any]:
        model = load_model(beside, device)
        yield loss(model)
        yield loss(load_adapter(model, source.target.adapter))
        del model
        yield loss(load_model(source.target.model, device)) if base == "checkpoint" else None
        yield loss(
            load_model(ModelConfig(path=str(written), trust_remote_code=source.target.model.trust_remote_code), device)
        )

    with console.working("measuring what was learnt, before and after"), torch.no_grad():
        packed, learnt, checkpoint, merged = losses()
    brought = packed - learnt
    return {
        "quantize": source.stored_packed or beside.quantize,
        "base": base,
        "data": data.eval_source or f"{data.train_source} (training examples)",
        "examples": len(chosen),
        "loss_packed_base": packed,
        "loss_packed": learnt,
        "loss_checkpoint": checkpoint,
        "loss_written": merged,
        "survived": ((packed if checkpoint is None else checkpoint) - merged) / brought if brought > 0 else None,
    }

"""What a micro-step of an objective computes, on a model without content: TRL's own functions, for the memory plan."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from trl.kernels import chunked_logprob
from trl.trainer.utils import add_fused_lm_head

from sparseft.adapters.reference_model import reference_model
from sparseft.config import RunConfig
from sparseft.data.preference_sets import UNPAIRS
from sparseft.training.preference.objectives import OBJECTIVES, sequences
from sparseft.training.preference.trainer import fp32_logits

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")  # that TRL asks its head for


def loss_of(config: RunConfig, model: nn.Module, batch: int, length: int, device: str) -> Callable[[], Tensor]:
    """What makes the loss of `batch` pairs (or answers) of `length` tokens each, all of them an answer's, and asks the
    reference. device: the type of the one that is planned for."""
    ids = torch.zeros(batch * sequences(config.objective), length, dtype=torch.int64, device="meta")
    if OBJECTIVES[config.objective].reference:
        return lambda: _against_reference(config, model, ids, device)
    return lambda: _of_pairs(config, model, ids)


def _against_reference(config: RunConfig, model: Any, ids: Tensor, device: str) -> Tensor:
    """As `DPOTrainer` and `KTOTrainer` compute it: one pass with a gradient, the others without."""
    peft = hasattr(model, "peft_config")
    reference = model if peft or config.method.trains_all else reference_model(model)
    given = {
        "input_ids": ids,
        "labels": ids,
        "attention_mask": torch.ones_like(ids),
        "use_cache": False,
        "fused_lm_head": True,
    }

    def log_probabilities(asked: Any) -> Tensor:
        return asked(**given).log_probs.sum(1)

    def without_gradient() -> Tensor:
        with torch.no_grad(), model.disable_adapter() if peft else contextlib.nullcontext():
            return log_probabilities(reference)

    with _fused([model] if reference is model else [model, reference], device):
        if config.objective == UNPAIRS:  # mismatched answers, which no gradient goes through
            with torch.no_grad():
                log_probabilities(model)
        own = log_probabilities(model)
        return (own - without_gradient()).mean()


@contextlib.contextmanager
def _fused(models: list[Any], device: str) -> Iterator[None]:
    """Inside, the models have TRL's head, whose tiles on a GPU are worked on in place, by a kernel. It asks whether the
    device has autocast on, which the one of tensors without content does not know."""
    folds, asks = (chunked_logprob._forward_tile, chunked_logprob._backward_tile), torch.is_autocast_enabled
    inner = [model.get_base_model() if hasattr(model, "peft_config") else model for model in models]
    before = [model.__dict__.get("forward") for model in inner]
    torch.is_autocast_enabled = lambda *place: place != ("meta",) and asks(*place)
    for model in inner:
        add_fused_lm_head(model, outputs=OUTPUTS)
    if device == "cuda":
        chunked_logprob._forward_tile = chunked_logprob._backward_tile = lambda *_, **__: None
    try:
        yield
    finally:
        torch.is_autocast_enabled = asks
        chunked_logprob._forward_tile, chunked_logprob._backward_tile = folds
        for model, own in zip(inner, before, strict=True):
            del model.forward
            if own is not None:
                model.forward = own


def _of_pairs(config: RunConfig, model: Any, ids: Tensor) -> Tensor:
    """As `ORPOTrainer` and `CPOTrainer` compute it, of logits in fp32."""
    own = OBJECTIVES[config.objective]
    trainer = own.trainer()
    asked = SimpleNamespace(
        is_encoder_decoder=False, aux_loss_enabled=False, accelerator=SimpleNamespace(device=ids.device),
        get_batch_logps=trainer.get_batch_logps, concatenated_inputs=trainer.concatenated_inputs,
        **{"padding_value": 0, "pad_token_id": 0, **own.arguments(config.trainer, 0)},
    )  # fmt: skip
    half, mask = ids[: len(ids) // 2], torch.ones_like(ids[: len(ids) // 2])
    batch = {}
    for side in ("chosen", "rejected"):
        batch |= {f"{side}_input_ids": half, f"{side}_attention_mask": mask, f"{side}_labels": half}
    with fp32_logits(model):
        better, worse, *_, imitated = trainer.concatenated_forward(asked, model, batch)
    return (better - worse).mean() + imitated

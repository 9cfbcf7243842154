"""What a preference objective does not go with."""

from __future__ import annotations

from typing import Any

from sparseft.config import AUTO, RunConfig
from sparseft.errors import UserError
from sparseft.rules import show


def check(config: RunConfig) -> None:
    """Refuses settings that imitation alone has, and those that it does not have."""
    trainer, data, hardware = config.trainer, config.dataset, config.hardware
    if not config.by_preference:
        if trainer.beta is not None:
            raise UserError(
                f"trainer.beta={show(trainer.beta)}: objective=sft has none; it is of dpo, ipo, kto, orpo and simpo."
            )
        return
    loss, one = "its loss is TRL's", "its records are read from one source"
    # A key, its value, the one that goes with these objectives, and why others do not.
    settings: list[tuple[str, Any, Any, str]] = [
        ("trainer.label_smoothing", trainer.label_smoothing, 0.0, loss),
        ("trainer.pad_to", trainer.pad_to, "longest", "TRL pads its batches"),
        ("trainer.compile", trainer.compile, "none", "the weights of its base come and go within a step"),
        ("method.dropout", config.method.dropout, 0.0, "TRL turns all dropout off"),
        ("trainer.forget_budget", trainer.forget_budget, None, "trimming keeps what lowers the loss of imitation"),
        ("dataset.loss_on_prompt", data.loss_on_prompt, False, "both answers have one prompt"),
        ("dataset.packing", data.packing, False, "TRL's trainers pack none of these"),
        ("dataset.mix", data.mix, None, one),
        ("dataset.replay", data.replay, None, one),
        ("hardware.zero_stage", hardware.zero_stage, 0, "it has not been held to one process's steps under DeepSpeed"),
        ("hardware.fsdp", hardware.fsdp, False, "its reference is put into whole weights"),
    ]
    for key, value, fitting, why in settings:
        if value != fitting:
            raise UserError(
                f"{key}={show(value)}: cannot be used with objective={config.objective} ({why}); use {show(fitting)}."
            )
    micro = hardware.at_once(trainer.batch_size)
    if config.objective == "kto" and micro < 2:
        given = f"trainer.batch_size={trainer.batch_size}"
        if trainer.batch_size > 1:  # 3 of which 2 may be taken at once are taken one by one
            given = f"hardware.micro_batch={hardware.micro_batch} with {given}"
        raise UserError(
            f"{given}: objective=kto estimates how far the model has moved from answers to other prompts of the "
            "same micro-step, of which there must be two; use 2 or more, as trainer.batch_size=4 "
            "trainer.gradient_accumulation=4."
        )
    if trainer.learning_rate == AUTO:
        raise UserError(
            f"trainer.learning_rate=auto: cannot be used with objective={config.objective} (the ramp follows the loss "
            "of imitation); give a number."
        )
    if trainer.checkpointing.startswith("selective"):
        raise UserError(
            f"trainer.checkpointing={trainer.checkpointing}: cannot be used with objective={config.objective} "
            f"({loss}); use none or full."
        )

"""A run's settings as transformers' Trainer takes them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import torch
import transformers

from sparseft import console
from sparseft.config import HardwareConfig, TrainerConfig, checkpointing_of
from sparseft.distributed.deepspeed import deepspeed_on_cpu, zero_config
from sparseft.distributed.ranks import is_distributed
from sparseft.training import schedules
from sparseft.training.compiling import GRAPHS


@contextlib.contextmanager
def tf32_as_set() -> Iterator[None]:
    """Afterwards fp32 products are rounded to TF32 where they were before, and only there.

    Asked to compile, transformers (in its arguments) and accelerate (in its state) turn TF32 on for the whole process,
    by torch's new names and by its old ones: products of fp32 weights then change by 1e-3.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    named: list[tuple[Any, str]] = [(cudnn, "allow_tf32")]
    switches: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),  # `matmul.allow_tf32` is part of it
    ]
    onednn = torch.backends.mkldnn
    # Last, as the old names set some of these too.
    named += [(place, "fp32_precision") for place in (cudnn, onednn, matmul, cudnn.conv, cudnn.rnn, onednn.matmul)]
    # Settings that were left unset follow this one, and must stay unset.
    switches.insert(0, (partial(getattr, torch.backends, "fp32_precision"),
                        partial(setattr, torch.backends, "fp32_precision")))  # fmt: skip
    switches += [(partial(getattr, *one), partial(setattr, *one)) for one in named]

    def value(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except RuntimeError:  # an old name cannot be read where a new one was given a value that it does not know
            return None

    before = [value(read) for read, _ in switches]
    try:
        yield
    finally:
        for (read, write), was in zip(switches, before, strict=True):
            if was is not None and value(read) != was:
                write(was)


@tf32_as_set()
def training_arguments(
    config: TrainerConfig,
    hardware: HardwareConfig,
    *,
    seed: int,
    device: torch.device,
    total_steps: int,
    unused: bool = False,
    kind: type = transformers.TrainingArguments,
    **more: Any,
) -> Any:
    """The Trainer's arguments of a run, but for its folder; steps are optimizer steps. `schedules.check` comes before.

    config: with the learning rate that it is to be, also where that is the method's.
    unused: a step may leave parameters without a gradient (experts that no token reached).
    kind, more: their class, and what it takes besides.
    """
    batch_size, accumulation = micro_batches(config, hardware)
    warmup = schedules.warmup_steps(config, total_steps)
    if warmup != config.warmup_steps:
        console.log(f"warm-up: {warmup} steps instead of {config.warmup_steps}, as the run has only {total_steps}")
    arguments = kind(
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=config.max_steps,
        num_train_epochs=config.num_epochs,
        learning_rate=config.learning_rate,
        warmup_steps=warmup,
        lr_scheduler_type=config.scheduler,
        lr_scheduler_kwargs=dict(config.scheduler_args or {}),
        optim=config.optimizer,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # a loss that is not finite is shown and stops the run, never averaged away
        eval_strategy="steps" if config.eval_steps else "no",
        eval_steps=config.eval_steps,
        save_strategy="steps",
        save_steps=config.save_steps or 10**9,  # with 10**9: at the end only
        seed=seed,
        data_seed=seed,
        bf16=False,  # `mixed_precision.py` where it is needed
        torch_compile=config.compile in ("model", "graphs"),
        torch_compile_mode=GRAPHS if config.compile == "graphs" else None,
        use_cpu=device.type == "cpu" and not hardware.zero_stage,  # accelerate knows DeepSpeed on devices only
        ddp_backend="gloo" if device.type == "cpu" and is_distributed() else None,
        ddp_broadcast_buffers=False,  # base values and indices, which no step changes
        ddp_find_unused_parameters=unused,
        deepspeed=zero_config(hardware) if hardware.zero_stage else None,
        accelerator_config=_accelerator(hardware, device),
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        report_to=[],
        **_activation_checkpointing(checkpointing_of(config, hardware) == "full"),
        **more,
    )
    # Several devices are several processes here. A single one that sees several GPUs would have its model wrapped in
    # `nn.DataParallel`: larger batches, in copies of the sparse layers whose deltas never come back.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if device.type == "cpu":
        # Of several processes accelerate numbers it. To torch "cpu:0" is another place than "cpu", to which it copies
        # all weights, mapped files that the processes share too (`frozen_left_out` has DDP leave them as they are), and
        # which it cannot load an optimizer to.
        arguments._setup_devices = arguments.distributed_state.device = torch.device("cpu")
    return arguments


def _accelerator(hardware: HardwareConfig, device: torch.device) -> dict[str, Any] | None:
    if device.type == "cuda":
        return {"non_blocking": True}  # batches travel from pinned memory while the device computes
    return deepspeed_on_cpu() if hardware.zero_stage else None


def micro_batches(config: TrainerConfig, hardware: HardwareConfig) -> tuple[int, int]:
    """(sequences at once, micro-steps a step): the trainer's, or its batch split where the hardware holds less."""
    size = hardware.at_once(config.batch_size)
    return size, config.gradient_accumulation * (config.batch_size // size)


def _activation_checkpointing(on: bool) -> dict[str, Any]:
    """The arguments for recomputation, under the name that the installed transformers gives them.

    Not the reentrant kind: it needs an input that requires a gradient, and with frozen embeddings there is none.
    """
    names = {field.name for field in fields(transformers.TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: on, **({f"{name}_kwargs": {"use_reentrant": False}} if on else {})}

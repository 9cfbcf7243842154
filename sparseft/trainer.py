"""A thin subclass of `transformers.Trainer`: checkpoints that are whole or not there, metrics, progress, interrupts."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from sparseft import console
from sparseft.adapter import load_adapter, save_adapter, state_of
from sparseft.config import HardwareConfig, TrainerConfig
from sparseft.errors import RunError, UserError
from sparseft.layers import sparse_layers, write_back
from sparseft.runs import append_metrics

CHECKPOINTS = "checkpoints"


def memory_bytes(device: torch.device, *, peak: bool) -> int:
    """Memory of the device: allocated by torch on CUDA, the process's resident set on the CPU.

    The CPU's peak is the whole process's since it started: a high-water mark never falls.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        key = "VmHWM:" if peak else "VmRSS:"
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if os.uname().sysname == "Darwin" else usage * 1024


def training_arguments(
    config: TrainerConfig,
    hardware: HardwareConfig,
    *,
    run: Path,
    seed: int,
    device: torch.device,
    learning_rate: float,
    total_steps: int,
    autocast: bool,
) -> transformers.TrainingArguments:
    """The Trainer's arguments of a run; steps are optimizer steps."""
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    from sparseft.errors import nearest

    for field, value, choices in (
        ("scheduler", config.scheduler, [str(item.value) for item in SchedulerType]),
        ("optimizer", config.optimizer, [str(item.value) for item in OptimizerNames]),
    ):
        if value not in choices:
            raise UserError(f"trainer.{field}={value}: unknown.{nearest(value, choices)}")
    warmup = config.warmup_steps
    if warmup >= total_steps > 0:
        warmup = total_steps // 10
        console.log(f"warm-up: {warmup} steps instead of {config.warmup_steps}, as the run has only {total_steps}")
    return transformers.TrainingArguments(
        output_dir=str(run / CHECKPOINTS),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        max_steps=config.max_steps,
        num_train_epochs=config.num_epochs,
        learning_rate=learning_rate,
        warmup_steps=warmup,
        lr_scheduler_type=config.scheduler,
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
        save_total_limit=config.save_total_limit,
        seed=seed,
        data_seed=seed,
        bf16=autocast,
        gradient_checkpointing=hardware.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if hardware.gradient_checkpointing else None,
        torch_compile=hardware.compile,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        report_to=[],
    )


class Trainer(transformers.Trainer):
    """Trains what is trainable of an attached model, and saves only that.

    `run` is the run folder: metrics go to its `metrics.jsonl`, checkpoints to `checkpoints/checkpoint-N/`.
    """

    def __init__(self, model: nn.Module, args: transformers.TrainingArguments, *, run: Path, **options: Any) -> None:
        super().__init__(model=model, args=args, **options)
        self.run = run
        self.interrupted: str | None = None  # the signal's name
        self._aside: str | None = None
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(RunCallback(self))

    # ---- checkpoints: written aside, then renamed ----

    def _get_output_dir(self, trial: Any) -> str:
        return self._aside or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        self._aside = tempfile.mkdtemp(prefix=".partial-", dir=folder)
        try:
            super()._save_checkpoint(model, trial)
            if (folder / name).exists():  # the interrupted step was saved already
                shutil.rmtree(folder / name)
            (Path(self._aside) / name).rename(folder / name)
        finally:
            shutil.rmtree(self._aside, ignore_errors=True)
            self._aside = None
        steps = sorted(checkpoint_steps(folder))
        for step in steps[: -self.args.save_total_limit] if self.args.save_total_limit else []:
            shutil.rmtree(folder / f"checkpoint-{step}")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_adapter(
                self.accelerator.unwrap_model(self.model), Path(output_dir or self.args.output_dir) / "adapter"
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.model if model is None else model, Path(resume_from_checkpoint) / "adapter")

    # ---- evaluation: the mean over all labelled tokens, whatever the batch size ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """`{"eval_loss": …}`: the mean loss over all labelled tokens of the evaluation set."""
        loader = self.get_eval_dataloader(eval_dataset)
        model = self.model
        training = model.training
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for batch in loader:
                batch = self._prepare_inputs(batch)
                labelled = (batch["labels"][:, 1:] != -100).sum()
                with self.compute_loss_context_manager():
                    loss = model(**batch, use_cache=False).loss
                if labelled:  # a batch without labels has no loss (NaN)
                    total += torch.stack([loss.double() * labelled, labelled.double()])
        model.train(training)
        total = self.accelerator.reduce(total)
        metrics = {f"{metric_key_prefix}_loss": (total[0] / total[1]).item()}
        self.log(dict(metrics))
        return metrics


class RunCallback(transformers.TrainerCallback):
    """Metrics, progress and interrupts of one run."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.progress: console.Progress | None = None
        self.grows = trainer.is_world_process_zero()
        self.mark = (time.monotonic(), 0, 0)  # time, steps and tokens at the last log

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.mark = (time.monotonic(), state.global_step, state.num_input_tokens_seen)
        if self.grows:
            self.progress = console.Progress(state.max_steps, "train", initial=state.global_step)
            self.progress.__enter__()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.close()

    def close(self) -> None:
        """Ends the progress display, also of a run that failed."""
        if self.progress is not None:
            self.progress.__exit__(None, None, None)
            self.progress = None

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.trainer.is_deepspeed_enabled:  # its optimizer updates the deltas behind torch's step hook
            write_back(sparse_layers(self.trainer.model).values())
        if self.progress is not None:
            self.progress.update(state.global_step)
        if self.trainer.interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        logs = dict(logs or {})
        record: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6)}
        if "eval_loss" in logs:
            self._append(record | {"eval_loss": logs["eval_loss"]})
            return
        if "loss" not in logs:  # the Trainer's own summary at the end
            return
        now = (time.monotonic(), state.global_step, state.num_input_tokens_seen)
        seconds, steps, tokens = (new - old for new, old in zip(now, self.mark, strict=True))
        self.mark = now
        record |= {
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_second": tokens / seconds if seconds > 0 else None,
            "step_seconds": seconds / steps if steps else None,
            "memory_gib": memory_bytes(args.device, peak=False) / 2**30,
        }
        self._append(record)
        if self.progress is not None:
            speed = {"tokens_per_second": record["tokens_per_second"]} if record["tokens_per_second"] else {}
            self.progress.update(state.global_step, loss=record["loss"], **speed)
        if not math.isfinite(logs["loss"]):
            raise self.trainer_error(f"the loss is {logs['loss']} at step {state.global_step}: try a lower rate.")

    def trainer_error(self, message: str) -> RunError:
        """A RunError that knows the last good checkpoint."""
        error = RunError(message)
        error.last_checkpoint = last_checkpoint(self.trainer.run)  # type: ignore[attr-defined]
        return error

    def _append(self, record: dict[str, Any]) -> None:
        if self.grows:
            append_metrics(self.trainer.run / "metrics.jsonl", record)


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in a folder."""
    names = [item.name for item in folder.iterdir()] if folder.is_dir() else []
    return [int(name.removeprefix("checkpoint-")) for name in names if name.removeprefix("checkpoint-").isdigit()]


def last_checkpoint(run: Path) -> str | None:
    """The newest checkpoint of a run, or null."""
    folder = run / CHECKPOINTS
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def load_trained(model: nn.Module, folder: Path) -> None:
    """Fills the attached model's trained parameters from an adapter folder that the same method saved, in place."""
    state = state_of(model)
    assert state is not None
    if state.kind == "sparse":
        load_adapter(model, folder, state.active or "default")
        return
    from sparseft.files import read_tensors

    if state.kind == "whole":
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise UserError(f"{folder}: no model*.safetensors, so this is no fully fine-tuned model.")
        tensors = {name: tensor for file in files for name, tensor in read_tensors(file, "model").items()}
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
        if unexpected or set(missing) - tied:
            raise UserError(f"{folder}: the weights do not fit the model ({[*unexpected, *missing][0]}).")
        return
    import peft

    tensors = read_tensors(folder / "adapter_model.safetensors", "adapter")
    peft.set_peft_model_state_dict(model, tensors, adapter_name=state.active or "default")


@contextlib.contextmanager
def finish_step_on_signals(trainer: Trainer) -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM lets the step end and saves; a second one interrupts at once."""

    def note(number: int, frame: Any) -> None:
        if trainer.interrupted:
            raise KeyboardInterrupt
        trainer.interrupted = signal.Signals(number).name
        console.log(f"{trainer.interrupted}: finishing the step and saving; once more stops at once")

    try:
        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever runs the thread handles signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def train(trainer: Trainer, resume_from: str | None) -> transformers.trainer_utils.TrainOutput:
    """Runs the loop. Interrupted: saved first, then KeyboardInterrupt, with the checkpoint in `last_checkpoint`."""
    callback = next(item for item in trainer.callback_handler.callbacks if isinstance(item, RunCallback))
    try:
        with finish_step_on_signals(trainer):
            output = trainer.train(resume_from_checkpoint=resume_from)
    except torch.OutOfMemoryError as error:
        raise callback.trainer_error(
            f"the device ran out of memory ({str(error).splitlines()[0]}): lower trainer.batch_size (and raise "
            "trainer.gradient_accumulation) or trainer.max_length, or set hardware.gradient_checkpointing=true."
        ) from error
    finally:
        callback.close()
    if trainer.interrupted:
        error = KeyboardInterrupt(trainer.interrupted)
        error.last_checkpoint = last_checkpoint(trainer.run)  # type: ignore[attr-defined]
        raise error
    return output

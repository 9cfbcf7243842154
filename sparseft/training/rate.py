"""`trainer.learning_rate=auto`: a rate found by a short exponential ramp, which is then undone bit for bit.

The range test of L. N. Smith (Cyclical Learning Rates for Training Neural Networks, WACV 2017, section 3.3) as fastai's
`lr_find` runs it, a step a rate, but for what is looked at: not the loss of the step's own batch, whose noise hides
what fine-tuning gains, but that of the same few examples after each step, which the ramp does not train on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from sparseft import console
from sparseft.config import HardwareConfig, TrainerConfig
from sparseft.data.packing import Collator, PackedDataset
from sparseft.data.sampling import seeded_first
from sparseft.data.tokenized import TokenizedDataset
from sparseft.errors import RunError, UserError
from sparseft.files.untrusted import read_json_object
from sparseft.layers import sparse_layers, write_back
from sparseft.runs.folder import RATE
from sparseft.training.arguments import training_arguments
from sparseft.training.trainer import Trainer

LOWEST, HIGHEST, STEPS = 1e-6, 1.0, 60  # ten rates a decade
WATCHED = (16, 64)  # examples that the loss is looked at on: those of a step, within these
ENOUGH = 0.9  # of what the best rate of the ramp gains
DIVERGED = 1.5  # times the lowest loss: what comes after says nothing


@dataclass
class Found:
    """What a ramp found, as `learning_rate.json` holds it. Losses are nats a token."""

    learning_rate: float
    before: float  # the loss without a step
    curve: list[tuple[float, float]]  # a step's rate, and the loss after it
    watched: int  # examples that it is the loss of
    seconds: float

    def __str__(self) -> str:
        lowest = min(loss for _, loss in self.curve)
        return (
            f"{self.learning_rate:g}, found in {self.seconds:.1f} s by {len(self.curve)} steps at rates up to "
            f"{self.curve[-1][0]:.2g}: the loss on {self.watched} examples went from {self.before:.4f} to {lowest:.4f}"
        )

    @classmethod
    def load(cls, folder: Path) -> Found:
        """What a run's folder keeps of it; UserError where that is missing or damaged."""
        content = read_json_object(folder / RATE, "run")
        rate = content.get("learning_rate")
        if not (isinstance(rate, float) and 0 < rate <= HIGHEST) or content.keys() != {f.name for f in fields(cls)}:
            raise UserError(f"{folder / RATE}: holds no rate that was found; give another output_dir to find one anew.")
        return cls(**content)


class Ramp(Trainer):
    """Trains at rates that rise from step to step, watches the loss, and leaves nothing behind."""

    def __init__(self, *args: Any, watched: TokenizedDataset, progress: console.Progress, **options: Any) -> None:
        super().__init__(*args, **options)
        self.run_state.names_spikes = False  # the loss is meant to rise
        self.watched, self.progress = watched, progress
        self.curve: list[tuple[float, float]] = []
        self.add_callback(_Watching(self))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Exponential, from the arguments' rate up."""
        self.lr_scheduler = LambdaLR(
            self.optimizer if optimizer is None else optimizer, lambda step: _rate(step) / LOWEST
        )
        return self.lr_scheduler

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        pass


class _Watching(transformers.TrainerCallback):
    """Measures after each step, and ends the ramp where the loss has diverged."""

    def __init__(self, ramp: Ramp) -> None:
        self.ramp = ramp

    def on_step_end(self, args, state, control, **kwargs) -> None:
        loss = self.ramp.held_out_loss(self.ramp.watched)
        self.ramp.curve.append((_rate(state.global_step - 1), loss))
        self.ramp.progress.update(state.global_step, loss=loss)
        if not loss <= DIVERGED * min(each for _, each in self.ramp.curve):  # nor for one that is no number
            control.should_training_stop = True


def _rate(step: int) -> float:
    """Of the step number `step`, from 0."""
    return LOWEST * (HIGHEST / LOWEST) ** (min(step, STEPS - 1) / (STEPS - 1))


def find(
    model: nn.Module,
    data: TokenizedDataset,
    trainer: TrainerConfig,
    hardware: HardwareConfig,
    *,
    device: torch.device,
    seed: int,
    pad: int,
    packing: bool = False,
    arguments: Mapping[str, Any],
    **options: Any,
) -> Found:
    """The rate to train what is attached to `model` with, by steps such as the run's own. Model, adapter and all random
    states are afterwards what they were, bit for bit.

    arguments, options: further ones of `training_arguments` and `Trainer`. RunError where no rate lowers the loss.
    """
    started = time.monotonic()
    sequences = trainer.batch_size * trainer.gradient_accumulation
    count = min(max(WATCHED[0], min(sequences, WATCHED[1])), len(data) // 2)
    chosen = seeded_first(count, len(data), seed, "rate")
    rest = np.setdiff1d(np.arange(len(data)), chosen)
    watched, others = (data.subset(chosen), data.subset(rest)) if count else (data, data)
    settings = dataclasses.replace(
        trainer, max_steps=STEPS, learning_rate=LOWEST, scheduler="constant", scheduler_args=None, warmup_steps=0,
        logging_steps=STEPS, eval_steps=None, save_steps=None, compile="none",
    )  # fmt: skip
    made = training_arguments(settings, hardware, seed=seed, device=device, total_steps=STEPS, **arguments)
    console.log(f"learning rate: sought by at most {STEPS} steps, after each the loss on {len(watched)} examples")
    progress = console.Progress(STEPS, "finding the learning rate", keeps=False)
    with progress, undone(model, device), tempfile.TemporaryDirectory() as folder, console.quiet():
        transformers.set_seed(seed)
        ramp = Ramp(
            model, made, run=Path(folder), max_bad_steps=STEPS + 1, watched=watched, progress=progress,
            train_dataset=PackedDataset(others, trainer.max_length) if packing else others, eval_dataset=None,
            data_collator=Collator(pad, trainer.max_length if trainer.pad_to == "max_length" else 0),
            processing_class=None, **options,
        )  # fmt: skip
        before = ramp.held_out_loss(watched)
        with ramp.advising_memory():
            ramp.train()
        vars(model).pop("_is_accelerate_prepared", None)  # else the run's own settings, compile say, are passed over
    rate = choose(before, ramp.curve)
    if rate is None:
        raise RunError(
            f"trainer.learning_rate=auto: no rate from {LOWEST:g} to {HIGHEST:g} lowers the loss of {before:.4f} nats "
            "a token by steps such as the run's; look at the data (`sparseft data`), or give a rate."
        )
    return Found(rate, before, ramp.curve, len(watched), time.monotonic() - started)


def choose(before: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """The middle of the rates that gain nearly the most, in two digits: the geometric mean of the lowest and the
    highest whose gain over `before` is at least `ENOUGH` of the largest. None where none gains anything."""
    gains = [before - loss if math.isfinite(loss) else -math.inf for _, loss in curve]
    most = max(gains)
    if most <= 0:
        return None
    good = [rate for (rate, _), gain in zip(curve, gains, strict=True) if gain >= ENOUGH * most]
    return float(f"{math.sqrt(good[0] * good[-1]):.1e}")


@contextlib.contextmanager
def undone(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, what trains may change and numbers may be drawn; afterwards all is as it was. The copies of what trains
    lie in the host's memory."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    kept = {name: value.detach().to("cpu", copy=True) for name, value in trained.items()}
    training, modes = model.training, {name: module.training for name, module in model.named_modules()}
    python, numbers, host = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, value in trained.items():
                value.copy_(kept[name])
            write_back(sparse_layers(model).values())
        for name, module in model.named_modules():
            module.training = modes.get(name, training)
        random.setstate(python)
        np.random.set_state(numbers)
        torch.set_rng_state(host)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)

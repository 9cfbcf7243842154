"""What a training step does besides its passes: optimizer, clipping, the gradient's norm, logging, loop and hooks.

A short real run of our trainer on a contender's model, each step logged, whose forward and backward passes are taken
out of the time: what is left of a step is what is measured. On a CPU only: on CUDA the host queues both alike.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from sparseft import console
from sparseft.bench.contenders import Contender
from sparseft.config import HardwareConfig, TrainerConfig
from sparseft.data.packing import Collator
from sparseft.data.tokenized import TokenizedDataset
from sparseft.distributed import env
from sparseft.training.arguments import training_arguments
from sparseft.training.trainer import Trainer, train

STEPS, WARMUP = 6, 2  # the optimizer makes its state in the first


class _Timed(Trainer):
    """Leaves no checkpoint, and keeps the seconds of its passes."""

    passes = 0.0

    @contextmanager
    def _pass(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.passes += time.perf_counter() - start

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        with self._pass():
            return super().compute_loss(*args, **options)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        pass


class _Marks(transformers.TrainerCallback):
    """When each step began, and the seconds of passes until then."""

    def __init__(self, trainer: _Timed) -> None:
        self.trainer = trainer
        self.marks: list[tuple[float, float]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.marks.append((time.perf_counter(), self.trainer.passes))


@env.alone()
def measure(c: Contender, batch: Mapping[str, Tensor], accumulation: int) -> list[float]:
    """Seconds besides the passes of some steps, each with `accumulation` times the batch. The contender has the turn
    afterwards, and trained a little further."""
    c.take_turn()
    rows = [(ids, labels) for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)]
    steps = WARMUP + STEPS + 1  # a step ends where the next one begins
    settings = TrainerConfig(
        max_steps=steps, batch_size=len(rows), gradient_accumulation=accumulation, learning_rate=1e-4,
        warmup_steps=0, logging_steps=1,
    )  # fmt: skip
    device = batch["input_ids"].device
    arguments = training_arguments(settings, HardwareConfig(device="cpu"), seed=0, device=device, total_steps=steps)
    with tempfile.TemporaryDirectory() as folder, console.quiet(), torch.random.fork_rng(devices=[]):
        trainer = _Timed(
            c.model,
            arguments,
            run=Path(folder),
            train_dataset=TokenizedDataset.from_lists(rows * (accumulation * steps)),
            eval_dataset=None,
            data_collator=Collator(0),
            processing_class=None,
            labelled=c.labelled,
            recomputed=c.recomputed,
        )
        backward = trainer.accelerator.backward

        def timed(*args: Any, **options: Any) -> None:
            with trainer._pass():
                backward(*args, **options)

        trainer.accelerator.backward = timed
        marks = _Marks(trainer)
        trainer.add_callback(marks)
        train(trainer, None, steps)
    c.model.zero_grad(set_to_none=True)
    began = marks.marks[WARMUP:]
    return [
        (later - start) - (passes_later - passes)
        for (start, passes), (later, passes_later) in zip(began, began[1:], strict=False)
    ]

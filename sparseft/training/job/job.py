"""What a run is, as far as it is prepared, and what training leaves of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from sparseft.config import RunConfig
from sparseft.models.spec import ModelSpec
from sparseft.selection.selection import Selection
from sparseft.training import rate as rates
from sparseft.training import resume as resuming
from sparseft.training.best import Best, Evaluation
from sparseft.training.prepare import Prepared
from sparseft.training.reselection.swap import Reselection
from sparseft.training.run_state import Mark
from sparseft.training.sample_answers import Asked
from sparseft.training.trainer import Trainer


@dataclass
class Job:
    """A run as far as it is prepared: `set_up` makes it, `select` and `attach` add what they find."""

    config: RunConfig
    previous: resuming.Previous | None  # the run that is continued
    scorer: Any  # scoring.Scorer, where the run names a task
    prepared: Prepared
    total_steps: int  # optimizer steps of the whole run
    learning_rate: float
    contamination: dict[str, Any] | None  # training questions in the evaluation data and the test sets
    spec: ModelSpec
    dtype: torch.dtype  # of the base model
    asked: Asked | None = None  # what is answered on the way
    selection: Selection | None = None
    selection_cached: bool | None = None
    selection_seconds: float | None = None  # until it was there, cached or computed
    reselection: Reselection | None = None
    fingerprints: list[str] | None = None  # the base model's, where choosing took them
    method_config: dict[str, Any] | None = None  # with what the method left to the model
    trainable: int = 0
    labelled: bool = False  # logits of labelled tokens alone (`trainer.loss`)
    floors: float | None = None  # what a step is predicted to cost
    export_rank: int | None = None  # that an exact LoRA of what trains needs
    arguments: transformers.TrainingArguments | None = None
    found: rates.Found | None = None  # the learning rate, where that was not given

    @property
    def method(self) -> Any:
        """The method's settings."""
        return self.config.method

    @property
    def resumed_from(self) -> str | None:
        """The checkpoint's folder that training goes on from."""
        return self.previous.checkpoint if self.previous else None


@dataclass
class Trained:
    """What the loop leaves for `finish`."""

    trainer: Trainer
    best: Best
    before: Evaluation | None  # any training
    totals: Mark

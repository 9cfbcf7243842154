"""How a run stands: its time, its sums, its bad steps. The trainer and its callback share one of these."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseft import console
from sparseft.distributed import ranks
from sparseft.errors import Diverged, RunError
from sparseft.training.checkpoints import last_checkpoint, step_of
from sparseft.training.failures import BadSteps
from sparseft.training.spikes import NAMED, Spikes
from sparseft.training.verdicts import Verdicts


class Clock:
    """Seconds of training: stands still while the run evaluates and saves."""

    def __init__(self) -> None:
        self._before = 0.0  # seconds up to the last stop
        self._since: float | None = None  # None: stopped

    @property
    def seconds(self) -> float:
        return self._before + (time.monotonic() - self._since if self._since is not None else 0.0)

    def start(self, seconds: float = 0.0) -> None:
        """Runs on from `seconds`, which a resumed run spent before."""
        self._before, self._since = seconds, time.monotonic()

    def stop(self) -> None:
        self._before, self._since = self.seconds, None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        running = self._since is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start(self._before)


@dataclass
class Mark:
    """How far a run is: what a line of metrics is the difference of two of."""

    step: int = 0
    loss: float = 0.0  # sum of the steps' losses
    tokens: int = 0
    seconds: float = 0.0  # of training
    bad: int = 0  # steps whose loss or gradient was not finite: `loss` is the sum over the others


class Left(Exception):
    """An evaluation that an interrupt ended: nothing of it is recorded, and going on makes it up."""


class RunState:
    """What the trainer and its callback share of a run.

    folder: the run's. max_bad_steps: so many in a row end it.
    """

    def __init__(self, folder: Path, max_bad_steps: int, device: torch.device) -> None:
        self.folder = folder
        self.clock = Clock()
        self.bad_steps = BadSteps(max_bad_steps)
        self.verdicts = Verdicts(device)
        self.interrupted: str | None = None  # the signal's name
        self.averaged = False  # the model holds the mean of what trained, so no evaluation of it ends a training
        self.tokens = 0  # that this process has trained on in this session
        self._earlier_tokens = 0  # of all processes, in the sessions before
        # Sums of the micro-steps' losses, each already its share of its step's mean: over the good steps, and over the
        # present step.
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.step_loss = torch.zeros_like(self.loss_sum)
        self.spikes = Spikes()
        self.names_spikes = True
        self.owes_checkpoint = False  # one was due after a bad step
        self.step_learnt = 0  # of the present step: tokens to be learnt
        self.step_rows: list[int] = []  # and rows of the training data
        self._made_of: dict[int, list[int]] = {}  # the rows of the steps that were judged and not settled

    def judge(self, step: int, norm: Tensor | float | None) -> Tensor:
        """Decides over the optimizer step number `step` (1-based) whose gradients are there, without waiting for them:
        a float32 () on the device, 1 where the step is bad. A call of all processes; its sum of losses starts anew."""
        learnt = torch.full_like(self.step_loss, self.step_learnt)
        loss, learnt = ranks.mean_over_ranks(torch.stack([self.step_loss, learnt]))
        bad = self.verdicts.add(step, loss, norm, learnt)
        self.loss_sum += torch.where(bad > 0, 0.0, self.step_loss)
        self.step_loss.zero_()
        self._made_of[step] = self.step_rows
        self.step_learnt, self.step_rows = 0, []
        return bad

    def settle(self, until: int | None = None) -> None:
        """Counts the steps that were judged (up to `until`, where given); RunError where too many in a row are bad.

        Waits for the device where it has not come to the last of them yet.
        """
        for step, loss, norm, learnt in self.verdicts.settled(until):
            rows = self._made_of.pop(step)
            if self.bad_steps.judge(step, loss, norm):
                self._look_for_spike(step, loss, round(learnt * ranks.rank_and_world()[1]), rows)
                continue
            if self.bad_steps.streak == 1 and ranks.is_main():
                console.warn(
                    f"step {step}: loss {loss:.4g}, gradient norm {norm}: not finite, so the step updates nothing"
                )
            self._stop_if_too_many(step)

    def _look_for_spike(self, step: int, loss: float, learnt: int, rows: list[int]) -> None:
        """Names the first of the steps whose loss is far above those before, and counts them all."""
        spike = self.spikes.judge(step, loss, learnt, rows if ranks.rank_and_world()[1] == 1 else [])
        if spike is None or not (self.names_spikes and ranks.is_main()) or self.spikes.count > NAMED:
            return
        console.warn(f"{spike}" + ("; more of them are counted only" if self.spikes.count == NAMED else ""))

    def totals(self, step: int) -> Mark:
        """The totals of the whole run so far, earlier sessions of it included (a call of all processes)."""
        self.settle()
        sums = torch.stack([self.loss_sum, torch.full_like(self.loss_sum, self.tokens)])
        loss, tokens = ranks.mean_over_ranks(sums).tolist()
        everywhere = round(tokens * ranks.rank_and_world()[1])
        return Mark(step, loss, self._earlier_tokens + everywhere, self.clock.seconds, self.bad_steps.count)

    def leave(self) -> None:
        """`Left` where this process is interrupted."""
        if self.interrupted is not None:
            raise Left

    def leave_together(self) -> None:
        """`Left` where any process is interrupted (a call of all processes)."""
        if ranks.any_rank(self.interrupted is not None):
            raise Left

    def bad_step_counts(self) -> dict[str, int]:
        """What a checkpoint keeps of the bad steps, under the names that it has them by."""
        return {"bad": self.bad_steps.count, "streak": self.bad_steps.streak, "proven": self.bad_steps.proven}

    def restore(self, kept: dict[str, Any]) -> None:
        """Goes on from what a checkpoint kept (`checkpoints.read_state`); a fresh run's is zero."""
        self.loss_sum.fill_(kept["now"]["loss"])
        self.tokens, self._earlier_tokens = 0, kept["now"]["tokens"]
        self.clock.start(kept["now"]["seconds"])
        counts = kept["health"]
        self.bad_steps = BadSteps(self.bad_steps.limit, counts["bad"], counts["streak"], counts["proven"])
        self.spikes = Spikes(**kept.get("spikes", {}))  # older runs have none

    def failure(self, message: str, until: int | None = None, kind: type[RunError] = RunError) -> RunError:
        """A RunError of that kind that knows the last good checkpoint, of those up to the step `until` where given."""
        checkpoint, newest = last_checkpoint(self.folder, until), last_checkpoint(self.folder)
        if checkpoint is None:
            message += " There is no good checkpoint of before" + (
                f": no step with the weights of checkpoint-{step_of(newest)} had a finite loss, so start anew "
                "(overwrite=true)."
                if newest
                else ", as none was saved yet."
            )
        return kind(message, checkpoint)

    def _stop_if_too_many(self, step: int) -> None:
        bad = self.bad_steps
        if bad.streak < bad.limit:
            return
        first = step - bad.streak + 1
        steps = f"step {step}" if first == step else f"the steps {first} to {step}"
        advice = "try a lower trainer.learning_rate, and look at the data of these steps"
        if first == 1:  # no rate has had an effect yet
            advice = "look at the data, and whether the model itself gives a finite loss (model.dtype)"
        raise self.failure(
            f"the loss or its gradient was not finite in {steps} (trainer.max_bad_steps={bad.limit}), which updated "
            f"nothing: {advice}.",
            bad.proven,
            RunError if first == 1 else Diverged,
        )

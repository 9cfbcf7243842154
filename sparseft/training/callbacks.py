"""What a run notes while transformers' loop runs: metrics, progress, interrupts, and the totals of its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import transformers
from transformers.trainer_callback import ExportableState

from sparseft import console
from sparseft.distributed import ranks
from sparseft.errors import Diverged, RunError
from sparseft.memory import memory_bytes
from sparseft.runs.folder import METRICS
from sparseft.runs.metrics import append_metrics
from sparseft.training.checkpoints import OWN_STATE
from sparseft.training.run_state import Mark, RunState


def of_objective(logs: dict[str, Any]) -> dict[str, float]:
    """What a preference objective says of a step or an evaluation beside its loss: rewards and log-probabilities."""
    return {name: logs[name] for name in logs if name.removeprefix("eval_").startswith(("rewards/", "logps/"))}


class RunCallback(transformers.TrainerCallback, ExportableState):
    """Metrics, progress and interrupts of one run; checkpoints carry its totals, so that a resumed run goes on."""

    def __init__(self, run: RunState, report: Callable[[dict[str, Any]], None] | None = None) -> None:
        assert type(self).__name__ == OWN_STATE
        self.run = run
        self.report = report  # gets each line of metrics too
        self.progress: console.Progress | None = None
        self.writes = ranks.is_main()
        self.logged = Mark()  # at the last line of metrics
        self.saved = Mark()  # when the checkpoint was begun

    def now(self, state: transformers.TrainerState) -> Mark:
        """The totals of the whole run so far (a call of all processes), of which transformers keeps the tokens too."""
        mark = self.run.totals(state.global_step)
        state.num_input_tokens_seen = mark.tokens
        return mark

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps (`trainer_state.json`)."""
        own = {"now": asdict(self.saved), "logged": asdict(self.logged), "health": self.run.bad_step_counts()}
        own["spikes"] = self.run.spikes.kept()
        return {"args": {}, "attributes": own}

    def restore(self, state: transformers.TrainerState) -> None:
        """Takes up the totals of the checkpoint that `state` was loaded from; a fresh run's are zero."""
        kept = state.stateful_callbacks[OWN_STATE]["attributes"]
        self.run.restore(kept)
        self.logged = Mark(**kept["logged"])

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.restore(state)
        state.compute_steps(args, state.max_steps)  # a checkpoint's state has the intervals that it was saved with
        # transformers asks the embeddings' output for a gradient where activations are recomputed. Only reentrant
        # checkpoints need that; it would send the backward pass through every layer below the lowest trained one.
        if hasattr(model, "disable_input_require_grads"):
            model.disable_input_require_grads()
        if self.writes:
            self.progress = console.Progress(state.max_steps, "train", initial=state.global_step)
            self.progress.__enter__()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.close()

    def close(self) -> None:
        """Ends the progress display and the clock, also of a run that failed."""
        self.run.clock.stop()
        if self.progress is not None:
            self.progress.__exit__(None, None, None)
            self.progress = None

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last steps count too, where they fill no whole logging interval
        if self.progress is not None and not control.should_log:  # else on_log does, with the loss
            self.progress.update(state.global_step)
        self._stop_if_interrupted(control)
        # The device has come to this step's verdict only where someone waits for its numbers now; else the last one's.
        waits = control.should_log or control.should_evaluate or control.should_save or self.run.owes_checkpoint
        self.run.settle(None if waits else state.global_step - 1)
        if self.run.owes_checkpoint and not self.run.bad_steps.streak:
            control.should_save = True

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self._stop_if_interrupted(control)

    def _stop_if_interrupted(self, control: Any) -> None:
        if ranks.any_rank(self.run.interrupted is not None):
            self.run.interrupted = self.run.interrupted or "another process"
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        record: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6)}
        logs = logs or {}
        if "eval_loss" in logs:
            score = {name: logs[name] for name in ("eval_score", "eval_score_stderr") if name in logs}
            mean = {"averaged": True} if self.run.averaged else {}
            self._append(record | {"eval_loss": logs["eval_loss"]} | score | of_objective(logs) | mean)
            if not math.isfinite(logs["eval_loss"]):
                raise self.run.failure(
                    f"the evaluation loss is {logs['eval_loss']} at step {state.global_step}"
                    + (": try a lower trainer.learning_rate." if state.global_step else ", before any training."),
                    self.run.bad_steps.proven,
                    Diverged if state.global_step else RunError,
                )
            if self.progress is not None:
                shown = f", score {score['eval_score']:.4f}" if score else ""
                shown += f" ± {score['eval_score_stderr']:.4f}" if "eval_score_stderr" in score else ""
                for name in ("margins", "accuracies"):
                    shown += f", {name} {logs[key]:.4f}" if (key := f"eval_rewards/{name}") in logs else ""
                console.log(f"step {state.global_step}: eval loss {logs['eval_loss']:.4f}{shown}")
            return
        if "loss" not in logs:  # the Trainer's own summary at the end
            return
        now, last = self.now(state), self.logged
        steps, seconds = now.step - last.step, now.seconds - last.seconds
        bad = now.bad - last.bad
        self.logged = now
        record |= {
            "loss": (now.loss - last.loss) / (steps - bad) if bad < steps else None,
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_second": (now.tokens - last.tokens) / seconds if seconds > 0 else None,
            "step_seconds": seconds / steps,
            "memory_gib": memory_bytes(args.device, peak=False) / 2**30,
            **of_objective(logs),
            **({"bad_steps": bad} if bad else {}),
        }
        self._append(record)
        if self.progress is not None:
            shown = {key: record[key] for key in ("loss", "tokens_per_second") if record[key] is not None}
            self.progress.update(state.global_step, **shown)

    def _append(self, record: dict[str, Any]) -> None:
        if self.writes:
            append_metrics(self.run.folder / METRICS, record)
            if self.report is not None:
                self.report(record)

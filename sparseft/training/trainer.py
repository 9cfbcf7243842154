"""A thin subclass of `transformers.Trainer`: checkpoints that are whole or not there, metrics, progress, interrupts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.training_args import OptimizerNames

from sparseft import console, signals
from sparseft.adapters.state import state_of
from sparseft.distributed import ranks
from sparseft.distributed.shards import shard_of
from sparseft.errors import Diverged, Interrupted
from sparseft.evaluation.held_out import losses
from sparseft.files.atomic import explained, publish
from sparseft.layers import sparse_layers
from sparseft.layers.saved_inputs import share_inputs_in_training
from sparseft.models.labelled_loss import ROWS, label_rows, labelled_loss
from sparseft.models.labels import IGNORED
from sparseft.models.masks import unasked
from sparseft.models.probing import without_gradient
from sparseft.models.router_loss import router_loss
from sparseft.replaced import replaced
from sparseft.runs.folder import ADAPTER, CHECKPOINTS, checkpoint_name
from sparseft.training import distributed_trainer, schedules
from sparseft.training.arguments import tf32_as_set
from sparseft.training.average import Average
from sparseft.training.best import copy_best, read_best
from sparseft.training.callbacks import RunCallback
from sparseft.training.checkpoints import (
    check_moments,
    fitting,
    last_checkpoint,
    load_trained,
    prune,
    step_of,
    write_manifest,
)
from sparseft.training.compiling import GRAPHS, CompiledLayers, own_gradients
from sparseft.training.failures import MemoryAdvice, memory_problem
from sparseft.training.label_smoothing import smoothed_loss
from sparseft.training.optimizer import SparseAdamW
from sparseft.training.recomputing import describe, recomputing
from sparseft.training.reselection.swap import Reselection, save_active
from sparseft.training.run_state import Left, Mark, RunState
from sparseft.training.spikes import ROW, Numbered
from sparseft.training.verdicts import takes_flag

# In a batch, for the host alone: its tokens without padding, those to be learnt, and the rows of the data in it.
HOST = COUNT, LEARNT, PLACES = ("num_tokens", "num_learnt", "rows_of_data")

FEWER_QUESTIONS = "smaller eval.batch_size or eval.num_beams, where they are above 1, take less of a task at once"


class Counting:
    """A collator whose batches say how many tokens they hold, and which predict a label, as only the host knows without
    asking the device."""

    def __init__(self, collate: Callable[[Any], dict[str, Any]], rows: bool) -> None:
        self.collate, self.rows = collate, rows

    def __call__(self, examples: Any) -> dict[str, Any]:
        batch = self.collate(examples)
        if self.rows:
            batch[ROWS] = label_rows(batch["labels"])
        return {
            **batch,
            COUNT: sum(len(example["input_ids"]) for example in examples if ROW in example),  # what fills up has no row
            LEARNT: int(np.count_nonzero(batch["labels"].numpy()[:, 1:] != IGNORED)),
            PLACES: [example[ROW] for example in examples if ROW in example],
        }


@contextlib.contextmanager
def seen_as_adapted(model: nn.Module) -> Iterator[None]:
    """Inside, transformers takes a quantized model for one with an adapter, as it is: it refuses others, and asks by a
    flag of peft's."""
    if not getattr(model, "is_quantized", False) or state_of(model) is None:
        yield
        return
    model._hf_peft_config_loaded = True  # type: ignore[assignment]
    try:
        yield
    finally:
        del model._hf_peft_config_loaded


class Trainer(distributed_trainer.DistributedTrainer):
    """Trains what is trainable of an attached model, and saves only that.

    `run` is the run folder: metrics go to its `metrics.jsonl`, checkpoints to `checkpoints/checkpoint-N/`, of which
    the newest `save_total_limit` are kept (None: all). `report(record)` gets each line of metrics too. `score(leave)`
    is the model's accuracy on a task and its standard error (or None); evaluations then carry both beside the loss. It
    calls `leave()` now and then, which raises where it is to end early. With
    `compile_layers` steps run each decoder layer compiled. A step whose loss or gradient is not finite updates nothing;
    `max_bad_steps` of them in a row end the run. `labelled`: the loss is computed as `labelled_loss.py` does it.
    `smoothing`: of the labels in training. `recomputed`: the kinds of tensors that are computed again in the backward
    pass (`recomputing.py`).
    """

    def __init__(
        self,
        model: nn.Module,
        args: transformers.TrainingArguments,
        *,
        run: Path,
        save_total_limit: int | None = None,
        max_bad_steps: int = 10,
        score: Callable[[Callable[[], None]], tuple[float, float | None]] | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
        compile_layers: bool = False,
        labelled: bool = False,
        smoothing: float = 0.0,
        recomputed: Collection[str] = (),
        **options: Any,
    ) -> None:
        args.output_dir = str(run / CHECKPOINTS)
        self.feed(options, labelled)
        with tf32_as_set(), seen_as_adapted(model):
            super().__init__(model=model, args=args, **options)
        self.run_state = RunState(run, max_bad_steps, args.device)
        self.save_total_limit = save_total_limit
        self.score = score
        self.labelled, self.smoothing = labelled, smoothing
        self.recomputed = recomputed
        self._said = False  # what is computed again
        if recomputed:
            share_inputs_in_training(self.model)
        lengths = getattr(self.train_dataset, "lengths", None)
        longest = 1 if lengths is None or len(lengths) == 0 else int(lengths.max())
        self.memory = MemoryAdvice(
            args.per_device_train_batch_size, args.gradient_accumulation_steps, longest,
            bool(getattr(args, "activation_checkpointing", getattr(args, "gradient_checkpointing", False))),
        )  # fmt: skip
        self.compiled = CompiledLayers(self.model) if compile_layers else None
        self.graphs = args.torch_compile_mode == GRAPHS
        self.made_up: float | None = None  # the loss at the checkpoint gone on from, where an interrupt left it out
        self.looked = False  # whether the first good step's gradients were looked at
        self._aside: str | None = None
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.run_callback = RunCallback(self.run_state, report)
        self.add_callback(self.run_callback)

    def feed(self, options: dict[str, Any], labelled: bool) -> None:
        """Has batches say what they hold, of the arguments that `super().__init__` is going to get."""
        options["data_collator"] = Counting(options["data_collator"], rows=labelled)
        options["train_dataset"] = Numbered(options["train_dataset"])

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the model is given: the batch without what is for the host alone."""
        return super()._prepare_inputs({name: value for name, value in inputs.items() if name not in HOST})

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Counted where the batch was made. transformers would ask the device after each backward pass."""
        self.run_state.tokens += inputs[COUNT]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-step: forward and backward; returns its share of the step's mean loss over labelled tokens."""
        batch = args[1] if len(args) > 1 else kwargs["inputs"]
        self.memory.micro_step(sum(ids.numel() for name, ids in batch.items() if name.endswith("input_ids")))
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with self.compiled.running() if self.compiled is not None else contextlib.nullcontext():
            loss = super().training_step(*args, **kwargs)
        if self.graphs and not self.accelerator.sync_gradients:
            own_gradients(self.model)
        self.run_state.step_loss += loss.double()
        self.run_state.step_learnt += batch.get(LEARNT, 0)
        self.run_state.step_rows += batch.get(PLACES, [])
        return torch.nan_to_num(loss, 0.0, 0.0, 0.0)  # transformers sums the losses too: one NaN would spoil its sum

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        """As transformers computes it, whose masks are made by what the batch says of itself."""
        share = self.share_of_step(options.get("num_items_in_batch"))
        with unasked(inputs), self.own_loss(), self.keeping_less(), router_loss(self.model, share):
            return super().compute_loss(model, inputs, return_outputs, **options)

    def share_of_step(self, items: Any) -> float:
        """What a micro-step is of its step, over all processes, where transformers divides its loss by the step's
        labels (`items`); 1 where that is not done, or it is no training."""
        if items is None or not (self.model.training and self.model_accepts_loss_kwargs):
            return 1.0
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return 1.0 / (self.current_gradient_accumulation_steps * processes)

    @contextlib.contextmanager
    def keeping_less(self) -> Iterator[None]:
        """Inside, a forward pass keeps for its backward pass what the run does not compute again."""
        if not self.recomputed:
            yield
            return
        with recomputing(self.accelerator.unwrap_model(self.model), self.recomputed) as hooks:
            yield
        if not self._said and ranks.is_main():
            self._said = True
            found = describe(hooks.taken)
            if found is None:
                console.warn("trainer.checkpointing: nothing of this model is known to be cheap to compute again")
            else:
                console.log(f"checkpointing: of the first micro-step {found} are computed again, not kept")

    def own_loss(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model computes its loss in the run's way."""
        if self.labelled:
            return labelled_loss(self.model, smoothing=self.smoothing)
        return smoothed_loss(self.model, self.smoothing) if self.smoothing else contextlib.nullcontext()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm. transformers asks for it between the backward passes of a step and its update, so here a
        step that is not finite is kept from updating anything: by a flag that the optimizer reads on the device, or,
        with one that reads none, without gradients, which the host has to wait for."""
        norm = super()._get_grad_norm(model, grad_norm)
        run = self.run_state
        bad = run.judge(self.state.global_step + 1, norm)
        optimizer = self._own_optimizer
        flagged = takes_flag(optimizer)
        if flagged:
            optimizer.found_inf = bad
        if not flagged or not self.looked:
            run.settle()
            if run.bad_steps.streak:
                model.zero_grad()
            elif not self.looked:
                self.looked = True
                self.name_untrained()
        self.memory.step_done()
        return norm

    def name_untrained(self) -> None:
        """Warns of what is to train and got no gradient in this session's first step; once, as it waits for the device.

        Not with DeepSpeed, which keeps gradients in places of its own, and where they are in pieces.
        """
        if self.is_deepspeed_enabled or (self.in_shards and state_of(self.model).kind.trains_all):
            return
        names = without_gradient(self.model)
        if names and ranks.is_main():
            shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            console.warn(
                f"step {self.state.global_step + 1} gave no gradient to {len(names)} of what trains, which stays as it "
                f"is without one: {shown}"
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """transformers' own, with its parameter groups; in AdamW's place SparseAdamW where a sparse method trains, and
        the fused one elsewhere."""
        plain = self.args.optim in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
        if plain and not self.is_deepspeed_enabled and self.optimizer_cls_and_kwargs is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            options.pop("fused", None)
            if sparse_layers(self.model):
                kind = SparseAdamW
            elif self.args.device.type in ("cpu", "cuda"):  # one launch instead of many, and it takes `found_inf`
                options["fused"] = True
            self.optimizer_cls_and_kwargs = (kind, options)
        return super().create_optimizer(model)

    @contextlib.contextmanager
    def advising_memory(self, advice: str | None = None) -> Iterator[None]:
        """Inside, memory that runs out becomes a RunError with the settings that would fit: `advice`, or a step's."""
        try:
            yield
        except Exception as error:
            problem = memory_problem(error, self.memory.advice() if advice is None else advice)
            if problem is None:
                raise
            raise self.run_state.failure(problem) from error

    # ---- checkpoints: written aside, then renamed ----

    def _get_output_dir(self, trial: Any) -> str:
        return self._aside or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # A checkpoint must be worth going back to. Bad steps change nothing, so saving waits for the next good one,
        # except at the end of training.
        self.run_state.settle()
        if self.run_state.bad_steps.streak and not self.control.should_training_stop:
            self.run_state.owes_checkpoint = True
            return
        mine = (shard_of(p) for p in self.model.parameters() if p.requires_grad)
        if ranks.any_rank(not all(p.isfinite().all() for p in mine)):
            raise self.run_state.failure(
                f"the trained weights are not finite after step {self.state.global_step}, so they are not saved: "
                "try a lower trainer.learning_rate.",
                self.run_state.bad_steps.proven,
                Diverged,
            )
        what = checkpoint_name(self.state.global_step)
        explaining = explained(what, lambda: last_checkpoint(self.run_state.folder))
        # metrics.jsonl has the log; in trainer_state.json it would grow with the steps, until nobody can read the file.
        # The best is `Best`'s; transformers would note a path in the folder aside.
        unlogged = replaced((self.state, "log_history", []), (self.state, "best_global_step", None))
        with self.run_state.clock.paused(), explaining, console.working(f"saving {what}"), unlogged:
            self._save_aside(model, trial)
        self.run_state.owes_checkpoint = False

    def _save_aside(self, model: nn.Module, trial: Any) -> None:
        folder = Path(super()._get_output_dir(trial))
        name = checkpoint_name(self.state.global_step)
        self.run_callback.saved = self.run_callback.now(self.state)  # a call of all processes
        try:
            with ranks.shared_aside(folder / name) as aside:
                self._aside = str(aside)
                super()._save_checkpoint(model, trial)
                ranks.barrier()  # each process has left its random state
                if ranks.is_main():
                    for callback in self.callback_handler.callbacks:
                        if isinstance(callback, (Average, Reselection)):
                            callback.save(aside / name)
                    copy_best(folder, aside / name)
                    write_manifest(aside / name)
                    publish(aside / name, folder / name)
        finally:
            self._aside = None
        if ranks.is_main():
            prune(folder, self.save_total_limit, self.state.global_step)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or self.args.output_dir)
        self.save_trained(folder / ADAPTER)
        if ranks.is_main():
            save_active(self.accelerator.unwrap_model(self.model), folder)

    def take_best(self, checkpoint: Path) -> None:
        """The best adapter that the checkpoint knows is the run's again, but where the run's is of the checkpoint's own
        step: its evaluation was made up after the checkpoint."""
        folder = self.run_state.folder / CHECKPOINTS
        if ranks.is_main() and ((own := read_best(folder)) is None or own.step != step_of(str(checkpoint))):
            copy_best(checkpoint, folder)
        ranks.barrier()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.take_best(Path(resume_from_checkpoint))
        with fitting(resume_from_checkpoint, "what was trained"):
            load_trained(self.model if model is None else model, Path(resume_from_checkpoint) / ADAPTER)

    def make_up(self, checkpoint: str) -> None:
        """Evaluates what a checkpoint holds, as the step did not that an interrupt ended: it may be the best, be what
        ends the training, or set the next rate."""
        self._load_from_checkpoint(checkpoint)
        self.state = transformers.TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        self.made_up = self.evaluate()["eval_loss"]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        rates = list(getattr(self.lr_scheduler, "base_lrs", []))
        with fitting(checkpoint, "the optimizer's state"):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                schedules.go_on(self.lr_scheduler, rates, step_of(checkpoint))
                if self.made_up is not None and self.args.lr_scheduler_type in schedules.MEASURED:
                    self.lr_scheduler.step(self.made_up)
                if not self.is_deepspeed_enabled:
                    check_moments(self._own_optimizer)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint and distributed_trainer.draw_anew(Path(checkpoint), self.args.seed, self.state.global_step):
            return
        with fitting(checkpoint, "the random numbers' state"):
            super()._load_rng_state(checkpoint)

    # ---- evaluation: the mean over all labelled tokens, whatever the batch size ----

    def _evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """An evaluation between steps. One that was `Left` for an interrupt is followed by the checkpoint."""
        try:
            return super()._evaluate(*args, **options)
        except Left:
            self.run_callback.on_evaluate(self.args, self.state, self.control)
            return {"eval_loss": math.nan}  # the best to nobody; with some schedulers transformers asks for it

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """What is `measured` on the evaluation set, `{"eval_loss": …}`; with `eval_score`, and `eval_score_stderr`,
        where there is one."""
        # A loader draws a seed whenever it is iterated over; the dropout of training must not depend on that.
        cuda = [self.args.device] if self.args.device.type == "cuda" else []
        with self.run_state.clock.paused(), torch.random.fork_rng(devices=cuda):
            with self.advising_memory():
                metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.measured(eval_dataset).items()}
            if self.score is not None:
                # In shards all processes answer the same questions in step, with ZeRO-3 also while the model is whole
                # yet: transformers' generate() waits for the others.
                measured = None
                with self.advising_memory(FEWER_QUESTIONS):
                    if self.in_shards:
                        measured = self.score(lambda: None)
                    elif ranks.is_main():
                        with contextlib.suppress(Left):
                            measured = self.score(self.run_state.leave)
                if (measured := ranks.broadcast_object(measured)) is None:
                    raise Left
                score, stderr = measured
                metrics[f"{metric_key_prefix}_score"] = score
                if stderr is not None:
                    metrics[f"{metric_key_prefix}_score_stderr"] = stderr
        self.log(dict(metrics))
        # As in transformers' own: this resets `should_evaluate`, else the end of an epoch evaluates once more.
        with self.run_state.clock.paused():  # the best adapter is saved there
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measured(self, eval_dataset: Any = None) -> dict[str, float]:
        """`{"loss": …}`: the `held_out_loss`."""
        return {"loss": self.held_out_loss(eval_dataset)}

    def held_out_loss(self, eval_dataset: Any) -> float:
        """Nats a token, the mean over all labelled tokens of `eval_dataset` (None: of the evaluation set), without what
        routers add to a loss."""
        loader = self.get_eval_dataloader(eval_dataset)
        display = console.Progress(len(loader.dataset), "evaluate", unit="example", keeps=False)

        def batches() -> Iterator[dict[str, Tensor]]:
            done = 0
            for batch in loader:
                yield self._prepare_inputs(batch)
                done += len(batch["labels"])
                display.update(done)
                self.run_state.leave_together()

        training = self.model.training
        self.model.eval()
        with display, self.compute_loss_context_manager(), self.own_loss():
            found = losses(self.model, batches())
        self.model.train(training)
        sums = sum(loss * count for loss, count in found), sum(count for _, count in found)
        total = torch.tensor(sums, dtype=torch.float64, device=self.args.device)
        total = self.accelerator.reduce(total)
        return (total[0] / total[1]).item()


def train(trainer: Trainer, resume_from: str | None, total_steps: int) -> Mark:
    """Runs the loop, or what is left of it, and returns the run's totals.

    Interrupted: saved first, then `Interrupted`, which knows the checkpoint.
    """
    run, callback = trainer.run_state, trainer.run_callback

    def finish_step(name: str) -> None:
        run.interrupted = name
        console.log(f"{name}: finishing the step and saving; once more stops at once")

    if resume_from and step_of(resume_from) >= total_steps:  # the loop would take one step more
        trainer._load_from_checkpoint(resume_from)
        trainer.state = transformers.TrainerState.load_from_json(str(Path(resume_from) / "trainer_state.json"))
        callback.restore(trainer.state)
        run.clock.stop()
        return callback.now(trainer.state)
    try:
        with signals.noted(finish_step), trainer.advising_memory():
            trainer.train(resume_from_checkpoint=resume_from)
    finally:
        callback.close()
        if trainer.recomputed:
            share_inputs_in_training(trainer.model)  # for passes that keep what they need
    if run.interrupted:
        console.log(f"the same command with output_dir={run.folder} trainer.resume=auto goes on from there")
        raise Interrupted(run.interrupted, last_checkpoint(run.folder))
    if run.bad_steps.streak and ranks.is_main():
        console.warn(f"training ends with {run.bad_steps.streak} steps whose loss or gradient was not finite")
    return callback.now(trainer.state)

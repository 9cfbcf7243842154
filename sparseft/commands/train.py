"""`sparseft train`: fine-tunes and leaves a run folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.commands import plan as planning
from sparseft.commands import report
from sparseft.config import BUNDLED, RunConfig
from sparseft.distributed import launch
from sparseft.distributed.ranks import broadcast_object, is_main
from sparseft.errors import LayoutWarning, UserError
from sparseft.files.atomic import write_json, write_text
from sparseft.runs.environment import environment
from sparseft.runs.folder import (
    ADAPTER,
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    SELECTION,
    SUMMARY,
    check_run_folder,
    link_latest,
    prepare_run_folder,
)
from sparseft.runs.metrics import truncate_metrics
from sparseft.training import checks, schedules
from sparseft.training import resume as resuming
from sparseft.training.scoring import Scorer, contamination


def run(config: RunConfig, *, plan: bool = False) -> dict[str, Any]:
    """Fine-tunes as configured and returns `summary.json` with the run's folder; or plans that (`commands/plan.py`).

    The cheap checks come first, and the folder comes into being only once all is checked, loaded and converted, so
    that a wrong setting leaves nothing behind.
    """
    if plan:
        return planning.run(config)
    console.clear_warnings()
    checks.check_hardware(config)
    if is_main():  # the others may find what it has made already
        check_run_folder(config.output_dir, overwrite=config.overwrite, resume=config.trainer.resume is not None)
    checks.check_trainer(config)
    checks.check_data(config)
    checks.check_model(config)
    if launch.needed(config.hardware):
        resuming.previous_run(config)  # so that it refuses other settings before any process starts
        return launch.run("train", config)
    with launch.joined(config.hardware):
        return _train(config)


def _train(config: RunConfig) -> dict[str, Any]:
    """The run, of which each process does its part and the first one writes the folder."""
    from sparseft.distributed.deepspeed import forget_zero
    from sparseft.files.atomic import explained
    from sparseft.training.checkpoints import last_checkpoint

    forget_zero()  # of an earlier run
    first = is_main()
    previous = broadcast_object(resuming.previous_run(config) if first else None)
    job = Job(config, previous)
    folder = Path()
    if first:
        folder = prepare_run_folder(
            config.output_dir,
            config.method_name,
            config.dataset.name,
            overwrite=config.overwrite,
            resume=config.trainer.resume is not None,
        )
        config.output_dir = str(folder)
        link_latest(folder)
        with explained(f"the run in '{folder}'", lambda: last_checkpoint(folder)):
            job.describe_itself(folder)
        console.log(f"run: {folder}")
        if previous is not None:
            resuming.clean(previous, config.trainer.save_total_limit)
            truncate_metrics(folder / METRICS, previous.step)
            console.log(f"resume: {previous.describe(job.total_steps)}")
    folder = broadcast_object(folder)
    with explained(f"the run in '{folder}'", lambda: last_checkpoint(folder)):
        summary = job.train(folder)
        if first:
            write_json(folder / SUMMARY, summary)
            report.run([str(folder)])
    return summary | {"run": str(folder)}


class Job:
    """One training run. Made: loaded, checked and converted, nothing written. Then `train`: measure, train, save."""

    def __init__(self, config: RunConfig, previous: resuming.Previous | None) -> None:
        import transformers

        from sparseft.adapters.lifecycle import attach, trainable_count
        from sparseft.adapters.state import state_of
        from sparseft.data.packing import check_packing
        from sparseft.distributed.ranks import rank_and_world
        from sparseft.memory import reset_peak_memory
        from sparseft.models.decoder import runnable
        from sparseft.models.spec import ModelSpec
        from sparseft.selection.describe import describe_selection, describe_trainable
        from sparseft.training.arguments import training_arguments
        from sparseft.training.distributed_trainer import has_experts
        from sparseft.training.prepare import prepare

        self.config, self.previous = config, previous
        self.world_size = rank_and_world()[1]
        self.method = config.method
        transformers.set_seed(config.seed)
        self.scorer = Scorer(config) if config.trainer.eval_task else None  # a wrong task is said before data is read
        self.prepared = prepared = prepare(config)
        reset_peak_memory(prepared.device)
        if previous is not None:
            previous.check_data(prepared.data.fingerprint)
        if config.trainer.eval_steps and prepared.data.eval is None:
            raise UserError(
                f"trainer.eval_steps={config.trainer.eval_steps}: there are no evaluation examples; give "
                "dataset.eval_path=FILE or a dataset.eval_fraction above 0."
            )
        self._check_context()
        self.learning_rate = checks.learning_rate(config)
        self.total_steps = self._count_steps()
        if config.trainer.max_steps < 1:  # else it has been looked at before anything was loaded
            schedules.check(config.trainer, self.learning_rate, self.total_steps)
        if previous is not None:
            previous.check_steps(config.trainer, self.total_steps)
        if prepared.data.packed is not None:
            with runnable(prepared.model):
                check_packing(prepared.model, config.trainer.batch_size)
            settings = config.trainer
            console.log(f"data: {prepared.data.packed.note(settings.batch_size, settings.gradient_accumulation)}")
        self.overlap = contamination(config, prepared.data, self.scorer)
        self.spec = ModelSpec.of(prepared.model)
        self.dtype = next(prepared.model.parameters()).dtype
        frozen = self.method.frozen_experts(self.spec)
        if frozen:
            console.warn(
                f"{len(frozen)} expert matrices (3-D parameters such as {frozen[0]}) stay frozen: method "
                f"{config.method_name} does not train them"
            )
        self.selection_cached: bool | None = None
        self.selection = self._selection() if self.method.sparse else None
        with console.showing(LayoutWarning):
            self.model = attach(prepared.model, config.method, self.selection, spec=self.spec)
        self.method_config = state_of(self.model).method_config  # with what it left to the model
        if config.model.path.startswith(BUNDLED):
            state_of(self.model).base_model = config.model.path
        self.trainable = trainable_count(self.model)
        if self.selection is not None:
            describe_selection(self.selection, self.spec, config.method)
        elif (unit := config.method.granularity(None)) is not None:
            describe_trainable(self.trainable, self.spec, config.method, unit)
        else:
            console.log(f"trainable: all {self.trainable:,} parameters of the model")

        self.arguments = training_arguments(
            config.trainer,
            config.hardware,
            seed=config.seed,
            device=prepared.device,
            learning_rate=self.learning_rate,
            total_steps=self.total_steps,
            unused=has_experts(self.model) or (self.method.trains_all and bool(self.spec.frozen)),
            autocast=prepared.device.type == "cuda" and self.dtype.itemsize == 2 and self.method.trains_all,
        )

    @property
    def rows(self) -> Any:
        """What the Trainer draws batches from: training examples, packed where that is asked for."""
        data = self.prepared.data
        return data.train if data.packed is None else data.packed

    def _check_context(self) -> None:
        """Refuses examples longer than the model's context: learned positions end there, others never saw more."""
        from sparseft.models.decoder import context_length

        context = context_length(self.prepared.model.config)
        data = self.prepared.data
        longest = max(int(part.lengths.max()) for part in (data.train, data.eval) if part is not None)
        if context and longest > context:
            raise UserError(
                f"trainer.max_length={self.config.trainer.max_length}: the longest example has {longest} tokens, but "
                f"the model's context is {context} tokens; use trainer.max_length={context} or less."
            )

    def _selection(self) -> Any:
        """What trains: of a run that is continued its own selection, else the cached or computed one."""
        from sparseft.selection.selection import Selection
        from sparseft.training.prepare import select

        if self.previous is not None and self.previous.checkpoint is not None:
            own = self.previous.folder / SELECTION
            console.log(f"selection: the run's own, {own}")
            self.selection_cached = True
            return Selection.load(own)
        selected = select(self.config, self.prepared, self.spec)
        self.selection_cached = selected.cached
        return selected.selection

    def _count_steps(self) -> int:
        """Optimizer steps of the whole run, as the Trainer counts them."""
        config = self.config.trainer
        if config.max_steps > 0:
            return config.max_steps
        sequences = config.batch_size * config.gradient_accumulation * self.world_size
        return math.ceil(config.num_epochs * max(1, math.ceil(len(self.rows) / sequences)))

    def describe_itself(self, folder: Path) -> None:
        """Writes what the run is into its folder: `config.yaml`, `environment.json`, `selection/`."""
        from sparseft.compose.run_config import to_yaml

        write_text(folder / CONFIG, to_yaml(self.config))
        data = self.prepared.data
        facts = {
            "train": data.train_source,
            "eval": data.eval_source or None,
            "format": data.format,
            "examples": len(data.train),
            "rows": len(self.rows),
            "tokens": data.train.num_tokens,
            "fingerprint": data.fingerprint,
        }
        dtype = str(self.dtype).removeprefix("torch.")
        write_json(
            folder / ENVIRONMENT,
            environment(str(self.prepared.device), dtype, self.world_size) | {"data": facts},
        )
        if self.selection is not None and not (self.previous and self.previous.checkpoint):
            self.selection.save(folder / SELECTION)
        data.questions.save(folder)

    def train(self, folder: Path) -> dict[str, Any]:
        """Trains in the run's folder and returns its summary."""
        import transformers

        from sparseft.data.collating import Collator
        from sparseft.memory import memory_bytes
        from sparseft.training.trainer import Trainer, train

        config, prepared = self.config, self.prepared
        score = self.scorer.on_validation(self.model, prepared.tokenizer) if self.scorer else None
        trainer = Trainer(
            self.model,
            self.arguments,
            run=folder,
            save_total_limit=config.trainer.save_total_limit,
            max_bad_steps=config.trainer.max_bad_steps,
            score=score,
            train_dataset=self.rows,
            eval_dataset=prepared.data.eval,
            data_collator=Collator(prepared.pad),
            processing_class=None,
        )
        if config.method.reselect_steps:
            trainer.add_callback(self._reselection(trainer.clock))
        best = self._best(trainer)
        trainer.add_callback(best)
        before = self._evaluation(trainer, folder, 0)
        self._say("before", before, f" ({prepared.data.eval_source})")
        transformers.set_seed(config.seed)  # whatever was drawn before, as by an evaluation, training starts the same
        done = train(trainer, self.previous.checkpoint if self.previous else None, self._last_step(folder))
        after = self._evaluation(trainer, folder, done.step)
        kept = best.take(self.model)
        if kept is not None:
            console.log(f"best: the evaluation at step {kept.step}, whose adapter is kept")
            after = kept
        self._say("after", after)
        trainer.save_trained(folder / ADAPTER)
        if self.method.trains_all and is_main():
            prepared.tokenizer.save_pretrained(folder / ADAPTER)
        test_score = None
        if self.scorer is not None and (is_main() or config.hardware.zero_stage == 3):
            test_score = self.scorer.on_test(self.model, prepared.tokenizer, folder, f"the run {folder}")
            console.log(f"{self.scorer.name}: {test_score:.4f} on the test split")
        scope = self.spec.weights_in(getattr(config.method, "scope", None))
        return {
            "method": config.method_name,
            "model": config.model.path,
            "dataset": config.dataset.train_path or config.dataset.name,
            "sparsity": None if self.method.trains_all else 1 - self.trainable / scope,
            "scope": config.method.scope,
            "trainable_parameters": self.trainable,
            "scope_parameters": scope,
            "total_parameters": self.spec.total_parameters,
            "steps": done.step,
            "tokens": done.tokens,
            "train_seconds": done.seconds,
            "tokens_per_second": done.tokens / done.seconds if done.seconds > 0 else None,
            "peak_memory_bytes": memory_bytes(prepared.device, peak=True),
            "train_loss": done.loss / (done.step - done.bad) if done.bad < done.step else None,
            "eval_loss_before": before.eval_loss if before else None,
            "eval_loss_after": after.eval_loss if after else None,
            "seed": config.seed,
            "learning_rate": self.learning_rate,
            "selection_cached": self.selection_cached,
            "method_config": self.method_config,
            "contamination": self.overlap,
            "warnings": console.recorded_warnings(),
            **({"best_step": kept.step} if kept else {}),
            **({"bad_steps": done.bad} if done.bad else {}),
            **(self._scores(before, after, test_score) if self.scorer else {}),
        }

    def _scores(self, before: Any, after: Any, test_score: float | None) -> dict[str, Any]:
        assert self.scorer is not None
        return {
            "eval_task": self.scorer.name,
            "eval_score_before": before.eval_score,
            "eval_score_after": after.eval_score,
            "test_score": test_score,
        }

    def _best(self, trainer: Any) -> Any:
        """What keeps the best evaluation's adapter and ends the training at the target."""
        from sparseft.training.best import Best

        config = self.config.trainer
        return Best(
            trainer.run / CHECKPOINTS,
            (lambda folder: trainer.save_model(str(folder))) if config.keep_best else None,
            from_step=math.ceil(config.best_after * self.total_steps),
            target_score=config.target_score,
        )

    def _last_step(self, folder: Path) -> int:
        """Where training ends: also where a run that is continued has reached its target before."""
        from sparseft.training.best import reached

        step = self.previous.step if self.previous else -1
        seen = first_recorded(folder, step) if step > 0 else None
        if seen is not None and reached(self.config.trainer.target_score, seen.eval_score):
            return step
        return self.total_steps

    def _reselection(self, clock: Any) -> Any:
        """What chooses anew every `method.reselect_steps` steps: by the same importance, on other samples each time."""
        from sparseft.data.sampling import calibration_batches
        from sparseft.selection.compute import reselect
        from sparseft.training.reselection import Reselection

        method = self.config.method

        def choose(step: int) -> Any:
            seed = method.seed + step
            batches = None
            if method.needs_data:
                prepared = self.prepared
                batches = calibration_batches(prepared.data.train, method.num_samples, seed, prepared.pad)
            return reselect(self.model, method, batches, seed=seed, spec=self.spec)

        return Reselection(method.reselect_steps, choose, clock, self.previous.ended_at if self.previous else None)

    def _evaluation(self, trainer: Any, folder: Path, step: int) -> Any:
        """The evaluation at the present step: as recorded where it was measured there, else measured now."""
        if self.prepared.data.eval is None:
            return None
        seen = first_recorded(folder, step)
        if seen is None:
            trainer.evaluate()
            seen = first_recorded(folder, step)
        return seen

    def _say(self, when: str, seen: Any, where: str = "") -> None:
        if seen is not None:
            console.log(f"eval loss {when}: {seen.eval_loss:.4f}{where}")
            if self.scorer is not None:
                console.log(f"{self.scorer.name} {when}: {seen.eval_score:.4f} on the validation split")


def first_recorded(folder: Path, step: int) -> Any:
    """`recorded`, as the process finds it that writes the file."""
    from sparseft.training.best import recorded

    return broadcast_object(recorded(folder, step) if is_main() else None)


def render(result: dict[str, Any]) -> None:
    """What came of it, on stdout, once."""
    if "plan" in result:
        return planning.render(result)
    if not is_main():
        return
    change = ""
    if result["eval_loss_before"] is not None:
        change = f"eval loss {result['eval_loss_before']:.4f} -> {result['eval_loss_after']:.4f}, "
    share = result["trainable_parameters"] / result["total_parameters"]
    print(
        f"{result['method']}: {change}{result['trainable_parameters']:,} trainable parameters ({share:.2%} of the "
        f"model), {result['steps']} steps in {result['train_seconds']:.1f} s"
    )
    print(f"run: {result['run']}")

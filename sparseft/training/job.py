"""One training run, in five steps over one `Job`: set up, select, attach, train, finish.

Nothing is written before all is checked, loaded and attached, so that a wrong setting leaves nothing behind. Of several
processes each does its part, and the first one writes the run's folder.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from sparseft import console
from sparseft.adapters.lifecycle import attach as attach_method
from sparseft.adapters.lifecycle import trainable_count
from sparseft.adapters.state import state_of
from sparseft.compose.run_config import to_yaml
from sparseft.config import AUTO, BUNDLED, RunConfig
from sparseft.data.packing import Collator, check_packing
from sparseft.distributed import ranks
from sparseft.distributed.deepspeed import forget_zero
from sparseft.errors import LayoutWarning, UserError
from sparseft.files.atomic import explained, remove, write_json, write_text
from sparseft.memory import memory_bytes, reset_peak_memory
from sparseft.models.decoder import context_length, runnable
from sparseft.models.gguf import is_gguf
from sparseft.models.loading import vocabulary_rows
from sparseft.models.spec import ModelSpec
from sparseft.runs.environment import environment
from sparseft.runs.folder import (
    ADAPTER,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    RATE,
    SAMPLES,
    SELECTION,
    SUMMARY,
    UNTRIMMED,
    link_latest,
    prepare_run_folder,
)
from sparseft.runs.metrics import truncate_metrics
from sparseft.selection.compute import Request
from sparseft.selection.engine_ranks import describe_export
from sparseft.selection.picture import draw_shares, trained_shares
from sparseft.selection.selection import Selection, describe_selection, describe_trainable
from sparseft.training import checks, schedules
from sparseft.training import rate as rates
from sparseft.training import resume as resuming
from sparseft.training.arguments import training_arguments
from sparseft.training.average import Average
from sparseft.training.best import Best, Evaluation, evaluations, reached, recorded, without_a_better
from sparseft.training.checkpoints import CHECKPOINTS, last_checkpoint
from sparseft.training.distributed_trainer import check_shards, has_experts
from sparseft.training.labelled_loss import usable
from sparseft.training.predicted import in_words, labelled_share, predicted_floors
from sparseft.training.preference.objectives import OBJECTIVES
from sparseft.training.preference.outcome import outcome
from sparseft.training.prepare import Prepared, prepare
from sparseft.training.prepare import select as cached_or_computed
from sparseft.training.recomputing import KINDS
from sparseft.training.reselecting import reselecting
from sparseft.training.reselection import Reselection
from sparseft.training.run_state import Mark
from sparseft.training.running import check_seen
from sparseft.training.sample_answers import Asked, SampleAnswers, read_prompts
from sparseft.training.trackers import Trackers, tracked
from sparseft.training.trainer import Trainer
from sparseft.training.trainer import train as run_loop


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
    def rows(self) -> Any:
        """What the Trainer draws batches from: training examples, packed where that is asked for."""
        return training_rows(self.prepared)

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


def run(config: RunConfig) -> dict[str, Any]:
    """The run, in this process; returns its summary and its folder."""
    forget_zero()  # of an earlier run
    previous = ranks.broadcast_object(resuming.previous_run(config) if ranks.is_main() else None)
    job = set_up(config, previous)
    select(job)
    attach(job)
    folder = open_folder(job)
    with explained(f"the run in '{folder}'", lambda: last_checkpoint(folder)):
        step = max(0, job.previous.step) if job.previous else None
        with tracked(config, job.arguments, job.prepared.model, folder, step) as trackers:
            summary = finish(job, train(job, folder, trackers), trackers)
    return summary | {"run": str(folder)}


# ---- set up ----


def set_up(config: RunConfig, previous: resuming.Previous | None) -> Job:
    """Loads model and data, and refuses what cannot be trained, the cheapest to see first."""
    transformers.set_seed(config.seed)
    scorer = _scorer(config)  # a wrong task is said before data is read
    prepared = prepare(config)
    data = prepared.data
    reset_peak_memory(prepared.device)
    if previous is not None:
        previous.check_data(data.fingerprint)
    if config.trainer.eval_steps and data.eval is None:
        raise UserError(
            f"trainer.eval_steps={config.trainer.eval_steps}: there are no evaluation examples; give "
            "dataset.eval_path=FILE or a dataset.eval_fraction above 0."
        )
    _check_context(config, prepared)
    total_steps, learning_rate = count_steps(config, prepared), checks.learning_rate(config)
    if config.trainer.max_steps < 1:  # else it has been looked at before anything was loaded
        schedules.check(config.trainer, learning_rate, total_steps)
    if previous is not None:
        previous.check_steps(config.trainer, total_steps)
    if data.packed is not None:
        with runnable(prepared.model):
            check_packing(prepared.model, config.trainer.batch_size)
        console.log(f"data: {data.packed.note(config.trainer.batch_size, config.trainer.gradient_accumulation)}")
    contamination = _contamination(config, data, scorer)
    spec = ModelSpec.of(prepared.model).narrowed(config.method.layers)
    asked = _asked(config, prepared)
    return Job(
        config, previous, scorer, prepared, total_steps, learning_rate, contamination, spec, prepared.dtype, asked
    )


def _asked(config: RunConfig, prepared: Prepared) -> Asked | None:
    prompts = read_prompts(config.trainer.sample_prompts)
    if not prompts:
        return None
    asked = Asked(prompts, prepared.tokenizer, prepared.data.format, config.dataset.plain_chat)
    asked.check(vocabulary_rows(prepared.model)[0], context_length(prepared.model.config))
    return asked


def _scorer(config: RunConfig) -> Any:
    if not config.trainer.eval_task:
        return None
    from sparseft.training.scoring import Scorer  # brings lm-eval with it, seconds that other runs need not wait

    return Scorer(config)


def training_rows(prepared: Prepared) -> Any:
    """Training examples, packed where that is asked for; of a preference objective pairs, or answers."""
    data = prepared.data
    return data.preferences or (data.train if data.packed is None else data.packed)


def count_steps(config: RunConfig, prepared: Prepared) -> int:
    """Optimizer steps of the whole run, as the Trainer counts them."""
    trainer = config.trainer
    if trainer.max_steps > 0:
        return trainer.max_steps
    sequences = trainer.batch_size * trainer.gradient_accumulation * ranks.rank_and_world()[1]
    return math.ceil(trainer.num_epochs * max(1, math.ceil(len(training_rows(prepared)) / sequences)))


def _check_context(config: RunConfig, prepared: Prepared) -> None:
    """Refuses examples longer than the model's context: learned positions end there, others never saw more."""
    context, data = context_length(prepared.model.config), prepared.data
    longest = max(int(part.lengths.max()) for part, _ in data.parts() if len(part))
    if context and config.trainer.pad_to == "max_length" and config.trainer.max_length > context:
        raise UserError(
            f"trainer.pad_to=max_length: trainer.max_length={config.trainer.max_length} is more than the model's "
            f"context of {context} tokens; use trainer.max_length={context} or less."
        )
    if context and longest > context:
        raise UserError(
            f"trainer.max_length={config.trainer.max_length}: the longest example has {longest} tokens, but the "
            f"model's context is {context} tokens; use trainer.max_length={context} or less."
        )


def _contamination(config: RunConfig, data: Any, scorer: Any) -> dict[str, Any] | None:
    """How many questions of the evaluation data, and of the test sets that the run names, are training questions: those
    of `trainer.eval_task`, else the LLM-Adapters sets in `eval.data_dir`. Warns of the latter, as loading did of the
    former. None where there is nothing to compare."""
    found: dict[str, Any] = {} if data.eval is None else {"eval_data": data.eval_overlap}
    counted: dict[str, dict[str, tuple[int, int]]] = {}  # by split and task: overlapping, all
    if scorer is not None or config.eval.data_dir is not None:
        from sparseft.evaluation.contamination import overlap_of_folder, overlap_of_plan  # most runs need none of it
        from sparseft.evaluation.tasks import data_folder

        if scorer is not None:
            counted = {split: overlap_of_plan(plan, data.questions) for split, plan in scorer.plans.items()}
        else:
            counted = {"test": overlap_of_folder(str(data_folder(config.eval, config.model.path)), data.questions)}
    for split, tasks in counted.items():
        for task, (overlapping, questions) in tasks.items():
            found.setdefault("tasks", {}).setdefault(task, {})[split] = overlapping
            if overlapping:
                console.warn(
                    f"{task}: {overlapping} of {questions} questions of its {split} split are training questions; its "
                    "score says less about new ones"
                )
    return found or None


# ---- select, attach ----


def select(job: Job) -> None:
    """What trains: of a run that is continued its own selection, else the cached or a computed one."""
    if frozen := job.method.frozen_experts(job.spec):
        console.warn(
            f"{len(frozen)} expert matrices (3-D parameters such as {frozen[0]}) stay frozen: method "
            f"{job.config.method_name} does not train them"
        )
    if not job.method.sparse:
        return
    if job.resumed_from is not None:
        check_shards(Request.of(job.spec, job.method), job.config.hardware)
        own = job.previous.folder / SELECTION
        console.log(f"selection: the run's own, {own}")
        job.selection, job.selection_cached = Selection.load(own), True
    else:
        selected = cached_or_computed(job.config, job.prepared, job.spec)
        job.selection, job.selection_cached = selected.selection, selected.cached
        job.selection_seconds = selected.seconds
        job.fingerprints = selected.fingerprints


def attach(job: Job) -> None:
    """Makes the model trainable by the run's method, says what trains, and settles the Trainer's arguments."""
    config, prepared = job.config, job.prepared
    with console.showing(LayoutWarning):
        model = attach_method(
            prepared.model, config.method, job.selection, spec=job.spec, fingerprints=job.fingerprints
        )
    prepared.model = model
    if config.method.reselects_running:
        check_seen(model)
    job.method_config = state_of(model).method_config
    if config.model.path.startswith(BUNDLED) or is_gguf(config.model.path):  # not the folder behind it
        state_of(model).base_model = config.model.path
    job.trainable = trainable_count(model)
    if job.selection is not None:
        describe_selection(job.selection, job.spec, config.method)
    elif (unit := config.method.granularity(None)) is not None:
        describe_trainable(job.trainable, job.spec, config.method, unit)
    else:
        console.log(f"trainable: {job.trainable:,} of {job.spec.total_parameters:,} parameters of the model")
    _predict(job)
    job.export_rank = describe_export(job.selection, job.spec, config.method)
    whole = job.method.trains_all
    options: dict[str, Any] = {
        "unused": has_experts(model) or (whole and bool(job.spec.frozen)),
        "autocast": prepared.device.type == "cuda" and job.dtype.itemsize == 2 and whole,
    }
    if config.trainer.learning_rate == AUTO:
        _find_rate(job, options)
    if config.by_preference:
        own = OBJECTIVES[config.objective]
        options |= {"kind": own.configuration(), **own.arguments(config.trainer, prepared.pad)}
    job.arguments = training_arguments(
        dataclasses.replace(config.trainer, learning_rate=job.learning_rate),
        config.hardware,
        seed=config.seed,
        device=prepared.device,
        total_steps=job.total_steps,
        **options,
    )


def _find_rate(job: Job, arguments: dict[str, Any]) -> None:
    """The rate that a ramp finds; of a run that is continued its own."""
    config, prepared = job.config, job.prepared
    if job.resumed_from is not None:
        job.found = rates.Found.load(job.previous.folder)
        console.log(f"learning rate: the run's own, {job.found.learning_rate:g}")
    else:
        job.found = rates.find(
            prepared.model, prepared.data.train, config.trainer, config.hardware, device=prepared.device,
            seed=config.seed, pad=prepared.pad, packing=config.dataset.packing, arguments=arguments,
            **_loss_options(job),
        )  # fmt: skip
        console.log(f"learning rate: {job.found}")
    job.learning_rate = job.found.learning_rate
    schedules.check(config.trainer, job.learning_rate, job.total_steps)


def _loss_options(job: Job) -> dict[str, Any]:
    """How the Trainer computes a loss and what it keeps for its gradient."""
    config = job.config
    return {
        "labelled": job.labelled,
        "smoothing": config.trainer.label_smoothing,
        "recomputed": KINDS.get(config.checkpointing, ()),
    }


def _predict(job: Job) -> None:
    """Says what a step will cost; of a preference objective, whose step is another one, nothing."""
    config, data = job.config, job.prepared.data.train
    if config.by_preference:
        return
    job.labelled = usable(job.prepared.model, config)
    share = labelled_share(data, job.labelled)
    length = round(data.num_tokens / max(1, len(data)))
    job.floors = predicted_floors(job.prepared.model, job.spec, config, length=length, labelled=share)
    console.log(f"step: {in_words(job.floors, share)}")


# ---- the run's folder ----


def open_folder(job: Job) -> Path:
    """The run's folder, which says what the run is; of one that is continued, without what its last checkpoint does not
    know of."""
    folder = Path()
    if ranks.is_main():
        config, previous = job.config, job.previous
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
            _describe(job, folder)
        console.log(f"run: {folder}")
        if previous is not None:
            resuming.clean(previous, config.trainer.save_total_limit)
            truncate_metrics(folder / METRICS, previous.step)
            truncate_metrics(folder / SAMPLES, previous.step)
            console.log(f"resume: {previous.describe(job.total_steps)}")
    return ranks.broadcast_object(folder)


def _describe(job: Job, folder: Path) -> None:
    """Writes what the run is into its folder: `config.yaml`, `environment.json`, `selection/`, its questions."""
    write_text(folder / CONFIG, to_yaml(job.config))
    data = job.prepared.data
    facts = {
        "train": data.train_source,
        "eval": data.eval_source or None,
        "format": data.format,
        "examples": len(data.preferences or data.train),
        "rows": len(job.rows),
        "tokens": sum(part.num_tokens for part in data.trained),
        "fingerprint": data.fingerprint,
    }
    dtype, world = str(job.dtype).removeprefix("torch."), ranks.rank_and_world()[1]
    known = environment(str(job.prepared.device), dtype, world)
    if job.prepared.device.type == "cuda":
        known["device_name"] = torch.cuda.get_device_name(job.prepared.device)
    write_json(folder / ENVIRONMENT, known | {"data": facts})
    if job.selection is not None and job.resumed_from is None:
        job.selection.save(folder / SELECTION)
    data.questions.save(folder)
    if job.found is not None:
        write_json(folder / RATE, dataclasses.asdict(job.found))


# ---- train ----


def train(job: Job, folder: Path, trackers: Trackers) -> Trained:
    """Measures, and trains in the run's folder."""
    config, prepared = job.config, job.prepared
    if job.resumed_from is None:
        _picture(job, trackers, 0)
    trainer = _trainer(job, folder, trackers)
    average = None
    if config.trainer.average is not None:
        average = Average(config.trainer.average, prepared.model, job.total_steps, job.resumed_from)
        trainer.add_callback(average)
    if config.method.reselect_steps:
        job.reselection = reselecting(
            config.method, prepared, job.spec, trainer.run_state.clock,
            ended_at=job.previous.ended_at if job.previous else None, resumed=job.resumed_from,
        )  # fmt: skip
        trainer.add_callback(job.reselection)
    best = Best(
        folder / CHECKPOINTS,
        (lambda path: trainer.save_model(str(path))) if config.trainer.keep_best else None,
        from_step=best_from(job),
        target_score=config.trainer.target_score,
        patience=config.trainer.patience,
    )
    trainer.add_callback(best)
    samples = None
    if job.asked is not None:
        samples = SampleAnswers(
            job.asked, trainer, prepared.model, prepared.pad, config.trainer.sample_steps,
            lambda rows, step: trackers.table("samples", rows, step),
        )  # fmt: skip
        trainer.add_callback(samples)
        samples.base()
    before = _evaluation(job, trainer, 0, "before")
    transformers.set_seed(config.seed)  # whatever was drawn before, as by an evaluation, training starts the same
    totals = run_loop(trainer, job.resumed_from, _last_step(job, folder))
    if average is not None:
        average.take()
    if samples is not None:
        samples.adapter(totals.step)
    return Trained(trainer, best, before, totals)


def _trainer(job: Job, folder: Path, trackers: Trackers) -> Trainer:
    config, prepared = job.config, job.prepared
    options: dict[str, Any] = {
        "run": folder,
        "save_total_limit": config.trainer.save_total_limit,
        "max_bad_steps": config.trainer.max_bad_steps,
        "score": job.scorer.on_validation(prepared.model, prepared.tokenizer) if job.scorer else None,
        "report": trackers.log,
    }
    if config.by_preference:
        from sparseft.training.preference.trainer import make_trainer  # brings TRL, seconds that others need not wait

        return make_trainer(
            config, prepared.model, job.arguments, prepared.data, prepared.tokenizer, prepared.pad, **options
        )
    return Trainer(
        prepared.model,
        job.arguments,
        train_dataset=job.rows,
        eval_dataset=prepared.data.eval,
        compile_layers=config.trainer.compile == "layers",
        data_collator=Collator(prepared.pad, config.trainer.max_length if config.trainer.pad_to == "max_length" else 0),
        processing_class=None,
        **_loss_options(job),
        **options,
    )


def _picture(job: Job, trackers: Trackers, step: int) -> None:
    """Shows trackers what trains; where nothing is chosen there is nothing to see."""
    if trackers.opened and not job.method.trains_all:
        trackers.picture("selection", draw_shares(trained_shares(job.prepared.model, job.spec)), step)


def best_from(job: Job) -> int:
    """The first step whose evaluation may be the best."""
    return max(1, math.ceil(job.config.trainer.best_after * job.total_steps))


def _last_step(job: Job, folder: Path) -> int:
    """Where training ends: also where a run that is continued has reached its target, or lost its patience, before."""
    settings = job.config.trainer
    step = job.previous.step if job.previous else -1
    seen = first_recorded(folder, step) if step > 0 else None
    if seen is None:
        return job.total_steps
    counted = ranks.broadcast_object(evaluations(folder, range(best_from(job), step + 1)) if ranks.is_main() else [])
    impatient = settings.patience is not None and without_a_better(counted) >= settings.patience
    return step if impatient or reached(settings.target_score, seen.eval_score) else job.total_steps


def _evaluation(job: Job, trainer: Trainer, step: int, when: str, anew: bool = False) -> Evaluation | None:
    """The evaluation at the present step: as recorded where it was measured there, else (and `anew`) measured now, and
    said."""
    if job.prepared.data.eval is None:
        return None
    folder = trainer.run_state.folder
    seen = first_recorded(folder, step)
    if seen is None or anew:
        trainer.evaluate()
        seen = first_recorded(folder, step)
        _say(job, when, seen)
    return seen


def first_recorded(folder: Path, step: int) -> Evaluation | None:
    """`recorded`, as the process finds it that writes the file."""
    return ranks.broadcast_object(recorded(folder, step) if ranks.is_main() else None)


def _say(job: Job, when: str, seen: Evaluation | None) -> None:
    if seen is not None:
        where = f", on {job.prepared.data.eval_source}" if when == "before" else ""
        console.log(f"eval loss {when}: {seen.eval_loss:.4f}{where}")
        if job.scorer is not None:
            console.log(f"{job.scorer.name} {when}: {seen.eval_score:.4f} on the validation split")


# ---- finish ----


def finish(job: Job, trained: Trained, trackers: Trackers) -> dict[str, Any]:
    """Measures again, leaves the adapter (the best one where it was kept) and the summary, which it returns."""
    config, prepared, trainer = job.config, job.prepared, trained.trainer
    folder = trainer.run_state.folder
    # Where a run that is averaged ends early, the evaluation that ended it was of what trained.
    anew = config.trainer.average is not None and trained.totals.step < job.total_steps
    after = _evaluation(job, trainer, trained.totals.step, "after", anew)
    kept = trained.best.take(prepared.model)
    if kept is not None:
        console.log(f"best: the evaluation at step {kept.step}, whose adapter is kept")
        after = kept
    trainer.save_trained(folder / ADAPTER)
    first = ranks.is_main()
    if first and (folder / UNTRIMMED).is_dir():  # of a run that was trimmed and then went on: what it was cut from
        remove(folder / UNTRIMMED)
    if job.method.trains_all and first:
        prepared.tokenizer.save_pretrained(folder / ADAPTER)
    scores: dict[str, Any] = {}
    if job.scorer is not None:
        test_score = stderr = None
        if first or config.hardware.in_shards:
            test_score, stderr = job.scorer.on_test(prepared.model, prepared.tokenizer, folder)
        scores = {
            "eval_task": job.scorer.name,
            "eval_score_before": trained.before.eval_score,
            "eval_score_after": after.eval_score,
            "test_score": test_score,
            "test_score_stderr": stderr,
        }
    summary = _summary(job, trained, after) | ({"best_step": kept.step} if kept else {})
    if config.by_preference and first:
        steps = (each.step if each else None for each in (trained.before, after))
        summary |= outcome(folder, *steps)
    summary |= ({"bad_steps": trained.totals.bad} if trained.totals.bad else {}) | scores
    if spikes := trainer.run_state.spikes.count:
        summary["loss_spikes"] = spikes
    if first:
        write_json(folder / SUMMARY, summary)
    if config.method.reselect_steps:
        _picture(job, trackers, trained.totals.step)
    trackers.summary(summary)
    return summary


def _summary(job: Job, trained: Trained, after: Evaluation | None) -> dict[str, Any]:
    config, done, before = job.config, trained.totals, trained.before
    scope = job.spec.weights_in(config.method.scope)
    return {
        "method": config.method_name,
        "model": config.model.path,
        "dataset": config.dataset.title,
        "objective": config.objective,
        "sparsity": None if job.method.trains_all else 1 - job.trainable / scope,
        "scope": config.method.scope,
        "trainable_parameters": job.trainable,
        "scope_parameters": scope,
        "total_parameters": job.spec.total_parameters,
        "predicted_floors": job.floors,
        "export_rank": None if config.method.reselect_steps else job.export_rank,
        "steps": done.step,
        "tokens": done.tokens,
        "train_seconds": done.seconds,
        "tokens_per_second": done.tokens / done.seconds if done.seconds > 0 else None,
        "peak_memory_bytes": memory_bytes(job.prepared.device, peak=True),
        "train_loss": done.loss / (done.step - done.bad) if done.bad < done.step else None,
        "eval_loss_before": before.eval_loss if before else None,
        "eval_loss_after": after.eval_loss if after else None,
        "seed": config.seed,
        "learning_rate": job.learning_rate,
        "learning_rate_seconds": job.found.seconds if job.found else None,
        "selection_cached": job.selection_cached,
        "selection_seconds": job.selection_seconds,
        "reselection_seconds": job.reselection.seconds if job.reselection else None,
        "method_config": job.method_config,
        "contamination": job.contamination,
        "warnings": console.recorded_warnings(),
    }

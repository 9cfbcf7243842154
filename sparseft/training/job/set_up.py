"""The first step of a run: model and data, loaded and looked at."""

from __future__ import annotations

import math
from typing import Any

import transformers

from sparseft import console
from sparseft.config import AUTO, RunConfig
from sparseft.data.packing import check_packing
from sparseft.distributed import ranks
from sparseft.errors import UserError
from sparseft.memory import reset_peak_memory
from sparseft.models.decoder import context_length, runnable
from sparseft.models.loading import vocabulary_rows
from sparseft.models.spec import ModelSpec
from sparseft.training import checks, schedules
from sparseft.training import resume as resuming
from sparseft.training.arguments import micro_batches
from sparseft.training.job.job import Job
from sparseft.training.prepare import Prepared, prepare
from sparseft.training.sample_answers import Asked, read_prompts

# From how many examples an evaluation takes long, and what share of the training between two of them is much.
MANY, MUCH = 1000, 0.1
PER_MICRO_STEP = ("kto", "orpo")  # kto's estimate of how far the model has moved, orpo's mean over answers' tokens


def set_up(config: RunConfig, previous: resuming.Previous | None) -> Job:
    """Loads model and data, and refuses what cannot be trained, the cheapest to see first."""
    transformers.set_seed(config.seed)
    scorer = _scorer(config)  # a wrong task is said before data is read
    prepared = prepare(config)
    data = prepared.data
    reset_peak_memory(prepared.device)
    if previous is not None:
        previous.check_data(data.fingerprint, data.train_source)
    if config.trainer.eval_steps and data.eval is None:
        raise UserError(
            f"trainer.eval_steps={config.trainer.eval_steps}: there are no evaluation examples; give "
            "dataset.eval_path=FILE or a dataset.eval_fraction above 0."
        )
    _check_context(config, prepared)
    total_steps, learning_rate = count_steps(config, prepared), checks.learning_rate(config)
    if config.trainer.max_steps < 1:  # else it has been looked at before anything was loaded
        schedules.check(config.trainer, None if config.trainer.learning_rate == AUTO else learning_rate, total_steps)
    if previous is not None:
        previous.check_steps(config.trainer, total_steps)
    at_once, micro_steps = micro_batches(config.trainer, config.hardware)
    if data.packed is not None:
        with runnable(prepared.model):
            check_packing(prepared.model, at_once)
        console.log(f"data: {data.packed.note(at_once, micro_steps)}")
    if at_once < config.trainer.batch_size and config.objective in PER_MICRO_STEP:
        console.warn(
            f"hardware.micro_batch={config.hardware.micro_batch}: objective={config.objective} takes means over what "
            f"is at once, so a step of {config.trainer.batch_size} in parts of {at_once} is not the same step"
        )
    _warn_of_long_evaluations(config, prepared, total_steps)
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
    dataset = config.dataset
    asked = Asked(prompts, prepared.tokenizer, prepared.data.format, dataset.plain_chat, dataset.chat_date)
    asked.check(vocabulary_rows(prepared.model)[0], context_length(prepared.model.config))
    return asked


def _scorer(config: RunConfig) -> Any:
    if not config.trainer.eval_task:
        return None
    from sparseft.training.scoring import Scorer  # brings lm-eval with it, seconds that other runs need not wait

    return Scorer(config)


def count_steps(config: RunConfig, prepared: Prepared) -> int:
    """Optimizer steps of the whole run, as the Trainer counts them."""
    trainer = config.trainer
    if trainer.max_steps > 0:
        return trainer.max_steps
    return math.ceil(trainer.num_epochs * max(1, math.ceil(len(prepared.rows) / _sequences(config))))


def _sequences(config: RunConfig) -> int:
    """What a step of all processes takes."""
    return config.trainer.batch_size * config.trainer.gradient_accumulation * ranks.rank_and_world()[1]


def _warn_of_long_evaluations(config: RunConfig, prepared: Prepared, total_steps: int) -> None:
    """Says what each evaluation reads, where that is much beside what is trained on between two of them: nothing bounds
    a share of a large data set."""
    data, every = prepared.data, config.trainer.eval_steps
    pairs = data.eval_preferences
    if data.eval is None or every == 0 or len(pairs or data.eval) < MANY:
        return
    read = data.eval.num_tokens + (pairs.worse.num_tokens if pairs else 0)
    steps = min(every or total_steps, total_steps)
    trained = steps * _sequences(config) * sum(part.num_tokens for part in data.trained) / len(prepared.rows)
    if read > MUCH * trained:
        fewer = "a smaller dataset.eval_fraction" if config.dataset.eval_path is None else "a smaller dataset.eval_path"
        rarer = "a larger trainer.eval_steps reads them less often" if every else "trainer.eval_steps=0 reads none"
        console.warn(
            f"each evaluation reads {len(pairs or data.eval):,} held-out examples, {read:,} tokens, which is "
            f"{read / trained:.1f} times what is trained on between two evaluations: {fewer} makes them fewer, {rarer}"
        )


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

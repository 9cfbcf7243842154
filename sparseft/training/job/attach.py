"""The second and third step of a run: what trains is chosen, and the model made to train it."""

from __future__ import annotations

import dataclasses
from typing import Any

from sparseft import console
from sparseft.adapters.lifecycle import attach as attach_method
from sparseft.adapters.lifecycle import trainable_count
from sparseft.adapters.state import state_of
from sparseft.config import AUTO, BUNDLED
from sparseft.errors import LayoutWarning
from sparseft.models.gguf import is_gguf
from sparseft.models.labelled_loss import usable
from sparseft.models.mixed_precision import multiply_as_trained
from sparseft.runs.folder import SELECTION
from sparseft.selection.compute import Request
from sparseft.selection.engine_ranks import describe_export
from sparseft.selection.selection import Selection, describe_selection, describe_trainable
from sparseft.training import rate as rates
from sparseft.training import schedules
from sparseft.training.arguments import training_arguments
from sparseft.training.distributed_trainer import check_shards, has_experts, trains_beside_text
from sparseft.training.job.job import Job
from sparseft.training.predicted import in_words, labelled_share, predicted_floors
from sparseft.training.preference.objectives import OBJECTIVES
from sparseft.training.prepare import select as cached_or_computed
from sparseft.training.recomputing import KINDS


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
        # What it leaves to other adapters is settled: they need not be there any more.
        request = Request.of(job.spec, dataclasses.replace(job.method, exclude=None))
        check_shards(request, job.config.hardware, job.prepared.model)
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
    multiply_as_trained(model, job.method, job.dtype, prepared.device)
    unread = bool(job.spec.frozen) or trains_beside_text(model)  # by text, that is
    options: dict[str, Any] = {"unused": has_experts(model) or (job.method.trains_all and unread)}
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
            **loss_options(job),
        )  # fmt: skip
        console.log(f"learning rate: {job.found}")
    job.learning_rate = job.found.learning_rate
    schedules.check(config.trainer, job.learning_rate, job.total_steps)


def loss_options(job: Job) -> dict[str, Any]:
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

"""Config + model + calibration batches -> `Selection`: the pipeline that all sparse methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from sparseft import console
from sparseft.distributed import ranks
from sparseft.errors import UserError
from sparseft.importance import compute_scores
from sparseft.importance.kfac import SecondOrder
from sparseft.layers import sparse_layers
from sparseft.layers.convert import check_modules
from sparseft.layers.experts import opened
from sparseft.layers.reordering import original_order
from sparseft.methods import method_of
from sparseft.methods.base import SparseConfig
from sparseft.models.compiled import inside_compiled
from sparseft.models.spec import ModelSpec
from sparseft.selection.choose import choose, generator_for
from sparseft.selection.selection import Selection


@inside_compiled
def compute_selection(
    model: nn.Module,
    config: SparseConfig,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    progress: Callable[[int], None] | None = None,
    scoring: Callable[[int, int], None] | None = None,
    resume: Path | None = None,
) -> Selection:
    """Which units of a plain model a sparse method trains; the model is unchanged afterwards.

    With `torch.distributed` initialised, an importance that needs data makes this a collective call: every rank gives
    the same batches, runs its share of the samples, and gets rank 0's selection.

    Args:
        model: a Hugging Face causal LM.
        config: `S2FTConfig` or `SylvaConfig`.
        batches: dicts as the model takes them (`input_ids`, `attention_mask`, `labels`); at most
            `config.num_samples` samples are used; all, where it is a share of training data that only the caller
            knows. Not needed for importance random and weight.
        progress: called with the number of samples done.
        scoring: called with (linears scored, linears), where that takes a pass of its own (importance sylva).
        resume: a folder that takes what is done of the calibration, every half minute or so and when `progress` or
            `scoring` raises; a later call with the same model, config and batches goes on from there, and comes to the
            same selection. The caller removes it when the selection is safe.

    Raises:
        UserError: a value out of range, a scope that matches nothing, a budget that cannot be met.
    """
    method = method_of(config)
    if not method.sparse:
        raise UserError(f"method {method.name} selects nothing, so there is no selection to compute.")
    config.validate()
    if sparse_layers(model):
        raise UserError("the model has sparse layers already: detach or merge them before selecting anew.")
    spec = ModelSpec.of(model)
    config = method.settled(spec, config)
    budget = method.budget(spec, config)
    check_modules(model, dict.fromkeys(c.module for c in budget.candidates), spec.linears)
    if config.needs_data and batches is not None:
        batches = first_samples(batches, config.num_samples)
    shared = config.needs_data and batches is not None
    statistics: dict[str, Any] = {}
    with opened(model, [c.module for c in budget.candidates]):
        scores = compute_scores(
            model,
            budget.candidates,
            config.importance,
            seed=config.seed,
            batches=batches,
            generator=generator_for,
            progress=progress,
            scoring=scoring,
            second_order=second_order(config),
            resume=resume,
            meta=statistics,
        )
    selection = choose(budget, scores, order=config.order, allocation=config.allocation, seed=config.seed)
    if shared:
        selection = ranks.broadcast_object(selection)
    selection.meta |= statistics
    if "second_order" in statistics:
        log_damping(statistics["second_order"])
    describe(selection, spec, method.name, config, budget.scope_parameters)
    return selection


def reselect(
    model: nn.Module,
    config: SparseConfig,
    batches: Iterable[Mapping[str, Any]] | None,
    *,
    seed: int,
) -> Selection:
    """Chooses anew for an attached model, from its weights as they are: in each layer as many units as train now."""
    spec = ModelSpec.of(model)
    layers = sparse_layers(model)
    size = max((p.block_size or 0 for layer in layers.values() for p in layer.patterns.values()), default=0)
    if size and hasattr(config, "block_size"):  # what trains decides, also where the caller had chosen it
        config = replace(config, block_size=size)
    budget = method_of(config).budget(spec, config)
    counts = {}
    for c in budget.candidates:
        pattern = layers[c.module].patterns.get(c.kind) if c.module in layers else None
        if pattern is None:
            continue
        if c.kind == "blocks":
            counts[c.key] = len(pattern.index)
        else:
            there = (pattern.index >= c.start) & (pattern.index < c.start + c.unit * c.count)
            counts[c.key] = int(there.sum()) // c.unit
    budget.candidates = [c for c in budget.candidates if counts.get(c.key)]
    budget.per_candidate = counts
    with original_order(layers.values()):  # units are counted as in the checkpoint
        scores = compute_scores(
            model,
            budget.candidates,
            config.importance,
            seed=seed,
            batches=first_samples(batches, config.num_samples) if batches is not None else None,
            generator=generator_for,
            second_order=second_order(config),
        )
    return choose(budget, scores, order=config.order, allocation="per_layer", seed=seed)


def log_damping(summary: Mapping[str, Any]) -> None:
    """Says where low rank had left second moments indefinite, so that their inverses took more damping than asked."""
    if summary["raised"]:
        found = summary["effective_damping"]
        console.log(
            f"second order: {summary['raised']} of {summary['matrices']} matrices needed more damping than "
            f"{summary['damping']:g} to be positive definite: {found['min']:g} to {found['max']:g}, "
            f"median {found['median']:g}"
        )


def second_order(config: SparseConfig) -> SecondOrder:
    """The settings of the second-order statistics: the config's where it has them, else the defaults."""
    default = SecondOrder()
    return SecondOrder(
        num_partition=getattr(config, "num_partition", default.num_partition),
        rank=getattr(config, "rank", default.rank),
        damping=getattr(config, "damping", default.damping),
    )


def first_samples(batches: Iterable[Mapping[str, Any]], count: float | None) -> Iterable[Mapping[str, Any]]:
    """The batches' first `count` samples, cutting the last batch where needed; all, where it is a share or null."""
    left: Any = count if isinstance(count, int) else float("inf")
    for batch in batches:
        size = len(batch["input_ids"]) if "input_ids" in batch else 0
        if size > left:
            batch = {name: value[:left] if hasattr(value, "shape") else value for name, value in batch.items()}
        yield batch
        left -= size
        if left <= 0:
            return


def describe(selection: Selection, spec: ModelSpec, method: str, config: SparseConfig, scope_parameters: int) -> None:
    """Records in `selection.meta` what was chosen by what, with every module's shape and trainable entries."""
    trainable = selection.trainable(spec.linears)
    selection.meta |= {
        "method": method,
        "method_config": asdict(config),
        "scope_parameters": scope_parameters,
        "total_parameters": spec.total_parameters,
        "trainable_parameters": sum(trainable.values()),
        "modules": {name: {"shape": list(spec.linears[name])} for name in selection.modules},
    }

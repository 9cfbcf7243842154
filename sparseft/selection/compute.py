"""Settings + model + calibration batches -> `Selection`: the pipeline that all sparse methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from torch import nn

from sparseft import console
from sparseft.distributed import ranks
from sparseft.errors import UserError
from sparseft.importance.calibration import Watch
from sparseft.importance.kfac import FactorSettings
from sparseft.importance.scores import compute_scores
from sparseft.kernels import grid
from sparseft.layers import sparse_layers
from sparseft.layers.convert import check_modules, original_order
from sparseft.layers.experts import opened
from sparseft.models.decoder import inside_compiled
from sparseft.models.spec import ModelSpec
from sparseft.selection.budget import Budget
from sparseft.selection.choose import choose
from sparseft.selection.distribution import distributions
from sparseft.selection.exclude import Excluded, check_bases, leave_out, read_excluded
from sparseft.selection.max_rank import check_units
from sparseft.selection.selection import Selection


@runtime_checkable
class Settings(Protocol):
    """What the settings of a sparse method say: `methods.base.SparseConfig`."""

    name: str  # the method's
    importance: str
    order: str
    allocation: str
    layers: Any  # `methods.base.Layers`
    num_samples: int | float | None
    max_rank: int | None
    seed: int
    exclude: list[str] | None

    @property
    def needs_data(self) -> bool: ...

    def validate(self) -> None: ...

    def settled(self, spec: ModelSpec) -> Self: ...

    def budget(self, spec: ModelSpec) -> Budget: ...

    def statistics(self) -> dict[str, Any]: ...

    def with_block_size(self, size: int | None) -> Self: ...


@dataclass(frozen=True)
class Request:
    """What is to be chosen of a model: its linears and roles, the settings with what they leave to the model filled in,
    the budget, and the adapters whose weights it leaves out."""

    spec: ModelSpec
    settings: Settings
    budget: Budget
    excluded: Sequence[Excluded] = ()

    @property
    def has_experts(self) -> bool:
        """Whether single experts of a 3-D parameter are among what is chosen from."""
        return not self.spec.stacked.isdisjoint(c.module for c in self.budget.candidates)

    @staticmethod
    def of(spec: ModelSpec, settings: Settings) -> Request:
        """UserError where the model cannot meet the settings."""
        spec = spec.narrowed(settings.layers)
        settings = settings.settled(spec)
        request = Request(spec, settings, settings.budget(spec), read_excluded(settings.exclude))
        leave_out(request.budget, request.excluded, settings.allocation)
        check_units(request.budget, settings.max_rank)
        return request


@inside_compiled
def compute_selection(
    model: nn.Module,
    config: Settings,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    progress: Callable[[int], None] | None = None,
    scoring: Callable[[int, int], None] | None = None,
    resume: Path | None = None,
    by_layer: bool | None = None,
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
        by_layer: whether gradients are taken a decoder layer at a time, where the model allows it: then the sums of one
            layer alone exist, and the hidden states at the layers' borders are kept. None: where the sums of all layers
            would crowd the memory.

    Raises:
        UserError: a value out of range, a scope that matches nothing, a budget that cannot be met.
    """
    if not isinstance(config, Settings):
        raise UserError(f"a {type(config).__name__} selects nothing, so there is no selection to compute.")
    config.validate()
    if sparse_layers(model):
        raise UserError("the model has sparse layers already: detach or merge them before selecting anew.")
    return compute(model, Request.of(ModelSpec.of(model), config), batches, Watch(progress, scoring, resume), by_layer)


def compute(
    model: nn.Module,
    request: Request,
    batches: Iterable[Mapping[str, Any]] | None = None,
    watch: Watch | None = None,
    by_layer: bool | None = None,
) -> Selection:
    """`compute_selection` of what is known already."""
    settings, budget = request.settings, request.budget
    modules = list(dict.fromkeys(c.module for c in budget.candidates))
    check_modules(model, modules, request.spec.linears)
    check_bases(model, request.excluded)
    if settings.needs_data and batches is not None:
        batches = first_samples(batches, settings.num_samples)
    with opened(model, modules):
        scores, facts = compute_scores(
            model,
            budget.candidates,
            settings.importance,
            seed=settings.seed,
            batches=batches,
            factors=FactorSettings(**settings.statistics()),
            watch=watch,
            by_layer=by_layer,
        )
    selection = choose(
        budget,
        scores,
        order=settings.order,
        allocation=settings.allocation,
        seed=settings.seed,
        max_rank=settings.max_rank,
        spec=request.spec,
        drawn=settings.importance == "random",
    )
    if settings.needs_data and batches is not None:
        selection = ranks.broadcast_object(selection)
    selection.meta |= facts
    if "second_order" in facts:
        log_damping(facts["second_order"])
    drawn = settings.importance == "random"
    selection.meta["candidates"] = distributions(budget.candidates, selection, None if drawn else scores)
    _record(selection, request)
    return selection


def reselect(
    model: nn.Module,
    config: Settings,
    batches: Iterable[Mapping[str, Any]] | None,
    *,
    seed: int,
    spec: ModelSpec | None = None,
    excluded: Sequence[Excluded] | None = None,
) -> Selection:
    """Chooses anew for an attached model, from its weights as they are: in each layer as many units as train now.

    `spec` is the model's, `excluded` what `config.exclude` names, where they are known.
    """
    budget = as_trained(model, config, spec=spec, excluded=excluded)
    with original_order(sparse_layers(model).values()):  # units are counted as in the checkpoint
        scores, _ = compute_scores(
            model,
            budget.candidates,
            config.importance,
            seed=seed,
            batches=first_samples(batches, config.num_samples) if batches is not None else None,
            factors=FactorSettings(**config.statistics()),
        )
    drawn = config.importance == "random"
    return choose(budget, scores, order=config.order, allocation="per_layer", seed=seed, drawn=drawn)


def as_trained(
    model: nn.Module,
    config: Settings,
    *,
    spec: ModelSpec | None = None,
    excluded: Sequence[Excluded] | None = None,
) -> Budget:
    """The budget of choosing anew for an attached model: of each candidate as many units as train now.

    `spec` is the model's, `excluded` what `config.exclude` names, where they are known.
    """
    if config.max_rank is not None:
        raise UserError(
            f"method.max_rank={config.max_rank}: what trained before stays in the adapter, so choosing anew goes "
            "beyond any rank; reselect without it."
        )
    spec = (spec or ModelSpec.of(model)).narrowed(config.layers)
    layers = sparse_layers(model)
    size = max((p.block_size or 0 for layer in layers.values() for p in layer.patterns.values()), default=0)
    if size:  # what trains decides, also where the caller had chosen it
        config = config.with_block_size(size)
    budget = config.budget(spec)
    counts = {}
    for c in budget.candidates:
        pattern = layers[c.module].patterns.get(c.kind) if c.module in layers else None
        if pattern is None:
            continue
        if c.kind == "blocks":
            counts[c.key] = len(pattern.index)
        elif c.kind == "grid":
            counts[c.key] = len(pattern.delta)
            budget.grids[c.key] = grid.sides(pattern.index)
        else:
            there = (pattern.index >= c.start) & (pattern.index < c.start + c.unit * c.count)
            counts[c.key] = int(there.sum()) // c.unit
    budget.candidates = [c for c in budget.candidates if counts.get(c.key)]
    budget.per_candidate = counts
    leave_out(budget, read_excluded(config.exclude) if excluded is None else excluded, "per_layer")
    return budget


def log_damping(summary: Mapping[str, Any]) -> None:
    """Says where low rank had left Kronecker factors indefinite, so that their inverses took more damping than
    asked."""
    if summary["raised"]:
        found = summary["effective_damping"]
        console.log(
            f"second order: {summary['raised']} of {summary['matrices']} matrices needed more damping than "
            f"{summary['damping']:g} to be positive definite: {found['min']:g} to {found['max']:g}, "
            f"median {found['median']:g} (a higher rank needs less)"
        )


def first_samples(batches: Iterable[Mapping[str, Any]], count: float | None) -> Iterable[Mapping[str, Any]]:
    """The batches' first `count` samples, cutting the last batch where needed; all, where it is a share or None."""
    left: Any = count if isinstance(count, int) else float("inf")
    for batch in batches:
        size = len(batch.get("input_ids", ())) if isinstance(batch, Mapping) else 0  # else refused as it is split
        if size > left:
            batch = {name: value[:left] if hasattr(value, "shape") else value for name, value in batch.items()}
        yield batch
        left -= size
        if left <= 0:
            return


def _record(selection: Selection, request: Request) -> None:
    """Records in `selection.meta` what was chosen by what, with every module's shape and trainable entries."""
    spec = request.spec
    trainable = selection.trainable(spec.linears)
    selection.meta |= {
        "method": request.settings.name,
        "method_config": asdict(request.settings),
        "scope_parameters": request.budget.scope_parameters,
        "total_parameters": spec.total_parameters,
        "trainable_parameters": sum(trainable.values()),
        "modules": {name: {"shape": list(spec.linears[name])} for name in selection.modules},
    }

"""Adapters on a model: attach, train, save, load, switch, fuse, merge, detach. What each does is its kind's."""

from __future__ import annotations

import math
import numbers
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparseft.adapters import by_row
from sparseft.adapters.description import is_whole_model, read_config
from sparseft.adapters.full import Full
from sparseft.adapters.peft import Peft
from sparseft.adapters.sparse import Sparse
from sparseft.adapters.state import DEFAULT, Kind, check_new_name, require_state, state_of
from sparseft.adapters.units import Units
from sparseft.adapters.waiting import KEEP
from sparseft.console import warn
from sparseft.distributed.shards import full_shape
from sparseft.errors import UserError, nearest
from sparseft.files.atomic import check_replaceable, replaced_folder
from sparseft.files.hub import REPLACED, adapter_folder
from sparseft.files.tensors import DESCRIPTIONS
from sparseft.layers import sparse_layers
from sparseft.methods import checked
from sparseft.models.decoder import has_other_head, inside_compiled
from sparseft.models.spec import ModelSpec
from sparseft.selection.selection import Selection

KINDS: dict[str, type[Kind]] = {"sparse": Sparse, "peft": Peft, "full": Full}  # by `MethodConfig.kind`


@inside_compiled
def attach(
    model: nn.Module,
    config: Any,
    selection: Selection | None = None,
    *,
    spec: ModelSpec | None = None,
    fingerprints: list[str] | None = None,
) -> nn.Module:
    """Makes a plain model trainable by the method that `config` configures, and returns it.

    Sparse methods convert in place; without a selection only importance random or weight can choose one here.
    LoRA and DoRA return peft's wrapper around the model.

    spec, fingerprints: the model's (`models.fingerprint.base_fingerprints`), where the caller has them: they are not
    made a second time.

    Whoever gives the spec sees to `config.reselect_steps`; without it a warning says that nothing is chosen anew.

    Raises:
        UserError: a value out of range, a selection that does not fit, a model that is attached already or that has a
            head of another kind than for tokens.
    """
    config = checked(config)
    if state_of(model) is not None or sparse_layers(model) or hasattr(model, "peft_config"):
        raise UserError("the model has an adapter already: detach or merge it first.")
    if selection is not None and not isinstance(selection, Selection):
        raise UserError(f"expected a sparseft.Selection, got {type(selection).__name__}: Selection({{…}}) makes one.")
    if selection is not None and not config.sparse:
        raise UserError(f"method {config.name} takes no selection.")
    if spec is None and has_other_head(model):  # who has a spec has asked whether the model is causal
        raise UserError(
            f"{type(model).__name__} has no head that predicts tokens but one of another kind, which would be left as "
            "it is and not be saved: expected a causal language model (AutoModelForCausalLM)."
        )
    if spec is None and config.reselect_steps:
        warn(
            f"method.reselect_steps={config.reselect_steps}: choosing anew is done by `sparseft train` alone; in "
            "another loop the first selection trains to the end (reselect_steps=0 says so)."
        )
    model = KINDS[config.kind].attach(model, config, selection, spec, fingerprints)
    by_row.listen(model)
    return model


@inside_compiled
def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_count(model: nn.Module) -> int:
    """How many weights train: the part of an edge block outside its weight does not count."""
    deltas = {id(p.delta) for layer in sparse_layers(model).values() for p in layer.patterns.values()}
    others = sum(full_shape(p).numel() for p in trainable_parameters(model).values() if id(p) not in deltas)
    return others + sum(layer.trainable_entries for layer in sparse_layers(model).values())


@inside_compiled
def save_adapter(
    model: nn.Module, path: str | Path, name: str | None = None, *, state_dict: dict[str, Tensor] | None = None
) -> Path:
    """Writes an adapter (the active one, or `name`) into the folder `path`, whole or not at all.

    LoRA and DoRA leave peft's own files, full fine-tuning a Hugging Face model folder. state_dict: a fully trained
    model's, where its parameters are in shards.

    Raises:
        UserError: no such adapter; `path` is a file, holds other files, cannot be replaced, or is the current folder.
    """
    check_replaceable(Path(path).expanduser(), DESCRIPTIONS, REPLACED)
    return write_adapter(model, path, name, state_dict)


def write_adapter(
    model: nn.Module, path: str | Path, name: str | None = None, state_dict: dict[str, Tensor] | None = None
) -> Path:
    """`save_adapter` at the end of a run, which is not lost for where its process stands."""
    state = require_state(model)
    name = state.active if name is None else name
    if name is None:
        raise UserError("no adapter is active: name the one to save.")
    state.kind.check_name(model, name)
    path = Path(path).expanduser()
    with replaced_folder(path, DESCRIPTIONS, REPLACED) as aside:
        state.kind.save(model, state, name, aside, state_dict)
    return path


@inside_compiled
def load_adapter(
    model: nn.Module, path: str | Path, name: str = DEFAULT, *, keep: str = "device", activate: bool = True
) -> nn.Module:
    """Loads an adapter onto a plain or attached model, makes it the active one, and returns the model.

    path: its folder, or where it lies on the Hugging Face hub, `owner/name`: it is then fetched into the hub's cache
    (with HF_HUB_OFFLINE=1 it must be there).

    A sparse adapter is refused where it was made for another base or the files were truncated or altered. A folder
    that peft made is loaded through peft; the return value is then peft's wrapper.

    Args:
        keep: Where a sparse adapter's deltas lie while it is not the active one: `device` (beside the weights),
            `host` (in host memory, pinned where the weights are on a CUDA device) or `disk` (mapped from its file,
            which is read when the adapter becomes active).
        activate: False leaves the adapter that is active as it is: to load many.

    Raises:
        UserError: the folder does not fit the model, `keep` is no such place, or `name` cannot be one.
        RunError: the hub cannot be reached; later, where the file of an adapter on `disk` was altered meanwhile.
    """
    if keep not in KEEP:
        raise UserError(f"keep='{keep}': expected {', '.join(KEEP)}.{nearest(keep, KEEP)}")
    check_new_name(name)
    folder = adapter_folder(path)
    content = read_config(folder)
    kind = "peft" if "peft_type" in content else "full" if is_whole_model(folder) else "sparse"
    model = KINDS[kind].load(model, folder, content, name, keep, activate)
    by_row.listen(model)
    return model


def load_trained(model: nn.Module, folder: Path) -> None:
    """Fills what an attached model trains from an adapter folder that the same method saved, in place.

    Of a model in shards its optimizer knows nothing of it: that is for after the last step. UserError where the files
    are not what the same method has written of the same model.
    """
    state = require_state(model)
    state.kind.load_trained(model, state, folder)


@inside_compiled
def set_adapter(model: nn.Module, name: str | None) -> nn.Module:
    """Makes the adapter `name` the active one; None: the base, bit for bit (deltas are kept)."""
    state = require_state(model)
    state.kind.switch(model, state, name)
    state.active = name
    return model


@inside_compiled
def fuse(model: nn.Module, weights: dict[str, float], name: str = "fused") -> nn.Module:
    """Adds `name`: the weighted sum of adapters with their patterns united; it becomes the active one."""
    state = require_state(model)
    if not weights:
        raise UserError("fuse: name at least one adapter with its weight.")
    for known, weight in weights.items():
        if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
            raise UserError(f"fuse: the weight of '{known}' is {weight!r}: expected a finite number.")
    check_new_name(name)
    state.kind.fuse(model, state, weights, name)
    return model


def units(model: nn.Module) -> dict[str, Units]:
    """The units of the active adapter by the name of the parameter that holds them, its values taken as trained.

    UserError where the adapter is no sum of parts: full fine-tuning, DoRA, a LoRA with biases or whole modules.
    """
    state = require_state(model)
    if state.active is None:
        raise UserError("no adapter is active: set one before its units are asked for.")
    return state.kind.units(model, state)


def merge(model: nn.Module) -> nn.Module:
    """The plain Hugging Face model with the active adapter's deltas in its weights.

    A tied head or embedding of which a LoRA changed only one is untied, in the config too, so that it stays so on disk.
    What the plain model has no weights for is a `UserError`.
    """
    return _leave(model, merged=True)


def mergeable(model: nn.Module) -> bool:
    """Whether `merge` can write the active adapter into the plain model's weights."""
    state = require_state(model)
    return state.kind.unmergeable(model, state) is None


def detach(model: nn.Module) -> nn.Module:
    """The plain Hugging Face model, bit for bit as before `attach`."""
    return _leave(model, merged=False)


@inside_compiled
def _leave(model: nn.Module, *, merged: bool) -> nn.Module:
    state = require_state(model)
    by_row.ignore(model)
    try:
        model = state.kind.leave(model, state, merged=merged)
    except UserError:
        by_row.listen(model)
        raise
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(state.requires_grad.get(name, True))
    return model

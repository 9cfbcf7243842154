"""Adapters on a model: attach, train, save, load, switch, fuse, merge, detach.

A sparse adapter is patterns and deltas of some modules. The active one is in the weights; the others are parked.
LoRA and DoRA go through `peft`, behind the same functions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseft.adapters.combine import Values, unite
from sparseft.adapters.files import is_whole_model, read_config, read_sparse, write_sparse, write_whole
from sparseft.adapters.peft import Overwritten, fuse_peft, leave, load_peft, save, switch, unmergeable
from sparseft.distributed.zero3 import full_shape, gathered
from sparseft.errors import UserError, nearest, shown
from sparseft.files.atomic import replaced_folder
from sparseft.files.tensors import DESCRIPTIONS
from sparseft.layers import Pattern, restore, share_inputs, sparse_layers
from sparseft.layers.convert import check_modules, make_sparse, plain_weight, weight_parameter
from sparseft.layers.experts import close_experts
from sparseft.layers.inactive import union
from sparseft.layers.pattern import same_patterns
from sparseft.layers.reordering import make_way
from sparseft.methods import method_of
from sparseft.methods.selecting import compute_selection
from sparseft.models.compiled import STATE, inside_compiled
from sparseft.models.fingerprint import base_fingerprints
from sparseft.models.quantized import check_plain
from sparseft.models.spec import ModelSpec
from sparseft.selection.selection import Selection

DEFAULT = "default"


@dataclass
class Adapter:
    """A named adapter: its patterns by module and kind, and what `adapter_config.json` says of it."""

    patterns: dict[str, dict[str, Pattern]]
    method: str
    method_config: dict[str, Any]


@dataclass
class State:
    """What an attached model remembers: its base, the adapters, which one is active, and the flags to put back."""

    method: str
    fingerprints: list[str]  # `base_fingerprints`
    dtype: str  # of the base as it was loaded
    base_model: str
    requires_grad: dict[str, bool]
    kind: str = "sparse"  # sparse | peft | whole, as Method.kind
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None
    method_config: dict[str, Any] = field(default_factory=dict)
    overwritten: Overwritten | None = None  # of kind peft


def state_of(model: nn.Module) -> State | None:
    """The state of an attached model, or null of a plain one."""
    return getattr(model, STATE, None)


def _require_state(model: nn.Module) -> State:
    state = state_of(model)
    if state is None:
        raise UserError("the model has no adapter: attach one or load one first.")
    return state


def _new_state(model: nn.Module, method: str) -> State:
    check_plain(model)
    return State(
        method=method,
        fingerprints=base_fingerprints(model),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        base_model=getattr(model, "name_or_path", "") or "",
        requires_grad={name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)},
    )


@inside_compiled
def attach(model: nn.Module, config: Any, selection: Selection | None = None) -> nn.Module:
    """Makes a plain model trainable by the method that `config` configures, and returns it.

    Sparse methods convert in place; without a selection only importance random or weight can choose one here.
    LoRA and DoRA return peft's wrapper around the model.

    Raises:
        UserError: a value out of range, a selection that does not fit, a model that is attached already.
    """
    method = method_of(config)
    config.validate()
    if state_of(model) is not None or sparse_layers(model) or hasattr(model, "peft_config"):
        raise UserError("the model has an adapter already: detach or merge it first.")
    if selection is not None and not isinstance(selection, Selection):
        raise UserError(f"expected a sparseft.Selection, got {type(selection).__name__}: Selection({{…}}) makes one.")
    if not method.sparse:
        if selection is not None:
            raise UserError(f"method {method.name} takes no selection.")
        state = _new_state(model, method.name)
        state.kind, state.active, state.method_config = method.kind, DEFAULT, asdict(config)
        state.overwritten = Overwritten.of(model) if method.kind == "peft" else None
        model = method.convert(model, config, None)
        setattr(model, STATE, state)
        return model
    spec = ModelSpec.of(model)
    if selection is None:
        if config.needs_data:
            raise UserError(
                f"importance '{config.importance}' needs data: pass selection=compute_selection(model, config, "
                "batches), or use importance random or weight."
            )
        selection = compute_selection(model, config)
    if not selection.modules:
        raise UserError("the selection is empty, so nothing would be trained.")
    if hasattr(config, "block_size"):  # each where the other leaves it open
        selection = replace(selection, block_size=selection.block_size or config.block_size)
        config = replace(config, block_size=config.block_size or selection.block_size)
    if selection.has_blocks and selection.block_size is None:
        raise UserError("a selection of blocks needs its block_size: Selection({…}, block_size=64).")
    spec.check_trains(selection.modules)
    check_modules(model, selection.modules, spec.linears)
    state = _new_state(model, method.name)
    method.convert(model, config, selection)
    _remember(model, state, DEFAULT, asdict(config))
    return model


def _remember(model: nn.Module, state: State, name: str, method_config: dict[str, Any]) -> None:
    patterns = {module: layer.patterns for module, layer in sparse_layers(model).items() if layer.patterns}
    state.adapters[name] = Adapter(patterns, state.method, method_config)
    state.active, state.method_config = name, method_config
    setattr(model, STATE, state)


@inside_compiled
def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_count(model: nn.Module) -> int:
    """How many weights train: the part of an edge block outside its weight does not count."""
    deltas = {id(p.delta) for layer in sparse_layers(model).values() for p in layer.patterns.values()}
    others = sum(full_shape(p).numel() for p in trainable_parameters(model).values() if id(p) not in deltas)
    return others + sum(layer.trainable_entries for layer in sparse_layers(model).values())


# ---- saving ----


@inside_compiled
def save_adapter(model: nn.Module, path: str | Path, name: str | None = None) -> Path:
    """Writes an adapter (the active one, or `name`) into the folder `path`, whole or not at all.

    LoRA and DoRA leave peft's own files, full fine-tuning a Hugging Face model folder.
    """
    state = _require_state(model)
    name = name or state.active
    if name is None:
        raise UserError("no adapter is active: name the one to save.")
    first, *others = state.fingerprints
    header = {"base_model": state.base_model, "base_fingerprint": first, "base_dtype": state.dtype}
    if others:
        header["other_fingerprints"] = others
    if state.kind != "sparse":
        header |= {"method": state.method, "method_config": state.method_config}
        known = [DEFAULT] if state.kind == "whole" else list(model.peft_config)
        if name not in known:
            raise UserError(f"no adapter is called '{name}'.{nearest(name, known)}")
        with replaced_folder(path, DESCRIPTIONS) as aside:
            if state.kind == "whole":
                write_whole(model, header, aside)
            else:
                save(model, state.overwritten, state.active, name, header, aside)
        return Path(path)
    _check_name(state, name)
    adapter = state.adapters[name]
    layers = sparse_layers(model)
    shapes = {module: (layers[module].out_features, layers[module].in_features) for module in adapter.patterns}
    values = {
        module: {kind: Values(*union(p), p.block_size) for kind, p in kinds.items()}
        for module, kinds in adapter.patterns.items()
    }
    with replaced_folder(path, DESCRIPTIONS) as aside:
        write_sparse(values, shapes, header | {"method": adapter.method, "method_config": adapter.method_config}, aside)
    return Path(path)


# ---- loading ----


@inside_compiled
def load_adapter(model: nn.Module, path: str | Path, name: str = DEFAULT) -> nn.Module:
    """Loads an adapter folder onto a plain or attached model, makes it the active one, and returns the model.

    A sparse adapter is refused where it was made for another base or the files were truncated or altered. A folder
    that peft made is loaded through peft; the return value is then peft's wrapper.
    """
    folder = Path(path)
    content = read_config(folder)
    state = state_of(model)
    if "peft_type" in content:
        return _load_peft(model, folder, name, content)
    if is_whole_model(folder):
        raise UserError(f"{folder}: a whole model, not an adapter: load it as one (model.path={folder}).")
    if state is not None and state.kind != "sparse":
        raise UserError(f"{folder}: a sparse adapter cannot be loaded onto a model with {state.method} attached.")
    if state is None and hasattr(model, "peft_config"):
        raise UserError(f"{folder}: a sparse adapter cannot be loaded onto a model with peft's layers: merge it first.")
    values = read_sparse(folder, content)
    if state is None:
        state = _new_state(model, str(content.get("method")))
    _check_base(state, folder, content)
    method_config = content.get("method_config")
    _install_values(
        model, state, name, values, folder, str(content.get("method")),
        method_config if isinstance(method_config, dict) else {},
    )  # fmt: skip
    return model


def _install_values(
    model: nn.Module,
    state: State,
    name: str,
    values: dict[str, dict[str, Values]],
    source: Path | str,
    method: str,
    method_config: dict[str, Any],
) -> None:
    """Makes patterns of `values`, checks them all against the model, and only then changes it."""
    spec = ModelSpec.of(model, tried=False)
    try:
        check_modules(model, values, spec.known)
        patterns: dict[str, dict[str, Pattern]] = {}
        for module, kinds in values.items():
            patterns[module] = {}
            for kind, value in kinds.items():
                try:
                    with gathered([weight_parameter(model, module)]):
                        pattern = Pattern(kind, value.index, plain_weight(model, module), value.block_size)
                except UserError as error:
                    raise UserError(f"{module}: {error}") from None
                if pattern.delta.shape != value.delta.shape:
                    raise UserError(
                        f"{module}.{kind}: a delta of shape {tuple(value.delta.shape)} does not fit the model's "
                        f"{tuple(pattern.delta.shape)}."
                    )
                with torch.no_grad():
                    pattern.delta.copy_(value.delta)
                patterns[module][kind] = pattern
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    known = state.adapters.get(name)
    if known is not None and same_patterns(known.patterns, patterns):
        # The same entries: the deltas are filled in place, so that an optimizer that holds them stays valid.
        with torch.no_grad():
            for module, kinds in patterns.items():
                for kind, pattern in kinds.items():
                    known.patterns[module][kind].delta.copy_(pattern.delta)
        known.method_config = method_config
    else:
        state.adapters[name] = Adapter(patterns, method, method_config)
        if state.active == name:
            state.active = None
            _activate(model, {})
    if state_of(model) is None:
        model.requires_grad_(False)
        setattr(model, STATE, state)
    set_adapter(model, name)


def _load_peft(model: nn.Module, folder: Path, name: str, content: dict[str, Any]) -> nn.Module:
    state = state_of(model)
    if state is not None and state.kind == "sparse":
        raise UserError(f"{folder}: a peft adapter cannot be loaded onto a model with sparse layers: detach it first.")
    if state is not None and state.kind == "whole":
        raise UserError(f"{folder}: a peft adapter cannot be loaded onto a model with {state.method} attached.")
    own = content["sparseft"] if isinstance(content.get("sparseft"), dict) else {}
    if state is None and hasattr(model, "peft_config"):
        raise UserError(f"{folder}: the model has peft's layers from elsewhere: merge them, or load all by sparseft.")
    state = state or _new_state(model, str(own.get("method") or content["peft_type"]).lower())
    if own:
        _check_base(state, folder, own)
    kept = state.overwritten or Overwritten.of(model)
    model = load_peft(model, folder, name, kept, state.active)
    state.overwritten = kept
    state.kind, state.active, state.method_config = "peft", name, dict(own.get("method_config") or {})
    setattr(model, STATE, state)
    return model


def _check_base(state: State, folder: Path, content: dict[str, Any]) -> None:
    """Refuses an adapter whose fingerprints say that it was made for other weights than the model has."""
    first, others = content.get("base_fingerprint"), content.get("other_fingerprints")
    known = [first, *(others if isinstance(others, list) else [])]
    if isinstance(first, str) and any(entry in known for entry in state.fingerprints):
        return
    base, dtype = shown(content.get("base_model") or "unknown"), content.get("base_dtype")
    message = f"{folder}: made for another base model ({base}): the weights' fingerprints differ."
    if dtype != state.dtype:
        then = shown(dtype) if isinstance(dtype, str) else "another dtype"
        message += f" If it is this one: it was loaded in {then} then, in {state.dtype} now (model.dtype)."
    raise UserError(message)


# ---- switching ----


def _check_name(state: State, name: str) -> None:
    if name not in state.adapters:
        raise UserError(f"no adapter is called '{name}'.{nearest(name, state.adapters)}")


def _activate(model: nn.Module, patterns: dict[str, dict[str, Pattern]]) -> None:
    """Gives every sparse layer its patterns of the adapter, converting modules that have none yet."""
    layers = sparse_layers(model)
    make_way(layers, patterns)
    for module, layer in layers.items():
        layer.install(patterns.get(module, {}))
    for module in patterns.keys() - layers.keys():
        make_sparse(model, module).install(patterns[module])
    close_experts(model, idle=True)  # the base's own way of computing, to the bit
    share_inputs(model)


@inside_compiled
def set_adapter(model: nn.Module, name: str | None) -> nn.Module:
    """Makes the adapter `name` the active one; null: the base, bit for bit (deltas are kept)."""
    state = _require_state(model)
    if state.kind != "sparse":
        if state.kind == "whole":
            raise UserError("full fine-tuning has no adapters to switch.")
        if name is not None and name not in model.peft_config:
            raise UserError(f"no adapter is called '{name}'.{nearest(name, model.peft_config)}")
        switch(model, state.overwritten, state.active, name)
        state.active = name
        return model
    if name is not None:
        _check_name(state, name)
    _activate(model, state.adapters[name].patterns if name is not None else {})
    state.active = name
    return model


@inside_compiled
def fuse(model: nn.Module, weights: dict[str, float], name: str = "fused") -> nn.Module:
    """Adds `name`: the weighted sum of adapters with their patterns united; it becomes the active one."""
    state = _require_state(model)
    if not weights:
        raise UserError("fuse: name at least one adapter with its weight.")
    for known, weight in weights.items():
        if not math.isfinite(weight):
            raise UserError(f"fuse: the weight of '{known}' is {weight}: expected a finite number.")
    if state.kind != "sparse":
        if state.kind == "whole":
            raise UserError("full fine-tuning has no adapters to fuse.")
        fuse_peft(model, state.overwritten, state.active, weights, name)
        state.active = None
        return set_adapter(model, name)
    for known in weights:
        _check_name(state, known)
    shapes = ModelSpec.of(model, tried=False).known
    parts: dict[str, list[tuple[float, dict[str, Values]]]] = defaultdict(list)
    for known, weight in weights.items():
        for module, kinds in state.adapters[known].patterns.items():
            values = {kind: Values(*(v.cpu() for v in union(p)), p.block_size) for kind, p in kinds.items()}
            parts[module].append((weight, values))
    united = {module: unite(items, shapes[module]) for module, items in parts.items()}
    methods = {state.adapters[known].method for known in weights}
    method = methods.pop() if len(methods) == 1 else state.method
    sizes = {value.block_size for kinds in united.values() for value in kinds.values() if value.block_size}
    if len(sizes) > 1:  # an adapter's file has one block size
        united = {m: unite([(1.0, kinds)], shapes[m], math.gcd(*sizes)) for m, kinds in united.items()}
    _install_values(model, state, name, united, "fuse", method, {"fused": dict(weights)})
    return model


# ---- leaving ----


def merge(model: nn.Module) -> nn.Module:
    """The plain Hugging Face model with the active adapter's deltas in its weights.

    A tied head or embedding of which a LoRA changed only one is untied, in the config too, so that it stays so on disk.
    What the plain model has no weights for is a `UserError`.
    """
    return _leave(model, merged=True)


def mergeable(model: nn.Module) -> bool:
    """Whether `merge` can write the active adapter into the plain model's weights."""
    state = _require_state(model)
    return state.kind != "peft" or state.active is None or unmergeable(model, state.active) is None


def detach(model: nn.Module) -> nn.Module:
    """The plain Hugging Face model, bit for bit as before `attach`."""
    return _leave(model, merged=False)


@inside_compiled
def _leave(model: nn.Module, *, merged: bool) -> nn.Module:
    state = _require_state(model)
    if state.kind == "sparse":
        restore(model, merged=merged)
        delattr(model, STATE)
    elif state.kind == "whole":
        if not merged:
            raise UserError("full fine-tuning keeps no copy of the base: load it again instead of detaching.")
        delattr(model, STATE)
    else:
        model = leave(model, state.overwritten, state.active, merged=merged)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(state.requires_grad.get(name, True))
    return model

"""Sparse adapters: patterns and deltas of some modules. The active one is in the weights, the others are inactive.

Several fuse into one by a weighted sum of their deltas; where patterns differ, they are united.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparseft.adapters.description import CONFIG, FORMAT_VERSION, TENSORS, check_base, read_config
from sparseft.adapters.state import DEFAULT, Kind, State, state_for, state_of
from sparseft.distributed.zero3 import any_sharded, gathered
from sparseft.errors import UserError, shown
from sparseft.files.atomic import write_json
from sparseft.files.hashing import BODY, HASHED, body_hash, file_hash
from sparseft.files.tensors import KINDS, read_described, split_name
from sparseft.layers import Pattern, restore, share_inputs, sparse_layers
from sparseft.layers.convert import check_modules, make_sparse, make_way, plain_weight, weight_parameter
from sparseft.layers.experts import close_experts
from sparseft.layers.inactive import union
from sparseft.layers.pattern import entry_dim, index_keys, positions_of, same_patterns
from sparseft.methods.base import SparseConfig
from sparseft.models.decoder import STATE
from sparseft.models.spec import ModelSpec
from sparseft.selection.compute import Request, compute
from sparseft.selection.selection import Selection


class SparseDelta(NamedTuple):
    """One pattern's content: index (k,) or (n, 2), int64; delta in the shapes of `kernels/reference.py`, fp32."""

    index: Tensor
    delta: Tensor
    block_size: int | None = None


def split_blocks(value: SparseDelta, size: int, shape: tuple[int, int]) -> SparseDelta:
    """The same blocks cut into size×size ones; those wholly outside a weight of `shape` (out, in) are dropped."""
    assert value.block_size is not None and value.block_size % size == 0
    per_side = value.block_size // size
    if per_side == 1:
        return value
    n = len(value.index)
    parts = value.delta.reshape(n, per_side, size, per_side, size).permute(0, 1, 3, 2, 4).reshape(-1, size, size)
    offsets = torch.cartesian_prod(torch.arange(per_side), torch.arange(per_side))
    index = (value.index[:, None, :] * per_side + offsets[None]).reshape(-1, 2)
    inside = (index[:, 0] * size < shape[0]) & (index[:, 1] * size < shape[1])
    return SparseDelta(index[inside], parts[inside], size)


def unite(
    parts: Sequence[tuple[float, dict[str, SparseDelta]]], shape: tuple[int, int], size: int | None = None
) -> dict[str, SparseDelta]:
    """Σ weight × delta of one module, by kind, over the union of the indices.

    Blocks of different sizes are cut to their greatest common divisor, or to `size`. Different kinds stay apart:
    the layer adds them up.
    """
    united: dict[str, SparseDelta] = {}
    for kind in dict.fromkeys(kind for _, kinds in parts for kind in kinds):
        items = [(weight, kinds[kind]) for weight, kinds in parts if kind in kinds]
        block_size = None
        if kind == "blocks":
            block_size = math.gcd(*(value.block_size or 0 for _, value in items), size or 0)
            items = [(weight, split_blocks(value, block_size, shape)) for weight, value in items]
        index, position = torch.unique(torch.cat([v.index for _, v in items]), dim=0, return_inverse=True)
        deltas = [weight * value.delta.float() for weight, value in items]
        if kind == "columns":
            total = deltas[0].new_zeros(shape[0], len(index)).index_add_(1, position, torch.cat(deltas, dim=1))
        else:
            joined = torch.cat(deltas)
            total = joined.new_zeros(len(index), *joined.shape[1:]).index_add_(0, position, joined)
        united[kind] = SparseDelta(index, total, block_size)
    return united


@dataclass
class Adapter:
    """A named adapter: its patterns by module and kind, and what its description says of it."""

    patterns: dict[str, dict[str, Pattern]]
    method: str
    method_config: dict[str, Any]


class Sparse(Kind):
    """Adapters that are deltas on patterns of the model's own linears."""

    called = "a sparse adapter"

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        config: SparseConfig,
        selection: Selection | None,
        spec: ModelSpec | None,
        fingerprints: list[str] | None = None,
    ) -> nn.Module:
        spec = ModelSpec.of(model) if spec is None else spec
        if selection is None:
            if config.needs_data:
                raise UserError(
                    f"importance '{config.importance}' needs data: pass selection=compute_selection(model, config, "
                    "batches), or use importance random or weight."
                )
            selection = compute(model, Request.of(spec, config))
        if not selection.modules:
            raise UserError("the selection is empty, so nothing would be trained.")
        size = selection.block_size or config.block_size  # given by either
        selection, config = replace(selection, block_size=size), config.with_block_size(config.block_size or size)
        if selection.has_blocks and size is None:
            raise UserError("a selection of blocks needs its block_size: Selection({…}, block_size=64).")
        spec.check_trains(selection.modules)
        check_modules(model, selection.modules, spec.linears)
        self = cls()
        state = State.of(model, self, config.name, spec, fingerprints)
        config.convert(model, selection, spec)
        patterns = {module: layer.patterns for module, layer in sparse_layers(model).items() if layer.patterns}
        self.adapters[DEFAULT] = Adapter(patterns, config.name, asdict(config))
        state.config, state.active, state.method_config = config, DEFAULT, asdict(config)
        setattr(model, STATE, state)
        return model

    @classmethod
    def load(cls, model: nn.Module, folder: Path, content: dict[str, Any], name: str) -> nn.Module:
        state = state_for(model, cls, folder)
        values = read_sparse(folder, content)
        method = str(content.get("method"))
        if state is None:
            state = State.of(model, cls(), method)
        check_base(state.fingerprints, state.dtype, folder, content)
        method_config = content.get("method_config")
        adapter = Adapter({}, method, method_config if isinstance(method_config, dict) else {})
        state.kind._install(model, state, name, adapter, values, str(folder))
        return model

    def names(self, model: nn.Module) -> Collection[str]:
        return self.adapters

    def save(
        self, model: nn.Module, state: State, name: str, folder: Path, state_dict: dict[str, Tensor] | None
    ) -> None:
        adapter = self.adapters[name]
        layers = sparse_layers(model)
        shapes = {module: (layers[module].out_features, layers[module].in_features) for module in adapter.patterns}
        header = state.header | {"method": adapter.method, "method_config": adapter.method_config}
        write_sparse(self._values(name), shapes, header, folder)

    def switch(self, model: nn.Module, state: State, name: str | None) -> None:
        if name is not None:
            self.check_name(model, name)
        _activate(model, self.adapters[name].patterns if name is not None else {})

    def fuse(self, model: nn.Module, state: State, weights: dict[str, float], name: str) -> None:
        for known in weights:
            self.check_name(model, known)
        shapes = _spec(model, state).known
        parts: dict[str, list[tuple[float, dict[str, SparseDelta]]]] = defaultdict(list)
        for known, weight in weights.items():
            for module, kinds in self._values(known).items():
                cpu = {kind: SparseDelta(v.index.cpu(), v.delta.cpu(), v.block_size) for kind, v in kinds.items()}
                parts[module].append((weight, cpu))
        united = {module: unite(items, shapes[module]) for module, items in parts.items()}
        methods = {self.adapters[known].method for known in weights}
        method = methods.pop() if len(methods) == 1 else state.method
        sizes = {value.block_size for kinds in united.values() for value in kinds.values() if value.block_size}
        if len(sizes) > 1:  # an adapter's file has one block size
            united = {m: unite([(1.0, kinds)], shapes[m], math.gcd(*sizes)) for m, kinds in united.items()}
        self._install(model, state, name, Adapter({}, method, {"fused": dict(weights)}), united, "fuse")

    def leave(self, model: nn.Module, state: State, *, merged: bool) -> nn.Module:
        restore(model, merged=merged)
        delattr(model, STATE)
        return model

    def load_trained(self, model: nn.Module, state: State, folder: Path) -> None:
        content = read_config(folder)
        if not any_sharded(model):
            self.load(model, folder, content, state.active or DEFAULT)
            return
        values = read_sparse(folder, content)
        with gathered([p for p in model.parameters() if p.requires_grad], changed=True):
            _fill(model, values, folder)

    def there(self, state: State) -> str:
        return "sparse layers: detach it first"

    def _values(self, name: str) -> dict[str, dict[str, SparseDelta]]:
        """All that an adapter has trained, by module and kind: entries that re-selection has put aside too."""
        return {
            module: {kind: SparseDelta(*union(p), p.block_size) for kind, p in kinds.items()}
            for module, kinds in self.adapters[name].patterns.items()
        }

    def _install(
        self,
        model: nn.Module,
        state: State,
        name: str,
        adapter: Adapter,
        values: dict[str, dict[str, SparseDelta]],
        source: str,
    ) -> None:
        """Makes the adapter's patterns of `values`, checks them against the model, and only then changes it."""
        adapter.patterns = patterns = _patterns(model, _spec(model, state), values, source)
        known = self.adapters.get(name)
        if known is not None and same_patterns(known.patterns, patterns):
            # The same entries: the deltas are filled in place, so that an optimizer that holds them stays valid.
            with torch.no_grad():
                for module, kinds in patterns.items():
                    for kind, pattern in kinds.items():
                        known.patterns[module][kind].delta.copy_(pattern.delta)
            known.method_config = adapter.method_config
        else:
            self.adapters[name] = adapter
            if state.active == name:
                _activate(model, {})
        if state_of(model) is None:
            model.requires_grad_(False)
            setattr(model, STATE, state)
        self.switch(model, state, name)
        state.active = name


def _spec(model: nn.Module, state: State) -> ModelSpec:
    """The model's spec, made where there is none yet: of it only `known` counts here."""
    if state.spec is None:
        state.spec = ModelSpec.of(model, tried=False)
    return state.spec


def _patterns(
    model: nn.Module, spec: ModelSpec, values: dict[str, dict[str, SparseDelta]], source: str
) -> dict[str, dict[str, Pattern]]:
    """Patterns of the model's weights with the given deltas; a `UserError` that starts with `source` where one does
    not fit."""
    patterns: dict[str, dict[str, Pattern]] = {}
    try:
        check_modules(model, values, spec.known)
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
    return patterns


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


@torch.no_grad()
def _fill(model: nn.Module, values: dict[str, dict[str, SparseDelta]], folder: Path) -> None:
    """Fills the model's deltas, each entry by its index; a `UserError` where `values` are of other entries."""
    for module, layer in sparse_layers(model).items():
        for kind, pattern in layer.patterns.items():
            value = values.get(module, {}).get(kind)
            place = positions_of(index_keys(kind, pattern.index), index_keys(kind, value.index)) if value else None
            if place is None or len(place) != len(value.index) or (place < 0).any():
                raise UserError(f"{folder}: {module}.{kind} does not hold the entries that the model trains.")
            pattern.delta.copy_(value.delta.index_select(entry_dim(kind), place))


def write_sparse(
    values: dict[str, dict[str, SparseDelta]], shapes: dict[str, tuple[int, int]], header: dict[str, Any], folder: Path
) -> None:
    """Writes a sparse adapter's two files into an existing folder: int32 indices, float32 deltas."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    modules: dict[str, Any] = {}
    block_size = None
    for module, kinds in values.items():
        modules[module] = {"shape": list(shapes[module])}
        for kind, value in kinds.items():
            modules[module][kind] = len(value.index)
            block_size = value.block_size or block_size
            tensors[f"{module}.{kind}.index"] = value.index.to("cpu", torch.int32).contiguous()
            tensors[f"{module}.{kind}.delta"] = value.delta.to("cpu", torch.float32).contiguous()
    content = {"format_version": FORMAT_VERSION, **header, "block_size": block_size, "modules": modules}
    save_file(tensors, folder / TENSORS, {BODY: body_hash(content, HASHED)})
    write_json(folder / CONFIG, content | {"sha256": file_hash(folder / TENSORS)})


def read_sparse(folder: Path, content: dict[str, Any]) -> dict[str, dict[str, SparseDelta]]:
    """The indices and deltas of a sparse adapter's folder, by module and kind, checked against its config."""
    tensors, texts = read_described(folder / TENSORS, "adapter")
    if file_hash(folder / TENSORS) != content.get("sha256", file_hash(folder / TENSORS)):  # others may leave it out
        raise UserError(f"{folder}: {TENSORS} is not the file that {CONFIG} describes (altered).")
    found: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for tensor_name, tensor in tensors.items():
        module, kind, part = split_name(tensor_name, folder)
        found[module][kind][part] = tensor
    values: dict[str, dict[str, SparseDelta]] = {}
    block_size = content.get("block_size")
    if block_size is not None and (type(block_size) is not int or not 1 <= block_size <= 1 << 16):
        raise UserError(f"{folder}: block_size={shown(repr(block_size))} in {CONFIG} is not a block size.")
    for module, kinds in found.items():
        values[module] = {}
        for kind, parts in kinds.items():
            if set(parts) != {"index", "delta"}:
                raise UserError(f"{folder}: {module}.{kind} needs index and delta, got {', '.join(sorted(parts))}.")
            if parts["index"].dtype != torch.int32 or parts["delta"].dtype != torch.float32:
                raise UserError(f"{folder}: {module}.{kind} needs an int32 index and a float32 delta.")
            if parts["index"].dim() == 0:
                raise UserError(f"{folder}: {module}.{kind}.index must be a list of indices, got a single number.")
            if not torch.isfinite(parts["delta"]).all():
                raise UserError(f"{folder}: {module}.{kind}.delta holds values that are not finite.")
            size = block_size
            if kind == "blocks" and size is None and parts["delta"].dim() == 3:
                size = parts["delta"].shape[-1]
            count, shape = len(parts["index"]), tuple(parts["delta"].shape)
            if kind == "blocks" and shape != (count, size, size):  # before memory is taken for what the config says
                raise UserError(f"{folder}: {module}: a delta of shape {shape} does not fit {count} blocks of {size}.")
            values[module][kind] = SparseDelta(parts["index"].long(), parts["delta"], size)
    if not values:
        raise UserError(f"{folder}: the adapter holds no module.")
    _check_described(folder, content.get("modules"), values)
    if body_hash(content, HASHED) != texts.get(BODY, body_hash(content, HASHED)):
        raise UserError(f"{folder}: {CONFIG} is not what was written with {TENSORS} (altered).")
    return values


def _check_described(folder: Path, described: Any, values: dict[str, dict[str, SparseDelta]]) -> None:
    """Raises `UserError` where the tensors are not those that the config's `modules` lists."""
    if not isinstance(described, dict) or not all(isinstance(info, dict) for info in described.values()):
        raise UserError(f"{folder}: {CONFIG} needs modules, an object of objects.")
    for module in described.keys() ^ values.keys():
        raise UserError(f"{folder}: '{shown(module)}' is only in {CONFIG if module in described else TENSORS}.")
    for module, kinds in values.items():
        found = {kind: len(value.index) for kind, value in kinds.items()}
        listed = {kind: described[module][kind] for kind in KINDS if kind in described[module]}
        if found != listed:
            raise UserError(f"{folder}: {module} has {found}, but {CONFIG} lists {shown(listed)}.")

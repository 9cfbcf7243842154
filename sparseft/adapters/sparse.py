"""Sparse adapters: patterns and deltas of some modules. The active one is in the weights, the others are inactive.

Several fuse into one by a weighted sum of their deltas; where patterns differ, they are united.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.adapters import loaded_state, pretrained
from sparseft.adapters.description import CONFIG, FORMAT_VERSION, TENSORS, read_config
from sparseft.adapters.state import DEFAULT, Kind, Names, Now, State, state_for, state_of
from sparseft.adapters.units import Units
from sparseft.adapters.waiting import Adapter, Source, SparseDelta, Values, on_host
from sparseft.console import warn
from sparseft.distributed.shards import any_sharded, gathered
from sparseft.errors import UserError, shown
from sparseft.files.atomic import write_json
from sparseft.files.hashing import BODY, HASHED, body_hash, file_hash
from sparseft.files.tensors import KINDS, read_described, split_name
from sparseft.kernels import reference
from sparseft.layers import restore, sparse_layers, start_at_checkpoint, write_back
from sparseft.layers.by_row import ByRow
from sparseft.layers.convert import check_modules, device_of, exchange, layer_at
from sparseft.layers.pattern import check_index, entry_dim, index_keys, index_of_keys, positions_of, same_entries
from sparseft.methods.base import SparseConfig
from sparseft.models.decoder import STATE, in_experts
from sparseft.models.fingerprint import check_base
from sparseft.models.packed.quantized import is_packed
from sparseft.models.packed.unquantized import Unquantized
from sparseft.models.spec import ModelSpec
from sparseft.selection.compute import Request, compute
from sparseft.selection.engine_ranks import check_rank
from sparseft.selection.selection import Selection


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
        keys, position = torch.cat([index_keys(kind, v.index) for _, v in items]).unique(return_inverse=True)
        index, order = index_of_keys(kind, keys)
        deltas = [weight * value.delta.float() for weight, value in items]
        if kind == "columns":
            total = deltas[0].new_zeros(shape[0], len(keys)).index_add_(1, position, torch.cat(deltas, dim=1))
        else:
            joined = torch.cat(deltas)
            total = joined.new_zeros(len(keys), *joined.shape[1:]).index_add_(0, position, joined)
        united[kind] = SparseDelta(index, total.index_select(entry_dim(kind), order), block_size)
    return united


class Sparse(Kind):
    """Adapters that are deltas on patterns of the model's own linears."""

    called = "a sparse adapter"

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}
        self._rows: tuple[list[tuple[int, int]], list[Adapter], dict[str, ByRow]] | None = None

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
        check_rank(selection, spec.linears, config.max_rank)
        self = cls()
        state = State.of(model, self, config.name, spec, fingerprints)
        if config.residual and Unquantized.of(model) is None:
            raise UserError(
                "method.residual=true: this base is at full precision, or what it was quantized from is not known; it "
                "is for model.quantize=nf4, int8 or int4."
            )
        if config.reselect_steps and any(map(is_packed, model.modules())):
            raise UserError(
                f"method.reselect_steps={config.reselect_steps}: what inactive entries have learnt is kept in the "
                "weights, which are quantized here; use method.reselect_steps=0."
            )
        config.convert(model, selection, spec)
        if config.residual:
            start_at_checkpoint(model)
        patterns = {module: layer.patterns for module, layer in sparse_layers(model).items() if layer.patterns}
        self.adapters[DEFAULT] = Adapter(config.name, asdict(config), patterns=patterns)
        state.config, state.active, state.method_config = config, DEFAULT, asdict(config)
        setattr(model, STATE, state)
        _listen(model)
        return model

    @classmethod
    def load(
        cls, model: nn.Module, folder: Path, content: dict[str, Any], name: str, keep: str, activate: bool
    ) -> nn.Module:
        state = state_for(model, cls, folder)
        file = folder / TENSORS
        source = Source.of(file) if keep == "disk" and file.is_file() else None
        values = read_sparse(folder, content)
        method = str(content.get("method"))
        if state is None:
            state = State.of(model, cls(), method)
        check_base(state.fingerprints, state.dtype, folder, content)
        method_config = content.get("method_config")
        adapter = Adapter(method, method_config if isinstance(method_config, dict) else {}, keep=keep, source=source)
        state.kind._install(model, state, name, adapter, values, str(folder), activate=activate)
        return model

    def names(self, model: nn.Module) -> Collection[str]:
        return self.adapters

    def save(
        self, model: nn.Module, state: State, name: str, folder: Path, state_dict: dict[str, Tensor] | None
    ) -> None:
        if name == state.active:
            _warn_of_loops(model)
        adapter = self.adapters[name]
        header = state.header | {"method": adapter.method, "method_config": adapter.method_config}
        write_sparse(adapter.values(), _spec(model, state).known, header, folder)

    def switch(self, model: nn.Module, state: State, name: str | None) -> None:
        if name is not None:
            self.check_name(model, name)
        if name == state.active:
            return
        with torch.inference_mode(False):  # parameters made inside would be of no use outside
            old = self.adapters.get(state.active) if state.active is not None else None
            new = self.adapters[name].fetch(model) if name is not None else {}
            exchange(model, old.patterns if old is not None else {}, new)
            if old is not None:
                old.park()

    def fuse(self, model: nn.Module, state: State, weights: dict[str, float], name: str) -> None:
        for known in weights:
            self.check_name(model, known)
        shapes = _spec(model, state).known
        parts: dict[str, list[tuple[float, dict[str, SparseDelta]]]] = defaultdict(list)
        for known, weight in weights.items():
            for module, kinds in self.adapters[known].values().items():
                cpu = {kind: SparseDelta(v.index.cpu(), v.delta.cpu(), v.block_size) for kind, v in kinds.items()}
                parts[module].append((weight, cpu))
        united = {module: unite(items, shapes[module]) for module, items in parts.items()}
        residuals = {self.adapters[known].residual for known in weights}
        if len(residuals) > 1:
            raise UserError("fuse: adapters with method.residual=true and without start from different weights.")
        methods = {self.adapters[known].method for known in weights}
        method = methods.pop() if len(methods) == 1 else state.method
        sizes = {value.block_size for kinds in united.values() for value in kinds.values() if value.block_size}
        if len(sizes) > 1:  # an adapter's file has one block size
            united = {m: unite([(1.0, kinds)], shapes[m], math.gcd(*sizes)) for m, kinds in united.items()}
        self._install(
            model,
            state,
            name,
            Adapter(method, {"fused": dict(weights)} | ({"residual": True} if residuals == {True} else {})),
            united,
            "fuse",
        )

    def units(self, model: nn.Module, state: State) -> dict[str, Units]:
        return {
            f"{module}.{kind}": Units.of(pattern.delta, entry_dim(kind), reference.KINDS[kind].unit_of(pattern.index))
            for module, kinds in self.adapters[state.active].patterns.items()
            for kind, pattern in kinds.items()
        }

    @contextlib.contextmanager
    def by_row(self, model: nn.Module, state: State, names: Names, now: Now) -> Iterator[dict[str, Any]]:
        """The weights hold the base inside, and hooks on the linears concerned add the deltas' product."""
        used = {name: number for number, name in enumerate(sorted({name for name in names if name is not None}))}
        for name in used:
            if self.adapters[name].residual and Unquantized.of(model) is not None:
                raise UserError(
                    f"'{name}' starts from what quantization took of its entries (method.residual), which is in no "
                    "delta: use it alone."
                )
            for module in self.adapters[name].modules:
                if in_experts(module):
                    raise UserError(
                        f"'{name}' trains experts ({module}), which are given tokens without their rows: use it alone."
                    )
        active = state.active
        self.switch(model, state, None)
        state.active = None
        handles = []
        try:
            for module, linear in self._linears(model, state, list(used)).items():
                layer = model.get_submodule(module)
                handles.append(layer.register_forward_hook(_adding(linear, used, now)))
            yield {}
        finally:
            for handle in handles:
                handle.remove()
            self.switch(model, state, active)
            state.active = active

    def _linears(self, model: nn.Module, state: State, names: list[str]) -> dict[str, ByRow]:
        """What adapters, by their place among `names`, add to each linear; that of the last names is kept."""
        adapters = [self.adapters[name] for name in names]
        versions = [adapter.version for adapter in adapters]
        kept = self._rows  # read once: another thread's call may put its own there at any time
        if kept is None or kept[0] != versions or kept[1] != adapters:
            contents: dict[str, dict[int, Any]] = defaultdict(dict)
            for number, adapter in enumerate(adapters):
                for module, kinds in adapter.values().items():
                    contents[module][number] = kinds
            shapes = _spec(model, state).known
            linears = {module: ByRow(shapes[module], kinds) for module, kinds in contents.items()}
            kept = self._rows = versions, adapters, linears
        return kept[2]

    def leave(self, model: nn.Module, state: State, *, merged: bool) -> nn.Module:
        if merged and (reason := self.unmergeable(model, state)) is not None:
            raise UserError(f"'{state.active}' cannot be merged: {reason}.")
        restore(model, merged=merged)
        pretrained.ignore(model)
        loaded_state.ignore(model)
        delattr(model, STATE)
        return model

    def load_trained(self, model: nn.Module, state: State, folder: Path) -> None:
        content = read_config(folder)
        if not any_sharded(model):
            self.load(model, folder, content, state.active or DEFAULT, "device", True)
            return
        values = read_sparse(folder, content)
        with gathered([p for p in model.parameters() if p.requires_grad], changed=True):
            _fill(model, values, folder)

    def unmergeable(self, model: nn.Module, state: State) -> str | None:
        if any(layer.beside for layer in sparse_layers(model).values()):
            return (
                "its base is quantized or in shards, and holds no deltas; export --format merged writes a whole model"
            )
        return None

    def there(self, state: State) -> str:
        return "sparse layers: detach it first"

    def _install(
        self,
        model: nn.Module,
        state: State,
        name: str,
        adapter: Adapter,
        values: Values,
        source: str,
        *,
        activate: bool = True,
    ) -> None:
        """Checks the adapter's `values` against the model, and only then changes it."""
        _check_values(model, _spec(model, state), values, source)
        values = _placed(model, values, adapter.keep)
        active = state.active == name
        known = self.adapters.get(name)
        alike = known is not None and (known.keep, known.residual) == (adapter.keep, adapter.residual)
        if known is not None and alike and same_entries(known.patterns, values):
            # The deltas are filled in place, so that an optimizer that holds them stays valid.
            with torch.no_grad():
                for module, kinds in values.items():
                    for kind, value in kinds.items():
                        known.patterns[module][kind].delta.copy_(value.delta)
            known.method, known.method_config, known.source = adapter.method, adapter.method_config, adapter.source
            if active:
                write_back(layer_at(model, module) for module in values)
        else:
            if active:
                self.switch(model, state, None)
                state.active = None
            adapter.waiting = values
            self.adapters[name] = adapter
        if state_of(model) is None:
            model.requires_grad_(False)
            setattr(model, STATE, state)
            _listen(model)
        if activate or active:
            self.switch(model, state, name)
            state.active = name


def _listen(model: nn.Module) -> None:
    """Lets the model's own ways to save and to load a state know of its adapters."""
    pretrained.listen(model)
    loaded_state.listen(model)


def _adding(linear: ByRow, numbers: Mapping[str, int], now: Now) -> Callable[..., Tensor | None]:
    """A hook that adds to a linear's product what the adapters of the rows make of its input."""

    def add(layer: nn.Module, inputs: Any, y: Tensor) -> Tensor | None:
        found = now()
        if found is None:
            return None
        names, tokens = found
        choice = tuple(-1 if name is None else numbers[name] for name in names)
        return linear.add(y, inputs[0], choice, tokens, layer)

    return add


def _warn_of_loops(model: nn.Module) -> None:
    """Says what a training loop did that an adapter's file does not show."""
    layers = sparse_layers(model)
    deltas = {id(pattern.delta) for layer in layers.values() for pattern in layer.patterns.values()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in deltas]
    if others:
        warn(
            f"{len(others)} parameters train that no sparse adapter holds, so they are not saved in it ({others[0]}): "
            "model.save_pretrained keeps them."
        )
    for layer in layers.values():
        layer.write_if_stale()
    late = [name for name, layer in layers.items() if not layer.is_written]
    if late:
        warn(
            f"the weights do not hold the deltas that are saved ({late[0]}): something wrote to delta.data, which "
            "PyTorch does not count, so the model has not computed with them; write under torch.no_grad() instead, or "
            "call model.train() or model.eval() to change the mode afterwards."
        )


def _spec(model: nn.Module, state: State) -> ModelSpec:
    """The model's spec, made where there is none yet: of it only `known` counts here."""
    if state.spec is None:
        state.spec = ModelSpec.of(model, tried=False)
    return state.spec


def _check_values(model: nn.Module, spec: ModelSpec, values: Values, source: str) -> None:
    """A `UserError` that starts with `source` where values do not fit the model's weights."""
    try:
        check_modules(model, values, spec.known)
        for module, kinds in values.items():
            shape = spec.known[module]
            for kind, value in kinds.items():
                try:
                    check_index(kind, value.index, shape, value.block_size)
                except UserError as error:
                    raise UserError(f"{module}: {error}") from None
                expected = reference.values_shape(kind, value.index, shape, value.block_size)
                if tuple(value.delta.shape) != expected:
                    raise UserError(
                        f"{module}.{kind}: a delta of shape {tuple(value.delta.shape)} does not fit the model's "
                        f"{expected}."
                    )
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _placed(model: nn.Module, values: Values, keep: str) -> Values:
    """The values where they are kept; those of a file stay mapped on `disk`, and are copied otherwise."""
    if keep == "disk":
        return values
    placed: Values = {}
    for module, kinds in values.items():
        device = device_of(model, module)
        placed[module] = {
            kind: value._replace(
                delta=on_host(value.delta, device) if keep == "host" else value.delta.to(device, copy=True)
            )
            for kind, value in kinds.items()
        }
    return placed


@torch.no_grad()
def _fill(model: nn.Module, values: dict[str, dict[str, SparseDelta]], folder: Path) -> None:
    """Fills the model's deltas, each entry by its index; a `UserError` where `values` are of other entries."""
    for module, layer in sparse_layers(model).items():
        for kind, pattern in layer.patterns.items():
            value = values.get(module, {}).get(kind)
            place = positions_of(index_keys(kind, pattern.index), index_keys(kind, value.index)) if value else None
            if place is None or len(place) != value.delta.shape[entry_dim(kind)] or (place < 0).any():
                raise UserError(f"{folder}: {module}.{kind} does not hold the entries that the model trains.")
            pattern.delta.copy_(value.delta.index_select(entry_dim(kind), place))


def write_sparse(values: Values, shapes: Mapping[str, tuple[int, int]], header: dict[str, Any], folder: Path) -> None:
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
    if "sha256" in content and file_hash(folder / TENSORS) != content["sha256"]:  # others may leave it out
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
            if kind == "grid" and shape != reference.values_shape(kind, parts["index"], (0, 0), None):
                raise UserError(f"{folder}: {module}: a delta of shape {shape} does not fit its grid.")
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

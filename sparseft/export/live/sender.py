"""The trainer's side of live patching."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparseft.adapters.state import require_state
from sparseft.errors import RunError, UserError
from sparseft.export.holders import rest_fingerprint
from sparseft.export.live.messages import (
    BEGIN,
    END,
    STEP,
    Message,
    Part,
    checksum,
    new_session,
    ordered,
    pack_begin,
    values_in,
    values_size,
)
from sparseft.export.live.transports import Folder, PatchPeer
from sparseft.export.patch import index_dtype
from sparseft.kernels import reference
from sparseft.layers import SparseLinear, sparse_layers
from sparseft.layers.inactive import union
from sparseft.layers.permutation import inverse
from sparseft.models.checkpoint import Places, saved_tensors, weight_of

TIMEOUT = 600.0  # seconds that a sender waits for its receiver, and the other way round


class Spring(NamedTuple):
    """Where the values of one checkpoint tensor come from: flat `at` (k,) in a layer's stored weight, and their places
    among the tensor's sent ones (None: these are all, in order)."""

    layer: SparseLinear
    at: Tensor
    place: Tensor | None


class PatchSender:
    """Sends what a sparse adapter changes in a model that trains to a `PatchReceiver` in another process.

    `sender.send()` after each optimizer step: the first one sends which entries of which checkpoint tensors train, with
    their values; the others their values alone (2 bytes each in bf16), until other entries train (re-selection, another
    adapter), which it sees by itself.

    model: an attached model, its deltas in its weights. to: a folder that both processes see, of a memory disk best
    (`/dev/shm/…`), or a `PatchPeer`. timeout: seconds to wait for the receiver.

    Raises:
        UserError: a model without a sparse adapter, or in shards; a folder that another sender has used.
        RunError: the receiver does not take what is sent.
    """

    def __init__(self, model: nn.Module, to: str | Path | PatchPeer, *, timeout: float = TIMEOUT) -> None:
        self.model = getattr(model, "_orig_mod", model)  # inside what torch.compile made
        state = require_state(self.model)
        if not sparse_layers(self.model):
            raise UserError(f"live patching sends the entries of a sparse adapter: the model has {state.kind.called}.")
        self.about = {key: state.header[key] for key in ("base_model", "base_fingerprint", "method")}
        self.transport = to if isinstance(to, PatchPeer) else Folder(to)
        self.timeout = timeout
        self.session, self.sequence, self.plan = new_session(), 0, 0
        self._ever: dict[str, Tensor] = {}  # all entries that were sent, by tensor
        self._seen: list[Any] | None = None  # None: what is sent next begins
        self._moving: list[Part] = []
        self._springs: dict[str, list[Spring]] = {}
        self._closed = False
        self.transport.open()

    @torch.no_grad()
    def send(self) -> int:
        """Sends the weights as they are now; returns the number of the step, from 1 on."""
        if self._closed:
            raise UserError("the sender is closed.")
        layers = {name: layer for name, layer in sparse_layers(self.model).items() if layer.patterns}
        seen = [each for layer in layers.values() for p in layer.patterns.values() for each in (p, p.index, p.inactive)]
        for layer in layers.values():
            layer.write_if_stale()
        known = self._seen
        begins = known is None or len(seen) != len(known) or any(a is not b for a, b in zip(seen, known, strict=True))
        if begins:
            self._seen = None  # as long as it is not sent
            body = self._begin(layers)
        else:
            body = self._values()
        message = Message(BEGIN if begins else STEP, self.session, self.sequence + 1, self.plan, body)
        self.transport.send(message, self.timeout)
        self._seen = seen
        self.sequence += 1
        return self.sequence

    def close(self) -> None:
        """Tells the receiver that no further step comes."""
        if not self._closed:
            self._closed = True
            end = Message(END, self.session, self.sequence + 1, self.plan, torch.empty(0, dtype=torch.uint8))
            self.transport.send(end, self.timeout)

    def __enter__(self) -> PatchSender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, RunError):  # else the receiver is gone
            self.close()

    def _values(self) -> Tensor:
        """The body of a step."""
        body = torch.zeros(values_size(self._moving), dtype=torch.uint8, device=self.transport.device)
        for part, values in values_in(body, self._moving):
            for layer, at, place in self._springs[part.name]:
                flat = layer.weight.detach().view(-1)
                if place is not None:
                    values.index_copy_(0, place, flat.index_select(0, at).to(values.device))
                elif flat.device == values.device:
                    torch.index_select(flat, 0, at, out=values)
                else:
                    values.copy_(flat.index_select(0, at))
        return body

    def _begin(self, layers: dict[str, SparseLinear]) -> Tensor:
        """Finds out which entries train, and what else has to be set once: entries that no longer train hold what they
        have learnt, or the base's values again."""
        if any(layer.beside for layer in layers.values()):
            raise UserError("live patching reads weights that hold base + delta: those of a model in shards do not.")
        tensors = saved_tensors(self.model)
        places = Places(self.model, tensors)
        reader = _Reader(self.model, places)
        found: dict[str, list[tuple[Tensor, Spring]]] = defaultdict(list)
        ever: dict[str, list[Tensor]] = defaultdict(list)
        for module, layer in layers.items():
            weight = weight_of(self.model, module)
            active = _entries(layer, {kind: p.index for kind, p in layer.patterns.items()})
            all_of_it = _entries(layer, {kind: union(p)[0] for kind, p in layer.patterns.items()})
            for name, index, which in places.in_checkpoint(weight.parameter, weight.flat(active)):
                at = stored(layer, active[which]).to(layer.weight.device)
                found[name].append((index, Spring(layer, at, None)))
            for name, index, _ in places.in_checkpoint(weight.parameter, weight.flat(all_of_it)):
                ever[name].append(index)
        parts = []
        self._springs = {}
        for name, pieces in found.items():
            index, order = torch.cat([piece for piece, _ in pieces]).sort()
            shape, dtype = tensors[name].shape, pieces[0][1].layer.weight.dtype
            parts.append(Part(name, shape, dtype, index.to(index_dtype(shape))))
            self._springs[name] = [spring for _, spring in pieces]
            if len(pieces) > 1:
                place, start = order.argsort(), 0
                self._springs[name] = []
                for piece, spring in pieces:
                    own = place[start : start + len(piece)].to(self.transport.device)
                    self._springs[name].append(spring._replace(place=own))
                    start += len(piece)
        for name, indices in ever.items():
            self._ever[name] = torch.cat([*indices, self._ever.get(name, indices[0])]).unique()
        self._moving = ordered(parts)
        moving = {part.name: part.index.long() for part in parts}
        still = []
        for name, index in self._ever.items():
            rest = index[~torch.isin(index, moving[name])] if name in moving else index
            if len(rest):
                shape = tensors[name].shape
                values = reader(name, rest)
                still.append((Part(name, shape, values.dtype, rest.to(index_dtype(shape))), values))
        shapes = {name: tensors[name].shape for name in places.names()}
        about = self.about | {
            "checkpoint": {name: list(shape) for name, shape in shapes.items()},
            "rest_fingerprint": rest_fingerprint(shapes, reader, self._ever),
        }
        body = pack_begin(about, still, self._moving, self._values())
        self.plan = checksum(body)
        return body


class _Reader:
    """Entries of the checkpoint's tensors as a model holds them, whose layers may store their weights permuted."""

    def __init__(self, model: nn.Module, places: Places) -> None:
        self.places = places
        self.permuted = {
            f"{name}.{leaf}": (layer, leaf)
            for name, layer in sparse_layers(model).items()
            if layer.is_permuted
            for leaf in ("weight", "bias")
        }

    def __call__(self, name: str, index: Tensor) -> Tensor:
        values: Tensor | None = None
        for parameter, flat, which in self.places.in_model(name, index):
            tensor = self.places.parameters[parameter].detach()
            if parameter in self.permuted:
                layer, leaf = self.permuted[parameter]
                flat = _stored_bias(layer, flat) if leaf == "bias" else stored(layer, _logical(layer, flat))
            part = tensor.view(-1).index_select(0, flat.to(tensor.device)).cpu()
            values = part.new_empty(len(index)) if values is None else values
            values[which] = part
        assert values is not None, name
        return values


def _entries(layer: SparseLinear, indices: dict[str, Tensor]) -> Tensor:
    """Flat entries (row · in + column) of the layer's logical weight that the indices cover, in the original order."""
    touched = torch.zeros(layer.out_features, layer.in_features, dtype=torch.bool)
    for kind, index in indices.items():
        size = layer.patterns[kind].block_size
        shape = reference.values_shape(kind, index, (layer.out_features, layer.in_features), size)
        reference.scatter_(touched, kind, index.cpu(), torch.ones(shape, dtype=torch.bool), size)
    return touched.flatten().nonzero().flatten()


def stored(layer: SparseLinear, entries: Tensor) -> Tensor:
    """Entries of a layer's logical weight, in the original order, as flat places in its stored weight."""
    rows, columns = entries // layer.in_features, entries % layer.in_features
    if layer.row_permutation is not None:
        rows = _inverse(layer.row_permutation)[rows]
    if layer.column_permutation is not None:
        columns = _inverse(layer.column_permutation)[columns]
    return columns * layer.out_features + rows if layer.transposed else rows * layer.in_features + columns


def _logical(layer: SparseLinear, flat: Tensor) -> Tensor:
    """Flat places in a checkpoint's tensor as entries of the logical weight."""
    if layer.transposed:
        return flat % layer.out_features * layer.in_features + flat // layer.out_features
    return flat


def _stored_bias(layer: SparseLinear, flat: Tensor) -> Tensor:
    return flat if layer.row_permutation is None else _inverse(layer.row_permutation)[flat]


def _inverse(permutation: Tensor) -> Tensor:
    found = inverse(permutation.cpu())
    assert found is not None
    return found

"""Where a conversion of weights moves each entry: the copies that it makes, in both directions, and no number for each.

transformers' converters take views of tensors and join them. On the meta device that costs no memory; the copies that
are seen there are strided boxes, and entries are followed through them by arithmetic, values by copying.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Place = str | int  # of entries: a tensor or a parameter by its name, or memory between them by a number


class View(NamedTuple):
    """A box of entries within flat memory."""

    place: Place
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def ends(self) -> tuple[int, int]:
        """The first of its entries, and the one behind the last."""
        last = self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return self.offset, last + 1

    @property
    def _dimensions(self) -> list[tuple[int, int, int]]:
        """Of each: (step in memory, size, step among the box's own entries), the largest step in memory first."""
        own = [math.prod(self.shape[number + 1 :]) for number in range(len(self.shape))]
        return sorted((each for each in zip(self.stride, self.shape, own, strict=True) if each[1] > 1), reverse=True)

    @property
    def is_box(self) -> bool:
        """Whether no two of its entries are the same, and each can be told by its place alone."""
        reach = 1
        for step, size, _ in reversed(self._dimensions):
            if step < reach:
                return False
            reach += (size - 1) * step
        return True

    def outer(self, flat: Tensor) -> Tensor:
        """Where entries (k,), counted within the box, are in memory."""
        found = torch.full_like(flat, self.offset)
        for step, size, own in self._dimensions:
            found += flat // own % size * step
        return found

    def inner(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Which entries (k,) of the memory, none before the offset, are within the box (k,), and as what (k,)."""
        rest, flat = places - self.offset, torch.zeros_like(places)
        for step, size, own in self._dimensions:
            at = (rest // step).clamp_(max=size - 1)
            rest -= at * step
            flat += at * own
        return rest == 0, flat

    def of(self, memory: Tensor) -> Tensor:
        """The box within flat memory (n,)."""
        return memory.as_strided(self.shape, self.stride, memory.storage_offset() + self.offset)

    def narrowed(self, dim: int, start: int, size: int) -> View:
        """A part of the box along a dimension."""
        shape = (*self.shape[:dim], size, *self.shape[dim + 1 :])
        return self._replace(shape=shape, offset=self.offset + start * self.stride[dim])


class Copy(NamedTuple):
    """Entries that are copied from one box to another of the same shape."""

    source: View
    target: View

    def into(self, start: int, stop: int) -> Iterator[Copy]:
        """The parts that are copied to [start, stop) of the target's memory."""
        low, high = self.target.ends
        if start <= low and high <= stop:
            yield self
        elif start < high and low < stop:
            dims = (dim for dim, size in enumerate(self.target.shape) if size > 1)
            dim = max(dims, key=lambda dim: self.target.stride[dim])
            half = self.target.shape[dim] // 2
            for first, size in ((0, half), (half, self.target.shape[dim] - half)):
                yield from Copy(*(box.narrowed(dim, first, size) for box in self)).into(start, stop)


class Found(NamedTuple):
    """Entries of the tensor or parameter `name`: `index` (k,) flat, int64, sorted; `which` (k,): their places among
    those asked for."""

    name: str
    index: Tensor
    which: Tensor


class Conversion:
    """What becomes of the tensors of `shapes`, by name, in `convert`: a function of a `read` that gives each of them,
    whose results are parameters by name.

    Raises:
        ValueError: it does more than move entries.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        convert: Callable[[Callable[[str], Tensor]], Mapping[str, Tensor]],
    ) -> None:
        self.shapes = dict(shapes)
        with _Copies() as seen:
            tensors = {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
            for name, tensor in tensors.items():
                seen.name(tensor, ("tensor", name))
            made = convert(tensors.__getitem__)
        self.parameters = {name: tuple(value.shape) for name, value in made.items()}
        seen.finish(made)
        self._sizes = seen.sizes
        self._copies: list[Copy] = []  # those of which parameters are made, the last one first
        self._to: dict[Place, list[Copy]] = defaultdict(list)
        self._from: dict[Place, list[Copy]] = defaultdict(list)
        for each in reversed(seen.copies):
            if isinstance(each.target.place, str) or each.target.place in self._from:
                self._copies.append(each)
                self._to[each.target.place].append(each)
                self._from[each.source.place].append(each)
        for place in (*(f"tensor {name}" for name in self.shapes), *self._from):
            if sum(math.prod(each.source.shape) for each in self._from[place]) != self._sizes[place]:
                raise ValueError("it leaves entries out, or makes more of them")

    def in_tensors(self, parameter: str, flat: Tensor) -> list[Found]:
        """Where entries (k,) int64 of a parameter come from, tensor by tensor."""
        return self._followed(f"parameter {parameter}", flat, self._to, back=True)

    def in_parameters(self, tensor: str, flat: Tensor) -> list[Found]:
        """Where entries (k,) int64 of a tensor go, parameter by parameter."""
        return self._followed(f"tensor {tensor}", flat, self._from, back=False)

    def _followed(self, start: str, flat: Tensor, ways: Mapping[Place, list[Copy]], *, back: bool) -> list[Found]:
        found: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        waiting: list[tuple[Place, Tensor, Tensor]] = [(start, *flat.sort())] if len(flat) else []
        while waiting:
            place, index, which = waiting.pop()
            if isinstance(place, str) and place != start:
                found[place.partition(" ")[2]].append((index, which))
                continue
            low, high = index[[0, -1]].tolist()
            for copy in ways[place]:
                here, there = (copy.target, copy.source) if back else (copy.source, copy.target)
                begin, end = here.ends
                if high < begin or low >= end:
                    continue
                first, last = torch.searchsorted(index, torch.tensor([begin, end])).tolist()
                inside, own = here.inner(index[first:last])
                if inside.any():
                    order = (moved := there.outer(own[inside])).argsort()
                    waiting.append((there.place, moved[order], which[first:last][inside][order]))
        parts = []
        for name in (*self.shapes, *self.parameters):
            if name in found:
                index, which = (torch.cat(each) for each in zip(*found[name], strict=True))
                index, order = index.sort()
                parts.append(Found(name, index, which[order]))
        return parts

    def part(self, parameter: str, start: int, stop: int, read: Callable[[str], Tensor]) -> Tensor:
        """Entries [start, stop) of a flat parameter, of the tensors that `read` gives by name: a view where it can be,
        else made without the rest of the parameter, in the dtype that holds all of their values."""
        return self._part(f"parameter {parameter}", start, stop, read)

    def _part(self, place: Place, start: int, stop: int, read: Callable[[str], Tensor]) -> Tensor:
        if isinstance(place, str) and not self._to[place]:
            return read(place.partition(" ")[2]).reshape(-1)[start:stop]
        found: Tensor | None = None
        for source, target in (piece for copy in self._to[place] for piece in copy.into(start, stop)):
            low, high = source.ends
            values = source._replace(offset=source.offset - low).of(self._part(source.place, low, high, read))
            if target.ends == (start, stop) and _in_order(target):  # all of it
                return values.contiguous().view(-1)  # a strided one would be no memory for boxes
            if found is None:
                found = values.new_empty(stop - start)
            if values.dtype != found.dtype:
                found = found.to(torch.promote_types(found.dtype, values.dtype))
            target._replace(offset=target.offset - start).of(found).copy_(values)
        assert found is not None
        return found

    def undone(self, parameter: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The tensors, one after another, of the values of their parameters, which are given by name: views where they
        can be. Beside those at most one copy of all of them is in memory."""
        memory: dict[Place, Tensor] = {}
        left = {place: len(copies) for place, copies in self._from.items()}
        for copy in self._copies:
            source, target = copy
            place = target.place
            if place not in memory and isinstance(place, str):
                memory[place] = parameter(place.partition(" ")[2]).reshape(-1)
            values = target.of(memory[place])
            if source.ends == (0, self._sizes[source.place]) and _in_order(source):
                memory[source.place] = values.contiguous().view(-1)
            else:
                if source.place not in memory:
                    memory[source.place] = values.new_empty(self._sizes[source.place])
                source.of(memory[source.place]).copy_(values)
            del values
            if copy is self._to[place][-1]:  # the last one to be undone
                del memory[place]
            left[source.place] -= 1
            if isinstance(source.place, str) and not left[source.place]:
                yield (name := source.place.partition(" ")[2]), memory.pop(source.place).view(self.shapes[name])


def _in_order(view: View) -> bool:
    """Whether a box that is a whole memory has its entries in their order there."""
    return all(step == own for step, _, own in view._dimensions)


class _Copies(TorchDispatchMode):
    """Sees, inside, which memory is copied from which, and whether anything but views and copies is made."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[Copy] = []
        self.sizes: dict[Place, int] = {}
        self._places: dict[int, Place] = {}  # by storage
        self._kept: list[Tensor] = []  # so that no storage gets the number of an earlier one
        self._unknown: list[str] = []

    def name(self, tensor: Tensor, place: tuple[str, str]) -> None:
        self._new(tensor, " ".join(place))

    def finish(self, made: Mapping[str, Tensor]) -> None:
        for name, value in made.items():
            if self._place(value) is None:
                raise ValueError(f"{name} is made of nothing that was given")
            whole = torch.empty(value.shape, device="meta")
            self._new(whole, f"parameter {name}")
            self._copy(value, whole)
        if self._unknown:
            raise ValueError(f"by {self._unknown[0]}, which does more than move entries")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.is_mutable:
            self._unknown.append(str(func))
        for each in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(each, Tensor) and self._place(each) is None:
                self._made(func, args, kwargs or {}, each)
        return out

    def _made(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        aten, kind = torch.ops.aten, func.overloadpacket
        if kind is aten.empty:
            return
        self._new(out, len(self.sizes))
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        if kind is aten.clone:
            self._copy(args[0], out)
        elif kind is aten.stack:
            for number, each in enumerate(args[0]):
                self._copy(each, out.select(dim, number))
        elif kind is aten.cat:
            start = 0
            for each in args[0]:
                self._copy(each, out.narrow(dim, start, each.shape[dim]))
                start += each.shape[dim]
        else:
            self._unknown.append(str(func))

    def _copy(self, source: Tensor, target: Tensor) -> None:
        if self._place(source) is None:
            self._unknown.append("a tensor of its own")
            return
        views = [self._view(source), self._view(target)]
        if not all(view.is_box for view in views):
            self._unknown.append("expand")
        self.copies.append(Copy(*views))

    def _view(self, tensor: Tensor) -> View:
        place = self._place(tensor)
        assert place is not None
        return View(place, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())

    def _new(self, tensor: Tensor, place: Place) -> None:
        self._places[tensor.untyped_storage()._cdata] = place
        self.sizes[place] = tensor.untyped_storage().nbytes() // tensor.itemsize
        self._kept.append(tensor)

    def _place(self, tensor: Tensor) -> Place | None:
        return self._places.get(tensor.untyped_storage()._cdata)

"""Calibration a decoder layer at a time, so that the statistics of one layer alone exist, whatever the model's size.

One forward pass over the samples keeps the hidden states at the layers' borders (`room.py`), and the loss's gradient at
the last one. Then, from the last layer to the first, each is run again and differentiated over all samples, from the
gradient at its output to that at its input, which takes the hidden state's place; its linears are scored and its sums
dropped. Each layer is called with what the model itself has called it with, and a trial on a few tokens says whether
that comes to the model's own passes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparseft import console
from sparseft.distributed import ranks
from sparseft.distributed.shards import any_sharded
from sparseft.importance.batching import Group, Sample
from sparseft.importance.calibration import CalibrationState, Statistics, Watch
from sparseft.importance.hooks import NotByPosition, Pass, Watcher, differentiable, untouched
from sparseft.importance.room import Room, ahead
from sparseft.importance.units import Candidate
from sparseft.models.decoder import decoder_layers, runnable

LAYERS = "layers"  # the file of an unfinished walk: what is scored, and the gradient from which it goes on
TRIAL_TOKENS = 16
KINDS = 4  # of masks in a model that can share their room: whole rows', windows', on a device each


@dataclass
class Held:
    """An attention mask (1, 1, tokens, tokens), or (samples, …) where it is not the same for all. It gives way to a
    longer one of which it is a corner."""

    mask: Tensor

    def take(self, mask: Tensor) -> bool:
        """Whether one of the two is a corner of the other, which is then held."""
        if mask.dtype != self.mask.dtype or mask.device != self.mask.device or mask.shape[:2] != self.mask.shape[:2]:
            return False
        longer, shorter = sorted((self.mask, mask), key=lambda each: -each.shape[-1])  # stable: the one that is held
        rows, columns = shorter.shape[-2:]
        corner = longer[..., :rows, :columns]
        if corner.shape != shorter.shape or not torch.equal(corner, shorter):
            return False
        self.mask = longer
        return True


@dataclass(frozen=True)
class Corner:
    """A pass's mask, as what it is of one that is held."""

    held: Held
    shape: torch.Size  # (samples, 1, tokens, tokens)

    def mask(self) -> Tensor:
        rows, columns = self.shape[-2:]
        return self.held.mask[..., :rows, :columns].expand(self.shape)


@dataclass(frozen=True)
class Call:
    """What a decoder layer is called with, beside the hidden state."""

    shape: torch.Size  # of the hidden state (samples, tokens, features)
    named: str | None  # the argument that holds it; None: the first
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
        """A call's hidden state, and the rest."""
        if args:
            return args[0], Call(args[0].shape, None, args[1:], kwargs)
        rest = dict(kwargs)
        hidden = rest.pop("hidden_states")
        return hidden, Call(hidden.shape, "hidden_states", (), rest)

    def again(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The layer's output (samples, tokens, features)."""
        kwargs = {name: value.mask() if isinstance(value, Corner) else value for name, value in self.kwargs.items()}
        if self.named is None:
            return output_of(layer(hidden, *self.args, **kwargs))
        return output_of(layer(**{self.named: hidden}, **kwargs))


class Masks:
    """Attention masks (samples, 1, tokens, tokens) of all passes, which are held until the walk is over.

    Without padding a mask is that of its length, the same for all samples: a window's, eager attention's. It is then a
    corner of any longer one, and the longest alone is held. What is a corner of none (packed rows') is held beside.
    """

    def __init__(self) -> None:
        self.recent: list[Held] = []  # those that a mask is compared with, the last one taken first

    def of_pass(self) -> Callable[[Call], Call]:
        """What makes a layer's call one with a mask that is held. A pass's layers are given the same few."""
        known: dict[int, tuple[Tensor, Corner]] = {}

        def shared(call: Call) -> Call:
            mask = call.kwargs.get("attention_mask")
            if not isinstance(mask, Tensor) or mask.dim() != 4:
                return call
            if id(mask) not in known:
                known[id(mask)] = mask, Corner(self._held(mask), mask.shape)
            return replace(call, kwargs=call.kwargs | {"attention_mask": known[id(mask)][1]})

        return shared

    def _held(self, mask: Tensor) -> Held:
        one = mask[:1]
        if mask.stride(0) != 0 and len(mask) > 1:
            one = one.clone() if torch.equal(mask, one.expand(mask.shape)) else mask  # no view: it would keep all rows
        found = next((held for held in self.recent if held.take(one)), None) or Held(one)
        self.recent = [found, *(held for held in self.recent if held is not found)][:KINDS]
        return found


def output_of(returned: Any) -> Tensor:
    """The hidden state of what a decoder layer returns, alone or before other things."""
    return returned[0] if isinstance(returned, tuple) else returned


Members = Mapping[str, Sequence[Candidate]]  # a layer's modules that are scored
S = TypeVar("S", bound=Statistics)


class _Enough(Exception):
    """The forward pass has come to a layer whose input is not needed."""


class _Unsuited(Exception):
    """Why a model's layers cannot be run one at a time."""


# -- whether a model's layers can be run one at a time -----------------------------------------------------------------


def split_by_layer(model: nn.Module, names: Iterable[str]) -> tuple[list[nn.Module], list[list[str]]] | str:
    """The decoder layers and the named modules in each; or why they cannot be had."""
    if any_sharded(model):
        return "the model is in shards"
    path, layers = decoder_layers(model)
    members: list[list[str]] = [[] for _ in layers]
    for name in names:
        number = name.removeprefix(f"{path}.").split(".")[0]
        if not (name.startswith(f"{path}.") and number.isdecimal() and int(number) < len(layers)):
            return f"'{name}' is in no decoder layer"
        members[int(number)].append(name)
    return list(layers), members


def trial(model: nn.Module, layers: Sequence[nn.Module], members: Sequence[Sequence[str]], group: Group) -> int | str:
    """Bytes of the hidden state of a token, or why the layers cannot be run one at a time.

    The first tokens of one or two of the group's samples go through the model as always; then each layer is run by
    itself, and has to give what it gave and what flowed back through it.
    """
    samples = [_first_tokens(sample, TRIAL_TOKENS - 5 * i) for i, sample in enumerate(group.samples[:2])]
    device = next(model.parameters()).device
    modules = {name: model.get_submodule(name) for names in members for name in names}
    watcher = Watcher(modules, lambda _: None, gradients=True)
    with untouched(model), runnable(model), torch.enable_grad():
        try:
            for one in Pass.of(Group(samples, group.padded), device):
                with watcher, watcher.over(one):
                    hidden, calls = _as_always(model, layers, one)
                _one_at_a_time(layers, hidden, calls)
        except NotByPosition:
            return "a linear is given something else than the positions of a batch"
        except _Unsuited as error:
            return str(error)
    return hidden[0].shape[-1] * hidden[0].element_size()


def _first_tokens(sample: Sample, count: int) -> Sample:
    tokens = sample["input_ids"].shape[1]
    cut = {k: v[:, :count] if v.dim() >= 2 and v.shape[1] == tokens else v for k, v in sample.items()}
    return cut | {"labels": cut["input_ids"]}


def _as_always(model: nn.Module, layers: Sequence[nn.Module], one: Pass) -> tuple[list[Tensor], list[Call]]:
    """The hidden states at all borders, with their gradients, and the calls of the layers in between."""
    hidden: list[Tensor] = []
    calls: list[Call] = []
    order: list[int] = []

    def before(number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            try:
                state, call = Call.of(args, kwargs)
            except (KeyError, AttributeError):
                raise _Unsuited("its decoder layers are given no hidden state by which to know it") from None
            if not state.requires_grad:
                raise _Unsuited("no gradient reaches its decoder layers' inputs")
            if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((call.args, call.kwargs))):
                raise _Unsuited("a decoder layer is given more of another one than its hidden state")
            state.retain_grad()
            order.append(number)
            hidden.append(state)
            calls.append(call)

        return hook

    def after(_module: nn.Module, _args: Any, returned: Any) -> None:
        hidden.append(output_of(returned))
        hidden[-1].retain_grad()

    handles = [m.register_forward_pre_hook(before(i), with_kwargs=True) for i, m in enumerate(layers)]
    handles.append(layers[-1].register_forward_hook(after))
    try:
        with differentiable(model):
            torch.autograd.backward(*one.ending(model))
    finally:
        for handle in handles:
            handle.remove()
    if order != list(range(len(layers))):
        raise _Unsuited("its decoder layers are not called once each, in their order")
    if any(state.grad is None for state in hidden):
        raise _Unsuited("the loss does not depend on every decoder layer")
    return hidden, calls


def _one_at_a_time(layers: Sequence[nn.Module], hidden: Sequence[Tensor], calls: Sequence[Call]) -> None:
    for number, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        x = hidden[number].detach().requires_grad_()
        try:
            y = call.again(layer, x)
            torch.autograd.backward(y, hidden[number + 1].grad)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise _Unsuited(f"decoder layer {number} cannot be run by itself ({error})") from error
        if not (_same(y, hidden[number + 1]) and x.grad is not None and _same(x.grad, hidden[number].grad)):
            raise _Unsuited(f"decoder layer {number} by itself is not what it is within the model")


def _same(one: Tensor, other: Tensor | None) -> bool:
    """Whether they differ by no more than a device may that adds up in another order."""
    assert other is not None
    allowed = torch.finfo(other.dtype).eps ** 0.75
    one, other = one.detach().double(), other.detach().double()
    return bool((one - other).norm() <= allowed * other.norm())


# -- the walk ----------------------------------------------------------------------------------------------------------


def _in_step(work: Callable[[], None]) -> None:
    """Where a rank's work ends in KeyboardInterrupt, all ranks' does: none waits for one that has gone, and all have
    done the same layers."""
    interrupted = False
    try:
        work()
    except KeyboardInterrupt:
        interrupted = True
    if any(ranks.all_gather_object(interrupted)):
        raise KeyboardInterrupt


class Walk:
    """The way back over a model's decoder layers: where it is, what is kept, what was found.

    Args:
        members: the modules of each layer that are scored, with their candidates.
        groups: this rank's samples.
        token_bytes: of the hidden state of a token (`trial`).
        state: of its folder, a walk that was interrupted goes on, below the layers that were done.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        members: Sequence[Members],
        groups: Sequence[Group],
        token_bytes: int,
        state: CalibrationState,
    ) -> None:
        self.model, self.layers, self.members, self.groups, self.state = model, layers, members, groups, state
        # The first layer that is scored: below its input nothing is kept or differentiated.
        self.lowest = next(number for number, modules in enumerate(members) if modules)
        self.left = len(layers)  # the first layer that is done
        self.device = next(model.parameters()).device
        self.positions = sum(one.positions for one in self._passes())
        borders = len(layers) - self.lowest + 1
        folder = state.folder.parent if state.folder is not None else None
        # Each border is written and read once or twice in the whole walk: on the CPU a file will do.
        size = self.positions * token_bytes * borders
        self.room = Room(size, self.device, "the kept hidden states", folder, spare=True)
        # At each border from the lowest layer's input on (positions, features): the hidden state, or at `left` the
        # loss's gradient by it. What is above `left` is dropped.
        self.kept: dict[int, Tensor] = {}
        self.calls: list[list[Call]] = []  # of each pass, from the lowest layer on
        self.masks = Masks()
        self.scores: dict[str, Tensor] = {}
        self.dampings: list[float] = []

    def run(
        self,
        statistics: Callable[[Members], S],
        scored: Callable[[S, Members], tuple[dict[str, Tensor], list[float]]],
        watch: Watch,
    ) -> tuple[dict[str, Tensor], list[float]]:
        """Every unit's score by candidate key, and the dampings, as the statistics of all layers at once give them.

        An exception out of `watch` leaves the state saved with the layers that are done. With several ranks a
        collective call.

        Args:
            statistics: makes those of a layer's modules.
            scored: the scores and dampings that statistics come to, complete and the same on all ranks.
        """
        self.state.expect(self.room.total_bytes // (len(self.layers) - self.lowest + 1))
        self._resume()
        try:
            with untouched(self.model), runnable(self.model):
                if self.left > self.lowest:
                    _in_step(partial(self._forward, watch))
                while self.left > self.lowest:
                    modules = self.members[self.left - 1]
                    sums = statistics(modules)
                    _in_step(partial(self._back, modules, sums, watch))
                    sums.reduce()
                    found, raised = scored(sums, modules)
                    del sums
                    self.scores |= found
                    self.dampings += raised
                    self.left -= 1
                    self.kept.pop(self.left + 1, None)  # a rank without samples has none
                    if any(ranks.all_gather_object(self.state.due())):  # all save the same layer, or none could go on
                        self._save()
                    _in_step(partial(self._tell, watch))
        except BaseException:
            self._save()
            raise
        return self.scores, self.dampings

    def _tell(self, watch: Watch) -> None:
        if watch.scored is not None:
            done, total = (sum(map(len, some)) for some in (self.members[self.left :], self.members))
            watch.scored(done, total)

    def _passes(self) -> Iterator[Pass]:
        for group in self.groups:
            yield from Pass.of(group, self.device)

    # -- to keep, to take up again -------------------------------------------------------------------------------------

    def _save(self) -> None:
        """What is done so far, if anything."""
        if self.left < len(self.layers) and self.state.folder is not None:
            tensors = {f"score {key}": score for key, score in self.scores.items()}
            if self.lowest < self.left and self.left in self.kept:
                if self.device.type == "cuda":  # locked memory is filled while the host goes on
                    torch.cuda.synchronize(self.device)
                tensors["gradient"] = self.kept[self.left]
            self.state.save(LAYERS, tensors, {"left": self.left, "dampings": self.dampings})

    def _resume(self) -> None:
        saved = self.state.load(LAYERS)
        tensors, meta = saved if saved is not None else ({}, {"left": None})
        gradient, left = tensors.get("gradient"), meta["left"]
        if gradient is not None and len(gradient) != self.positions:
            console.log("calibration: what was kept is of other samples, so it starts anew")
            left = None
        if len({*ranks.all_gather_object(left)}) > 1:  # killed while they saved
            console.log("calibration: the ranks have kept different layers, so it starts anew")
            return
        if left is None:
            return
        if gradient is not None:
            self._border(left, gradient).copy_(gradient)
        self.left, self.dampings = left, meta["dampings"]
        self.scores = {name.removeprefix("score "): x for name, x in tensors.items() if name.startswith("score ")}
        console.log(f"calibration: goes on below decoder layer {self.left}")

    # -- forward -------------------------------------------------------------------------------------------------------

    def _forward(self, watch: Watch) -> None:
        """Keeps the hidden states of what is left, and the gradient at the last border, if it is not there yet."""
        world = ranks.rank_and_world()[1]
        done = start = 0
        for group in self.groups:
            for one in Pass.of(group, self.device):
                self.calls.append([])
                self._run(one, slice(start, start + one.positions))
                start += one.positions
            done += len(group.samples)
            if watch.sampled is not None:
                watch.sampled(done * world)

    def _run(self, one: Pass, at: slice) -> None:
        last: list[Tensor] = []
        masks = self.masks.of_pass()

        def before(number: int) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if number == self.left:
                    raise _Enough
                hidden, call = Call.of(args, kwargs)
                self._keep(number, at, hidden)
                self.calls[-1].append(masks(call))

            return hook

        def after(_module: nn.Module, _args: Any, returned: Any) -> Any:
            """Lets the graph begin here: what goes before takes no gradient, so nothing of it is held."""
            last.append(output_of(returned).detach().requires_grad_())
            return (last[0], *returned[1:]) if isinstance(returned, tuple) else last[0]

        needed = range(self.lowest, min(self.left + 1, len(self.layers)))
        handles = [self.layers[i].register_forward_pre_hook(before(i), with_kwargs=True) for i in needed]
        if self.left == len(self.layers):
            handles.append(self.layers[-1].register_forward_hook(after))
        try:
            with torch.enable_grad():
                torch.autograd.backward(*one.ending(self.model))
        except _Enough:
            return
        finally:
            for handle in handles:
                handle.remove()
        assert last[0].grad is not None
        self._keep(len(self.layers), at, last[0].grad)

    def _border(self, number: int, like: Tensor) -> Tensor:
        if number not in self.kept:
            self.kept[number] = self.room.zeros(self.positions, like.shape[-1], dtype=like.dtype)
        return self.kept[number]

    def _keep(self, number: int, at: slice, value: Tensor) -> None:
        self._border(number, value)[at].copy_(value.detach().reshape(-1, value.shape[-1]), non_blocking=True)

    # -- back ----------------------------------------------------------------------------------------------------------

    def _back(self, names: Iterable[str], observer: Statistics, watch: Watch) -> None:
        """Shows the observer the named linears of the layer before `left` over all samples, and leaves the gradient at
        its input."""
        number = self.left - 1
        watcher = Watcher({name: self.model.get_submodule(name) for name in names}, observer, gradients=True)
        calls = [of_pass[number - self.lowest] for of_pass in self.calls]
        ends = list(itertools.accumulate(call.shape[:-1].numel() for call in calls))
        rows = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        loads = [partial(self._load, number, at, call.shape) for call, at in zip(calls, rows, strict=True)]
        work = zip(calls, rows, ahead(loads, self.device), strict=True)
        with watcher, torch.enable_grad():
            for group in self.groups:
                for one in Pass.of(group, self.device):
                    call, at, (hidden, gradient) = next(work)
                    with watcher.over(one):
                        x = hidden.requires_grad_()
                        y = call.again(self.layers[number], x)
                        torch.autograd.backward(y, gradient)
                    if number > self.lowest:
                        assert x.grad is not None
                        self._keep(number, at, x.grad)
                    del hidden, gradient, x, y  # before the next pass
                self._tell(watch)

    def _load(self, number: int, at: slice, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """A pass's hidden state at a layer's input and the gradient at its output, on the device."""
        kept = (self.kept[border][at].view(shape) for border in (number, number + 1))
        hidden, gradient = (x.to(self.device, non_blocking=True).detach() for x in kept)
        return hidden, gradient

"""Calibration: runs samples through the model and shows each linear's input and output gradient to an observer.

One sample at a time, without padding, or several at a time where the observer only sums over tokens: scores are sums
over samples, so they depend neither on the batch size nor on the number of ranks. Nothing of the model is changed, and
no weight gradient is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseft.importance.batching import Group, Sample, pad_together
from sparseft.models.decoder import runnable
from sparseft.models.head import cross_entropy, decoder_output, head_of, tokens_at_once
from sparseft.models.masks import unasked
from sparseft.replaced import replaced


@dataclass(frozen=True)
class Observation:
    """What a linear was given and gave: with its output after the forward pass, with that one's gradient in the
    backward pass."""

    name: str
    x: Tensor  # input (tokens, in)
    y: Tensor | None  # output (tokens, out)
    gradient: Tensor | None  # of the output (tokens, out)
    source: str  # the first module that was given the same input, as of q, k and v (gate and up)
    samples: int  # whose tokens these are, each with the gradient of its own loss


Observer = Callable[[Observation], None]


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no weight gradients inside; flags as they were afterwards, whatever happens.

    transformers recomputes activations (gradient checkpointing) in training mode only, so nothing is recomputed here.
    """
    modes = [(module, "training", module.training) for module in model.modules()]
    flags = [(parameter, "requires_grad", False) for parameter in model.parameters()]
    with replaced(*modes, *flags):
        model.eval()
        yield


@dataclass(frozen=True)
class Pass:
    """What goes through the model at once: one sample, or several that were padded to one batch."""

    batch: Sample  # on the model's device, with labels
    kept: Tensor | None = None  # flat positions of its tokens; None: all
    samples: int = 1
    padded: bool = False  # its loss is computed here, for each sample apart

    @staticmethod
    def of(group: Group, device: torch.device) -> Iterator[Pass]:
        """The passes of a group, one after another."""
        if group.padded:
            batch, kept = pad_together(group.samples)
            kept = kept.to(device) if kept is not None else None
            yield Pass(_moved(batch, device), kept, len(group.samples), padded=True)
        else:
            yield from (Pass(_moved(sample, device)) for sample in group.samples)

    @property
    def positions(self) -> int:
        """Of the batch, padding included."""
        return self.batch["input_ids"].numel()

    def ending(self, model: nn.Module) -> tuple[Tensor, Tensor | None]:
        """A forward pass: the end of its graph, and the gradient by it of the sum over the samples of the mean loss of
        their labelled tokens; None where the end is that loss."""
        with unasked(self.batch):
            if not self.padded:
                return model(**self.batch, use_cache=False).loss, None
            hidden = decoder_output(model, self.inputs)
        return hidden, loss_gradient(model, hidden, self.batch["labels"])

    @property
    def inputs(self) -> Sample:
        """The batch without labels."""
        return {name: value for name, value in self.batch.items() if name != "labels"}


def loss_gradient(
    model: nn.Module,
    hidden: Tensor,  # what the decoder gave (samples, tokens, features)
    labels: Tensor,  # (samples, tokens); -100: not counted
) -> Tensor:
    """The gradient by `hidden` of the sum over samples of the mean cross-entropy of their labelled tokens, each
    predicted by those before it.

    In chunks of tokens, and of those alone that predict a label: with a vocabulary of a hundred thousand the logits of
    a few samples would take more memory than all else.
    """
    targets = labels[:, 1:]
    labelled = targets != -100
    shares = (labelled / labelled.sum(1, keepdim=True).clamp_min(1))[labelled]  # float32
    rows = F.pad(labelled, (0, 1)).reshape(-1).nonzero().squeeze(1)
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    gradient = torch.zeros_like(flat)
    step = tokens_at_once(model, flat.device)
    with head_of(model) as logits_of:
        for at, target, share in zip(rows.split(step), targets[labelled].split(step), shares.split(step), strict=True):
            gradient[at] = cross_entropy(logits_of, flat[at], target, share, step, by_x=True)[1]
    return gradient.view_as(hidden)


def _moved(batch: Sample, device: torch.device) -> Sample:
    return {name: value.to(device) for name, value in batch.items()}


def observe(
    model: nn.Module,
    names: Iterable[str],
    groups: Iterable[Group],
    observer: Observer,
    *,
    gradients: bool,
    reached: Callable[[int], None] | None = None,
) -> int:
    """Shows `observer` every named linear on the samples of every group (`batching.groups_of`); returns their number.

    With `gradients` the loss of a sample (mean over its labelled tokens) is differentiated. A linear's gradient is
    shown as the backward pass reaches it, so that nothing of all layers is ever held at once but what the backward
    pass holds anyway. `reached` is called after each group with the number of samples of it that the observer has
    seen; nothing is half done then.
    """
    device, count = next(model.parameters()).device, 0
    watcher = Watcher({name: model.get_submodule(name) for name in names}, observer, gradients=gradients)
    with untouched(model), runnable(model), watcher, differentiable(model) if gradients else contextlib.nullcontext():
        for group in groups:
            watcher.shown = group.shown
            try:
                for one in Pass.of(group, device):
                    _run(model, one, watcher)
            except NotByPosition:  # nothing was shown to the observer yet
                for one in Pass.of(Group(group.samples), device):
                    _run(model, one, watcher)
            seen = len(group.samples) if group.shown else 0
            count += seen
            if reached is not None:
                reached(seen)
    return count


@contextlib.contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Inside, the embeddings' output takes a gradient: the weights are frozen, so it has to flow there."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    handle = embeddings.register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))
    try:
        yield
    finally:
        handle.remove()


def _run(model: nn.Module, one: Pass, watcher: Watcher) -> None:
    with watcher.over(one):
        if watcher.gradients:
            with torch.enable_grad():
                ending = one.ending(model)
                watcher.forget()  # the graph holds what the hooks need
                torch.autograd.backward(*ending)
        else:
            with torch.no_grad(), unasked(one.batch):
                model(**one.inputs, use_cache=False)


class NotByPosition(Exception):
    """A watched linear was given something else than the positions of a batch of several samples."""


class Watcher:
    """Hooks on linears, by name, that show an observer what they are given while a pass runs (`over`)."""

    def __init__(self, modules: Mapping[str, nn.Module], observer: Observer, *, gradients: bool) -> None:
        self.modules, self.observer, self.gradients = modules, observer, gradients
        self.shown = True  # whether the observer sees what runs
        # This pass's inputs by their place in memory, each with its first module; held, so that no place is used twice.
        self._given: dict[tuple[int, tuple[int, ...]], tuple[str, Tensor]] = {}
        self._pass: Pass | None = None

    def __enter__(self) -> Watcher:
        self._handles = [m.register_forward_hook(self._after_forward(name)) for name, m in self.modules.items()]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    @contextlib.contextmanager
    def over(self, one: Pass) -> Iterator[None]:
        """Inside, what runs are this pass's positions, or a part of the model over them."""
        self._pass = one
        try:
            yield
        finally:
            self._pass = None
            self.forget()

    def forget(self) -> None:
        """Lets go of the inputs that were told apart, where no forward pass follows."""
        self._given.clear()

    def _after_forward(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            one = self._pass
            if not self.shown or one is None:
                return
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            if not self.gradients:
                y = output.detach().reshape(-1, output.shape[-1])
                self.observer(Observation(name, x, y, None, name, one.samples))
            elif output.requires_grad:  # a reentrant checkpoint's first pass has no gradient, and is repeated
                if one.samples > 1 and len(x) != one.positions:
                    raise NotByPosition
                place = (inputs[0].data_ptr(), tuple(inputs[0].shape))
                source, _ = self._given.setdefault(place, (name, inputs[0]))
                held, kept, samples = [x], one.kept, one.samples

                def show(grad: Tensor) -> None:
                    x, flat = held.pop(), grad.detach().reshape(-1, grad.shape[-1])
                    if kept is not None:
                        x, flat = x[kept], flat[kept]
                    self.observer(Observation(name, x, None, flat, source, samples))

                output.register_hook(show)

        return hook

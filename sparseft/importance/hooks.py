"""Calibration: runs samples through the model and shows each linear's input and output gradient to an observer.

One sample at a time, without padding, or several at a time where the observer only sums over tokens: scores are sums
over samples, so they depend neither on the batch size nor on the number of ranks. Nothing of the model is changed, and
no weight gradient is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseft.importance.batching import Group, Sample, pad_together, summed_loss
from sparseft.models.decoder import runnable


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
    training = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


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
    watcher, count = _Watcher(model, names, observer, gradients), 0
    with untouched(model), runnable(model), watcher:
        for group in groups:
            watcher.run(group)
            seen = len(group.samples) if group.shown else 0
            count += seen
            if reached is not None:
                reached(seen)
    return count


class _NotByPosition(Exception):
    """A watched linear was given something else than the batch's positions."""


class _Watcher:
    """Hooks on the named linears while samples run."""

    def __init__(self, model: nn.Module, names: Iterable[str], observer: Observer, gradients: bool) -> None:
        self.model, self.observer, self.gradients = model, observer, gradients
        self.modules = {name: model.get_submodule(name) for name in names}
        self.device = next(model.parameters()).device
        # This pass's inputs by their place in memory, each with its first module; held, so that no place is used twice.
        self.given: dict[tuple[int, tuple[int, ...]], tuple[str, Tensor]] = {}
        self.kept: Tensor | None = None  # flat positions of the batch's tokens; None: all
        self.positions = 0  # of the batch, where it has several samples
        self.samples = 1  # of the batch
        self.shown = True  # whether the observer sees what runs

    def __enter__(self) -> _Watcher:
        self.handles = [m.register_forward_hook(self._after_forward(name)) for name, m in self.modules.items()]
        if self.gradients:  # the weights are frozen, so the gradient flows to the embeddings' output
            embeddings = self.model.get_input_embeddings()
            self.handles.append(embeddings.register_forward_hook(lambda _m, _i, output: output.requires_grad_(True)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.given.clear()

    def run(self, group: Group) -> None:
        """One pass over the group, or where it turns out that its samples cannot share one, a pass for each."""
        self.shown = group.shown
        if group.padded:
            try:
                self._run_together(group.samples)
                return
            except _NotByPosition:  # nothing was shown to the observer yet
                pass
        for sample in group.samples:
            self._run_alone(sample)

    def _run_together(self, samples: list[Sample]) -> None:
        batch, kept = pad_together(samples)
        batch = {name: value.to(self.device) for name, value in batch.items()}
        labels = batch.pop("labels")
        self.kept = kept.to(self.device) if kept is not None else None
        self.positions, self.samples = labels.numel() if len(samples) > 1 else 0, len(samples)
        try:
            with torch.enable_grad():
                self._backward(summed_loss(self.model(**batch, use_cache=False).logits, labels))
        finally:
            self.kept, self.positions, self.samples = None, 0, 1
            self.given.clear()

    def _run_alone(self, sample: Sample) -> None:
        sample = {name: value.to(self.device) for name, value in sample.items()}
        if self.gradients:
            with torch.enable_grad():
                self._backward(self.model(**sample, use_cache=False).loss)
        else:
            with torch.no_grad():
                sample.pop("labels")
                self.model(**sample, use_cache=False)

    def _backward(self, loss: Tensor) -> None:
        self.given.clear()  # the graph holds what the hooks need
        torch.autograd.backward(loss, inputs=None)

    def _after_forward(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not self.shown:
                return
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            if not self.gradients:
                y = output.detach().reshape(-1, output.shape[-1])
                self.observer(Observation(name, x, y, None, name, self.samples))
            elif output.requires_grad:  # a reentrant checkpoint's first pass has no gradient, and is repeated
                if self.positions and len(x) != self.positions:
                    raise _NotByPosition
                place = (inputs[0].data_ptr(), tuple(inputs[0].shape))
                source, _ = self.given.setdefault(place, (name, inputs[0]))
                held, kept, samples = [x], self.kept, self.samples

                def show(grad: Tensor) -> None:
                    x, flat = held.pop(), grad.detach().reshape(-1, grad.shape[-1])
                    if kept is not None:
                        x, flat = x[kept], flat[kept]
                    self.observer(Observation(name, x, None, flat, source, samples))

                output.register_hook(show)

        return hook

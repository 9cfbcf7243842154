"""Calibration: runs samples through the model and shows each linear's input and output gradient to an observer.

One sample at a time, without padding, or several at a time where the observer only sums over tokens: scores are sums
over samples, so they depend neither on the batch size nor on the number of ranks. Nothing of the model is changed, and
no weight gradient is kept.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.distributed import ranks
from sparseft.distributed.zero3 import any_sharded
from sparseft.errors import UserError
from sparseft.importance.batching import (
    LOGIT_ELEMENTS,
    Sample,
    groups_of,
    may_share,
    pad_together,
    split_samples,
    summed_loss,
)
from sparseft.models.decoder import runnable

# Called with (module name, input (tokens, in), output (tokens, out), null, source) after the forward pass, or with
# (module name, input, null, output gradient (tokens, out), source) in the backward pass. The source is the first module
# that was given the same input, so that q, k and v (gate and up) share its statistics.
Observer = Callable[[str, Tensor, Tensor | None, Tensor | None, str], None]


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
    batches: Iterable[Mapping[str, Any]],
    observer: Observer,
    *,
    gradients: bool,
    together: int = 0,
    share: tuple[int, int] = (0, 1),
    done: tuple[int, int] = (0, 0),
    starting: Callable[[int], None] | None = None,
    reached: Callable[[int, int], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Shows `observer` every named linear on every sample, and returns the number of samples.

    With `gradients` the loss of a sample (mean over its labelled tokens) is differentiated, and samples without a
    labelled token are passed over. A linear's gradient is shown as the backward pass reaches it, so that nothing of
    all layers is ever held at once but what the backward pass holds anyway.

    A model in shards takes all ranks to each pass: samples go one at a time, and a rank that has none left runs along
    unseen, with calls of `reached` and `progress` as the others have them.

    Args:
        together: with `gradients`, tokens that may go through the model at once: several samples then share a forward
            pass (where the model allows it: `may_share`) and the observer sees the tokens of all of them, padding
            left out. 0: one sample at a time.
        share: (rank, ranks): of the samples only every ranks-th, beginning with the rank-th.
        done: (groups, samples) that were observed before an interruption; they are passed over.
        starting: called with the number of samples that the observer will see next.
        reached: called with (groups, samples) done, when the observer has seen all of them and nothing else.
        progress: called with the number of samples done.

    Raises:
        UserError: with a single rank, where no sample can be used.
    """
    watcher = _Watcher(model, names, observer, gradients)
    in_step = any_sharded(model)
    if not (gradients and together and may_share(model)) or in_step:
        together = 0
    else:
        together = max(1, min(together, LOGIT_ELEMENTS // model.config.get_text_config().vocab_size))
    samples = (sample for batch in batches for sample in split_samples(batch))
    if gradients:  # the first label predicts nothing: the loss is over labels[1:]
        samples = (sample for sample in samples if (sample["labels"][:, 1:] != -100).any())
    groups, count = done
    if in_step:
        samples = iter(kept := list(samples))
    with untouched(model), runnable(model), watcher:
        every = groups_of(itertools.islice(samples, share[0], None, share[1]), together)
        mine: Iterable[list[Sample] | None] = itertools.islice(every, groups, None)
        if in_step:
            mine = list(mine)
            mine += [None] * (max(ranks.all_gather_object(len(mine))) - len(mine))
        for group in mine:
            if group is None:
                watcher.run_unseen(kept[0])
            else:
                watcher.run(group, alone=not together, starting=starting or (lambda _count: None))
                groups, count = groups + 1, count + len(group)
            if reached is not None:
                reached(groups, count)
            if progress is not None:
                progress(count)
    if count == 0 and share[1] == 1:
        raise no_samples()
    return count


def no_samples() -> UserError:
    """What to raise where nothing can be scored."""
    return UserError("the calibration batches hold no sample with a labelled token, so nothing can be scored.")


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
        self.kept: Tensor | None = None  # flat positions of the batch's tokens; null: all
        self.positions = 0  # of the batch, where it has several samples
        self.unseen = False  # whether what runs is not shown to the observer

    def __enter__(self) -> _Watcher:
        self.handles = [m.register_forward_hook(self._after_forward(name)) for name, m in self.modules.items()]
        if self.gradients:  # the weights are frozen: the embeddings' output is where the gradient's way ends
            embeddings = self.model.get_input_embeddings()
            self.handles.append(embeddings.register_forward_hook(lambda _m, _i, output: output.requires_grad_(True)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.given.clear()

    def run(self, group: list[Sample], alone: bool, starting: Callable[[int], None]) -> None:
        """One pass over the group, or where it turns out that its samples cannot share one, a pass for each."""
        if not alone:
            try:
                self._run_together(group, starting)
                return
            except _NotByPosition:  # nothing was shown to the observer yet
                pass
        for sample in group:
            self._run_alone(sample, starting)

    def run_unseen(self, sample: Sample) -> None:
        """The passes of one sample, for the ranks that need this one's shards."""
        self.unseen = True
        try:
            self._run_alone(sample, lambda _count: None)
        finally:
            self.unseen = False

    def _run_together(self, group: list[Sample], starting: Callable[[int], None]) -> None:
        batch, kept = pad_together(group)
        batch = {name: value.to(self.device) for name, value in batch.items()}
        labels = batch.pop("labels")
        self.kept = kept.to(self.device) if kept is not None else None
        self.positions = labels.numel() if len(group) > 1 else 0
        try:
            with torch.enable_grad():
                loss = summed_loss(self.model(**batch, use_cache=False).logits, labels)
                self._backward(loss, len(group), starting)
        finally:
            self.kept, self.positions = None, 0
            self.given.clear()

    def _run_alone(self, sample: Sample, starting: Callable[[int], None]) -> None:
        sample = {name: value.to(self.device) for name, value in sample.items()}
        if self.gradients:
            with torch.enable_grad():
                self._backward(self.model(**sample, use_cache=False).loss, 1, starting)
        else:
            starting(1)
            with torch.no_grad():
                sample.pop("labels")
                self.model(**sample, use_cache=False)

    def _backward(self, loss: Tensor, samples: int, starting: Callable[[int], None]) -> None:
        self.given.clear()  # the graph holds what the hooks need
        starting(samples)
        torch.autograd.backward(loss, inputs=None)

    def _after_forward(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if self.unseen:
                return
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            if not self.gradients:
                self.observer(name, x, output.detach().reshape(-1, output.shape[-1]), None, name)
            elif output.requires_grad:  # not so in the first pass of a reentrant checkpoint, which is done again
                if self.positions and len(x) != self.positions:
                    raise _NotByPosition
                place = (inputs[0].data_ptr(), tuple(inputs[0].shape))
                source, _ = self.given.setdefault(place, (name, inputs[0]))
                held, kept = [x], self.kept
                output.register_hook(lambda grad: self._show(name, held.pop(), grad, source, kept))

        return hook

    def _show(self, name: str, x: Tensor, grad: Tensor, source: str, kept: Tensor | None) -> None:
        grad = grad.detach().reshape(-1, grad.shape[-1])
        if kept is not None:
            x, grad = x[kept], grad[kept]
        self.observer(name, x, None, grad, source)

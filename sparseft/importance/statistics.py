"""Calibration: runs samples through the model and shows each linear's input and output gradient to an observer.

One sample at a time, without padding: scores are sums over samples, so they depend neither on the batch size nor on the
number of ranks. Nothing of the model is changed, and no weight gradient is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.errors import UserError

# Called with (module name, input (tokens, in), output (tokens, out), output gradient (tokens, out) or null, source).
# The source is the first module that was given the same input, so that q, k and v (gate and up) share its statistics.
Observer = Callable[[str, Tensor, Tensor, Tensor | None, str], None]


def split_samples(batch: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """The batch's samples as batches of one, without the positions that the attention mask leaves out."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise UserError("a calibration batch needs input_ids of shape (batch, tokens), as the model takes them.")
    mask = batch.get("attention_mask")
    for i in range(len(ids)):
        kept = mask[i].bool() if mask is not None else torch.ones_like(ids[i], dtype=torch.bool)
        sample = {}
        for name, value in batch.items():
            if not isinstance(value, Tensor):
                continue
            row = value[i : i + 1]
            sample[name] = row[:, kept] if value.dim() >= 2 and value.shape[1] == ids.shape[1] else row
        sample.setdefault("labels", sample["input_ids"])
        if sample["input_ids"].numel():
            yield sample


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no weight gradients inside; flags as they were afterwards, whatever happens."""
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
    progress: Callable[[int], None] | None = None,
) -> int:
    """Shows `observer` every named linear on every sample, and returns the number of samples.

    With `gradients` the loss of a sample (mean over its labelled tokens) is differentiated, and samples without a
    labelled token are passed over. A linear's gradient is shown as the backward pass reaches it, so that nothing of
    all layers is ever held at once but what the backward pass holds anyway.
    """
    device = next(model.parameters()).device
    modules = {name: model.get_submodule(name) for name in names}
    handles = []
    # This sample's inputs by their place in memory, each with its first module; held, so that no place is used twice.
    given: dict[tuple[int, tuple[int, ...]], tuple[str, Tensor]] = {}

    def watch(name: str, module: nn.Module):
        def after_forward(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            y = output.detach().reshape(-1, output.shape[-1])
            if not gradients:
                observer(name, x, y, None, name)
            elif output.requires_grad:
                place = (inputs[0].data_ptr(), tuple(inputs[0].shape))
                source, _ = given.setdefault(place, (name, inputs[0]))
                output.register_hook(
                    lambda grad: observer(name, x, y, grad.detach().reshape(-1, grad.shape[-1]), source)
                )

        return module.register_forward_hook(after_forward)

    samples = 0
    with untouched(model), contextlib.ExitStack() as stack:
        stack.callback(lambda: [handle.remove() for handle in handles])
        handles += [watch(name, module) for name, module in modules.items()]
        if gradients:  # the weights are frozen: the embeddings' output is where the gradient's way ends
            handles.append(
                model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))
            )
        for batch in batches:
            for sample in split_samples(batch):
                sample = {name: value.to(device) for name, value in sample.items()}
                given.clear()
                if gradients:
                    # The first label predicts nothing: the loss is over labels[1:].
                    if not (sample["labels"][:, 1:] != -100).any():
                        continue
                    with torch.enable_grad():
                        loss = model(**sample, use_cache=False).loss
                        torch.autograd.backward(loss, inputs=None)
                else:
                    with torch.no_grad():
                        sample.pop("labels")
                        model(**sample, use_cache=False)
                samples += 1
                if progress is not None:
                    progress(samples)
    if samples == 0:
        raise UserError("the calibration batches hold no sample with a labelled token, so nothing can be scored.")
    return samples

"""The loss with logits only where labels are, a few tokens at a time.

Most tokens of instruction data have no label, and their logits are asked for by nobody: with a large vocabulary they
are a good part of a step and most of its memory. Here the decoder runs as ever, and the head only on the tokens that
predict a label, in chunks; the gradient of each chunk is taken with its loss, so that its logits are gone before the
next ones. The loss and the gradient are the plain ones. So is the loss of what is only evaluated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from sparseft import console
from sparseft.config import RunConfig
from sparseft.distributed.shards import any_sharded, gathered
from sparseft.models.decoder import backbone, language_model
from sparseft.models.head import (
    after_decoder,
    cross_entropy,
    decoder_output,
    example_output,
    head_is_apart,
    head_of,
    tokens_at_once,
)
from sparseft.models.labels import IGNORED
from sparseft.models.mixed_precision import as_before

ROWS = "label_rows"  # in a batch: the flat positions of the tokens that predict a label


def label_rows(labels: Tensor) -> Tensor:
    """The flat positions (n,) of the tokens in (samples, tokens) that predict a label: each those before it. On a
    device this waits for it, so it is best asked where the batch is made."""
    return F.pad(labels[:, 1:] != IGNORED, (0, 1)).reshape(-1).nonzero().squeeze(1)


def usable(model: nn.Module, config: RunConfig) -> bool:
    """Whether a run's loss is computed this way: `trainer.loss=auto`, unless something needs the plain one, which is
    said."""
    if config.trainer.loss == "plain":
        return False
    if config.hardware.zero_stage == 3:
        reason: str | None = "ZeRO-3 has the head in shards"
    else:
        reason = why_plain(model)
    if reason is None and config.trainer.compile in ("model", "graphs"):
        reason = f"trainer.compile={config.trainer.compile} takes the whole model"
    if reason is not None:
        console.log(f"loss: logits of all tokens, as {reason}")
    return reason is None


def why_plain(model: nn.Module) -> str | None:
    """Why the model keeps its own way to its loss; None where the labelled loss is the same.

    Tried on random numbers in the decoder's place, which does not run; of a model without content (on `meta`) the
    shapes have to tell.
    """
    inner = language_model(model)
    configs = (inner.config, inner.config.get_text_config())  # one and the same but of models that see images, too
    if any(getattr(config, "output_router_logits", False) for config in configs):
        return "it adds terms of its own for its experts"
    if getattr(inner.config, "z_loss_coefficient", None):  # Bamba's, too small for the trial to tell
        return "it adds a term of its own for the size of its logits"
    # FSDP2 has the head whole in a pass, which this is not.
    with gathered(_head(inner) if any_sharded(inner) else ()):
        return _why_plain_by_trial(inner)


def _why_plain_by_trial(inner: nn.Module) -> str | None:
    if not head_is_apart(inner):
        return "its logits need more than the decoder's output of their own token"
    x = example_output(inner, 6)
    assert x is not None
    labels = torch.tensor([[1, 0, IGNORED, 1, IGNORED, 0]])
    rows, labels = label_rows(labels), labels.to(x.device)
    try:
        with torch.no_grad(), after_decoder(inner) as run:
            own = run(x, labels=labels).loss
            with head_of(inner) as logits_of:
                ours = _loss(inner, logits_of, x, labels, rows, None)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model's own code, which may ask its decoder for anything
        return "its loss needs more than its logits"
    if own is None or not (own.is_meta or torch.allclose(own.float(), ours.float(), rtol=1e-2, atol=1e-4)):
        return "its loss is not the mean cross-entropy of the labelled tokens"
    return None


def fewest_logits(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside, the model given labels returns a loss for which it makes no more logits than its kind of loss needs."""
    return labelled_loss(model) if why_plain(model) is None else contextlib.nullcontext()


@contextlib.contextmanager
def labelled_loss(model: nn.Module, device: torch.device | None = None, smoothing: float = 0.0) -> Iterator[None]:
    """Inside, the model (also wrapped: by peft, by torch's or DeepSpeed's data parallel) given labels returns the loss
    alone, computed this way; without labels it does what it does. For models of which `why_plain` says None.

    device: the one whose memory the chunks are for; None: where the model runs. smoothing: of labels, in training alone
    (`label_smoothing.py`)."""
    inner = language_model(model)
    own = inner.forward

    def forward(*args: Any, **given: Any) -> Any:
        labels, rows = given.pop("labels", None), given.pop(ROWS, None)
        items = given.pop("num_items_in_batch", None) if labels is not None else None
        if labels is None:
            return own(*args, **given)
        if args:
            given["input_ids"] = args[0]
        hidden = decoder_output(inner, given, own)
        with head_of(inner) as logits_of:
            rows = label_rows(labels) if rows is None else rows
            loss = _loss(inner, logits_of, hidden, labels, rows, items, device, smoothing if inner.training else 0.0)
            return CausalLMOutputWithPast(loss=loss)

    with forward_of(inner, forward):
        yield


@contextlib.contextmanager
def forward_of(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, `forward` stands in the place of the model's forward pass."""
    before = vars(model).get("forward")  # of a wrapper, as for mixed precision
    model.forward = as_before(before, forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before  # type: ignore[method-assign]


def _loss(
    model: nn.Module,
    logits_of: Callable[[Tensor], Tensor],
    hidden: Tensor,  # (samples, tokens, features), or (tokens, features) of one sample
    labels: Tensor,  # (samples, tokens)
    rows: Tensor,
    items: Tensor | int | None,  # what the sum is divided by; None: the labelled tokens of the batch
    device: torch.device | None = None,  # whose memory the chunks are for; None: hidden's
    smoothing: float = 0.0,
) -> Tensor:
    """The sum of the labelled tokens' cross-entropies ÷ items: fp32, a scalar."""
    rows = rows.to(hidden.device)
    x = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows)
    targets = labels.reshape(-1).to(hidden.device)[rows + 1]
    count = len(rows) if items is None else items
    if isinstance(count, Tensor):
        divisor = count.to(hidden.device, torch.float32)
    else:
        divisor = torch.full((), float(count), device=hidden.device)
    grad = torch.is_grad_enabled()
    # What trains and makes logits of the decoder's output; a table tied to the embeddings is also the decoder's.
    trained = [parameter for parameter in _head(model) if parameter.requires_grad] if grad else []
    step = tokens_at_once(model, device or x.device)
    return _ChunkedLoss.apply(x, targets, divisor.reciprocal(), logits_of, step, smoothing, grad, *trained)


def _head(model: nn.Module) -> list[nn.Parameter]:
    below = {id(p) for p in backbone(model).parameters()}  # type: ignore[union-attr]
    head = [*model.get_output_embeddings().parameters(), *(p for p in model.parameters() if id(p) not in below)]  # type: ignore[operator]
    return list({id(p): p for p in head}.values())


class _ChunkedLoss(torch.autograd.Function):
    """`cross_entropy` with one weight for all tokens, whose gradient is made with it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (n, features)
        targets: Tensor,  # (n,)
        weight: Tensor,  # a scalar
        logits_of: Callable[[Tensor], Tensor],
        step: int,
        smoothing: float,
        grad: bool,
        *trained: nn.Parameter,
    ) -> Tensor:
        by_x = grad and ctx.needs_input_grad[0]
        weights = weight.expand(len(x))
        total, gradient, sums = cross_entropy(
            logits_of, x, targets, weights, step, by_x=by_x, trained=trained, smoothing=smoothing
        )
        ctx.save_for_backward(gradient, *(own.to(p.dtype) for own, p in zip(sums, trained, strict=True)))
        return total + 0.0 * weight  # the mean over no tokens is not a number

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_loss: Tensor) -> tuple[Tensor | None, ...]:
        found = [None if each is None else each * by_loss.to(each.dtype) for each in ctx.saved_tensors]
        return found[0], None, None, None, None, None, None, *found[1:]

"""The loss's gradient by what a model's decoder gives, in chunks of tokens: with a vocabulary of a hundred thousand the
logits of a few samples would take more memory than all else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as DecoderOutput

# Logits that exist at once, twice in fp32: on the CPU 32 MiB in all (half of that took 13 % longer for a vocabulary of
# 49,152, twice of it 14 % less), elsewhere a gibibyte.
LOGITS_CPU, LOGITS = 2**22, 2**27


class _Decoded(Exception):
    """The decoder has run; the head need not."""


def decoder_output(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the decoder gives to the head (samples, tokens, features), with its graph: a forward pass without logits."""
    found: list[Tensor] = []

    def after(_module: nn.Module, _args: object, output: object) -> None:
        found.append(output[0])  # type: ignore[index]
        raise _Decoded

    handle = model.base_model.register_forward_hook(after)  # type: ignore[operator, union-attr]
    try:
        model(**inputs, use_cache=False)
    except _Decoded:
        pass
    finally:
        handle.remove()
    return found[0]


@contextlib.contextmanager
def head_of(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Inside, the function from a decoder's output (n, features) to the model's logits (n, vocabulary), scaled and
    capped as the model does it. The decoder does not run; the model is as before afterwards."""
    decoder = model.base_model
    given: list[Tensor] = []
    before = vars(decoder).get("forward")  # of a wrapper

    def logits(x: Tensor) -> Tensor:
        given[:] = [x[None]]
        ids = torch.zeros(1, len(x), dtype=torch.long, device=x.device)
        found: Tensor = model.forward(input_ids=ids, use_cache=False).logits[0]
        given.clear()
        return found

    decoder.forward = lambda *_args, **_kwargs: DecoderOutput(last_hidden_state=given[0])  # type: ignore[assignment, union-attr]
    try:
        yield logits
    finally:
        del decoder.forward  # type: ignore[union-attr]
        if before is not None:
            decoder.forward = before  # type: ignore[union-attr]


def head_is_apart(model: nn.Module) -> bool:
    """Whether a token's logits come from the decoder's output of that token and nothing else, as far as a few random
    ones show. A matter of the head: the decoder does not run."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or getattr(model, "base_model", model) is model:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, head.weight.shape[-1], generator=generator).to(head.weight)
    try:
        with torch.no_grad(), head_of(model) as logits:
            whole, parts = logits(x), torch.cat([logits(row[None]) for row in x])
    except Exception:  # a model's own code, which may ask its decoder for anything
        return False
    scale = whole.float().abs().max()
    return whole.shape == parts.shape and bool((whole - parts).float().abs().max() <= 0.02 * scale)


def loss_gradient(
    model: nn.Module,
    hidden: Tensor,  # what the decoder gave (samples, tokens, features)
    labels: Tensor,  # (samples, tokens); -100: not counted
) -> Tensor:
    """The gradient by `hidden` of the sum over samples of the mean cross-entropy of their labelled tokens, each
    predicted by those before it. Of tokens that predict no label no logits are computed."""
    targets = labels[:, 1:]
    labelled = targets != -100
    shares = (labelled / labelled.sum(1, keepdim=True).clamp_min(1))[labelled]  # float32
    rows = F.pad(labelled, (0, 1)).reshape(-1).nonzero().squeeze(1)
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    gradient = torch.zeros_like(flat)
    most = LOGITS_CPU if flat.device.type == "cpu" else LOGITS
    step = max(1, most // model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]
    with torch.enable_grad(), head_of(model) as logits_of:
        for at, target, share in zip(rows.split(step), targets[labelled].split(step), shares.split(step), strict=True):
            x = flat[at].requires_grad_()
            logits = logits_of(x)
            # Of the cross-entropy, by the logits: softmax less the target's one, without a third copy of them.
            wanted = torch.softmax(logits.detach().float(), -1)
            wanted[torch.arange(len(at), device=at.device), target] -= 1
            (gradient[at],) = torch.autograd.grad(logits, x, wanted.mul_(share[:, None]).to(logits.dtype))
    return gradient.view_as(hidden)

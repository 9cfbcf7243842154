"""A causal language model's two parts run apart: the decoder, and the head that makes logits of what it gives.

With a vocabulary of a hundred thousand the logits of a few samples take more memory than all else, so the head is run
on the tokens that need it, a few at a time. It is the model's own code that runs, with all that it does to logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from sparseft.models.decoder import backbone

# Logits that exist at once, twice in fp32: on the CPU 32 MiB in all (half of that took 13 % longer for a vocabulary of
# 49,152, twice of it 14 % less), elsewhere a gibibyte.
LOGITS_CPU, LOGITS = 2**22, 2**27


@dataclass
class DecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    """What heads ask a decoder for, those of models with experts, of ones that see images too, and Gemma 4's."""

    router_logits: tuple[Tensor, ...] | None = None
    image_hidden_states: Any = None
    audio_hidden_states: Any = None
    shared_kv_states: Any = None


class _Decoded(Exception):
    """The decoder has run; the head need not."""


def tokens_at_once(model: nn.Module, device: torch.device) -> int:
    """How many tokens the head is given at once."""
    most = LOGITS_CPU if device.type == "cpu" else LOGITS
    return max(1, most // model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]


def decoder_output(model: nn.Module, inputs: Mapping[str, Any], forward: Callable[..., Any] | None = None) -> Tensor:
    """What the decoder gives to the head (samples, tokens, features), with its graph: a forward pass without logits.

    forward: the model's own, where another stands in its place.
    """
    found: list[Tensor] = []

    def after(_module: nn.Module, _args: object, output: object) -> None:
        found.append(output[0])  # type: ignore[index]
        raise _Decoded

    handle = backbone(model).register_forward_hook(after)  # type: ignore[union-attr]
    try:
        (model if forward is None else forward)(**{**inputs, "use_cache": False})
    except _Decoded:
        pass
    finally:
        handle.remove()
    return found[0]


@contextlib.contextmanager
def head_of(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Inside, the function from a decoder's output (n, features) to the model's logits (n, vocabulary), scaled and
    capped as the model does it. The decoder does not run; the model is as before afterwards."""
    with after_decoder(model) as run:
        yield lambda x: run(x).logits[0]


@contextlib.contextmanager
def after_decoder(model: nn.Module) -> Iterator[Callable[..., Any]]:
    """Inside, the function that gives the model's whole output for a decoder's output (n, features) of one sample; it
    takes what else the model's forward pass takes. The decoder does not run."""
    decoder = backbone(model)
    given: list[Tensor] = []
    before = vars(decoder).get("forward")  # of a wrapper

    def run(x: Tensor, **options: Any) -> Any:
        given[:] = [x[None]]
        ids = torch.zeros(1, len(x), dtype=torch.long, device=x.device)
        found = model.forward(input_ids=ids, use_cache=False, **options)
        if given:
            given.clear()
            raise ValueError("the model's forward pass goes round its base model's, as OPT's does")
        return found

    decoder.forward = lambda *_args, **_kwargs: DecoderOutput(last_hidden_state=given.pop())  # type: ignore[assignment, union-attr]
    try:
        yield run
    finally:
        del decoder.forward  # type: ignore[union-attr]
        if before is not None:
            decoder.forward = before  # type: ignore[union-attr]


def head_is_apart(model: nn.Module) -> bool:
    """Whether a token's logits come from the decoder's output of that token and nothing else, as far as a few random
    ones show. A matter of the head: the decoder does not run."""
    x = example_output(model)
    if x is None:
        return False
    try:
        with torch.no_grad(), head_of(model) as logits:
            whole, parts = logits(x), torch.cat([logits(row[None]) for row in x])
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model's own code, which may ask its decoder for anything
        return False
    if whole.is_meta:
        return whole.shape == parts.shape
    scale = whole.float().abs().max()
    return whole.shape == parts.shape and bool((whole - parts).float().abs().max() <= 0.02 * scale)


def example_output(model: nn.Module, tokens: int = 3) -> Tensor | None:
    """Random numbers (tokens, features) as a decoder might give them; None of a model without a head of its own."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or backbone(model) is None:
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, head.weight.shape[-1], generator=generator).to(head.weight)


def _kept_as_they_are() -> contextlib.AbstractContextManager[None]:
    """Inside, autograd keeps plain tensors: hooks on saved tensors around it (`training/recomputing.py`) would hold the
    logits of a chunk, as capped ones are saved, until the end of the forward pass."""
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda kept: kept)


def cross_entropy(
    logits_of: Callable[[Tensor], Tensor],  # `head_of`
    x: Tensor,  # what the decoder gave (n, features)
    targets: Tensor,  # (n,)
    weights: Tensor,  # of each token in the sum: (n,), float32
    step: int,  # tokens whose logits exist at once
    *,
    by_x: bool,
    trained: Sequence[Tensor] = (),
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """The weighted sum of the tokens' cross-entropies (a scalar), its gradient by `x` (where it is wanted: `by_x`) and
    by the head's own `trained` parameters. smoothing: the share of each target's probability that all tokens of the
    vocabulary have in equal parts (label smoothing). Sums are in fp32; the gradient of a chunk is taken with its loss,
    so that its logits are gone before the next ones."""
    total = torch.zeros((), dtype=torch.float32, device=x.device)
    gradient = torch.zeros_like(x) if by_x else None
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in trained]
    for start in range(0, len(x), step):
        part = x[start : start + step].detach().requires_grad_(by_x)
        target, weight = targets[start : start + step, None], weights[start : start + step, None]
        with torch.set_grad_enabled(by_x or bool(sums)), _kept_as_they_are():
            logits = logits_of(part)
        values = logits.detach().to(torch.float32, copy=True)  # the only one, from here on changed in place
        values.sub_(values.amax(1, keepdim=True))
        of_target = values.gather(1, target)
        if smoothing:
            of_target += smoothing * (values.mean(1, keepdim=True) - of_target)
        all_of_them = values.exp_().sum(1, keepdim=True)
        total += ((all_of_them.log() - of_target) * weight).sum()
        if not logits.requires_grad:
            continue
        # The gradient by the logits: softmax less the target's probabilities.
        wanted = values.div_(all_of_them)
        if smoothing:
            wanted.sub_(smoothing / values.shape[1])
        wanted.scatter_add_(1, target, torch.full_like(target, smoothing - 1.0, dtype=torch.float32))
        inputs = [*([part] if by_x else []), *trained]
        found = torch.autograd.grad(logits, inputs, wanted.mul_(weight).to(logits.dtype), allow_unused=True)
        if gradient is not None:
            gradient[start : start + step] = found[0]
            found = found[1:]
        for own, each in zip(sums, found, strict=True):
            if each is not None:
                own += each
    return total, gradient, sums

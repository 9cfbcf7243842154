"""Tries a model on a few tokens: which of them do its predictions depend on?

The gradient of a position's logits towards a token's embedding is exactly zero where attention is masked, and where a
recurrence, a convolution or a window does not reach. No list of architectures could tell: encoders become decoders by
a setting, and a model's own code may do anything.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.distributed.zero3 import full_shape
from sparseft.errors import UserError, reason_of
from sparseft.models.decoder import input_embeddings

# Rows and length of the tokens that a model is tried on; the second where it cannot be run on so few.
SHAPES = ((7, 8), (2, 128))


class Untraceable(RuntimeError):
    """The tokens' embeddings cannot be seen on their way into the model, so there is no gradient towards them."""


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each module's own mode, what it had before the forward pass (recurrent states) and the
    random states come back."""
    kept = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        model.eval()
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            yield
    finally:
        for module, attributes, buffers in kept:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def dependence(model: nn.Module, ids: Tensor, scored: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    """The logits at `scored`, and the gradient of a random combination of them towards the embedding of each token of
    `ids` (rows, length).

    scored: an index into (rows, length). inputs: what else the forward pass takes. To be called `undisturbed`.

    Returns the logits in fp32, (…, vocabulary), and how strongly they depend on each token, (rows, length); logits that
    are infinite or no number are left out of that. Raises `Untraceable`.
    """
    embeddings = input_embeddings(model)
    if embeddings is None:
        raise Untraceable
    found: list[Tensor] = []

    def keep(module: Any, arguments: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or output.numel() != ids.numel() * output.shape[-1]:
            return output  # of other tokens
        found.append(output.detach().requires_grad_())
        return found[-1].clone()  # a leaf could not be changed in place

    handle = embeddings.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = run(model, ids, **inputs)[scored].float()
            signs = torch.randint(2, logits.shape, generator=torch.Generator().manual_seed(0)).to(logits) * 2 - 1
            total = torch.where(logits.isfinite(), logits * signs, 0.0).sum()
            gradients = torch.autograd.grad(total, found, allow_unused=True) if found and total.requires_grad else ()
    finally:
        handle.remove()
    strength = torch.zeros(ids.shape, device=ids.device)
    if not any(gradient is not None for gradient in gradients):
        raise Untraceable
    for gradient in gradients:
        if gradient is not None:
            each = gradient.float().abs().amax(-1)
            turned = each.shape == ids.shape[::-1] != ids.shape  # XLNet has the positions first
            strength += (each.T if turned else each).reshape(ids.shape)
    return logits.detach(), strength


def run(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    """The logits (rows, length, vocabulary) of `ids`, not compiled, without a cache where the model can do without."""
    options = {"use_cache": False} if _takes(model, "use_cache") else {}
    forward = model.forward if getattr(model, "_compiled_call_impl", None) is not None else model
    return forward(input_ids=ids, **options, **inputs).logits


def plain_tokens(model: nn.Module, rows: int, length: int, shift: int = 0) -> Tensor:
    """Random ids (rows, length), the same always; with another `shift`, at every place another one.

    None of them has a meaning of its own in the config: padding and images are not read as other tokens are.
    """
    embeddings, config = input_embeddings(model), model.config
    both = [config, config.get_text_config()]  # type: ignore[union-attr, operator]
    weight = getattr(embeddings, "weight", None)
    count = both[1].vocab_size if weight is None else full_shape(weight)[0]
    special: set[int] = set()
    for name, value in (item for each in both for item in vars(each).items()):
        if re.search(r"token_(id|index)s?$", name):
            special.update(each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int))
    known = torch.arange(count)
    if count - len(special) > 1:
        known = known[~torch.isin(known, torch.tensor(sorted(special), dtype=torch.long))]
    drawn = torch.randint(len(known), (rows, length), generator=torch.Generator().manual_seed(0))
    return known[(drawn + shift) % len(known)].to(next(model.parameters()).device if weight is None else weight.device)


def check_causal(model: nn.Module, what: str) -> None:
    """Refuses a model in which a position sees later ones: trained to predict the next token, it would read it.

    Two witnesses have to agree, so that rounding is never taken for sight: the gradient of a position's logits towards
    later tokens, which is exactly zero in a causal model, and the logits themselves with other tokens there. Weights,
    modes and random states are left as they were; a model in shards has to be `runnable`, in all processes at once.

    what: how the user named the model, for messages.

    Raises:
        UserError: a model that sees later tokens, that cannot be run on a few, or whose logits are no number.
    """
    name = type(model).__name__
    with undisturbed(model):
        for rows, length in SHAPES:
            try:
                sees = _sees_later(model, rows, length)
                break
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # the model's code may be anybody's
                if (rows, length) == SHAPES[-1]:
                    raise UserError(
                        f"{what}: {name} cannot be run on {length} tokens, so whether it is a causal language model is "
                        f"not known: {type(error).__name__}: {reason_of(error)}"
                    ) from error
    if sees is None:
        raise UserError(f"{what}: the logits of {name} are no number (nan) for plain text; are its weights whole?")
    if sees:
        raise UserError(
            f"{what}: {name} is not causal: its predictions depend on later tokens, so that it would read the answer "
            "instead of learning it; use a causal language model, not an encoder."
        )


def _sees_later(model: nn.Module, rows: int, length: int) -> bool | None:
    """Whether a position depends on a later token; None where logits are no number.

    In every row of tokens it is another position, so that no border of a block or a window hides it.
    """
    ids = plain_tokens(model, rows, length)
    at = torch.linspace(0, length - 2, rows).long()
    scored = (torch.arange(rows, device=ids.device), at.to(ids.device))
    later = (torch.arange(length) > at[:, None]).to(ids.device)
    mask = {"attention_mask": torch.ones_like(ids)} if _takes(model, "attention_mask") else {}
    try:
        logits, strength = dependence(model, ids, scored, **mask)
        if (strength[later] == 0).all() and not logits.isnan().any():
            return False
    except Untraceable:  # then the second witness alone
        with torch.no_grad():
            logits = run(model, ids, **mask)[scored].float()
    if logits.isnan().any():
        return None
    others = torch.where(later, plain_tokens(model, rows, length, shift=1), ids)
    with torch.no_grad():
        changed = run(model, others, **mask)[scored].float()
    return not torch.equal(logits, changed)


def _takes(model: nn.Module, name: str) -> bool:
    """Whether the forward pass can be given the argument `name`."""
    known = inspect.signature(model.forward).parameters
    return name in known or any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())

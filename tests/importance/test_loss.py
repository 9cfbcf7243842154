"""The loss's gradient in chunks of tokens is autograd's from whole logits, whatever a model does to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from sparseft.importance.batching import Group, may_share
from sparseft.importance.hooks import Pass, loss_gradient
from sparseft.memory import AllocationCounter
from sparseft.models import head
from support.calibration import samples

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CAPPED = {"final_logit_softcapping": 0.5, "head_dim": 8, "num_key_value_heads": 2}
OTHERS = {
    "capped": lambda: transformers.Gemma2Config(**SMALL, **CAPPED),
    "scaled": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=0.3),
    "multiplied": lambda: transformers.CohereConfig(**SMALL, logit_scale=3.0),
}


def made(make_model: Callable[..., Any], kind: str) -> Any:
    if kind not in OTHERS:
        return make_model(kind)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(OTHERS[kind]()).eval()


def by_embeddings(model: Any, backward: Callable[[], None]) -> Tensor:
    """The gradient by the embeddings' output."""
    found: list[Tensor] = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _m, _i, y: found.append(y.detach().requires_grad_()) or found[-1]
    )
    backward()
    handle.remove()
    assert found[0].grad is not None
    return found[0].grad


@pytest.mark.parametrize("most", [1, 96 * 3, 96 * 1000], ids=["one-token", "three-tokens", "all-tokens"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", *OTHERS])
def test_it_is_the_sum_of_every_samples_own_loss(
    make_model: Callable[..., Any], kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = made(make_model, kind), samples((9, 5, 12))
    assert may_share(model)
    monkeypatch.setattr(head, "LOGITS_CPU", most)
    (one,) = Pass.of(Group(batches, padded=True), torch.device("cpu"))
    found = by_embeddings(model, lambda: torch.autograd.backward(*one.ending(model)))
    for row, batch in enumerate(batches):
        wanted = by_embeddings(model, lambda b=batch: model(**b).loss.backward())
        length = wanted.shape[1]
        torch.testing.assert_close(found[row, :length], wanted[0], rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
        assert not found[row, length:].any()
    assert "forward" not in vars(model.base_model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_few_logits_exist_at_once_and_none_of_tokens_without_a_label(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = make_model("llama"), []
    model.lm_head.register_forward_hook(lambda _m, _i, y: rows.append(y.shape[:-1].numel()))
    batches = samples((9, 12))  # of which 3 and 4 are prompt: 6 and 8 tokens predict a label
    (one,) = Pass.of(Group(batches, padded=True), torch.device("cpu"))
    monkeypatch.setattr(head, "LOGITS_CPU", 96 * 5)
    one.ending(model)
    assert rows == [5, 5, 4]
    hidden, labels = torch.randn(4, 64, 48), torch.randint(96, (4, 64))
    width = model.config.vocab_size
    monkeypatch.setattr(head, "LOGITS_CPU", width * 8)
    with AllocationCounter() as counter:
        loss_gradient(model, hidden, labels)
    assert counter.peak < 4 * (2.5 * 8 * width + 2 * hidden.numel() + 10 * labels.numel())


def beside(model: Any) -> None:
    """Lets the logits look at more than the decoder's output of their own token."""
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits + output.logits.mean(1, keepdim=True)
        return output

    model.forward = forward


def test_a_head_that_takes_more_than_a_tokens_own_output_is_not_run_apart(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    beside(model)
    assert not head.head_is_apart(model) and not may_share(model)
    model = make_model("llama")
    plain = model.model.forward
    model.model.forward = lambda *a, **k: plain(*a, **k)  # as a library does that moves inputs
    before = model.model.forward
    assert head.head_is_apart(model) and model.model.forward is before

"""The loss of held-out examples is the model's own, and makes logits where labels are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import sparseft
from sparseft.adapters.lifecycle import units
from sparseft.data.packing import Collator
from sparseft.evaluation.held_out import batch_losses
from sparseft.memory import AllocationCounter
from sparseft.models import head, labelled_loss
from sparseft.trim.measured import Measured
from support.experts import build
from support.training import CPU, examples

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def own_router() -> Any:
    model = build("mixtral").eval()
    model.config.output_router_logits = True
    return model


def another_loss() -> Any:
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL)).eval()
    usual = model.loss_function
    model.loss_function = lambda *args, **options: 1.5 * usual(*args, **options)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "plain": lambda: transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL)).eval(),
    "capped": lambda: transformers.AutoModelForCausalLM.from_config(
        transformers.Gemma2Config(**SMALL, final_logit_softcapping=0.5, head_dim=8, num_key_value_heads=2)
    ).eval(),
    "scaled": lambda: transformers.AutoModelForCausalLM.from_config(
        transformers.GraniteConfig(**SMALL, logits_scaling=0.3)
    ).eval(),
    "loss of its own": another_loss,
    "router": own_router,
}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_models_own(name: str) -> None:
    torch.manual_seed(0)
    model, rows = MODELS[name](), list(examples(7))
    found = batch_losses(model, rows, 0, CPU, 3)
    model.config.output_router_logits = False
    for (loss, _), start in zip(found, (0, 3, 6), strict=True):
        with torch.no_grad():
            own = model(**Collator(0)(rows[start : start + 3]), use_cache=False).loss
        assert loss == pytest.approx(float(own), rel=1e-6)
    assert "forward" not in vars(model)


def test_logits_of_tokens_without_a_label_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for a loss nor for the slopes that trimming follows."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL | {"vocab_size": 5000}))
    model = sparseft.attach(model, sparseft.S2FTConfig(d_ratio=0.2))
    monkeypatch.setattr(head, "LOGITS_CPU", 5000 * 8)
    row = {"input_ids": [5] * 64, "labels": [-100] * 56 + [5] * 8}
    logits, peaks = 4 * 64 * 5000 * 4, []
    measured = Measured(model, units(model), [row] * 4, [row] * 4, [row], pad=0, device=CPU, batch_size=4)
    for plain in (True, False):
        with monkeypatch.context() as patch:
            if plain:
                patch.setattr(labelled_loss, "why_plain", lambda _: "asked for")
            for call in (
                lambda: batch_losses(model, [row] * 4, 0, CPU, 4),
                lambda: measured.slopes(torch.ones(measured.count, dtype=torch.float64), 0),
            ):
                with AllocationCounter() as counter:
                    call()
                peaks.append(counter.peak)
    assert min(peaks[:2]) > logits and max(peaks[2:]) < logits / 2

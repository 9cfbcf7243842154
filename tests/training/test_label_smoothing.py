"""Smoothed labels in training: torch's own smoothed cross-entropy, in chunks and on a model's own loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

import sparseft
from sparseft.data.packing import Collator
from sparseft.models import head
from sparseft.models.labelled_loss import labelled_loss
from sparseft.training.label_smoothing import smoothed_loss
from support.experts import build
from support.running import refused
from support.running import sparseft as sparseft_cli

SHARE = 0.3
WAYS: dict[str, Callable[[Any], Any]] = {
    "labelled": lambda model: labelled_loss(model, smoothing=SHARE),
    "plain": lambda model: smoothed_loss(model, SHARE),
}
SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def made(make_model: Callable[..., Any], kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "capped":
        config = transformers.Gemma2Config(**SMALL, final_logit_softcapping=0.5, head_dim=8, num_key_value_heads=2)
        return transformers.AutoModelForCausalLM.from_config(config)
    return make_model(kind)


def batch_of(vocabulary: int) -> dict[str, Tensor]:
    """Three rows, one of which has no label and one is padded."""
    generator = torch.Generator().manual_seed(1)
    rows = [(torch.randint(vocabulary, (n,), generator=generator).tolist(), p) for n, p in ((11, 4), (7, 7), (9, 2))]
    return Collator(0)([{"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]} for ids, prompt in rows])


def oracle(model: Any, batch: dict[str, Tensor], items: int | None) -> Tensor:
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
    targets = batch["labels"][:, 1:].reshape(-1)
    total = F.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]).float(), targets, label_smoothing=SHARE, reduction="sum"
    )
    return total / (int((targets != -100).sum()) if items is None else items)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("items", [None, 29])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "capped"])
def test_it_is_torchs(
    make_model: Callable[..., Any], kind: str, way: str, items: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained, tied and capped heads, a few tokens at a time."""
    model = made(make_model, kind).eval()  # without dropout
    monkeypatch.setattr(head, "LOGITS_CPU", model.config.vocab_size * 4)
    batch = batch_of(model.config.vocab_size)
    more = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    wanted = oracle(model, batch, items)
    truth = gradients(model, wanted)
    with WAYS[way](model):
        plain = model(**batch, **more, use_cache=False).loss  # held-out losses have none
        model.training = True  # of the model's own flag alone: dropout stays off
        found = model(**batch, **more, use_cache=False).loss
        ours = gradients(model, found)
    model.training = False
    assert "forward" not in vars(model)
    torch.testing.assert_close(plain, model(**batch, **more, use_cache=False).loss, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0.0)
    assert ours.keys() == truth.keys() and abs(plain - found) > 1e-4 * plain
    for name, gradient in truth.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=2e-6 * scale, msg=name)


def test_a_models_own_terms_stay(make_model: Callable[..., Any]) -> None:
    model = build("mixtral").train()
    model.config.output_router_logits = True
    batch = batch_of(model.config.vocab_size)
    own = model(**batch)
    terms = own.loss - F.cross_entropy(own.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert terms > 1e-4
    with smoothed_loss(model, SHARE):
        torch.testing.assert_close(model(**batch).loss, oracle(model, batch, None) + terms)


def test_peft_and_half_precision(make_model: Callable[..., Any]) -> None:
    model = sparseft.attach(make_model("llama").bfloat16(), sparseft.LoraConfig(rank=2, dropout=0.0)).train()
    batch = batch_of(model.config.vocab_size)
    wanted = oracle(model, batch, None)
    for way in WAYS.values():
        with way(model):
            torch.testing.assert_close(model(**batch).loss.float(), wanted, rtol=1e-2, atol=0.0)


def test_a_run(tmp_path: Path) -> None:
    words = ["train", "method=s2ft", "trainer.max_steps=2", "trainer.logging_steps=1", "model.dtype=float32"]
    told: dict[str, list[dict[str, Any]]] = {}
    for name, changes in {
        "none": [],
        "auto": ["trainer.label_smoothing=0.2"],
        "plain": ["trainer.label_smoothing=0.2", "trainer.loss=plain"],
    }.items():
        sparseft_cli(tmp_path, *words, *changes, f"output_dir={name}")
        told[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    numbers = {name: [row[key] for row in rows for key in ("loss", "eval_loss") if row.get(key) is not None]
               for name, rows in told.items()}  # fmt: skip
    assert numbers["auto"] == pytest.approx(numbers["plain"], rel=1e-5)
    assert told["auto"][0]["eval_loss"] == told["none"][0]["eval_loss"]
    assert numbers["auto"][1] > 1.05 * numbers["none"][1]
    message = refused(tmp_path, *words, "trainer.label_smoothing=0.2", "trainer.compile=model")
    assert "trainer.compile=layers" in message
    assert "0 to below 1" in refused(tmp_path, *words, "trainer.label_smoothing=1")

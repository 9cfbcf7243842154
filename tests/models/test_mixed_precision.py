"""Full fine-tuning in 16 bits: fp32 weights, products in bf16, wherever the model is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparseft.compose.run_config import compose
from sparseft.models import mixed_precision
from sparseft.models.labelled_loss import labelled_loss
from sparseft.models.mixed_precision import multiply_in_bf16
from support.running import METHODS, on, sparseft, summary, write_data

CPU = torch.device("cpu")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, torch.dtype, torch.dtype, int]]:
    """Of each linear's product: whether gradients are wanted, the weight's dtype, the product's, and its features."""
    found, own = [], nn.Linear.forward

    def linear(self: Any, x: Tensor) -> Tensor:
        y = own(self, x)
        found.append((torch.is_grad_enabled(), self.weight.dtype, y.dtype, self.out_features))
        return y

    monkeypatch.setattr(nn.Linear, "forward", linear)
    return found


def gradients(model: Any, ids: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_losses_and_gradients_are_those_of_bf16_products(make_model: Any, kind: str, products: list[Any]) -> None:
    """Against fp32's; the labelled loss against the model's own; the head's product is in bf16 too."""
    model = make_model(kind).float().train(False)
    ids = torch.randint(90, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(12) < 5, -100)
    wide, wanted = gradients(model, ids, labels)
    assert {product for _, _, product, _ in products} == {torch.float32}
    multiply_in_bf16(model, CPU)
    for labelled in (False, True):
        products.clear()
        if labelled:
            with labelled_loss(model):
                loss, found = gradients(model, ids, labels)
        else:
            loss, found = gradients(model, ids, labels)
            assert model(input_ids=ids).logits.dtype == torch.float32
        assert {(weight, product) for _, weight, product, _ in products} == {(torch.float32, torch.bfloat16)}
        assert loss.dtype == torch.float32 and 0 < abs(loss - wide) < 1e-2 * wide
        for name, grad in found.items():
            assert grad.dtype == torch.float32, name
            assert (grad - wanted[name]).norm() < 0.06 * wanted[name].norm() + 1e-5, name
    with labelled_loss(model):
        pass
    assert model(input_ids=ids).logits.dtype == torch.float32  # the wrapper is there again


def test_all_of_a_run_computes_alike(
    model_folder: Any, tmp_path: Path, products: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured before training, in training, and after."""
    monkeypatch.setattr(mixed_precision, "HALF_IS_FAST", ("cpu",))
    data = write_data(tmp_path, 12)["json"]
    words = [*on(model_folder(), data), *METHODS["full"], "model.dtype=bfloat16", "trainer.max_steps=2"]
    done = sparseft(tmp_path, "train", *words, "dataset.eval_fraction=0.25", f"output_dir={tmp_path / 'run'}")
    assert summary(tmp_path / "run")["eval_loss_before"] is not None, done.err
    # Not those that try the model as it is loaded, in bf16, or its head alone, before it computes like that.
    trained = [each for each in products if each[1] == torch.float32 and each[3] < 200]
    assert {grad for grad, *_ in trained} == {False, True}
    assert {product for _, _, product, _ in trained} == {torch.bfloat16}


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_all_of_a_run_by_preferences_computes_alike(
    objective: str, tmp_path: Path, products: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the frozen copy that answers are compared with; TRL puts a head of its own into both."""
    pytest.importorskip("trl")
    monkeypatch.setattr(mixed_precision, "HALF_IS_FAST", ("cpu",))
    words = [f"objective={objective}", "method=full", "model.dtype=bfloat16", "hardware=cpu", "trainer.max_steps=1",
             "trainer.batch_size=2", "trainer.gradient_accumulation=1", "dataset.max_examples=8"]  # fmt: skip
    sparseft(tmp_path, "train", *words, "output_dir=run")
    trained = [each for each in products if each[1] == torch.float32]
    assert {grad for grad, *_ in trained} == {False, True}
    assert {product for _, _, product, _ in trained} == {torch.bfloat16}


def test_the_frozen_copy_is_called_itself(make_model: Any) -> None:
    """Not the model that it is a copy of, and in bf16 like that one."""
    pytest.importorskip("trl")
    from sparseft.training.preference.trainer import reference_of

    model = make_model("llama").float().eval()
    multiply_in_bf16(model, CPU)
    ids = torch.randint(90, (2, 8), generator=torch.Generator().manual_seed(0))
    wanted = model(input_ids=ids).logits.detach()
    copied: Any = reference_of(model, compose("train", ["objective=dpo", "method=full"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(copied(input_ids=ids).logits, wanted)

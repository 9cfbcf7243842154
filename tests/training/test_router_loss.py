"""A router's own loss counts once in a step, however many micro-steps it is made in."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseft.data.tokenized import TokenizedDataset
from sparseft.evaluation.held_out import held_out_loss
from sparseft.models.router_loss import router_loss
from support.experts import build
from support.training import CPU, attached, examples, trainer_of

ROW = ([5, 9, 17, 4, 30, 11, 8, 22], [-100, -100, 17, 4, 30, 11, 8, 22])


@pytest.fixture
def mixtral() -> Any:
    model = build("mixtral")
    model.config.output_router_logits = True
    model.router_aux_loss_coef = 0.5
    return model


@pytest.mark.parametrize("method", ["full", "lora"])
def test_micro_steps_are_one_batch(mixtral: Any, method: str, tmp_path: Path) -> None:
    """Oracle: of rows that are all alike the term is the same in each micro-step as in the whole batch."""
    losses, gradients = [], []
    for batch_size, accumulation in ((4, 1), (1, 4), (2, 2)):
        torch.manual_seed(0)
        model = attached(mixtral, method)
        trainer = trainer_of(
            model, tmp_path / str(batch_size), TokenizedDataset.from_lists([ROW] * 4), max_steps=1,
            batch_size=batch_size, gradient_accumulation=accumulation, optimizer="sgd", max_grad_norm=0.0,
        )  # fmt: skip
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        trainer.train()
        after = dict(model.named_parameters())
        gradients.append(torch.cat([(after[name] - value).flatten() for name, value in before.items()]))
        losses.append(trainer.state.log_history[0]["loss"])
    whole = mixtral.train()(input_ids=torch.tensor([ROW[0]] * 4), labels=torch.tensor([ROW[1]] * 4))
    assert float(0.5 * whole.aux_loss) > 0.1 and losses[0] == pytest.approx(float(whole.loss), rel=1e-3)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    for other in gradients[1:]:  # differences of weights near 0.1, whose last place is 1e-8
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=5e-8)
    assert gradients[0].abs().max() > 1e-4


def test_the_weight_is_back_afterwards(mixtral: Any) -> None:
    batch = {"input_ids": torch.tensor([ROW[0]]), "labels": torch.tensor([ROW[1]])}
    plain, inside = mixtral(**batch), copy.deepcopy(mixtral)
    with pytest.raises(RuntimeError, match="gone"), router_loss(inside, 0.25):
        part = inside(**batch)
        raise RuntimeError("gone")
    assert float(plain.loss - part.loss) == pytest.approx(0.75 * 0.5 * float(plain.aux_loss), rel=1e-4)
    assert inside.router_aux_loss_coef == 0.5
    torch.testing.assert_close(inside(**batch).loss, plain.loss)


def test_held_out_losses_leave_it_out(mixtral: Any, tmp_path: Path) -> None:
    rows = examples(5)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            labels = torch.tensor(row["labels"][1:])
            logits = mixtral(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += int((labels != -100).sum())
    trainer = trainer_of(attached(mixtral, "lora"), tmp_path, rows, rows, max_steps=1)
    assert trainer.held_out_loss(None) == pytest.approx(total / count, rel=1e-5)
    assert held_out_loss(mixtral, rows, 0, CPU, 2) == pytest.approx(total / count, rel=1e-5)

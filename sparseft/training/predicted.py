"""What a step of a run costs, as a share of the frozen model's, said before the first one."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparseft.config import RunConfig
from sparseft.models.spec import ModelSpec
from sparseft.models.step_cost import StepCost, Trained


def predicted_floors(model: nn.Module, spec: ModelSpec, config: RunConfig, *, length: int, labelled: float) -> float:
    """The arithmetic of a step of an attached model, ÷ that of a floor (`StepCost.floor`).

    spec: the plain model's. length: tokens of a sequence, in the mean. labelled: the share of tokens whose logits are
    made.
    """
    cost = StepCost(spec, length)
    step = cost.step(
        Trained.of(model, spec),
        products=config.method.products,
        labelled=labelled,
        checkpointing=config.checkpointing == "full",
    )
    return step / cost.floor()


def in_words(floors: float, labelled: float) -> str:
    """A prediction, for a line: `predicted at 0.62 of what the frozen model takes, …`."""
    here = "" if labelled == 1.0 else f", here for {labelled:.0%}"
    return (
        f"predicted at {floors:.2f} of what the frozen model takes (forward and backward to its embeddings, with "
        f"logits for every token{here})"
    )


def labelled_share(data: Any, loss_is_labelled: bool) -> float:
    """The share of the training tokens (`TokenizedDataset`) whose logits are made."""
    return data.num_labelled / max(1, data.num_tokens) if loss_is_labelled else 1.0

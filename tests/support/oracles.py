"""What results are compared with: dense gradients by autograd, and what a selection has chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseft.models.decoder import find_expert, stack_parameter
from sparseft.models.spec import ModelSpec


def dense_gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient (out, in) of each linear, experts' too, by autograd on a plain model."""
    model.requires_grad_(True)
    model(**batch).loss.backward()
    found = {}
    for name in ModelSpec.of(model).linears:
        expert = find_expert(model, name)
        if expert is None:
            module = model.get_submodule(name)
            found[name] = module.weight.grad.t() if type(module).__name__ == "Conv1D" else module.weight.grad
        else:
            found[name] = stack_parameter(expert.experts, expert.parameter).grad[expert.number]
    return found


def chosen_units(selection: Any) -> set[tuple[Any, ...]]:
    """Every chosen row, column or block by its module."""
    return {
        (module, kind, *(unit if isinstance(unit, list) else [unit]))
        for module, kinds in selection.modules.items()
        for kind, index in kinds.items()
        for unit in torch.as_tensor(index).tolist()
    }

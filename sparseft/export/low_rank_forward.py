"""A base model that computes with low-rank differences added to its weights, in fp32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseft.layers.convert import plain_weight, weight_parameter
from sparseft.models.decoder import find_expert


class LowRank(NamedTuple):
    """scale · b @ a, added to rows `rows` (an index) of one linear: b (len(rows), r), a (r, in), fp32."""

    rows: Tensor
    b: Tensor
    a: Tensor
    scale: float


def add_while_computing(model: nn.Module, differences: Mapping[str, Sequence[LowRank]]) -> None:
    """From now on each linear adds scale · b (a x) to what it computes, as engines of LoRA do, and each expert computes
    with its weight and difference in fp32, made for its own forward pass; weights stay as they are."""
    experts: dict[nn.Module, list[str]] = {}
    for name, parts in differences.items():
        expert = find_expert(model, name)
        if expert is None:
            model.get_submodule(name).register_forward_hook(_adding(parts))
        else:
            experts.setdefault(expert.experts, []).append(name)
    for owner, names in experts.items():
        _widen(model, owner, names, differences)


def _adding(parts: Sequence[LowRank]) -> Any:
    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output.clone()
        for rows, b, a, scale in parts:
            x = inputs[0]
            output[..., rows.to(x.device)] += scale * F.linear(F.linear(x, a.to(x.device)), b.to(x.device))
        return output

    return add


def _widen(model: nn.Module, owner: nn.Module, names: list[str], differences: Mapping[str, Sequence[LowRank]]) -> None:
    kept: dict[nn.Parameter, Tensor] = {}

    def add(*_: Any) -> None:
        for name in names:
            parameter = weight_parameter(model, name)
            if parameter not in kept:
                kept[parameter] = parameter.data
                parameter.data = parameter.data.to(torch.float32, copy=True)
            weight = plain_weight(model, name)
            for rows, b, a, scale in differences[name]:
                weight[rows.to(weight.device)] += (scale * (b @ a)).to(weight.device)

    def restore(*_: Any) -> None:
        for parameter, data in kept.items():
            parameter.data = data
        kept.clear()

    owner.register_forward_pre_hook(add)
    owner.register_forward_hook(restore, always_call=True)

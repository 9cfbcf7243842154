"""New values in packed weights, written where they belong and nowhere else.

A group of weights that share a scale keeps it where the new values fit, and then only the entries that were given take
another code. Where one does not fit, that group gets a larger scale and is coded anew. All other groups stay as they
are, bit for bit: also where scales are packed themselves (NF4's, in groups of 256), since a new scale is one of those
which the packed form of its neighbours can hold already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseft.errors import UserError
from sparseft.models.packed.quantized import is_int8

LOW, HIGH = -128, 127  # codes of int8
SLACK = 1 - 2.0**-8  # packed weights are unpacked to bf16, which may round the largest of a group up


def check_writable(name: str, module: nn.Module) -> None:
    """UserError where a linear is packed in a way into which nothing can be written here."""
    weight: Any = module._parameters.get("weight")
    if _is_nf4(weight) or is_int8(weight):
        return
    raise UserError(
        f"'{name}' is packed as {type(weight).__name__}; values can be written back into NF4 of bitsandbytes and into "
        "torchao's int8 with a scale a row."
    )


@torch.no_grad()
def write_packed(module: nn.Module, values: Tensor, entries: Tensor, by_chance: int | None = None) -> Tensor:
    """Gives `entries` (k,) of a packed linear's weight the codes nearest to their `values`.

    values: of the whole weight (out, in), in fp32: those that the packed ones stand for, but for the entries.
    entries: flat, row · in + column. by_chance: a seed; each entry takes the level below it or the one above, the
    likelier the nearer, so that in the mean it keeps its value.

    Returns a mask (out, in): the groups that were touched, outside of which nothing has changed.
    """
    touched = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    touched[entries.to(values.device)] = True
    write = _write_nf4 if _is_nf4(module._parameters.get("weight")) else _write_int8
    chance = None
    if by_chance is not None:
        chance = torch.rand(values.numel(), generator=torch.Generator().manual_seed(by_chance)).to(values.device)
    return write(module.weight, values.float().reshape(-1), touched, chance).view(values.shape)


def _is_nf4(weight: Any) -> bool:
    return getattr(getattr(weight, "quant_state", None), "quant_type", None) == "nf4"


def _write_nf4(weight: Any, values: Tensor, touched: Tensor, chance: Tensor | None) -> Tensor:
    """bitsandbytes' form: two codes a byte, the first in the upper half; a scale for each `blocksize` entries."""
    state = weight.quant_state
    size, count = state.blocksize, len(values)
    groups = F.pad(touched, (0, -count % size)).view(-1, size)
    chosen = groups.any(1).nonzero().flatten()
    new, own = F.pad(values, (0, -count % size)).view(-1, size)[chosen], groups[chosen]
    scales = _scales(state)[chosen]
    needed = (new.abs() * own).amax(1)
    grown = needed * SLACK > scales
    if grown.any():
        scales = torch.where(grown, _grow(state, chosen, needed, grown), scales)
    between = (state.code[1:] + state.code[:-1]) / 2
    shares = new / scales.clamp_min(1e-30).unsqueeze(1)
    codes = torch.bucketize(shares, between).to(torch.uint8)
    if chance is not None:
        above = torch.bucketize(shares, state.code).clamp(1, len(state.code) - 1)
        low, high = state.code[above - 1], state.code[above]
        up = F.pad(chance, (0, -count % size)).view(-1, size)[chosen] < (shares - low) / (high - low)
        codes = torch.where(own, above - 1 + up.long(), codes).to(torch.uint8)
    packed = weight.data.view(-1).view(torch.uint8)
    bytes_ = F.pad(packed, (0, len(groups) * size // 2 - len(packed))).view(-1, size // 2)
    former = bytes_[chosen]
    former = torch.stack([former >> 4, former & 15], 2).view(-1, size)
    codes = torch.where(own | grown.unsqueeze(1), codes, former)
    bytes_[chosen] = (codes[:, ::2] << 4) | codes[:, 1::2]
    packed.copy_(bytes_.view(-1)[: len(packed)])
    changed = torch.zeros(len(groups), dtype=torch.bool, device=values.device)
    changed[chosen] = True
    return changed.unsqueeze(1).expand(-1, size).reshape(-1)[:count]


def _scales(state: Any) -> Tensor:
    """The scale of each group, in fp32."""
    if not state.nested:
        return state.absmax.float()
    outer = state.state2
    each = outer.absmax.repeat_interleave(outer.blocksize)[: len(state.absmax)]
    return outer.code[state.absmax.long()] * each + state.offset


def _grow(state: Any, chosen: Tensor, needed: Tensor, grown: Tensor) -> Tensor:
    """Writes scales that hold `needed`, for those of the `chosen` groups that have `grown`; all scales, of which those
    count. Where scales are packed, the least that can be had; the largest there is, where all are less."""
    if not state.nested:
        state.absmax[chosen[grown]] = needed[grown].to(state.absmax.dtype)
        return state.absmax[chosen].float()
    outer = state.state2
    least = (needed - state.offset) / outer.absmax[chosen // outer.blocksize].clamp_min(1e-30)
    codes = torch.searchsorted(outer.code, least).clamp_max(len(outer.code) - 1)
    state.absmax[chosen[grown]] = codes[grown].to(state.absmax.dtype)
    return _scales(state)[chosen]


def _write_int8(weight: Any, values: Tensor, touched: Tensor, chance: Tensor | None) -> Tensor:
    """torchao's form: a scale a row, the codes around zero."""
    codes, scale = weight.qdata, weight.scale
    new, own = values.view(codes.shape), touched.view(codes.shape)
    rows = own.any(1)
    wide = scale.float()
    whole = (new / wide.clamp_min(1e-30) * SLACK).round()
    grown = ((whole > HIGH) | (whole < LOW)).logical_and(own).any(1, keepdim=True)
    fresh = (new.abs().amax(1, keepdim=True) * 2 / (HIGH - LOW)).to(scale.dtype)
    scale.copy_(torch.where(grown, fresh, scale))
    shares = new / scale.float().clamp_min(1e-30)
    whole = shares.round()
    if chance is not None:
        whole = torch.where(own, (shares + chance.view(codes.shape)).floor(), whole)
    whole = whole.clamp(LOW, HIGH).to(codes.dtype)
    codes.copy_(torch.where(own | grown, whole, codes))
    return rows.unsqueeze(1).expand_as(own).reshape(-1)

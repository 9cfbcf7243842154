"""Values written into packed weights: nearest codes where they were given, and not a bit elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparseft.errors import UserError
from sparseft.models.packed.quantized import dequantized
from sparseft.models.packed.repacking import check_writable, write_packed
from support.nf4 import NF4Linear

OUT, IN, GROUP = 96, 576, 64  # 864 groups of 64: four of scales' own 256, the last of them not full


def nf4(nested: bool = True) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(
        IN, OUT, bias=False, quant_type="nf4", compress_statistics=nested, compute_dtype=torch.bfloat16
    )
    weight = torch.randn(OUT, IN) * 0.1
    linear.weight = bnb.nn.Params4bit(
        weight.bfloat16(), requires_grad=False, quant_type="nf4", compress_statistics=nested
    )
    return linear.to("cpu")


def int8() -> nn.Module:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16)
    quantize_(linear, Int8WeightOnlyConfig())
    return linear


PACKED = {"nf4": nf4, "nf4 with plain scales": lambda: nf4(False), "int8": int8}


def groups_of(kind: str, mask: Tensor) -> Tensor:
    """The mask (out, in) of all groups in which an entry of `mask` lies, by hand."""
    size = IN if kind == "int8" else GROUP
    return mask.view(-1, size).any(1).unsqueeze(1).expand(-1, size).reshape(OUT, IN)


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("size", [0.02, 0.5])  # within every scale mostly, and beyond many
def test_only_what_was_given_changes(kind: str, size: float) -> None:
    linear: Any = PACKED[kind]()
    check_writable("it", linear)
    before = dequantized(linear).float()
    mask = torch.zeros(OUT, IN, dtype=torch.bool)
    mask[:, 5] = mask[7] = True
    mask[40:, 64:] = False
    mask[50:60, 200:210] = True
    entries = mask.flatten().nonzero().flatten()
    values = before.clone()
    values[mask] += size * torch.randn(len(entries))
    touched = write_packed(linear, values, entries)
    assert torch.equal(touched, groups_of(kind, mask))
    after = dequantized(linear).float()
    assert torch.equal(after[~touched], before[~touched])
    size_of_group = IN if kind == "int8" else GROUP
    groups = [tensor.reshape(-1, size_of_group) for tensor in (before, after, values, mask)]
    scales = groups[0].abs().amax(1, keepdim=True)
    fits = (groups[2].abs() <= scales).logical_or(~groups[3]).all(1)
    assert fits.any() and (size < 0.1 or not fits.all())
    same = fits.unsqueeze(1) & ~groups[3]
    assert torch.equal(groups[1][same], groups[0][same])  # beside entries that fit, not a bit
    # each entry is at the nearest level: nearer than half the widest gap, in its group's scale as it is now
    now = torch.maximum(groups[1].abs().amax(1, keepdim=True), scales)
    gap = 1 / 127 if kind == "int8" else 0.304
    rounded = 2**-8 * groups[2].abs()  # in bf16, which both unpack to
    far = (groups[1] - groups[2]).abs() > gap / 2 * now * 1.02 + rounded
    beyond = groups[2].abs() > now  # what even the largest scale that is there cannot hold
    assert not (far & groups[3] & ~beyond).any()
    if kind != "nf4":
        assert not (beyond & (groups[2].abs() > 1.02 * now)).any()


@pytest.mark.parametrize("kind", PACKED)
def test_codes_are_the_packages_own(kind: str) -> None:
    """Nothing new gives the same bits, and values at levels come out as they went in."""
    linear: Any = PACKED[kind]()
    before = {name: value.clone() for name, value in tensors(linear).items()}
    values = dequantized(linear).float()
    write_packed(linear, values, torch.arange(OUT * IN))
    for name, value in tensors(linear).items():
        assert torch.equal(value, before[name]), name
    flipped = values.clone()
    first = flipped.view(-1, GROUP)[:, :2].clone()
    flipped.view(-1, GROUP)[:, :2] = first.flip(1)  # each is a level of the group's, in the other's place
    entries = torch.arange(OUT * IN).view(-1, GROUP)[:, :2].flatten()
    write_packed(linear, flipped, entries)
    assert torch.equal(dequantized(linear).float(), flipped)


@pytest.mark.parametrize("kind", PACKED)
def test_rounded_by_chance_small_changes_are_kept_in_the_mean(kind: str) -> None:
    """Beside levels the nearest one loses them all; the same seed gives the same bits."""
    linear: Any = PACKED[kind]()
    before = dequantized(linear).float()
    size = IN if kind == "int8" else GROUP
    scale = before.view(-1, size).abs().amax(1, keepdim=True).expand(-1, size).reshape(before.shape)
    gap = scale / 127 if kind == "int8" else scale * 0.08  # NF4's narrowest gap is 0.0796
    mask = before.abs() < 0.8 * scale  # those that fit whichever way they go
    entries, values = mask.flatten().nonzero().flatten(), before + 0.2 * gap
    nearest, chosen, again = (copy.deepcopy(linear) for _ in range(3))
    write_packed(nearest, values, entries)
    write_packed(chosen, values, entries, 1)
    write_packed(again, values, entries, 1)
    moved = ((dequantized(chosen).float() - before) / gap)[mask]
    assert moved.abs().max() < (1.7 if kind == "int8" else 4)  # one level, and what bf16 takes of large codes
    spread = 4 * moved.std() / len(moved) ** 0.5
    assert spread < 0.1 and abs(moved.mean() - 0.2) < spread + 0.01
    lost = ((dequantized(nearest).float() - before) / gap)[mask]
    assert lost.abs().mean() < 0.01
    assert torch.equal(dequantized(chosen), dequantized(again))
    assert torch.equal(dequantized(chosen)[~mask].float(), before[~mask])


def tensors(linear: Any) -> dict[str, Tensor]:
    weight = linear.weight
    if hasattr(weight, "qdata"):
        return {"codes": weight.qdata, "scale": weight.scale}
    state = weight.quant_state
    outer = {"outer": state.state2.absmax, "offset": state.offset} if state.nested else {}
    return {"codes": weight.data, "scale": state.absmax} | outer


def test_other_forms_are_refused() -> None:
    with pytest.raises(UserError, match="'it' is packed as Packed4; values can be written back into NF4"):
        check_writable("it", NF4Linear(nn.Linear(64, 4)))

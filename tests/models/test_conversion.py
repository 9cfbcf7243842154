"""Entries followed through conversions of weights, held against the conversions run on numbers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import core_model_loading as loading

from sparseft.memory import AllocationCounter
from sparseft.models.conversion import Conversion

CONSTANT = torch.empty(4, 3, device="meta")
Convert = Callable[[Callable[[str], Tensor]], dict[str, Tensor]]
EXPERTS, HIDDEN, INSIDE = 4, 6, 10
UP = {f"{side}.{number}": (INSIDE, HIDDEN) for side in "ab" for number in range(EXPERTS)}


def by(*operations: Any, sources: list[str], targets: list[str], **known: Any) -> Convert:
    """transformers' own operations, one after another, on what each source's tensors are."""

    def convert(read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        held: Any = {name: [read(name)] if name in SINGLE else [read(f"{name}.{n}") for n in range(EXPERTS)]
                     for name in sources}  # fmt: skip
        for operation in operations:
            held = operation.convert(held, source_patterns=sources, target_patterns=targets, **known)
        return {name: value[0] if isinstance(value, list) else value for name, value in held.items()}

    return convert


SINGLE = {"w", "v"}
HEADS = SimpleNamespace(num_attention_heads=2)
KINDS: dict[str, tuple[dict[str, tuple[int, ...]], Convert]] = {
    "experts": (UP, by(loading.MergeModulelist(0), loading.Concatenate(1), sources=["a", "b"], targets=["p"])),
    "text and vision": (
        UP,
        by(loading.ErnieFuseAndSplitTextVisionExperts(), sources=["a", "b"], targets=["p", "q"], config=None),
    ),
    "chunks": ({"w": (12, 6)}, by(loading.Chunk(0), sources=["w"], targets=["p", "q", "r"])),
    "chunks of columns": ({"w": (5, 12)}, by(loading.Chunk(1), sources=["w"], targets=["p", "q"])),
    "interleaved": (
        {"w": (3, 8, 6)},
        by(loading.Interleave(1), loading.Chunk(1), sources=["w"], targets=["p", "q"]),
    ),
    "interleaved features": (
        {"w": (3, 4, 8)},
        by(loading.Interleave(2), loading.Chunk(2), sources=["w"], targets=["p", "q"]),
    ),
    "transposed": ({"w": (3, 4, 6)}, by(loading.Transpose(1, 2), sources=["w"], targets=["p"])),
    "turned": ({"w": (12, 5)}, by(loading.PermuteForRope(), sources=["w"], targets=["p"], config=HEADS)),
    "joined": ({"w": (4, 6), "v": (3, 6)}, by(loading.Concatenate(0), sources=["v", "w"], targets=["p"])),
    "apart": ({"w": (4, 3, 5)}, by(loading.SplitModulelist(0), sources=["w"], targets=["p.*"])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_entries_and_values_are_where_numbers_go(kind: str) -> None:
    shapes, convert = KINDS[kind]
    conversion, counted, start = Conversion(shapes, convert), {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        counted[name] = torch.arange(start, start + size).view(shape)
        start += size
    made = convert(counted.__getitem__)
    for name, value in made.items():
        flat = torch.randperm(value.numel(), generator=torch.Generator().manual_seed(0))
        found = conversion.in_tensors(name, flat)
        assert sum(len(part.index) for part in found) == len(flat)
        for part in found:
            assert (part.index.diff() > 0).all()
            numbers = counted[part.name].flatten()[part.index]
            assert torch.equal(numbers, value.flatten()[flat[part.which]])
            backs = conversion.in_parameters(part.name, part.index)
            assert sum(len(back.index) for back in backs) == len(part.index)
            for back in backs:
                assert torch.equal(made[back.name].flatten()[back.index], numbers[back.which])
        numel = value.numel()
        for begin, end in ((0, numel), (0, numel // 2), (numel // 3, numel - 1), (numel // 2, numel // 2 + 1)):
            assert torch.equal(conversion.part(name, begin, end, counted.__getitem__), value.flatten()[begin:end])
    undone = dict(conversion.undone(made.__getitem__))
    assert undone.keys() == counted.keys()
    for name, value in undone.items():
        assert torch.equal(value, counted[name])
    assert conversion.in_tensors(next(iter(made)), torch.empty(0, dtype=torch.int64)) == []


@pytest.mark.parametrize("wide", UP)
def test_a_part_of_several_dtypes_has_the_one_that_holds_them_all(wide: str) -> None:
    shapes, convert = KINDS["experts"]
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    tensors[wide] = torch.randn(shapes[wide])
    made, number = convert(tensors.__getitem__)["p"], int(wide.partition(".")[2])
    assert made.dtype == torch.float32
    size = made[0].numel()
    part = Conversion(shapes, convert).part("p", number * size, (number + 1) * size, tensors.__getitem__)
    assert part.dtype == torch.float32 and torch.equal(part, made[number].flatten())


def test_memory_is_that_of_the_values_and_of_the_entries_asked_for() -> None:
    shapes = {f"{side}.{number}": (256, 512) for side in "ab" for number in range(EXPERTS)}
    made = {"p": torch.randn(EXPERTS, 512, 512).bfloat16()}
    size = made["p"].nbytes
    with AllocationCounter() as counter:
        conversion = Conversion(shapes, KINDS["experts"][1])  # on the meta device
        counter.live = counter.peak = 0
        assert {value.dtype for _, value in conversion.undone(made.__getitem__)} == {torch.bfloat16}
        assert counter.peak <= 1.01 * size
        counter.live = counter.peak = 0
        flat = torch.arange(3 * 512 * 512, 3 * 512 * 512 + 4096)
        assert [part.name for part in conversion.in_tensors("p", flat)] == ["a.3"]
        assert counter.peak <= 40 * flat.nbytes
        tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
        counter.live = counter.peak = 0
        one = conversion.part("p", 3 * 512 * 512, 4 * 512 * 512, tensors.__getitem__)
        assert torch.equal(one, torch.cat([tensors["a.3"], tensors["b.3"]]).flatten())
        assert counter.peak <= 2.01 * size / EXPERTS  # with what it is held against


@pytest.mark.parametrize(
    "convert",
    [
        lambda read: {"p": read("w") * 2},
        lambda read: {"p": read("w").flip(0)},
        lambda read: {"p": read("w")[:2].contiguous()},
        lambda read: {"p": read("w")[:1].expand(4, 6)},
        lambda read: {"p": torch.cat([read("w")[:2], read("w")[2:].mul_(2)])},
        lambda read: {"p": torch.stack([torch.empty(4, 3, device="meta"), read("w")[:, :3]])},
        lambda read: {"p": torch.stack([CONSTANT, read("w")[:, :3]])},
    ],
)
def test_what_does_more_than_move_entries_is_refused(convert: Convert) -> None:
    with pytest.raises(ValueError, match="more"):
        Conversion({"w": (4, 6)}, convert)


def test_a_tensor_that_no_parameter_is_made_of_is_refused() -> None:
    """Though the numbers of entries agree; a copy that nobody uses is no such thing."""
    shapes = {"w": (4, 6), "v": (4, 6)}
    with pytest.raises(ValueError, match="leaves entries out"):
        Conversion(shapes, lambda read: {"p": read("w"), "q": read("w").clone()})

    def twice(read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        read("v").clone()
        return {"p": read("w"), "q": read("v")}

    values = {"p": torch.rand(4, 6), "q": torch.rand(4, 6)}
    undone = dict(Conversion(shapes, twice).undone(values.__getitem__))
    assert torch.equal(undone["w"], values["p"]) and torch.equal(undone["v"], values["q"])

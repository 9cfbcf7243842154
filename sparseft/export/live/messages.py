"""What a sender tells a receiver: which entries of which tensors it sets, once, and then only their values.

A message is a header of eight int64 and a body of bytes, both tensors, so that a file and `torch.distributed` carry the
same. Values lie one tensor after another, those of wider dtypes first, with nothing between them.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseft.errors import RunError
from sparseft.files.atomic import dumps
from sparseft.files.tensors import dtypes
from sparseft.files.untrusted import parse_json

MAGIC = 0x73667470_61746368
HEADER = 8  # int64 numbers
ALIGNED = 8  # bytes
AT_ONCE = 1 << 20  # int64 numbers of a body that are summed together

BEGIN, STEP, END = 1, 2, 3


@dataclass
class Message:
    """kind: BEGIN brings indices and values, STEP values alone, END nothing. session: the sender's, chosen by chance;
    sequence: 1, 2, …; plan: the checksum of the BEGIN whose indices count; body: uint8 (n,), n a multiple of 8."""

    kind: int
    session: int
    sequence: int
    plan: int
    body: Tensor

    @property
    def header(self) -> Tensor:
        """int64 (8,), on the CPU."""
        facts = [MAGIC, self.kind, self.session, self.sequence, self.plan, self.body.numel()]
        return torch.tensor([*facts, checksum(self.body), mixed(facts)], dtype=torch.int64)


def new_session() -> int:
    """A number that no other sender has."""
    return secrets.randbits(62)


def check_header(header: Tensor) -> list[int]:
    """The header's numbers; RunError where it is none, or damaged."""
    numbers: list[int] = header.tolist()
    if len(numbers) != HEADER or numbers[0] != MAGIC or numbers[-1] != mixed(numbers[:6]) or numbers[5] % ALIGNED:
        raise RunError(
            "a step arrived damaged: its header is not what was sent. The weights are those of the step before."
        )
    return numbers


def message_of(header: list[int], body: Tensor) -> Message:
    """The message that was received; RunError where the body is not what was sent."""
    _, kind, session, sequence, plan, size, digest, _ = header
    if body.numel() != size or checksum(body) != digest:
        raise RunError(
            f"step {sequence} arrived damaged: its values are not what was sent. The weights are those of the step "
            "before."
        )
    return Message(kind, session, sequence, plan, body)


def checksum(body: Tensor) -> int:
    """Σ (2i + 1) · body[i] mod 2⁶⁴ over its int64 numbers, on the body's own device: any number that changes shows, as
    an odd factor can be divided out, and so do most that change places."""
    numbers = body.view(torch.int64)
    total = 0
    for start in range(0, len(numbers), AT_ONCE):
        part = numbers[start : start + AT_ONCE]
        odd = torch.arange(2 * start + 1, 2 * (start + len(part)) + 1, 2, device=part.device)
        total += int((part * odd).sum())
    return (total + 2**63) % 2**64 - 2**63


def mixed(numbers: Sequence[int]) -> int:
    """`checksum` of a few numbers."""
    return checksum(torch.tensor(numbers, dtype=torch.int64).view(torch.uint8))


# ---- indices and values ----


class Part(NamedTuple):
    """Entries of one checkpoint tensor: its full `shape`, the `dtype` of its values, flat sorted `index` (k,)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    index: Tensor


def ordered(parts: Sequence[Part]) -> list[Part]:
    """Parts in the order in which their values are sent: each begins at a multiple of its own width."""
    return sorted(parts, key=lambda part: (-part.dtype.itemsize, part.name))


def values_size(parts: Sequence[Part]) -> int:
    """The bytes of all values, padded to `ALIGNED`."""
    return padded(sum(len(part.index) * part.dtype.itemsize for part in parts))


def padded(size: int) -> int:
    return size + -size % ALIGNED


def values_in(body: Tensor, parts: Sequence[Part]) -> Iterator[tuple[Part, Tensor]]:
    """Each part with its values (k,), a view of a body that holds them from its beginning."""
    start = 0
    for part in parts:
        end = start + len(part.index) * part.dtype.itemsize
        yield part, body[start:end].view(part.dtype)
        start = end


def pack_begin(
    about: Mapping[str, Any], still: Sequence[tuple[Part, Tensor]], moving: Sequence[Part], values: Tensor
) -> Tensor:
    """The body of a BEGIN: a description; index and values of what is set once; indices of what each step sets; and the
    first of these steps (`values`, as a STEP's body)."""
    described = {
        **about,
        "still": [_described(part) for part, _ in still],
        "moving": [_described(part) for part in moving],
    }
    text = torch.frombuffer(bytearray(dumps(described, ascii=True).encode()), dtype=torch.uint8)
    sections = [torch.tensor([len(text)], dtype=torch.int64), text]
    sections += [tensor for part, values_still in still for tensor in (part.index, values_still)]
    sections += [part.index for part in moving]
    out = []
    for section in sections:
        raw = section.to(values.device).contiguous().view(torch.uint8)
        out += [raw, raw.new_zeros(padded(len(raw)) - len(raw))]
    return torch.cat([*out, values])


def unpack_begin(body: Tensor) -> tuple[dict[str, Any], list[tuple[Part, Tensor]], list[Part], Tensor]:
    """What `pack_begin` packed. RunError where it is something else."""
    try:
        length = int(body[:8].view(torch.int64))
        described = parse_json(bytes(body[8 : 8 + length].cpu().numpy()))
        at = 8 + padded(length)

        def take(count: int, dtype: torch.dtype) -> Tensor:
            nonlocal at
            size = count * dtype.itemsize
            section = body[at : at + size].view(dtype)
            if len(section) != count:
                raise ValueError("it ends too early")
            at += padded(size)
            return section

        still, moving = [], []
        for facts in described["still"]:
            part = _part(facts, take)
            still.append((part, take(len(part.index), part.dtype)))
        for facts in described["moving"]:
            moving.append(_part(facts, take))
        return described, still, moving, body[at:]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"the sender's first step cannot be read ({error}): it is of another version.") from error


def _described(part: Part) -> dict[str, Any]:
    names = {dtype: name for name, dtype in dtypes().items()}
    facts = {"name": part.name, "shape": list(part.shape), "dtype": names[part.dtype]}
    return facts | {"count": len(part.index), "index": names[part.index.dtype]}


def _part(facts: dict[str, Any], take: Any) -> Part:
    known, shape = dtypes(), tuple(facts["shape"])
    index = take(facts["count"], known[facts["index"]])
    if len(index) and not (0 <= int(index.min()) and int(index.max()) < torch.Size(shape).numel()):
        raise ValueError(f"indices beyond {facts['name']}")
    return Part(facts["name"], shape, known[facts["dtype"]], index)

"""An expert's linear as engines keep it: gate and up apart, all experts of a layer in one tensor (experts, out, in)."""

from __future__ import annotations

import re
from typing import NamedTuple

_STACKED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)\.(\d+)")


class Part(NamedTuple):
    """Rows [start, stop) of a linear of ours, under the name `linear`; expert: its place in a 3-D tensor, None: 2-D."""

    linear: str
    start: int
    stop: int
    expert: int | None


def parts_of(module: str, rows: int) -> list[Part]:
    """The parts of a linear with so many rows (out features): of an expert's `gate_up_proj` two, else one."""
    found = _STACKED.fullmatch(module)
    if found is None:
        return [Part(module, 0, rows, None)]
    experts, name, number = found[1], found[2], int(found[3])
    if name == "down_proj":
        return [Part(f"{experts}.down_proj", 0, rows, number)]
    half = rows // 2
    return [Part(f"{experts}.gate_proj", 0, half, number), Part(f"{experts}.up_proj", half, rows, number)]

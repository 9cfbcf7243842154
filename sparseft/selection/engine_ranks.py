"""The ranks of LoRA files that inference engines load, and what a selection will need.

Read in the engines' sources (2025-26).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparseft import console
from sparseft.errors import UserError
from sparseft.models.spec import ModelSpec
from sparseft.selection.cover import needed_rank
from sparseft.selection.selection import Selection

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's steps of --max-lora-rank, from 8
HIGHEST: dict[str, int | None] = {  # None: any rank
    "vllm": RANKS[-1],
    "sglang": None,
    "tgi": None,
    "lorax": None,
    "llama.cpp": None,
    "peft": None,
}
FAST = {"tgi": 128, "lorax": 128}  # up to where their fast kernels go


def file_rank(needed: int) -> int:
    """The rank that files have which hold `needed`: the next one of `RANKS`; beyond those a multiple of 16."""
    return next((rank for rank in RANKS if rank >= needed), -(-needed // 16) * 16)


def largest_need(selection: Selection, shapes: Mapping[str, tuple[int, int]]) -> tuple[int, str]:
    """The highest rank that an exact LoRA of a selection needs, and the first linear that needs it.

    shapes: (out, in) of each linear.
    """
    most, where = 0, ""
    for module in shapes:  # their order: one that was read from a file has another than one just made
        kinds = selection.modules.get(module, {})
        # A cover has at most a row, and at most a column, for each block row or block column in use.
        bound = sum(
            min(index[:, dim].unique().numel() for dim in (0, 1)) * (selection.block_size or 0)
            if kind == "blocks"
            else len(index)  # of a grid: its rows and columns, of which it needs the fewer
            for kind, index in kinds.items()
        )
        if bound > most and (needed := needed_rank(kinds, shapes[module], selection.block_size)) > most:
            most, where = needed, module
    return most, where


def check_rank(selection: Selection, shapes: Mapping[str, tuple[int, int]], max_rank: int | None) -> None:
    """Refuses a selection, given from elsewhere, that needs a higher rank than `method.max_rank` allows."""
    if max_rank is not None:
        needed, module = largest_need(selection, shapes)
        if needed > max_rank:
            raise UserError(f"method.max_rank={max_rank}: the selection that was given needs rank {needed} ({module}).")


def bounded(limit: int, *, lora: bool, reselects: bool) -> str:
    """The settings by which a run's LoRA export stays within a rank. lora: of a method that trains one itself;
    reselects: of one that is set to choose anew, which goes beyond any rank."""
    if lora:
        return f"method.rank={limit}"
    return f"method.max_rank={limit}{' method.reselect_steps=0' if reselects else ''}"


def engines_note(needed: int, what: str, fitting: str) -> str:
    """Which engines take a LoRA of rank `needed`, and how. what: whose rank it is; fitting: the settings by which it
    would be within `RANKS`."""
    rank = file_rank(needed)
    fits = [name for name, highest in HIGHEST.items() if highest is None or rank <= highest]
    slow = [f"{name} without its fast kernels (up to {FAST[name]})" for name in fits if rank > FAST.get(name, rank)]
    fits = [name for name in fits if rank <= FAST.get(name, rank)]
    if "vllm" in fits:
        fits[fits.index("vllm")] = f"vllm (--max-lora-rank {rank})"
    refused = [
        f"{name} (up to {highest})" for name, highest in HIGHEST.items() if highest is not None and rank > highest
    ]
    ends = f"; not {', '.join(refused)}: {fitting} would fit" if refused else ""
    return f"export: {what}: fits {', '.join(fits + slow)}{ends}"


def describe_export(selection: Selection | None, spec: ModelSpec, settings: Any) -> int | None:
    """Says what rank an exact LoRA export needs and which engines take it, and returns the rank; None where no LoRA
    holds what the method trains."""
    if selection is None:
        if (rank := settings.lora_rank(spec)) is not None:
            fitting = bounded(RANKS[-1], lora=True, reselects=False)
            console.log(engines_note(rank, f"a LoRA of rank {rank}", fitting))
        return rank
    needed, module = largest_need(selection, spec.linears)
    more = "; every new selection adds to it" if settings.reselect_steps else ""
    fitting = bounded(RANKS[-1], lora=False, reselects=bool(settings.reselect_steps))
    console.log(engines_note(needed, f"an exact LoRA needs rank {needed} ({module})", fitting) + more)
    return needed

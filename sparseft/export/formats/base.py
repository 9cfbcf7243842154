"""What a format of other tools is: how it is written, checked value by value, and loaded again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from sparseft.export.source import Source

# How much a value may change, relative to itself, when it is stored; in fp16 no less than 2⁻²⁵.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass
class Options:
    """What the user may say of an export.

    dtype: of what is written (`float32`, …), None: the format's own; engine: the one whose rules it must meet;
    base_gguf: the base model's GGUF file, on which llama.cpp itself proves `gguf-lora`. base: what `merged` adds
    differences to where `model.quantize` packed the base: `trained`, the values it was trained beside, or `checkpoint`,
    those that were packed.
    """

    dtype: torch.dtype | None = None
    engine: str | None = None
    base_gguf: str | None = None
    base: Literal["trained", "checkpoint"] = "trained"


class Answering(Protocol):
    """A loaded model that can be asked."""

    name: str  # what loaded it: "peft 0.21.0"

    def logits(self, ids: list[int]) -> Tensor:
        """The fp32 logits (tokens, vocabulary) after each token of one sequence."""
        ...

    def base(self) -> Answering | None:
        """The same without the adapter, where it runs on a base of its own (a quantized file, say); else None."""
        ...


class Format:
    """One format. `sparseft export` calls `check`, `write`, `verify` and `load`, in this order."""

    name: ClassVar[str]
    # Whether files hold weights, rounded once as the attached model's are; else differences, which are added in fp32.
    rounded: ClassVar[bool]
    whole: ClassVar[bool] = False  # whether it is a model folder that transformers loads

    def check(self, source: Source, options: Options) -> list[str]:
        """Refuses (`UserError`) what the format cannot hold, before any work; returns what the user should know."""
        raise NotImplementedError

    def write(self, source: Source, options: Options, folder: Path) -> dict[str, Any]:
        """Fills an empty folder; returns facts for the result (`rank`, …)."""
        raise NotImplementedError

    def verify(self, source: Source, options: Options, folder: Path) -> None:
        """Reads the files by the format's own rules and holds every value against the adapter's: RunError where a
        linear is missing, one is too many, or a value differs beyond the rounding of the files' dtype."""
        raise NotImplementedError

    def base(self, source: Source, options: Options) -> nn.Module:
        """The base model that the proof compares with."""
        return source.base()

    def attached(self, source: Source, options: Options, base: nn.Module) -> nn.Module:
        """`base` with what is exported: what the files must answer as."""
        return source.attached(base)

    def load(self, source: Source, options: Options, folder: Path) -> Answering:
        """Loads the files as their users do, by the target's own loader where it is installed."""
        raise NotImplementedError

    def resolution(self, source: Source, options: Options) -> float:
        """The largest relative rounding of a difference in the files: `rounding`, where they hold differences."""
        return 0.0


def rounding(source: Source, dtype: torch.dtype | None) -> float:
    """How much a difference may change, relative to its terms, when its factors are stored in `dtype` (None: fp32): a
    LoRA's are both rounded; those of a sparse change have one side of ones and zeros, which any dtype holds."""
    once = ROUNDING[dtype or torch.float32]
    return (1 + once) ** 2 - 1 if source.kind == "peft" else once

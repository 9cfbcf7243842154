"""Ways of running one and the same step: as it is, compiled, with Liger kernels, with recomputed activations.

A way is `eager`, or parts joined by `+`: `compile`, `liger`, `checkpointing`, `liger+compile`. It is applied to every
contender alike, the floor included, so that no method gets a favour the others lack.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sparseft import console
from sparseft.bench.contenders import Contender
from sparseft.config import HardwareConfig
from sparseft.errors import UserError, nearest

EAGER = "eager"
PARTS = ("compile", "liger", "checkpointing")
BACKEND = "inductor"  # of torch.compile
# Contenders of one way share the code that is compiled, each with a model of its own.
RECOMPILE_LIMIT = 64


class NotAvailable(Exception):
    """A way that cannot be had for a contender, and why; the row says so."""


def parts(way: str) -> tuple[str, ...]:
    """`liger+compile` -> its parts; none of `eager`."""
    return () if way == EAGER else tuple(way.split("+"))


def check(chosen: Sequence[str]) -> None:
    """Refuses `bench.ways` that are none, no ways, or twice the same."""
    known = "eager, compile, liger, checkpointing, or several of the last three joined by +"
    if not chosen:
        raise UserError(f"bench.ways is empty: expected one or more of {known}.")
    for way in chosen:
        named = parts(way)
        if EAGER in named:
            raise UserError(f"bench.ways: '{way}': eager is the plain way, which is joined with nothing.")
        if "" in named:
            raise UserError(f"bench.ways: '{way}' has nothing beside a +: expected {known}.")
        for part in named:
            if part not in PARTS:
                raise UserError(f"bench.ways: unknown way '{part}': expected {known}.{nearest(part, (EAGER, *PARTS))}")
        if len(set(named)) != len(named):
            raise UserError(f"bench.ways: '{way}' names a part twice.")
    seen: dict[frozenset[str], str] = {}
    for way in chosen:
        before = seen.get(frozenset(parts(way)))
        if before is not None:
            same = f"'{way}' is named twice" if before == way else f"'{before}' and '{way}' are the same"
            raise UserError(f"bench.ways: {same}.")
        seen[frozenset(parts(way))] = way


def check_hardware(hardware: HardwareConfig, choosable: bool = True) -> None:
    """Refuses settings of `hardware` that say what only `bench.ways` says: how the step is run.

    choosable: whether the benchmark has ways to choose from.
    """
    asked = {"gradient_checkpointing": "checkpointing", "compile": "compile"}
    named = [field for field in asked if getattr(hardware, field)]
    if named:
        given = " and ".join(f"hardware.{field}=true" for field in named)
        instead = " ".join(f"hardware.{field}=false" for field in named)
        if hardware.name != HardwareConfig.name:  # not typed, maybe
            given += f" (hardware={hardware.name} may say so)"
        if not choosable:
            raise UserError(f"{given}: this benchmark runs plain steps only: give {instead}.")
        raise UserError(
            f"{given}: how benchmarks run a step is what bench.ways says: use 'sparseft bench train "
            f"bench.ways=[{'+'.join(asked[field] for field in named)}]' with {instead}."
        )


def apply(way: str, c: Contender, first_step: Callable[[], Any]) -> None:
    """Makes `c` run in this way. first_step: runs a step, in which a compiler does its work.

    Raises `NotAvailable` where it cannot be had. A compiled contender's `facts` get `compile_seconds`, `graphs`,
    `graph_breaks` and, where there are any, their `graph_break_reasons`.
    """
    chosen = parts(way)
    if "liger" in chosen:
        _use_liger(c)
    if "checkpointing" in chosen:  # not the reentrant kind, which reaches nothing below frozen embeddings
        c.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if "compile" in chosen:
        _compile(c, first_step)


def _use_liger(c: Contender) -> None:
    if importlib.util.find_spec("liger_kernel") is None:
        raise NotAvailable("liger-kernel is not installed")
    if next(c.model.parameters()).device.type == "cpu":
        raise NotAvailable("Liger kernels need a GPU")
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # what transformers' Trainer calls

    wrapped = getattr(c.model, "get_base_model", None)  # of PEFT
    _apply_liger_kernel_to_instance(model=wrapped() if wrapped else c.model)


def _compile(c: Contender, first_step: Callable[[], Any]) -> None:
    from torch._dynamo.exc import TorchDynamoException
    from torch._dynamo.utils import counters

    console.log(f"bench: compiling {c.name}")
    counters.clear()
    start = time.perf_counter()
    c.call = torch.compile(c.model, backend=BACKEND)
    try:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            first_step()
    except TorchDynamoException as error:
        cause = getattr(error, "inner_exception", error)
        reason = str(cause).strip() or type(cause).__name__
        raise NotAvailable(f"torch.compile: {reason.splitlines()[0].rstrip('.: ')}") from error
    breaks = counters["graph_break"]
    c.facts |= {
        "compile_seconds": time.perf_counter() - start,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(breaks.values()),
    }
    if breaks:
        c.facts["graph_break_reasons"] = sorted({str(reason).splitlines()[0] for reason in breaks})


def release() -> None:
    """Forgets what was compiled: the models it holds would live on."""
    torch._dynamo.reset()

"""What inference engines load, and what each would refuse: said before an export is written.

The rules are read in the engines' sources (2025-26): vLLM to 0.26, SGLang, TGI, LoRAX, llama.cpp's converter, mlx-lm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sparseft.errors import UserError, nearest
from sparseft.selection.engine_ranks import FAST, HIGHEST, RANKS, bounded


@dataclass(frozen=True)
class Engine:
    """Its name as its users write it, the formats it reads, and the rules for LoRA files.

    leaves: the names of linears that it takes (None: all of a model's); experts, transposed: whether it takes LoRA on
    routed experts, and on Conv1D.
    """

    name: str
    formats: tuple[str, ...]
    leaves: frozenset[str] | None = None
    experts: bool = False
    transposed: bool = False


_PARTS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj"})
_OTHER_PARTS = frozenset({"gate_up_proj", "c_attn", "c_proj", "c_fc"})  # of Phi-3 and GPT-2

ENGINES = {
    "vllm": Engine("vLLM", ("peft-lora", "patch", "merged"), experts=True),
    "sglang": Engine("SGLang", ("peft-lora", "merged")),
    "tgi": Engine("TGI", ("peft-lora", "merged"), leaves=_PARTS),
    "lorax": Engine("LoRAX", ("peft-lora", "merged"), leaves=_PARTS | _OTHER_PARTS, transposed=True),
    "llama.cpp": Engine("llama.cpp", ("gguf-lora", "peft-lora", "merged"), experts=True),
    "mlx": Engine("mlx-lm", ("mlx", "merged")),
    "peft": Engine("PEFT", ("peft-lora", "peft-shira"), experts=True, transposed=True),
}


@dataclass(frozen=True)
class LoraFacts:
    """Of an export as LoRA: the rank in its files and what each linear needs of it.

    linears: all in the files; experts, transposed: those of routed experts, and of Conv1D; lora, reselects: how it was
    trained, as `engine_ranks.bounded` takes it.
    """

    rank: int
    needs: Mapping[str, int]
    linears: tuple[str, ...]
    experts: tuple[str, ...] = field(default=())
    transposed: tuple[str, ...] = field(default=())
    lora: bool = False
    reselects: bool = False


def engine_of(name: str) -> Engine:
    """The engine of that name; an unknown one is a `UserError`."""
    if name not in ENGINES:
        raise UserError(f"--engine {name}: no such engine.{nearest(name, ENGINES)}")
    return ENGINES[name]


def check(name: str | None, format_name: str, facts: LoraFacts | None = None) -> list[str]:
    """Refuses (`UserError`) what the engine would refuse or silently drop of an export; returns what to start it with.

    None: no engine was named.
    """
    if name is None:
        if facts is not None and facts.rank > RANKS[-1]:
            raise UserError(
                f"The form that every engine takes has a rank up to {RANKS[-1]}, and {too_high(facts, RANKS[-1])} "
                "--engine peft (sglang, llama.cpp) writes it with a larger rank."
            )
        return []
    engine = engine_of(name)
    if format_name not in engine.formats:
        raise UserError(
            f"--engine {name}: {engine.name} does not read --format {format_name}, but {_any(engine.formats)}."
        )
    return [] if facts is None else _check_lora(name, engine, facts)


def _check_lora(name: str, engine: Engine, facts: LoraFacts) -> list[str]:
    highest = HIGHEST[name]
    if highest is not None and facts.rank > highest:
        raise UserError(f"--engine {name}: {engine.name} takes ranks up to {highest}, and {too_high(facts, highest)}")
    refused = []
    if facts.experts and not engine.experts:
        refused.append((facts.experts, "routed experts"))
    if facts.transposed and not engine.transposed:
        refused.append((facts.transposed, "Conv1D layers, whose weights are stored transposed"))
    if engine.leaves is not None:
        others = tuple(linear for linear in facts.linears if linear.rpartition(".")[2] not in engine.leaves)
        refused.append((others, f"linears other than {', '.join(sorted(engine.leaves))}"))
    for linears, what in refused:
        if linears:
            raise UserError(
                f"--engine {name}: {engine.name} takes no LoRA on {what}: {_some(linears)}; --format merged holds them."
            )
    return _how_to_start(name, engine, facts)


def _how_to_start(name: str, engine: Engine, facts: LoraFacts) -> list[str]:
    if name == "vllm":
        return [f"start vLLM with --enable-lora --max-lora-rank {facts.rank}"]
    if name == "sglang":
        return [f"start SGLang with --enable-lora --max-lora-rank {facts.rank} --lora-target-modules all"]
    if name in FAST:
        # Both pad the rank to 8 x GPUs and then divide alpha by the padded one for all kinds but the first.
        notes = [f"{engine.name} scales rank {facts.rank} rightly on up to {facts.rank // 8} GPUs"]
        if facts.rank > FAST[name]:
            notes.append(f"{engine.name}'s fast kernels end at rank {FAST[name]}: --format merged is faster there")
        return notes
    return []


def too_high(facts: LoraFacts, limit: int) -> str:
    """What a rank above a limit says: how many linears need more, the worst of them, and what helps."""
    over = sorted((need for need in facts.needs.items() if need[1] > limit), key=lambda item: -item[1])
    worst = ", ".join(f"{linear} {need}" for linear, need in over[:3])
    more = f" and {len(over) - 3} more" if len(over) > 3 else ""
    settings = bounded(limit, lora=facts.lora, reselects=facts.reselects)
    return (
        f"{len(over)} of {len(facts.needs)} linears need more than {limit} ({worst}{more}): train with {settings}, or "
        "use --format patch or merged."
    )


def _some(linears: tuple[str, ...]) -> str:
    return ", ".join(linears[:3]) + (f" and {len(linears) - 3} more" if len(linears) > 3 else "")


def _any(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"

"""Which linears a LoRA folder names, in the form that every engine takes: a kind of linear in all layers or in none,
q, k, v together, gate, up together, and routed experts by the names of their checkpoint, one by one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from sparseft.errors import UserError
from sparseft.export.skeleton import Skeleton
from sparseft.models.spec import ModelSpec, role_of

TOGETHER = (("q", "k", "v"), ("gate", "up"))  # what engines stack to one matrix, or PEFT finds stacked

# Of architectures whose experts transformers stacks and PEFT reads one by one: what stands for `.mlp.`, and the linears
# in gate_up_proj and down_proj.
EXPERTS = {
    "mixtral": (".block_sparse_moe.", {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}),
    "qwen3_moe": (".mlp.", {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}),
    "olmoe": (".mlp.", {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}),
}


class Part(NamedTuple):
    """A linear of the file: rows start…stop of the model's `linear`, of `shape` (out, in)."""

    linear: str
    start: int
    shape: tuple[int, int]


class Layout(NamedTuple):
    """What the file holds: its linears by the names after `base_model.model.`, and the config's `target_modules`: those
    of dense linears, and those of experts."""

    parts: dict[str, Part]
    dense: list[str]
    routed: list[str]
    experts: tuple[str, ...]
    transposed: tuple[str, ...]

    @property
    def targets(self) -> list[str]:
        return self.dense + self.routed


def layout_of(skeleton: Skeleton, changed: Iterable[str]) -> Layout:
    """The layout for a change of some linears, by their names; what it cannot hold is a `UserError` that names it."""
    spec, changed = skeleton.spec, set(changed)
    if unknown := sorted(changed - spec.known.keys()):
        raise UserError(
            f"{unknown[0]} is no linear of the model's decoder layers, which is all that --format peft-lora holds; "
            "--format merged holds it."
        )
    experts = _expert_parts(skeleton, changed) if changed & spec.stacked else {}
    linears = _completed(skeleton, changed - spec.stacked)
    parts = {name: Part(name, 0, spec.known[name]) for name in linears} | experts
    routed = sorted({name.rpartition(".")[2] for name in experts})
    transposed = tuple(name for name in linears if name in spec.transposed)
    return Layout(parts, skeleton.targets(linears), routed, tuple(experts), transposed)


def _completed(skeleton: Skeleton, changed: set[str]) -> list[str]:
    """All linears of the kinds that changed and of those they stand together with, in the model's order."""
    kinds = {skeleton.place(name)[1] for name in changed}
    by_parent: dict[str, dict[str, str]] = defaultdict(dict)
    plain = [name for name in skeleton.spec.known if name not in skeleton.spec.stacked]
    for name in plain:
        kind = skeleton.place(name)[1]
        role = role_of(name)
        if isinstance(role, str):
            by_parent[kind.rpartition(".")[0]][role] = kind
    for roles in by_parent.values():
        for group in TOGETHER:
            members = {roles[role] for role in group if role in roles}
            if members & kinds:
                kinds |= members
    return [name for name in plain if skeleton.place(name)[1] in kinds]


def _expert_parts(skeleton: Skeleton, changed: set[str]) -> dict[str, Part]:
    """All experts of all layers, by the names of their checkpoint."""
    spec: ModelSpec = skeleton.spec
    kind = skeleton.model.config.model_type  # type: ignore[union-attr]
    stacked = sorted(changed & spec.stacked)
    if kind not in EXPERTS:
        raise UserError(
            f"routed experts of {kind} cannot be LoRA of PEFT ({len(stacked)} changed, {stacked[0]} for one): it reads "
            f"those of {', '.join(EXPERTS)}. Use --format patch or merged."
        )
    block, names = EXPERTS[kind]
    parts = {}
    for linear, (rows, columns) in spec.known.items():
        if linear in spec.stacked:
            path, _, number = linear.rpartition(".")
            owner, _, parameter = path.rpartition(".")
            owner = block.join(owner.rsplit(".mlp.", 1))
            height = rows // len(names[parameter])
            for position, leaf in enumerate(names[parameter]):
                parts[f"{owner}.{number}.{leaf}"] = Part(linear, position * height, (height, columns))
    return parts

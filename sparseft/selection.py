"""Scores -> `Selection`: which rows, columns or blocks of which module train; and its files.

A `Budget` says what may be chosen (candidates), how much of it, and over which candidates the choice is pooled.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseft.errors import RunError, UserError, shown
from sparseft.files import body_hash, read_described, read_json, replaced_folder, split_name
from sparseft.kernels.reference import KINDS, trainable_entries
from sparseft.modeling import ModelSpec, Slot
from sparseft.runs import write_json

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Candidate:
    """The units of one module that compete with each other: runs of rows or columns, or its blocks."""

    module: str
    kind: str  # rows | columns | blocks
    shape: tuple[int, int]  # of the logical weight (out, in)
    start: int  # first feature
    unit: int  # features a unit; for blocks: the block size
    count: int  # units
    role: str | None = None

    @property
    def key(self) -> str:
        """Names the candidate: the module and, where one has several, the role."""
        return f"{self.module}:{self.role}" if self.role else self.module


@dataclass
class Budget:
    """How many units to keep of each group of candidates; `per_candidate` is the uniform way to spend it."""

    candidates: list[Candidate]
    per_candidate: dict[str, int]  # by Candidate.key
    pooled: dict[str, int]  # by role ("" for blocks): what `allocation: global` spends over all layers
    minimum: int  # units that every candidate keeps under `allocation: global`
    scope_parameters: int
    block_size: int | None = None


@dataclass
class Selection:
    """Indices by module and kind: `{"rows" | "columns": (k,), "blocks": (n, 2)}`, in the checkpoint's order.

    Built from anything that `torch.as_tensor` takes. `meta` travels with the files: method, key, shapes, counts.
    """

    modules: Mapping[str, Mapping[str, Any]]
    block_size: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        modules: dict[str, dict[str, Tensor]] = {}
        for module, kinds in self.modules.items():
            if not isinstance(kinds, Mapping):
                raise UserError(f"selection of {module}: expected {{'rows': […]}}, got {type(kinds).__name__}.")
            chosen: dict[str, Tensor] = {}
            for kind, index in kinds.items():
                if kind == "block_size":
                    if self.block_size not in (None, int(index)):
                        raise UserError(
                            f"selection of {module}: block_size={index}, but other modules have {self.block_size}: "
                            "a selection has one block size."
                        )
                    self.block_size = int(index)
                    continue
                if kind not in KINDS:
                    raise UserError(f"selection of {module}: expected {', '.join(KINDS)}, got '{kind}'.")
                try:
                    tensor = torch.as_tensor(index)
                except (TypeError, ValueError, RuntimeError) as error:
                    raise UserError(f"selection of {module}: {kind} cannot be read as indices ({error}).") from None
                if tensor.numel() == 0:
                    raise UserError(f"selection of {module}: {kind} names no index: leave it out.")
                if tensor.is_floating_point() or tensor.dtype == torch.bool or tensor.is_complex():
                    raise UserError(f"selection of {module}: expected integer {kind}, got {tensor.dtype}.")
                if tensor.dim() != (2 if kind == "blocks" else 1) or (kind == "blocks" and tensor.shape[1] != 2):
                    wanted = "pairs (block row, block column)" if kind == "blocks" else "a list of indices"
                    raise UserError(f"selection of {module}: {kind} must be {wanted}, got {tuple(tensor.shape)}.")
                chosen[kind] = tensor.to(device="cpu", dtype=torch.int64).contiguous()
            if chosen:
                modules[module] = chosen
        self.modules = modules

    @property
    def has_blocks(self) -> bool:
        """Whether any module trains blocks, which need a `block_size`."""
        return any("blocks" in kinds for kinds in self.modules.values())

    def trainable(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """Trainable entries by module, on logical weights of `shapes` (out, in)."""
        return {
            module: sum(
                trainable_entries(kind, index, shapes[module], self.block_size) for kind, index in kinds.items()
            )
            for module, kinds in self.modules.items()
        }

    def digest(self) -> str:
        """A hash over what is chosen."""
        digest = hashlib.sha256(f"{self.block_size}".encode())
        for module in sorted(self.modules):
            for kind in sorted(self.modules[module]):
                digest.update(f"{module}.{kind}".encode() + self.modules[module][kind].numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path, shapes: Mapping[str, tuple[int, int]] | None = None) -> Path:
        """Writes `selection.json` and `selection.safetensors` into `folder`, whole or not at all."""
        from safetensors.torch import save_file

        folder = Path(folder)
        if self.has_blocks and self.block_size is None:
            raise UserError("a selection of blocks needs its block_size: Selection({…}, block_size=64).")
        if shapes is None:
            known = self.meta.get("modules", {})
            shapes = {name: tuple(info["shape"]) for name, info in known.items() if "shape" in info}
        modules: dict[str, dict[str, Any]] = {}
        trainable = self.trainable(shapes) if shapes.keys() >= self.modules.keys() else {}
        for module, kinds in self.modules.items():
            modules[module] = {kind: len(index) for kind, index in kinds.items()}
            if module in trainable:
                modules[module] |= {"shape": list(shapes[module]), "trainable": trainable[module]}
        content = {
            **self.meta,
            "format_version": FORMAT_VERSION,
            "block_size": self.block_size,
            "digest": self.digest(),
            "modules": modules,
        }
        tensors = {
            f"{module}.{kind}.index": index.to(torch.int32)
            for module, kinds in self.modules.items()
            for kind, index in kinds.items()
        }
        with replaced_folder(folder) as aside:
            save_file(tensors, aside / "selection.safetensors", {"config_sha256": body_hash(content)})
            write_json(aside / "selection.json", content)
        return folder

    @staticmethod
    def load(folder: str | Path) -> Selection:
        """Reads a selection's folder; a missing, truncated or altered file is a `UserError`."""
        folder = Path(folder)
        content = read_json(folder / "selection.json", "selection")
        if content.get("format_version") != FORMAT_VERSION:
            known = shown(content.get("format_version"))
            raise UserError(f"{folder}: selection format {known}, this version reads {FORMAT_VERSION}.")
        tensors, texts = read_described(folder / "selection.safetensors", "selection")
        modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            module, kind, last = split_name(name, folder)
            if last != "index":
                raise UserError(f"{folder}: unexpected tensor '{name}' in a selection.")
            modules[module][kind] = tensor
        block_size = content.get("block_size")
        if block_size is not None and (type(block_size) is not int or block_size < 1):
            raise UserError(f"{folder}: block_size={shown(repr(block_size))} in selection.json is not a block size.")
        described = content.get("modules")
        if not isinstance(described, dict) or not all(isinstance(info, dict) for info in described.values()):
            raise UserError(f"{folder}: selection.json needs modules, an object of objects.")
        meta = {key: value for key, value in content.items() if key not in ("format_version", "block_size", "digest")}
        selection = Selection(dict(modules), block_size=block_size, meta=meta)
        if selection.digest() != content.get("digest"):
            raise UserError(f"{folder}: selection.safetensors is not the file that selection.json describes (altered).")
        if texts.get("config_sha256") != body_hash(content):
            raise UserError(f"{folder}: selection.json is not the one that was written with its tensors (altered).")
        return selection


# ---- budgets ----


def keep_count(share: float, units: int) -> int:
    """`max(1, round(share × units))`, at most all."""
    return min(units, max(1, round(share * units)))


def _candidates(slots: Iterable[Slot], spec: ModelSpec) -> list[Candidate]:
    return [
        Candidate(slot.module, slot.side, spec.linears[slot.module], slot.start, slot.unit, slot.count, slot.role)
        for slot in slots
    ]


def _require_roles(spec: ModelSpec, roles: Iterable[str], scope: str | None) -> list[Slot]:
    slots = spec.slots_in(scope)
    present = sorted({slot.role for slot in slots})
    for role in roles:
        if role not in present:
            if not present:
                raise _no_role(spec, scope)
            raise UserError(f"the model has no '{role}' projection in scope (it has {', '.join(present)}).")
    return slots


def _no_role(spec: ModelSpec, scope: str | None) -> UserError:
    return UserError(
        f"no module in scope has a role that s2ft knows (q, k, v, o, gate, up, down); found {spec.leaves(scope)}: name "
        "those to train in method.rows (output features) or method.columns (input features), or use method=sylva."
    )


def ratio_budget(spec: ModelSpec, ratios: Mapping[str, float], *, scope: str | None) -> Budget:
    """A share of the units of each role, as the S2FT paper's `v_ratio, o_ratio, u_ratio, d_ratio`."""
    ratios = {role: ratio for role, ratio in ratios.items() if ratio > 0}
    slots = [slot for slot in _require_roles(spec, ratios, scope) if slot.role in ratios]
    candidates = _candidates(slots, spec)
    per = {c.key: keep_count(ratios[c.role], c.count) for c in candidates}
    totals = {role: sum(c.count for c in candidates if c.role == role) for role in ratios}
    pooled = {role: keep_count(ratio, totals[role]) for role, ratio in ratios.items()}
    return Budget(candidates, per, pooled, 0, sum(r * c for r, c in spec.linears_in(scope).values()))


def sparsity_budget(spec: ModelSpec, roles: list[str], sparsity: float, *, scope: str | None) -> Budget:
    """(1 − sparsity) of the linear weights in scope, spent in equal shares on the units of `roles`.

    Heads are coarse: what rounding them leaves or overdraws is made up by the finest role, of the same layer or with
    `allocation: global` of all, so that the budget is met there to within one unit of that role.
    """
    slots = [slot for slot in _require_roles(spec, roles, scope) if slot.role in roles]
    if not slots:
        raise _no_role(spec, scope)
    candidates = _candidates(slots, spec)
    scope_parameters = sum(r * c for r, c in spec.linears_in(scope).values())
    weights = sum(slot.count * slot.unit * slot.other for slot in slots)
    share = (1.0 - sparsity) * scope_parameters / weights
    if share > 1.0:
        raise UserError(
            f"sparsity={sparsity} asks for {(1 - sparsity) * scope_parameters:,.0f} trainable weights, but the roles "
            f"{', '.join(roles)} have only {weights:,} in scope: raise sparsity or name more method.roles."
        )
    entries = {slot.module + ":" + slot.role: slot.unit * slot.other for slot in slots}
    per: dict[str, int] = {}
    by_layer: dict[int, list[Candidate]] = defaultdict(list)
    for slot, candidate in zip(slots, candidates, strict=True):
        by_layer[slot.layer].append(candidate)
    for members in by_layer.values():
        per |= _coarse_first(share, {c.key: (c.count, c.count * entries[c.key]) for c in members})
    units = {role: [0, 0] for role in roles}
    for c in candidates:
        units[c.role][0] += c.count
        units[c.role][1] += c.count * entries[c.key]
    pooled = _coarse_first(share, units)
    return Budget(candidates, per, pooled, 0, scope_parameters)


def _coarse_first(share: float, groups: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """How many units of each group make up `share` of the weights of all; groups are (units, weights of them all)."""
    kept: dict[str, int] = {}
    rest = sum(weights for _, weights in groups.values())
    wanted = share * rest
    for name, (units, weights) in sorted(groups.items(), key=lambda item: -item[1][1] / item[1][0]):
        kept[name] = keep_count(max(0.0, wanted) / rest, units)
        wanted -= kept[name] * weights / units
        rest -= weights
    return kept


def block_budget(spec: ModelSpec, block_size: int, sparsity: float, *, scope: str | None) -> Budget:
    """The share (1 − sparsity) of the B×B blocks of every linear in scope, edge blocks included, at least one each."""
    candidates = []
    linears = spec.linears_in(scope)
    for name, (rows, columns) in linears.items():
        count = math.ceil(rows / block_size) * math.ceil(columns / block_size)
        candidates.append(Candidate(name, "blocks", (rows, columns), 0, block_size, count))
    per = {c.key: keep_count(1.0 - sparsity, c.count) for c in candidates}
    pooled = {"": keep_count(1.0 - sparsity, sum(c.count for c in candidates))}
    scope_parameters = sum(rows * columns for rows, columns in linears.values())
    return Budget(candidates, per, pooled, 1, scope_parameters, block_size)


def block_weights(candidate: Candidate) -> Counter[int]:
    """How many of a candidate's blocks have how many weights: those at the lower and right edges may have fewer."""
    size, found = candidate.unit, Counter[int]()
    high, wide = ({size: side // size, side % size: 1} for side in candidate.shape)
    for h, rows in high.items():
        for w, columns in wide.items():
            if h and w and rows and columns:
                found[h * w] += rows * columns
    return found


def blocks_spent(budget: Budget, allocation: str) -> tuple[float, int]:
    """The weights that spending a budget of blocks trains: in the mean over all choices, and at most.

    They differ where blocks at the edges are smaller; scores that are sums over a block tend to choose the larger.
    """
    sizes = {c.key: block_weights(c) for c in budget.candidates}
    mean = {c.key: math.prod(c.shape) / c.count for c in budget.candidates}
    kept = budget.per_candidate
    if allocation == "global":
        kept = {c.key: min(budget.minimum, c.count) for c in budget.candidates}
    average = sum(mean[key] * count for key, count in kept.items())
    most = sum(_take_largest(sizes[key], count) for key, count in kept.items())
    pooled = budget.pooled[""] - sum(kept.values()) if allocation == "global" else 0
    if pooled > 0:
        left = {c.key: c.count - kept[c.key] for c in budget.candidates}
        average += pooled * sum(mean[key] * count for key, count in left.items()) / sum(left.values())
        most += _take_largest(sum(sizes.values(), Counter[int]()), pooled)
    return average, most


def _take_largest(blocks: Counter[int], count: int) -> int:
    """Takes the `count` largest out of `blocks` and returns their weights."""
    total = 0
    for weights in sorted(blocks, reverse=True):
        taken = min(blocks[weights], count)
        blocks[weights] -= taken
        total += weights * taken
        count -= taken
    return total


# ---- choosing ----


def rank_units(scores: Tensor, order: str, generator: torch.Generator) -> Tensor:
    """All units, the best first: ties broken by index; `sampled` draws without replacement, in proportion."""
    scores = scores.detach().double().cpu()
    if not torch.isfinite(scores).all():
        raise RunError("an importance score is not finite: the model's weights or activations overflow.")
    if order == "largest":
        return torch.argsort(scores, descending=True, stable=True)
    if order == "smallest":
        return torch.argsort(scores, stable=True)
    # Gumbel top-k: log(score) + noise ranks as successive draws in proportion to the score do.
    uniform = torch.rand(len(scores), generator=generator, dtype=torch.float64).clamp_min(1e-300)
    noise = -torch.log(-torch.log(uniform))
    # Scores of 0 come last, in random order: by index, re-selection would draw the same ones each time.
    keys = torch.where(scores > 0, torch.log(scores), -1e6) + noise
    return torch.argsort(keys, descending=True, stable=True)


def generator_for(seed: int, *names: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the names only: the same on every rank and device."""
    digest = hashlib.sha256("\0".join((str(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def choose(budget: Budget, scores: Mapping[str, Tensor], *, order: str, allocation: str, seed: int) -> Selection:
    """The selection that spends `budget` on the units with the best `scores` ((units,) by `Candidate.key`)."""
    kept: dict[str, Tensor] = {}
    if allocation == "per_layer":
        for c in budget.candidates:
            ranked = rank_units(scores[c.key], order, generator_for(seed, "choose", c.key))
            kept[c.key] = ranked[: budget.per_candidate[c.key]]
    else:
        groups: dict[str, list[Candidate]] = defaultdict(list)
        for c in budget.candidates:
            groups[c.role or ""].append(c)
        for role, members in groups.items():
            kept |= _choose_pooled(members, scores, budget.pooled[role], budget.minimum, order, seed, role)
    modules: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for c in budget.candidates:
        units = kept[c.key].sort().values
        if len(units):
            modules[c.module][c.kind].append(unit_index(c, units))
    joined = {
        module: {
            kind: torch.cat(parts).sort().values if kind != "blocks" else parts[0] for kind, parts in kinds.items()
        }
        for module, kinds in modules.items()
    }
    return Selection(joined, block_size=budget.block_size)


def _choose_pooled(
    members: list[Candidate],
    scores: Mapping[str, Tensor],
    total: int,
    minimum: int,
    order: str,
    seed: int,
    role: str,
) -> dict[str, Tensor]:
    """The best `total` units of all members together, each member keeping at least `minimum`."""
    offsets, position = {}, 0
    for c in members:
        offsets[c.key] = position
        position += c.count
    ranked = rank_units(
        torch.cat([scores[c.key].cpu() for c in members]), order, generator_for(seed, "choose", "global", role)
    )
    rank = torch.empty_like(ranked)
    rank[ranked] = torch.arange(len(ranked))
    first = []
    for c in members:
        own = rank[offsets[c.key] : offsets[c.key] + c.count]
        first.append(own.argsort()[:minimum] + offsets[c.key])
    forced = torch.cat(first)
    is_forced = torch.zeros(len(ranked), dtype=torch.bool)
    is_forced[forced] = True
    rest = ranked[~is_forced[ranked]][: max(0, total - len(forced))]
    taken = torch.cat([forced, rest])
    return {
        c.key: taken[(taken >= offsets[c.key]) & (taken < offsets[c.key] + c.count)] - offsets[c.key] for c in members
    }


def unit_index(candidate: Candidate, units: Tensor) -> Tensor:
    """The features (k,) or blocks (n, 2) that units stand for."""
    if candidate.kind == "blocks":
        across = math.ceil(candidate.shape[1] / candidate.unit)
        return torch.stack([units // across, units % across], dim=1)
    features = units[:, None] * candidate.unit + torch.arange(candidate.unit) + candidate.start
    return features.reshape(-1)

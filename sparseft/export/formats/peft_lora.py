"""`peft-lora`: a LoRA folder whose products are exactly what was trained, in the form that every engine takes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparseft.errors import RunError, UserError
from sparseft.export import engines
from sparseft.export.changes import Change, LowRankChange, SparseChange
from sparseft.export.formats.base import Answering, Format, Options, rounding
from sparseft.export.lora_layout import EXPERTS, Layout, layout_of
from sparseft.export.low_rank import factors
from sparseft.export.proof import HuggingFace
from sparseft.export.skeleton import Skeleton
from sparseft.export.source import Source
from sparseft.files.atomic import write_json
from sparseft.files.tensors import ADAPTER_CONFIG, ADAPTER_TENSORS, Stored, write_streamed
from sparseft.files.untrusted import read_json_object
from sparseft.models.loading import check_model_path
from sparseft.selection.engine_ranks import file_rank

TINY = {torch.float16: 2.0**-25}  # the least that a stored value may change by
SUMS = 2.0**-22  # what fp32 sums of a few terms may differ by, relative to their sizes
KEY = "base_model.model.{}.lora_{}.weight"


@dataclass
class Plan:
    """What is written: the linears, the one rank of all, and what each changed linear of the file needs of it."""

    layout: Layout
    rank: int
    needs: dict[str, int]


class PeftLora(Format):
    """`adapter_config.json` and `adapter_model.safetensors`: one rank for all linears, alpha the same (scale 1), no
    pattern fields, every layer of a kind and all of q, k, v and of gate, up, with zeros where nothing was trained."""

    name: ClassVar[str] = "peft-lora"
    rounded: ClassVar[bool] = False

    def __init__(self) -> None:
        self.plan: Plan | None = None

    def check(self, source: Source, options: Options) -> list[str]:
        changes = source.linears
        skeleton = Skeleton.of(source)
        layout = layout_of(skeleton, changes)
        _check_names(skeleton, layout)
        needs = {}
        for name, (b, _) in _factors(layout, changes):
            needs[name] = b.shape[1]
        rank = file_rank(max(needs.values(), default=0))
        self.plan = Plan(layout, rank, needs)
        trained = {"lora": source.kind == "peft", "reselects": source.reselects}
        facts = engines.LoraFacts(rank, needs, tuple(layout.parts), layout.experts, layout.transposed, **trained)
        return engines.check(options.engine, self.name, facts)

    def write(self, source: Source, options: Options, folder: Path) -> dict[str, Any]:
        assert self.plan is not None, "check comes first"
        layout, rank = self.plan.layout, self.plan.rank
        dtype = options.dtype or torch.float32
        tensors = {}
        for name, part in layout.parts.items():
            tensors[KEY.format(name, "A")] = Stored(dtype, (rank, part.shape[1]))
            tensors[KEY.format(name, "B")] = Stored(dtype, (part.shape[0], rank))
        path = folder / ADAPTER_TENSORS
        write_streamed(path, tensors, self._tensors(source, dtype), {"format": "pt"})
        write_json(folder / ADAPTER_CONFIG, config_of(source, self.plan))
        return {
            "rank": rank,
            "needed": max(self.plan.needs.values(), default=0),
            "linears": len(layout.parts),
            "target_modules": layout.targets,
            "bytes": path.stat().st_size,
        }

    def _tensors(self, source: Source, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """The file's tensors in its order, one linear's in memory at a time."""
        assert self.plan is not None
        layout, rank = self.plan.layout, self.plan.rank
        filled = _factors(layout, source.linears)
        ready = next(filled, None)
        for name, part in layout.parts.items():
            if ready is not None and ready[0] == name:
                b, a = ready[1]
                ready = next(filled, None)
            else:
                b, a = torch.zeros(part.shape[0], 0), torch.zeros(0, part.shape[1])
            yield KEY.format(name, "A"), pad(a, (0, 0, 0, rank - len(a))).to(dtype)
            yield KEY.format(name, "B"), pad(b, (0, rank - b.shape[1])).to(dtype)
        assert ready is None

    def verify(self, source: Source, options: Options, folder: Path) -> None:
        dtype = options.dtype or torch.float32
        reader = Reader(folder)
        skeleton = Skeleton.of(source)
        expected = _in_the_file(source, skeleton, dtype)
        if missing := sorted(expected.keys() - reader.linears):
            raise _wrong(f"{missing[0]} is missing")
        for name in sorted(reader.linears):
            if name in skeleton.spec.known:
                kind = skeleton.place(name)[1]
                same = {n for n in skeleton.spec.known if skeleton.place(n)[1] == kind}
                if absent := sorted(same - reader.linears):
                    raise _wrong(f"{absent[0]} is missing beside {name}")
            wanted, allowed = expected[name]() if name in expected else (None, None)
            found = reader.product(name, torch.float32 if wanted is None else wanted.dtype)
            if wanted is None or allowed is None:
                if bool(found.any()):
                    raise _wrong(f"{name} is changed, which the adapter leaves as it is")
                continue
            if found.shape != wanted.shape:
                raise _wrong(f"{name} has the shape {tuple(found.shape)} instead of {tuple(wanted.shape)}")
            difference = (found - wanted).abs()
            if not bool((difference <= allowed).all()):  # NaN too
                raise _wrong(f"{name} differs by up to {float(difference.max()):.3g}")

    def load(self, source: Source, options: Options, folder: Path) -> Answering:
        import peft

        base: Any = source.base()
        device = str(next(base.parameters()).device)
        model = peft.PeftModel.from_pretrained(base, str(folder), torch_device=device)
        return HuggingFace(model.eval(), f"peft {peft.__version__}")

    def resolution(self, source: Source, options: Options) -> float:
        return rounding(source, options.dtype)


def _check_names(skeleton: Skeleton, layout: Layout) -> None:
    """Refuses names of dense linears that PEFT would take for those of routed experts, as it does of shared ones, or
    would rename as it does a checkpoint's, so that it would not find them."""
    import peft
    from peft.utils import transformers_weight_conversion as conversion

    dense = {name: part for name, part in layout.parts.items() if name not in layout.experts}
    for target in layout.dense:
        config = peft.LoraConfig(target_modules=[target])
        try:
            conversion.convert_peft_config_for_transformers(config, skeleton.model, None)
        except ValueError:  # one of two that experts have together
            config.target_modules = None
        if config.target_modules != {target}:
            taken = [name for name in dense if name.endswith(target)]
            raise _misread(taken, "takes the name for the routed experts'")
    sides = {
        KEY.format(name, side): torch.empty(shape, device="meta")
        for name, part in dense.items()
        for side, shape in (("A", (1, part.shape[1])), ("B", (part.shape[0], 1)))
    }
    found = conversion.convert_peft_adapter_state_dict_for_transformers(
        model=skeleton.model, peft_config=peft.LoraConfig(target_modules=layout.dense), adapter_state_dict=dict(sides)
    )
    lost = {key for key, value in sides.items() if key not in found or found[key].shape != value.shape}
    if taken := [name for name in dense if lost & {KEY.format(name, side) for side in "AB"}]:
        raise _misread(taken, "takes the name for another one of the checkpoint's")


def _misread(linears: list[str], how: str) -> UserError:
    return UserError(
        f"{linears[0]} ({len(linears)} such) cannot be LoRA of PEFT, which {how}: use --format patch or merged."
    )


def config_of(source: Source, plan: Plan) -> dict[str, Any]:
    """`adapter_config.json`."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": check_model_path(source.target.model.path),
        "revision": source.target.model.revision,
        "inference_mode": True,
        "r": plan.rank,
        "lora_alpha": plan.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": bool(plan.layout.transposed),
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "target_modules": plan.layout.targets,
    }


def _factors(layout: Layout, changes: Mapping[str, Change]) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """b (out, r) and a (r, in) of each linear of the file that changed, in the file's order."""
    for name, part in layout.parts.items():
        change = changes.get(part.linear)
        if change is None:
            continue
        b, a = factors(change)
        if part.shape != change.shape:  # of stacked linears each has its rows
            b = b[part.start : part.start + part.shape[0]]
            live = b.any(dim=0)
            b, a = b[:, live], a[live]
        yield name, (b, a)


# ---- reading, by PEFT's rules alone ----


class Reader:
    """A LoRA folder as PEFT documents it: ΔW = alpha / r · B A, of `base_model.model.<linear>.lora_A.weight`."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        config = read_json_object(folder / ADAPTER_CONFIG, "adapter")
        self.rank, self.scale = config["r"], config["lora_alpha"] / config["r"]
        for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "use_rslora", "use_dora"):
            if config.get(key):
                raise _wrong(f"{key} is set in {ADAPTER_CONFIG}")
        self.file = safe_open(folder / ADAPTER_TENSORS, "pt")
        sides: dict[str, set[str]] = {}
        for key in self.file.keys():
            match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
            if match is None:
                raise _wrong(f"{key} is no linear's LoRA")
            sides.setdefault(match[1], set()).add(match[2])
        targets = config["target_modules"]
        for name, found in sides.items():
            if found != {"A", "B"}:
                raise _wrong(f"{name} has one of lora_A and lora_B alone")
            if not any(name == target or name.endswith(f".{target}") for target in targets):
                raise _wrong(f"{name} is not among the target_modules of {ADAPTER_CONFIG}")
        self.linears = sides.keys()

    def product(self, name: str, dtype: torch.dtype) -> Tensor:
        """ΔW (out, in) of one linear, computed in `dtype`."""
        a, b = (self.file.get_tensor(f"base_model.model.{name}.lora_{side}.weight").to(dtype) for side in "AB")
        if len(a) != self.rank or b.shape[1] != self.rank:
            raise _wrong(f"{name} has the rank {len(a)}, the config {self.rank}")
        live = a.any(dim=1) & b.any(dim=0) | ~(a.isfinite().all(dim=1) & b.isfinite().all(dim=0))  # not the padding
        return self.scale * (b[:, live] @ a[live])


def _in_the_file(source: Source, skeleton: Skeleton, dtype: torch.dtype) -> dict[str, Any]:
    """What each linear of the file must hold: functions that return ΔW and how far rounding may take it, (out, in)."""
    error = rounding(source, dtype) + SUMS, TINY.get(dtype, 0.0)
    expected: dict[str, Any] = {}
    block, names = EXPERTS.get(skeleton.model.config.model_type, ("", {}))  # type: ignore[union-attr]
    for linear, change in source.linears.items():
        if linear not in skeleton.spec.stacked:
            expected[linear] = lambda change=change: _dense(change, *error)
            continue
        match = re.fullmatch(r"(.+)\.mlp\.experts\.(\w+)\.(\d+)", linear)
        assert match is not None
        for half, leaf in enumerate(names[match[2]]):
            size = change.shape[0] // len(names[match[2]])
            rows = slice(half * size, (half + 1) * size)
            expected[f"{match[1]}{block}experts.{match[3]}.{leaf}"] = lambda change=change, rows=rows: tuple(
                part[rows] for part in _dense(change, *error)
            )
    return expected


def _dense(change: Change, relative: float, least: float) -> tuple[Tensor, Tensor]:
    """ΔW (out, in), and how far it may be rounded: relative to the terms that make it, and `least` in each factor."""
    if isinstance(change, LowRankChange):  # sums of r terms, which fp32 would round in another order
        b, a = change.scale * change.b.double(), change.a.double()
        return b @ a, relative * (b.abs() @ a.abs()) + least * (b.abs().sum(dim=1, keepdim=True) + a.abs().sum(dim=0))
    assert isinstance(change, SparseChange)
    parts = [SparseChange(change.shape, {kind: value}).dense().abs() for kind, value in change.kinds.items()]
    return change.dense(), relative * torch.stack(parts).sum(dim=0) + least


def _wrong(what: str) -> RunError:
    return RunError(f"the export is not what was trained: {what}. Nothing was kept.")

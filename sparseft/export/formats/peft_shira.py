"""`peft-shira`: single entries of weights as PEFT's SHiRA holds them, where its shape allows all of them.

PEFT gives every linear of shape (out, in) exactly r · (in + out) entries, with one r for all. Those that fewer were
trained in are filled up with zeros; r is the least that holds the fullest one, and no linear may be too small for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparseft.errors import RunError, UserError
from sparseft.export.formats.base import Answering, Format, Options
from sparseft.export.proof import HuggingFace
from sparseft.export.skeleton import Skeleton
from sparseft.export.source import Source
from sparseft.files.atomic import write_json
from sparseft.files.tensors import ADAPTER_CONFIG, ADAPTER_TENSORS, Stored, write_streamed
from sparseft.files.untrusted import read_json_object
from sparseft.models.loading import check_model_path

KEY = "base_model.model.{}.shira_{}"
OTHER = "use --format merged, patch or peft-lora"


@dataclass
class Plan:
    """The linears, in the model's order, what the config calls them, and r."""

    linears: list[str]
    targets: list[str]
    r: int


class PeftShira(Format):
    """`adapter_config.json` and `adapter_model.safetensors`: of each linear r · (in + out) values and their places."""

    name: ClassVar[str] = "peft-shira"
    rounded: ClassVar[bool] = False

    def __init__(self) -> None:
        self.plan: Plan | None = None

    def check(self, source: Source, options: Options) -> list[str]:
        if options.dtype not in (None, torch.float32):
            raise UserError("--dtype: PEFT keeps SHiRA's values in float32: leave it out.")
        if source.kind != "sparse":
            low_rank = source.kind == "peft" and not source.content.get("use_dora")
            other = OTHER if low_rank else "use --format merged or patch"
            raise UserError(f"{source.folder}: {source.method} changes every entry of its weights: {other}.")
        self.plan = plan_of(source)
        return []

    def write(self, source: Source, options: Options, folder: Path) -> dict[str, Any]:
        assert self.plan is not None, "check comes first"
        r, tensors = self.plan.r, {}
        for name in self.plan.linears:
            count = r * sum(source.changes[name].shape)
            tensors[KEY.format(name, "weight")] = Stored(torch.float32, (count,))
            tensors[KEY.format(name, "indices")] = Stored(torch.int32, (2, count))
        path = folder / ADAPTER_TENSORS
        write_streamed(path, tensors, self._tensors(source), {"format": "pt"})
        content = {
            "peft_type": "SHIRA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": check_model_path(source.target.model.path),
            "revision": source.target.model.revision,
            "inference_mode": True,
            "r": r,
            "mask_type": "random",  # PEFT's only one; the file's indices take its place
            "fan_in_fan_out": False,
            "modules_to_save": None,
            "target_modules": self.plan.targets,
        }
        write_json(folder / ADAPTER_CONFIG, content)
        return {"r": r, "linears": len(self.plan.linears), "bytes": path.stat().st_size}

    def _tensors(self, source: Source) -> Iterator[tuple[str, Tensor]]:
        assert self.plan is not None
        for name in self.plan.linears:
            change = source.changes[name]
            rows, columns = change.shape
            flat = change.entries()
            free = torch.ones(rows * columns, dtype=torch.bool)
            free[flat] = False
            spare = free.nonzero().flatten()[: self.plan.r * (rows + columns) - len(flat)]
            flat = torch.cat([flat, spare]).sort().values
            yield KEY.format(name, "weight"), change.dense().flatten()[flat]
            yield KEY.format(name, "indices"), torch.stack([flat // columns, flat % columns]).to(torch.int32)

    def verify(self, source: Source, options: Options, folder: Path) -> None:
        from safetensors import safe_open

        config = read_json_object(folder / ADAPTER_CONFIG, "adapter")
        with safe_open(folder / ADAPTER_TENSORS, "pt") as file:
            keys = set(file.keys())
            names = {match[1] for key in keys if (match := re.fullmatch(r"base_model\.model\.(.+)\.shira_weight", key))}
            if keys != {f"base_model.model.{n}.shira_{part}" for n in names for part in ("weight", "indices")}:
                raise _wrong("a linear lacks its values or its places, or there is more than linears")
            if names != source.changes.keys():
                raise _wrong(f"{sorted(names ^ source.changes.keys())[0]} is missing or too many")
            for name in sorted(names):
                wanted = source.changes[name].dense()
                rows, columns = file.get_tensor(f"base_model.model.{name}.shira_indices").long()
                values = file.get_tensor(f"base_model.model.{name}.shira_weight")
                if len(values) != config["r"] * sum(wanted.shape) or rows.shape != values.shape:
                    raise _wrong(f"{name} has {len(values)} entries, where r = {config['r']} asks for another number")
                places = rows * wanted.shape[1] + columns
                if bool((rows >= wanted.shape[0]).any() or (columns >= wanted.shape[1]).any() or (places < 0).any()):
                    raise _wrong(f"{name} has entries outside its weight")
                if len(places.unique()) != len(places):
                    raise _wrong(f"{name} names an entry twice")
                found = torch.zeros(wanted.numel()).index_put_((places,), values).view_as(wanted)
                if not torch.equal(found, wanted):
                    raise _wrong(f"{name} differs by up to {float((found - wanted).abs().max()):.3g}")
                if not any(name == target or name.endswith(f".{target}") for target in config["target_modules"]):
                    raise _wrong(f"{name} is not among the target_modules of {ADAPTER_CONFIG}")

    def load(self, source: Source, options: Options, folder: Path) -> Answering:
        import peft

        base: Any = source.base()
        model = peft.PeftModel.from_pretrained(base, str(folder), torch_device=str(next(base.parameters()).device))
        return HuggingFace(model.eval(), f"peft {peft.__version__}")


def plan_of(source: Source) -> Plan:
    """The least r that holds every linear; a `UserError` with the numbers where there is none."""
    skeleton = Skeleton.of(source)
    spec, changes = skeleton.spec, source.changes
    linears = [name for name in spec.known if name in changes]
    for held, what in ((spec.stacked, "routed experts"), (spec.transposed, "Conv1D layers")):
        if others := [name for name in linears if name in held]:
            raise UserError(f"PEFT has no SHiRA for {what} ({len(others)} changed, {others[0]} for one): {OTHER}.")
    if others := [name for name in changes if name not in linears]:
        raise UserError(f"PEFT has no SHiRA for {others[0]}, which is no linear of the decoder layers: {OTHER}.")
    needs, room = {}, {}
    for name in linears:
        rows, columns = changes[name].shape
        needs[name] = -(-len(changes[name].entries()) // (rows + columns))
        room[name] = rows * columns // (rows + columns)
    fullest = max(needs, key=lambda name: needs[name])
    tightest = min(room, key=lambda name: room[name])
    if needs[fullest] > room[tightest]:
        raise UserError(
            f"SHiRA has one r for all linears, r · (in + out) entries each: {fullest} needs r = {needs[fullest]} for "
            f"its {len(changes[fullest].entries()):,} entries, of which {tightest} with its "
            f"{changes[tightest].shape[0]} x {changes[tightest].shape[1]} has room for {room[tightest]}: {OTHER}."
        )
    return Plan(linears, skeleton.targets(linears), needs[fullest])


def _wrong(what: str) -> RunError:
    return RunError(f"the export is not what was trained: {what}. Nothing was kept.")

"""`packed`: the quantized base with the adapter in its weights, in the same packed form.

Only groups of weights (that share a scale) in which something was trained are written; all others are the base's to the
bit. What was learnt is rounded to the levels of the form, so that the share of the gain that survives is measured.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.config import ModelConfig
from sparseft.errors import RunError, UserError, shown
from sparseft.export.changed_tensors import added, base_of
from sparseft.export.changes import Change, SparseChange
from sparseft.export.formats.base import Options
from sparseft.export.formats.merged import Merged, files_beside
from sparseft.export.proof import HuggingFace
from sparseft.export.source import Source
from sparseft.models.checkpoint import Checkpoint
from sparseft.models.loading import load_model, resolve_device
from sparseft.models.packed.quantized import dequantized, is_packed
from sparseft.models.packed.repacking import check_writable, write_packed
from sparseft.models.packed.unquantized import Unquantized


class Packed(Merged):
    """A model folder as transformers writes quantized models, which it, vLLM and others load."""

    name = "packed"

    def __init__(self) -> None:
        self._written: dict[str, str] = {}  # by linear: a hash of what it is to be

    def check(self, source: Source, options: Options) -> list[str]:
        if source.beside is None:
            raise UserError("--format packed: the base was not packed by model.quantize; use --format merged.")
        if source.packed is not None and source.packed.quantize not in ("nf4", "int8"):
            raise UserError(
                f"--format packed: model.quantize={source.packed.quantize} cannot be written into; use --format merged."
            )
        if options.dtype is not None:
            raise UserError("--format packed: what is packed has no dtype to choose; leave --dtype out.")
        files_beside(source, Checkpoint.of(base_of(source)).folder)
        _ = source.linears  # refuses what is no change of linears
        return []

    def write(self, source: Source, options: Options, folder: Path) -> dict[str, Any]:
        tokenizer = source.tokenizer
        model = self.base(source, options)
        touched = count = entries = 0
        for changed, linear, trained in _write(source, model):
            touched, count, entries = touched + changed, count + linear, entries + trained
        self._written = {name: _hash(dequantized(module)) for name, module in _packed(model)}
        self.copy_files(source, options, tokenizer, Checkpoint.of(base_of(source)).folder, folder, untied=False)
        model.save_pretrained(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        facts = {"files": len(list(folder.glob("*.safetensors"))), "bytes": size}
        return {"linears": len(source.linears), "entries": entries, "touched": touched / count} | facts

    def verify(self, source: Source, options: Options, folder: Path) -> None:
        model = load_model(
            ModelConfig(path=str(folder), trust_remote_code=source.target.model.trust_remote_code),
            resolve_device(source.config.hardware.device),
        )
        found = {name: _hash(dequantized(module)) for name, module in _packed(model)}
        if found != self._written:
            names = self._written.keys() ^ found.keys() or {n for n in found if found[n] != self._written[n]}
            raise RunError(f"the export is not what was written: {shown(min(names))} differs. Nothing was kept.")

    def base(self, source: Source, options: Options) -> nn.Module:
        assert source.beside is not None
        return load_model(source.beside, resolve_device(source.config.hardware.device))

    def attached(self, source: Source, options: Options, base: nn.Module) -> nn.Module:
        for _ in _write(source, base):
            pass
        return base

    def load(self, source: Source, options: Options, folder: Path) -> HuggingFace:
        import transformers

        model = load_model(
            ModelConfig(path=str(folder), trust_remote_code=source.target.model.trust_remote_code),
            resolve_device(source.config.hardware.device),
        )
        return HuggingFace(model, f"transformers {transformers.__version__}")


def _packed(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if is_packed(module))


def _hash(values: Tensor) -> str:
    return hashlib.sha256(values.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()


def _write(source: Source, model: nn.Module) -> Iterator[tuple[int, int, int]]:
    """Writes what a source changes into its packed model, linear by linear; yields how many weights lie in groups that
    were touched, of how many, and how many were trained. RunError where another weight has changed."""
    linears = dict(_packed(model))
    for name, change in source.linears.items():
        if name not in linears:
            raise UserError(f"--format packed: '{shown(name)}' is not packed in this base; use --format merged.")
        module = linears[name]
        check_writable(name, module)
        before = dequantized(module).detach()
        if tuple(before.shape) != tuple(change.shape):
            raise UserError(f"{source.folder}: {shown(name)} is {change.shape}, in the base {tuple(before.shape)}.")
        entries = change.entries()
        wanted = _wanted(model, name, change, before, entries).to(before.device)
        by_chance = None if source.stored_packed is None else zlib.crc32(name.encode())
        touched = write_packed(module, wanted, entries, by_chance)
        same = (dequantized(module) == before) | touched
        if not same.all():
            raise RunError(f"{shown(name)}: {int((~same).sum()):,} weights beside the trained groups have changed.")
        yield int(touched.sum()), touched.numel(), len(entries)


def _wanted(model: nn.Module, name: str, change: Change, before: Tensor, entries: Tensor) -> Tensor:
    """The weight (out, in) in fp32, of which `entries` are to be written: there the checkpoint's values with what was
    learnt.

    Packed values, rounded, would not do: they lie at levels, from which a difference of less than half a step rounds
    back, and so nearly all that is learnt would be lost. The checkpoint's lie anywhere, and rounding keeps differences
    in the mean. Where it was packed already they are all there is, and are rounded by chance, which does so too.
    """
    checkpoint = Unquantized.of(model)
    own = (before.float().cpu() if checkpoint is None else checkpoint.weight(name).float()).contiguous()
    if not isinstance(change, SparseChange):
        return own + change.dense()
    values = before.float().cpu().contiguous()
    values.view(-1)[entries] = added(change, entries, own.view(-1)[entries])
    return values

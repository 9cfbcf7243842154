"""`gguf-lora`: an adapter file of llama.cpp, exact, for a GGUF of the base in whatever quantization."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparseft.errors import RunError, UserError
from sparseft.export.changes import Change
from sparseft.export.formats.base import Answering, Format, Options, rounding
from sparseft.export.gguf_adapter import GgufAdapter
from sparseft.export.gguf_names import Place, architecture_of, check_gguf, experts_of, places_of, stored
from sparseft.export.llama_cpp import LlamaCpp, check_llama_cpp
from sparseft.export.low_rank import factors, rank
from sparseft.export.low_rank_forward import add_while_computing
from sparseft.export.proof import HuggingFace
from sparseft.export.source import Source

FILE = "adapter.gguf"
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class GgufLora(Format):
    """`adapter.gguf`: for each tensor of llama.cpp that changes a pair lora_a (r, in) and lora_b (out, r).

    llama.cpp adds alpha / r · lora_b @ lora_a, with r the tensor's own rank and one alpha for the file. So that the
    scale is a power of two, which no value is rounded by, ranks are filled up with zeros to the next one, alpha is the
    smallest of them, and lora_b takes what is left: r / alpha.
    """

    name = "gguf-lora"
    rounded: ClassVar[bool] = False

    def check(self, source: Source, options: Options) -> list[str]:
        check_gguf()
        if source.kind == "full":
            raise UserError(
                f"--format gguf-lora holds differences, and {source.folder} is a model trained whole: llama.cpp's "
                "convert_hf_to_gguf.py takes that folder as it is."
            )
        config, changes = source.text_config, source.linears
        places = places_of(config, {module: change.shape for module, change in changes.items()})
        if options.base_gguf is not None:
            sides = {n: (changes[at[0].module].shape[1], at[0].stop - at[0].start) for n, at in places.items()}
            check_llama_cpp(options.base_gguf, architecture_of(config), sides)
        return []

    def write(self, source: Source, options: Options, folder: Path) -> dict[str, Any]:
        import gguf

        config, changes = source.text_config, source.linears
        dtype = options.dtype or torch.float32
        live = {module: r for module, change in changes.items() if (r := rank(change)) > 0}
        if not live:
            raise RunError(f"{source.folder} changes nothing: all of its differences are zero.")
        places = places_of(config, {module: changes[module].shape for module in live})
        ranks = {name: _power_of_two(max(live[place.module] for place in at)) for name, at in places.items()}
        alpha = min(ranks.values())

        writer = gguf.GGUFWriter(folder / FILE, architecture_of(config))
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        kind = gguf.GGMLQuantizationType[DTYPES[dtype]]
        for name, at in places.items():
            for side, shape in zip("ab", _shapes(at, changes, ranks[name], config), strict=True):
                size = dtype.itemsize * torch.Size(shape).numel()
                writer.add_tensor_info(f"{name}.weight.lora_{side}", shape, None, size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, at in places.items():
            for tensor in _sides(at, changes, ranks[name], ranks[name] / alpha, config):
                writer.write_tensor_data(stored(tensor, dtype))
        writer.close()
        return {"tensors": len(places), "rank": max(ranks.values()), "bytes": (folder / FILE).stat().st_size}

    def verify(self, source: Source, options: Options, folder: Path) -> None:
        config = source.text_config
        found = GgufAdapter(folder / FILE, config)
        if found.architecture != architecture_of(config):
            raise RunError(f"{FILE} is for '{found.architecture}', not for {architecture_of(config)}.")
        changes = source.linears
        for module in sorted(found.pieces.keys() - changes.keys()):
            _check_zero(found, module)
        for module, change in changes.items():
            wanted = change.dense()
            if module not in found.pieces and bool(wanted.any()):
                raise RunError(f"{FILE} lacks {module}. Nothing was kept.")
            allowed = found.rounding(module, change.shape, self.resolution(source, options))
            wrong = ~((found.dense(module, change.shape) - wanted).abs() <= allowed)
            if bool(wrong.any()):
                raise RunError(
                    f"{FILE} is not what was trained: {int(wrong.sum())} of the {wrong.numel()} entries of {module} "
                    "differ beyond rounding. Nothing was kept."
                )

    def load(self, source: Source, options: Options, folder: Path) -> Answering:
        if options.base_gguf is not None:
            return LlamaCpp(options.base_gguf, folder / FILE)
        base = source.base()
        found = GgufAdapter(folder / FILE, base.config)
        add_while_computing(base, found.pieces)
        return HuggingFace(base, "an independent reader of GGUF")

    def resolution(self, source: Source, options: Options) -> float:
        return rounding(source, options.dtype)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _shapes(at: list[Place], changes: Mapping[str, Change], r: int, config: Any) -> list[tuple[int, ...]]:
    """The shapes of lora_a and lora_b of one tensor."""
    place = at[0]
    experts = () if place.expert is None else (experts_of(config),)
    return [(*experts, r, changes[place.module].shape[1]), (*experts, place.stop - place.start, r)]


def _sides(at: list[Place], changes: Mapping[str, Change], r: int, scale: float, config: Any) -> list[Tensor]:
    """lora_a and lora_b of one tensor in fp32, filled up with zeros to rank r; lora_b times `scale`, a power of two."""
    a, b = (torch.zeros(shape) for shape in _shapes(at, changes, r, config))
    for place in at:
        own_b, own_a = factors(changes[place.module])
        count = len(own_a)
        a_part, b_part = (a, b) if place.expert is None else (a[place.expert], b[place.expert])
        a_part[:count] = own_a
        b_part[:, :count] = place.ordered(own_b) * scale
    return [a, b]


def _check_zero(found: GgufAdapter, module: str) -> None:
    """Of a tensor of all experts those that the adapter leaves alone."""
    for _, b, a, _ in found.pieces[module]:
        if bool(b.any()) and bool(a.any()):
            raise RunError(f"{FILE} changes {module}, which was not trained. Nothing was kept.")

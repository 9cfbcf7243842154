"""`mlx`: an adapter folder of mlx-lm: a LoRA's factors, else the touched weights, whole (`fine_tune_type: full`)."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sparseft.errors import RunError, UserError, reason_of
from sparseft.export import mlx_lora
from sparseft.export.changed_tensors import added, base_model
from sparseft.export.expert_parts import Part, parts_of
from sparseft.export.formats.base import Answering, Format, Options, rounding
from sparseft.export.low_rank_forward import add_while_computing
from sparseft.export.mlx_lora import CONFIG, TENSORS
from sparseft.export.proof import HuggingFace
from sparseft.export.source import Source
from sparseft.files.atomic import write_json
from sparseft.files.tensors import Stored, write_streamed
from sparseft.files.untrusted import read_json_object
from sparseft.layers.convert import plain_weight, weight_parameter
from sparseft.models.loading import check_model_path, file_beside

# Architectures whose linears have transformers' names in mlx-lm, but for what `_name` says: by its source.
ARCHITECTURES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi3", "gpt2")


class Mlx(Format):
    """`adapters.safetensors` with each touched weight as the model has it afterwards, in the base's dtype, and
    `adapter_config.json`. mlx-lm replaces weights by it, so nothing is lost by any pattern. Of a LoRA: `mlx_lora`."""

    name = "mlx"
    rounded: ClassVar[bool] = True  # a LoRA attached is added while computing, never rounded

    def check(self, source: Source, options: Options) -> list[str]:
        if source.kind == "full":
            raise UserError(f"{source.folder} is a model trained whole: mlx_lm loads that folder as it is.")
        if options.dtype is not None and source.kind != "peft":
            raise UserError(
                "--dtype: whole weights keep the base's in --format mlx, so that the model has one. Leave it out."
            )
        kind = source.text_config.model_type
        if kind not in ARCHITECTURES:
            raise UserError(
                f"--format mlx: how mlx-lm names the weights of '{kind}' is not known here (known: "
                f"{', '.join(ARCHITECTURES)}); --format merged makes a folder that it loads."
            )
        if source.kind == "peft":
            mlx_lora.check(source)
        return _rope_note(source)

    def write(self, source: Source, options: Options, folder: Path) -> dict[str, Any]:
        config = source.text_config
        if source.kind == "peft":
            return mlx_lora.write(source, options.dtype or torch.float32, folder, _naming(source))
        parts = {
            f"{_name(config.model_type, part.linear)}.weight": (module, part)
            for module, change in source.changes.items()
            for part in parts_of(module, change.shape[0])
        }
        model = source.attached(self.base(source, options))
        values = {name: _weight(model, module, part) for name, (module, part) in parts.items()}  # views
        described = {name: Stored(value.dtype, tuple(value.shape)) for name, value in values.items()}
        write_streamed(folder / TENSORS, described, values.items(), {})
        settings = {"fine_tune_type": "full", "num_layers": config.num_hidden_layers, "model": source.target.model.path}
        write_json(folder / CONFIG, settings)
        return {"tensors": len(values), "bytes": (folder / TENSORS).stat().st_size}

    def verify(self, source: Source, options: Options, folder: Path) -> None:
        """Every weight against base + delta, rounded once; the base is read anew."""
        if source.kind == "peft":
            return mlx_lora.verify(source, options.dtype or torch.float32, folder, _naming(source))
        base = self.base(source, options)
        with torch.no_grad():
            changed = {id(weight_parameter(base, module)) for module in source.changes}
            for module, change in source.changes.items():
                weight, entries = plain_weight(base, module), change.entries()
                values = weight.detach().float().cpu().flatten().clone()
                values[entries] = added(change, entries, values[entries])
                weight.copy_(values.view(weight.shape))
        touched = {name for name, parameter in base.named_parameters() if id(parameter) in changed}
        for name, value in _read(folder, base):
            if name not in touched:
                raise RunError(f"{TENSORS} changes {name}, which was not trained, or holds it twice. Nothing was kept.")
            touched.remove(name)
            if not torch.equal(value, base.get_parameter(name).cpu()):
                raise RunError(f"{TENSORS} is not what was trained: {name} has other values. Nothing was kept.")
        if touched:
            raise RunError(f"{TENSORS} lacks {min(touched)}. Nothing was kept.")

    def base(self, source: Source, options: Options) -> nn.Module:
        """Where whole weights are written, in the checkpoint's dtype, whatever the run's was."""
        return source.base() if source.kind == "peft" else base_model(source)

    def load(self, source: Source, options: Options, folder: Path) -> Answering:
        if importlib.util.find_spec("mlx_lm") is not None:
            return MlxModel(check_model_path(source.target.model.path), folder)
        base = self.base(source, options)
        if source.kind == "peft":
            naming = _naming(source)
            found = mlx_lora.read(folder, {naming(linear): linear for linear in source.low_rank})
            add_while_computing(base, {linear: [difference] for linear, difference in found.items()})
            return HuggingFace(base, "an independent reader of safetensors")
        with torch.no_grad():
            for name, value in _read(folder, base):
                base.get_parameter(name).copy_(value)
        return HuggingFace(base, "an independent reader of safetensors")

    def resolution(self, source: Source, options: Options) -> float:
        return rounding(source, options.dtype)  # whole weights have no dtype of their own


class MlxModel:
    """The base with the adapter, loaded and run by mlx-lm, in fp32."""

    def __init__(self, base: str, adapter: Path) -> None:
        import mlx.core as mx
        import mlx_lm

        try:
            self._model = mlx_lm.load(base, adapter_path=str(adapter))[0]
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise RunError(f"mlx-lm does not load {base} with the adapter: {reason_of(error)}") from error
        self._model.set_dtype(mx.float32)
        self.name = f"mlx-lm {version('mlx-lm')}"

    def logits(self, ids: list[int]) -> Tensor:
        """The fp32 logits (tokens, vocabulary) of one sequence."""
        import mlx.core as mx
        import numpy as np

        return torch.from_numpy(np.array(self._model(mx.array([ids]))[0].astype(mx.float32)))

    def base(self) -> None:
        """mlx-lm loads the same base."""


def _rope_note(source: Source) -> list[str]:
    """mlx-lm's older architectures know `rope_theta` at the top of config.json alone, and else take their default."""
    model = source.target.model
    file = file_beside(model.path, "config.json", model.revision)
    stored = {} if file is None else read_json_object(file, "model", numbers=False)
    theta = (stored.get("rope_parameters") or {}).get("rope_theta")
    if theta is None or "rope_theta" in stored:
        return []
    return [
        f"{file} has rope_theta within rope_parameters alone, where most of mlx-lm's models do not read it: they would "
        f'take another base for the rotary embedding. Add "rope_theta": {theta} to it.'
    ]


def _naming(source: Source) -> mlx_lora.Naming:
    return functools.partial(_name, source.text_config.model_type)


def _name(kind: str, linear: str) -> str:
    """mlx-lm's name of a linear: `experts` are `switch_mlp` there, in Mixtral below `block_sparse_moe`."""
    owner = "block_sparse_moe" if kind == "mixtral" else "mlp"
    linear = linear.replace(".mlp.experts.", f".{owner}.switch_mlp.")
    if kind == "gpt2":
        linear = linear.replace("transformer.", "model.", 1)
    return linear


def _weight(model: nn.Module, module: str, part: Part) -> Tensor:
    """The part as mlx-lm keeps it: (out, in), of experts all of them (experts, out, in)."""
    if part.expert is None:
        return plain_weight(model, module)
    return weight_parameter(model, module).detach()[:, part.start : part.stop]


def _read(folder: Path, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The file's weights by the names and in the shapes of the model's parameters, by rules of its own: a stack of
    experts once both of its halves are there."""
    halves: dict[str, dict[str, Tensor]] = {}
    try:
        settings = read_json_object(folder / CONFIG, "adapter")
        if settings.get("fine_tune_type") != "full":
            raise RunError(f"{CONFIG} says fine_tune_type {settings.get('fine_tune_type')!r}, not 'full'.")
        with safe_open(folder / TENSORS, "pt") as file:
            for name in file.keys():
                value = file.get_tensor(name)
                path, _, leaf = name.removesuffix(".weight").rpartition(".")
                if path.startswith("model.h."):
                    yield f"transformer.h.{path.removeprefix('model.h.')}.{leaf}.weight", value.t()
                elif path.endswith(".switch_mlp"):
                    number = path.split(".")[2]
                    stack = f"model.layers.{number}.mlp.experts"
                    if leaf == "down_proj":
                        yield f"{stack}.down_proj", value
                        continue
                    both = halves.setdefault(stack, {})
                    both[leaf] = value
                    if len(both) == 2:
                        yield f"{stack}.gate_up_proj", torch.cat([both.pop("gate_proj"), both.pop("up_proj")], dim=1)
                else:
                    yield name, value
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise RunError(f"{folder.name} cannot be read: {reason_of(error)}") from error

"""A checkpoint that bitsandbytes or torchao have packed, as the plain one that it stands for.

Nothing is known of what it was packed from. So its linears are the values that their packed weights stand for, by which
the packed model computes; all else is in the files as it is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sparseft.config import ModelConfig
from sparseft.errors import UserError, shown
from sparseft.files.mapped import move_to_file
from sparseft.files.tensors import Stored
from sparseft.models.checkpoint import Checkpoint, Places, saved_tensors, without_weights
from sparseft.models.decoder import base_parameters
from sparseft.models.fingerprint import STANDS_FOR, base_fingerprints
from sparseft.models.loading import load_config, load_model, model_dtype
from sparseft.models.packed.quantized import dequantized, is_packed


@dataclass
class PackedCheckpoint(Checkpoint):
    """base: the checkpoint's folder or hub id, device: where it is unpacked. tensors: those of the plain checkpoint, by
    the names that transformers would save them under; files: of those that are not packed.

    The packed model is loaded at once, and gone with this object.
    """

    base: ModelConfig
    device: torch.device
    room: Path
    linears: dict[str, str]  # by tensor: the packed linear

    @staticmethod
    def of_base(base: ModelConfig, device: torch.device, room: Path) -> PackedCheckpoint:
        """Raises UserError where a packed weight is made of several tensors of a plain checkpoint."""
        found = Checkpoint.of(base)
        plain = without_weights(base, packed=True)
        dtype = model_dtype(base, load_config(base, packed=True))
        saved = saved_tensors(plain)
        places = Places(plain, saved)
        self = PackedCheckpoint(found.folder, {}, {}, base, device, room, {})
        for name in self.model.state_dict():
            module = name.removesuffix(".weight")
            if name == f"{module}.weight" and is_packed(self.model.get_submodule(module)):
                group = places.group_of(name)
                if group.pattern is not None:
                    raise UserError(f"{base.path}: {shown(module)} was packed out of several tensors.")
                self.linears |= dict.fromkeys([*group.names, *group.twins], module)
        for name, each in saved.items():
            if name in self.linears:
                self.tensors[name] = Stored(dtype, each.shape)
            elif name in found.tensors:  # not a head that is tied
                self.tensors[name], self.files[name] = found.tensors[name], found.files[name]
        return self

    @functools.cached_property
    def model(self) -> nn.Module:
        """The packed model."""
        return load_model(self.base, self.device)

    def read(self, name: str) -> Tensor:
        """One tensor of the plain checkpoint, in memory of its own where it was packed."""
        if name not in self.linears:
            return super().read(name)
        values = dequantized(self.model.get_submodule(self.linears[name])).detach()
        return values.to("cpu", self.tensors[name].dtype).contiguous()

    @torch.no_grad()
    def unpacked(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The plain model, in the checkpoint's dtype or in `dtype` where that is wider. It counts as the packed one, so
        that adapters of that fit. On a CPU it lies in files, beside the packed one in memory."""
        from transformers import AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        content = load_config(self.base, packed=True)
        del content.quantization_config
        stored = model_dtype(self.base, content)
        wide = stored if dtype is None else torch.promote_types(stored, dtype)
        trusted = self.base.trust_remote_code
        with no_init_weights():  # pages that are never written take no memory
            plain = AutoModelForCausalLM.from_config(content, dtype=wide, trust_remote_code=trusted).to(self.device)
        plain.tie_weights()
        places = Places(plain, self.tensors)
        for name, parameter in base_parameters(plain):
            if parameter.device.type == "cpu":
                move_to_file(parameter, self.room)
            parameter.copy_(places.parameter(name, self.read))
        own = dict(plain.named_buffers())
        for name, buffer in self.model.named_buffers():
            if name in own and own[name].shape == buffer.shape:
                own[name].copy_(buffer)
        setattr(plain, STANDS_FOR, base_fingerprints(self.model))
        return plain.eval()

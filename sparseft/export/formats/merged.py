"""`merged`: a Hugging Face model folder with the adapter in its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseft.adapters.lifecycle import merge
from sparseft.errors import UserError
from sparseft.export.formats.base import Format, Options
from sparseft.export.proof import HuggingFace
from sparseft.export.source import Source
from sparseft.models.loading import load_model


class Merged(Format):
    """`model.safetensors` (in shards where it is large), config, generation config and tokenizer."""

    name = "merged"
    rounded = True

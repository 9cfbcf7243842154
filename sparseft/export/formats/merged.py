"""`merged`: a Hugging Face model folder with the adapter in its weights."""

from __future__ import annotations

from sparseft.export.formats.base import Format


class Merged(Format):
    """`model.safetensors` (in shards where it is large), config, generation config and tokenizer."""

    name = "merged"
    rounded = True

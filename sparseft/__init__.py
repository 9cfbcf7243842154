"""sparseft fine-tunes large language models by training a small, well-chosen part of their own weights.

Names below are loaded on first use: importing sparseft imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

from sparseft.methods import METHODS

__version__ = "0.1.0"

_EXPORTS = {
    **{name: module for module, _, name in (entry.partition(":") for entry in METHODS.values())},  # S2FTConfig, …
    "Selection": "sparseft.selection.selection",
    "compute_selection": "sparseft.selection.compute",
    "attach": "sparseft.adapters.lifecycle",
    "detach": "sparseft.adapters.lifecycle",
    "merge": "sparseft.adapters.lifecycle",
    "fuse": "sparseft.adapters.lifecycle",
    "load_adapter": "sparseft.adapters.lifecycle",
    "save_adapter": "sparseft.adapters.lifecycle",
    "set_adapter": "sparseft.adapters.lifecycle",
    "trainable_parameters": "sparseft.adapters.lifecycle",
    "reference_model": "sparseft.adapters.reference_model",
    "SparseLinear": "sparseft.layers",
    "S2ColumnLinear": "sparseft.layers",
    "S2RowLinear": "sparseft.layers",
    "BlockSparseLinear": "sparseft.layers",
    "GridLinear": "sparseft.layers",
    "SparseAdamW": "sparseft.training.optimizer",
    "apply_patch": "sparseft.export.patch",
    "PatchSender": "sparseft.export.live.sender",
    "PatchReceiver": "sparseft.export.live.receiver",
    "PatchPeer": "sparseft.export.live.transports",
    "Patch": "sparseft.export.patch",
    "UserError": "sparseft.errors",
    "RunError": "sparseft.errors",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'sparseft' has no attribute '{name}'")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

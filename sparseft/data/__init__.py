"""Training data: files and hub sets -> examples -> tokenised, label-masked batches.

sources.py reads records, formats.py and chat.py turn them into examples, tokenized.py into token ids and labels,
loading.py applies a `DatasetConfig`, collating.py pads and samples. The names below are resolved on first use, so that
`sparseft.data.prompts` can be imported without numpy or torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseft.data.collating import Collator, calibration_batches
    from sparseft.data.formats import Example
    from sparseft.data.loading import LoadedData, load_datasets
    from sparseft.data.tokenized import TokenizedDataset

__all__ = ["Collator", "Example", "LoadedData", "TokenizedDataset", "calibration_batches", "load_datasets"]

_HOME = {
    "Collator": "collating",
    "calibration_batches": "collating",
    "Example": "formats",
    "LoadedData": "loading",
    "load_datasets": "loading",
    "TokenizedDataset": "tokenized",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)

"""Sparse adapters of several methods for tiny models, with random deltas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import sparseft
from sparseft.layers import sparse_layers
from sparseft.selection.selection import Selection
from sparseft.training.reselection.swap import apply_selection
from support import experts
from support.models import build_model

METHODS: dict[str, Callable[[int], Any]] = {
    "s2ft": lambda seed: sparseft.S2FTConfig(sparsity=0.9, importance="random", seed=seed),
    "sylva": lambda seed: sparseft.SylvaConfig(importance="random", block_size=32, seed=seed),
    "paca": lambda seed: sparseft.PacaConfig(rank=3, importance="random", seed=seed),
    "losia": lambda seed: sparseft.LosiaConfig(sparsity=0.9, importance="random", seed=seed),
}


def build(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny `llama`, `gpt2` (Conv1D), `phi3` (fused projections) or `mixtral` (experts in 3-D parameters)."""
    if kind == "mixtral":
        return experts.build(kind, dtype)
    if kind == "phi3":
        config = transformers.Phi3Config(
            vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return experts.build(kind, dtype, config=config)
    return build_model(kind, dtype)


@torch.no_grad()
def randomise(model: Any, seed: int = 0, scale: float = 0.3) -> Any:
    """Random deltas as training leaves them: an edge block's part outside the weight is zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in sparse_layers(model).values():
        for pattern in layer.patterns.values():
            pattern.delta.copy_(torch.randn(pattern.delta.shape, generator=generator) * scale)
            if pattern.kind == "blocks":
                for n, (r, c) in enumerate(pattern.index.tolist()):
                    pattern.delta[n, max(0, layer.out_features - r * pattern.block_size) :] = 0
                    pattern.delta[n, :, max(0, layer.in_features - c * pattern.block_size) :] = 0
    return model


def saved(make: Callable[[], Any], folder: Path, config: Any, seed: int = 0, selection: Any = None) -> Path:
    """An adapter's folder with random deltas, made on a model of its own."""
    model = sparseft.attach(make(), config, selection)
    return sparseft.save_adapter(randomise(model, seed), folder)


def reselected(model: Any, seed: int = 7) -> Any:
    """Attached, with entries that train and others that have trained before and wait (`layers/inactive.py`)."""
    model = randomise(sparseft.attach(model, METHODS["s2ft"](seed)), seed)
    indices = {
        module: {
            kind: _moved(pattern.index, layer.in_features if kind == "columns" else layer.out_features)
            for kind, pattern in layer.patterns.items()
        }
        for module, layer in sparse_layers(model).items()
        if layer.patterns
    }
    apply_selection(model, Selection(indices))
    randomise(model, seed + 1)
    layers = sparse_layers(model).values()
    assert any(pattern.inactive is not None for layer in layers for pattern in layer.patterns.values())
    return model


def _moved(index: Tensor, features: int) -> Tensor:
    """As many other indices, some of which stay."""
    rest = [one for one in range(features) if one not in index.tolist()]
    count = min(len(rest), (len(index) + 1) // 2)
    return torch.cat([torch.tensor(rest[:count], dtype=torch.int64), index[count:].cpu()])

"""What is measured: the run's model, or a Llama of some shape with random weights, without download; random tokens."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from sparseft.bench.output import device_name
from sparseft.config import RunConfig
from sparseft.data.tokenized import IGNORED
from sparseft.errors import UserError, nearest
from sparseft.models.decoder import context_length
from sparseft.models.loading import load_model, resolve_device
from sparseft.models.published import SHAPES

CONTEXT = 8192  # of the random models that are no published shape
DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def random_model(shape: dict[str, Any], dtype: torch.dtype, seed: int, device: torch.device | str = "cpu") -> nn.Module:
    """A Llama of `shape` (fields of its config) with random weights, made on `device`."""
    torch.manual_seed(seed)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shape), dtype=dtype)


def random_llama(width: int, depth: int, dtype: torch.dtype, seed: int) -> nn.Module:
    """A Llama of `width` × `depth` with random weights, heads of 64 and a vocabulary of 2,048."""
    return random_model(square_shape(width, depth), dtype, seed)


def square_shape(width: int, depth: int) -> dict[str, Any]:
    """The shape of a `width` × `depth` Llama, with heads of 64, an MLP of 8/3 the width and a vocabulary of 2,048."""
    if width < 64 or width % 64:
        raise UserError(f"bench.width={width}: expected a multiple of 64, as the heads are 64 wide.")
    if depth < 1:
        raise UserError(f"bench.depth={depth}: expected at least 1 layer.")
    return {
        "hidden_size": width,
        "intermediate_size": -(-width * 8 // 3 // 64) * 64,
        "num_hidden_layers": depth,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "vocab_size": 2048,
        "max_position_embeddings": CONTEXT,
    }


def base_model(config: RunConfig, device: torch.device) -> nn.Module:
    """The run's model, or the random Llama of `bench.shape`, or of `bench.width` and `bench.depth`; of the vocabulary
    `bench.vocabulary`, where that is given."""
    model = _base_model(config, device)
    if config.bench.vocabulary is not None:
        torch.manual_seed(config.seed)
        model.resize_token_embeddings(config.bench.vocabulary, mean_resizing=False)  # type: ignore[operator]
    return model


def _base_model(config: RunConfig, device: torch.device) -> nn.Module:
    bench = config.bench
    if (bench.width is None) != (bench.depth is None):
        raise UserError("bench.width and bench.depth make a random Llama together: give both or none.")
    if bench.shape is not None:
        if bench.shape not in SHAPES:
            raise UserError(f"bench.shape={bench.shape}: unknown.{nearest(bench.shape, SHAPES)}")
        if bench.width is not None:
            raise UserError(f"bench.shape={bench.shape} and bench.width={bench.width} exclude each other.")
        return random_model(SHAPES[bench.shape], DTYPES[config.model.dtype], config.seed, device)
    if bench.width is not None and bench.depth is not None:
        return random_llama(bench.width, bench.depth, DTYPES[config.model.dtype], config.seed).to(device)
    transformers.logging.disable_progress_bar()
    if config.model.quantize != "none":
        raise UserError(
            f"model.quantize={config.model.quantize}: benchmarks measure plain weights; use model.quantize=none."
        )
    return load_model(config.model, device)


def random_tokens(model: nn.Module, rows: int, length: int, seed: int, device: torch.device) -> Tensor:
    """Token ids (rows, length), int64, drawn from the model's vocabulary."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (rows, length), generator=generator).to(device)


def model_name(config: RunConfig) -> str:
    """What was measured: a path, or a random model's shape."""
    if config.bench.shape is not None:
        return f"{config.bench.shape}, random weights"
    return config.model.path if config.bench.width is None else f"llama {config.bench.width}x{config.bench.depth}"


def check_length(config: RunConfig, model: nn.Module) -> None:
    """Refuses a `bench.length` that the model cannot take."""
    length = config.bench.length
    if length < 2:
        raise UserError(f"bench.length={length}: expected at least 2 tokens, as the first predicts the second.")
    limit = context_length(model.config)
    if limit and length > limit:
        raise UserError(f"bench.length={length}: the model's context is {limit} tokens.")


def measured_model(config: RunConfig) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """What a benchmark of steps begins with: the model on its device, a batch of random tokens, and what the result
    says of both."""
    settings = config.bench
    device = resolve_device(config.hardware.device)
    model = base_model(config, device)
    check_length(config, model)
    ids = random_tokens(model, settings.batch_size, settings.length, config.seed, device)
    facts = {
        "model": model_name(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(device),
        "batch_size": settings.batch_size,
        "length": settings.length,
        "labelled": settings.labelled,
        "steps": settings.steps,
    }
    labels = ids.clone()
    labels[:, : min(settings.length - 1, round((1 - settings.labelled) * settings.length))] = IGNORED
    return model, {"input_ids": ids, "labels": labels}, facts

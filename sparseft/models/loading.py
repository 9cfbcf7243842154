"""Loads a Hugging Face causal LM, its tokenizer and its config: from a folder, the hub or the bundle."""

from __future__ import annotations

import contextlib
import gc
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseft import console
from sparseft.config import BUNDLED, BUNDLED_ROOT, HardwareConfig, ModelConfig, in_bundle
from sparseft.distributed import fsdp
from sparseft.distributed.deepspeed import no_shared_memory, own_dtypes, zero_config
from sparseft.distributed.ranks import broadcast_object
from sparseft.distributed.shards import full_shape
from sparseft.errors import HUB_ID, UserError, looks_local, nearest, nearest_path, reason_of, where_looked
from sparseft.files.hashing import check_whole
from sparseft.files.tensors import stored_tensors
from sparseft.models.decoder import decoder_layers, input_embeddings, runnable
from sparseft.models.gguf import is_gguf, unpacked
from sparseft.models.load_report import check_complete, tell_unplaced, without_report
from sparseft.models.packed.quantize import check_packed, check_quantize, quantization
from sparseft.models.packed.quantized import check_config, keep_differentiable, keep_savable, quantized_by
from sparseft.models.probing import check_causal
from sparseft.rules import check_fields

QUANTIZED_FROM = "_sparseft_quantized_from"  # the attribute of a model that `model.quantize` packed: its config


def _unbundled(path: str) -> str:
    """`bundled:tiny` -> the folder inside the package; any other path as it is."""
    if not path.startswith(BUNDLED):
        return path
    folder = in_bundle(path)
    if folder is None:
        known = [entry.name for entry in BUNDLED_ROOT.iterdir() if entry.is_dir()]
        raise UserError(
            f"model.path={path}: nothing of that name is bundled.{nearest(path.removeprefix(BUNDLED), known)}"
        )
    return str(folder)


GENERATION = "generation_config.json"


def check_model_path(path: str) -> str:
    """The folder or hub id to load; a path that looks local and is not there is a `UserError`.

    Of a GGUF file the folder into which it is unpacked, here, where it was not yet. A folder `models/x` becomes
    `./models/x`: adapters keep the name of their base, and elsewhere it would be a hub id.
    """
    resolved = _unbundled(path)
    folder = Path(resolved).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            files = sorted(entry.name for entry in folder.iterdir() if is_gguf(entry.name))
            hint = f" Of its GGUF files one can be named: model.path={folder / files[0]}" if files else ""
            raise UserError(f"model.path={path}: the folder has no config.json, so it is no Hugging Face model.{hint}")
        return f"./{folder}" if HUB_ID.fullmatch(str(folder)) else str(folder)
    if folder.is_file() and is_gguf(resolved):
        return str(unpacked(folder, path))
    if folder.exists():
        raise UserError(
            f"model.path={path}: expected a Hugging Face model folder or a GGUF file, this is a file of another kind."
        )
    if looks_local(resolved) and not _in_hub_cache(resolved):
        here = folder.parent
        hub = f" '{here}' is a folder here, so this is not looked up on the hub." if HUB_ID.fullmatch(path) else ""
        kind = "file" if is_gguf(resolved) else "folder"
        raise UserError(f"model.path={path}: no such {kind}{where_looked(resolved)}.{nearest_path(folder)}{hub}")
    return resolved


def _in_hub_cache(path: str) -> bool:
    """Whether a path such as `Qwen/Qwen3-8B`, in a folder that has a `Qwen`, is a model that the hub's cache holds."""
    from huggingface_hub import try_to_load_from_cache

    return bool(HUB_ID.fullmatch(path)) and isinstance(try_to_load_from_cache(path, "config.json"), str)


def resolve_device(device: str) -> torch.device:
    """`auto` -> cuda where there is one, else cpu; `cuda` without one is a `UserError`."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("hardware.device=cuda: torch finds no CUDA device here; use hardware.device=auto or cpu.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _load(what: str, path: str, loader, **options):
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    content = (AttributeError, KeyError, TypeError, ValueError)  # raised for a malformed config.json
    try:
        alone = what == "tokenizer" and has_tokenizer(Path(path).expanduser())  # which needs no model beside it
        return loader(str(Path(path).expanduser()) if alone else check_model_path(path), **options)
    except BaseException as error:
        known = isinstance(error, (OSError, RuntimeError, SafetensorError, StrictDataclassError, *content))
        panic = type(error).__name__ == "PanicException"  # of tokenizers, which is in Rust; it is no `Exception`
        if isinstance(error, UserError) or not (known or panic):
            raise
        gone = isinstance(error, OSError) and not Path(_unbundled(path)).expanduser().exists()
        here = f"no such folder{where_looked(path)}, and " if gone else ""
        raise UserError(f"model.path={path}: {here}the {what} could not be loaded: {reason_of(error)}") from error


def load_model(config: ModelConfig, device: torch.device | str = "cpu", *, in_shards: bool = False) -> nn.Module:
    """The model on `device`, in evaluation mode, in the dtype asked for (`auto`: as stored); of one on another device
    than the CPU the host never holds more than a few tensors.

    A checkpoint that lacks a weight is a `UserError`: a random one in its place would be trained and never noticed. So
    is one that full fine-tuning wrote and that was altered since, one that is quantised, and a model that is not
    causal, which is tried.

    in_shards: sharded by FSDP2, which all processes call together.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled

    gc.collect()  # a model refers to itself: one that is done with stays beside the next until it is collected
    check_whole(Path(config.path).expanduser())  # before transformers reads anything of it
    content = load_config(config, "model", packed=True)  # refuses what cannot be trained, before any weight
    check_fields(config, lambda name: f"model.{name}")
    check_quantize(config, content, device)
    options: dict[str, object] = {"dtype": config.dtype, "trust_remote_code": config.trust_remote_code}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    if config.revision:
        options["revision"] = config.revision
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # said below, in a sentence
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        # Weights are read in threads, of which each has the first device as its current one, whatever this one's is.
        device = torch.device("cuda", torch.cuda.current_device())
    together = in_shards or is_deepspeed_zero3_enabled()
    if device.type != "cpu" and not together:
        # Tensor by tensor from the files: the host need not hold the model, which may be larger than its memory.
        options["device_map"] = {"": device}
    if quantized_by(content) is not None:
        options["device_map"] = {"": device}
    if config.quantize != "none":
        dtype = model_dtype(config, content)
        options |= {"quantization_config": quantization(config, dtype), "device_map": {"": device}}
    refused = None
    try:
        first = fsdp.read_by_first() if in_shards else contextlib.nullcontext()
        with without_report(), console.working(f"loading {config.path}"), first:
            model, report = _load("model", config.path, AutoModelForCausalLM.from_pretrained, **options)
        check_complete(config.path, report)
    except UserError as error:
        refused = error
    if together:  # the first process alone reads the files: all refuse what it did, or go on
        told = broadcast_object(None if refused is None else str(refused))
        refused = refused or (UserError(told) if told else None)
    if refused is not None:
        raise refused
    tell_unplaced(config.path, report)
    if in_shards:
        fsdp.shard(model, decoder_layers(model)[1], input_embeddings(model), device)
    elif getattr(model, "hf_quantizer", None) is None:  # some quantized models refuse to be moved
        model = model.to(device)
    if config.quantize != "none":
        setattr(model, QUANTIZED_FROM, config)
    if quantized_by(content) is not None:
        keep_savable(model)
    check_packed(model, config)
    for module in model.modules():
        keep_differentiable(module)
    model = model.eval()
    with runnable(model):
        check_causal(model, f"model.path={config.path}")
    return model


def load_in_shards(config: ModelConfig, hardware: HardwareConfig, device: torch.device) -> tuple[nn.Module, Any]:
    """`load_model`, in shards where ZeRO-3 or FSDP2 is asked for (then a call of all processes): no process ever holds
    more of it on its device than its shard and one gathered module, with FSDP2 one decoder layer or the embeddings.

    With ZeRO-3 transformers does it where it finds a DeepSpeed configuration of stage 3: it builds the model under
    `deepspeed.zero.Init`, which shards each module as soon as it is made, and rank 0 hands on the checkpoint's tensors,
    mapped from the files, one module after another. Not with offload to a disk: what offloads there holds tensors of
    one dtype only.

    Returns the model and what has to live as long as it does: transformers' settings of ZeRO-3, None without it.
    Weights, dtypes and buffers are those of a model that was loaded whole.
    """
    if hardware.fsdp:
        return load_model(config, device, in_shards=True), None
    if hardware.zero_stage != 3 or hardware.offload == "nvme":
        return load_model(config, device), None
    from transformers.integrations import HfDeepSpeedConfig

    if hardware.device == "cpu":
        no_shared_memory()
    stored = model_dtype(config, load_config(config))
    kind = {"bfloat16": "bf16", "float16": "fp16"}.get(str(stored).removeprefix("torch."))
    settings = {key: value for key, value in zero_config(hardware).items() if value != "auto"}
    settings |= {"train_micro_batch_size_per_gpu": 1}  # required by DeepSpeed, unused here
    alive = HfDeepSpeedConfig(settings | ({kind: {"enabled": True}} if kind else {}))
    with own_dtypes():
        model = load_model(config, device)
    check_precision(config, model)
    return model, alive


def check_precision(config: ModelConfig, model: nn.Module) -> None:
    """Refuses a model of which a part should be fp32 and is not: in shards all weights are loaded in one dtype."""
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    kept = [*strict, *((getattr(model, "_keep_in_fp32_modules", None) or ()) if model.dtype == torch.float16 else ())]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.dtype in (torch.float16, torch.bfloat16) and any(re.search(rf"\b{part}\b", name) for part in kept):
            raise UserError(
                f"hardware.zero_stage=3: {type(model).__name__} keeps '{name}' in float32, which loading in shards "
                f"cannot; use hardware.zero_stage=2 or less, or model.dtype=float32 (now {config.dtype})."
            )


def load_config(config: ModelConfig, what: str = "config", *, packed: bool = False):
    """The model's config.json, as transformers reads it; no weights. That of quantised ones is a `UserError`, and
    that of a model of another kind (T5, images). `what` is said not to be loaded where there is none; `packed`: those
    beside whose weights can be trained are let through."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"revision": config.revision} if config.revision else {}
    content = _load(
        what, config.path, AutoConfig.from_pretrained, trust_remote_code=config.trust_remote_code, **options
    )
    check_config(content, f"model.path={config.path}", packed=packed)
    if type(content) not in AutoModelForCausalLM._model_mapping and not hasattr(content, "auto_map"):
        raise UserError(
            f"model.path={config.path}: transformers has no causal language model of the type '{content.model_type}'; "
            "use one that predicts the next token of a text."
        )
    return content


def type_written(content: Any) -> str | None:
    """The model type that a whole model of this config.json is saved with, where transformers does not load that as a
    causal language model: of Mllama the text part is loaded alone, and saved as what it is. None of any other."""
    from transformers import AutoModelForCausalLM

    known = AutoModelForCausalLM._model_mapping
    own = known[type(content)].config_class if type(content) in known else None
    return None if own is None or own in known else own.model_type


def model_dtype(config: ModelConfig, content: Any) -> torch.dtype:
    """As the model is loaded: what the config asks for, else what the checkpoint's config.json says of the model or of
    its text part, else what its first file holds, else float32."""
    asked = config.dtype if config.dtype != "auto" else None
    said = getattr(content, "dtype", None) or getattr(content.get_text_config(), "dtype", None)
    stored = asked or said or _dtype_of_file(config) or torch.float32
    return stored if isinstance(stored, torch.dtype) else getattr(torch, stored)


def _dtype_of_file(config: ModelConfig) -> torch.dtype | None:
    """The first floating dtype in a folder's checkpoint, of 16 bits or more; None of one that is not in safetensors or
    that only the hub has."""
    file = next(iter(sorted(Path(check_model_path(config.path)).glob("model*.safetensors"))), None)
    found = (tensor.dtype for tensor in stored_tensors(file, "model").values()) if file is not None else ()
    return next((dtype for dtype in found if dtype.is_floating_point and dtype.itemsize > 1), None)


def vocabulary_rows(model: nn.Module) -> tuple[int, int]:
    """How many tokens a model can read and how many it can predict: the rows of its embeddings and of its head."""
    named: int = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    tables = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    weights = [getattr(table, "weight", None) for table in tables]
    rows, logits = (named if weight is None else int(full_shape(weight)[0]) for weight in weights)
    return rows, logits


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in a folder, of a model or of anything else."""
    return (folder / "tokenizer_config.json").is_file()


def load_tokenizer(config: ModelConfig):
    """The tokenizer (`model.tokenizer`, else the model's own)."""
    from transformers import AutoTokenizer

    path = config.tokenizer or config.path
    # Of another repository than the model's it would name a commit that is not there, or another one.
    revision = config.revision if path == config.path else None
    options = {"revision": revision} if revision else {}
    tokenizer = _load(
        "tokenizer", path, AutoTokenizer.from_pretrained, trust_remote_code=config.trust_remote_code, **options
    )
    tokenizer.generation_config_file = file_beside(path, GENERATION, revision)  # for `data/encoding.py`
    return tokenizer


def file_beside(path: str, name: str, revision: str | None) -> str | None:
    """Where a file beside a model or a tokenizer lies, of one of the hub in its cache; None where it has none."""
    from transformers.utils.hub import cached_file

    folder = Path(path).expanduser()
    place = folder if folder.is_dir() else Path(check_model_path(path))
    if place.is_dir():
        return str(place / name) if (place / name).is_file() else None
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(str(place), name, revision=revision, **missing)

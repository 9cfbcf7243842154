"""A GGUF file as a base: unpacked once, by transformers, into an ordinary model folder that is kept.

transformers 5.23 keeps weights in GGUF's blocks for three architectures (Qwen3.5 with and without experts, LFM2), for
inference, where a kernel of the hub is published for the device; there is none for CPUs, and all others it unpacks. So
what is trained on is the unpacked values, and `model.quantize` may pack those.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import math
import re
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparseft import console
from sparseft.errors import UserError, reason_of
from sparseft.files.atomic import replaced_folder
from sparseft.models.load_report import check_complete, without_report

SUFFIX = ".gguf"
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What reading a file that is damaged or of an unknown kind raises, in transformers and in the package gguf.
BROKEN = (ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError, OSError, struct.error)


def is_gguf(path: str) -> bool:
    """Whether `model.path` names a GGUF file."""
    return Path(path).suffix.lower() == SUFFIX


def unpacked(file: Path, path: str) -> Path:
    """The folder that holds a GGUF file's model, config and tokenizer, made where it is not there yet.

    path: how the user named the file. Values are in bf16, or in the file's own dtype where none is in blocks. Raises
    `UserError` for what cannot be read, or would be another model without a word.
    """
    from huggingface_hub import constants

    about = file.stat()
    known = f"{file.resolve()} {about.st_size} {about.st_mtime_ns}"
    name = f"{file.stem}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
    folder = Path(constants.HF_HOME) / "sparseft" / "gguf" / name
    if not folder.is_dir():
        with _alone(folder):  # several processes of a run come here at once
            if not folder.is_dir():
                _unpack(file, f"model.path={path}", folder)
    return folder


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside, no other process is; what has waited has to look again."""
    from huggingface_hub.utils import WeakFileLock

    try:
        locks = folder.parent.with_name("locks")
        locks.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}.") from error
    with WeakFileLock(locks / f"{folder.name}.lock"):
        yield


def _unpack(file: Path, what: str, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{what}: reading it needs the package gguf: pip install 'sparseft[quantized]'.")
    try:
        dtype, has_tokenizer, sizes = _read_header(file, what)
    except BROKEN as error:
        raise _refusal(what, error) from error
    kind = str(dtype).removeprefix("torch.")
    console.log(f"{what}: unpacking it to {kind}, once: what comes of it is kept in {folder}")
    try:
        with _without_neighbours(file) as alone:
            model, tokenizer = _loaded(alone, what, dtype, has_tokenizer)
    except BROKEN as error:
        raise _refusal(what, error) from error
    _check_all_read(what, sizes, model)
    with without_report(), replaced_folder(folder, ["config.json"], ["*"]) as aside:
        model.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)


@contextlib.contextmanager
def _without_neighbours(file: Path) -> Iterator[Path]:
    """The file in a folder where nothing else lies: transformers would read the tokenizer's files and templates beside
    it, and rather a file of its name in the working directory than itself."""
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / file.name
        alone.symlink_to(file.resolve())
        yield alone


def _read_header(file: Path, what: str) -> tuple[torch.dtype, bool, dict[str, int]]:
    """The dtype to unpack a file to, whether it has a tokenizer, and by tensor how many values it holds.
    UserError where something that transformers does not read changes what the model computes."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items() if re.search("rope.scal|^split", name)}
    if (parts := fields.get("split.count", 1)) > 1:
        raise UserError(
            f"{what}: this is one of {parts} parts of a model; put them together first: llama-gguf-split --merge."
        )
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    scaled = [name for name, value in fields.items() if name.endswith("rope.scaling.type") and value != "none"]
    if not any(name.endswith("rope.scaling.type") for name in fields):  # then llama.cpp scales by a factor alone, too
        factors = ("rope.scaling.factor", "rope.scale_linear")
        scaled = [name for name, value in fields.items() if name.endswith(factors) and value not in (0, 1)]
    scaled += [tensor.name for tensor in reader.tensors if re.match("rope_(freqs|factors)", tensor.name)]
    if scaled:
        raise UserError(
            f"{what}: {scaled[0]} scales its positions, which transformers does not read of GGUF files; use the "
            "model's checkpoint in safetensors."
        )
    dtype = next((PLAIN[kind] for kind in ("BF16", "F16", "F32") if kind in kinds), torch.float32)
    model = reader.fields.get("tokenizer.ggml.model")
    has_tokenizer = model is not None and bytes(model.parts[-1]) not in (b"none", b"no_vocab")
    sizes = {tensor.name: math.prod(tensor.shape.tolist()) for tensor in reader.tensors}
    return (dtype if kinds <= PLAIN.keys() else torch.bfloat16), has_tokenizer, sizes


def _check_all_read(what: str, sizes: dict[str, int], model: Any) -> None:
    """UserError where a file holds more than has become of it: transformers leaves out a tensor for which its model has
    no place, biases of a Llama say."""
    if model.config.get_text_config().tie_word_embeddings:
        sizes = {name: size for name, size in sizes.items() if name != "output.weight"}  # the embeddings once more
    count = sum(sizes.values())
    read = sum({id(each): each.numel() for each in model.state_dict(keep_vars=True).values()}.values())
    if read < count:
        raise UserError(
            f"{what}: of its {count:,} values transformers reads {read:,}, which makes another model; use the model's "
            "checkpoint in safetensors."
        )


def _loaded(file: Path, what: str, dtype: torch.dtype, has_tokenizer: bool) -> tuple[Any, Any]:
    """The model, of plain weights, and the tokenizer."""
    import transformers

    place: dict[str, Any] = {"gguf_file": str(file)}
    unpack: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # versions before it unpack always
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with without_report():
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            str(file.parent), dtype=dtype, output_loading_info=True, **place, **unpack
        )
        check_complete(what.removeprefix("model.path="), report)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), **place) if has_tokenizer else None
    model.config.__dict__.pop("quantization_config", None)  # its weights are plain now
    model.hf_quantizer = None
    return model, tokenizer


def _refusal(what: str, error: BaseException) -> UserError:
    if isinstance(error, UserError):
        return error
    return UserError(f"{what}: no GGUF file that transformers can read: {reason_of(error)}")

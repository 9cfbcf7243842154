"""llama.cpp itself, as `llama-cpp-python` runs it, on a GGUF of the base model."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from sparseft.errors import RunError, UserError, reason_of

CONTEXT = 256  # tokens


def check_llama_cpp(base: str, architecture: str, shapes: dict[str, tuple[int, int]]) -> None:
    """A `UserError` where `llama-cpp-python` or the base's file is missing, or the file is of another model.

    shapes: of the tensors that the adapter changes, (in, out). llama-cpp-python crashes on one that does not fit.
    """
    import gguf

    if importlib.util.find_spec("llama_cpp") is None:
        raise UserError("--base-gguf needs the package that runs it: pip install llama-cpp-python.")
    path = Path(base).expanduser()
    if not path.is_file() or path.open("rb").read(4) != b"GGUF":
        raise UserError(f"--base-gguf {base}: expected a GGUF file of the base model.")
    try:
        file = gguf.GGUFReader(path)
        found = file.fields["general.architecture"].contents()
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"--base-gguf {base}: truncated or damaged ({reason_of(error)}).") from error
    if found != architecture:
        raise UserError(f"--base-gguf {base}: a model of '{found}', where the base is one of '{architecture}'.")
    known = {tensor.name: tuple(map(int, tensor.shape[:2])) for tensor in file.tensors}
    for name, shape in shapes.items():
        there = known.get(f"{name}.weight", "not")
        if there != shape:
            raise UserError(f"--base-gguf {base}: {name}.weight is {there} there and {shape} in the base.")


class LlamaCpp:
    """The base's GGUF with an adapter (None: without), on the CPU; keys and values in fp32."""

    def __init__(self, base: str, adapter: Path | None) -> None:
        from llama_cpp import GGML_TYPE_F32, Llama

        self.name = f"llama-cpp-python {version('llama-cpp-python')}"
        self._base = str(Path(base).expanduser())
        options = {"n_ctx": CONTEXT, "logits_all": True, "verbose": False, "flash_attn": False, "n_gpu_layers": 0}
        options |= dict.fromkeys(("n_threads", "n_threads_batch"), torch.get_num_threads())  # it spins on cores in use
        try:
            self._model = Llama(
                self._base,
                lora_path=None if adapter is None else str(adapter),
                type_k=GGML_TYPE_F32,
                type_v=GGML_TYPE_F32,
                **options,
            )
        except (RuntimeError, ValueError) as error:
            raise RunError(f"llama.cpp refuses {self._base} with the adapter: {error}") from error

    def logits(self, ids: list[int]) -> Tensor:
        """The fp32 logits (tokens, vocabulary) of one sequence."""
        self._model.reset()
        return self.more(ids)

    def more(self, ids: list[int]) -> Tensor:
        """The same of tokens that go on behind those asked before."""
        start = self._model.n_tokens
        self._model.eval(ids)
        return torch.tensor(self._model.scores[start : start + len(ids)])

    def base(self) -> LlamaCpp:
        """The same file without the adapter: it may be quantized, so not be the base to the bit."""
        return LlamaCpp(self._base, None)

"""The proof of an export: what was written, loaded as its users load it, answers as the attached model does.

Both compute in fp32 whatever they are stored in, so that rounding hides no fault: a module at a time is widened for its
own forward pass. A format of weights is held against the attached model's weights as they are, one of differences
against base + delta before it is rounded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseft import console
from sparseft.config import ModelConfig
from sparseft.errors import RunError
from sparseft.export.formats.base import Answering, Format, Options
from sparseft.export.source import Source
from sparseft.layers import sparse_layers
from sparseft.models.decoder import context_length, decoder_layers
from sparseft.models.loading import load_tokenizer
from sparseft.models.packed.quantized import is_plain

NOISE = 1e-4  # of the largest logit: what fp32 sums in another order may differ by
ROUNDINGS = 4  # how many times a format's rounding of differences may show in what they change
OWN_BASE = 2  # how many times the same goes for what a loader's own base, which may be quantized, differs by

PROMPTS = (
    "The capital of France is",
    "Question: If a train travels 60 miles in 1.5 hours, what is its average speed? Answer:",
    "Below is an instruction that describes a task. Write a response that completes the request.\n\n### Instruction:\n"
    "Name three primary colours.\n\n### Response:\n",
    "Once upon a time, there was a little girl who",
    "def fibonacci(n):",
    "The opposite of hot is",
    "Please answer with true or false. Is the sun a star?",
    "List the first five prime numbers:",
)
LENGTH = 48  # tokens of a prompt at most
ANSWER = 8  # tokens of an answer


@dataclass
class HuggingFace:
    """A Hugging Face model that computes in fp32; `unrounded`: with base + delta as they are before rounding."""

    model: nn.Module
    name: str
    unrounded: bool = False

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        device = next(self.model.parameters()).device
        with in_float32(self.model, unrounded=self.unrounded):
            return self.model(torch.tensor([ids], device=device), use_cache=False).logits[0].float().cpu()

    def base(self) -> None:
        """It runs on the base that the adapter was trained on."""


def prove(source: Source, format: Format, options: Options, folder: Path) -> dict[str, Any]:
    """Compares the export in `folder` with the attached model on a few prompts, with one model in memory at a time.

    Returns `loader`, `prompts`, `largest_difference` (of any logit), `allowed`, `largest_change` (of the attached
    model to the base) and `same_answers` (prompts answered alike, greedily). RunError where they differ beyond
    rounding, and where the export is the base.
    """
    if format.whole:
        _check_tokenizer(source, folder)
    base = format.base(source, options)
    prompts = prompts_of(source, context_length(base.config) or LENGTH + ANSWER)
    with console.Progress(len(prompts) * (2 + ANSWER), "prove", unit="text") as progress:
        plain = list(_asked(HuggingFace(base, "base"), prompts, progress))
        attached = HuggingFace(format.attached(source, options, base), "attached", unrounded=not format.rounded)
        wanted, answered = zip(*(_greedy(attached, ids, progress) for ids in prompts), strict=True)
        del base, attached
        with console.working("loading what was written"):
            written = format.load(source, options, folder)
        found = list(_asked(written, answered, progress))
    own_base = written.base()
    own = plain
    if own_base is not None:
        with console.working(f"prove: the base of {written.name}"):
            own = [own_base.logits(ids) for ids in prompts]
    change, difference, largest = (
        distance(wanted, plain),
        distance(found, wanted),
        max(float(w.abs().max()) for w in wanted),
    )
    allowed = (
        NOISE * largest + ROUNDINGS * format.resolution(source, options) * change + OWN_BASE * distance(own, plain)
    )
    report = {
        "loader": written.name,
        "prompts": len(prompts),
        "largest_difference": difference,
        "allowed": allowed,
        "largest_change": change,
        "same_answers": sum(torch.equal(_likeliest(a), _likeliest(b)) for a, b in zip(found, wanted, strict=True)),
    }
    if not difference <= allowed:  # NaN too
        raise RunError(
            f"the export is not what was trained: loaded by {written.name}, its logits differ from the attached "
            f"model's by up to {difference:.3g}, where rounding explains {allowed:.2g}. Nothing was kept."
        )
    # Longer texts are other sums: where nothing but these may differ, the prompts alone are asked, as the base was.
    close = distance(found, own) <= NOISE * largest
    if close and distance([written.logits(ids) for ids in prompts], own) == 0:
        raise RunError(
            f"the export is the base model: loaded by {written.name}, all logits are the base's"
            + (", as are the attached model's: the adapter changes nothing. " if change <= NOISE * largest else ". ")
            + "Nothing was kept."
        )
    return report


def _check_tokenizer(source: Source, folder: Path) -> None:
    """RunError where the folder's tokenizer, loaded as its users load it, is another than the source's."""
    trusted = source.target.model.trust_remote_code
    written = load_tokenizer(ModelConfig(path=str(folder), trust_remote_code=trusted))
    wanted, found = (_facts(tokenizer) for tokenizer in (source.tokenizer, written))
    if wrong := [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]:
        raise RunError(
            f"the export's tokenizer is not the one it was trained with: {min(wrong)} differs. Nothing was kept."
        )


def _facts(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer makes of texts and conversations, by which it is known."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    texts = {f"'{text}'": tokenizer(text)["input_ids"] for text in PROMPTS}
    return {**special, **texts, "chat_template": tokenizer.chat_template}


def _asked(model: Answering, texts: Iterable[list[int]], progress: console.Progress) -> Iterator[Tensor]:
    """Of each text the logits (tokens, vocabulary)."""
    for ids in texts:
        yield model.logits(ids)
        progress.update(progress.completed + 1)


def _greedy(model: Answering, ids: list[int], progress: console.Progress) -> tuple[Tensor, list[int]]:
    """Of the prompt and `ANSWER` tokens, each the likeliest, all but the last: logits and tokens.

    Another model answers the same exactly when at each token of this text the same one is its likeliest: one pass.
    """
    text = list(ids)
    while True:
        (logits,) = _asked(model, [text], progress)
        if len(text) == len(ids) + ANSWER - 1:
            return logits, text
        text.append(int(logits[-1].argmax()))


def _likeliest(logits: Tensor) -> Tensor:
    """The tokens of the answer that a text's logits end in."""
    return logits[-ANSWER:].argmax(dim=1)


def prompts_of(source: Source, context: int) -> list[list[int]]:
    """The prompts as tokens of the source's tokenizer, cut so that an answer fits into the context."""
    length = min(LENGTH, context - ANSWER)
    return [ids for text in PROMPTS if (ids := source.tokenizer(text)["input_ids"][:length])]


def distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference of any logit, over the tokens that both have; NaN where one is not a number."""
    size = min(a.shape[1] for a in (*found, *wanted))  # some loaders leave out what pads a vocabulary
    pairs = [(a, b, min(len(a), len(b))) for a, b in zip(found, wanted, strict=True)]
    worst = [(a[:length, :size] - b[:length, :size]).abs().max() for a, b, length in pairs]
    return float(torch.stack(worst).max())


@contextlib.contextmanager
def in_float32(model: nn.Module, *, unrounded: bool) -> Iterator[None]:
    """Inside, the model computes in fp32: a decoder layer, or a module outside them, is widened for its own forward.

    unrounded: sparse layers then hold base + delta in fp32.
    """
    layers = list(decoder_layers(model)[1])
    inside = {id(module) for layer in layers for module in layer.modules()}
    outside = [m for m in model.modules() if id(m) not in inside and any(p is not None for p in m._parameters.values())]
    kept: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}

    def widen(module: nn.Module, *_: Any) -> None:
        narrow = [p for p in module.parameters() if is_plain(p) and p.dtype in (torch.float16, torch.bfloat16)]
        kept[id(module)] = [(p, p.data) for p in narrow]
        for p in narrow:
            p.data = p.data.float()
        if unrounded and narrow:
            for layer in sparse_layers(module).values():
                layer.write_back()

    def restore(module: nn.Module, *_: Any) -> None:
        for parameter, data in kept.pop(id(module), ()):
            parameter.data = data

    hooks = [m.register_forward_pre_hook(widen) for m in (*layers, *outside)]
    hooks += [m.register_forward_hook(restore, always_call=True) for m in (*layers, *outside)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

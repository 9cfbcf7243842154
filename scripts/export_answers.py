"""The answers of exports beside those of the attached model: docs/benchmarks/export.md.

    python scripts/export_answers.py RUN EXPORT … [--base-gguf FILE …] [--f32 FILE] [--mlx-base DIR]

RUN is what was trained, each EXPORT a folder that `sparseft export` made of it, in any format. On 50 prompts of the
bundled questions it compares the logits of all positions, and 8 tokens answered greedily, all computed in fp32: formats
of differences with base + delta, formats of weights with the weights that these are rounded to.

`gguf-lora` is run by llama.cpp on each --base-gguf, and on the base in fp32 that --f32 writes first (with
tests/support/gguf_base.py), with the adapter and without; without either by the independent reader. `mlx` is run by
mlx-lm on --mlx-base, without it on the run's base.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparseft.compose.run_config import compose
from sparseft.config import BUNDLED_ROOT
from sparseft.data.prompts import alpaca_prompt
from sparseft.export.changed import base_model, merged_model
from sparseft.export.formats import format_of
from sparseft.export.formats.base import Answering, Options
from sparseft.export.formats.gguf_lora import FILE
from sparseft.export.formats.mlx import MlxModel
from sparseft.export.job import NOTE
from sparseft.export.llama_cpp import LlamaCpp
from sparseft.export.proof import HuggingFace
from sparseft.export.source import Source

ANSWER = 8
# Of a prompt the logits of all positions; then `ANSWER` tokens, each the likeliest.
Ask = Callable[[list[int]], tuple[Tensor, list[int]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("exports", nargs="*", type=Path)
    parser.add_argument("--base-gguf", nargs="*", default=[])
    parser.add_argument("--f32", type=Path)
    parser.add_argument("--mlx-base")
    given = parser.parse_args()

    source = Source.find(given.run, compose("export", []))
    rounded = merged_model(source, base_model(source)).float()
    source.target.model = replace(source.target.model, dtype="float32")
    prompts = [source.tokenizer(text)["input_ids"] for text in questions()]
    model = source.base()
    if given.f32 is not None and not given.f32.exists():
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from support.gguf_base import write_base

        write_base(model, given.f32)
    base = asked(hugging_face(model), prompts)
    attached = asked(hugging_face(source.attached(model)), prompts)
    weights = asked(hugging_face(rounded), prompts)
    print(f"{given.run}: {len(prompts)} prompts, {sum(map(len, prompts))} tokens; with the adapter")
    report("base in fp32 (no adapter)", base, attached)
    del model, rounded
    files = [*([str(given.f32)] if given.f32 else []), *given.base_gguf]
    for file in files:
        report(f"{Path(file).name} (no adapter) beside the base", asked(llama_cpp(file, None), prompts), base)
    for folder in given.exports:
        name = json.loads((folder / NOTE).read_text())["format"]
        form = format_of(name)
        if name == "gguf-lora" and files:
            for file in files:
                report(f"{name}, {Path(file).name}", asked(llama_cpp(file, folder / FILE), prompts), attached)
            continue
        if name == "mlx" and given.mlx_base:
            ask, by = mlx(given.mlx_base, folder), "mlx-lm"
        else:
            written = form.load(source, Options(), folder)
            ask, by = loaded(written), written.name
        report(f"{name}, {by}", asked(ask, prompts), weights if form.rounded else attached)


def questions() -> list[str]:
    """25 of each bundled set of questions."""
    texts = []
    for name in ("commonsense", "arithmetic"):
        records = json.loads((BUNDLED_ROOT / "data" / name / "train.json").read_text())[:25]
        texts += [alpaca_prompt(record["instruction"]) for record in records]
    return texts


def hugging_face(model: torch.nn.Module) -> Ask:
    @torch.no_grad()
    def ask(ids: list[int]) -> tuple[Tensor, list[int]]:
        found = model(torch.tensor([ids]), use_cache=True)
        answer = [int(found.logits[0, -1].argmax())]
        logits = found.logits[0]
        while len(answer) < ANSWER:
            found = model(torch.tensor([answer[-1:]]), past_key_values=found.past_key_values, use_cache=True)
            answer.append(int(found.logits[0, -1].argmax()))
        return logits, answer

    return ask


def llama_cpp(base: str, adapter: Path | None) -> Ask:
    model = LlamaCpp(base, adapter)

    def ask(ids: list[int]) -> tuple[Tensor, list[int]]:
        logits = model.logits(ids)
        answer = [int(logits[-1].argmax())]
        while len(answer) < ANSWER:
            answer.append(int(model.more(answer[-1:])[-1].argmax()))
        return logits, answer

    return ask


def mlx(base: str, adapter: Path) -> Ask:
    return uncached(MlxModel(base, adapter))


def loaded(written: Answering) -> Ask:
    """Whatever a format's own `load` gives."""
    return hugging_face(written.model.float()) if isinstance(written, HuggingFace) else uncached(written)


def uncached(model: Answering) -> Ask:
    def ask(ids: list[int]) -> tuple[Tensor, list[int]]:
        logits = model.logits(ids)
        answer = [int(logits[-1].argmax())]
        while len(answer) < ANSWER:
            answer.append(int(model.logits([*ids, *answer])[-1].argmax()))
        return logits, answer

    return ask


def asked(ask: Ask, prompts: list[list[int]]) -> list[tuple[Tensor, list[int]]]:
    """Of each prompt its logits, and the answer."""
    return [ask(ids) for ids in prompts]


def report(name: str, found: list[tuple[Tensor, list[int]]], wanted: list[tuple[Tensor, list[int]]]) -> None:
    worst = [float((a - b).abs().max()) for (a, _), (b, _) in zip(found, wanted, strict=True)]
    mean = sum(float((a - b).abs().mean()) for (a, _), (b, _) in zip(found, wanted, strict=True)) / len(found)
    pairs = [(a, b) for (_, a), (_, b) in zip(found, wanted, strict=True)]
    same = sum(a == b for a, b in pairs)
    tokens = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=True))
    print(
        f"  {name}: logits differ by up to {max(worst):.3g} (mean {mean:.2g}), {same} of {len(found)} answers alike, "
        f"{tokens} of {len(found) * ANSWER} tokens",
        flush=True,
    )


if __name__ == "__main__":
    main()

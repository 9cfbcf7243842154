"""An adapter's answers in llama.cpp and mlx-lm beside those of the attached model: docs/benchmarks/export.md.

    python scripts/export_answers.py RUN --gguf-lora DIR [--base-gguf FILE …] [--f32 FILE] [--mlx DIR --mlx-base DIR]

RUN is what was trained, each DIR what `sparseft export` made of it. On 50 prompts of the bundled questions it compares
the logits of all positions, and 16 tokens answered greedily, with base + delta in fp32; the same of the base without
the adapter. --f32 writes the base as a GGUF in fp32 first (with tests/support/gguf_base.py) and runs on it too.
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
from sparseft.export.formats.gguf_lora import FILE
from sparseft.export.formats.mlx import MlxModel
from sparseft.export.llama_cpp import LlamaCpp
from sparseft.export.source import Source

ANSWER = 16
Logits = Callable[[list[int]], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--gguf-lora", type=Path)
    parser.add_argument("--base-gguf", nargs="*", default=[])
    parser.add_argument("--f32", type=Path)
    parser.add_argument("--mlx", type=Path)
    parser.add_argument("--mlx-base")
    given = parser.parse_args()

    source = Source.find(given.run, compose("export", []))
    source.target.model = replace(source.target.model, dtype="float32")
    prompts = [source.tokenizer(text)["input_ids"] for text in questions()]
    model = source.base()
    if given.f32 is not None and not given.f32.exists():
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from support.gguf_base import write_base

        write_base(model, given.f32)
    base = asked(hugging_face(model), prompts)
    attached = asked(hugging_face(source.attached(model)), prompts)
    print(f"{given.run}: {len(prompts)} prompts, {sum(map(len, prompts))} tokens; with the adapter")
    report("base in fp32 (no adapter)", base, attached)
    del model
    for file in [*([str(given.f32)] if given.f32 else []), *given.base_gguf]:
        name = Path(file).name
        report(f"llama.cpp, {name}, no adapter, beside the base", asked(LlamaCpp(file, None).logits, prompts), base)
        report(f"llama.cpp, {name}", asked(LlamaCpp(file, given.gguf_lora / FILE).logits, prompts), attached)
    if given.mlx is not None:
        report("mlx-lm", asked(MlxModel(given.mlx_base, given.mlx).logits, prompts), attached)


def questions() -> list[str]:
    """25 of each bundled set of questions."""
    texts = []
    for name in ("commonsense", "arithmetic"):
        records = json.loads((BUNDLED_ROOT / "data" / name / "train.json").read_text())[:25]
        texts += [alpaca_prompt(record["instruction"]) for record in records]
    return texts


def hugging_face(model: torch.nn.Module) -> Logits:
    @torch.no_grad()
    def logits(ids: list[int]) -> Tensor:
        return model(torch.tensor([ids])).logits[0]

    return logits


def asked(logits: Logits, prompts: list[list[int]]) -> list[tuple[Tensor, list[int]]]:
    """Of each prompt its logits, and the likeliest tokens that follow."""
    found = []
    for ids in prompts:
        first = logits(ids)
        answer = [int(first[-1].argmax())]
        while len(answer) < ANSWER:
            answer.append(int(logits([*ids, *answer])[-1].argmax()))
        found.append((first, answer))
    return found


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

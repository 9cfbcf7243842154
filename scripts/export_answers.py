"""Every export of a run beside the attached model, on 50 prompts: the numbers of docs/benchmarks/export.md.

    python scripts/export_answers.py RUN OUT [--f32 FILE] [--base-gguf FILE …] [--mlx-base DIR]

Exports RUN into OUT/<format> in every format, loads each as its users do, and compares the logits of all positions,
and 8 tokens answered greedily, with the attached model's: of formats of weights as they are rounded, of formats of
differences with base + delta in fp32. llama.cpp runs the adapter on --base-gguf, and on the base in fp32, which --f32
writes first (with tests/support/gguf_base.py). --mlx-base: the base as mlx-lm reads it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from sparseft.compose.run_config import compose
from sparseft.config import BUNDLED_ROOT
from sparseft.data.prompts import alpaca_prompt
from sparseft.errors import RunError, UserError
from sparseft.export.formats import FORMATS, format_of
from sparseft.export.formats.base import Answering, Options
from sparseft.export.formats.gguf_lora import FILE
from sparseft.export.formats.mlx import MlxModel
from sparseft.export.job import export
from sparseft.export.llama_cpp import LlamaCpp
from sparseft.export.proof import ANSWER, HuggingFace, greedy
from sparseft.export.source import Source

Answers = list[tuple[Tensor, list[int]]]  # of each prompt the logits of all positions, and what is answered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("out", type=Path)
    parser.add_argument("--base-gguf", nargs="*", default=[])
    parser.add_argument("--f32", type=Path)
    parser.add_argument("--mlx-base")
    given = parser.parse_args()

    source = Source.find(given.run, compose("export", []))
    prompts = [source.tokenizer(text)["input_ids"] for text in questions()]
    base = source.base()
    plain = asked(HuggingFace(base, "base"), prompts)
    if given.f32 is not None and not given.f32.exists():
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from support.gguf_base import write_base

        write_base(source.base().float(), given.f32)
    model = source.attached(base)
    wanted = {rounded: asked(HuggingFace(model, "", unrounded=not rounded), prompts) for rounded in (True, False)}
    del base, model
    print(f"{given.run}: {len(prompts)} prompts, {sum(map(len, prompts))} tokens")
    report("base", 0.0, plain, wanted[False])
    for name in FORMATS:
        folder, format, options = given.out / name, format_of(name), Options()
        start = time.perf_counter()
        try:
            export(source, format, folder, options)
        except (UserError, RunError) as error:
            print(f"  {name}: {error}", flush=True)
            continue
        seconds = time.perf_counter() - start
        megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        written = format.load(source, options, folder)
        report(f"{name} ({written.name}), {seconds:.0f} s", megabytes, asked(written, prompts), wanted[format.rounded])
    for file in [*([str(given.f32)] if given.f32 else []), *given.base_gguf]:
        name = f"llama.cpp on {Path(file).name}"
        report(f"{name}, no adapter, beside the base", 0.0, asked(LlamaCpp(file, None), prompts), plain)
        adapter = given.out / "gguf-lora" / FILE
        report(name, 0.0, asked(LlamaCpp(file, adapter), prompts), wanted[False])
    if given.mlx_base is not None:
        report("mlx-lm", 0.0, asked(MlxModel(given.mlx_base, given.out / "mlx"), prompts), wanted[True])


def questions() -> list[str]:
    """25 of each bundled set of questions."""
    texts = []
    for name in ("commonsense", "arithmetic"):
        records = json.loads((BUNDLED_ROOT / "data" / name / "train.json").read_text())[:25]
        texts += [alpaca_prompt(record["instruction"]) for record in records]
    return texts


@torch.no_grad()
def asked(model: Answering, prompts: list[list[int]]) -> Answers:
    return [(model.logits(ids), greedy(model, ids)) for ids in prompts]


def report(name: str, megabytes: float, found: Answers, wanted: Answers) -> None:
    worst = [float((a - b).abs().max()) for (a, _), (b, _) in zip(found, wanted, strict=True)]
    mean = sum(float((a - b).abs().mean()) for (a, _), (b, _) in zip(found, wanted, strict=True)) / len(found)
    pairs = [(a, b) for (_, a), (_, b) in zip(found, wanted, strict=True)]
    same = sum(a == b for a, b in pairs)
    tokens = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=True))
    print(
        f"  {name}: {megabytes:.1f} MB, logits differ by up to {max(worst):.3g} (mean {mean:.2g}), "
        f"{same} of {len(found)} answers alike, {tokens} of {len(found) * ANSWER} tokens",
        flush=True,
    )


if __name__ == "__main__":
    main()

"""Every export of a run beside the attached model, on 50 prompts: the numbers of docs/benchmarks/export.md.

    python scripts/export_answers.py RUN OUT [--f32 FILE] [--base-gguf FILE …] [--base DIR] [--prompts N] [--formats …]

Exports RUN into OUT/<format> in every format, loads each as its users do, and lets it read every prompt with the
attached model's greedy answer (24 tokens): the logits of all positions are compared, and whether at each token of the
answer the same one is the likeliest: exactly then it answers alike. Formats of weights are held against the attached
model as it is rounded, formats of differences against base + delta in fp32. llama.cpp runs the adapter on --base-gguf,
and on the base in fp32, which --f32 writes first (with tests/support/gguf_base.py). --base: where the base is, if
elsewhere (mlx-lm needs rope_theta at the top of its config.json).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseft.compose.run_config import compose
from sparseft.config import BUNDLED_ROOT
from sparseft.data.prompts import alpaca_prompt
from sparseft.errors import RunError, UserError
from sparseft.export.changed_tensors import merged_model
from sparseft.export.formats import FORMATS, format_of
from sparseft.export.formats.base import Answering, Options
from sparseft.export.formats.gguf_lora import FILE
from sparseft.export.job import export
from sparseft.export.llama_cpp import LlamaCpp
from sparseft.export.proof import HuggingFace, distance
from sparseft.export.source import Source

ANSWER = 24  # tokens; fewer where a model ends its answer


class Text(NamedTuple):
    """A prompt with an answer: the tokens of both, and of the prompt how many."""

    ids: list[int]
    prompt: int


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("out", type=Path)
    parser.add_argument("--base-gguf", nargs="*", default=[])
    parser.add_argument("--f32", type=Path)
    parser.add_argument("--base")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    given = parser.parse_args(words)

    overrides = [f"model.path={given.base}"] if given.base else []
    source = Source.find(given.run, compose("export", overrides), overrides)
    prompts = [source.tokenizer(text)["input_ids"] for text in questions(given.prompts)]
    exactly: dict[bool, tuple[list[Text], list[Tensor]]] = {}  # by format.rounded: what the attached model says
    for rounded in {False, *(format_of(name).rounded for name in given.formats)}:
        base = source.base()
        # Widened once, not anew for each pass: of the attached model base + delta are then added in fp32.
        model: Any = (merged_model(source, base) if rounded else source.attached(base)).float()
        texts = [answered(model, ids) for ids in prompts]
        exactly[rounded] = texts, asked(HuggingFace(model, ""), texts)
        del model, base
    texts, wanted = exactly[False]
    base = source.base().float()
    plain = asked(HuggingFace(base, ""), texts)
    if given.f32 is not None and not given.f32.exists():
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from support.gguf_base import write_base

        write_base(base, given.f32)
    del base
    print(f"{given.run}: {len(texts)} prompts, {sum(len(text.ids) for text in texts)} tokens with their answers")
    report("the base", texts, plain, wanted)

    for name in given.formats:
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
        if isinstance(written, HuggingFace):
            written.model.float()
        compare(f"{name} ({written.name}), {seconds:.0f} s, {megabytes:.1f} MB", written, *exactly[format.rounded])
    for file in [*([str(given.f32)] if given.f32 else []), *given.base_gguf]:
        name = f"llama.cpp on {Path(file).name}"
        without = asked(LlamaCpp(file, None), texts)
        report(f"{name} without the adapter, beside the base", texts, without, plain)
        compare(name, LlamaCpp(file, given.out / "gguf-lora" / FILE), texts, wanted)


def questions(count: int) -> list[str]:
    """The first of each bundled set of questions, `count` in all."""
    texts = []
    for name, number in (("commonsense", count - count // 2), ("arithmetic", count // 2)):
        records = json.loads((BUNDLED_ROOT / "data" / name / "train.json").read_text())[:number]
        texts += [alpaca_prompt(record["instruction"]) for record in records]
    return texts


@torch.no_grad()
def answered(model: Any, prompt: list[int]) -> Text:
    """The prompt with the model's greedy answer."""
    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False, pad_token_id=0
    )
    return Text(found[0].tolist(), len(prompt))


def asked(model: Answering, texts: list[Text]) -> list[Tensor]:
    """The logits (tokens, vocabulary) of each text, from which each token but the first is guessed."""
    return [model.logits(text.ids[:-1]) for text in texts]


def compare(name: str, model: Answering, texts: list[Text], wanted: list[Tensor]) -> None:
    report(name, texts, asked(model, texts), wanted)


def report(name: str, texts: list[Text], found: list[Tensor], wanted: list[Tensor]) -> None:
    pairs = list(zip(found, wanted, strict=True))
    mean = sum(float((a - b).abs().mean()) for a, b in pairs) / len(pairs)
    same = [
        a[text.prompt - 1 :].argmax(dim=1) == b[text.prompt - 1 :].argmax(dim=1)
        for text, (a, b) in zip(texts, pairs, strict=True)
    ]
    print(
        f"  {name}: logits differ by up to {distance(found, wanted):.3g} (mean {mean:.2g}), "
        f"{sum(bool(s.all()) for s in same)} of {len(same)} answers alike, "
        f"{sum(int(s.sum()) for s in same)} of {sum(map(len, same))} tokens",
        flush=True,
    )


if __name__ == "__main__":
    main()

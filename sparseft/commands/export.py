"""`sparseft export`: what other tools load of a run or an adapter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.config import RunConfig
from sparseft.errors import UserError, nearest
from sparseft.export import NOTE, README
from sparseft.export.formats import format_of
from sparseft.export.formats.base import Options
from sparseft.export.job import export
from sparseft.export.source import Source
from sparseft.publish.card import card_of, is_untouched
from sparseft.publish.facts import check_finished, facts_of
from sparseft.runs import folder as runs

DTYPES = ("float32", "bfloat16", "float16")
BASES = ("trained", "checkpoint")


def run(
    config: RunConfig,
    *,
    folder: str | None,
    format: str,
    out: str,
    engine: str | None = None,
    dtype: str | None = None,
    base_gguf: str | None = None,
    base: str | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes the run or adapter in `folder` (default: the latest run); returns path, format, facts and the proof."""
    import torch

    console.clear_warnings()
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: no such dtype.{nearest(dtype, DTYPES)}")
    wanted = format_of(format)
    if base_gguf is not None and format != "gguf-lora":
        raise UserError(f"--base-gguf {base_gguf}: it is for --format gguf-lora, which llama.cpp proves on it.")
    if base is not None and base not in BASES:
        raise UserError(f"--base {base}: expected one of {', '.join(BASES)}.{nearest(base, BASES)}")
    options = Options(None if dtype is None else getattr(torch, dtype), engine, base_gguf)
    source = Source.find(folder if folder is not None else str(runs.latest_run()), config, overrides)
    if source.target.folder is not None:
        check_finished(source.target.folder)
    if base is not None:
        if format != "merged" or source.packed is None:
            raise UserError(
                f"--base {base}: it is for --format merged of what was trained on a base that model.quantize packed"
                + ("." if source.packed is None else f", not for {format}.")
            )
        options.base = base
    card = Path(out).expanduser() / README
    ours = os.path.isfile(card) and os.path.isfile(card.with_name(NOTE))  # a name may be longer than any file's
    if ours and not is_untouched(card.read_text("utf-8", "replace")):
        raise UserError(f"--out {out}: its {README} was edited, and would be lost: move it away, or name a new folder.")
    console.log(f"exporting {source.target.what} as {format}")

    def readme(facts: dict[str, Any]) -> str:
        place = source.target.folder or source.folder
        return card_of(facts_of(place, wanted.name, facts.get("rank")))

    return export(source, wanted, out, options, readme)


def render(result: dict[str, Any]) -> None:
    """Where it lies, and how near it came to the attached model."""
    proof = result["proof"]
    print(
        f"loaded by {proof['loader']}: {proof['same_answers']} of {proof['prompts']} prompts answered as by the "
        f"attached model; logits differ by up to {proof['largest_difference']:.2g}, rounding explains "
        f"{proof['allowed']:.2g} (the adapter changes them by up to {proof['largest_change']:.2g})"
    )
    if (kept := result.get("gain")) is not None:
        share = "nothing to keep" if kept["survived"] is None else f"{kept['survived']:.0%} of the gain survived"
        before = "" if kept["loss_checkpoint"] is None else f"{kept['loss_checkpoint']:.4f} -> "
        print(
            f"{share}: loss {kept['loss_packed_base']:.4f} -> {kept['loss_packed']:.4f} "
            f"on the {kept['quantize']} base, "
            f"{before}{kept['loss_written']:.4f} as written ({kept['examples']} examples of "
            f"{kept['data']})"
        )
    print(f"{result['format']} written to {result['path']}: {', '.join(facts(result))}")


def facts(result: dict[str, Any]) -> list[str]:
    """What is said of the files, as counts with their units."""
    said = []
    if (rank := result.get("rank")) is not None:
        said.append(f"rank {rank}" + (f" ({result['needed']} needed)" if "needed" in result else ""))
    for many, one in (("linears", "linear"), ("tensors", "tensor"), ("entries", "entry"), ("files", "file")):
        if many in result:
            said.append(f"{result[many]:,} {one if result[many] == 1 else many}")
            if many == "entries" and "touched" in result:
                said[-1] += f" in {result['touched']:.1%} of their groups"
    if "target_modules" in result:
        said[-1] += f" ({', '.join(result['target_modules'])})"
    return [*said, console.size(result["bytes"])]

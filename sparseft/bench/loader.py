"""Tokens a second that the data pipeline delivers, beside what a GPU would train on.

Stages: `tokenise` (file to cached tokens, as at the first start), `cached` (the same at any later start), `pack`, and
`collate` (batches of packed rows from a shuffling DataLoader, in this process and in two workers). What the trainer
takes is not measured but assumed: 6 operations a parameter and token (forward, and backward for weights and inputs:
more than sparse training does) at a share of a GPU's peak.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from sparseft import console
from sparseft.bench.output import Output, machine, measured_on
from sparseft.config import BUNDLED, RunConfig
from sparseft.data.loading import load_datasets
from sparseft.data.packing import Collator, PackedDataset, padding_id
from sparseft.models.loading import load_tokenizer

PARAMETERS = 6_738_415_616  # LLaMA-2-7B
PEAK_FLOPS = 400e12
UTILISATION = 0.4
NEEDED = PEAK_FLOPS * UTILISATION / (6 * PARAMETERS)  # tokens a second
TARGET = 20.0  # times that
CHARACTERS = 4.0  # a token of English under a vocabulary of 32,000 or more, about
REPEATS = 3
WORKERS = 2


def run(config: RunConfig, output: Output | None = None) -> dict[str, Any]:
    """Measures `dataset` with `model`'s tokenizer: rows of `trainer.max_length`, batches of `trainer.batch_size`."""
    tokenizer = load_tokenizer(config.model)
    dataset = dataclasses.replace(config.dataset, eval_fraction=0.0, packing=False)
    length = config.trainer.max_length

    def load(folder: str) -> Any:
        bundled = config.model.path.startswith(BUNDLED)
        return load_datasets(dataset, tokenizer, max_length=length, seed=config.seed, bundled=bundled, cache_dir=folder)

    def load_anew() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            return load(folder)

    with tempfile.TemporaryDirectory() as folder:
        data = load(folder)
        console.log(f"bench: {data.notes[0]}, {data.train.num_tokens:,} tokens")
        rows = PackedDataset(data.train, length)
        seconds = {
            "tokenise": _median(load_anew),
            "cached": _median(lambda: load(folder)),
            "pack": _median(lambda: PackedDataset(data.train, length)),
            "collate": _median(lambda: _drain(rows, tokenizer, config, 0)),
            f"collate, {WORKERS} workers": _median(lambda: _drain(rows, tokenizer, config, WORKERS)),
        }
        characters = _characters_per_token(data.train, tokenizer)
    # In an epoch from nothing the stages follow each other; later ones only collate.
    seconds["all, first epoch"] = seconds["tokenise"] + seconds["pack"] + seconds["collate"]
    stages = {name: _stage(data.train.num_tokens, spent, characters) for name, spent in seconds.items()}
    return {
        "benchmark": "loader",
        "dataset": data.train_source,
        "model": config.model.path,
        "dtype": "int32",
        "examples": len(data.train),
        "rows": len(rows),
        "tokens": data.train.num_tokens,
        "max_length": length,
        "batch_size": config.hardware.at_once(config.trainer.batch_size),
        "cores": machine()["cores"],
        "characters_per_token": characters,
        "needed": {
            "tokens_per_second": NEEDED,
            "parameters": PARAMETERS,
            "peak_flops": PEAK_FLOPS,
            "utilisation": UTILISATION,
            "target": TARGET,
        },
        "stages": stages,
    }


def _median(call: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _drain(rows: PackedDataset, tokenizer: Any, config: RunConfig, workers: int) -> None:
    """One epoch of batches, as the Trainer draws them."""
    loader: Any = DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=config.hardware.at_once(config.trainer.batch_size),
        shuffle=True,
        collate_fn=Collator(padding_id(tokenizer)),
        num_workers=workers,
        generator=torch.Generator().manual_seed(config.seed),
    )
    for _ in loader:
        pass


def _characters_per_token(train: Any, tokenizer: Any) -> float:
    some = [train[index]["input_ids"] for index in range(min(200, len(train)))]
    return sum(len(tokenizer.decode(ids)) for ids in some) / sum(map(len, some))


def _stage(tokens: int, seconds: float, characters: float) -> dict[str, float | bool]:
    """Rates of one stage. A small vocabulary cuts text into many tokens, which flatters: what is compared is the
    number of tokens, or that of tokens of CHARACTERS, whichever is less."""
    rate = tokens / seconds
    ratio = rate * min(1.0, characters / CHARACTERS) / NEEDED
    return {"seconds": seconds, "tokens_per_second": rate, "ratio_to_needed": ratio, "met": ratio >= TARGET}


def title(result: dict[str, Any]) -> str:
    """What is measured and what is assumed."""
    needed = result["needed"]
    return (
        f"Loader: {result['dataset']}, {result['tokens']:,} tokens in {result['rows']:,} rows of at most "
        f"{result['max_length']}, {result['characters_per_token']:.1f} characters a token, {measured_on(result)}, "
        f"median of {REPEATS}. Needed, an assumption: {needed['tokens_per_second']:,.0f} tokens/s, "
        f"{needed['parameters'] / 1e9:.1f} billion parameters x 6 operations at {needed['utilisation']:.0%} of "
        f"{needed['peak_flops'] / 1e12:.0f} TFLOP/s; ÷ counts a token as at least {CHARACTERS:.0f} characters"
    )


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row for each stage."""
    columns = ["stage", "seconds", "tokens/s", "÷ needed", f"target ≥ {TARGET:.0f}"]
    return columns, [
        [
            name,
            f"{stage['seconds']:.3f}",
            f"{stage['tokens_per_second']:,.0f}",
            f"{stage['ratio_to_needed']:,.0f}",
            "met" if stage["met"] else "MISSED",
        ]
        for name, stage in result["stages"].items()
    ]

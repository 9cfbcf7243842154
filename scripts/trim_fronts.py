"""What a run's adapter keeps of the target at each loss on the source: trimmed, scaled by one factor, stopped early.

    python scripts/trim_fronts.py RUN … --source FILE --source-test FILE --target-test FILE [--budgets 0.02 0.1 0.3]

Each run needs its checkpoints of the way (trainer.save_steps, trainer.save_total_limit). One JSON line a run on stdout:
the points of each way as [forgetting, target loss], both measured on the test files, which trimming never sees.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from sparseft.adapters.lifecycle import load_adapter, set_adapter, units
from sparseft.compose.run_config import compose
from sparseft.config import DatasetConfig
from sparseft.data.loading import load_datasets
from sparseft.data.packing import padding_id
from sparseft.data.sampling import seeded_first
from sparseft.evaluation.held_out import held_out_loss
from sparseft.evaluation.target import load_target
from sparseft.models.loading import vocabulary_rows
from sparseft.trim.job import Trimming

FACTORS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)


def rows_of(trimming: Trimming, file: str, tokenizer: Any, count: int) -> list[Any]:
    """At most `count` examples of a file, read as the run reads its data."""
    config = trimming.config
    data = load_datasets(
        DatasetConfig(name="test", train_path=file, eval_fraction=0.0), tokenizer,
        max_length=config.trainer.max_length, seed=0, bundled=False, cache_dir=config.cache_dir,
    )  # fmt: skip
    return [data.train[index] for index in seeded_first(min(count, len(data.train)), len(data.train), 0, "test")]


def measure(run: str, given: argparse.Namespace) -> dict[str, Any]:
    """The points of one run."""
    words = [f"cache_dir={given.cache_dir}", "hardware.device=cpu"]
    first = Trimming.find(run, compose("trim", words), words, 1.0, given.source)
    model, tokenizer = load_target(first.target, first.config)
    target, source = (rows_of(first, file, tokenizer, given.rows) for file in (given.target_test, given.source_test))
    pad, device = padding_id(tokenizer, vocabulary_rows(model)[0]), torch.device("cpu")

    def losses(model: Any) -> list[float]:
        return [held_out_loss(model, rows, pad, device, 32) for rows in (source, target)]

    base = losses(set_adapter(model, None))
    set_adapter(model, "default")

    def point(model: Any) -> list[float]:
        found = losses(model)
        return [found[0] - base[0], found[1]]

    trimmed, seconds = [], []
    for budget in given.budgets:
        cut, outcome = dataclasses.replace(first, budget=budget).run()
        alike = outcome["one_factor"]
        trimmed.append([budget, *point(cut), alike["factor"] if alike else 1.0, outcome["dropped"], outcome["units"]])
        seconds.append(outcome["seconds"])
    scaled = units(model)
    one = []
    for factor in FACTORS:
        for each in scaled.values():
            each.scale(torch.full((len(each),), factor))
        one.append(point(model))
    early = []
    for checkpoint in sorted(Path(run).glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.split("-")[1])):
        model = load_adapter(model, checkpoint / "adapter", "early").eval()
        early.append(point(model))
    return {"run": run, "base": base, "trimmed": trimmed, "one": one, "early": early, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    for name in ("--source", "--source-test", "--target-test"):
        parser.add_argument(name, required=True)
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.02, 0.1, 0.3])
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--cache-dir", default=".cache/sparseft")
    given = parser.parse_args()
    for run in given.runs:
        print(json.dumps(measure(run, given)), flush=True)


if __name__ == "__main__":
    main()

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
from torch import Tensor

from sparseft.adapters.lifecycle import load_adapter, set_adapter, units
from sparseft.compose.run_config import compose
from sparseft.config import DatasetConfig
from sparseft.data.loading import load_datasets
from sparseft.data.packing import padding_id
from sparseft.data.sampling import seeded_first
from sparseft.evaluation.held_out import held_out_loss
from sparseft.evaluation.target import load_target
from sparseft.models.loading import vocabulary_rows
from sparseft.trim.job import CALIBRATION, Trimming, source_data
from sparseft.trim.measured import TOGETHER, Measured

FACTORS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)


def rows_of(trimming: Trimming, file: str, tokenizer: Any, count: int) -> list[Any]:
    """At most `count` examples of a file, read as the run reads its data."""
    config = trimming.config
    data = load_datasets(
        DatasetConfig(name="test", train_path=file, eval_fraction=0.0), tokenizer,
        max_length=config.trainer.max_length, seed=0, bundled=False, cache_dir=config.cache_dir,
    )  # fmt: skip
    return [data.train[index] for index in seeded_first(min(count, len(data.train)), len(data.train), 0, "test")]


def judged_alone(price: float, slopes: list[tuple[Tensor, Tensor]], whole: bool) -> Tensor:
    """Factors by each unit's own gain and cost, from its slopes (target, source) at all 0 and at all 1: what is lowest
    of target + price × source as a parabola, or (`whole`) 1 where it is worth its price and 0 where it is not."""
    start, end = (target + price * source for target, source in slopes)
    if whole:
        return ((start + end) / 2 < 0).double()
    bend = end - start
    inside = (-start / bend.clamp_min(1e-12)).clamp(0, 1)
    return torch.where(bend > 0, inside, (start + bend / 2 < 0).double())


def apart(trimming: Trimming, model: Any, tokenizer: Any, point: Any) -> dict[str, list[Any]]:
    """Points of choices by each unit's own gain and cost, at several prices."""
    config = trimming.config
    source = source_data(config, trimming.source, tokenizer).train
    target = load_datasets(
        config.dataset, tokenizer, max_length=config.trainer.max_length, seed=config.seed, bundled=False,
        cache_dir=config.cache_dir,
    ).train  # fmt: skip
    rows = [
        [each[i] for i in seeded_first(CALIBRATION, len(each), config.seed, "trimming")] for each in (target, source)
    ]
    pad = padding_id(tokenizer, vocabulary_rows(model)[0])
    measured = Measured(
        model, units(model), *rows, [], pad=pad, device=torch.device("cpu"), batch_size=config.trainer.batch_size
    )
    ends = [torch.full((measured.count,), value, dtype=torch.float64) for value in (0.0, 1.0)]
    steps = CALIBRATION // TOGETHER
    slopes = []
    for end in ends:
        both = [measured.slopes(end, step) for step in range(steps)]
        slopes.append(tuple(sum(part) / steps for part in zip(*both, strict=True)))
    found: dict[str, list[Any]] = {"parabola": [], "drop": []}
    for price in (0.3, 1.0, 3.0, 10.0):
        for name, whole in (("parabola", False), ("drop", True)):
            measured.apply(judged_alone(price, slopes, whole))
            found[name].append(point(model))
    measured.apply(ends[1])
    return found


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
    alone = apart(first, model, tokenizer, point) if given.apart else None
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
    return {
        "run": run,
        "base": base,
        "trimmed": trimmed,
        "one": one,
        "early": early,
        "apart": alone,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    for name in ("--source", "--source-test", "--target-test"):
        parser.add_argument(name, required=True)
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.02, 0.1, 0.3])
    parser.add_argument("--apart", action="store_true", help="also judge each unit alone")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--cache-dir", default=".cache/sparseft")
    given = parser.parse_args()
    for run in given.runs:
        print(json.dumps(measure(run, given)), flush=True)


if __name__ == "__main__":
    main()

"""What training leaves behind: every variant trained with every seed, and the held-out losses side by side.

The seed also decides which examples are held out where `dataset.eval_fraction` splits them off, so the losses of one
variant spread more than variants differ; the difference to the first variant, taken seed by seed, does not have that.

A trial is an ordinary run in `runs/<variant>-seed<N>`. Interrupted, the benchmark goes on with the trials that are
missing. The held-out loss is the mean over the labelled tokens of the evaluation examples; its standard deviation is
the sample's (n - 1), over the seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.bench.output import Output, as_markdown, device_name, measured_on
from sparseft.bench.trials import (
    Trial,
    check_trial,
    finished,
    folder_name,
    going_on,
    named_settings,
    rates_of_seeds,
    shown_rates,
    summary_of,
)
from sparseft.compose.run_config import compose
from sparseft.config import RunConfig
from sparseft.errors import UserError
from sparseft.models.loading import resolve_device


def trials(config: RunConfig, words: Sequence[str], config_dirs: Sequence[str], folder: Path) -> list[Trial]:
    """`bench.variants` × `bench.seeds`, each composed and checked before the first one runs."""
    made, names = [], set()
    named = named_settings("bench.variants", config.bench.variants)
    if not named:
        raise UserError("bench.variants is empty: name at least one variant.")
    own = [word for word in words if word.partition("=")[0] not in ("bench.variants", "bench.seeds", "output_dir")]
    for seed in range(config.seed, config.seed + config.bench.seeds):
        for name, changes in named:
            output_dir = folder / folder_name(name, seed)
            if output_dir in names:
                raise UserError(f"bench.variants: two variants are called '{name}', or nearly so.")
            names.add(output_dir)
            trial = compose("train", [*own, *changes, f"seed={seed}", "overwrite=true"], config_dirs)
            trial.output_dir = str(output_dir)
            if seed == config.seed:  # seeds differ in nothing that is checked
                check_trial(trial, "quality")
            made.append(Trial(name, seed, trial))
    return made


def run(
    config: RunConfig,
    output: Output,
    words: Sequence[str],
    config_dirs: Sequence[str],
    train: Callable[[RunConfig], dict[str, Any]],
) -> dict[str, Any]:
    """Trains every variant with every seed and returns what `bench.json` holds; interrupted, says how to go on.

    words, config_dirs: what `config` was composed from; the variants come on top. train: trains one config and returns
    its summary.
    """
    folder = output.choose()
    with going_on(folder):
        return compare(config, trials(config, words, config_dirs, folder / "runs"), train)


def compare(config: RunConfig, trials: Sequence[Trial], train: Callable[[RunConfig], dict[str, Any]]) -> dict[str, Any]:
    """Runs the trials that are missing, variant by variant within a seed, and puts all of them side by side."""
    summaries = [finished(trial) for trial in trials]
    done = sum(summary is not None for summary in summaries)
    if done:
        console.log(f"bench: {done} of {len(trials)} runs are there from before")
    with console.Progress(len(trials), "bench quality", unit="run", initial=done, plain_line_pause=0) as progress:
        for position, trial in enumerate(trials):
            if summaries[position] is None:
                summary = summary_of(trial, train)
                if summary["eval_loss_after"] is None:
                    raise UserError("bench quality compares held-out losses, and there are no evaluation examples.")
                summaries[position] = summary
                done += 1
                progress.update(done, loss=summary["eval_loss_after"])
    devices = [device_name(resolve_device(trial.config.hardware.device)) for trial in trials]  # a variant may say which
    return {
        "benchmark": "quality",
        "model": config.model.path,
        "dataset": config.dataset.title,
        "dtype": config.model.dtype,
        "device": " and ".join(dict.fromkeys(devices)),
        "seeds": sorted({trial.seed for trial in trials}),
        "variants": variants(trials, summaries),
    }


def variants(trials: Sequence[Trial], summaries: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Each variant's held-out losses and what they cost, in the order in which the variants were given."""
    rows: dict[str, dict[str, Any]] = {}
    first: dict[int, float] = {}
    for name in dict.fromkeys(trial.variant for trial in trials):
        pairs = [(trial.seed, s) for trial, s in zip(trials, summaries, strict=True) if trial.variant == name]
        mine = [summary for _, summary in pairs]
        losses = [summary["eval_loss_after"] for summary in mine]
        first = first or {seed: summary["eval_loss_after"] for seed, summary in pairs}
        differences = [summary["eval_loss_after"] - first[seed] for seed, summary in pairs]
        rows[name] = {
            "eval_loss": statistics.fmean(losses),
            "eval_loss_sd": statistics.stdev(losses) if len(losses) > 1 else None,
            "eval_losses": losses,
            "difference": statistics.fmean(differences),
            "difference_sd": statistics.stdev(differences) if len(differences) > 1 else None,
            "eval_loss_before": statistics.fmean(summary["eval_loss_before"] for summary in mine),
            "train_loss": statistics.fmean(summary["train_loss"] for summary in mine),
            "trainable_parameters": round(statistics.fmean(summary["trainable_parameters"] for summary in mine)),
            **rates_of_seeds([summary["learning_rate"] for summary in mine]),
            "train_seconds": statistics.median(summary["train_seconds"] for summary in mine),
        }
    return rows


def title(result: dict[str, Any]) -> str:
    """What was compared, in one line."""
    seeds = len(result["seeds"])
    return f"Held-out loss: {result['model']}, {result['dataset']}, {seeds} seeds, on {measured_on(result)}"


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row for each variant."""
    columns = ["variant", "held-out loss", "± sd", "− first", "± sd", "trained loss", "trainable", "learning rate"]
    return columns, [
        [
            name,
            f"{row['eval_loss']:.4f}",
            f"{row['eval_loss_sd']:.4f}" if row["eval_loss_sd"] is not None else "-",
            f"{row['difference']:+.4f}",
            f"{row['difference_sd']:.4f}" if row["difference_sd"] is not None else "-",
            f"{row['train_loss']:.4f}",
            f"{row['trainable_parameters']:,}",
            shown_rates(row),
        ]
        for name, row in result["variants"].items()
    ]


def markdown(result: dict[str, Any]) -> str:
    """The table as Markdown, with the command and the versions that made it."""
    first = next(iter(result["variants"].values()))
    facts = f"{len(result['seeds'])} seeds, held-out loss before training {first['eval_loss_before']:.4f}"
    return as_markdown(result, facts, *table(result))

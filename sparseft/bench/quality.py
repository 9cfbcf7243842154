"""What training leaves behind: every variant trained with every seed, and the held-out losses side by side.

The seed also decides which examples are held out where `dataset.eval_fraction` splits them off, so the losses of one
variant spread more than variants differ; the difference to the first variant, taken seed by seed, does not have that.

A trial is an ordinary run in `runs/<variant>-seed<N>`. Interrupted, the benchmark goes on with the trials that are
missing. The held-out loss is the mean over the labelled tokens of the evaluation examples; its standard deviation is
the sample's (n - 1), over the seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparseft import console
from sparseft.bench import trials
from sparseft.bench.output import as_markdown, device_name, measured_on
from sparseft.bench.trials import Trial, check_trial, finished, folder_name, named_settings, rates_of_seeds, shown_rates
from sparseft.config import RunConfig
from sparseft.errors import UserError
from sparseft.models.loading import resolve_device


@dataclass
class Study(trials.Study):
    """What is compared."""

    own = ("bench.variants", "bench.seeds", "output_dir")

    @staticmethod
    def named(config: RunConfig) -> dict[str, list[str]]:
        named = named_settings("bench.variants", config.bench.variants)
        if not named:
            raise UserError("bench.variants is empty: name at least one variant.")
        names = set()
        for name, _ in named:
            if folder_name(name, 0) in names:
                raise UserError(f"bench.variants: two variants are called '{name}', or nearly so.")
            names.add(folder_name(name, 0))
        return dict(named)

    def check(self) -> None:
        for variant in self.variants:  # seeds differ in nothing that is checked
            check_trial(self.trial(variant, self.seeds[0]).config, "quality")

    def trial(self, variant: str, seed: int) -> Trial:
        """One training, composed."""
        config = self.composed(self.variants[variant], seed, None)
        config.output_dir = str(self.folder / "runs" / folder_name(variant, seed))
        return Trial(variant, seed, config)


def measure(study: Study) -> dict[str, Any]:
    """Runs the trials that are missing, variant by variant within a seed, and puts all of them side by side."""
    runs = [study.trial(variant, seed) for seed in study.seeds for variant in study.variants]
    summaries = [finished(trial) for trial in runs]
    done = sum(summary is not None for summary in summaries)
    if done:
        console.log(f"bench: {done} of {len(runs)} runs are there from before")
    with console.Progress(len(runs), "bench quality", unit="run", initial=done, plain_line_pause=0) as progress:
        for position, trial in enumerate(runs):
            if summaries[position] is None:
                summary = study.summary(trial)
                if summary["eval_loss_after"] is None:
                    raise UserError("bench quality compares held-out losses, and there are no evaluation examples.")
                summaries[position] = summary
                done += 1
                progress.update(done, loss=summary["eval_loss_after"])
    devices = [device_name(resolve_device(trial.config.hardware.device)) for trial in runs]  # a variant may say which
    return {
        "benchmark": "quality",
        "model": study.config.model.path,
        "dataset": study.config.dataset.title,
        "dtype": study.config.model.dtype,
        "device": " and ".join(dict.fromkeys(devices)),
        "seeds": study.seeds,
        "variants": variants(runs, summaries),
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

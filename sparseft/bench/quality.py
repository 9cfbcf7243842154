"""What training leaves behind: every variant trained with every seed, and the held-out losses side by side.

The seed also decides which examples are held out where `dataset.eval_fraction` splits them off, so the losses of one
variant spread more than variants differ; the difference to the first variant, taken seed by seed, does not have that.

A trial is an ordinary run in `runs/<variant>-seed<N>`. Interrupted, the benchmark goes on with the trials that are
missing. The held-out loss is the mean over the labelled tokens of the evaluation examples; its standard deviation is
the sample's (n - 1), over the seeds.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.bench.machine import device_name, measured_on
from sparseft.config import RunConfig
from sparseft.errors import UserError
from sparseft.files.untrusted import read_json_object
from sparseft.models.loading import resolve_device
from sparseft.runs.folder import CONFIG, SUMMARY


@dataclass
class Trial:
    """One run of one variant."""

    variant: str
    seed: int
    config: RunConfig  # output_dir: the trial's folder
    same: Callable[[Path], bool]  # whether a run's `config.yaml` asks for the same training


def folder_name(variant: str, seed: int) -> str:
    """A trial's folder: the variant's name without what file systems and shells dislike."""
    name = re.sub(r"[^\w.]+", "-", variant).strip("-").lower()
    return f"{name or 'variant'}-seed{seed}"


def finished(trial: Trial) -> dict[str, Any] | None:
    """The summary of a trial that has run before, null where it has not, or not to its end.

    UserError where the folder holds a run with other settings.
    """
    folder = Path(trial.config.output_dir or "")
    if not (folder / CONFIG).is_file():
        return None
    if not trial.same(folder / CONFIG):
        raise UserError(f"{folder} holds a run with other settings: give the benchmark another output_dir.")
    summary = folder / SUMMARY
    return read_json_object(summary) if summary.is_file() else None


def run(config: RunConfig, trials: Sequence[Trial], train: Callable[[RunConfig], dict[str, Any]]) -> dict[str, Any]:
    """Runs the trials that are missing, variant by variant within a seed, and returns what `bench.json` holds."""
    for trial in trials:
        if not (trial.config.dataset.eval_path or trial.config.dataset.eval_fraction):
            raise UserError("bench quality compares held-out losses: give dataset.eval_path or dataset.eval_fraction.")
    summaries = [finished(trial) for trial in trials]
    done = sum(summary is not None for summary in summaries)
    if done:
        console.log(f"bench: {done} of {len(trials)} runs are there from before")
    with console.Progress(len(trials), "bench quality", unit="run", initial=done, plain_line_pause=0) as progress:
        for position, trial in enumerate(trials):
            if summaries[position] is None:
                with console.quiet():
                    summary = train(trial.config)
                if summary["eval_loss_after"] is None:
                    raise UserError("bench quality compares held-out losses, and there are no evaluation examples.")
                summaries[position] = summary
                done += 1
                progress.update(done, loss=summary["eval_loss_after"])
    devices = [device_name(resolve_device(trial.config.hardware.device)) for trial in trials]  # a variant may say which
    return {
        "benchmark": "quality",
        "model": config.model.path,
        "dataset": config.dataset.train_path or config.dataset.name,
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
            "learning_rate": mine[0]["learning_rate"],
            "train_seconds": statistics.median(summary["train_seconds"] for summary in mine),
        }
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The table as Markdown, with the command and the versions that made it."""
    environment = result["environment"]
    versions = ", ".join(
        f"{name} {environment['versions'][name]}" for name in ("sparseft", "torch", "transformers", "peft")
    )
    first = next(iter(result["variants"].values()))
    lines = [
        f"`{environment['command_line']}`",
        "",
        f"{len(result['seeds'])} seeds, held-out loss before training {first['eval_loss_before']:.4f}; {versions}, "
        f"{measured_on(result)}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "| --- " * len(COLUMNS) + "|",
    ]
    lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in table(result)]
    return "\n".join(lines) + "\n"


COLUMNS = ["variant", "held-out loss", "± sd", "− first", "± sd", "trained loss", "trainable", "learning rate"]


def table(result: dict[str, Any]) -> list[list[str]]:
    """The rows under `COLUMNS`, as text."""
    return [
        [
            name,
            f"{row['eval_loss']:.4f}",
            f"{row['eval_loss_sd']:.4f}" if row["eval_loss_sd"] is not None else "-",
            f"{row['difference']:+.4f}",
            f"{row['difference_sd']:.4f}" if row["difference_sd"] is not None else "-",
            f"{row['train_loss']:.4f}",
            f"{row['trainable_parameters']:,}",
            f"{row['learning_rate']:g}",
        ]
        for name, row in result["variants"].items()
    ]

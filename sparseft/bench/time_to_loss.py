"""Seconds until a held-out loss is reached: contenders on the same data, from the same base.

Of every variant (a method with its settings):

- at each of `bench.rates` it is trained once, and the rate with the lowest held-out loss is kept. These examples, and
  the seed, are of their own: the split of the seed after the last one that is reported, of the training data where the
  reported losses are those of `dataset.eval_path`;
- at that rate it is trained with every seed, and its held-out loss read every `trainer.eval_steps` steps;
- with a batch of the run's median size, the steps of all take turns with each other and with those of the frozen model
  (the floor), so that a machine's slow moments meet all of them.

The loss to be reached is where the first variant ends, seed by seed. The steps until then, interpolated between two
evaluations, times the seconds of a step, and the seconds that choosing what trains has taken (calibration, and each
re-selection before that step), are its time; all seeds take the same schedule to the end, so that who reaches the loss
does so before its rate has come down.

The trainings are ordinary runs in `runs/`. Interrupted, the benchmark goes on with those that are missing, and times
the steps anew: the numbers of steps may come from a busy machine, the times from a quiet one.
"""

from __future__ import annotations

import functools
import math
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparseft import console
from sparseft.bench import trials
from sparseft.bench.contenders import FLOOR, Contender, check_steps, made_trainable, step
from sparseft.bench.intervals import FEWEST_SEEDS, interval, shown
from sparseft.bench.jobs import Ahead, workers
from sparseft.bench.output import as_markdown, device_name, measured_on
from sparseft.bench.sharing import SharedWeights
from sparseft.bench.timing import attempt_each, failed_row, spread, take_turns
from sparseft.bench.trials import (
    Trial,
    check_same_data,
    check_trial,
    finished,
    folder_name,
    rates_of_seeds,
    shown_rates,
)
from sparseft.config import RunConfig
from sparseft.data.formats import counted
from sparseft.data.loading import data_of
from sparseft.data.packing import Collator, padding_id
from sparseft.errors import UserError
from sparseft.models.labelled_loss import usable
from sparseft.models.loading import load_model, load_tokenizer, resolve_device, vocabulary_rows
from sparseft.models.mixed_precision import multiply_as_trained
from sparseft.report.charts import Panel, Series, line_chart, standalone
from sparseft.runs.folder import METRICS
from sparseft.runs.metrics import read_metrics
from sparseft.training.arguments import micro_batches

CHART = "time-to-loss.svg"
Curve = list[tuple[int, float]]  # (step, held-out loss), in order


@dataclass
class Study(trials.Study):
    """What is compared."""

    own = ("bench.variants", "bench.seeds", "bench.rates", "bench.steps", "bench.warmup_steps", "output_dir", "seed")

    def check(self) -> None:
        for variant in self.variants:
            with self.of_variant(variant):
                for rate in self.rates_of(variant):
                    for choosing in (False, True):
                        seed = self.seeds[-1] + 1 if choosing else self.seeds[0]
                        trial = self.trial(variant, seed, rate, choosing)
                        _check(trial, self.config, choosing)
                        self.check_folder(trial)

    def trial(self, variant: str, seed: int, rate: float | None, choosing: bool = False) -> Trial:
        """One training, composed. rate: None: what the configuration says. choosing: it is to choose the rate."""
        changes = list(self.variants[variant])
        if choosing:
            changes += ["dataset.eval_path=null", "trainer.eval_steps=null"]
        trial = self.composed(changes, seed, rate)
        name = variant if rate is None else f"{variant} lr {rate:g}"
        place = Path("rates" if choosing else "runs", folder_name(name, seed))
        trial.output_dir = str(self.folder / place)
        trial.cache_dir = str(self.folder / "cache" / place)  # of its own: what another has chosen takes no time
        return Trial(variant, seed, trial)

    def summary(self, trial: Trial) -> dict[str, Any]:
        """What the trial's run says of itself; it is trained where it has not been."""
        if finished(trial) is None:
            shutil.rmtree(str(trial.config.cache_dir), ignore_errors=True)  # a selection found there would take no time
        return super().summary(trial)


def _check(trial: Trial, config: RunConfig, choosing: bool) -> None:
    """Refuses a training that could not start, or could not be held against the others."""
    if not choosing and not trial.config.trainer.eval_steps:
        raise UserError("bench time reads the held-out loss as it falls: give trainer.eval_steps.")
    if choosing and not trial.config.dataset.eval_fraction:
        raise UserError("bench time needs held-out examples to choose rates by: give dataset.eval_fraction.")
    if trial.config.method.reselects_running:
        raise UserError(
            "method.reselect_by=running makes a layer's whole gradient in each step, which the timed steps do not: use "
            "method.reselect_by=calibration, or method.reselect_steps=0."
        )
    check_same_data(trial, config, excepted="dataset.eval_path" if choosing else "")
    check_steps(trial.config, choosable=False)  # the steps are timed so
    check_trial(trial.config, "time")


def measure(study: Study) -> dict[str, Any]:
    """Every training, then the steps' times."""
    config, found = study.config, {}
    if config.bench.jobs > 1:
        _train_ahead(study)
    with console.Progress(len(study.variants), "bench time", unit="variant", plain_line_pause=0) as progress:
        for position, variant in enumerate(study.variants):
            found[variant] = _trained(study, variant)
            progress.update(position + 1)
    runs = {variant: study.trial(variant, study.seeds[0], entry["rate"]) for variant, entry in found.items()}
    seconds, failures = step_seconds({variant: trial.config for variant, trial in runs.items()}, config)
    floor = statistics.median(seconds.pop(FLOOR))
    first = next(iter(found))
    for variant, entry in found.items():
        if variant in failures:
            entry["step_failed"] = failures[variant]
            continue
        entry |= spread("step_seconds", seconds[variant]) | {"step_floors": statistics.median(seconds[variant]) / floor}
        if first in seconds:
            entry["step_error"] = step_error(seconds[variant], seconds[first])
    compare(found)
    return {
        "benchmark": "time",
        "model": config.model.path,
        "dataset": config.dataset.title,
        "dtype": config.model.dtype,
        "device": device_name(resolve_device(config.hardware.device)),
        "seeds": study.seeds,
        "floor_seconds": floor,
        "variants": found,
    }


def _train_ahead(study: Study) -> None:
    """All that is trained, several at once: what chooses the rates, then what is reported."""
    with workers(study.config.bench.jobs, study) as ahead:
        _ahead(ahead, Study.tried, [trial for variant in study.variants for trial in _choosing(study, variant)])
        rates = {variant: _chosen(study, variant)[0] for variant in study.variants}
        runs = [study.trial(variant, seed, rates[variant]) for variant in rates for seed in study.seeds]
        _ahead(ahead, Study.summary, runs)


def _ahead(ahead: Ahead, work: Callable[[Any, Any], object], trials: Sequence[Trial]) -> None:
    with console.Progress(len(trials), "bench time", unit="run", plain_line_pause=0) as progress:
        for count, _ in enumerate(ahead(work, trials), 1):
            progress.update(count)


def _choosing(study: Study, variant: str) -> list[Trial]:
    """The trainings that choose a variant's rate, one a rate; none where there is one rate."""
    rates = study.rates_of(variant)
    return [study.trial(variant, study.seeds[-1] + 1, rate, choosing=True) for rate in rates if len(rates) > 1]


def _chosen(study: Study, variant: str) -> tuple[float | None, list[tuple[float | None, float]]]:
    """A variant's rate, and the held-out loss of each: NaN where it diverged."""
    rates = study.rates_of(variant)
    trials = _choosing(study, variant)
    summaries = [study.tried(trial) for trial in trials]
    study.check_left(trials, summaries)
    losses = [
        (rate, math.nan if summary is None else summary["eval_loss_after"])
        for rate, summary in zip(rates, summaries, strict=False)
    ]
    return (min(losses, key=lambda each: (math.isnan(each[1]), each[1]))[0] if losses else rates[0]), losses


def _trained(study: Study, variant: str) -> dict[str, Any]:
    """A variant's rate, its curves by seed, and what choosing its units took."""
    best, losses = _chosen(study, variant)
    runs = [study.trial(variant, seed, best) for seed in study.seeds]
    summaries = [study.summary(trial) for trial in runs]
    every = getattr(runs[0].config.method, "reselect_steps", 0)
    return {
        "rate": best,
        **rates_of_seeds([summary["learning_rate"] for summary in summaries]),
        "rate_losses": losses,
        "at_edge": at_edge(best, [rate for rate, _ in losses]),
        "trainable_parameters": summaries[0]["trainable_parameters"],
        "steps": summaries[0]["steps"],
        "curves": [curve_of(Path(str(trial.config.output_dir))) for trial in runs],
        "selection_seconds": [each["selection_seconds"] or 0.0 for each in summaries],
        "reselect_steps": every,
        "reselection_seconds": [_each_time(summary, every) for summary in summaries],
    }


def at_edge(best: float | None, rates: Sequence[float | None]) -> bool:
    """Whether of three or more rates, in any order, the best is the lowest or the highest."""
    known = [rate for rate in rates if rate is not None]
    return len(known) > 2 and best in (min(known), max(known))


def _each_time(summary: Mapping[str, Any], every: int) -> float:
    """Seconds of one re-selection; there is none at the last step."""
    times = (summary["steps"] - 1) // every if every else 0
    return (summary["reselection_seconds"] or 0.0) / times if times else 0.0


def curve_of(run: Path) -> Curve:
    """The held-out loss of a run, by step."""
    rows = read_metrics(run / METRICS)
    return [(int(row["step"]), float(row["eval_loss"])) for row in rows if row.get("eval_loss") is not None]


def step_seconds(configs: Mapping[str, RunConfig], config: RunConfig) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each variant's step, and of the floor's, taken in turns: its own batches, passes and loss; and of
    variants whose step raised what it said. Where the floor's raises, or every variant's, that is raised."""
    device = resolve_device(config.hardware.device)
    tokenizer = load_tokenizer(config.model)
    base: Any = load_model(config.model, device)
    weights = SharedWeights(base)
    pad = padding_id(tokenizer, vocabulary_rows(base)[0])
    calls: dict[str, Callable[[], Any]] = {}
    contenders: dict[str, Contender] = {}
    failures: dict[str, str] = {}
    settings = {FLOOR: next(iter(configs.values())), **configs}

    def make(name: str) -> None:
        each = settings[name]
        method = None if name == FLOOR else each.method
        if method is not None and not method.trains_all:  # which trains as wide weights as it is set to
            method = method.for_benchmark()
        made = contenders[name] = made_trainable(name, weights, method)
        if method is not None:
            multiply_as_trained(made.model, method, base.dtype, device)
        made.labelled = usable(made.model, each)
        batch = {key: value.to(device) for key, value in median_batch(each, tokenizer, pad).items()}
        accumulation, clipped = micro_batches(each.trainer, each.hardware)[1], each.trainer.max_grad_norm or math.inf
        calls[name] = functools.partial(step, made, batch, accumulation, clipped)

    def failed(name: str, error: Exception) -> None:
        failures[name] = failed_row(error)["failed"]
        console.log(f"bench: the step of {name} failed: {failures[name]}")
        if name == FLOOR or len(failures) == len(configs):
            raise error
        weights.give(None)
        calls.pop(name, None)
        contenders.pop(name, None)

    try:
        attempt_each(settings, make, failed, device)
        seconds = take_turns(calls, config.bench, device, failed, prepare=lambda name: contenders[name].take_turn())
        return seconds, failures
    finally:
        weights.give(None)


def median_batch(config: RunConfig, tokenizer: Any, pad: int) -> dict[str, Tensor]:
    """Of what the model is given at once in training, in the data's order, that with the median number of labels among
    those of the median width (tokens of its longest row): a step's work depends on both."""
    data = data_of(config, tokenizer)
    rows: Any = data.packed if data.packed is not None else data.train
    size, settings = micro_batches(config.trainer, config.hardware)[0], config.trainer
    collate = Collator(pad, settings.max_length if settings.pad_to == "max_length" else 0)
    starts = range(0, max(1, len(rows) - size + 1), size)
    widths = {start: max(rows.lengths[start : start + size]) for start in starts}
    middle = statistics.median_low(widths.values())
    batches = [collate([rows[at] for at in range(start, min(start + size, len(rows)))])
               for start in starts if widths[start] == middle]  # fmt: skip
    return sorted(batches, key=lambda batch: int((batch["labels"] != -100).sum()))[(len(batches) - 1) // 2]


def compare(found: dict[str, dict[str, Any]]) -> None:
    """Adds to every variant its steps and seconds to the first one's last loss, seed by seed, and what they say."""
    first, reference = next(iter(found.items()))
    targets = [curve[-1][1] for curve in reference["curves"]]
    for own, entry in found.items():
        entry["final_losses"] = [curve[-1][1] for curve in entry["curves"]]
        entry["steps_to_loss"] = [reached(c, loss) for c, loss in zip(entry["curves"], targets, strict=True)]
        entry["seconds_to_loss"] = [
            None if steps is None or "step_failed" in entry else seconds_at(entry, seed, steps)
            for seed, steps in enumerate(entry["steps_to_loss"])
        ]
        each = zip(entry["seconds_to_loss"], reference["seconds_to_loss"], reference["steps_to_loss"], strict=True)
        entry["ratios"] = [mine / theirs if mine is not None and theirs and steps else None
                           for mine, theirs, steps in each]  # fmt: skip
        untimed = next((name for name in (first, own) if "step_failed" in found[name]), None)
        if untimed is not None:
            entry["verdict"] = f"the step of {untimed} failed"
        else:
            entry["verdict"] = "" if entry is reference else verdict(entry["ratios"], entry["step_error"])
    if "step_failed" not in reference and not all(reference["steps_to_loss"]):
        for entry in found.values():
            entry["verdict"] = f"{first} ends no lower than it began"


def seconds_at(entry: Mapping[str, Any], seed: int, steps: float) -> float:
    """Seconds of training until so many steps are done, with what choosing took until then."""
    every = entry["reselect_steps"]
    times = max(0, -(-steps // every) - 1) if every else 0  # those before that step is done
    chosen = entry["selection_seconds"][seed] + times * entry["reselection_seconds"][seed]
    return steps * entry["step_seconds"] + chosen


def reached(curve: Curve, loss: float) -> float | None:
    """The steps until the held-out loss is first at `loss` or below, straight between two evaluations; None: never."""
    before = None
    for at, value in curve:
        if value <= loss:
            if before is None:
                return float(at)
            (earlier, higher) = before
            return earlier + (at - earlier) * (higher - loss) / (higher - value)
        before = (at, value)
    return None


def step_error(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """Half the width of the 95 % interval of how long one step takes relative to another, of times taken in turns, as a
    share: the seeds have one measurement of it in common, so that they do not show it."""
    found = interval([a / b for a, b in zip(mine, theirs, strict=True)])
    assert found is not None
    mean, half = found
    return half / mean


def verdict(ratios: Sequence[float | None], of_step: float = 0.0) -> str:
    """What the ratios to the first variant's time say, by their 95 % interval. of_step: what the time of a step adds
    to it."""
    known = [ratio for ratio in ratios if ratio is not None]
    if not known:
        return "does not get there"
    if len(known) < len(ratios):
        return f"gets there with {len(known)} of {len(ratios)} seeds"
    if len(known) < FEWEST_SEEDS:
        return f"cannot tell from {counted(len(known), 'seed')}"
    found = interval(known)
    assert found is not None
    mean, half = found
    half = math.hypot(half, mean * of_step)
    return "faster" if mean + half < 1 else "slower" if mean - half > 1 else "cannot tell"


def charts(result: Mapping[str, Any]) -> dict[str, str]:
    """The held-out loss over the time, in steps of the frozen model: means over seeds, as an SVG file by its name."""
    lines = []
    for index, (name, entry) in enumerate(result["variants"].items()):
        if "step_failed" in entry:
            continue
        points = []
        for at, _ in entry["curves"][0]:
            losses = [dict(curve).get(at) for curve in entry["curves"]]
            times = [seconds_at(entry, seed, at) / result["floor_seconds"] for seed in range(len(losses))]
            known = [loss for loss in losses if loss is not None]
            points.append((statistics.fmean(times), statistics.fmean(known) if len(known) == len(losses) else None))
        lines.append(Series(name, points, index))
    first, reference = next(iter(result["variants"].items()))
    goal = statistics.fmean(reference["final_losses"])
    width = max(x for line in lines for x, _ in line.points)
    lines.append(Series("the loss to be reached", [(0.0, goal), (width, goal)], None))
    panel = Panel("held-out loss", lines, title=f"grey: where {first} ends")
    return {CHART: standalone(line_chart([[panel]], "time (steps of the frozen model)", height=380))}


def title(result: dict[str, Any]) -> str:
    """What was compared, in one line."""
    seeds = counted(len(result["seeds"]), "seed")
    return (
        f"Time to the held-out loss of {next(iter(result['variants']))}: {result['model']}, {result['dataset']}, "
        f"{seeds}, on {measured_on(result)}"
    )


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row for each variant: means with 95 % intervals over seeds."""
    first = next(iter(result["variants"]))
    columns = ["variant", "trainable", "rate", "last loss", "steps there", "step ms", "step ÷ floor", "seconds",
               "floors", f"÷ {first}", ""]  # fmt: skip
    rows = []
    for name, entry in result["variants"].items():
        floors = [None if s is None else s / result["floor_seconds"] for s in entry["seconds_to_loss"]]
        rows.append(
            [
                name,
                f"{entry['trainable_parameters']:,}",
                shown_rates(entry),
                shown(entry["final_losses"], 1, ".4f"),
                shown(entry["steps_to_loss"], 1, ".0f"),
                *(
                    ["-", "-"]
                    if "step_failed" in entry
                    else [f"{1000 * entry['step_seconds']:.0f}", f"{entry['step_floors']:.2f}"]
                ),
                shown(entry["seconds_to_loss"], 1, ".1f"),
                shown(floors, 1, ".0f"),
                shown(entry["ratios"], 1, ".2f"),
                entry["verdict"],
            ]
        )
    return columns, rows


def notes(result: dict[str, Any]) -> list[str]:
    """What the numbers are, what choosing took, and rates that may not be the best."""
    first = next(iter(result["variants"]))
    lines = [
        f"± 95 % intervals over seeds (Student's t); ÷ {first}: seed by seed; a floor, a step of the frozen model, "
        f"takes {1000 * result['floor_seconds']:.0f} ms"
    ]
    for name, entry in result["variants"].items():
        if "step_failed" in entry:
            lines.append(f"{name}: its step failed, so it has no times: {entry['step_failed']}")
        chosen = statistics.fmean(entry["selection_seconds"])
        if chosen >= 0.1 or entry["reselect_steps"]:
            again = (
                f", and {statistics.fmean(entry['reselection_seconds']):.1f} s every {entry['reselect_steps']} steps"
            )
            lines.append(f"{name}: choosing takes {chosen:.1f} s{again if entry['reselect_steps'] else ''}, counted")
        if entry["at_edge"]:
            lines.append(
                f"{name}: its rate {entry['rate']:g} is at the edge of bench.rates: a better one may lie beyond"
            )
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The table as Markdown, with the command and the versions that made it, and the notes."""
    lines = "".join(f"- {note}\n" for note in notes(result))
    return as_markdown(result, f"{len(result['seeds'])} seeds", *table(result)) + "\n" + lines

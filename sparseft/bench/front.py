"""What is learnt against what is forgotten: the front of each contender over its learning rates, and losses at equal
forgetting.

Every variant (a method with its settings) is trained at every rate of `bench.rates` with every seed, an ordinary run in
`runs/`. Its adapter is then loaded on the base, and two losses are read: the target's, on the run's held-out examples,
and the source's, on the files of `bench.source`, which nothing is trained on. Forgetting is the source's loss minus the
base's (the mean over the files).

- Both are read on a validation and on a test split: an example's own hash says in which it is, with whatever seed it
  was held out. Validation alone decides which rates go on after each seed (one that another rate of its variant beats
  in both losses, in the mean of the seeds so far, does not), which make up the front, and which is chosen (the lowest
  target loss). All that is reported is of the test split.
- A variant's target loss at a given forgetting is read off its front seed by seed, straight between two rates; where
  even its lowest rate forgets more there is none.
- At those of `bench.forgetting`, and where the first variant ends at its chosen rate, the difference to the first
  variant is taken seed by seed, with a bootstrap interval over the seeds and a verdict in words.
- At its chosen rate every variant is asked the tasks of `bench.target_tasks` and `bench.source_tasks`.

Interrupted, the benchmark goes on with the runs and the losses that are missing.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.bench import trials
from sparseft.bench.forgetting import SPLITS, TARGET, TEST, VALIDATION, Examples, Losses, read_each, read_examples
from sparseft.bench.front_tables import drawing, markdown, more_tables, notes, page, table, title
from sparseft.bench.jobs import Ahead, workers
from sparseft.bench.output import device_name
from sparseft.bench.pareto import beaten, bootstrap, read_off, verdict
from sparseft.bench.trials import Trial, check_same_data, check_trial, folder_name, rates_of_seeds
from sparseft.config import RunConfig
from sparseft.data.files import locate_file
from sparseft.errors import UserError
from sparseft.models.loading import load_tokenizer, resolve_device
from sparseft.report.charts import standalone
from sparseft.runs.folder import check_trained_on

__all__ = ["markdown", "more_tables", "notes", "page", "table", "title"]  # of a benchmark

BASE, CHART, PAGE = "base", "front.svg", "front.html"
LOSSES, TASKS = "losses", "tasks"


@dataclass
class Study(trials.Study):
    """What is compared."""

    own = ("bench.variants", "bench.seeds", "bench.source", "bench.forgetting", "bench.target_tasks",
           "bench.source_tasks", "output_dir", "seed")  # fmt: skip
    first = ("trainer.eval_steps=0",)  # what is held out is read once they are done

    def check(self) -> None:
        settings = self.config.bench
        if not settings.source:
            raise UserError(
                "bench.source is empty: name one or more files of what may be forgotten, as text or examples."
            )
        if len(set(settings.source)) < len(settings.source):
            raise UserError("bench.source names a file twice.")
        for path in settings.source:
            locate_file(path, key="bench.source")
        for level in settings.forgetting:
            if not (math.isfinite(level) and level > 0):
                raise UserError(f"bench.forgetting: {level:g} is no forgetting to compare at: expected nats above 0.")
        for variant in self.variants:
            with self.of_variant(variant):
                for rate in self.rates_of(variant):
                    trial = self.trial(variant, self.seeds[0], rate)
                    _check(trial, self.config)
                    self.check_folder(trial)

    def trial(self, variant: str, seed: int, rate: float | None) -> Trial:
        """One training, composed. rate: None: what the configuration says."""
        config = self.composed(self.variants[variant], seed, rate)
        name = variant if rate is None else f"{variant} lr {rate:g}"
        config.output_dir = str(self.folder / "runs" / folder_name(name, seed))
        return Trial(variant, seed, config)

    def kept(self, trial: Trial | None, seed: int, kind: str) -> tuple[Trial | None, Path]:
        """A run (None: the base) and where what was read of it lies: kind is LOSSES or TASKS."""
        name = folder_name(BASE, seed) if trial is None else Path(str(trial.config.output_dir)).name
        return trial, self.folder / "measured" / f"{name}-{kind}.json"

    def summary(self, trial: Trial) -> dict[str, Any]:
        """What the trial's run says of itself; it is trained where it has not been."""
        if trials.finished(trial) is None:
            for kind in (LOSSES, TASKS):
                self.kept(trial, trial.seed, kind)[1].unlink(missing_ok=True)  # of another training
        return super().summary(trial)

    def losses(self, runs: Sequence[Trial | None], seed: int, examples: Examples) -> list[Losses]:
        """Those of finished runs with one seed."""
        device = resolve_device(self.config.hardware.device)
        kept = [self.kept(trial, seed, LOSSES) for trial in runs]
        return list(read_each(self.config, kept, examples.key[seed], lambda m: examples.losses(m, seed, device)))


def _check(trial: Trial, config: RunConfig) -> None:
    """Refuses a training that could not start, or could not be held against the others."""
    check_same_data(trial, config)
    theirs, ours = (dataclasses.asdict(each.trainer) for each in (trial.config, config))
    own = ("learning_rate", "average", "eval_steps")
    differing = [key for key in theirs if theirs[key] != ours[key] and key not in own]
    if differing:
        raise UserError(f"it sets trainer.{differing[0]}, and all variants take one schedule.")
    check_trial(trial.config, "front", by_score=False)


def measure(study: Study) -> dict[str, Any]:
    """Every training, then what its model knows and has forgotten; seed by seed, as each drops hopeless rates."""
    config, seeds = study.config, study.seeds
    tests = _tests(config)
    first = next(iter(study.variants))
    of_first = [study.trial(first, seed, study.rates_of(first)[0]).config for seed in seeds]
    examples = read_examples(of_first, config.bench.source)
    console.log(f"bench: {examples.describe(seeds[0])}")
    start = time.perf_counter()
    of_base = [study.losses([None], seed, examples)[0] for seed in examples.first_alike(seeds)]
    console.log(f"bench: the base's losses took {time.perf_counter() - start:.0f} s")
    points = {
        variant: [Measured(rate, rate or math.nan) for rate in study.rates_of(variant)] for variant in study.variants
    }
    weights: dict[str, int] = {}
    done, total = 0, len(seeds) * sum(map(len, points.values()))
    with (
        console.Progress(total, "bench front", unit="run", plain_line_pause=0) as progress,
        workers(config.bench.jobs, (study, examples)) as ahead,
    ):
        for number, seed in enumerate(seeds):
            going = [(variant, point) for variant, each in points.items() for point in each if not point.dropped]
            runs = [study.trial(variant, seed, point.rate) for variant, point in going]
            for trial in runs:
                if trials.finished(trial) is not None:  # held-out examples of today may be among those it has learnt
                    where = Path(str(trial.config.output_dir))
                    check_trained_on(where, *examples.trained[seed], "Give the benchmark another output_dir.")
            for count, _ in enumerate(ahead(_train_and_read, runs), done + 1):
                progress.update(count)
            summaries = []
            for (variant, point), trial in zip(going, runs, strict=True):
                summaries.append(summary := study.tried(trial))
                if summary is not None:
                    weights.setdefault(variant, summary["trainable_parameters"])
                    point.learning_rate = summary["learning_rate"]
                    point.learning_rates.append(point.learning_rate)
                done += 1
                progress.update(max(done, progress.completed))
            for variant in points:
                mine = [at for at, trial in enumerate(runs) if trial.variant == variant]
                study.check_left([runs[at] for at in mine], [summaries[at] for at in mine])
            ended = [trial for trial, summary in zip(runs, summaries, strict=True) if summary is not None]
            read = iter(study.losses(ended, seed, examples))
            for (_, point), summary in zip(going, summaries, strict=True):
                point.add(None if summary is None else next(read), of_base[number])
            if seed != seeds[-1]:
                dropped = sum(drop_hopeless(each, number + 1) for each in points.values())
                done += dropped * (len(seeds) - number - 1)
                progress.update(done)
        result = {
            "benchmark": "front",
            "model": config.model.path,
            "dataset": config.dataset.train_path or config.dataset.name,
            "dtype": config.model.dtype,
            "device": device_name(resolve_device(config.hardware.device)),
            "seeds": seeds,
            "sources": config.bench.source,
            "levels": config.bench.forgetting,
            "base": {
                "target": [losses[TEST][TARGET] for losses in of_base],
                "sources": {path: of_base[0][TEST][path] for path in config.bench.source},
            },
            "variants": {
                variant: {"trainable_parameters": weights[variant], **chosen(each)} for variant, each in points.items()
            },
        }
        compare(result)
        if tests is not None:
            _ask(study, result, tests, ahead)
    return result | {"page": str(study.folder / PAGE)}


def charts(result: dict[str, Any]) -> dict[str, str]:
    """The front, as an SVG file by its name."""
    return {CHART: standalone(drawing(result))}


def _train_and_read(shared: tuple[Study, Examples], trial: Trial) -> None:
    study, examples = shared
    if study.tried(trial) is not None:
        study.losses([trial], trial.seed, examples)


@dataclass
class Measured:
    """A variant at one rate: what was read of it, by seed."""

    rate: float | None
    learning_rate: float = math.nan  # that of its trainings
    dropped: int | None = None  # seeds after which it was hopeless
    target: dict[str, list[float]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    forgetting: dict[str, list[float]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    sources: dict[str, list[float]] = field(default_factory=dict)  # the test loss of each
    learning_rates: list[float] = field(default_factory=list)  # of the trainings that ended: each may find its own

    def add(self, losses: Losses | None, of_base: Losses) -> None:
        """One more seed; losses: None where the training diverged."""
        for split in SPLITS:
            known = of_base[split] if losses is None else losses[split]
            mine = {what: math.nan if losses is None or loss is None else loss for what, loss in known.items()}
            before = of_base[split]
            self.target[split].append(mine.pop(TARGET))
            self.forgetting[split].append(statistics.fmean(loss - before[path] for path, loss in mine.items()))
        for path, loss in mine.items():
            self.sources.setdefault(path, []).append(loss)

    @property
    def source(self) -> list[float]:
        """The source's test loss, by seed: the mean over its files."""
        return [statistics.fmean(each) for each in zip(*self.sources.values(), strict=True)]

    @property
    def mean(self) -> tuple[float, float]:
        """(forgetting, target loss) on the validation split, over the seeds so far."""
        return statistics.fmean(self.forgetting[VALIDATION]), statistics.fmean(self.target[VALIDATION])


def drop_hopeless(points: Sequence[Measured], seeds: int) -> int:
    """Marks the rates that another one of those left beats in both losses, and returns how many; if no rate's losses
    are numbers, all stay."""
    left = [point for point in points if not point.dropped]
    hopeless = [point for point, out in zip(left, beaten([point.mean for point in left]), strict=True) if out]
    if len(hopeless) == len(left):
        return 0
    for point in hopeless:
        point.dropped = seeds
    return len(hopeless)


def chosen(points: Sequence[Measured]) -> dict[str, Any]:
    """A variant's rate, its front and all its points."""
    left = [point for point in points if not point.dropped]
    best = min(left, key=lambda point: (math.isnan(point.mean[1]), point.mean[1]))
    on_front = [point for point, out in zip(left, beaten([point.mean for point in left]), strict=True) if not out]
    rates = [point.learning_rate for point in points]
    return {
        **rates_of_seeds(best.learning_rates or [best.learning_rate]),
        "rate": best.rate,
        "at_edge": len(rates) > 2 and best.learning_rate in (min(rates), max(rates)),
        "target": best.target[TEST],
        "source": best.source,
        "forgetting": best.forgetting[TEST],
        "points": [
            {
                **rates_of_seeds(point.learning_rates or [point.learning_rate]),
                "dropped": point.dropped,
                "front": point in on_front,
                "target": point.target[TEST],
                "forgetting": point.forgetting[TEST],
                "sources": point.sources,
                "validation": {"target": point.target[VALIDATION], "forgetting": point.forgetting[VALIDATION]},
            }
            for point in points
        ],
    }


def compare(result: dict[str, Any]) -> None:
    """Adds to every variant, at each forgetting and at the first one's own, its losses and what they say."""
    first, reference = next(iter(result["variants"].items()))
    own = reference["forgetting"]
    seeds = range(len(result["seeds"]))
    for entry in result["variants"].values():
        entry["weights_over_first"] = entry["trainable_parameters"] / reference["trainable_parameters"]
        entry["at"] = []
        for level in [*result["levels"], None]:
            losses = [read_off(entry, seed, own[seed] if level is None else level) for seed in seeds]
            theirs = [read_off(reference, seed, own[seed] if level is None else level) for seed in seeds]
            row: dict[str, Any] = {"forgetting": level, "losses": losses}
            if any(loss is None for loss in losses):
                reached = sum(loss is not None for loss in losses)
                row["verdict"] = f"reached with {reached} of {len(losses)} seeds" if reached else "not reached"
            elif any(loss is None for loss in theirs):
                row["verdict"] = f"{first} does not reach it"
            else:
                row["differences"] = [a - b for a, b in zip(losses, theirs, strict=True)]
                row["verdict"] = ""
                if entry is not reference:
                    row["interval"] = bootstrap(row["differences"])
                    row["verdict"] = verdict(row["differences"])
            entry["at"].append(row)


def tests_of(config: RunConfig) -> list[str]:
    """The names of the evaluation tasks, each once."""
    return list(dict.fromkeys([*config.bench.target_tasks, *config.bench.source_tasks]))


def _tests(config: RunConfig) -> Any:
    """The evaluation tasks with their data; None where none are named."""
    tasks = tests_of(config)
    if not tasks:
        return None
    # Here, as `sparseft bench` runs where lm-eval and datasets are not installed.
    from sparseft.evaluation.run import prepare
    from sparseft.evaluation.tasks import data_folder

    return prepare(tasks, config.eval, data_dir=data_folder(config.eval, config.model.path))


def _ask(study: Study, result: dict[str, Any], tests: Any, ahead: Ahead) -> None:
    """Adds the accuracies of the base, and of every variant at its chosen rate, by task."""
    runs: list[Trial | None] = [None]
    for variant, entry in result["variants"].items():
        runs += [study.trial(variant, seed, entry["rate"]) for seed in study.seeds]
    console.log(f"bench: asking {len(runs)} models {', '.join(tests_of(study.config))}")
    for _ in ahead(_asked_ahead, runs):
        pass
    scores = list(asked(study, runs, tests))
    result["base"]["accuracy"] = scores.pop(0)
    for entry in result["variants"].values():
        mine, scores = scores[: len(study.seeds)], scores[len(study.seeds) :]
        entry["accuracy"] = {task: [each[task] for each in mine] for task in mine[0]}


def _asked_ahead(shared: tuple[Study, Examples], trial: Trial | None) -> None:
    study, _ = shared
    list(asked(study, [trial], _tests(study.config)))


def asked(study: Study, runs: Sequence[Trial | None], tests: Any) -> Iterator[dict[str, float]]:
    """The accuracies of each, by task."""
    from sparseft.evaluation.run import evaluate

    tasks, tokenizer = tests_of(study.config), load_tokenizer(study.config.model)

    def read(model: Any) -> dict[str, float]:
        scores = evaluate(model, tokenizer, tests)["tasks"]
        return {task: scores[task]["accuracy"] for task in tasks}

    kept = [study.kept(trial, study.seeds[0] if trial is None else trial.seed, TASKS) for trial in runs]
    key = {"tasks": tasks, "eval": dataclasses.asdict(study.config.eval), "asked": tests.digest()}
    return read_each(study.config, kept, key, read)

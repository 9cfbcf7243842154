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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.adapters.description import is_whole_model
from sparseft.adapters.lifecycle import detach, load_adapter
from sparseft.bench import trials
from sparseft.bench.held_out import data_of, held_out_loss
from sparseft.bench.intervals import shown
from sparseft.bench.output import Output, as_markdown, device_name, markdown_table, measured_on
from sparseft.bench.pareto import beaten, bootstrap, loss_at, verdict
from sparseft.bench.trials import Trial, check_same_data, folder_name, going_on, named_variants
from sparseft.config import DatasetConfig, RunConfig
from sparseft.data.loading import check_tokens, load_datasets
from sparseft.data.packing import padding_id
from sparseft.data.sampling import seeded_first
from sparseft.data.sources import locate_file
from sparseft.errors import UserError
from sparseft.files.atomic import write_json
from sparseft.files.untrusted import read_json_object
from sparseft.models.loading import load_model, load_tokenizer, resolve_device, vocabulary_rows
from sparseft.report.charts import WIDTH, Panel, Series, line_chart, standalone
from sparseft.runs.folder import ADAPTER
from sparseft.training import checks

OWN = ("bench.variants", "bench.seeds", "bench.source", "bench.forgetting", "bench.target_tasks", "bench.source_tasks",
       "output_dir", "seed")  # fmt: skip
BASE, CHART, PAGE = "base", "front.svg", "front.html"
SPLITS = ("validation", "test")
SOURCE_EXAMPLES = 256  # of each file, drawn by a fixed seed: a few ten thousand tokens tell a hundredth of a nat
EQUAL = 0.02  # share by which trained weights may differ and count as equal
Losses = dict[str, dict[str, float]]  # by split: of "target", and of each source


@dataclass
class Study(trials.Study):
    """What is compared, checked before the first run."""

    texts: dict[str, Path | None] = field(default_factory=dict)  # the source's files, None: of the hub

    def trial(self, variant: str, seed: int, rate: float | None) -> Trial:
        """One training, composed. rate: None: what the configuration says."""
        config = self.composed(self.variants[variant], seed, rate)
        name = variant if rate is None else f"{variant} lr {rate:g}"
        config.output_dir = str(self.folder / "runs" / folder_name(name, seed))
        return Trial(variant, seed, config)

    def measured(self, trial: Trial | None, seed: int, kind: str) -> Path:
        """Where what was measured of a run lies; None: of the base. kind: losses | tasks."""
        name = folder_name(BASE, seed) if trial is None else Path(str(trial.config.output_dir)).name
        return self.folder / "measured" / f"{name}-{kind}.json"


def run(
    config: RunConfig,
    output: Output,
    words: Sequence[str],
    config_dirs: Sequence[str],
    train: Callable[[RunConfig], dict[str, Any]],
) -> dict[str, Any]:
    """Trains and measures all of it, and returns what `bench.json` holds; interrupted, says how to go on.

    words, config_dirs: what `config` was composed from. train: trains one config and returns its summary.
    """
    folder = output.choose()
    study = plan(config, words, config_dirs, folder, train)
    with going_on(folder):
        result = measure(study)
    output.write(CHART, standalone(drawing(result)))
    return result | {"charts": [CHART]}


# ---- the plan ----


def plan(
    config: RunConfig,
    words: Sequence[str],
    config_dirs: Sequence[str],
    folder: Path,
    train: Callable[[RunConfig], dict[str, Any]],
) -> Study:
    """Reads and checks the settings; UserError where a run could not start."""
    variants, settings = named_variants(config), config.bench
    if not settings.source:
        raise UserError("bench.source is empty: name one or more files of what may be forgotten, as text or examples.")
    if len(set(settings.source)) < len(settings.source):
        raise UserError("bench.source names a file twice.")
    texts = {path: locate_file(path, key="bench.source") for path in settings.source}
    for level in settings.forgetting:
        if not (math.isfinite(level) and level > 0):
            raise UserError(f"bench.forgetting: {level:g} is no forgetting to compare at: expected nats above 0.")
    own = [word for word in words if word.partition("=")[0] not in OWN]
    study = Study(config, own, config_dirs, folder, variants, train, texts)
    folders: dict[str, str] = {}
    for variant in variants:
        try:
            rates = study.rates_of(variant)
            if len(set(rates)) < len(rates):
                raise UserError("bench.rates names a rate twice.")
            for rate in rates:
                trial = study.trial(variant, study.seeds[0], rate)
                if trial.config.output_dir in folders:
                    raise UserError(f"its folders would be those of '{folders[trial.config.output_dir]}'.")
                folders[str(trial.config.output_dir)] = variant
                _check(trial, config)
        except UserError as error:
            raise UserError(f"bench.variants: '{variant}': {error}") from None
    return study


def _check(trial: Trial, config: RunConfig) -> None:
    """Refuses a training that could not start, or could not be held against the others."""
    check_same_data(trial, config)
    theirs, ours = (dataclasses.asdict(each.trainer) for each in (trial.config, config))
    differing = [key for key in theirs if theirs[key] != ours[key] and key != "learning_rate"]
    if differing:
        raise UserError(f"it sets trainer.{differing[0]}, and all variants take one schedule.")
    data, trainer = trial.config.dataset, trial.config.trainer
    if not (data.eval_path or data.eval_fraction):
        raise UserError("bench front needs held-out examples: give dataset.eval_fraction or dataset.eval_path.")
    if trainer.keep_best or trainer.target_score is not None:
        which = "keep_best" if trainer.keep_best else "target_score"
        raise UserError(f"trainer.{which} looks at the held-out examples, of which bench front reports: leave it out.")
    checks.check_trainer(trial.config)
    checks.check_data(trial.config)
    checks.check_model(trial.config)


# ---- what is read ----


@dataclass
class Examples:
    """What losses are read on, by split: the target's of each seed, and those of each source."""

    target: dict[int, dict[str, list[Any]]]
    source: dict[str, dict[str, list[Any]]]
    key: dict[int, dict[str, str]]  # by seed: which examples they are
    pad: int


def read_examples(study: Study, tokenizer: Any, vocabulary: tuple[int, int]) -> Examples:
    """Reads them all, so that what is missing is said before the first run.

    vocabulary: rows of the model's embeddings and of its head.
    """
    config, target, keys = study.config, {}, {}
    first = next(iter(study.variants))
    source, of_source = {}, {}
    for path in study.texts:
        settings = DatasetConfig(name="text", train_path=path, eval_fraction=0.0, too_long=config.dataset.too_long)
        with console.quiet():
            data = load_datasets(
                settings, tokenizer, max_length=config.trainer.max_length, seed=0, bundled=False,
                cache_dir=config.cache_dir,
            )  # fmt: skip
        check_tokens(data, tokenizer, *vocabulary)
        few = sorted(seeded_first(min(SOURCE_EXAMPLES, len(data.train)), len(data.train), 0, "source"))
        taken = list(data.train.example_keys())
        source[path] = halves([data.train[at] for at in few], [taken[at] for at in few], f"bench.source: '{path}'")
        of_source[path] = data.fingerprint
    for seed in study.seeds:
        with console.quiet():
            data = data_of(study.trial(first, seed, study.rates_of(first)[0]).config, tokenizer)
        for path, file in study.texts.items():
            if path == data.train_source or (file is not None and file == _file_of(data.train_source)):
                raise UserError(f"bench.source: '{path}' is what is trained on, so it cannot say what is forgotten.")
        rows = data.eval
        if rows is None:
            raise UserError("bench front needs held-out examples, and there are none.")
        target[seed] = halves([rows[at] for at in range(len(rows))], list(rows.example_keys()), "the held-out examples")
        keys[seed] = {"target": rows.fingerprint(), **of_source}
    return Examples(target, source, keys, padding_id(tokenizer, vocabulary[0]))


def _file_of(source: str) -> Path | None:
    return locate_file(source) if source else None


def halves(rows: Sequence[Any], keys: Sequence[bytes], what: str) -> dict[str, list[Any]]:
    """Examples by split, by their own hashes: with whatever seed an example is held out, it is in the same one."""
    found: dict[str, list[Any]] = {name: [] for name in SPLITS}
    for row, key in zip(rows, keys, strict=True):
        found[SPLITS[key[0] % 2]].append(row)
    if not all(found.values()):
        raise UserError(f"{what} are too few for a validation and a test split ({len(rows)}): give more of them.")
    return found


def read_losses(study: Study, runs: Sequence[Trial | None], seed: int, examples: Examples) -> dict[str, Losses]:
    """The losses of runs (None: the base) with a seed, by the run's folder; what was read before is not read again."""
    found = {}
    device = resolve_device(study.config.hardware.device)

    def read(model: Any) -> Losses:
        return {
            split: {
                "target": held_out_loss(model, examples.target[seed][split], examples.pad, device),
                **{path: held_out_loss(model, rows[split], examples.pad, device)
                   for path, rows in examples.source.items()},
            }
            for split in SPLITS
        }  # fmt: skip

    for trial, losses in _each(study, runs, seed, "losses", examples.key[seed], read):
        found[_name(trial)] = losses
    return found


def _name(trial: Trial | None) -> str:
    return BASE if trial is None else Path(str(trial.config.output_dir)).name


def _each(
    study: Study, runs: Sequence[Trial | None], seed: int, kind: str, key: Any, read: Callable[[Any], Any]
) -> list[tuple[Trial | None, Any]]:
    """What `read(model)` says of each run's model, loaded on one base, which is left as it was.

    key: what it depends on besides the run: what was read by the same one is taken from its file.
    """
    found, base = [], None
    device = resolve_device(study.config.hardware.device)
    for trial in runs:
        path = study.measured(trial, seed, kind)
        if path.is_file() and (there := read_json_object(path)).get("key") == key:
            found.append((trial, there[kind]))
            continue
        folder = None if trial is None else Path(str(trial.config.output_dir)) / ADAPTER
        with console.quiet():
            if folder is not None and is_whole_model(folder):
                whole = dataclasses.replace(study.config.model, path=str(folder), revision=None)
                content = read(load_model(whole, device).eval())
            else:
                base = load_model(study.config.model, device).eval() if base is None else base
                if folder is None:
                    content = read(base)
                else:
                    model = load_adapter(base, folder).eval()
                    content = read(model)
                    base = detach(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, kind: content})
        found.append((trial, read_json_object(path)[kind]))  # as a later call finds it
    return found


# ---- all of it ----


def measure(study: Study) -> dict[str, Any]:
    """Every training, then what its model knows and has forgotten; seed by seed, as each drops hopeless rates."""
    config = study.config
    tests = _tests(config)
    tokenizer = load_tokenizer(config.model)
    base: Any = load_model(config.model)
    vocabulary = vocabulary_rows(base)
    del base
    examples = read_examples(study, tokenizer, vocabulary)
    of_base = {seed: read_losses(study, [None], seed, examples)[BASE] for seed in study.seeds}
    points = {variant: [Measured(rate) for rate in study.rates_of(variant)] for variant in study.variants}
    weights: dict[str, int] = {}
    total = len(study.seeds) * sum(map(len, points.values()))
    done = 0
    with console.Progress(total, "bench front", unit="run", plain_line_pause=0) as progress:
        for number, seed in enumerate(study.seeds):
            going = [(variant, point) for variant, each in points.items() for point in each if not point.dropped]
            runs = []
            for variant, point in going:
                trial = study.trial(variant, seed, point.rate)
                if trials.finished(trial) is None:
                    for kind in ("losses", "tasks"):
                        study.measured(trial, seed, kind).unlink(missing_ok=True)
                summary = study.summary(trial)
                weights.setdefault(variant, summary["trainable_parameters"])
                point.learning_rate, point.steps = summary["learning_rate"], summary["steps"]
                runs.append(trial)
                done += 1
                progress.update(done)
            losses = read_losses(study, runs, seed, examples)
            for (_, point), trial in zip(going, runs, strict=True):
                point.add(losses[_name(trial)], of_base[seed])
            if seed != study.seeds[-1]:
                for each in points.values():
                    drop_hopeless(each, number + 1)
                done = total - (len(study.seeds) - number - 1) * sum(not p.dropped for e in points.values() for p in e)
                progress.update(done)
    result = {
        "benchmark": "front",
        "model": config.model.path,
        "dataset": config.dataset.train_path or config.dataset.name,
        "dtype": config.model.dtype,
        "device": device_name(resolve_device(config.hardware.device)),
        "seeds": study.seeds,
        "sources": list(study.texts),
        "base": {
            "target": [of_base[seed]["test"]["target"] for seed in study.seeds],
            "sources": {path: of_base[study.seeds[0]]["test"][path] for path in study.texts},
        },
        "variants": {
            variant: {"trainable_parameters": weights[variant], **chosen(each)} for variant, each in points.items()
        },
        "levels": config.bench.forgetting,
        "tasks": {"target": config.bench.target_tasks, "source": config.bench.source_tasks},
    }
    compare(result)
    if tests is not None:
        _ask(study, result, tokenizer, tests)
    return result


@dataclass
class Measured:
    """A variant at one rate: what was read of it, by seed."""

    rate: float | None
    learning_rate: float = math.nan
    steps: int = 0
    dropped: int | None = None  # seeds after which it was hopeless
    target: dict[str, list[float]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    forgetting: dict[str, list[float]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    sources: dict[str, list[float]] = field(default_factory=dict)  # the test loss of each

    def add(self, losses: Losses, of_base: Losses) -> None:
        """One more seed."""
        for split in SPLITS:
            mine = {what: math.nan if loss is None else loss for what, loss in losses[split].items()}
            before = of_base[split]
            self.target[split].append(mine.pop("target"))
            self.forgetting[split].append(statistics.fmean(loss - before[path] for path, loss in mine.items()))
        for path, loss in mine.items():
            self.sources.setdefault(path, []).append(loss)

    @property
    def mean(self) -> tuple[float, float]:
        """(forgetting, target loss) on the validation split, over the seeds so far."""
        return statistics.fmean(self.forgetting["validation"]), statistics.fmean(self.target["validation"])


def drop_hopeless(points: Sequence[Measured], seeds: int) -> None:
    """Marks the rates that another one, of those left, beats in both losses; all of them, if none is a number, stay."""
    left = [point for point in points if not point.dropped]
    hopeless = beaten([point.mean for point in left])
    for point, is_hopeless in zip(left, hopeless, strict=True):
        if is_hopeless and not all(hopeless):
            point.dropped = seeds


def chosen(points: Sequence[Measured]) -> dict[str, Any]:
    """A variant's rate, its front and all its points."""
    left = [point for point in points if not point.dropped]
    best = min(left, key=lambda point: (math.isnan(point.mean[1]), point.mean[1]))
    on_front = [point for point, out in zip(left, beaten([point.mean for point in left]), strict=True) if not out]
    rates = [point.learning_rate for point in points]
    return {
        "learning_rate": best.learning_rate,
        "rate": best.rate,
        "steps": best.steps,
        "at_edge": len(rates) > 2 and best.learning_rate in (min(rates), max(rates)),
        "target": best.target["test"],
        "forgetting": best.forgetting["test"],
        "points": [
            {
                "learning_rate": point.learning_rate,
                "dropped": point.dropped,
                "front": point in on_front,
                "target": point.target["test"],
                "forgetting": point.forgetting["test"],
                "sources": point.sources,
                "validation": {"target": point.target["validation"], "forgetting": point.forgetting["validation"]},
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


def read_off(entry: Mapping[str, Any], seed: int, forgetting: float) -> float | None:
    """A variant's target loss at a forgetting, with the seed at that position: `pareto.loss_at` on its front."""
    return loss_at([(p["forgetting"][seed], p["target"][seed]) for p in entry["points"] if p["front"]], forgetting)


def _tests(config: RunConfig) -> Any:
    """The evaluation tasks with their data; None where none are named."""
    tasks = [*config.bench.target_tasks, *config.bench.source_tasks]
    if not tasks:
        return None
    # Here, as `sparseft bench` runs where lm-eval and datasets are not installed.
    from sparseft.evaluation.run import prepare
    from sparseft.evaluation.tasks import data_folder

    return prepare(list(dict.fromkeys(tasks)), config.eval, data_dir=data_folder(config.eval, config.model.path))


def _ask(study: Study, result: dict[str, Any], tokenizer: Any, tests: Any) -> None:
    """Adds the accuracies of the base, and of every variant at its chosen rate, by task."""
    from sparseft.evaluation.run import evaluate

    tasks = list(dict.fromkeys(task for each in result["tasks"].values() for task in each))
    key = {"tasks": tasks, "eval": dataclasses.asdict(study.config.eval)}

    def read(model: Any) -> dict[str, float]:
        scores = evaluate(model, tokenizer, tests)["tasks"]
        return {task: scores[task]["accuracy"] for task in tasks}

    ((_, result["base"]["accuracy"]),) = _each(study, [None], study.seeds[0], "tasks", key, read)
    for variant, entry in result["variants"].items():
        by_seed = []
        for seed in study.seeds:
            console.log(f"bench: asking {variant}, seed {seed}")
            ((_, scores),) = _each(study, [study.trial(variant, seed, entry["rate"])], seed, "tasks", key, read)
            by_seed.append(scores)
        entry["accuracy"] = {task: [scores[task] for scores in by_seed] for task in tasks}


# ---- what is shown ----


def title(result: dict[str, Any]) -> str:
    """What was compared, in one line."""
    seeds = len(result["seeds"])
    return (
        f"Learnt against forgotten: {result['model']} to {result['dataset']}, source {', '.join(result['sources'])}, "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}, on {measured_on(result)}"
    )


def level_name(level: float | None, result: Mapping[str, Any]) -> str:
    """`0.05`, or the first variant's own forgetting: `LoRA's 0.94`."""
    if level is not None:
        return f"{level:g}"
    first, reference = next(iter(result["variants"].items()))
    return f"{first}'s {statistics.fmean(reference['forgetting']):.3f}"


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row for the base and each variant at its chosen rate, with what it says at each forgetting."""
    tasks = result["base"].get("accuracy", {})
    columns = ["variant", "trainable", "rate", "target loss", "forgotten", *(f"{task}, %" for task in tasks)]
    columns += [f"at {level_name(level, result)}" for level in [*result["levels"], None]]
    base = [BASE, "", "", shown(result["base"]["target"], 1, ".3f"), "", *(f"{100 * x:.1f}" for x in tasks.values())]
    rows = [base + [""] * (len(columns) - len(base))]
    for name, entry in result["variants"].items():
        row = [
            name,
            f"{entry['trainable_parameters']:,}",
            f"{entry['learning_rate']:g}",
            shown(entry["target"], 1, ".3f"),
            shown(entry["forgetting"], 1, ".3f"),
            *(shown(entry["accuracy"][task], 100, ".1f") for task in tasks),
        ]
        for at in entry["at"]:
            known = statistics.fmean(at["differences"]) if "interval" in at else None
            loss = "" if None in at["losses"] else f"{statistics.fmean(at['losses']):.3f}"
            row.append(at["verdict"] if known is None and not loss else f"{loss} {at['verdict']}".strip())
        rows.append(row)
    return columns, rows


def at_equal_forgetting(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row for each forgetting and variant that reaches it, with the interval of its difference."""
    first = next(iter(result["variants"]))
    rows = []
    for position, level in enumerate([*result["levels"], None]):
        for name, entry in result["variants"].items():
            at = entry["at"][position]
            if all(loss is None for loss in at["losses"]):
                continue
            known = "interval" in at
            rows.append(
                [
                    level_name(level, result),
                    name,
                    shown(at["losses"], 1, ".4f"),
                    f"{statistics.fmean(at['differences']):+.4f}" if known else "",
                    "[{:+.4f}, {:+.4f}]".format(*at["interval"]) if known else "",
                    at["verdict"],
                ]
            )
    return ["forgotten", "variant", "target loss", f"− {first}", "95 %", ""], rows


def all_points(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row for each variant and rate, on the test split."""
    several = len(result["sources"]) > 1
    columns = ["variant", "rate", "target loss", "forgotten", *(result["sources"] if several else []), ""]
    rows = []
    for name, entry in result["variants"].items():
        for point in entry["points"]:
            what = f"dropped after {_seeds(point['dropped'])}" if point["dropped"] else ""
            if point["learning_rate"] == entry["learning_rate"]:
                what = "chosen"
            elif not (what or point["front"]):
                what = "not on the front"
            rows.append(
                [
                    name,
                    f"{point['learning_rate']:g}",
                    shown(point["target"], 1, ".4f"),
                    shown(point["forgetting"], 1, ".4f"),
                    *(shown(losses, 1, ".4f") for losses in point["sources"].values() if several),
                    what,
                ]
            )
    return columns, rows


def _seeds(count: int) -> str:
    return f"{count} {'seed' if count == 1 else 'seeds'}"


def notes(result: dict[str, Any]) -> list[str]:
    """What the numbers are, whose weights are not as many, and rates that may not be the best."""
    first = next(iter(result["variants"]))
    lines = [
        "target loss and forgotten (the source's loss minus the base's, nats) are of the test split, rates chosen on "
        "the validation split; ± 95 % intervals over seeds (Student's t)",
        f"at a forgetting: the target loss on the variant's front, against {first}'s; ahead or behind where the "
        "bootstrap interval over seeds and Student's t both leave out 0",
    ]
    for name, entry in result["variants"].items():
        ratio = entry["weights_over_first"]
        if abs(ratio - 1) > EQUAL:
            lines.append(f"{name} trains {ratio:.3g} times as many weights as {first}: not of equal size")
        if entry["at_edge"]:
            lines.append(f"{name}: its rate {entry['learning_rate']:g} is at the edge: a better one may lie beyond")
        least = min((statistics.fmean(p["forgetting"]) for p in entry["points"] if p["front"]), default=math.nan)
        if any(at["verdict"] == "not reached" for at in entry["at"]):
            lines.append(f"{name}: not reached: it forgets {least:.3f} at the least; a lower rate would forget less")
        gone = [f"{p['learning_rate']:g} after {_seeds(p['dropped'])}" for p in entry["points"] if p["dropped"]]
        if gone:
            lines.append(f"{name}: dropped, as another rate beats them in both validation losses: {', '.join(gone)}")
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The tables as Markdown, with the command and the versions that made them, and the notes."""
    lines = "".join(f"- {note}\n" for note in notes(result))
    parts = [as_markdown(result, _seeds(len(result["seeds"])), *table(result)), lines]
    for columns, rows in (at_equal_forgetting(result), all_points(result)):
        parts.append(markdown_table(columns, rows))
    return "\n".join(parts)


def drawing(result: Mapping[str, Any], width: int = WIDTH) -> str:
    """The fronts: means over seeds of the test split, as an SVG."""
    lines = []
    for index, (name, entry) in enumerate(result["variants"].items()):
        points = [(statistics.fmean(p["forgetting"]), statistics.fmean(p["target"]))
                  for p in entry["points"] if p["front"]]  # fmt: skip
        lines.append(Series(name, sorted(points), index, markers=True))
    return line_chart(
        [[Panel("target loss", lines)]], "forgotten (nats of the source)", height=420, width=width, whole=False
    )

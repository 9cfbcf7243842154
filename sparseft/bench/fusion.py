"""Two skills trained apart and put together: what a sum of adapters keeps of each (Table 5 of the S2FT paper).

Of every variant (a method with its settings) and seed:

- each skill is trained alone, an ordinary run in `runs/`; with the first seed at every rate of `bench.rates`, of which
  that with the lowest held-out loss is kept for all seeds;
- a sparse method trains every skill but the first once more, with `method.exclude` naming those before it;
- `sparseft.fuse` adds the adapters up, with the one weight of `bench.weights` for all that gives the lowest mean of the
  skills' held-out losses with the first seed;
- alone and fused, each is asked both skills' test questions, and its held-out losses are measured.

Held out are examples of the training data (`dataset.eval_fraction`): the test questions choose nothing. Interrupted,
the benchmark goes on with the runs and the scores that are missing.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.adapters.lifecycle import detach, fuse, load_adapter, set_adapter
from sparseft.bench import trials
from sparseft.bench.intervals import shown
from sparseft.bench.output import as_markdown, device_name, measured_on
from sparseft.bench.trials import Trial, check_trial, folder_name, named_settings
from sparseft.config import RunConfig
from sparseft.data.loading import data_of
from sparseft.data.packing import padding_id
from sparseft.errors import UserError
from sparseft.evaluation.held_out import held_out_loss
from sparseft.files.atomic import write_json
from sparseft.files.hashing import adapter_hash
from sparseft.files.untrusted import read_json_object
from sparseft.models.loading import load_model, load_tokenizer, resolve_device, vocabulary_rows
from sparseft.runs.folder import ADAPTER, SELECTION
from sparseft.selection.selection import Selection

BASE, APART = "base", ", disjoint"


@dataclass
class Study(trials.Study):
    """What is compared."""

    own = ("bench.variants", "bench.seeds", "bench.skills", "bench.rates", "bench.weights", "output_dir", "seed")

    of_base: dict[str, dict[str, float]] = field(default_factory=dict, init=False)  # its accuracies, by its settings

    def __post_init__(self) -> None:
        super().__post_init__()
        # The settings of each, by its name, which is its evaluation task's.
        self.skills = dict(named_settings("bench.skills", self.config.bench.skills))

    @staticmethod
    def named(config: RunConfig) -> dict[str, list[str]]:
        variants = dict(named_settings("bench.variants", config.bench.variants))
        if not variants or len(variants) < len(config.bench.variants):
            raise UserError("bench.variants: name at least one variant, each once.")
        return variants

    def check(self) -> None:
        settings = self.config.bench
        if len(self.skills) < 2 or len(self.skills) < len(settings.skills):
            raise UserError("bench.skills: name at least two skills, each once, by the tasks that ask for them.")
        if not settings.weights:
            raise UserError("bench.weights is empty: name at least one weight of the summands.")
        for variant, skill in itertools.product(self.variants, self.skills):
            trials = [self.trial(variant, skill, self.seeds[0], rate) for rate in self.rates_of(variant)]
            if trials[0].config.method.trains_all:
                raise UserError(f"bench.variants: '{variant}' trains whole models, which have no sum of adapters.")
            with self.of_variant(variant):
                check_trial(trials[0].config, "fusion")
                for trial in trials:
                    self.check_folder(trial)

    def trial(self, variant: str, skill: str, seed: int, rate: float | None, exclude: Sequence[str] = ()) -> Trial:
        """One training, composed and checked."""
        trial = self.composed([*self.variants[variant], *self.skills[skill]], seed, rate)
        name = f"{variant} {skill}{APART if exclude else ''}" + (f" lr {rate:g}" if rate is not None else "")
        if exclude:
            trial.method = dataclasses.replace(trial.method, exclude=list(exclude))
        trial.output_dir = str(self.folder / "runs" / folder_name(name, seed))
        return Trial(variant, seed, trial)

    def summary(self, trial: Trial) -> dict[str, Any]:
        """What the trial's run says of itself; it is trained where it has not been."""
        summary = super().summary(trial)
        if summary["eval_loss_after"] is None:
            name = Path(str(trial.config.output_dir)).name
            raise UserError(f"bench fusion chooses by held-out loss, and {name} has no evaluation examples.")
        return summary


def measure(study: Study) -> dict[str, Any]:
    """Every training, sum and score; the first seed comes first, as it chooses rates and weights."""
    config = study.config
    # Here, as `sparseft bench` and the session for a GPU run where lm-eval and datasets are not installed.
    from sparseft.evaluation.run import prepare
    from sparseft.evaluation.tasks import data_folder

    tests = prepare(list(study.skills), config.eval, data_dir=data_folder(config.eval, config.model.path))
    found: dict[str, dict[str, Any]] = {}
    for variant in study.variants:
        found[variant] = {"rates": _choose_rates(study, variant), "weight": {}, "overlap": [], "ways": {}}
    total = len(study.seeds) * len(study.variants)
    with console.Progress(total, "bench fusion", unit="variant", plain_line_pause=0) as progress:
        for number, seed in enumerate(study.seeds):
            for position, variant in enumerate(study.variants):
                _measure_one(study, variant, seed, found[variant], tests)
                progress.update(number * len(study.variants) + position + 1)
    return {
        "benchmark": "fusion",
        "model": config.model.path,
        "dtype": config.model.dtype,
        "device": device_name(resolve_device(config.hardware.device)),
        "seeds": study.seeds,
        "skills": list(study.skills),
        "variants": {name: entry | _summary(entry["ways"], list(study.skills)) for name, entry in found.items()},
    }


def _choose_rates(study: Study, variant: str) -> dict[str, dict[str, Any]]:
    """Of each skill the rate with the lowest held-out loss, with the first seed, and what each rate came to: NaN where
    its training diverged."""
    chosen = {}
    for skill in study.skills:
        runs = {rate: study.trial(variant, skill, study.seeds[0], rate) for rate in study.rates_of(variant)}
        summaries = {rate: study.tried(run) for rate, run in runs.items()}
        study.check_left(list(runs.values()), list(summaries.values()))
        losses = {rate: math.nan if of is None else of["eval_loss_after"] for rate, of in summaries.items()}
        best = min(losses, key=lambda rate: (math.isnan(losses[rate]), losses[rate]))
        chosen[skill] = {"rate": best, "losses": [[rate, loss] for rate, loss in losses.items()]}
    return chosen


def _measure_one(study: Study, variant: str, seed: int, found: dict[str, Any], tests: Any) -> None:
    """Adds one seed's numbers of a variant to what is found so far."""
    rates = {skill: found["rates"][skill]["rate"] for skill in study.skills}
    alone = {skill: study.trial(variant, skill, seed, rates[skill]) for skill in study.skills}
    runs = dict(alone)
    for trial in alone.values():
        study.summary(trial)
    sparse = next(iter(alone.values())).config.method.sparse
    apart: dict[str, str] = {}  # the disjoint sum's adapters, by skill
    if sparse:
        for skill in study.skills:
            name = skill
            if apart:
                name = skill + APART
                before = [str(runs[other].config.output_dir) for other in apart.values()]
                runs[name] = study.trial(variant, skill, seed, rates[skill], before)
                study.summary(runs[name])
            apart[skill] = name
        selections = [Selection.load(Path(str(t.config.output_dir)) / SELECTION) for t in alone.values()]
        found["overlap"].append(mean_overlap(selections))
    sums = {"fused": list(study.skills)} | ({f"fused{APART}": list(apart.values())} if sparse else {})
    scores = _scores(study, variant, seed, runs, sums, found["weight"], tests)
    for way, by_skill in scores.items():
        for skill, numbers in by_skill.items():
            entry = found["ways"].setdefault(way, {}).setdefault(skill, {"accuracy": [], "eval_loss": [], "kept": []})
            entry["accuracy"].append(numbers["accuracy"])
            entry["eval_loss"].append(numbers["eval_loss"])
            before, own = (scores[name][skill]["accuracy"] for name in (BASE, skill))
            entry["kept"].append((numbers["accuracy"] - before) / (own - before) if own > before else None)


def mean_overlap(selections: Sequence[Selection]) -> float:
    """The mean overlap of two selections or more, over all pairs."""
    return statistics.fmean(overlap(first, second) for first, second in itertools.combinations(selections, 2))


def overlap(first: Selection, second: Selection) -> float:
    """The share of the second selection's rows, columns or blocks that the first has too."""

    def units(selection: Selection) -> Iterator[tuple[Any, ...]]:
        for module, kinds in selection.modules.items():
            for kind, index in kinds.items():
                yield from ((module, kind, *row) for row in index.reshape(len(index), -1).tolist())

    known, mine = set(units(first)), list(units(second))
    return sum(unit in known for unit in mine) / len(mine)


def _scores(
    study: Study,
    variant: str,
    seed: int,
    runs: dict[str, Trial],
    sums: dict[str, list[str]],
    weights: dict[str, float],
    tests: Any,
) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy and held-out loss of the base, each run and each sum on every skill: `{way: {skill: …}}`.

    weights: of each sum, chosen with the first seed and added here. What was measured before is read, and a base is
    asked once.
    """
    folders = {name: Path(str(trial.config.output_dir)) / ADAPTER for name, trial in runs.items()}
    path = study.folder / "scores" / f"{folder_name(variant, seed)}.json"
    key = {
        "adapters": {name: adapter_hash(folder) for name, folder in folders.items()},
        "weights": study.config.bench.weights if not weights else weights,
        "eval": dataclasses.asdict(study.config.eval),
        "asked": tests.digest(),
    }
    config = next(iter(runs.values())).config
    base = f"{config.model} {config.hardware.device}"
    if path.is_file() and (there := read_json_object(path)).get("key") == key:
        weights |= there["weights"]
        study.of_base[base] = {skill: numbers["accuracy"] for skill, numbers in there["scores"][BASE].items()}
        return there["scores"]
    device = resolve_device(config.hardware.device)
    tokenizer = load_tokenizer(config.model)
    model: Any = load_model(config.model, device).eval()
    pad = padding_id(tokenizer, vocabulary_rows(model)[0])
    held = {skill: data_of(runs[skill].config, tokenizer).eval for skill in study.skills}

    def losses() -> dict[str, float]:
        return {skill: held_out_loss(model, rows, pad, device) for skill, rows in held.items()}

    def ask(name: str) -> dict[str, float]:
        console.log(f"bench: asking {variant}, {name}, seed {seed}")
        from sparseft.evaluation.run import evaluate

        tasks = evaluate(model, tokenizer, tests)["tasks"]
        return {skill: tasks[skill]["accuracy"] for skill in study.skills}

    def score(accuracies: dict[str, float]) -> dict[str, dict[str, float]]:
        found = losses()
        return {s: {"accuracy": accuracies[s], "eval_loss": found[s]} for s in study.skills}

    if base not in study.of_base:
        study.of_base[base] = ask(BASE)
    scores = {BASE: score(study.of_base[base])}
    for name, folder in folders.items():
        model = load_adapter(model, folder, name).eval()
    for name in folders:
        set_adapter(model, name)
        scores[name] = score(ask(name))
    chosen = dict(weights)
    for name, parts in sums.items():
        if name not in chosen:
            means = {}
            for weight in study.config.bench.weights:
                fuse(model, dict.fromkeys(parts, weight), name)
                means[weight] = statistics.fmean(losses().values())
            chosen[name] = min(means, key=lambda weight: means[weight])
        fuse(model, dict.fromkeys(parts, chosen[name]), name)
        scores[name] = score(ask(name))
    detach(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"key": key, "weights": chosen, "scores": scores})
    weights |= chosen
    return scores


def _summary(ways: dict[str, Any], skills: list[str]) -> dict[str, Any]:
    """What disjoint adapters gain over overlapping ones, seed by seed."""
    if f"fused{APART}" not in ways:
        return {}
    gained = {}
    for skill in skills:
        one, two = ways["fused"][skill], ways[f"fused{APART}"][skill]
        gained[skill] = {
            what: [b - a for a, b in zip(one[what], two[what], strict=True)] for what in ("accuracy", "eval_loss")
        }
    return {"disjoint - overlapping": gained}


def title(result: dict[str, Any]) -> str:
    """What was compared, in one line."""
    seeds = len(result["seeds"])
    return f"Fusion of {' and '.join(result['skills'])}: {result['model']}, {seeds} seeds, on {measured_on(result)}"


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row for the base, for each adapter alone and for each sum: means with 95 % intervals."""
    columns = ["model"]
    for skill in result["skills"]:
        columns += [f"{skill}, %", "kept, %", "held-out loss"]
    rows: list[list[str]] = []
    for variant, entry in result["variants"].items():
        for way, by_skill in entry["ways"].items():
            if way == BASE and rows:
                continue  # the same one
            weight = entry["weight"].get(way)
            name = BASE if way == BASE else f"{variant}: {way}" + (f" (weight {weight:g})" if weight else "")
            row = [name]
            for skill in result["skills"]:
                numbers = by_skill[skill]
                kept = "" if way in (BASE, skill) else _kept(numbers["kept"])
                row += [shown(numbers["accuracy"], 100, ".1f"), kept, shown(numbers["eval_loss"], 1, ".3f")]
            rows.append(row)
    return columns, rows


def _kept(shares: list[float | None]) -> str:
    """The mean over the seeds in which there was a gain to keep, and of how many seeds it is where that is not all."""
    known = sum(share is not None for share in shares)
    return shown(shares, 100, ".0f") + (f" ({known} of {len(shares)} seeds)" if 0 < known < len(shares) else "")


def notes(result: dict[str, Any]) -> list[str]:
    """What is chosen, what overlaps, and what disjoint adapters gain."""
    lines = [
        "kept: what is left of a skill's own gain over the base, of seeds in which it gained; ± 95 % intervals over "
        "seeds (Student's t)"
    ]
    for variant, entry in result["variants"].items():
        rates = ", ".join(f"{s} {r['rate']:g}" for s, r in entry["rates"].items() if r["rate"] is not None)
        if rates:
            lines.append(f"{variant}: learning rates {rates}, chosen by held-out loss with the first seed")
        if entry["overlap"]:
            both = "both skills" if len(result["skills"]) == 2 else "both of two skills, the mean over all pairs"
            lines.append(f"{variant}: {100 * statistics.fmean(entry['overlap']):.0f} % of the units are in {both}")
        for skill, gained in entry.get("disjoint - overlapping", {}).items():
            accuracy, loss = shown(gained["accuracy"], 100, "+.1f"), shown(gained["eval_loss"], 1, "+.3f")
            lines.append(f"{variant}, {skill}: disjoint - overlapping {accuracy} points, held-out loss {loss}")
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The table as Markdown, with the command and the versions that made it, and the notes."""
    lines = "".join(f"- {note}\n" for note in notes(result))
    return as_markdown(result, f"{len(result['seeds'])} seeds", *table(result)) + "\n" + lines

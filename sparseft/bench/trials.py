"""Variants × seeds as ordinary runs: composed on top of a benchmark's own words, trained where they are missing.

A variant is `name: key=value …`. What has run before, with the same settings, is read; with others, it is refused.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, ClassVar, Self

from sparseft import console
from sparseft.compose.run_config import compose, from_dict
from sparseft.config import RunConfig
from sparseft.errors import Diverged, RunError, UserError
from sparseft.files.atomic import write_json
from sparseft.files.untrusted import read_json_object, read_yaml_object
from sparseft.runs.folder import CONFIG, SUMMARY
from sparseft.training import checks, schedules

Train = Callable[[RunConfig], dict[str, Any]]  # trains one config and returns its summary

DIVERGED = "diverged.json"  # in a trial's folder: what its training said, which is not to be done again


@dataclass
class Trial:
    """One run of one variant."""

    variant: str
    seed: int
    config: RunConfig  # output_dir: the trial's folder


def folder_name(variant: str, seed: int) -> str:
    """A trial's folder: the variant's name without what file systems and shells dislike."""
    name = re.sub(r"[^\w.]+", "-", variant).strip("-").lower()
    return f"{name or 'variant'}-seed{seed}"


def same_training(config: RunConfig, path: Path) -> bool:
    """Whether a run's `config.yaml` says what `config` does; settings it does not name yet have their defaults."""
    try:
        there = from_dict(read_yaml_object(path))
    except UserError as error:
        raise UserError(f"{path}: cannot be read, so it is not known what ran there ({error}).") from error
    mine, theirs = _wherever(config), _wherever(there)
    elsewhere = ("bench", "cache_dir", "output_dir", "overwrite")  # what these say changes nothing of the training
    return all(mine[key] == theirs[key] for key in mine if key not in elsewhere)


def _wherever(config: RunConfig) -> dict[str, Any]:
    """A config's settings, with the folders of `method.exclude` as seen from the run's: where a benchmark's folder has
    been moved, its runs have all been."""
    said = config.to_dict()
    said["trainer"]["resume"] = None  # nor does this
    if config.dataset.train_path or config.dataset.mix:
        said["dataset"]["name"] = None  # nor does this, where it names no data
    if exclude := said["method"].get("exclude"):
        said["method"]["exclude"] = [os.path.relpath(each, config.output_dir or ".") for each in exclude]
    return said


def named_settings(key: str, texts: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each `name: key=value …` of a setting -> the name and its overrides."""
    found = []
    for text in texts:
        name, _, rest = text.partition(":")
        try:
            changes = shlex.split(rest)
        except ValueError as error:
            raise UserError(f"{key}: '{text}' has quotes that do not close.") from error
        if not (name.strip() and changes):
            what = key.removeprefix("bench.").rstrip("s")
            raise UserError(f"{key}: '{text}' is no {what}: expected 'name: key=value …'.")
        for word in changes:
            setting, equals, _ = word.partition("=")
            if not equals:
                raise UserError(f"{key}: '{word}' of '{name}' is not a setting: expected key=value.")
            if setting in ("seed", "output_dir", "overwrite"):
                raise UserError(f"{key}: '{name}' sets {setting}, which is the benchmark's own.")
        found.append((name.strip(), changes))
    return found


def finished(trial: Trial) -> dict[str, Any] | None:
    """The summary of a trial that has run before, None where it has not, or not to its end.

    UserError where the folder holds a run with other settings.
    """
    folder = Path(trial.config.output_dir or "")
    if not (folder / CONFIG).is_file():
        return None
    if not same_training(trial.config, folder / CONFIG):
        raise UserError(f"{folder} holds a run with other settings: give the benchmark another output_dir.")
    summary = folder / SUMMARY
    return read_json_object(summary) if summary.is_file() else None


def summary_of(trial: Trial, train: Train) -> dict[str, Any]:
    """What the trial's run says of itself; it is trained where it has not been. Diverged where its training did, now
    or before: it would again."""
    summary = finished(trial)
    if summary is not None:
        return summary
    folder = Path(str(trial.config.output_dir))
    if (said := diverged(trial)) is not None:
        raise Diverged(f"{folder.name} diverged before, and is not trained again unless {folder} is deleted: {said}")
    console.log(f"bench: training {folder.name}")
    try:
        with console.quiet():
            return train(trial.config)
    except Diverged as error:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / DIVERGED, {"error": str(error)})
        raise


def diverged(trial: Trial) -> str | None:
    """What the trial's training said when it diverged; None where it has not."""
    mark = Path(str(trial.config.output_dir), DIVERGED)
    return str(read_json_object(mark)["error"]) if mark.is_file() else None


@contextlib.contextmanager
def going_on(folder: Path) -> Iterator[None]:
    """Says how to go on where an interrupt ends what is inside."""
    try:
        yield
    except KeyboardInterrupt:
        console.log(f"bench: what is done is kept; the same command with output_dir={folder} goes on from there")
        raise


def _chat_date(path: Path) -> str | None:
    try:
        return from_dict(read_yaml_object(path)).dataset.chat_date
    except UserError:  # which `same_training` says
        return None


@dataclass
class Study:
    """What is compared."""

    own: ClassVar[tuple[str, ...]] = ()  # settings of the benchmark, which are none of its runs'
    first: ClassVar[tuple[str, ...]] = ()  # words ahead of the user's, which win

    config: RunConfig
    base: list[str]  # the words that all runs share
    config_dirs: Sequence[str]
    folder: Path
    variants: dict[str, list[str]]  # the settings of each, by its name
    train: Train
    made: dict[tuple[str, ...], RunConfig] = field(default_factory=dict, init=False)  # composed, by their words
    folders: dict[str, str] = field(default_factory=dict, init=False)  # of the trials checked so far: whose each is

    def __post_init__(self) -> None:
        # One day for all of its runs, whenever they are trained: what they learn and what is held out is the same.
        if self.config.dataset.chat_date is None:
            made = sorted(self.folder.glob(f"*/*/{CONFIG}"))
            self.config.dataset.chat_date = _chat_date(made[0]) if made else date.today().isoformat()

    @classmethod
    def plan(
        cls, config: RunConfig, words: Sequence[str], config_dirs: Sequence[str], folder: Path, train: Train
    ) -> Self:
        """Of what `config` was composed from; UserError where a run could not start."""
        base = [*cls.first, *(word for word in words if word.partition("=")[0] not in cls.own)]
        study = cls(config, base, config_dirs, folder, cls.named(config), train)
        study.check()
        return study

    @staticmethod
    def named(config: RunConfig) -> dict[str, list[str]]:
        """`bench.variants` by name: at least two, each once."""
        variants = dict(named_settings("bench.variants", config.bench.variants))
        if len(variants) < 2 or len(variants) < len(config.bench.variants):
            raise UserError(
                "bench.variants: name at least two variants, each once; the first is what others are held to."
            )
        return variants

    def check(self) -> None:
        """Refuses settings by which a run could not start."""
        raise NotImplementedError

    @staticmethod
    @contextlib.contextmanager
    def of_variant(variant: str) -> Iterator[None]:
        """Inside, what is refused says of which variant."""
        try:
            yield
        except UserError as error:
            raise UserError(f"bench.variants: '{variant}': {error}") from None

    @property
    def seeds(self) -> list[int]:
        """Those of its runs."""
        return list(range(self.config.seed, self.config.seed + self.config.bench.seeds))

    def composed(self, changes: Sequence[str], seed: int, rate: float | None) -> RunConfig:
        """One training: `changes` on top of what all share. rate: None: what the configuration says."""
        words = [*self.base, *changes, f"seed={seed}", "overwrite=true"]
        if rate is not None:
            words.append(f"trainer.learning_rate={rate:g}")
        if tuple(words) not in self.made:  # each once: composing warns of what has no effect
            made = self.made[tuple(words)] = compose("train", words, self.config_dirs)
            made.dataset.chat_date = made.dataset.chat_date or self.config.dataset.chat_date
        return copy.deepcopy(self.made[tuple(words)])

    def rates_of(self, variant: str) -> list[float | None]:
        """Those to choose from; a variant that names its own has that one, or those of its own `bench.rates`."""
        named = {word.partition("=")[0] for word in self.variants[variant]}
        rates = self.config.bench.rates
        if "bench.rates" in named:
            rates = self.composed(self.variants[variant], self.seeds[0], None).bench.rates
        if len(set(rates)) < len(rates):
            raise UserError("bench.rates names a rate twice.")
        return [None] if "trainer.learning_rate" in named or not rates else list(rates)

    def check_folder(self, trial: Trial) -> None:
        """Refuses a trial whose folder another one has, or in which one with other settings ran."""
        folder = str(trial.config.output_dir)
        if folder in self.folders:
            raise UserError(f"its folders would be those of '{self.folders[folder]}'.")
        self.folders[folder] = trial.variant
        finished(trial)

    def summary(self, trial: Trial) -> dict[str, Any]:
        """What the trial's run says of itself; it is trained where it has not been."""
        return summary_of(trial, self.train)

    def tried(self, trial: Trial) -> dict[str, Any] | None:
        """`summary`; None where the training of one of several rates diverged, now or when it was done."""
        if len(self.rates_of(trial.variant)) == 1:
            return self.summary(trial)
        if finished(trial) is None and diverged(trial) is not None:
            return None
        try:
            return self.summary(trial)
        except Diverged as error:
            console.log(f"bench: {Path(str(trial.config.output_dir)).name} diverged and drops out: {error}")
            return None

    def check_left(self, trials: Sequence[Trial], summaries: Sequence[dict[str, Any] | None]) -> None:
        """Raises what the first of a variant's trainings has said where all of them, as `tried` tells, diverged."""
        if trials and all(summary is None for summary in summaries):
            raise RunError(diverged(trials[0]) or "")


def rates_of_seeds(rates: Sequence[float]) -> dict[str, Any]:
    """For `bench.json`, of a variant's learning rates by seed: the one that all have (None where each has found its
    own, with trainer.learning_rate=auto), and all."""
    return {"learning_rate": rates[0] if len(set(rates)) == 1 else None, "learning_rates": list(rates)}


def shown_rates(entry: Mapping[str, Any]) -> str:
    """What `rates_of_seeds` has made, for a table: each rate once, in the seeds' order."""
    return ", ".join(f"{rate:g}" for rate in dict.fromkeys(entry["learning_rates"]))


def check_same_data(trial: Trial, config: RunConfig, excepted: str = "") -> None:
    """Refuses a variant that trains another model, or on other data. excepted: a setting that may differ."""
    for group in ("model", "dataset"):
        theirs, ours = (dataclasses.asdict(getattr(each, group)) for each in (trial.config, config))
        differing = [key for key in theirs if theirs[key] != ours[key] and f"{group}.{key}" != excepted]
        if differing:
            raise UserError(f"it sets {group}.{differing[0]}, and all variants train one model on one set of data.")


def check_trial(config: RunConfig, benchmark: str, by_score: bool = True) -> None:
    """Refuses a training that could not start, that holds no examples out, or that decides something by them: the
    benchmark reports of them what nothing has chosen.

    by_score: whether a run may decide by an evaluation task's score in their place.
    """
    data, trainer = config.dataset, config.trainer
    if not (data.eval_path or data.eval_fraction):
        raise UserError(f"bench {benchmark} needs held-out examples: give dataset.eval_fraction or dataset.eval_path.")
    blind = by_score and trainer.eval_task is not None
    looking = {
        "keep_best": trainer.keep_best and not blind,
        "patience": trainer.patience is not None and not blind,
        "target_score": trainer.target_score is not None and not by_score,
        f"scheduler={trainer.scheduler}": trainer.scheduler in schedules.MEASURED,
        "forget_budget": trainer.forget_budget is not None,
    }
    for setting, looks in looking.items():
        if looks:
            raise UserError(
                f"trainer.{setting} looks at the held-out examples, of which bench {benchmark} reports: leave it out."
            )
    checks.check_trainer(config)
    checks.check_data(config)
    checks.check_excluded(config)
    checks.check_model(config)

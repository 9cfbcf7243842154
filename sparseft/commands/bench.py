"""`sparseft bench`: side-by-side measurements, as a table and `bench.json`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.config import RunConfig
from sparseft.errors import UserError, nearest
from sparseft.files.atomic import try_writing
from sparseft.runs import folder as runs
from sparseft.training import checks


def run(
    config: RunConfig, what: str = "train", words: Sequence[str] = (), config_dirs: Sequence[str] = ()
) -> dict[str, Any]:
    """Runs the benchmark `what` and writes `bench.json` into `output_dir` (default `outputs/bench-<date>-<time>`).

    words, config_dirs: what `config` was composed from, which quality puts its variants on top of.
    """
    console.clear_warnings()
    checks.check_one_process(config, "bench")
    config = normalised(config)
    output = Output(config)
    output.check()
    module = importlib.import_module(f"sparseft.bench.{what}")
    if what == "quality":
        result = _quality(module, config, words, config_dirs, output)
    elif what in ("train", "scaling"):
        try:
            keep = functools.partial(output.leave, complete=False)
            result = module.run(config, own_settings(config.bench.methods), output.place, keep)
        except BaseException:  # an interrupt too
            if output.left is not None:
                console.log(f"bench: what was measured is kept in {output.left}, marked incomplete")
            raise
    else:
        result = module.run(config)
    output.leave(result, complete=True)
    if what == "quality":
        output.write("bench.md", module.markdown(result))
    return result


def normalised(config: RunConfig) -> RunConfig:
    """`config` with single spaces between the words of `bench.methods`, by which contenders are named."""
    methods = [" ".join(entry.split()) for entry in config.bench.methods]
    return dataclasses.replace(config, bench=dataclasses.replace(config.bench, methods=methods))


# What lies in place of a complete result until there is another (`Output.place`).
ASIDE = ("bench.partial.json", "bench.partial.yaml", "scaling-*.partial.svg")


class Output:
    """The folder that a benchmark leaves its files in, made when there is something to put there."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.folder = Path(config.output_dir).expanduser() if config.output_dir else None
        self.left: Path | None = None  # `bench.json`, or what lies in its place, once there is one
        self._environment: dict[str, Any] = {}
        self._keeps = self._again = False

    def check(self) -> None:
        """Refuses a folder that cannot be made or written, before anything is measured; leaves nothing behind."""
        folder = runs.OUTPUTS if self.folder is None else self.folder
        what = "the folder" if self.folder is None else "output_dir"
        made: list[Path] = []
        try:  # some file systems refuse what their modes allow
            runs.check_writable(folder, what)
            for each in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
                each.mkdir()
                made.append(each)
            try_writing(folder)
        except OSError as error:
            raise UserError(f"cannot write to {what} '{folder}': {error.strerror or error}.") from error
        finally:
            for each in reversed(made):
                with contextlib.suppress(OSError):  # somebody else's file is in it by now
                    each.rmdir()
        if self.folder is not None:  # may hold what an earlier benchmark has left
            self._keeps = _complete(self.folder / runs.BENCH)
            a_runs = ("bench.yaml", runs.SUMMARY, runs.METRICS, runs.ADAPTER)
            a_run = any((self.folder / name).exists() for name in a_runs)
            self._again = (self.folder / runs.BENCH).is_file() and not a_run

    def choose(self) -> Path:
        """The folder, with a name of its own where none was given; makes nothing."""
        if self.folder is None:
            self.folder = Path(runs.OUTPUTS, f"bench-{runs.timestamp()}")
        return self.folder

    def place(self, name: str, complete: bool = True) -> Path:
        """Where a file of that name belongs; the folder is there.

        complete: false for one of an incomplete result, which takes no complete one's place.
        """
        if self._keeps and not complete:
            name = f"{Path(name).stem}.partial{Path(name).suffix}"
        if self.folder is None:
            self.folder = runs.new_folder(f"bench-{runs.timestamp()}")
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def write(self, name: str, text: str) -> None:
        """Writes a file of that name."""
        from sparseft.files import atomic

        atomic.write_text(self.place(name), text)

    def leave(self, result: dict[str, Any], complete: bool) -> None:
        """Writes `bench.json`, into the result too what it ran on and where it lies, and the settings beside it.

        complete: false for what there is so far, which a later call replaces. A complete `bench.json` from before stays
        until then, and this is `bench.partial.json`.
        """
        from sparseft.bench.machine import machine
        from sparseft.compose.run_config import to_yaml
        from sparseft.files import atomic
        from sparseft.models.loading import resolve_device
        from sparseft.runs import environment

        path = self.place(runs.BENCH, complete)
        if not self._environment:
            device = str(resolve_device(self.config.hardware.device))
            self._environment = environment.environment(device, result["dtype"], 1) | machine()
        result |= {"complete": complete, "environment": self._environment, "path": str(path)}
        atomic.write_json(path, result)
        if self.left != path:
            beside_a_run = runs.is_run(path.parent) and not self._again  # whose own `config.yaml` stays
            name = "bench.yaml" if beside_a_run else runs.CONFIG
            self.write(name if path.name == runs.BENCH else "bench.partial.yaml", to_yaml(self.config))
        self.left = path
        for pattern in ASIDE if complete else ():
            for leftover in path.parent.glob(pattern):
                leftover.unlink()


def _complete(path: Path) -> bool:
    """Whether there is a `bench.json` that does not say it is incomplete; one that cannot be read is kept as well."""
    from sparseft.files.untrusted import read_json_object

    if not path.is_file():
        return False
    try:
        return read_json_object(path).get("complete") is not False
    except UserError:
        return True


def _quality(
    module: Any, config: RunConfig, words: Sequence[str], config_dirs: Sequence[str], output: Output
) -> dict[str, Any]:
    """Runs the trials; interrupted, says how to go on."""
    folder = output.choose()
    try:
        return module.run(config, trials(config, words, config_dirs, folder / "runs"), _train)
    except KeyboardInterrupt:
        console.log(f"bench: what is done is kept; the same command with output_dir={folder} goes on from there")
        raise


def own_settings(entries: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The settings in entries of `bench.methods` such as `lora rank=16`, checked, by entry."""
    from sparseft.compose import overrides, validation
    from sparseft.methods import get_method
    from sparseft.rules import field_types, is_text

    own: dict[str, dict[str, Any]] = {}
    for entry in entries:
        name, *words = entry.split()
        if not words:
            continue
        if name == "floor":
            raise UserError(f"bench.methods: '{entry}': the floor trains nothing and has no settings.")
        hints, values = field_types(get_method(name)), {}
        for word in words:
            if "=" not in word:
                raise UserError(f"bench.methods: '{word}' of '{entry}' is not a setting: expected key=value.")
            override = overrides.parse(word.removeprefix("method."))
            if override.key not in hints:
                raise UserError(f"bench.methods: {name} has no setting '{override.key}'.{nearest(override.key, hints)}")
            text = is_text(hints[override.key])
            read = overrides.text_value(override) if text else overrides.parsed_value(override, hints[override.key])
            values[override.key] = read
        validation.build(get_method(name), values, f"bench.methods: {name}").validate()
        own[entry] = values
    return own


def trials(config: RunConfig, words: Sequence[str], config_dirs: Sequence[str], folder: Path) -> list[Any]:
    """`bench.variants` × `bench.seeds`, each composed and checked before the first one runs."""
    from sparseft.bench.quality import Trial, folder_name
    from sparseft.compose.run_config import compose

    made, names = [], set()
    variants = [_variant(text) for text in config.bench.variants]
    if not variants:
        raise UserError("bench.variants is empty: name at least one variant.")
    own = [word for word in words if word.partition("=")[0] not in ("bench.variants", "bench.seeds", "output_dir")]
    for seed in range(config.seed, config.seed + config.bench.seeds):
        for name, changes in variants:
            output_dir = folder / folder_name(name, seed)
            if output_dir in names:
                raise UserError(f"bench.variants: two variants are called '{name}', or nearly so.")
            names.add(output_dir)
            trial = compose("train", [*own, *changes, f"seed={seed}", "overwrite=true"], config_dirs)
            trial.output_dir = str(output_dir)
            checks.check_data(trial)
            made.append(Trial(name, seed, trial, functools.partial(_same_training, trial)))
    return made


def _same_training(config: RunConfig, path: Path) -> bool:
    """Whether a run's `config.yaml` says what `config` does; settings it does not name yet have their defaults."""
    from sparseft.compose.run_config import from_dict
    from sparseft.files.untrusted import read_yaml_object

    try:
        there = from_dict(read_yaml_object(path)).to_dict()
    except UserError as error:
        raise UserError(f"{path}: cannot be read, so it is not known what ran there ({error}).") from error
    here = config.to_dict()
    elsewhere = ("bench", "cache_dir")  # what these say changes nothing of the training
    return all(here[key] == there[key] for key in here if key not in elsewhere)


def _variant(text: str) -> tuple[str, list[str]]:
    """`name: key=value …` -> the name and its overrides."""
    name, colon, rest = text.partition(":")
    try:
        changes = shlex.split(rest)
    except ValueError as error:
        raise UserError(f"bench.variants: '{text}' has quotes that do not close.") from error
    if not (colon and name.strip() and changes):
        raise UserError(f"bench.variants: '{text}' is no variant: expected 'name: key=value …'.")
    for word in changes:
        key, equals, _ = word.partition("=")
        if not equals:
            raise UserError(f"bench.variants: '{word}' of '{name}' is not a setting: expected key=value.")
        if key in ("seed", "output_dir", "overwrite"):
            raise UserError(f"bench.variants: '{name}' sets {key}, which is the benchmark's own.")
    return name.strip(), changes


def _train(config: RunConfig) -> dict[str, Any]:
    from sparseft.commands import train

    return train.run(config)


def render(result: dict[str, Any]) -> None:
    """The table on stdout."""
    if result["benchmark"] == "train":
        _render_train(result)
    else:
        module = importlib.import_module(f"sparseft.bench.{result['benchmark']}")
        if hasattr(module, "columns"):  # as many as there are methods
            _table(module.title(result), module.columns(result), module.table(result))
        else:
            console.table(_title(result), module.COLUMNS, module.table(result))
    print(f"bench: {result['path']}")


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; on a terminal that is too narrow for it, several."""
    from sparseft.bench.tables import fitting

    if not console.is_terminal(sys.stdout):
        console.table(title, columns, rows)
        return
    for part, cells in fitting(columns, rows, shutil.get_terminal_size().columns - 4):
        console.table(title, part, cells)
        title = ""


def _title(result: dict[str, Any]) -> str:
    from sparseft.bench.machine import measured_on

    if result["benchmark"] == "quality":
        return (
            f"Held-out loss: {result['model']}, {result['dataset']}, {len(result['seeds'])} seeds, on "
            f"{measured_on(result)}"
        )
    if result["benchmark"] == "loader":
        return importlib.import_module("sparseft.bench.loader").title(result)
    if result["benchmark"] == "kernels":
        return (
            f"Weight gradient of blocks: {result['dtype']} on {measured_on(result)}, medians of {result['steps']}; "
            "bound: the bytes that must be moved, at the bandwidth of a copy"
        )
    return (
        f"Selection: {result['model']}, {result['parameters']:,} parameters, {result['dtype']} on "
        f"{measured_on(result)}, {result['samples']} samples of {result['length']} tokens, median of {result['steps']}"
    )


def _render_train(result: dict[str, Any]) -> None:
    from sparseft.bench import profiling, tables

    _table(tables.title(result), *tables.table(result))
    if any("profile" in entry for entry in result["methods"].values()):
        floor = next((name for name in result["methods"] if name == "floor"), None)
        _table("Where the time goes, under the profiler", *profiling.difference(result["methods"], floor))
        print(f"traces: {Path(result['path']).parent}/trace-*.json.gz")
    for line in tables.notes(result):
        print(line)


def failure(result: dict[str, Any]) -> str | None:
    """Why a finished benchmark ends with exit code 1: targets that do not hold; null where all do."""
    from sparseft.bench import tables

    return tables.failure(result)

"""`sparseft bench`: side-by-side measurements, as a table and `bench.json`."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparseft import console
from sparseft.bench import (
    front,
    fusion,
    host,
    kernels,
    loader,
    preprocess,
    profiling,
    quality,
    scaling,
    serve,
    targets,
    time_to_loss,
    train,
)
from sparseft.bench.output import Output
from sparseft.bench.trials import going_on
from sparseft.commands import train as training
from sparseft.compose.run_config import to_yaml
from sparseft.config import RunConfig
from sparseft.errors import UserError
from sparseft.runs.folder import LOCK
from sparseft.runs.lock import Lock
from sparseft.training import checks

# Each has run(config, output), and title and table of what that returns; some have more_tables, notes (lines below the
# tables) and page (which writes all of it as HTML). Those of TRAINING have a Study, measure and markdown, and some
# charts, in place of run.
BENCHMARKS: dict[str, Any] = {
    **{"train": train, "scaling": scaling, "host": host, "preprocess": preprocess, "quality": quality},
    **{"time": time_to_loss, "fusion": fusion, "front": front, "kernels": kernels, "loader": loader, "serve": serve},
}
TRAINING = ("quality", "time", "fusion", "front")  # their runs are composed anew, and trained as `sparseft train` does


def run(
    config: RunConfig, what: str = "train", words: Sequence[str] = (), config_dirs: Sequence[str] = ()
) -> dict[str, Any]:
    """Runs the benchmark `what` and writes `bench.json` into `output_dir` (default `outputs/bench-<date>-<time>`).

    words, config_dirs: what `config` was composed from, which those of `TRAINING` put their variants on top of.
    """
    console.clear_warnings()
    checks.check_one_process(config, "bench")
    if config.by_preference:
        raise UserError(f"bench: objective={config.objective}: what is measured is imitation; leave objective out.")
    config = normalised(config)
    output = Output(config)
    output.check()
    try:
        if what in TRAINING:
            result = _trained(BENCHMARKS[what], config, output, words, config_dirs)
        else:
            result = BENCHMARKS[what].run(config, output)
    except BaseException:  # an interrupt too
        if output.left is not None:
            console.log(f"bench: what was measured is kept in {output.left}, marked incomplete")
        raise
    output.leave(result, complete=True)
    if what in TRAINING:
        output.write("bench.md", BENCHMARKS[what].markdown(result))
    if "page" in result:
        BENCHMARKS[what].page(result, Path(result["page"]), to_yaml(config))
    return result


def _trained(
    benchmark: Any, config: RunConfig, output: Output, words: Sequence[str], config_dirs: Sequence[str]
) -> dict[str, Any]:
    """What a benchmark of `TRAINING` has measured, its charts written; interrupted, it says how to go on."""
    folder = output.choose()
    study = benchmark.Study.plan(config, words, config_dirs, folder, training.run)
    with _alone_in(folder), going_on(folder):
        result = benchmark.measure(study)
    charts = benchmark.charts(result) if hasattr(benchmark, "charts") else {}
    for name, svg in charts.items():
        output.write(name, svg)
    return result | ({"charts": list(charts)} if charts else {})


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other job works there: it would train the same runs. A folder that stays empty goes again."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with Lock() as lock:
        lock.take(folder)
        try:
            yield
        finally:
            if new and all(path.name == LOCK for path in folder.iterdir()):
                shutil.rmtree(folder)


def normalised(config: RunConfig) -> RunConfig:
    """`config` with single spaces between the words of `bench.methods`, by which contenders are named."""
    methods = [" ".join(entry.split()) for entry in config.bench.methods]
    return dataclasses.replace(config, bench=dataclasses.replace(config.bench, methods=methods))


def render(result: dict[str, Any]) -> None:
    """The table on stdout, and what the benchmark has to say below it."""
    benchmark = BENCHMARKS[result["benchmark"]]
    console.table(benchmark.title(result), *benchmark.table(result))
    if any("profile" in entry for entry in result.get("methods", {}).values()):
        console.table("Where the time goes, under the profiler", *profiling.table(result["methods"]))
        print(f"traces: {Path(result['path']).parent}/trace-*.json.gz")
    for name, more in benchmark.more_tables(result) if hasattr(benchmark, "more_tables") else ():
        console.table(name, *more)
    for line in benchmark.notes(result) if hasattr(benchmark, "notes") else ():
        print(line)
    if "page" in result:
        print(f"page: {result['page']}: open it in a browser")
    print(f"bench: {result['path']}")


def failure(result: dict[str, Any]) -> str | None:
    """Why a finished benchmark ends with exit code 1: targets that do not hold; None where all do."""
    return targets.failure(result)

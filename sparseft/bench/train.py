"""One training step of every method, side by side.

The methods take turns, so that a machine's slow moments meet all of them. They share the frozen weights; one that
trains all of them has its own, and takes turns with the floor alone, when the others are done and gone. The ways of
`bench.ways` follow one after another: compare methods within a way, and ways by their ratios to the floor.
"""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseft import console
from sparseft.bench import besides, profiling, targets
from sparseft.bench.contenders import (
    EAGER,
    FLOOR,
    RECOMPUTED,
    Contender,
    NotAvailable,
    check_methods,
    check_steps,
    check_ways,
    contender,
    forget_compiled,
    forget_liger,
    measure_memory,
    owns_weights,
    parts_of,
    put_in_way,
    settings_of,
    step,
)
from sparseft.bench.models import measured_model
from sparseft.bench.output import Output, measured_on
from sparseft.bench.sharing import SharedWeights
from sparseft.bench.timing import absent, attempt_each, failed_row, kind, measured, reclaim, spread, take_turns
from sparseft.config import RunConfig
from sparseft.errors import UserError
from sparseft.memory import tensor_bytes
from sparseft.methods import get_method
from sparseft.models.labelled_loss import label_rows
from sparseft.models.spec import ModelSpec
from sparseft.models.step_cost import StepCost, Trained

Rows = dict[str, dict[str, Any]]  # by contender
NOTHING = "-"
NOT_YET = {"missing": "not measured yet"}  # what an incomplete result says of a row


def run(config: RunConfig, output: Output | None = None) -> dict[str, Any]:
    """Measures `bench.methods` in every way of `bench.ways` and returns what `bench.json` holds.

    A method whose package is missing, and a way that cannot be had, is named with the reason (`missing`), not dropped;
    so is a method that raises (`failed`), and the others go on.

    output: takes the traces of `bench.profile`, and what there is after each way but the last, before anything is
    profiled, and where an interrupt ends a way, with the rounds that it has finished; None: nothing is written.
    """
    settings = config.bench
    check(config)
    own = settings_of(config, losses=True)
    base, batch, facts = measured_model(config)
    device = batch["input_ids"].device
    said = {
        "benchmark": "train",
        **facts,
        "weights_bytes": tensor_bytes([*base.parameters(), *base.buffers()]),
        "accumulation": settings.accumulation,
    }
    console.log(f"bench: {said['parameters']:,} parameters, {said['dtype']} on {device}, {_tokens(said)}")
    weights = SharedWeights(base)
    found: dict[str, dict[str, dict[str, Any]]] = {}

    def so_far() -> dict[str, Any]:
        methods = found[settings.ways[0]]
        judged = targets.judge(settings.targets, methods, said["weights_bytes"])
        return said | {"methods": methods, "ways": found, "targets": judged}

    def keep(way: str, rows: dict[str, dict[str, Any]]) -> None:
        found[way] = rows
        if output is not None:
            output.leave(so_far(), complete=False)

    for position, way in enumerate(settings.ways):
        traces = output if settings.profile and position == 0 else None
        found[way] = measure(way, weights, batch, config, own, device, traces, functools.partial(keep, way))
        gc.collect()  # its models hold themselves in cycles, and the next are made at once
        if len(found) < len(settings.ways):
            keep(way, found[way])
    return so_far()


def check(config: RunConfig) -> None:
    """Refuses settings by which there is nothing to measure."""
    settings = config.bench
    check_methods(settings.methods)
    for target in settings.targets:
        targets.parse(target, settings.methods)
    check_ways(settings.ways)
    check_steps(config)
    if settings.profile and "compile" in parts_of(settings.ways[0]):
        raise UserError(f"bench.profile: the first of bench.ways is '{settings.ways[0]}': only eager steps show parts.")


def measure(
    way: str,
    weights: SharedWeights,
    batch: dict[str, Tensor],
    config: RunConfig,
    own: Mapping[str, Mapping[str, Any]],
    device: torch.device,
    traces: Output | None,
    keep: Callable[[Rows], None],
) -> Rows:
    """The rows of all contenders in one way; of one that cannot be had or raises, why (`bench/timing.py`).

    traces: takes the profiler's traces; None: nothing is profiled. keep: given the rows before they are profiled, and
    where an interrupt ends it sooner, rows of the rounds that all have finished (`rounds` of each).
    """
    field = Field(way, weights, batch, config, own, device, traces, keep)
    owners = [entry for entry in config.bench.methods if owns_weights(entry)]
    try:
        field.measure([entry for entry in config.bench.methods if entry not in owners])
        for entry in owners:
            field.measure_alone(entry)
    finally:
        weights.give(None)
        forget_liger()
        if field.compiled:
            forget_compiled()
    return field.rows()


@dataclass
class Field:
    """The contenders of one way, those that could be made, and the rows of all: in the order asked for."""

    way: str
    weights: SharedWeights
    batch: dict[str, Tensor]
    config: RunConfig
    own: Mapping[str, Mapping[str, Any]]
    device: torch.device
    traces: Output | None
    keep: Callable[[Rows], None]

    def __post_init__(self) -> None:
        self.compiled = "compile" in parts_of(self.way)
        self.cost = StepCost(ModelSpec.of(self.weights.base), self.config.bench.length)
        self.contenders: dict[str, Contender] = {}
        self.calls: dict[str, Callable[[], None]] = {}  # a step of each that is in memory
        self._rows: Rows = dict.fromkeys(self.config.bench.methods, NOT_YET)

    def measure(self, entries: Sequence[str]) -> None:
        """Makes these contenders, which share the weights, and measures them in turns."""
        attempt_each(entries, self._make, self.failed, self.device)
        seconds: dict[str, list[float]] = {}
        try:
            take_turns(self.calls, self.config.bench, self.device, self.failed, seconds, prepare=self.prepare)
            self._count_memory(list(self.calls))
        except BaseException:  # an interrupt
            rounds = min((len(seconds[entry]) for entry in self.contenders), default=0)
            if rounds:
                self._take_times({entry: seconds[entry][:rounds] for entry in self.contenders}, rounds)
                self.keep(self.rows())
            raise
        self._take_times({entry: seconds[entry] for entry in self.contenders})
        self._measure_besides()
        self._profile(list(self.calls))

    def measure_alone(self, entry: str) -> None:
        """Makes one that has weights of its own, when the others have left the memory to it, and measures it in turns
        with the floor (or another one that is there), by which its times can be compared with the others'."""
        beside = FLOOR if FLOOR in self.calls else next(iter(self.calls), None)
        self.weights.give(None)
        for other in [other for other in self.calls if other != beside]:
            self._free(other)
        reclaim(self.device)
        attempt_each([entry], self._make, self.failed, self.device)
        if entry not in self.calls:
            return
        seconds: dict[str, list[float]] = {}

        def failed(name: str, error: Exception) -> None:
            if name == entry:
                self.failed(entry, error)
                return
            console.log(f"bench: {name} failed beside {entry}: {failed_row(error)['failed']}")
            self.weights.give(None)
            self._free(name)  # its figures from before hold

        try:
            take_turns(dict(self.calls), self.config.bench, self.device, failed, seconds, prepare=self.prepare)
            self._count_memory([entry])
        except BaseException:
            rounds = min((len(times) for times in seconds.values()), default=0)
            self._take_alone(entry, beside, {name: times[:rounds] for name, times in seconds.items()}, rounds)
            self.keep(self.rows())
            raise
        self._take_alone(entry, beside, seconds)
        self._profile([entry])
        if entry in self.calls:
            self._free(entry)
            reclaim(self.device)

    def prepare(self, entry: str) -> None:
        """Ahead of a turn."""
        self.contenders[entry].take_turn()

    def _make(self, entry: str) -> None:
        try:
            made = contender(entry, self.weights, self.config, self.own.get(entry))
            put_in_way(self.way, made, functools.partial(step, made, self.batch))
            made.facts["step_flops"] = self._flops(made)
        except ModuleNotFoundError as error:
            self._rows[entry] = {"missing": f"{error.name} is not installed"}
        except NotAvailable as error:
            self._rows[entry] = {"missing": str(error)}
        else:
            self.contenders[entry] = made
            self.calls[entry] = functools.partial(step, made, self.batch, self.config.bench.accumulation)

    def _flops(self, made: Contender) -> float:
        """Multiplications and additions of a step, for each token."""
        labels = self.batch["labels"]
        share = len(label_rows(labels)) / labels.numel() if made.labelled else 1.0
        return self.cost.step(
            Trained.of(made.model, self.cost.spec),
            products=1 if made.is_floor else get_method(made.name.split()[0]).products,
            labelled=share,
            checkpointing="checkpointing" in parts_of(self.way),
        )

    def _count_memory(self, entries: Sequence[str]) -> None:
        if self.compiled:  # the counters do not see inside compiled code
            return
        recomputes = bool({"checkpointing", *RECOMPUTED} & set(parts_of(self.way)))

        def count(entry: str) -> None:
            measure_memory(self.contenders[entry], self.batch, self.device, self.config.bench.accumulation, recomputes)

        attempt_each([entry for entry in entries if entry in self.calls], count, self.failed_count, self.device)

    def _measure_besides(self) -> None:
        """What a step does besides its passes, of those of which a target asks for it."""
        asked = {targets.parse(text, self.config.bench.methods) for text in self.config.bench.targets}
        asked_of = {target.one for target in asked if target.quantity == "besides"}
        if self.compiled or self.device.type != "cpu" or self.way != self.config.bench.ways[0]:
            return

        def measure(entry: str) -> None:
            found = besides.measure(self.contenders[entry], self.batch, self.config.bench.accumulation)
            self.contenders[entry].facts |= spread(targets.BESIDES, found)

        attempt_each([entry for entry in self.calls if entry in asked_of], measure, self.failed, self.device)

    def _profile(self, entries: Sequence[str]) -> None:
        calls = {entry: self.calls[entry] for entry in entries if entry in self.calls}
        if self.traces is None or not calls:
            return
        self.keep(self.rows())
        tokens, place = self.batch["input_ids"].numel(), self.traces.place
        profiled = profiling.profile(calls, tokens, self.device, place, self.failed_profile, self.prepare)
        for entry, profile in profiled.items():
            self.contenders[entry].facts["profile"] = profile

    def failed(self, entry: str, error: Exception) -> None:
        """Says so in its row, and forgets it: nothing holds its memory any more, which the others may need."""
        self._rows[entry] = failed_row(error)
        console.log(f"bench: {entry} failed: {self._rows[entry]['failed']}")
        self.weights.give(None)
        if entry in self.calls:
            self._free(entry)
        self.contenders.pop(entry, None)

    def failed_count(self, entry: str, error: Exception) -> None:
        """Says so beside its times, which hold; it runs no more."""
        counted = self.contenders[entry].facts["memory"] = failed_row(error)
        console.log(f"bench: {entry} failed while its memory was counted: {counted['failed']}")
        self.weights.give(None)
        self._free(entry)

    def failed_profile(self, entry: str, error: Exception) -> None:
        """Says so beside its figures, which hold."""
        profile = self.contenders[entry].facts["profile"] = failed_row(error)
        console.log(f"bench: {entry} failed under the profiler: {profile['failed']}")

    def _free(self, entry: str) -> None:
        del self.calls[entry]
        self.contenders[entry].free()

    def _take_times(self, seconds: Mapping[str, list[float]], rounds: int | None = None) -> None:
        """rounds: how many there have been, where an interrupt ends them."""
        for entry, times in seconds.items():
            self.contenders[entry].seconds = times
            if rounds is not None:
                self.contenders[entry].facts["rounds"] = rounds

    def _take_alone(
        self, entry: str, beside: str | None, seconds: Mapping[str, list[float]], rounds: int | None = None
    ) -> None:
        """The times of one with weights of its own, and `pace`: how much longer the one beside it took by then."""
        if not seconds.get(entry):
            return
        self._take_times({entry: seconds[entry]}, rounds)
        self.contenders[entry].facts["beside"] = None
        if beside is not None and seconds.get(beside):
            pace = statistics.median(seconds[beside]) / statistics.median(self.contenders[beside].seconds)
            self.contenders[entry].facts |= {"beside": beside, "pace": pace}

    def rows(self) -> dict[str, dict[str, Any]]:
        """The rows with what has been measured so far."""
        tokens = self.batch["input_ids"].numel() * self.config.bench.accumulation
        timed = [c for c in self.contenders.values() if c.seconds]
        return self._rows | {c.name: row(c, timed, tokens) for c in timed}


def row(c: Contender, contenders: Sequence[Contender], tokens: int) -> dict[str, Any]:
    """One method's figures; ratios are of median step times, those of one that ran after the others at their pace."""

    def median_of(one: Contender) -> float:
        return statistics.median(one.seconds)

    def paced(one: Contender) -> float:
        return median_of(one) / one.facts.get("pace", 1.0)

    median = median_of(c)
    compared = [other for other in contenders if other.name.split()[0] in (FLOOR, "lora", "full")]
    ratios = {other.name: paced(c) / paced(other) for other in compared}
    predicted = {f.name: c.facts["step_flops"] / f.facts["step_flops"] for f in compared if f.is_floor}
    return {
        **spread("step_seconds", c.seconds),
        "tokens_per_second": tokens / median,
        "peak_memory_bytes": c.peak_bytes,
        "saved_bytes": c.saved_bytes,
        "trainable_parameters": c.trainable,
        "ratio_to": ratios,
        "predicted_ratio_to": predicted,
        **c.facts,
    }


# -- what is printed --------------------------------------------------------------------------------------------------


def title(result: dict[str, Any]) -> str:
    """What was measured, in one line."""
    return (
        f"Training step: {result['model']}, {result['parameters']:,} parameters, {result['dtype']} on "
        f"{measured_on(result)}, {_tokens(result)}"
        + ("" if next(iter(result["ways"])) == EAGER else f", {next(iter(result['ways']))}")
        + f", median of {result['steps']}"
    )


def _tokens(result: dict[str, Any]) -> str:
    size = f"{result['batch_size']} x {result['length']} tokens"
    return size + (f" x {result['accumulation']}" if result["accumulation"] > 1 else "")


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: the first way in full, of every further one the time, against the floor and the first."""
    methods = result["methods"]
    known = measured(methods)
    references = list(next(iter(known.values()))["ratio_to"]) if known else []
    floors = list(next(iter(known.values()))["predicted_ratio_to"]) if known else []
    columns = ["method", "step ms", "p20-p80", *(f"÷ {other}" for other in references)]
    columns += [f"predicted ÷ {floor}" for floor in floors]
    beside = next((known[floor]["step_seconds"] for floor in floors if floor in known), None)
    shows_besides = beside is not None and any(targets.BESIDES in entry for entry in known.values())
    columns += ["besides ÷ floor"] if shows_besides else []
    columns += ["tokens/s", "peak MiB", "saved MiB", "trainable"]
    rows = []
    for name, entry in methods.items():
        if name not in known:
            rows.append([name, kind(entry), *[NOTHING] * (len(columns) - 2)])
            continue
        rows.append(
            [
                name,
                f"{1000 * entry['step_seconds']:.1f}",
                f"{1000 * entry['step_seconds_p20']:.1f}-{1000 * entry['step_seconds_p80']:.1f}",
                *(f"{entry['ratio_to'][other]:.2f}" for other in references),
                *(f"{entry['predicted_ratio_to'][floor]:.2f}" for floor in floors),
                *([_share(entry.get(targets.BESIDES), beside)] if shows_besides else []),
                f"{entry['tokens_per_second']:,.0f}",
                _mebibytes(entry["peak_memory_bytes"]),
                _mebibytes(entry["saved_bytes"]),
                f"{entry['trainable_parameters']:,}",
            ]
        )
    first, *others = result["ways"].items()
    for way, entries in others:
        more, cells = _further(way, entries, first[0], methods)
        columns += more
        rows = [row + cells[row[0]] for row in rows]
    return columns, rows


def _further(
    way: str, entries: dict[str, Any], first: str, methods: dict[str, Any]
) -> tuple[list[str], dict[str, list[str]]]:
    """A further way's columns, and its cells by method."""
    known = measured(entries)
    floor = next((other for entry in known.values() for other in entry["ratio_to"] if other.startswith("floor")), None)
    compiled = "compile" in parts_of(way)
    columns = [f"{way} ms", f"÷ {first}", *([f"÷ {way} {floor}"] if floor else [])]
    columns.append("graph breaks" if compiled else f"{way} peak MiB")
    cells = {}
    for name, entry in entries.items():
        if name not in known:
            cells[name] = [kind(entry), *[NOTHING] * (len(columns) - 1)]
            continue
        before = methods[name].get("step_seconds")
        cells[name] = [
            f"{1000 * entry['step_seconds']:.1f}",
            f"{entry['step_seconds'] / before:.2f}" if before else NOTHING,
            *([f"{entry['ratio_to'][floor]:.2f}"] if floor else []),
            str(entry["graph_breaks"]) if compiled else _mebibytes(entry["peak_memory_bytes"]),
        ]
    return columns, cells


def _share(seconds: float | None, of: float | None) -> str:
    return f"{seconds / of:.3f}" if seconds is not None and of else NOTHING


def _mebibytes(count: int | None) -> str:
    return NOTHING if count is None else f"{count / 2**20:,.1f}"


def notes(result: dict[str, Any]) -> list[str]:
    """Lines below the table: what is missing or failed and why, why graphs broke, and which targets hold."""
    lines = []
    for way, entries in result["ways"].items():
        where = "" if way == EAGER else f"{way}: "
        without = {name: entry for name, entry in entries.items() if absent(entry)}
        said = {name: f"{where}{name}: {absent(entry)}" for name, entry in without.items()}
        if len({absent(entry) for entry in without.values()}) == 1 and len(without) == len(entries) > 1:
            name, entry = next(iter(without.items()))
            said = {name: f"{where}every method: {absent(entry)}"}
        lines += [f"{kind(without[name])}: {text}" for name, text in said.items()]
        for name, entry in measured(entries).items():
            if "beside" in entry:
                lines.append(f"{where}{name} {_after(entry)}")
        for name, entry in entries.items():
            lines += [f"failed: {where}{name}, {doing}: {why}" for doing, why in targets.beside_its_figures(entry)]
            lines += [f"graph break: {name}: {reason}" for reason in entry.get("graph_break_reasons", ())]
    return lines + targets.lines(result["targets"])


def _after(entry: Mapping[str, Any]) -> str:
    if entry["beside"] is None:
        return "has weights of its own and ran after the others, alone."
    return (
        f"has weights of its own and ran after the others, beside {entry['beside']}, which by then took "
        f"{entry['pace']:.2f} of its time: ratios allow for that."
    )

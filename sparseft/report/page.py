"""A run folder, or several side by side, as one self-contained HTML page: its content, which `page.html.j2` lays out.

Read from the run's files alone, so a run that failed, or was made elsewhere, reports too: what is missing is said.
Everything in those files is data of unknown origin: text is escaped, numbers are checked before they are drawn.
Jinja2 is imported when a page is made, not before.
"""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseft.config import flatten
from sparseft.errors import UserError
from sparseft.files.atomic import write_text
from sparseft.report.charts import DARK, LIGHT, Bar, Panel, Series, bar_chart, clean, heat_map, line_chart, thin
from sparseft.report.numbers import (
    count,
    duration,
    fixed,
    memory,
    number,
    percent,
    rate,
    short_count,
    signed,
    when,
)
from sparseft.report.run_data import Run, name_runs, read_run


@dataclass
class Table:
    """Cells of text; columns in `numeric` are set right, cells (row, column) in `best` stand out."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[int] = ()
    best: set[tuple[int, int]] = field(default_factory=set)


def build_report(runs: Sequence[Path], out: Path) -> Path:
    """Writes the page of `runs` (run folders) to `out` and returns it. Needs at least one run."""
    import jinja2

    if not runs:
        raise UserError("a report needs at least one run's folder.")
    loaded = [read_run(Path(path)) for path in runs]
    name_runs(loaded)
    single = len(loaded) == 1
    several = [f"{run.label}: {text}" for run in loaded for text in run.warnings]
    environment = jinja2.Environment(
        autoescape=True, finalize=clean, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = importlib.resources.files("sparseft.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    page = environment.from_string(template).render(
        light=LIGHT,
        dark=DARK,
        single=single,
        **_header(loaded),
        warnings=list(dict.fromkeys(loaded[0].warnings if single else several)),
        tiles=_tiles(loaded[0]) if single else [],
        comparison=None if single else _comparison(loaded),
        loss=_curves(loaded),
        evaluation=_evaluation(loaded),
        runs=[{"label": run.label, "selected": _selected(run), **_details(run)} for run in loaded],
    )
    return write_text(out, page)


def sentence(run: Run) -> str:
    """What came of the run, in one sentence."""
    if run.summary is None:
        return f"{run.method} training of {run.model} on {run.dataset} has not finished."
    text = f"{run.method} trained {count(run.get('trainable_parameters'))} of {count(run.get('total_parameters'))} "
    text += f"parameters ({percent(run.share)}) of {run.model} on {run.dataset}"
    text += f" for {count(run.get('steps'))} steps in {duration(run.get('train_seconds'))}"
    results = []
    before, after = run.get("eval_loss_before"), run.get("eval_loss_after")
    if number(after) is not None:
        results.append(f"evaluation loss {fixed(before)} → {fixed(after)}")
    for task in run.headline[:3]:
        if task in run.before and task in run.after:
            results.append(f"{task} {percent(run.before[task].accuracy)} → {percent(run.after[task].accuracy)}")
        elif task in run.after:
            results.append(f"{task} {percent(run.after[task].accuracy)}")
    return text + (": " + ", ".join(results) if results else "") + "."


def _header(runs: list[Run]) -> dict[str, str]:
    run = runs[0]
    if len(runs) > 1:
        lead = f"{', '.join(run.label for run in runs)}, compared by what they trained, cost and learnt."
        return {"title": f"{len(runs)} runs side by side", "kicker": "sparseft", "lead": lead}
    started = run.environment.get("started")
    kicker = f"sparseft run {run.path.resolve().name}" + (f", started {when(started)}" if started else "")
    return {"title": f"{run.method} on {run.dataset}", "kicker": kicker, "lead": sentence(run)}


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """The figures one looks for first: name, figure, detail."""
    if run.summary is None:
        return []
    get = run.get
    scope = number(get("scope_parameters"))
    detail = f"{percent(run.share)} of {short_count(get('total_parameters'))}"
    if scope:
        detail += f"; {percent((number(get('trainable_parameters')) or 0) / scope)} of the weights in scope"
    per_step = (number(get("train_seconds")) or 0) / (number(get("steps")) or 1)
    entries = [
        ("Trainable parameters", short_count(get("trainable_parameters")), detail),
        ("Tokens per second", rate(get("tokens_per_second")), f"{short_count(get('tokens'))} tokens in all"),
        ("Peak memory", memory(get("peak_memory_bytes")), str(run.environment.get("device") or "device not recorded")),
        ("Training time", duration(get("train_seconds")), f"{count(get('steps'))} steps of {rate(per_step)} s"),
    ]
    if number(get("eval_loss_after")) is not None:
        was = f"{fixed(get('eval_loss_before'))} before"
        entries.append(("Evaluation loss", fixed(get("eval_loss_after")), was))
    for task in run.headline[:2]:
        if task in run.after:
            old = run.before.get(task)
            was = f"{percent(old.accuracy)} before" if old else f"{count(run.after[task].samples)} questions"
            entries.append((f"Accuracy, {task}", percent(run.after[task].accuracy), was))
    return entries


def _comparison(runs: list[Run]) -> dict[str, Any]:
    """One row a run; what is the same for all is said once, above the table."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.headline))
    columns: list[tuple[str, list[str]]] = [("run", [run.label for run in runs])]
    shared = []
    for name, texts in (("model", [run.model for run in runs]), ("data", [run.dataset for run in runs])):
        if len(set(texts)) > 1:
            columns.append((name, texts))
        else:
            shared.append(f"{name} {texts[0]}")
    first_number = len(columns)
    for name, key, shown in (
        ("trainable", "trainable_parameters", short_count),
        ("steps", "steps", count),
        ("tokens/s", "tokens_per_second", rate),
        ("memory", "peak_memory_bytes", memory),
        ("time", "train_seconds", duration),
    ):
        columns.append((name, [shown(run.get(key)) for run in runs]))
        if key == "trainable_parameters":
            columns.append(("share", [percent(run.share) for run in runs]))
    columns.append(
        ("eval loss", [f"{fixed(run.get('eval_loss_before'))} → {fixed(run.get('eval_loss_after'))}" for run in runs])
    )
    best = _best(len(columns) - 1, [number(run.get("eval_loss_after")) for run in runs], min)
    for task in tasks:
        scores = [run.after.get(task) for run in runs]
        columns.append((task, [percent(score.accuracy, score.stderr) if score else "–" for score in scores]))
        best |= _best(len(columns) - 1, [score.accuracy if score else None for score in scores], max)
    note = f"The same for all: {', '.join(shared)}. " if shared else ""
    note += "Accuracies are ± one standard error. The best of a column stands out."
    rows = list(zip(*(texts for _, texts in columns), strict=True))
    table = Table([name for name, _ in columns], rows, range(first_number, len(columns)), best)
    return {"note": note, "table": table, "settings": _differences(runs)}


def _best(column: int, values: list[float | None], choose: Callable[..., float]) -> set[tuple[int, int]]:
    """The cells (row, column) with the best value, where there is more than one to choose from."""
    known = [value for value in values if value is not None]
    if len(set(known)) < 2:
        return set()
    return {(row, column) for row, value in enumerate(values) if value == choose(known)}


def _differences(runs: list[Run]) -> Table:
    """The settings in which the runs differ, from their configs."""
    settings = [flatten(run.config) for run in runs]
    names = dict.fromkeys(name for one in settings for name in one)
    rows = []
    for name in names:
        values = [json.dumps(one[name], ensure_ascii=False, default=str) if name in one else "–" for one in settings]
        if len(set(values)) > 1:
            rows.append([name, *values])
    return Table(["setting", *(run.label for run in runs)], rows)


def _curves(runs: list[Run]) -> dict[str, Any]:
    single = len(runs) == 1
    series, grouped = [], 1
    for index, run in enumerate(runs):
        train, evaluated = run.curve("loss"), run.eval_curve()
        grouped = max(grouped, thin(train)[1])
        if train:
            series.append(Series("training" if single else f"{run.label} training", train, index, faint=not single))
        if evaluated:
            name = "evaluation" if single else f"{run.label} evaluation"
            series.append(Series(name, evaluated, index + single, markers=True))
    others = []
    for name, label in (("learning_rate", "learning rate"), ("grad_norm", "gradient norm")):
        lines = [Series(run.label, run.curve(name), index) for index, run in enumerate(runs) if run.curve(name)]
        panel = Panel(label, lines, zero=True)
        others.append(line_chart([[panel]], "optimizer step", height=190, width=460, legend=False))
    return {
        "chart": line_chart([[Panel("loss (nats per token)", series)]], "optimizer step", height=324),
        "grouped": grouped,
        "others": [chart for chart in others if chart],
    }


def _evaluation(runs: list[Run]) -> dict[str, Any] | None:
    tasks = list(dict.fromkeys(task for run in runs for task in run.headline))
    if not tasks:
        return None
    single = len(runs) == 1
    groups = []
    for task in tasks:
        bases = {run.before[task].accuracy: run.before[task] for run in runs if task in run.before}
        same = list(bases.values()) if len(bases) == 1 else []
        bars = [Bar("before training", base.accuracy, base.stderr, None) for base in same]
        for index, run in enumerate(runs):
            if task in run.after:
                score = run.after[task]
                bars.append(Bar("after training" if single else run.label, score.accuracy, score.stderr, index))
        groups.append((task, bars))
    members = sorted({task for run in runs for task in (*run.after, *run.before)} - set(tasks))
    return {
        "chart": bar_chart(groups, "accuracy"),
        "table": _score_table(runs, tasks, single),
        "named": len(members),
        "members": _score_table(runs, members, single),
    }


def _score_table(runs: list[Run], tasks: list[str], single: bool) -> Table:
    rows = []
    for task in tasks:
        for run in runs:
            old, new = run.before.get(task), run.after.get(task)
            known = new or old
            if known is None:
                continue
            change = signed(100 * (new.accuracy - old.accuracy)) if old and new else "–"
            rows.append(
                [task, *([] if single else [run.label])]
                + [percent(score.accuracy, score.stderr) if score else "–" for score in (old, new)]
                + [change, count(known.shots), count(known.samples)]
            )
    head = ["task", *([] if single else ["run"]), "before", "after", "change (points)", "shots", "questions"]
    return Table(head, rows, range(1 if single else 2, len(head)))


def layer_and_role(module: str) -> tuple[str, str]:
    """`model.layers.3.self_attn.q_proj` -> ("3", "self_attn.q_proj"): the first number names the layer, later ones
    (experts) fall together; a module outside the layers has the layer ""."""
    layer = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
    if not layer:
        return "", module
    role = re.sub(r"\.\d+(?=\.|$)", "", module[layer.end() :])
    return layer.group(1), role or module[: layer.start()]


def _selected(run: Run) -> dict[str, str]:
    """The trained share of each layer and role, as a chart and a note, or why there is none."""
    modules = (run.selection or {}).get("modules")
    if not isinstance(modules, dict) or not modules:
        why = "the method selects no part of the weights, or the run stopped before."
        return {"note": f"There is no selection/selection.json: {why}", "chart": ""}
    trained: dict[tuple[str, str], float] = {}
    weights: dict[tuple[str, str], float] = {}
    kinds: dict[str, float] = {}
    for module, entry in modules.items():
        entry = entry if isinstance(entry, dict) else {}
        shape = entry.get("shape")
        sides = [number(side) for side in shape] if isinstance(shape, list) else []
        trainable = number(entry.get("trainable"))
        if len(sides) != 2 or None in sides or trainable is None or not sides[0] or not sides[1]:
            return {"note": f"selection.json says neither shape nor trained weights of {module}.", "chart": ""}
        place = layer_and_role(module)
        trained[place] = trained.get(place, 0.0) + trainable
        weights[place] = weights.get(place, 0.0) + sides[0] * sides[1]
        for kind in ("rows", "columns", "blocks"):
            kinds[kind] = kinds.get(kind, 0.0) + (number(entry.get(kind)) or 0.0)

    def value(role: str, layer: str) -> tuple[float, str] | None:
        whole = weights.get((layer, role))
        if not whole:
            return None
        share = trained[layer, role] / whole
        return share, percent(share)

    layers = sorted({layer for layer, _ in weights}, key=lambda layer: (not layer, int(layer or 0)))
    roles = list(dict.fromkeys(role for _, role in weights))
    size = number((run.selection or {}).get("block_size"))
    units = [f"{count(many)} {kind}" for kind, many in kinds.items() if many]
    if size is not None and kinds["blocks"]:
        units = [f"{unit} of {size:.0f} × {size:.0f}" if unit.endswith("blocks") else unit for unit in units]
    note = (
        f"{', '.join(units) or 'Nothing'} in {count(len(modules))} weights. Each cell: the share of that weight that "
    )
    note += f"trains; all together {percent(sum(trained.values()) / sum(weights.values()))} of them. The darkest: "
    note += f"{percent(max(trained[place] / weights[place] for place in weights))}."
    return {"note": note, "chart": heat_map(roles, layers, value, "layer")}


def _details(run: Run) -> dict[str, Any]:
    """Config and environment as they are on file."""
    environment = run.environment
    pairs = [("run folder", str(run.path))]
    for name in ("command_line", "commit", "device", "dtype", "world_size", "platform", "cpu_count", "started"):
        if environment.get(name) is not None:
            pairs.append((name.replace("_", " "), str(environment[name])))
    for name in ("seed", "sparsity", "scope"):
        if run.get(name) is not None:
            value = run.get(name)
            pairs.append((name, f"{value:.6g}" if isinstance(value, float) else str(value)))
    found = environment.get("versions")
    if isinstance(found, dict):
        pairs.append(("versions", ", ".join(f"{name} {version}" for name, version in found.items() if version)))
    return {
        "facts": pairs,
        "environment": bool(environment),
        "config": run.config_text,
        "summary": "" if run.summary is None else json.dumps(run.summary, indent=2, ensure_ascii=False),
    }

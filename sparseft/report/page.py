"""A run folder, or several side by side, as one self-contained HTML page: its content, which `page.html.j2` lays out.

Read from the run's files alone, so a run that failed, or was made elsewhere, reports too: what is missing is said.
Everything in those files is data of unknown origin: text is escaped, numbers are checked before they are drawn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseft.errors import UserError
from sparseft.report.answers import sample_answers
from sparseft.report.charts import Band, Bar, Panel, Series, bar_chart, drawn, line_chart, thin
from sparseft.report.comparison import comparison
from sparseft.report.html import Table, listed, write_page
from sparseft.report.learning import learnt_and_forgotten
from sparseft.report.numbers import count, duration, fixed, memory, number, percent, rate, short_count, signed, when
from sparseft.report.preference import preference
from sparseft.report.rate import found_rates
from sparseft.report.run_data import Run, name_runs, read_run
from sparseft.report.selected import selected

MANY = 12  # runs: with more, charts show the first of them, and what each one selected is left to its own page


def build_report(runs: Sequence[Path], out: Path) -> Path:
    """Writes the page of `runs` (run folders) to `out` and returns it. Needs at least one run."""
    if not runs:
        raise UserError("a report needs at least one run's folder.")
    loaded = [read_run(Path(path)) for path in runs]
    name_runs(loaded)
    single = len(loaded) == 1
    return write_page(
        Path(out),
        "page.html.j2",
        wide=not single,
        single=single,
        **_header(loaded),
        warnings=_warnings(loaded),
        tiles=_tiles(loaded[0]) if single else [],
        comparison=None if single else comparison(loaded),
        loss=_curves(loaded),
        preference=preference(loaded[:MANY]),
        rate=found_rates(loaded[:MANY]),
        evaluation=_evaluation(loaded),
        learning=learnt_and_forgotten(loaded, MANY),
        samples=sample_answers(loaded),
        many=len(loaded) > MANY,
        runs=[
            {"label": run.label, "selected": selected(run) if len(loaded) <= MANY else None, **_details(run)}
            for run in loaded
        ],
    )


def _warnings(runs: list[Run]) -> list[str]:
    """What is to be warned of, each once, with the runs that it is about where there are several."""
    about: dict[str, list[str]] = {}
    for run in runs:
        for text in dict.fromkeys(run.warnings):
            about.setdefault(text, []).append(run.label)
    return list(about) if len(runs) == 1 else [f"{listed(labels)}: {text}" for text, labels in about.items()]


def sentence(run: Run) -> str:
    """What came of the run, in one sentence."""
    if run.summary is None:
        reached = "" if run.last_step is None else f"; its last logged step is {count(run.last_step)}"
        return f"{run.method} training of {run.model_name} on {run.dataset_name} has not finished{reached}."
    text = f"{run.method} trained {count(run.get('trainable_parameters'))} of {count(run.get('total_parameters'))} "
    text += f"parameters ({percent(run.share)}) of {run.model_name} on {run.dataset_name}"
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
        lead = f"{listed([run.label for run in runs])}, compared by what they trained, cost and learnt."
        return {"title": f"{len(runs)} runs side by side", "kicker": "sparseft", "lead": lead}
    started = run.environment.get("started")
    kicker = f"sparseft run {run.path.resolve().name}" + (f", started {when(started)}" if started else "")
    return {"title": f"{run.method} on {run.dataset_name}", "kicker": kicker, "lead": sentence(run)}


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
    if number(get("eval_margin_after")) is not None:
        accuracy = number(get("eval_accuracy_after"))
        shown = "of rewards" if accuracy is None else f"{percent(accuracy)} of the pairs in the right order"
        entries.append(
            ("Margin", fixed(get("eval_margin_after")), f"{fixed(get('eval_margin_before'))} before; {shown}")
        )
    for task in run.headline[:2]:
        if task in run.after:
            old = run.before.get(task)
            was = f"{percent(old.accuracy)} before" if old else f"{count(run.after[task].samples)} questions"
            entries.append((f"Accuracy, {task}", percent(run.after[task].accuracy), was))
    return entries


def _curves(runs: list[Run]) -> dict[str, Any]:
    """The charts of what was logged on the way; of many runs the evaluation losses alone, the best ones coloured."""
    single, many = len(runs) == 1, len(runs) > MANY
    series, grouped = [], 1
    order = list(runs)
    if many:
        lowest = sorted(runs, key=lambda run: (run.losses[1] is None, run.losses[1] or 0.0))[: MANY // 2]
        order = lowest + [run for run in runs if run not in lowest]
    for index, run in enumerate(order):
        train, evaluated = [] if many else run.curve("loss"), run.eval_curve()
        grouped = max(grouped, thin(train)[1])
        if train:
            series.append(Series("training" if single else f"{run.label} training", train, index, faint=not single))
        if evaluated:
            name = "evaluation" if single else f"{run.label} evaluation"
            colour = None if many and index >= MANY // 2 else index + single
            series.append(Series(name, evaluated, colour, markers=not many))
    others = []
    for name, label in (
        ("learning_rate", "learning rate"),
        ("grad_norm", "gradient norm"),
        ("eval_score", "validation score"),
    ):
        lines = [Series(run.label, run.curve(name), index) for index, run in enumerate(runs) if run.curve(name)]
        bands = [_error_band(run) for run in runs] if name == "eval_score" and single else []
        panel = Panel(label, lines, zero=True, bands=[band for band in bands if band])
        if not many:
            others.append(line_chart([[panel]], "optimizer step", height=190, width=440, legend=False))
    objectives = list(dict.fromkeys(run.objective for run in runs))
    panel = Panel("loss (nats per token)" if objectives == ["sft"] else f"loss ({', '.join(objectives)})", series)
    return {
        "chart": drawn(
            lambda width: line_chart([[panel]], "optimizer step", height=324 if single else 380, width=width)
        ),
        "grouped": grouped,
        "objectives": objectives,
        "others": [chart for chart in others if chart],
    }


def _error_band(run: Run) -> Band | None:
    """One standard error each way of the validation score, where it was logged."""
    errors = dict(run.curve("eval_score_stderr"))
    points = [(step, score, errors.get(step)) for step, score in run.curve("eval_score")]
    if not any(error is not None for *_, error in points):
        return None
    around = [
        (step, None, None) if score is None or error is None else (step, score - error, score + error)
        for step, score, error in points
    ]
    return Band("± one standard error", around, 0.3)


def _evaluation(runs: list[Run]) -> dict[str, Any] | None:
    tasks = list(dict.fromkeys(task for run in runs for task in run.headline))
    if not tasks:
        return None
    single = len(runs) == 1
    groups = []
    drawn_runs = runs[:MANY]
    for task in tasks:
        bases = {run.before[task].accuracy: run.before[task] for run in drawn_runs if task in run.before}
        same = list(bases.values()) if len(bases) == 1 else []
        bars = [Bar("before training", base.accuracy, base.stderr, None) for base in same]
        for index, run in enumerate(drawn_runs):
            if task in run.after:
                score = run.after[task]
                bars.append(Bar("after training" if single else run.label, score.accuracy, score.stderr, index))
        if bars:
            groups.append((task, bars))
    members = sorted({task for run in runs for task in (*run.after, *run.before)} - set(tasks))
    return {
        "chart": drawn(lambda width: bar_chart(groups, "accuracy", width=width)),
        "first": MANY if len(runs) > MANY else 0,
        "table": _score_table(runs, tasks, single),
        "named": len(members),
        "members": _score_table(runs, members, single),
    }


def _score_table(runs: list[Run], tasks: list[str], single: bool) -> Table:
    rows, keys = [], []
    for task in tasks:
        for run in runs:
            old, new = run.before.get(task), run.after.get(task)
            known = new or old
            if known is None:
                continue
            change = run.change(task)
            changed = signed(100 * change.value) if change else "–"
            changed += f" ± {100 * change.stderr:.1f}" if change and change.stderr is not None else ""
            rows.append(
                [task, *([] if single else [run.label])]
                + [percent(score.accuracy, score.stderr) if score else "–" for score in (old, new)]
                + [changed, count(known.shots), count(known.samples)]
            )
            values = [score.accuracy if score else None for score in (old, new)]
            keys.append([*values, change.value if change else None, number(known.shots), number(known.samples)])
    head = ["task", *([] if single else ["run"]), "before", "after", "change (points)", "shots", "questions"]
    first = 1 if single else 2
    by_column = {first + place: column for place, column in enumerate(zip(*keys, strict=True))}
    return Table(head, rows, range(first, len(head)), keys=by_column, sorts=len(rows) > 2)


def _details(run: Run) -> dict[str, Any]:
    """Config and environment as they are on file."""
    environment = run.environment
    pairs = [("run folder", str(run.path)), ("model", run.model), ("data", run.dataset)]
    for name in ("command_line", "commit", "device", "dtype", "world_size", "platform", "cpu_count", "started"):
        if environment.get(name) is not None:
            pairs.append((name.replace("_", " "), str(environment[name])))
    for name in ("seed", "sparsity", "scope", "bad_steps", "loss_spikes"):
        if run.get(name) is not None:
            value = run.get(name)
            pairs.append((name.replace("_", " "), f"{value:.6g}" if isinstance(value, float) else str(value)))
    found = environment.get("versions")
    if isinstance(found, dict):
        pairs.append(("versions", ", ".join(f"{name} {version}" for name, version in found.items() if version)))
    return {
        "facts": pairs,
        "environment": bool(environment),
        "config": run.config_text,
        "summary": "" if run.summary is None else json.dumps(run.summary, indent=2, ensure_ascii=False),
    }

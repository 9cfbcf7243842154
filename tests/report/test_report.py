"""The report: what it says is what the files say, whatever they hold."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from sparseft.commands import report as command
from sparseft.config import flatten
from sparseft.errors import UserError
from sparseft.files import atomic
from sparseft.report.charts import MAX_POINTS, Bar, Panel, Series, bar_chart, heat_map, line_chart, thin
from sparseft.report.numbers import count, duration, memory, number, percent, rate, short_count
from sparseft.report.page import build_report, sentence
from sparseft.report.run_data import name_runs, read_run
from sparseft.report.selected import layer_and_role
from sparseft.runs import environment
from sparseft.runs import folder as runs
from sparseft.runs import metrics as runs_metrics

NASTY = "</script><script>alert('x')</script>\"'&<img src=x onerror=y> \ud800\x00"
SUMMARY = {
    "method": "alpha", "model": "some/model", "dataset": "letters", "sparsity": 0.95, "scope": None,
    "trainable_parameters": 40960, "scope_parameters": 819200, "total_parameters": 1024000, "steps": 20,
    "tokens": 184320, "train_seconds": 48.23, "tokens_per_second": 3821.5, "peak_memory_bytes": 3 * 2**29,
    "train_loss": 1.5, "eval_loss_before": 2.9, "eval_loss_after": 0.97, "seed": 0,
}  # fmt: skip


class Page(HTMLParser):
    """A page read back: its visible text, elements with attributes; complains about unbalanced tags."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.elements, self.stack = "", [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.stack, f"left open: {self.stack}"
        self.text = " ".join(self.text.replace("\xa0", " ").split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.stack):
            self.text += f" {data}"

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def make_run(folder: Path, **summary: Any) -> Path:
    """A finished run with all its files; keywords change the summary."""
    for name in ("selection", "eval/before"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    content = SUMMARY | summary
    (folder / "config.yaml").write_text(f"method:\n  name: {content['method']}\nseed: {content['seed']}\n")
    atomic.write_json(folder / "summary.json", content)
    atomic.write_json(folder / "environment.json", environment.environment("cpu", "bfloat16", 1) | {"commit": "abc123"})
    for step in range(0, 21, 5):
        record = {"step": step, "loss": 3 - step / 10, "learning_rate": 1e-3 * (1 - step / 20), "grad_norm": 1.0}
        runs_metrics.append_metrics(folder / "metrics.jsonl", record)
    modules = {
        "model.layers.0.mlp.down_proj": {"shape": [10, 20], "blocks": 3, "trainable": 12},
        "model.layers.1.mlp.down_proj": {"shape": [10, 20], "blocks": 12, "trainable": 48},
        "model.layers.0.self_attn.q_proj": {"shape": [10, 10], "blocks": 2, "trainable": 8},
    }
    atomic.write_json(folder / "selection/selection.json", {"method": "alpha", "block_size": 2, "modules": modules})
    for name, accuracy in (("eval/before", 0.25), ("eval", 0.625)):
        tasks = {
            "group": {"accuracy": accuracy, "stderr": 0.02, "samples": 120, "shots": 0, "tasks": ["member"]},
            "member": {"accuracy": accuracy / 2, "stderr": None, "samples": 60, "shots": 0},
        }
        atomic.write_json(folder / name / "group.json", {"task": "group", "tasks": tasks})
    return folder


def test_a_run_reports_what_its_files_say(tmp_path: Path) -> None:
    page = Page(build_report([make_run(tmp_path / "run")], tmp_path / "report.html"))
    assert (
        "alpha trained 40,960 of 1,024,000 parameters (4.0 %) of some/model on letters for 20 steps in 48.2 s: "
        "evaluation loss 2.900 → 0.970, group 25.0 % → 62.5 %." in page.text
    )
    for expected in (
        "Trainable parameters 41.0 k 4.0 % of 1.02 M; 5.0 % of the weights in scope",
        "Tokens per second 3,822 184 k tokens in all",
        "Peak memory 1.50 GiB cpu",
        "Training time 48.2 s 20 steps of 2.41 s",
        "Evaluation loss 0.970 2.900 before",
        "group 25.0 ± 2.0 % 62.5 ± 2.0 % +37.5 ± 2.8 0 120",
        "Members of the groups (1)",
        "member 12.5 % 31.2 % +18.8 0 60",
        "17 blocks of 2 × 2 in 3 weights, all together 13.6 % of them. Each cell: the share of that weight that "
        "trains; the darkest: 24.0 %.",
        "commit abc123",
        "dtype bfloat16",
        "name: alpha",
    ):
        assert expected in page.text, expected
    assert "Warning" not in page.text


def test_the_page_loads_nothing_and_runs_its_own_script_alone(tmp_path: Path) -> None:
    page = Page(build_report([make_run(tmp_path / "run")], tmp_path / "report.html"))
    assert build_report([tmp_path / "run"], tmp_path / "again.html").read_text() == page.source
    assert page.of("script") == [{}] and not page.of("link") and not page.of("img")
    (script,) = re.findall(r"<script>(.*?)</script>", page.source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert page.of("meta")[1]["content"].endswith(f"; script-src 'sha256-{digest}'")  # no other script may run
    for _, attributes in page.elements:
        assert not {"src", "href", "onload", "onclick"} & set(attributes)
        assert (attributes.get("xlink:href") or "#").startswith("#")  # what the drawing itself holds
    assert not re.search(r"url\((?!#)", page.source) and "@import" not in page.source
    assert "default-src 'none'" in page.of("meta")[1]["content"]
    assert "prefers-color-scheme: dark" in page.source and "@media print" in page.source


def add_everything(folder: Path) -> None:
    """What newer runs have beside: answers, the selection's indices, and what its scores look like."""
    index = {"layers.0.mlp.down_proj": [[0, 0], [1, 3], [4, 9]], "layers.0.self_attn.q_proj": [[0, 0], [4, 4]]}
    index["layers.1.mlp.down_proj"] = [[row, column] for row in range(4) for column in range(3)]
    tensors = {f"model.{name}.blocks.index": numpy.array(blocks, dtype="int32") for name, blocks in index.items()}
    save_file(tensors, folder / "selection/selection.safetensors")
    content = json.loads((folder / "selection/selection.json").read_text())
    scores = {"scores": [0, 1, 2, 3, 4, 5, 9], "kept_scores": [6, 7, 9], "kept_share": 0.5}
    units = {"kind": "blocks", "unit": 2, "start": 0, "units": 50, "kept": 3}
    content["candidates"] = dict.fromkeys(content["modules"], units | scores)
    content["method_config"] = {"importance": "fisher", "order": "largest"}
    atomic.write_json(folder / "selection/selection.json", content)
    told = [(0, "base", "I do not <b>know</b>"), (10, "adapter", "a cat"), (20, "adapter", "a dog")]
    for step, model, answer in told:
        line = {"step": step, "model": model, "prompt": "What <i>is</i> it?", "answer": answer}
        runs_metrics.append_metrics(folder / "samples.jsonl", line)


def test_everything_that_a_run_may_have_is_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    add_everything(folder)
    page = Page(build_report([folder], tmp_path / "report.html"))
    for expected in (
        "Prompt 1 of 1 What <i>is</i> it? base I do not <b>know</b> after step 20 a dog As it learnt: 1 earlier "
        "after step 10 a cat",
        "Where in the weights",
        "layer 0, mlp.down_proj: 6.0 % trains, 3 of 50 blocks",
        "Importance fisher of the units of each role",
        "q: 50 % of the sum is kept",
        "group, change: +37.50 points ± 2.83 (standard error)",
    ):
        assert expected in page.text, expected
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert ids and len(set(ids)) == len(ids)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', page.source))
    assert used and used <= set(ids)
    heads = [attributes for attributes in page.of("th") if attributes.get("scope") not in ("col", "row")]
    assert not heads  # every head says of what
    images = [attributes for attributes in page.of("svg") if attributes.get("role") != "img"]
    assert not images


def test_many_runs_make_a_page_that_leaves_charts_of_each_out(tmp_path: Path) -> None:
    names = ["a & <b>", "ünï 🦙", "x" * 200, *(f"run {number}" for number in range(11))]
    folders = [make_run(tmp_path / name, train_seconds=float(number)) for number, name in enumerate(names)]
    (folders[5] / "summary.json").unlink()
    page = Page(build_report(folders, tmp_path / "report.html"))
    assert len(page.of("table")) > len(folders)
    assert "run 2: The run has not finished" in page.text and "and 6 more, compared by" in page.text
    assert "The page of each run by itself shows it" in page.text and "Where in the weights" not in page.text
    assert {attributes.get("data-sort") for attributes in page.of("td")} >= {"0.0", "13.0"}


def test_everything_from_the_files_is_escaped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    names = {"method": NASTY, "model": NASTY, "dataset": NASTY, "seed": NASTY, "warnings": [NASTY]}
    (folder / "summary.json").write_text(json.dumps(SUMMARY | names))
    (folder / "config.yaml").write_text("x: '</pre><script>alert(1)</script>'\n")
    found = {"versions": {NASTY: NASTY}, "device": NASTY, "started": NASTY}
    (folder / "environment.json").write_text(json.dumps(found))
    modules = {f"layers.0.{NASTY}": {"shape": [2, 2], "rows": 1, "trainable": 2}}
    (folder / "selection/selection.json").write_text(json.dumps({"modules": modules}))
    entry = {"accuracy": 0.5, "stderr": 0.1, "samples": NASTY, "shots": NASTY}
    (folder / "eval/group.json").write_text(json.dumps({"task": NASTY, "tasks": {NASTY: entry}}))
    line = {"step": 0, "model": "base", "prompt": NASTY, "answer": NASTY}
    (folder / "samples.jsonl").write_text(json.dumps(line) + "\n")
    for folders in ([folder], [folder, make_run(tmp_path / "other")]):
        page = Page(build_report(folders, tmp_path / "report.html"))
        assert len(page.of("script")) == 1 and not page.of("img")
        assert "alert('x')" in page.text  # shown as text, not lost
        assert "\x00" not in page.source


def test_a_run_that_failed_reports_what_there_is(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "summary.json").unlink()
    page = Page(build_report([folder], tmp_path / "report.html"))
    assert (
        "The run has not finished, it is still running or it failed: no summary.json; its last logged step is 20."
        in page.text
    )
    assert "alpha training of unknown model on unknown data has not finished; its last logged step is 20." in page.text
    assert "loss (nats per token)" in page.text


def test_an_empty_folder_and_broken_files_are_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    page = Page(build_report([tmp_path / "empty"], tmp_path / "report.html"))
    for expected in (
        "No loss was logged",
        "Not evaluated on any task",
        "There is no selection/selection.json",
        "environment.json is missing",
        "config.yaml is missing",
    ):
        assert expected in page.text
    folder = make_run(tmp_path / "broken")
    for name in ("summary.json", "environment.json", "selection/selection.json", "eval/group.json"):
        (folder / name).write_text("{")
    (folder / "metrics.jsonl").write_text("x\ny\n")
    (folder / "config.yaml").write_text("a: [")
    page = Page(build_report([folder], tmp_path / "report.html"))
    for name in ("summary.json", "environment.json", "selection/selection.json", "eval/group.json", "metrics.jsonl"):
        assert f"{name} could not be read" in page.text
    assert "config.yaml could not be read: not YAML" in page.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_content_of_the_files_breaks_the_page(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / "selection").mkdir()
    (folder / "eval").mkdir()
    (folder / "summary.json").write_text(json.dumps({name: data.draw(JSON) for name in SUMMARY}))
    (folder / "environment.json").write_text(json.dumps({"versions": data.draw(JSON), "started": data.draw(JSON)}))
    lines = [{"step": data.draw(JSON), "loss": data.draw(JSON), "eval_loss": data.draw(JSON)} for _ in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    good = {"shape": [2, 2], "rows": 1, "trainable": 2}
    odd = st.fixed_dictionaries({"shape": st.tuples(st.just(2), JSON), "trainable": JSON})
    modules = {name: data.draw(st.just(good) | odd | JSON) for name in ("layers.0.a", "b")}
    scores = {"scores": data.draw(JSON | st.lists(st.floats(), min_size=7, max_size=7)), "unit": data.draw(JSON)}
    scores |= {name: data.draw(JSON) for name in ("kept_scores", "start", "units", "kept", "kept_share")}
    candidates = {"layers.0.a": scores, "layers.0.a:q": scores, "b": data.draw(JSON)}
    content = {"modules": data.draw(st.just(modules) | JSON), "candidates": data.draw(st.just(candidates) | JSON)}
    (folder / "selection/selection.json").write_text(json.dumps(content | {"method_config": data.draw(JSON)}))
    one = numpy.array([1], dtype="int32")
    save_file({"layers.0.a.rows.index": one, "b.columns.index": one}, folder / "selection/selection.safetensors")
    lines = [{"step": data.draw(JSON), "model": "adapter", "prompt": "p", "answer": data.draw(JSON)} for _ in range(2)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entry = {name: data.draw(JSON) for name in ("accuracy", "stderr", "samples", "tasks", "base", "difference_stderr")}
    (folder / "eval/t.json").write_text(json.dumps({"task": data.draw(JSON), "tasks": {"t": entry}}))
    page = Page(build_report([folder], folder / "report.html"))
    assert not re.search(r"\b(nan|inf)\b", "".join(str(svg) for svg in page.of("path") + page.of("rect")))


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a")
    second = make_run(tmp_path / "b", method="beta", trainable_parameters=1024000, eval_loss_after=0.5, seed=7)
    page = Page(build_report([first, second], tmp_path / "report.html"))
    assert "The same for all: model some/model, data letters." in page.text
    assert "alpha 2.900 0.970 62.5 ± 2.0 % +37.5 41.0 k 4.0 % 20 3,822 1.50 GiB 48.2 s" in page.text
    assert "beta 2.900 0.500 62.5 ± 2.0 % +37.5 1.02 M 100 % 20 3,822 1.50 GiB 48.2 s" in page.text
    best = re.findall(r'<td class="number best" data-sort="([^"]*)">([^<]*)</td>', page.source)
    assert best == [("0.5", "0.500")]  # the accuracies are equal: none of them stands out
    assert 'method.name "alpha" "beta"' in page.text and "seed 0 7" in page.text
    assert "What was selected: alpha" in page.text and "How it was made: beta" in page.text


def labels(folders: list[Path]) -> list[str]:
    found = [read_run(folder) for folder in folders]
    name_runs(found)
    return [run.label for run in found]


def test_runs_of_one_method_are_told_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "one"), make_run(tmp_path / "two"), make_run(tmp_path / "x/two")]
    assert labels(folders[:2]) == ["one", "two"]
    assert labels(folders) == ["1: one", "2: two", "3: two"]


def test_a_report_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one run"):
        build_report([], tmp_path / "r.html")


def test_warnings_of_the_run_are_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", warnings=["sparsity is off by a fifth"])
    runs_metrics.append_metrics(folder / "metrics.jsonl", {"step": 21, "loss": math.nan})
    atomic.write_json(folder / "environment.json", {"commit": "abc-dirty"})
    page = Page(build_report([folder], tmp_path / "r.html"))
    assert "Warnings sparsity is off by a fifth The training loss was not finite in 1 of the logged steps." in page.text
    assert "uncommitted changes" in page.text


def test_eval_losses_of_the_summary_stand_in_for_missing_lines(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert read_run(folder).eval_curve() == [(0.0, 2.9), (20.0, 0.97)]
    for step, loss in ((0, 2.8), (10, 1.5), (20, 1.0)):
        runs_metrics.append_metrics(folder / "metrics.jsonl", {"step": step, "eval_loss": loss})
    assert read_run(folder).eval_curve() == [(0.0, 2.8), (10.0, 1.5), (20.0, 1.0)]


def test_sentence_without_evaluation(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    atomic.write_json(folder / "summary.json", SUMMARY | {"eval_loss_before": None, "eval_loss_after": None})
    assert sentence(read_run(folder)).replace("\xa0", " ").endswith("for 20 steps in 48.2 s.")


# -- charts: positions in the drawing are the values ------------------------------------------------------------------


def texts(svg: str, anchor: str) -> list[tuple[str, float]]:
    """Texts set at their `middle` (below the x axis) or `end` (beside the y axis), and their x."""
    nodes = [node for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("text")]
    return [(node.text, float(node.get("x"))) for node in nodes if f"text-anchor: {anchor}" in node.get("style")]


def x_ticks(svg: str) -> dict[float, float]:
    """Value -> pixel, from the labels that the drawing itself carries."""
    shown = [(text.replace(",", "").removesuffix("\xa0%"), x) for text, x in texts(svg, "middle")]
    return {float(text): x for text, x in shown if re.fullmatch(r"[\d.]+", text)}


def y_ticks(svg: str) -> dict[float, float]:
    """Value -> pixel, from the labels and the lines across that belong to them, both from below."""
    lines = [float(y) for _, y in re.findall(r'd="M ([\d.]+) ([\d.]+) \nL [\d.]+ \2 \n" [^>]*--grid', svg)]
    return dict(zip([float(text) for text, _ in texts(svg, "end")], lines, strict=True))


def at(ticks: dict[float, float], pixel: float) -> float:
    """The value at a pixel by the axis' labels."""
    (a, pa), (b, pb) = sorted(ticks.items())[0], sorted(ticks.items())[-1]
    return a + (pixel - pa) * (b - a) / (pb - pa)


def tipped(svg: str) -> dict[str, str]:
    """What the pointer shows -> the path under it, and its style."""
    found = {}
    for group in ElementTree.fromstring(svg).iter():
        title = group.find("{*}title")
        if title is not None:
            drawn = next(node for node in group.iter() if node.get("style"))
            found[title.text] = f"{drawn.get('d')} {drawn.get('style')}"
    return found


def lines(series: list[Series]) -> str:
    return line_chart([[Panel("loss", series)]], "step")


def test_lines_lie_where_the_axes_say() -> None:
    points = [(0.0, 3.0), (10.0, 2.25), (40.0, None), (60.0, 1.2), (100.0, 0.7)]
    svg = lines([Series("s", points)])
    path = tipped(svg)["s"]
    assert re.findall(r"\b[ML]\b", path) == ["M", "L", "M", "L"]  # the gap is not bridged
    drawn = [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]
    for (x, y), (step, value) in zip(drawn, [point for point in points if point[1] is not None], strict=True):
        assert at(x_ticks(svg), x) == pytest.approx(step, abs=0.2)
        assert at(y_ticks(svg), y) == pytest.approx(value, abs=0.01)


def test_the_same_values_give_the_same_bytes() -> None:
    series = [Series("a $x$ 语", [(0, 1.0), (5, 2.0)], markers=True), Series("_b", [(0, 2.0), (5, None)], 1)]
    svg = lines(series)
    assert svg == lines(series)
    assert "a $x$ 语" in svg and "_b" in svg and not re.search("#[0-9a-f]{6}", svg)  # every colour has its variable


def test_the_users_own_style_changes_nothing() -> None:
    plain = lines([Series("s", [(0, 1.0), (5, 2.0)])])
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert lines([Series("s", [(0, 1.0), (5, 2.0)])]) == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_a_single_point_is_visible_and_nothing_draws_nothing() -> None:
    assert "s, step 5: 1" in tipped(lines([Series("s", [(5.0, 1.0)])]))
    assert lines([Series("s", [(5.0, None)])]) == "" and lines([]) == "" and bar_chart([], "accuracy") == ""


def test_bars_and_whiskers_are_as_long_as_their_values() -> None:
    svg = bar_chart([("task", [Bar("before", 0.25, None, None), Bar("after", 0.6, 0.05)])], "accuracy")
    ticks, drawn = x_ticks(svg), tipped(svg)
    before, after = drawn["task, before: 25.00 %"], drawn["task, after: 60.00 % ± 5.00 (standard error)"]
    for bar, value in ((before, 25), (after, 60)):
        ends = [float(x) for x in re.findall(r"[ML] ([\d.]+) ", bar)]
        assert [at(ticks, min(ends)), at(ticks, max(ends))] == pytest.approx([0, value], abs=0.1)
    (ends,) = re.findall(r'd="M ([\d.]+) ([\d.]+) \nL ([\d.]+) \2 \n" [^>]*--ink', svg)
    assert [at(ticks, float(x)) for x in ends[::2]] == pytest.approx([55, 65], abs=0.1)
    assert "var(--neutral)" in before and ">25.0 %<" in svg and ">60.0 %<" in svg and "after" in svg


def test_heat_map_shades_by_share() -> None:
    shares = {("a", "0"): 0.0, ("a", "1"): 0.1, ("b", "0"): 0.4}

    def value(row: str, column: str) -> tuple[float, str] | None:
        return (shares[row, column], f"{shares[row, column]:.0%}") if (row, column) in shares else None

    svg = heat_map(["a", "b"], ["0", "1"], value, "layer")
    drawn = tipped(svg)
    shaded = [drawn[f"{cell}: {share}"] for cell, share in (("a, layer 0", "0%"), ("a, layer 1", "10%"))]
    shades = [float(re.search(r"(?:^| )(?:fill-)?opacity: ([\d.]+)", cell)[1]) for cell in shaded]
    assert 0 < shades[0] < 0.1 < shades[1] < 0.5
    assert "fill: var(--heat)" in drawn["b, layer 0: 40%"] and "opacity" not in drawn["b, layer 0: 40%"]
    assert "fill: none" in drawn["b, layer 1: nothing"] and ">40%<" in svg


def test_names_that_are_too_long_are_whole_in_their_tips() -> None:
    name = "a_task_with_a_name_that_is_longer_than_there_is_room_for"
    svg = bar_chart([(name, [Bar("after", 0.5)])], "accuracy")
    assert f">{name[:33]}…<" in svg and name in tipped(svg)


def test_colours_beyond_the_palette_differ_by_dash() -> None:
    drawn = tipped(lines([Series(str(index), [(0, 1.0), (1, 2.0)], index) for index in range(12)]))
    styles = {re.search(r"fill.*", path)[0] for path in drawn.values()}
    assert len(styles) == 12


def test_long_curves_are_averaged_in_groups() -> None:
    points = [(float(x), float(x)) for x in range(MAX_POINTS * 4)]
    thinned, size = thin(points)
    assert (len(thinned), size) == (MAX_POINTS, 4)
    assert thinned[0] == (1.5, 1.5) and thinned[-1] == (MAX_POINTS * 4 - 2.5, MAX_POINTS * 4 - 2.5)
    assert thin([(0.0, 1.0)]) == ([(0.0, 1.0)], 1) and thin([]) == ([], 1)
    assert thin([(float(x), None if x % 4 else 1.0) for x in range(MAX_POINTS * 4)])[0][0] == (1.5, 1.0)


# -- numbers and names ------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    return text.replace("\xa0", " ")


def test_numbers_as_people_read_them() -> None:
    assert [plain(short_count(value)) for value in (0, 950, 999.6, 40960, 1024000, 6.74e9)] == [
        "0", "950", "1.00 k", "41.0 k", "1.02 M", "6.74 B",
    ]  # fmt: skip
    assert [plain(percent(value)) for value in (0.0, 0.00016, 0.016, 0.0498, 0.625, 1.0)] == [
        "0 %", "0.016 %", "1.6 %", "5.0 %", "62.5 %", "100 %",
    ]  # fmt: skip
    assert [plain(duration(value)) for value in (0, 48.23, 59.97, 200, 3900)] == [
        "0.0 s", "48.2 s", "1 min 0 s", "3 min 20 s", "1 h 5 min",
    ]  # fmt: skip
    assert [plain(memory(value)) for value in (2**20, 1.5 * 2**30)] == ["1.00 MiB", "1.50 GiB"]
    assert [rate(value) for value in (0.0123, 3821.5)] == ["0.0123", "3,822"]
    assert [number(value) for value in ("1", True, None, math.inf, math.nan, 10**400, 3)] == [None] * 6 + [3.0]
    assert count("<b>") == "–"


def test_what_no_page_can_hold_stands_on_no_axis() -> None:
    drawn = line_chart([[Panel("loss \x1b[31m\ud800", [Series("a", [(0, 1.0), (1, 2.0)])])]], "step\x00")
    assert not {"\x1b", "\x00"} & set(drawn) and drawn.encode()


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", ("3", "self_attn.q_proj")),
        ("transformer.h.11.attn.c_attn", ("11", "attn.c_attn")),
        ("model.layers.0.mlp.experts.down_proj.3", ("0", "mlp.experts.down_proj")),
        ("model.layers.0.mlp.experts.7.w1", ("0", "mlp.experts.w1")),
        ("lm_head", ("", "lm_head")),
        (f"layers.{'9' * 5000}.q", ("", f"layers.{'9' * 5000}.q")),  # no number that Python would read
    ],
    ids=lambda value: str(value)[:40],
)
def test_layer_and_role(module: str, expected: tuple[str, str]) -> None:
    assert layer_and_role(module) == expected


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


# -- the command ------------------------------------------------------------------------------------------------------


def test_command_takes_the_latest_one_or_several(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no run yet"):
        command.run([])
    first, second = make_run(in_tmp / "outputs/a"), make_run(in_tmp / "outputs/b", method="beta")
    runs.link_latest(second)
    assert command.run([]) == {"report": "outputs/b/report.html", "runs": ["outputs/b"]}
    assert command.run(["outputs/a"])["report"] == "outputs/a/report.html" and (first / "report.html").is_file()
    result = command.run(["outputs/a", "outputs/latest"])
    assert result["runs"] == ["outputs/a", "outputs/b"]
    assert re.fullmatch(r"outputs/report-\d{8}-\d{6}\.html", result["report"])
    assert "2 runs side by side" in Page(Path(result["report"])).text
    command.render(result)
    assert result["report"] in capsys.readouterr().out


def test_command_keeps_two_comparisons_of_one_second(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(in_tmp / "a"), make_run(in_tmp / "b")
    monkeypatch.setattr(command, "timestamp", lambda: "now")
    monkeypatch.setattr(command, "build_report", lambda folders, out: out.parent.mkdir(exist_ok=True) or out.touch())
    made = [command.run(["a", "b"])["report"] for _ in range(3)]
    assert made == ["outputs/report-now.html", "outputs/report-now-2.html", "outputs/report-now-3.html"]


def test_command_refuses_what_is_no_run(in_tmp: Path) -> None:
    make_run(in_tmp / "outputs/sylva-one")
    with pytest.raises(UserError, match="Did you mean 'sylva-one'"):
        command.run(["outputs/sylva-on"])
    with pytest.raises(UserError, match="named more than once"):
        command.run(["outputs/sylva-one", "./outputs/sylva-one/"])
    (in_tmp / "outputs/sylva-one/report.html").mkdir()
    with pytest.raises(UserError, match="cannot write the report"):
        command.run(["outputs/sylva-one"])

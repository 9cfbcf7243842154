"""`sparseft bench scaling`: its points, its figures against `bench train`'s, its charts."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from sparseft.bench import scaling
from sparseft.bench.output import cpu_name
from sparseft.compose.run_config import compose
from sparseft.errors import UserError
from support.running import files, sparseft

WORDS = ["bench.width=64", "bench.depth=1", "bench.length=16", "bench.batch_size=1", "sparsity=0.9", "bench.steps=1",
         "bench.warmup_steps=0", "bench.methods=[floor,s2ft,'lora rank=2']", "method.block_size=16",
         "bench.widths=[64,128]", "bench.lengths=[16,64]", "bench.batches=[1,4]", "bench.densities=[0.1,0.3]",
         "bench.depths=[1,3]"]  # fmt: skip


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("scaling")
    done = sparseft(folder, "bench", "scaling", *WORDS, "output_dir=out")
    return folder, json.loads((folder / "out/bench.json").read_text()), done.out


def test_points_differ_from_the_base_in_one_thing() -> None:
    config = compose("bench", WORDS)
    base = scaling.base_point(config)
    assert base == {"width": 64, "length": 16, "batch": 1, "density": 0.1, "depth": 1}
    plan = scaling.points(config, base)
    assert len(plan) == 10 and plan[:2] == [("width", 64), ("width", 128)]
    made = scaling.at(config, base | {"density": 0.3})
    assert made.sparsity == pytest.approx(0.7) and made.bench.width == 64 and config.sparsity == 0.9
    made = scaling.at(config, base | {"batch": 4})
    assert (made.bench.batch_size, made.bench.length, made.bench.depth) == (4, 16, 1)
    default = scaling.base_point(compose("bench", []))
    assert default == {"width": 256, "length": 256, "batch": 2, "density": 0.016, "depth": 2}


def test_a_density_beyond_a_methods_scope_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    plain = scaling.train.run
    monkeypatch.setattr(scaling.train, "run", lambda config: (asked.append(config.sparsity), plain(config))[1])
    words = [*WORDS, "bench.methods=[floor,s2ft]", "bench.axes=[batch,density]", "bench.densities=[0.1,0.6]"]
    with pytest.raises(UserError, match="only .* in scope"):
        scaling.run(compose("bench", words))
    assert asked == [pytest.approx(0.4)]


def test_every_point_is_measured_once(grown: tuple[Path, dict[str, Any], str]) -> None:
    _, result, out = grown
    points = {(point["axis"], point["value"]): point["methods"] for point in result["points"]}
    assert len(points) == 10
    for axis in scaling.AXES:  # the base point lies on every axis
        assert points[axis, result["base"][axis]] == points["width", 64]
    linears = 4 * 64 * 64 + 3 * 64 * 192
    for density in (0.1, 0.3):
        trained = points["density", density]["s2ft"]["trainable_parameters"]
        assert trained == pytest.approx(density * linears, rel=0.2)
    assert points["depth", 3]["lora rank=2"]["trainable_parameters"] == 3 * 2 * (4 * 128 + 3 * 256)
    one, three = (points["depth", depth]["floor"]["peak_memory_bytes"] for depth in (1, 3))
    assert three - one > 2 * 4 * linears  # two layers' weights more
    assert points["length", 64]["floor"]["peak_memory_bytes"] > points["length", 16]["floor"]["peak_memory_bytes"]
    assert out.startswith(f"Growth of a training step: float32 on {cpu_name()} (") and ", width 64" in out
    assert "lora rank=2 ÷ floor" in out.splitlines()[1] and len(out.splitlines()) == 14


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("the disk is gone"), 1)])
def test_what_was_measured_before_an_end_is_kept(
    error: BaseException, code: int, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, asked, seen = scaling.train.run, [], []

    def third_ends(config: Any) -> Any:
        asked.append(config.bench.width)
        if len(asked) == 3:
            seen.append(json.loads((in_tmp / "out/bench.json").read_text()))  # already there: a kill leaves it too
            raise error
        return plain(config)

    monkeypatch.setattr(scaling.train, "run", third_ends)
    words = [*WORDS, "bench.axes=[width,length]", "bench.widths=[64,128,192]", "bench.methods=[floor,s2ft]"]
    done = sparseft(in_tmp, "bench", "scaling", *words, "output_dir=out", code=code)
    assert done.out == "" and "kept in out/bench.json, marked incomplete" in done.err and asked == [64, 128, 192]
    result = json.loads((in_tmp / "out/bench.json").read_text())
    assert result["complete"] is False and result["charts"] == ["scaling-width.svg", "scaling-length.svg"]
    # 64 wide and 16 long is the base point, which lies on both axes.
    assert [(at["axis"], at["value"]) for at in result["points"]] == [("width", 64), ("width", 128), ("length", 16)]
    assert seen == [result | {"charts": []}]
    assert files(in_tmp) == {f"out/{name}" for name in ("bench.json", "config.yaml", *result["charts"])}
    titles = [node.text for node in ElementTree.parse(in_tmp / "out/scaling-width.svg").iter()]
    assert sum(bool(title) and title.startswith("s2ft, width (features) ") for title in titles) == 4 * 2


def test_an_interrupted_rerun_leaves_a_complete_results_charts(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*WORDS, "bench.axes=[batch]", "bench.methods=[floor,s2ft]", "output_dir=out"]
    sparseft(in_tmp, "bench", "scaling", *words)
    before = {name: (in_tmp / name).read_bytes() for name in files(in_tmp)}
    plain, asked = scaling.train.run, []

    def second_ends(config: Any) -> Any:
        asked.append(config)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return plain(config)

    with monkeypatch.context() as patched:
        patched.setattr(scaling.train, "run", second_ends)
        sparseft(in_tmp, "bench", "scaling", *words, code=130)
    aside = {"out/bench.partial.json", "out/bench.partial.yaml", "out/scaling-batch.partial.svg"}
    assert {name: (in_tmp / name).read_bytes() for name in files(in_tmp) - aside} == before
    assert aside < files(in_tmp)
    assert json.loads((in_tmp / "out/bench.partial.json").read_text())["charts"] == ["scaling-batch.partial.svg"]
    sparseft(in_tmp, "bench", "scaling", *words)
    assert not aside & files(in_tmp) and before.keys() <= files(in_tmp)


def test_a_method_that_fails_at_a_point_is_named_there(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseft.bench import train

    plain = train.step

    def step(c: Any, batch: Any, *rest: Any) -> None:
        if (c.name, len(batch["input_ids"])) in (("s2ft", 2), ("floor", 4)):
            raise RuntimeError(f"no room for {len(batch['input_ids'])}")
        plain(c, batch, *rest)

    monkeypatch.setattr(train, "step", step)
    words = [*WORDS, "bench.axes=[batch]", "bench.batches=[1,2,4]", "bench.methods=[floor,s2ft]"]
    done = sparseft(in_tmp, "bench", "scaling", *words, "output_dir=out", code=1)
    assert "Failed while measured: batch 2: s2ft (RuntimeError: no room for 2)" in done.err
    assert "batch 4: floor (RuntimeError: no room for 4)" in done.err
    rows = [line.split() for line in done.out.splitlines()[3:6]]
    assert [row[3] for row in rows][1:] == ["failed", "-"] and rows[2][2] == "failed" and rows[0][3] != "failed"
    result = json.loads((in_tmp / "out/bench.json").read_text())
    assert result["complete"] is True and result["charts"] == ["scaling-batch.svg"]


def test_charts_stand_alone(grown: tuple[Path, dict[str, Any], str]) -> None:
    folder, result, _ = grown
    assert result["charts"] == [f"scaling-{axis}.svg" for axis in scaling.AXES]
    assert {name for name in files(folder / "out") if name.endswith("svg")} == set(result["charts"])
    for name in result["charts"]:
        text = (folder / "out" / name).read_text()
        root = ElementTree.fromstring(text)
        names = [node.text for node in root.iter() if node.tag.endswith("title")]
        for method in ("floor", "s2ft", "lora rank=2"):
            assert names.count(method) == 4  # lines: time, memory and their ratios
        assert "prefers-color-scheme: dark" in text and "--series-3: #" in text


def test_a_chart_shows_ratios_to_the_floor() -> None:
    """The floor's ratio is 1 everywhere; a method that costs 1.5 times as much lies at 1.5."""
    text = scaling.chart("x", {"floor": [(1, 10.0, 4.0), (2, 20.0, 8.0)], "a": [(2, 30.0, 12.0)]})
    titles = [node.text for node in ElementTree.fromstring(text).iter() if node.tag.endswith("title")]
    assert titles.count("a, x 2: 1.5") == 2 and titles.count("floor, x 1: 1") == titles.count("floor, x 2: 1") == 2
    assert "a, x 2: 30" in titles and "a, x 2: 12" in titles

"""`sparseft bench front`: its losses are those of the runs, what it chooses is chosen on the validation split, and what
it says of equal forgetting is read off the test split."""

from __future__ import annotations

import json
import math
import multiprocessing
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparseft as library
from sparseft.bench import forgetting
from sparseft.bench.forgetting import SPLITS, read_examples
from sparseft.bench.front import Measured, chosen, compare, drop_hopeless
from sparseft.bench.front_tables import at_equal_forgetting, differences, drawing, notes, table
from sparseft.commands import bench
from sparseft.compose.run_config import compose, from_dict
from sparseft.config import DatasetConfig
from sparseft.data.loading import data_of, load_datasets
from sparseft.data.packing import padding_id
from sparseft.data.sampling import seeded_first
from sparseft.data.split import halves
from sparseft.evaluation.held_out import held_out_loss
from sparseft.files.untrusted import read_yaml_object
from sparseft.models.loading import load_model, load_tokenizer
from sparseft.runs.lock import Lock
from support.running import files, refused, sparseft

SOURCE = "bundled:data/arithmetic/train.json"
STUDY = ("bench", "front", "dataset.max_examples=60", "dataset.eval_fraction=0.4", "trainer.max_steps=3",
         "trainer.batch_size=4", "trainer.max_length=64", "trainer.warmup_steps=1", "bench.seeds=2",
         "bench.rates=[1e-3,3e-2]", "bench.forgetting=[0.05,0.5]", "output_dir=out",
         "bench.target_tasks=[boolq]", "bench.source_tasks=[gsm8k]", "eval.limit=1", "eval.max_new_tokens=2",
         "trainer.eval_steps=100",  # so that there is the Trainer's own evaluation to hold against
         "bench.variants=['LoRA: method=lora method.dropout=0','S2FT: method=s2ft method.roles=[o,down]',"
         "'full: method=full bench.rates=[1e-3]']")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def few() -> Iterator[int]:
    """So many examples of a source are read, for speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forgetting, "SOURCE_EXAMPLES", 24)
        yield 24


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A study that was interrupted in its third training, and went on."""
    folder, train, trained = tmp_path_factory.mktemp("front"), bench.training.run, []

    def interrupted(config: Any) -> dict[str, Any]:
        trained.append(Path(config.output_dir).name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.training, "run", interrupted)
        done = sparseft(folder, *STUDY, "--json", code=130)
    assert "goes on from there" in done.err and not (folder / "out/bench.json").exists() and done.out == ""
    before = {path: path.stat().st_mtime_ns for path in (folder / "out/runs").glob("*/summary.json")}
    assert len(before) == 2
    result = sparseft(folder, *STUDY, "--json").json
    assert {path: path.stat().st_mtime_ns for path in before} == before
    return folder, result


def test_in_several_processes_it_is_the_same(studied: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system has no forkserver")
    _, alone = studied
    left_out = ("bench.target_tasks", "bench.source_tasks", "trainer.eval_steps", "bench.variants")
    without = [word for word in STUDY if not word.startswith(left_out)]
    variants = "bench.variants=['LoRA: method=lora method.dropout=0','full: method=full bench.rates=[1e-3]']"
    several = sparseft(tmp_path, *without, variants, "bench.jobs=2", "--json")
    assert list(several.json["variants"]) == ["LoRA", "full"]
    for name, entry in several.json["variants"].items():
        for mine, theirs in zip(entry["points"], alone["variants"][name]["points"], strict=True):
            assert mine["target"] == pytest.approx(theirs["target"], rel=1e-6)  # read in one thread, not two
            assert mine["dropped"] == theirs["dropped"]
    summaries = [json.loads(path.read_text()) for path in (tmp_path / "out/runs").glob("*/summary.json")]
    assert summaries and all(each["eval_loss_before"] is each["eval_loss_after"] is None for each in summaries)
    assert "FutureWarning" not in several.err
    assert "(100 %)" in several.err or "6/6 runs" in several.err


def run_of(folder: Path, variant: str, rate: float, seed: int) -> Path:
    return folder / "out/runs" / f"{variant.lower()}-lr-{rate:g}-seed{seed}"


def points_of(result: dict[str, Any]) -> list[tuple[str, dict[str, Any], int, int]]:
    """(variant, point, position of the seed, seed) of everything that ran."""
    return [
        (variant, point, position, seed)
        for variant, entry in result["variants"].items()
        for point in entry["points"]
        for position, seed in enumerate(result["seeds"][: len(point["target"])])
    ]


def test_target_losses_are_the_runs_own(studied: tuple[Path, dict[str, Any]]) -> None:
    """Oracle: the Trainer's evaluation before and after training, which is of both splits, each by its labels."""
    folder, result = studied
    assert result["seeds"] == [0, 1] and list(result["variants"]) == ["LoRA", "S2FT", "full"]
    for variant, point, position, seed in points_of(result):
        run = run_of(folder, variant, point["learning_rate"], seed)
        summary = json.loads((run / "summary.json").read_text())
        config = from_dict(read_yaml_object(run / "config.yaml"))
        config.cache_dir = str(folder / config.cache_dir)
        data = data_of(config, load_tokenizer(config.model))
        splits = [
            [row for row, own in zip(data.eval, halves(data.eval_tokens), strict=True) if own == half]
            for half in (False, True)
        ]
        counts = [sum((torch.tensor(row["labels"][1:]) != -100).sum() for row in rows) for rows in splits]
        both = point["validation"]["target"][position], point["target"][position]
        mean = sum(count * loss for count, loss in zip(counts, both, strict=True)) / sum(counts)
        assert mean == pytest.approx(summary["eval_loss_after"], rel=1e-5)
        if variant == "LoRA":
            base = json.loads((folder / f"out/measured/base-seed{seed}-losses.json").read_text())["read"]
            both = [base[split]["target"] for split in ("validation", "test")]
            mean = sum(count * loss for count, loss in zip(counts, both, strict=True)) / sum(counts)
            assert mean == pytest.approx(summary["eval_loss_before"], rel=1e-5)


def test_source_losses_are_those_of_the_saved_runs(studied: tuple[Path, dict[str, Any]], few: int) -> None:
    """Oracle: each run loaded anew on a base of its own, and asked the source's test split."""
    folder, result = studied
    for variant, point, position, seed in points_of(result):
        run = run_of(folder, variant, point["learning_rate"], seed)
        config = from_dict(read_yaml_object(run / "config.yaml"))
        tokenizer = load_tokenizer(config.model)
        settings = DatasetConfig(name="text", train_path=SOURCE, eval_fraction=0.5)
        rows = load_datasets(
            settings, tokenizer, max_length=64, seed=0, bundled=False, cache_dir=str(folder / "cache")
        ).eval
        assert rows is not None and 2 * len(rows) > few and len(point["sources"][SOURCE]) == len(point["target"])
        before = result["base"]["sources"][SOURCE]
        assert point["forgetting"][position] == pytest.approx(point["sources"][SOURCE][position] - before)
        if (variant, seed) == ("full", 0) or (variant, seed) == ("S2FT", 1):
            if variant == "full":
                config.model.path = str(run / "adapter")
                model = load_model(config.model)
            else:
                model = library.load_adapter(load_model(config.model), run / "adapter")
            test = [rows[i] for i in sorted(seeded_first(few // 2, len(rows), 0, "source"))]
            loss = held_out_loss(model.eval(), test, padding_id(tokenizer), torch.device("cpu"))
            assert point["sources"][SOURCE][position] == pytest.approx(loss, rel=1e-5)


def test_validation_alone_chooses(studied: tuple[Path, dict[str, Any]]) -> None:
    """Oracle: all pairs compared, with the first seed for what is dropped, with both for the front and the rate."""
    _, result = studied
    for entry in result["variants"].values():
        of_first = [(p["validation"]["forgetting"][0], p["validation"]["target"][0]) for p in entry["points"]]
        left = []
        for point, (x, y) in zip(entry["points"], of_first, strict=True):
            hopeless = any(a < x and b < y for a, b in of_first)
            assert (point["dropped"] == 1) == hopeless and len(point["target"]) == (1 if hopeless else 2)
            left += [] if hopeless else [point]
        means = [tuple(np.mean(p["validation"][what]) for what in ("forgetting", "target")) for p in left]
        for point, (x, y) in zip(left, means, strict=True):
            assert point["front"] == (not any(a < x and b < y for a, b in means))
        assert entry["learning_rate"] == left[int(np.argmin([y for _, y in means]))]["learning_rate"]
        assert not any(point["front"] for point in entry["points"] if point["dropped"])


def test_accuracies_are_asked_at_the_chosen_rate(studied: tuple[Path, dict[str, Any]]) -> None:
    folder, result = studied
    assert set(result["base"]["accuracy"]) == {"boolq", "gsm8k"}
    asked = {path.name for path in (folder / "out/measured").glob("*-tasks.json")}
    chosen_runs = {
        f"{run_of(folder, variant, entry['learning_rate'], seed).name}-tasks.json"
        for variant, entry in result["variants"].items()
        for seed in (0, 1)
    }
    assert asked == chosen_runs | {"base-seed0-tasks.json"}
    for entry in result["variants"].values():
        assert {task: len(shares) for task, shares in entry["accuracy"].items()} == {"boolq": 2, "gsm8k": 2}


def test_what_is_left(studied: tuple[Path, dict[str, Any]]) -> None:
    """A page that loads nothing, a chart, tables."""
    folder, result = studied
    page = (folder / "out/front.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#)|url\((?!#)|@import', page) and "default-src 'none'" in page
    for text in ("LoRA", "S2FT", "full", "At equal forgetting", "Every rate", SOURCE, "<svg"):
        assert text in page
    assert (folder / "out/front.svg").read_text().startswith("<svg")
    markdown = (folder / "out/bench.md").read_text()
    assert markdown.count("| --- ") >= 3 and "full: trains" in markdown and "cannot tell from 2 seeds" in markdown


def test_what_is_missing_is_done_again_and_nothing_else(studied: tuple[Path, dict[str, Any]]) -> None:
    folder, result = studied
    entry = result["variants"]["S2FT"]
    base = result["base"]["sources"][SOURCE]
    assert entry["source"] == pytest.approx([base + forgotten for forgotten in entry["forgetting"]])
    lost = run_of(folder, "S2FT", entry["learning_rate"], 1)
    (lost / "summary.json").unlink()
    read = folder / "out/measured" / f"{lost.name}-losses.json"
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*") if path.is_file()}
    again = sparseft(folder, *STUDY, "--json")
    assert again.err.count("bench: training") == 1 and "s2ft" in again.err
    assert "bench: of each model the losses on" in again.err
    changed = {p for p, at in before.items() if at != p.stat().st_mtime_ns and p.parent.name != "out"}
    assert {path for path in changed if lost not in path.parents} == {read, read.with_name(f"{lost.name}-tasks.json")}
    assert again.json["variants"] == result["variants"]


def test_another_source_is_read_without_training(studied: tuple[Path, dict[str, Any]]) -> None:
    """But what it no longer drops."""
    folder, result = studied
    before = {path: path.stat().st_mtime_ns for path in (folder / "out/runs").glob("*/summary.json")}
    other = folder / "other.txt"
    other.write_text("\n\n".join(f"{i} plus {i} is {2 * i}, as anyone who counts knows." for i in range(40)))
    again = sparseft(folder, *STUDY, f"bench.source=[{SOURCE},{other}]", "--json")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for variant, entry in again.json["variants"].items():
        for point, was in zip(entry["points"], result["variants"][variant]["points"], strict=True):
            for mine, theirs in ((point["target"], was["target"]), (point["sources"][SOURCE], was["sources"][SOURCE])):
                seeds = min(map(len, (mine, theirs)))
                assert seeds and mine[:seeds] == theirs[:seeds]
            of_both = [np.mean(each) for each in zip(*point["sources"].values(), strict=True)]
            base = np.mean(list(again.json["base"]["sources"].values()))
            assert point["forgetting"] == pytest.approx([loss - base for loss in of_both])


def test_the_base_is_read_once_on_the_same_examples() -> None:
    keys = {3: {"target": "a"}, 4: {"target": "b"}, 5: {"target": "a"}}
    assert forgetting.Examples({}, {}, keys, {}, 0).first_alike([3, 4, 5]) == [3, 4, 3]


def test_a_rate_that_diverges_drops_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [word for word in STUDY if "tasks" not in word and "bench.variants" not in word]
    words += ["bench.rates=[1e25,1e-3]", "trainer.max_bad_steps=1", "bench.seeds=1", "--json"]
    words += ["bench.variants=['LoRA: method=lora method.dropout=0','S2FT: method=s2ft method.roles=[o,down]']"]
    done = sparseft(tmp_path, *words)
    assert "lora-lr-1e-25-seed0 diverged and drops out: the loss or its gradient was not finite" in done.err
    entry = done.json["variants"]["LoRA"]
    assert entry["rate"] == 1e-3 and [point["front"] for point in entry["points"]] == [False, True]
    assert entry["points"][0]["target"] == [None] and entry["points"][0]["learning_rate"] == 1e25

    def again(config: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(bench.training, "run", again)
    assert sparseft(tmp_path, *words).json["variants"] == done.json["variants"]


def test_another_setting_is_refused(studied: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = studied
    assert "holds a run with other settings" in refused(folder, *STUDY, "trainer.max_steps=4")


def test_a_study_that_another_job_works_on_is_left_alone(studied: tuple[Path, dict[str, Any]]) -> None:
    """Both would train what is missing."""
    folder, _ = studied
    (folder / "out/runs/full-lr-0.001-seed1/summary.json").rename(folder / "summary.json")
    before = files(folder / "out")
    with Lock() as other:
        other.take(folder / "out")
        assert "output_dir 'out' is in use by process" in refused(folder, *STUDY)
    assert files(folder / "out") == before
    (folder / "summary.json").rename(folder / "out/runs/full-lr-0.001-seed1/summary.json")


def test_other_data_than_those_trained_on_are_refused(tmp_path: Path) -> None:
    """A file that has changed since: what is held out of it now, earlier runs may have learnt."""
    lines = [json.dumps({"prompt": f"{n} plus {n} is", "completion": f" {2 * n}"}) for n in range(40)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines))
    words = [word for word in STUDY if not word.startswith(("bench.", "dataset."))]
    words += [f"bench.source=[{SOURCE}]", "bench.seeds=1", "dataset=json", f"dataset.train_path={data}",
              "dataset.eval_fraction=0.3", "bench.rates=[1e-3]",
              "bench.variants=['a: method=lora','b: method=s2ft']"]  # fmt: skip
    sparseft(tmp_path, *words)
    data.write_text("\n".join(reversed(lines[:-1])))
    said = refused(tmp_path, *words)
    assert "not those that the run in" in said and str(data) in said and "another output_dir" in said


def test_validation_and_test_ask_no_first_question_both(tmp_path: Path) -> None:
    """Branches of one tree, of the target and of a source."""
    paths = [tmp_path / "chats.jsonl", tmp_path / "others.jsonl"]
    for path in paths:
        texts = [f"### Human: {path.stem} {tree}?### Assistant: yes### Human: {n}?### Assistant: no"
                 for tree in range(16) for n in range(3)]  # fmt: skip
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = [f"dataset.train_path={paths[0]}", "dataset.eval_fraction=0.5", f"cache_dir={tmp_path / 'cache'}"]
    config = compose("bench", words)
    tokenizer = load_tokenizer(config.model)
    examples = read_examples([config], [str(paths[1])])
    for splits in (examples.target[config.seed], examples.source[str(paths[1])]):
        validation, test = ({tokenizer.decode(row["input_ids"]).split("?")[0] for row in splits[s]} for s in SPLITS)
        assert validation and test and not validation & test


def measured(rate: float, points: list[tuple[float, float]], test: list[tuple[float, float]] | None = None) -> Measured:
    """A rate whose losses, (forgetting, target) by seed, are given for both splits."""
    made = Measured(rate, rate)
    for split, each in (("validation", points), ("test", test or points)):
        made.forgetting[split], made.target[split] = [x for x, _ in each], [y for _, y in each]
    made.sources = {"text": made.forgetting["test"]}
    return made


def test_rates_that_another_one_beats_are_dropped() -> None:
    rates = [measured(1e-3, [(0.1, 3.0)]), measured(1e-2, [(0.2, 3.5)]), measured(1e-1, [(math.nan, math.nan)])]
    assert drop_hopeless(rates, 1) == 2 and [rate.dropped for rate in rates] == [None, 1, 1]
    assert drop_hopeless(rates, 2) == 0
    none = [measured(1.0, [(math.nan, math.nan)])]
    assert drop_hopeless(none, 1) == 0 and chosen(none)["points"][0]["front"] is False


def test_the_mean_of_the_seeds_so_far_decides() -> None:
    rates = [measured(1e-3, [(0.1, 3.0), (0.5, 4.0)]), measured(1e-2, [(0.2, 3.5), (0.3, 3.0)])]
    assert drop_hopeless(rates, 2) == 1 and [rate.dropped for rate in rates] == [2, None]


def result_of(variants: dict[str, list[Measured]], levels: list[float]) -> dict[str, Any]:
    seeds = len(next(iter(variants.values()))[0].target["test"])
    found = {name: {"trainable_parameters": 100, **chosen(points)} for name, points in variants.items()}
    result = {"seeds": list(range(seeds)), "levels": levels, "variants": found, "sources": ["text"]}
    compare(result)
    return result | {"base": {"target": [5.0] * seeds, "sources": {"text": 1.0}}}


def line(slope: float, above: float, xs: tuple[float, ...], seeds: int = 3) -> list[Measured]:
    """A straight front, target = above - slope × forgetting, that lies a hundredth higher with each seed."""
    return [measured(x, [(x, above + 0.01 * seed - slope * x) for seed in range(seeds)]) for x in xs]


def test_verdicts_at_equal_forgetting() -> None:
    """By hand: on straight fronts differences are what the lines differ by, with every seed."""
    variants = {
        "LoRA": line(1.0, 4.0, (0.1, 0.5, 1.0)),
        "ahead": line(1.0, 3.9, (0.05, 0.8)),
        "behind": line(0.5, 4.0, (0.2, 0.9)),
        "far": line(1.0, 3.0, (2.0, 3.0)),
    }
    result = result_of(variants, [0.05, 0.3])
    verdicts = {name: [at["verdict"] for at in entry["at"]] for name, entry in result["variants"].items()}
    assert verdicts == {
        "LoRA": ["not reached", "", ""],
        "ahead": ["LoRA does not reach it", "ahead", "behind"],  # its strongest rate ends above LoRA's
        "behind": ["not reached", "behind", "behind"],
        "far": ["not reached", "not reached", "not reached"],
    }
    at = result["variants"]["ahead"]["at"]
    assert at[1]["differences"] == pytest.approx([-0.1] * 3) and at[1]["interval"] == pytest.approx((-0.1, -0.1))
    assert at[2]["differences"] == pytest.approx([3.1 - 3.0] * 3)
    assert result["variants"]["behind"]["at"][1]["losses"] == pytest.approx([3.85, 3.86, 3.87])
    rows = at_equal_forgetting(result)[1]
    assert ["0.3", "ahead", "-0.1000", "ahead"] == [rows[i][j] for i in [2] for j in (0, 1, 3, 5)]
    assert differences(result, 2, 400).count("LoRA") and len(table(result)[1]) == 5
    assert all(f">{x}</text>" in drawing(result) for x in ("0", "0.5", "2.5"))  # where fronts lie, in no whole numbers
    assert "far: its front forgets 2.000 to 3.000" in notes(result)


def test_a_seed_that_forgets_more_gives_no_verdict() -> None:
    low = measured(1e-3, [(0.1, 4.0), (0.4, 4.0), (0.1, 4.0)])
    result = result_of({"LoRA": line(1.0, 4.0, (0.1, 1.0)), "S2FT": [low, measured(1e-2, [(0.9, 2.0)] * 3)]}, [0.3])
    assert result["variants"]["S2FT"]["at"][0]["verdict"] == "reached with 2 of 3 seeds"


def test_what_is_chosen_on_validation_is_reported_on_test() -> None:
    """The rate that is best on the test split is not the one that is taken."""
    taken = measured(1e-3, [(0.1, 2.0)] * 3, [(0.2, 3.0)] * 3)
    other = measured(1e-2, [(0.3, 2.5)] * 3, [(0.1, 1.0)] * 3)
    found = chosen([taken, other])
    assert (found["learning_rate"], found["target"], found["forgetting"]) == (1e-3, [3.0] * 3, [0.2] * 3)
    assert [point["front"] for point in found["points"]] == [True, False]
    taken.learning_rates = [1e-3, 2e-3, 1e-3]  # each seed has found its own
    found = chosen([taken])
    assert found["learning_rate"] is None and found["points"][0]["learning_rates"] == [1e-3, 2e-3, 1e-3]


def test_unequal_sizes_are_named() -> None:
    variants = {"LoRA": line(1.0, 4.0, (0.1, 1.0)), "S2FT": line(1.0, 4.0, (0.1, 1.0))}
    result = result_of(variants, [0.3])
    assert "S2FT: its front forgets 0.100 to 1.000" in notes(result)
    result["variants"]["S2FT"]["trainable_parameters"] = 103
    compare(result)
    assert any("S2FT: trains 1.03 times as many weights as LoRA" in note for note in notes(result))


LORA = "LoRA: method=lora"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([f"bench.variants=['{LORA}']"], "name at least two variants"),
        ([f"bench.variants=['{LORA}','S2FT: method=s2ft model.dtype=bfloat16']"], "'S2FT': it sets model.dtype"),
        ([f"bench.variants=['{LORA}','S2FT: method=s2ft trainer.max_steps=9']"], "'S2FT': it sets trainer.max_steps"),
        (
            [f"bench.variants=['{LORA} trainer.average=last:0.5','S2FT: method=s2ft trainer.warmup_steps=9']"],
            "'S2FT': it sets trainer.warmup_steps",  # what is averaged may differ
        ),
        ([f"bench.variants=['{LORA}','S2FT: method=s2ft bench.rates=[1e-3,1e-3]']"], "names a rate twice"),
        ([f"bench.variants=['{LORA}','lora: method=s2ft']"], "'lora': its folders would be those of 'LoRA'"),
        ([f"bench.variants=['{LORA}','S2FT: method=s2ftt']"], "'S2FT': "),
        (["bench.source=[]"], "bench.source is empty"),
        (["bench.source=[nowhere.txt]"], "bench.source: there is no file 'nowhere.txt'"),
        ([f"bench.source=[{SOURCE},{SOURCE}]"], "bench.source names a file twice"),
        (["bench.source=['bundled:data/commonsense/train.json']"], "is what is trained on"),
        (["bench.forgetting=[0.1,0]"], "bench.forgetting: 0 is no forgetting"),
        (["dataset.eval_fraction=0"], "give dataset.eval_fraction"),
        (["dataset.max_examples=2"], "the held-out examples are too few"),
        (["trainer.keep_best=true", "trainer.eval_steps=2"], "trainer.keep_best looks at the held-out examples"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_compared_is_refused(words: list[str], text: str, in_tmp: Path) -> None:
    assert text in refused(in_tmp, "bench", "front", *words)
    assert not list(in_tmp.glob("outputs/bench-*"))
    assert {path for path in files(in_tmp) if not path.startswith(".cache")} == set()

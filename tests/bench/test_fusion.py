"""`sparseft bench fusion`: its numbers are those of the runs and sums that it says it has made."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import sparseft as library
from sparseft.bench.fusion import mean_overlap, overlap, table
from sparseft.bench.intervals import interval
from sparseft.compose.run_config import from_dict
from sparseft.data.loading import load_datasets
from sparseft.data.packing import padding_id
from sparseft.evaluation.held_out import held_out_loss
from sparseft.files.untrusted import read_yaml_object
from sparseft.models.loading import load_model, load_tokenizer, resolve_device
from sparseft.selection.selection import Selection
from support.running import files, refused, sparseft

STUDY = ("bench", "fusion", "dataset.max_examples=60", "dataset.eval_fraction=0.2", "trainer.max_steps=3",
         "trainer.batch_size=4", "trainer.max_length=64", "eval.limit=1", "eval.max_new_tokens=4", "bench.seeds=2",
         "bench.rates=[1e-3,5e-2]", "bench.weights=[1.0,0.25]", "output_dir=out",
         "bench.skills=['gsm8k: dataset=arithmetic','boolq: dataset=commonsense']")  # fmt: skip
WAYS = ["base", "gsm8k", "boolq"]


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fusion")
    done = sparseft(folder, *STUDY, "--json")
    (folder / "said").write_text(done.err)
    return folder, done.json


def run_of(folder: Path, variant: str, skill: str, seed: int, result: dict[str, Any], apart: bool = False) -> Path:
    rate = result["variants"][variant]["rates"][skill]["rate"]
    name = f"{variant} {skill}{' disjoint' if apart else ''} lr {rate:g}".lower().replace(" ", "-")
    return folder / "out/runs" / f"{name}-seed{seed}"


def test_losses_are_those_of_the_runs(studied: tuple[Path, dict[str, Any]]) -> None:
    """Oracle: the Trainer's own evaluation, of every run on its own skill, before training and after."""
    folder, result = studied
    assert result["seeds"] == [0, 1] and list(result["variants"]) == ["S2FT", "LoRA"]
    for variant, entry in result["variants"].items():
        assert list(entry["ways"])[:3] == WAYS
        for position, seed in enumerate(result["seeds"]):
            for skill in result["skills"]:
                summary = json.loads((run_of(folder, variant, skill, seed, result) / "summary.json").read_text())
                base, own = (entry["ways"][way][skill]["eval_loss"][position] for way in ("base", skill))
                assert base == pytest.approx(summary["eval_loss_before"], rel=1e-5)
                assert own == pytest.approx(summary["eval_loss_after"], rel=1e-5)


def test_rates_are_chosen_by_held_out_loss(studied: tuple[Path, dict[str, Any]]) -> None:
    folder, result = studied
    for variant, entry in result["variants"].items():
        for skill, chosen in entry["rates"].items():
            losses = {}
            for rate in (1e-3, 5e-2):
                run = folder / "out/runs" / f"{variant.lower()}-{skill}-lr-{rate:g}-seed0"
                losses[rate] = json.loads((run / "summary.json").read_text())["eval_loss_after"]
            assert chosen == {"rate": min(losses, key=losses.__getitem__), "losses": [list(i) for i in losses.items()]}


def test_a_rate_that_diverges_is_not_chosen(tmp_path: Path) -> None:
    words = [word for word in STUDY if "rates" not in word and "seeds" not in word]
    words += ["bench.rates=[1e25,1e-3]", "trainer.max_bad_steps=1", "bench.seeds=1", "eval.limit=1", "--json"]
    done = sparseft(tmp_path, *words)
    assert "lora-boolq-lr-1e-25-seed0 diverged and drops out: the loss or its gradient was not finite" in done.err
    chosen = done.json["variants"]["LoRA"]["rates"]["boolq"]
    assert chosen["rate"] == 1e-3 and chosen["losses"][0] == [1e25, None] and chosen["losses"][1][1] > 0


def test_sums_are_those_of_the_saved_adapters(studied: tuple[Path, dict[str, Any]]) -> None:
    """Oracle: the two folders loaded and fused anew; the weight is the better one of the first seed."""
    folder, result = studied
    for variant, way, apart in (("S2FT", "fused", False), ("S2FT", "fused, disjoint", True), ("LoRA", "fused", False)):
        means = []
        for weight in (1.0, 0.25):
            runs = [run_of(folder, variant, "gsm8k", 0, result), run_of(folder, variant, "boolq", 0, result)]
            rows = []
            for run in runs:
                config = from_dict(read_yaml_object(run / "config.yaml"))
                tokenizer, model = load_tokenizer(config.model), load_model(config.model)
                rows.append(load_datasets(
                    config.dataset, tokenizer, max_length=64, seed=0, bundled=True, cache_dir=str(folder / "cache"),
                ).eval)  # fmt: skip
            if apart:
                runs[1] = run_of(folder, variant, "boolq", 0, result, apart=True)
            for name, run in zip("ab", runs, strict=True):
                model = library.load_adapter(model, run / "adapter", name)
            library.fuse(model, {"a": weight, "b": weight})
            losses = [held_out_loss(model.eval(), each, padding_id(tokenizer), resolve_device("cpu")) for each in rows]
            means.append((sum(losses) / 2, weight, losses))
        _, weight, losses = min(means)
        entry = result["variants"][variant]
        assert entry["weight"][way] == weight
        found = [entry["ways"][way][skill]["eval_loss"][0] for skill in result["skills"]]
        assert found == pytest.approx(losses, rel=1e-5)


def test_disjoint_runs_share_nothing_and_the_others_all(studied: tuple[Path, dict[str, Any]]) -> None:
    folder, result = studied
    assert result["variants"]["S2FT"]["overlap"] == [1.0, 1.0] and result["variants"]["LoRA"]["overlap"] == []
    for seed in result["seeds"]:
        first, second, apart = (
            Selection.load(run_of(folder, "S2FT", skill, seed, result, apart) / "selection")
            for skill, apart in (("gsm8k", False), ("boolq", False), ("boolq", True))
        )
        assert overlap(first, second) == 1.0 and overlap(first, apart) == 0.0
        counts = [s.meta["trainable_parameters"] for s in (first, second, apart)]
        assert len(set(counts)) == 1


def test_the_base_is_asked_once(studied: tuple[Path, dict[str, Any]]) -> None:
    """Its accuracies are those of all variants and seeds, and its losses are each seed's."""
    folder, result = studied
    said = (folder / "said").read_text()
    assert said.count(", base, seed") == 1 and said.count(", gsm8k, seed") == 4
    for skill in result["skills"]:
        of_base = [entry["ways"]["base"][skill] for entry in result["variants"].values()]
        assert len({accuracy for each in of_base for accuracy in each["accuracy"]}) == 1
        assert of_base[0]["eval_loss"][0] != of_base[0]["eval_loss"][1]


def test_the_overlap_of_several_is_the_mean_over_their_pairs() -> None:
    each = [Selection({"up": {"rows": rows}}) for rows in ([0, 1], [1, 2], [1, 0])]
    assert [overlap(each[0], each[1]), overlap(each[0], each[2]), overlap(each[1], each[2])] == [0.5, 1.0, 0.5]
    assert mean_overlap(each) == pytest.approx(2 / 3) and mean_overlap(each[:2]) == 0.5


def test_what_is_kept_and_gained(studied: tuple[Path, dict[str, Any]]) -> None:
    folder, result = studied
    for entry in result["variants"].values():
        for by_skill in entry["ways"].values():
            for skill, numbers in by_skill.items():
                for position, kept in enumerate(numbers["kept"]):
                    base, own = (entry["ways"][way][skill]["accuracy"][position] for way in ("base", skill))
                    expected = (numbers["accuracy"][position] - base) / (own - base) if own > base else None
                    assert kept == expected
    gained, ways = (result["variants"]["S2FT"][key] for key in ("disjoint - overlapping", "ways"))
    for skill in result["skills"]:
        one, two = (ways[way][skill]["eval_loss"] for way in ("fused", "fused, disjoint"))
        assert gained[skill]["eval_loss"] == [b - a for a, b in zip(one, two, strict=True)]
    text = (folder / "out/bench.md").read_text()
    assert "S2FT: fused, disjoint (weight " in text and "100 % of the units are in both skills" in text


def test_it_goes_on_with_what_is_missing(studied: tuple[Path, dict[str, Any]]) -> None:
    folder, result = studied
    lost = run_of(folder, "LoRA", "boolq", 1, result) / "summary.json"
    kept = run_of(folder, "LoRA", "boolq", 0, result) / "summary.json"
    lost.unlink()
    (folder / "out/scores/s2ft-seed1.json").unlink()
    before = kept.stat().st_mtime_ns
    again = sparseft(folder, *STUDY)
    assert again.err.count("bench: training") == 1 and kept.stat().st_mtime_ns == before
    assert "asking S2FT, fused, disjoint, seed 1" in again.err and ", base, seed" not in again.err
    stored = json.loads((folder / "out/bench.json").read_text())
    assert stored["variants"] == result["variants"]
    message = refused(folder, *STUDY, "trainer.max_steps=4")
    assert "holds a run with other settings" in message


def test_what_is_kept_says_of_how_many_seeds_it_is() -> None:
    """A seed whose own adapter gained nothing has nothing to keep."""

    def cells(kept: list[float | None]) -> list[str]:
        numbers = {"accuracy": [0.5] * 3, "eval_loss": [1.0] * 3, "kept": kept}
        entry = {"weight": {}, "ways": {"fused": {"gsm8k": numbers}}}
        return table({"skills": ["gsm8k"], "variants": {"LoRA": entry}})[1][0]

    assert [cells(kept)[2] for kept in ([0.5] * 3, [0.5, None, 0.5], [None, 0.5, None], [None] * 3)] == [
        "50 ± 0",
        "50 ± 0 (2 of 3 seeds)",
        "50 (1 of 3 seeds)",
        "-",
    ]


def test_interval() -> None:
    """By hand: 1, 2, 3 have the standard deviation 1, so 4.303 / √3 at two degrees of freedom."""
    mean, half = interval([1.0, None, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / 3**0.5)
    assert interval([0.5, 0.5]) == (0.5, 0.0) and interval([None]) is None
    assert math.isnan(interval([0.5])[1])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["bench.skills=['arithmetic: dataset=arithmetic']"], ["bench.skills", "at least two"]),
        (["bench.skills=[arithmetic]"], ["bench.skills", "no skill", "name: key=value"]),
        (["bench.skills=['arithmetic: dataset=arithmetic','piqa: dataset=comonsense']"], ["comonsense", "commonsense"]),
        (["bench.variants=[]"], ["bench.variants", "at least one"]),
        (["bench.variants=['a: method=full']"], ["'a' trains whole models"]),
        (
            ["bench.variants=['S2FT: method=s2ft','s2ft: method=lora']"],
            ["'s2ft': its folders would be those of 'S2FT'"],
        ),
        (["bench.weights=[]"], ["bench.weights is empty"]),
        (["bench.rates=[0]"], ["bench.rates"]),
        (["dataset.eval_fraction=0"], ["dataset.eval_path", "held-out"]),
        (["trainer.keep_best=true", "trainer.eval_steps=2"], ["trainer.keep_best", "of which bench fusion reports"]),
    ],
    ids=lambda value: "-".join(value),
)
def test_wrong_studies(words: list[str], parts: list[str], in_tmp: Path) -> None:
    message = refused(in_tmp, "bench", "fusion", *words)
    for part in parts:
        assert part in message
    assert files(in_tmp) == set()

"""What a selection says of its scores: by sorted lists, by hand, and by what was kept."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparseft
from sparseft.importance.units import Candidate, unit_index, units_of
from sparseft.selection.distribution import KEPT_LEVELS, LEVELS, distributions, quantiles
from sparseft.selection.selection import Selection
from support.models import build_model


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_units_are_found_again_from_their_indices(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["rows", "columns", "blocks"]))
    unit, start = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 9))
    shape = (data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)))
    if kind == "blocks":
        candidate = Candidate("m", kind, shape, 0, unit, math.ceil(shape[0] / unit) * math.ceil(shape[1] / unit))
    else:
        candidate = Candidate("m", kind, (500, 500), start, unit, data.draw(st.integers(1, 30)))
    units = sorted(data.draw(st.sets(st.integers(0, candidate.count - 1))))
    index = unit_index(candidate, torch.tensor(units, dtype=torch.int64))
    if kind != "blocks":  # another role of the same weight has chosen beside it
        index = torch.cat([index, torch.tensor([start + unit * candidate.count])]).sort().values
    assert units_of(candidate, index).tolist() == units


def test_quantiles_are_values_of_the_sorted_list() -> None:
    values = torch.randperm(101, generator=torch.Generator().manual_seed(0)).double()
    assert quantiles(values, LEVELS) == [0, 5, 25, 50, 75, 95, 100]
    assert quantiles(torch.tensor([7.0]), LEVELS) == [7.0] * 7 and quantiles(torch.zeros(0), LEVELS) == []
    assert quantiles(torch.tensor([1 / 3]), [0.5]) == [0.333333]


def test_a_layers_experts_are_one() -> None:
    members = [Candidate(f"layers.3.mlp.experts.{number}.w1", "rows", (4, 4), 0, 1, 4) for number in range(2)]
    scores = {members[0].key: torch.tensor([1.0, 2, 3, 4]), members[1].key: torch.tensor([0.0, 0, 0, 10])}
    selection = Selection({members[0].module: {"rows": [2, 3]}, members[1].module: {"rows": [3]}})
    found = distributions(members, selection, scores)
    assert found == {
        "layers.3.mlp.experts.w1": {
            **{"kind": "rows", "unit": 1, "start": 0, "units": 8, "kept": 3},
            **{"scores": [0, 0, 0, 2, 3, 10, 10], "kept_scores": [3, 4, 10], "kept_share": 0.85},
        }
    }


def test_scores_of_nothing_have_no_share() -> None:
    candidate = Candidate("m", "rows", (4, 4), 0, 2, 2, "q")
    found = distributions([candidate], Selection({"m": {"rows": [0, 1]}}), {"m:q": torch.zeros(2)})
    assert found["m:q"]["kept_share"] is None and found["m:q"]["kept"] == 1


@pytest.mark.parametrize("method", [sparseft.S2FTConfig, sparseft.SylvaConfig])
def test_a_computed_selection_keeps_them_and_they_agree_with_what_trains(method: type, tmp_path: Path) -> None:
    model = build_model("llama")
    extra = {"block_size": 4} if method is sparseft.SylvaConfig else {"o_ratio": 0.5, "d_ratio": 0.2}
    selection = sparseft.compute_selection(model, method(importance="weight", **extra))
    loaded = Selection.load(selection.save(tmp_path / "selection"))
    found = loaded.meta["candidates"]
    assert found == selection.meta["candidates"] and found
    for name, entry in found.items():
        module = name.partition(":")[0]
        index = selection.modules[module][entry["kind"]]
        weight = model.get_submodule(module).weight.detach().double()
        size = entry["unit"]
        if entry["kind"] == "blocks":
            parts = [block for row in weight.split(size) for block in row.split(size, 1)]
            across = math.ceil(weight.shape[1] / size)
            kept = {int(row) * across + int(column) for row, column in index}
        else:
            parts = list(weight.split(size, 1 if entry["kind"] == "columns" else 0))
            kept = {int(feature) // size for feature in index}
        norms = [float(part.norm()) for part in parts]
        assert (entry["units"], entry["kept"]) == (len(parts), len(kept))
        ranked, own = sorted(norms), sorted(norms[unit] for unit in kept)
        nearest = [ranked[round(level * (len(ranked) - 1))] for level in LEVELS]
        assert entry["scores"] == pytest.approx(nearest, rel=1e-4)
        assert entry["kept_scores"] == pytest.approx(
            [own[round(level * (len(own) - 1))] for level in KEPT_LEVELS], rel=1e-4
        )
        assert entry["kept_scores"][0] >= max(norms[unit] for unit in range(len(norms)) if unit not in kept) * 0.9999
        assert entry["kept_share"] == pytest.approx(sum(own) / sum(norms), rel=1e-4)


def test_random_scores_are_not_kept() -> None:
    selection = sparseft.compute_selection(build_model("llama"), sparseft.S2FTConfig(importance="random"))
    assert selection.meta["candidates"] and all(
        "scores" not in entry for entry in selection.meta["candidates"].values()
    )

"""`method.exclude`: what another adapter trains is left alone, entry by entry, whatever the two methods are."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparseft
from sparseft.errors import UserError
from sparseft.importance.units import Candidate, unit_index
from sparseft.models.spec import ModelSpec
from sparseft.selection.cache import selection_key
from sparseft.selection.compute import Request, reselect
from sparseft.selection.exclude import Excluded, read_excluded, taken_units
from sparseft.selection.selection import Selection
from sparseft.training.reselection.swap import apply_selection
from support.experts import build as build_experts
from support.models import build_model
from support.running import refused
from support.running import sparseft as command

METHODS: dict[str, Any] = {
    "s2ft": sparseft.S2FTConfig(sparsity=0.95, roles=["o", "down"]),
    "s2ft rows": sparseft.S2FTConfig(u_ratio=0.1, v_ratio=0.5, importance="weight"),
    "s2ft, global": sparseft.S2FTConfig(o_ratio=0.3, d_ratio=0.1, allocation="global", order="smallest"),
    "sylva 4": sparseft.SylvaConfig(sparsity=0.98, block_size=4, importance="weight"),
    "sylva 8, global": sparseft.SylvaConfig(sparsity=0.97, block_size=8, importance="random", allocation="global"),
    "paca": sparseft.PacaConfig(rank=2),
    "paca, sampled": sparseft.PacaConfig(rank=1, importance="weight", order="sampled"),
}


def dense(kind: str, index: Tensor, shape: tuple[int, int], size: int | None) -> Tensor:
    """Which entries of a weight a pattern has, one by one."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for entry in index.tolist():
        if kind == "rows":
            mask[entry] = True
        elif kind == "columns":
            mask[:, entry] = True
        else:
            mask[entry[0] * size : (entry[0] + 1) * size, entry[1] * size : (entry[1] + 1) * size] = True
    return mask


def masks(selection: Selection, shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    found = {}
    for module, kinds in selection.modules.items():
        found[module] = torch.zeros(shapes[module], dtype=torch.bool)
        for kind, index in kinds.items():
            found[module] |= dense(kind, index, shapes[module], selection.block_size)
    return found


def assert_disjoint(first: Selection, second: Selection, model: Any) -> None:
    shapes = ModelSpec.of(model).linears
    one, two = masks(first, shapes), masks(second, shapes)
    assert one and two
    for module in one.keys() & two.keys():
        assert not (one[module] & two[module]).any(), module


def saved(model: Any, config: Any, folder: Path) -> tuple[Path, Selection]:
    """An adapter of a fresh selection, on a copy of nothing: the model is as before."""
    selection = sparseft.compute_selection(model, config)
    sparseft.attach(model, config, selection)
    sparseft.save_adapter(model, folder)
    sparseft.detach(model)
    return folder, selection


def adapted(config: Any, spec: ModelSpec) -> Any:
    """The settings for a model that has other roles."""
    roles = {slot.role for slot in spec.slots}
    if isinstance(config, sparseft.S2FTConfig) and config.ratios and "down" not in roles:
        return replace(config, u_ratio=None, d_ratio=None, o_ratio=0.5, v_ratio=0.5 if config.v_ratio else None)
    return config


def counts(selection: Selection) -> dict[str, int]:
    """How many units' features or blocks each module has."""
    return {module: sum(len(index) for index in kinds.values()) for module, kinds in selection.modules.items()}


def excluding(config: Any, *folders: Path) -> Any:
    return replace(config, exclude=[str(folder) for folder in folders])


# ---- disjoint, by brute force ----


def units_left(candidate: Candidate, taken: Tensor, size: int | None) -> Tensor:
    """(units,): whether none of a unit's entries is taken, each unit drawn entry by entry."""
    free = []
    for unit in range(candidate.count):
        index = unit_index(candidate, torch.tensor([unit]))
        free.append(not (dense(candidate.kind, index, candidate.shape, size) & taken).any())
    return torch.tensor(free)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(METHODS, METHODS)))
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_every_pair_is_disjoint_or_refused(kind: str, first: str, second: str, tmp_path: Path) -> None:
    """Refused where, and only where, entry by entry fewer units are left than the budget takes."""
    model = build_experts("mixtral") if kind == "mixtral" else build_model(kind)
    spec = ModelSpec.of(model)
    one, two = (adapted(METHODS[name], spec) for name in (first, second))
    folder, taken = saved(model, one, tmp_path / "first")
    before = masks(taken, spec.linears)
    budget = two.budget(spec)
    excluded, left = read_excluded([str(folder)]), {}
    for c in budget.candidates:
        free = units_left(c, before.get(c.module, torch.zeros(c.shape, dtype=torch.bool)), budget.block_size)
        assert torch.equal(free, ~taken_units(c, excluded))
        left[c.key] = int(free.sum())
    if two.allocation == "per_layer":
        enough = all(left[key] >= count for key, count in budget.per_candidate.items())
    else:
        there = {role: sum(left[c.key] for c in budget.candidates if (c.role or "") == role) for role in budget.pooled}
        enough = all(there[role] >= count for role, count in budget.pooled.items())
    config = excluding(two, folder)
    if not enough:
        with pytest.raises(UserError, match="method.exclude leaves .* units of .*, and the budget takes"):
            sparseft.compute_selection(model, config)
        return
    selection = sparseft.compute_selection(model, config)
    assert_disjoint(taken, selection, model)
    alone = sparseft.compute_selection(model, two)
    assert counts(selection) == counts(alone) or two.allocation == "global"
    assert sum(counts(selection).values()) == sum(counts(alone).values())


def test_none_of_several(tmp_path: Path) -> None:
    model = build_model("llama")
    blocks = sparseft.SylvaConfig(sparsity=0.95, block_size=8, importance="random", allocation="global")
    first, a = saved(model, METHODS["paca"], tmp_path / "a")
    second, b = saved(model, excluding(METHODS["sylva 4"], first), tmp_path / "b")
    c = sparseft.compute_selection(model, excluding(blocks, first, second))
    for one, two in itertools.combinations((a, b, c), 2):
        assert_disjoint(one, two, model)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_patterns_of_any_sizes(data: Any) -> None:
    """Blocks of sizes that do not divide each other, edge blocks, and parts of a fused matrix."""
    rows, columns = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    size, other = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    kinds: dict[str, Any] = {}
    for kind, limits in (("rows", [rows]), ("columns", [columns]), ("blocks", [-(-rows // size), -(-columns // size)])):
        entry = st.tuples(*(st.integers(0, limit - 1) for limit in limits))
        index = data.draw(st.lists(entry, max_size=3, unique=True))
        if index:
            kinds[kind] = [list(each) if kind == "blocks" else each[0] for each in index]
    selection = Selection({"m": kinds} if kinds else {}, block_size=size)
    taken = masks(selection, {"m": (rows, columns)}).get("m", torch.zeros(rows, columns, dtype=torch.bool))
    side = {"rows": rows, "columns": columns}
    for kind in ("rows", "columns", "blocks"):
        if kind == "blocks":
            candidate = Candidate("m", kind, (rows, columns), 0, other, -(-rows // other) * -(-columns // other))
        else:
            unit = data.draw(st.integers(1, side[kind]))
            start = data.draw(st.integers(0, side[kind] - unit))
            candidate = Candidate("m", kind, (rows, columns), start, unit, (side[kind] - start) // unit)
        found = taken_units(candidate, [Excluded(Path("a"), {}, selection)])
        assert torch.equal(~found, units_left(candidate, taken, other))


def test_a_row_and_a_column_of_one_weight_meet() -> None:
    rows = Excluded(Path("a"), {}, Selection({"m": {"rows": [2]}}))
    assert taken_units(Candidate("m", "columns", (4, 3), 0, 1, 3), [rows]).all()
    assert taken_units(Candidate("m", "rows", (4, 3), 0, 2, 2), [rows]).tolist() == [False, True]
    assert not taken_units(Candidate("other", "columns", (4, 3), 0, 1, 3), [rows]).any()


# ---- how it behaves ----


def test_without_exclusions_nothing_changes() -> None:
    model = build_model("llama")
    for config in METHODS.values():
        one, two = (sparseft.compute_selection(model, replace(config, exclude=value)) for value in (None, []))
        assert one.digest() == two.digest()


def test_the_best_of_what_is_left_is_chosen(tmp_path: Path) -> None:
    """By weight, largest: the second takes exactly the units that come next."""
    model = build_model("llama")
    config = sparseft.S2FTConfig(d_ratio=0.1, importance="weight")
    folder, first = saved(model, config, tmp_path / "a")
    second = sparseft.compute_selection(model, excluding(config, folder))
    both = sparseft.compute_selection(model, replace(config, d_ratio=0.2))
    for module, kinds in both.modules.items():
        joined = torch.cat([first.modules[module]["columns"], second.modules[module]["columns"]]).sort().values
        assert torch.equal(joined, kinds["columns"])


def test_linears_that_are_all_taken_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_model("llama")
    config = sparseft.SylvaConfig(sparsity=0.97, block_size=8, importance="random", allocation="global")
    attached = Selection({"model.layers.0.mlp.up_proj": {"rows": list(range(80))}})
    sparseft.attach(model, sparseft.S2FTConfig(), attached)
    folder = sparseft.save_adapter(model, tmp_path / "a")
    sparseft.detach(model)
    selection = sparseft.compute_selection(model, excluding(config, folder))
    assert "leaves nothing of model.layers.0.mlp.up_proj: it is all taken" in capsys.readouterr().err
    assert "model.layers.0.mlp.up_proj" not in selection.modules
    assert len(selection.modules) == len(ModelSpec.of(model).linears) - 1  # at least one block of every other one


def test_attach_alone_leaves_them_out_too(tmp_path: Path) -> None:
    model = build_model("llama")
    folder, taken = saved(model, METHODS["s2ft"], tmp_path / "a")
    sparseft.attach(model, excluding(METHODS["s2ft"], folder))
    sparseft.save_adapter(model, tmp_path / "b")
    again = read_excluded([str(tmp_path / "b")])[0].selection
    assert_disjoint(taken, again, sparseft.detach(model))


def test_reselection_takes_none_of_them(tmp_path: Path) -> None:
    model = build_model("llama")
    folder, taken = saved(model, METHODS["s2ft"], tmp_path / "a")
    config = excluding(METHODS["s2ft"], folder)
    sparseft.attach(model, config)
    shapes = ModelSpec.of(model).linears
    before, seen = masks(taken, shapes), set()
    for step in range(5):
        selection = reselect(model, config, None, seed=step)
        apply_selection(model, selection)
        for module, mask in masks(selection, shapes).items():
            assert not (mask & before[module]).any()
        seen.add(selection.digest())
    assert len(seen) == 5
    sparseft.save_adapter(model, tmp_path / "b")  # with what it trained in between
    assert_disjoint(taken, read_excluded([str(tmp_path / "b")])[0].selection, sparseft.detach(model))


def test_the_cache_knows_what_was_left_out_wherever_it_lies(tmp_path: Path) -> None:
    model = build_model("llama")
    config = METHODS["s2ft"]
    spec = ModelSpec.of(model)
    a, _ = saved(model, config, tmp_path / "a")
    same, _ = saved(model, config, tmp_path / "same")
    other, _ = saved(model, replace(config, seed=1), tmp_path / "other")
    keys = []
    for folders in ((), (a,), (same,), (other,), (a, other), (other, a)):
        request = Request.of(spec, excluding(replace(config, sparsity=0.98), *folders))
        keys.append(selection_key("base", "data", request.settings, request.excluded))
    assert keys[1] == keys[2] and keys[4] == keys[5] and len(set(keys)) == 4


# ---- refused ----


def lora(model: Any, folder: Path) -> Path:
    return sparseft.save_adapter(sparseft.attach(model, sparseft.LoraConfig(rank=2)), folder)


def full(model: Any, folder: Path) -> Path:
    return sparseft.save_adapter(sparseft.attach(model, sparseft.FullConfig()), folder)


REFUSED = {
    "LoRA": (lora, r"a peft adapter \(LORA\) trains every entry of its weights"),
    "full": (full, "a fully trained model trains every entry"),
    "another base": (lambda _, f: saved(build_model("llama", seed=1), METHODS["paca"], f)[0], "made for another base"),
    "nothing there": (lambda _, folder: folder, "no such folder"),
    "an empty folder": (lambda _, f: f.mkdir() or f, "no adapter and no finished run"),
    "exhausted": (
        lambda m, f: saved(m, sparseft.PacaConfig(sparsity=0.1), f)[0],
        r"leaves \d of the \d+ units of .*proj, and",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    folder = make(build_model("llama"), tmp_path / "a")
    model = build_model("llama")
    with pytest.raises(UserError, match=message) as caught:
        sparseft.compute_selection(model, sparseft.PacaConfig(sparsity=0.5, exclude=[str(folder)]))
    assert "\n" not in str(caught.value)
    sparseft.compute_selection(model, sparseft.PacaConfig(sparsity=0.5))  # the model is as it was


@pytest.mark.parametrize("value", ["", " ", 3, None])
def test_a_folder_is_text(value: Any) -> None:
    with pytest.raises(UserError, match=r"method\.exclude"):
        sparseft.PacaConfig(exclude=[value]).validate()


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BROKEN = {
    "format": lambda f: edit(f, format_version=[7]),
    "block size": lambda f: edit(f, block_size="8"),
    "no block": lambda f: edit(f, block_size=0),
    "altered": lambda f: edit(f, sha256="0"),
    "text": lambda f: (f / "adapter_config.json").write_text("[1]"),
    "tensors": lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"),
    "no tensors": lambda f: (f / "adapter_model.safetensors").unlink(),
    "larger blocks": lambda f: edit(f, block_size=1 << 20),  # an index that lies outside
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_files_are_a_sentence(case: str, tmp_path: Path) -> None:
    model = build_model("llama")
    folder, _ = saved(model, METHODS["sylva 4"], tmp_path / "a")
    BROKEN[case](folder)
    with pytest.raises(UserError, match=str(folder)):
        sparseft.compute_selection(model, sparseft.PacaConfig(rank=1, exclude=[str(folder)]))


def test_a_run_folder_means_its_adapter(tmp_path: Path) -> None:
    model = build_model("llama")
    _, taken = saved(model, METHODS["paca"], tmp_path / "run" / "adapter")
    selection = sparseft.compute_selection(model, excluding(METHODS["paca"], tmp_path / "run"))
    assert_disjoint(taken, selection, model)


def test_a_run_goes_on_when_what_it_left_out_is_gone(tmp_path: Path) -> None:
    words = ["method=paca", "method.rank=1", "trainer.batch_size=2", "hardware.device=cpu"]
    command(tmp_path, "train", *words, "trainer.max_steps=1", "output_dir=first")
    words += ["method.exclude=[first]", "output_dir=second", "trainer.save_steps=1"]
    command(tmp_path, "train", *words, "trainer.max_steps=1")
    shutil.rmtree(tmp_path / "first")
    before = Selection.load(tmp_path / "second" / "selection")
    command(tmp_path, "train", *words, "trainer.max_steps=2", "trainer.resume=auto")
    assert json.loads((tmp_path / "second" / "summary.json").read_text())["steps"] == 2
    assert Selection.load(tmp_path / "second" / "selection").digest() == before.digest()
    assert "no such folder" in refused(tmp_path, "train", *words, "overwrite=true")  # a new run has to choose

"""Re-selection: layers park their units and take others, nothing learnt is lost, and the base still comes back."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file

import sparseft
from sparseft.kernels import reference
from sparseft.layers import sparse_layers
from sparseft.layers.inactive import swap, union
from sparseft.layers.pattern import positions_of
from sparseft.selection.compute import reselect
from sparseft.training.reselection.swap import apply_selection, load_active, move_moments, save_active
from support.running import refused
from support.running import sparseft as command

LAYERS = {
    "rows": lambda: sparseft.S2ColumnLinear(13, 22, rows=[1, 5, 9]),
    "columns": lambda: sparseft.S2RowLinear(22, 13, columns=[0, 3, 8, 21]),
    "blocks": lambda: sparseft.BlockSparseLinear(22, 13, blocks=[[0, 0], [3, 5], [1, 2]], block_size=4),
    "grid": lambda: sparseft.GridLinear(22, 13, rows=[0, 3, 8], columns=[1, 2, 20, 5]),
}
OTHERS = {
    "rows": [[5, 2, 7], [2, 1, 9], [1, 5, 9]],
    "columns": [[8, 1, 2, 0], [21, 3, 1, 4], [0, 3, 8, 21]],
    "blocks": [[[3, 5], [0, 1], [2, 2]], [[0, 0], [0, 1], [3, 0]], [[1, 2], [0, 0], [3, 5]]],
    "grid": [[8, 3, 11, -3, -1, -22, -6], [0, 3, 11, -2, -3, -21, -6], [0, 3, 8, -2, -3, -21, -6]],
}


def entries(kind: str, index: list) -> list:
    """What the positions of a delta stand for: the index, of a grid its entries row by row."""
    return index if kind != "grid" else [(i, j) for i in index if i >= 0 for j in index if j < 0]


def train(layer, steps: int = 2) -> None:
    """A few steps of plain SGD by hand: random gradients that the test does not need to know."""
    for pattern in layer.patterns.values():
        with torch.no_grad():
            for _ in range(steps):
                pattern.delta.add_(torch.randn_like(pattern.delta))
    if "blocks" in layer.patterns:  # outside the weight an edge block has no entries to learn
        pattern = layer.blocks
        inside = reference.gather(torch.ones_like(layer.weight), "blocks", pattern.index, 4)
        with torch.no_grad():
            pattern.delta.mul_(inside)
    layer(torch.randn(2, layer.in_features))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_learnt_is_lost_and_the_base_comes_back(kind, dtype):
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(dtype)
    layer.float() if dtype == torch.float32 else None
    base = layer.weight.clone()
    x = torch.randn(3, layer.in_features, dtype=dtype)
    total = torch.zeros_like(base, dtype=torch.float64)  # the sum of every delta, kept densely

    def learnt() -> torch.Tensor:
        dense = torch.zeros(base.shape)
        index, delta = union(layer.patterns[kind])
        reference.scatter_(dense, kind, index, delta.detach(), layer.patterns[kind].block_size)
        return dense

    for index in OTHERS[kind]:
        with torch.no_grad():
            layer.patterns[kind].delta.add_(torch.randn_like(layer.patterns[kind].delta) * 0.1)
            if kind == "blocks":
                inside = reference.gather(torch.ones(base.shape), kind, layer.blocks.index, 4)
                layer.blocks.delta.mul_(inside)
        total = learnt()
        before = layer(x)
        swap(layer, kind, torch.tensor(index))
        assert torch.equal(layer(x), before)  # the weight keeps what it learnt
        assert torch.equal(learnt(), total)
        assert torch.equal(layer.weight, (base + total).to(dtype))
        assert layer.patterns[kind].index.tolist() == index
    back = copy.deepcopy(layer)
    assert torch.equal(back(x), layer(x))
    layer.restore_base()
    assert torch.equal(layer.weight, base)


@pytest.mark.parametrize("kind", LAYERS)
def test_an_entry_that_comes_back_finds_its_delta_and_base(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    first = layer.patterns[kind].index.clone()
    train(layer)
    delta, base = layer.patterns[kind].delta.detach().clone(), layer.patterns[kind].base_values.clone()
    swap(layer, kind, torch.tensor(OTHERS[kind][0]))
    train(layer)
    source = swap(layer, kind, first)
    dim = 1 if kind == "columns" else 0
    came_back = (source < 0).nonzero().flatten()
    assert len(came_back)
    picked = [t.index_select(dim, came_back) for t in (layer.patterns[kind].delta, delta)]
    assert torch.equal(*picked) and torch.equal(layer.patterns[kind].base_values, base)


@pytest.mark.parametrize("kind", LAYERS)
def test_moments_follow_their_entries_and_newcomers_start_at_zero(kind):
    layer = LAYERS[kind]()
    pattern = layer.patterns[kind]
    optimizer = torch.optim.AdamW([pattern.delta], lr=0.1)
    layer(torch.randn(4, layer.in_features)).square().sum().backward()
    optimizer.step()
    old, moments = entries(kind, pattern.index.tolist()), optimizer.state[pattern.delta]["exp_avg"].clone()
    source = swap(layer, kind, torch.tensor(OTHERS[kind][0]))
    move_moments(optimizer, pattern, source)
    dim = 1 if kind == "columns" else 0
    moved = optimizer.state[pattern.delta]["exp_avg"]
    for place, entry in enumerate(entries(kind, OTHERS[kind][0])):
        got = moved.select(dim, place)
        wanted = moments.select(dim, old.index(entry)) if entry in old else torch.zeros_like(got)
        assert torch.equal(got, wanted)
    assert optimizer.state[pattern.delta]["step"] == 1
    assert pattern.delta.grad is None


def test_factored_moments_start_anew():
    layer = LAYERS["columns"]()
    optimizer = torch.optim.Adafactor([layer.delta], lr=0.1)
    layer(torch.randn(4, 22)).square().sum().backward()
    optimizer.step()
    move_moments(optimizer, layer.columns, swap(layer, "columns", torch.tensor(OTHERS["columns"][0])))
    assert layer.delta not in optimizer.state
    layer(torch.randn(4, 22)).square().sum().backward()
    optimizer.step()


def test_another_number_of_entries_is_refused():
    layer = LAYERS["rows"]()
    with pytest.raises(sparseft.UserError, match="number of rows"):
        swap(layer, "rows", torch.tensor([1, 2]))


def test_positions():
    among = torch.tensor([7, 3, 9])
    assert positions_of(torch.tensor([9, 4, 7, 10]), among).tolist() == [2, -1, 0, -1]
    assert positions_of(torch.tensor([1]), torch.tensor([], dtype=torch.long)).tolist() == [-1]


# ---- whole models ----

CONFIGS = {
    "s2ft": lambda: sparseft.S2FTConfig(d_ratio=0.1, o_ratio=0.3, reselect_steps=2),
    "sylva": lambda: sparseft.SylvaConfig(sparsity=0.9, block_size=8, importance="random", reselect_steps=2),
}


def steps(model, optimizer, count: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(3, 90, (2, 9), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_adapter_is_the_union(make_model, tmp_path, kind, name):
    model, config = make_model(kind, torch.bfloat16), CONFIGS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sparseft.attach(model, config)
    optimizer = torch.optim.AdamW(sparseft.trainable_parameters(model).values(), lr=1e-2)
    entries = {key: p.numel() for key, p in sparseft.trainable_parameters(model).items()}
    touched = {n: {tuple(np) for np in p.index.reshape(len(p.index), -1).tolist()} for n, p in patterns(model)}
    for turn in range(3):
        steps(model, optimizer, 2, turn)
        share = apply_selection(model, reselect(model, config, None, seed=turn + 1), optimizer)
        assert share > 0.3
        for n, p in patterns(model):
            touched[n] |= {tuple(np) for np in p.index.reshape(len(p.index), -1).tolist()}
    steps(model, optimizer, 2, 9)
    assert {key: p.numel() for key, p in sparseft.trainable_parameters(model).items()} == entries
    ids = torch.randint(3, 90, (2, 9))
    logits = model(ids).logits

    sparseft.save_adapter(model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for n, seen in touched.items():
        index = tensors[f"{n}.index"]
        assert {tuple(entry) for entry in index.reshape(len(index), -1).tolist()} == seen, n
    other = sparseft.load_adapter(make_model(kind, torch.bfloat16), tmp_path / "adapter")
    assert torch.equal(other(ids).logits, logits)

    sparseft.set_adapter(model, None)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    sparseft.set_adapter(model, "default")
    assert torch.equal(model(ids).logits, logits)
    merged = sparseft.merge(copy.deepcopy(model))
    assert torch.equal(merged(ids).logits, logits)
    sparseft.detach(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_blocks_of_another_size_than_the_sparsity_would_have_are_chosen_anew_as_they_are(make_model):
    first = sparseft.compute_selection(make_model("llama"), sparseft.SylvaConfig(importance="weight", block_size=16))
    config = sparseft.SylvaConfig(importance="random")  # alone it would take blocks of 4
    model = sparseft.attach(make_model("llama"), config, first)
    again = reselect(model, config, None, seed=3)
    assert again.block_size == 16 and again.digest() != first.digest()
    assert {n: len(k["blocks"]) for n, k in again.modules.items()} == {
        n: len(k["blocks"]) for n, k in first.modules.items()
    }
    apply_selection(model, again)


@pytest.mark.parametrize("name", ["s2ft", "sylva"])
def test_the_device_holds_one_selection_whatever_was_trained_before(make_model, name):
    """Parameters, buffers and moments take as many bytes after any number of re-selections: the rest is on the host."""
    from sparseft.memory import tensor_bytes

    config = {
        "s2ft": sparseft.S2FTConfig(d_ratio=0.1, o_ratio=0.5),
        "sylva": sparseft.SylvaConfig(sparsity=0.9, block_size=8, importance="random"),
    }[name]
    model = sparseft.attach(make_model("llama"), config)
    optimizer = sparseft.SparseAdamW(sparseft.trainable_parameters(model).values(), lr=1e-2)

    def held() -> int:
        moments = [v for state in optimizer.state.values() for v in state.values()]
        return tensor_bytes([*model.parameters(), *model.buffers(), *moments])

    steps(model, optimizer, 1)
    before, parked = held(), []
    for seed in (1, 2, 3):
        apply_selection(model, reselect(model, config, None, seed=seed), optimizer)
        steps(model, optimizer, 1, seed)
        kept = [p.inactive for layer in sparse_layers(model).values() for p in layer.patterns.values() if p.inactive]
        parked.append(sum(entry.delta.numel() for entry in kept))
        assert {entry.delta.device.type for entry in kept} == {"cpu"}
        assert held() <= 1.01 * before  # block columns that a layer needs vary by a few indices
    assert 0 < parked[0] < parked[1] < parked[2]


def patterns(model):
    return [
        (f"{name}.{kind}", pattern)
        for name, layer in sparse_layers(model).items()
        for kind, pattern in layer.patterns.items()
    ]


@pytest.mark.parametrize("name", [*CONFIGS, "losia"])
def test_state_dict_and_checkpoint_carry_what_is_parked(make_model, tmp_path, name):
    config = sparseft.LosiaConfig(sparsity=0.9) if name == "losia" else CONFIGS[name]()

    def fresh():
        return sparseft.attach(make_model("llama"), config)

    model = fresh()
    optimizer = torch.optim.AdamW(sparseft.trainable_parameters(model).values(), lr=1e-2)
    steps(model, optimizer, 2)
    apply_selection(model, reselect(model, config, None, seed=5), optimizer)
    steps(model, optimizer, 2, 1)
    ids = torch.randint(3, 90, (2, 9))
    logits = model(ids).logits

    copied = fresh()
    copied.load_state_dict(model.state_dict())
    sparseft.save_adapter(model, tmp_path / "adapter")
    save_active(model, tmp_path)
    resumed = fresh()
    assert load_active(resumed, tmp_path)
    for other in (copied, resumed):
        assert torch.equal(other(ids).logits, logits)
        for (left, a), (right, b) in zip(patterns(model), patterns(other), strict=True):
            assert left == right and torch.equal(a.index, b.index) and torch.equal(a.delta, b.delta)
            assert sorted(a.inactive.index.flatten().tolist()) == sorted(b.inactive.index.flatten().tolist())
        sparseft.detach(other)
        assert all(
            torch.equal(value, make_model("llama").state_dict()[key]) for key, value in other.state_dict().items()
        )
    assert not load_active(fresh(), tmp_path / "elsewhere")


# ---- the command ----

BY = "method.reselect_by=calibration"
WORDS = (
    "train dataset.max_examples=40 trainer.batch_size=2 trainer.gradient_accumulation=1 trainer.max_length=96 "
    "trainer.learning_rate=1e-2 trainer.warmup_steps=0 trainer.logging_steps=1 hardware.device=cpu method.num_samples=2"
).split()


@pytest.mark.parametrize("by", ["running", "calibration"])
def test_a_longer_run_makes_up_for_the_re_selection_that_its_end_left_out(tmp_path, by):
    """After a run's last step nothing is chosen anew; a run that goes on from there would have chosen."""
    words = [*WORDS, "method=s2ft", "method.importance=gradient", "method.reselect_steps=3", f"method.reselect_by={by}"]
    words += ["trainer.scheduler=constant", "trainer.save_steps=3"]
    command(tmp_path, *words, "trainer.max_steps=7", "output_dir=whole")
    first = command(tmp_path, *words, "trainer.max_steps=3", "output_dir=grown")
    assert "re-selection" not in first.err
    for last in (5, 7):  # from where it ended with nothing chosen anew, and from where it ended between
        done = command(tmp_path, *words, f"trainer.max_steps={last}", "output_dir=grown", "trainer.resume=auto")
        assert f"re-selection at step {3 if last == 5 else 6}" in done.err
    tensors = [load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "grown")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_a_run_from_before_running_gradients_goes_on_by_calibration(tmp_path):
    words = [*WORDS, "method=s2ft", "method.reselect_steps=2", "trainer.save_steps=2", "output_dir=run"]
    done = command(tmp_path, *words, BY, "trainer.max_steps=2")
    assert "by the gradients of the steps" not in done.err
    config = tmp_path / "run/config.yaml"
    config.write_text("".join(line for line in config.read_text().splitlines(True) if "reselect_by" not in line))
    more = [*words, "trainer.max_steps=4", "trainer.resume=auto"]
    assert "was started with calibration" in refused(tmp_path, *more)
    command(tmp_path, *more, BY)


@pytest.mark.parametrize(
    "method",
    [
        ["method=s2ft", "method.importance=gradient", "method.order=sampled", BY],
        ["method=s2ft", "method.layout=permuted", "method.importance=activation", "method.num_samples=null", BY],
        ["method=sylva", "method.block_size=16", "sparsity=0.9", BY],
        ["method=s2ft", "method.order=sampled"],
        ["method=s2ft", "method.layout=permuted"],
        ["method=sylva", "method.block_size=16", "sparsity=0.9"],
        ["method=losia", "sparsity=0.9", BY],
    ],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, method):
    words = [*WORDS, *method, "method.reselect_steps=3", "trainer.max_steps=8", "trainer.scheduler=constant"]
    parts, adapter = [*words, "output_dir=parts", "trainer.save_steps=4"], tmp_path / "parts/adapter"
    done = command(tmp_path, *parts)
    assert "re-selection at step 3" in done.err and "re-selection at step 6" in done.err
    whole = load_file(adapter / "adapter_model.safetensors")
    if BY not in method:  # what running gradients have looked at by then, a checkpoint does not disturb
        command(tmp_path, *words, "output_dir=plain")
        plain = load_file(tmp_path / "plain" / "adapter" / "adapter_model.safetensors")
        assert plain.keys() == whole.keys() and all(torch.equal(plain[name], whole[name]) for name in whole)
    for left in (tmp_path / "parts/checkpoints/checkpoint-8", adapter):
        shutil.rmtree(left)
    (tmp_path / "parts" / "summary.json").unlink()
    command(tmp_path, *parts, "trainer.resume=auto")
    found = load_file(adapter / "adapter_model.safetensors")
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    selected = load_file(tmp_path / "parts" / "selection" / "selection.safetensors")
    assert all(len(whole[name]) >= len(index) for name, index in selected.items())
    assert sum(len(whole[name]) for name in selected) > sum(map(len, selected.values()))

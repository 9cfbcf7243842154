"""Which inputs layers of blocks save for the backward pass: never more than the shared inputs themselves."""

from __future__ import annotations

import contextlib
import copy
import sys
import weakref
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import sparseft
from sparseft.importance.scores import compute_scores
from sparseft.layers import BlockSparseLinear, product, share_inputs, sparse_layers
from sparseft.layers.product import SharedSlice
from sparseft.memory import SavedBytes
from sparseft.models.spec import ModelSpec
from sparseft.selection.budget import block_budget
from sparseft.selection.choose import choose
from sparseft.selection.selection import Selection
from sparseft.training.recomputing import KINDS, recomputing
from sparseft.training.reselection.swap import apply_selection

TOKENS = 24
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.984, 0.99)


def llama(attention: str = "sdpa", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=16, max_position_embeddings=64, attn_implementation=attention, **options,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def saved(model: nn.Module) -> int:
    counter = SavedBytes(model)
    ids = torch.arange(TOKENS).reshape(2, -1)
    model.train()
    with counter.counting():
        model(input_ids=ids, labels=ids, use_cache=False)
    return counter.total


def sylva(model: nn.Module, sparsity: float, block_size: int, importance: str = "random") -> nn.Module:
    """Trains that share of the blocks in every linear, also where they are too large to meet the sparsity."""
    budget = block_budget(ModelSpec.of(model), block_size, sparsity, scope=None)
    candidates = budget.candidates
    scores = compute_scores(model, candidates, importance, seed=0).scores
    selection = choose(budget, scores, order="largest", allocation="per_layer", seed=0)
    return sparseft.attach(copy.deepcopy(model), sparseft.SylvaConfig(), selection)


def with_inputs(model: nn.Module) -> int:
    """What is saved where every layer saves its input whole."""
    before = {name: layer.keeps_input for name, layer in sparse_layers(model).items()}
    for layer in sparse_layers(model).values():
        layer.keeps_input = True
    total = saved(model)
    for name, layer in sparse_layers(model).items():
        layer.keeps_input = before[name]
    return total


@pytest.mark.parametrize("importance", ["random", "weight"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("block_size", [4, 16, 64])
def test_never_more_than_the_inputs(block_size: int, attention: str, importance: str) -> None:
    plain = llama(attention)
    frozen = saved(copy.deepcopy(plain).requires_grad_(False))
    for sparsity in SPARSITIES:
        model = sylva(plain, sparsity, block_size, importance)
        assert frozen <= saved(model) <= with_inputs(model), sparsity


def test_less_than_lora_of_equal_size() -> None:
    plain = llama()
    sparse = sylva(plain, 0.9, 16)
    size = sum(layer.trainable_entries for layer in sparse_layers(sparse).values())
    found = {}
    for rank in (2, 3, 4, 5, 6, 7, 8):
        lora = sparseft.attach(copy.deepcopy(plain), sparseft.LoraConfig(rank=rank))
        found[rank] = (abs(sum(p.numel() for p in lora.parameters() if p.requires_grad) - size), saved(lora))
    difference, lora_bytes = min(found.values())
    assert difference < 0.1 * size
    assert saved(sparse) < lora_bytes


def decisions(model: nn.Module) -> dict[str, bool | None]:
    """What the sparse layers of decoder layer 0 keep, by the last part of their names."""
    layers = sparse_layers(model).items()
    return {name.rsplit(".", 1)[-1]: layer.keeps_input for name, layer in layers if ".0." in name}


def blocks_of(**needed: int | list[int]) -> Selection:
    """Blocks of 16 in layer 0: for each projection, one in each of the `needed` (or first so many) block columns."""
    modules = {}
    for name, count in needed.items():
        part = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        columns = range(count) if isinstance(count, int) else count
        modules[f"model.layers.0.{part}.{name}"] = {"blocks": [[0, column] for column in columns]}
    return Selection(modules, block_size=16)


@pytest.mark.parametrize(
    ("needed", "expected"),  # hidden 128 has 8 block columns, the MLP's 320 has 20
    [
        ({"q_proj": 7, "k_proj": 7, "v_proj": 2}, [False, False, False]),  # one slice for all: 7 of 8
        ({"q_proj": [0, 1, 2], "k_proj": [3, 4, 5], "v_proj": [6, 7]}, [True, True, True]),  # all of x: no copy then
        ({"q_proj": 7}, [False]),
        ({"q_proj": 4, "gate_proj": 4}, [False, False]),  # not siblings: another norm is between them
        ({"gate_proj": 4, "up_proj": 4}, [False, False]),
        ({"gate_proj": 4, "up_proj": 8}, [True, True]),
        ({"down_proj": 19}, [False]),
        ({"down_proj": 20}, [True]),
        ({"o_proj": 1}, [True]),  # attention saves its result, which o reads
    ],
)
def test_siblings_decide_together(needed: dict[str, int], expected: list[bool]) -> None:
    model = sparseft.attach(llama(), sparseft.SylvaConfig(importance="random", block_size=16), blocks_of(**needed))
    assert list(decisions(model).values()) == expected
    assert saved(model) <= with_inputs(model)


def test_o_keeps_a_slice_where_attention_saves_no_result() -> None:
    config = sparseft.SylvaConfig(importance="random", block_size=16)
    model = sparseft.attach(llama("eager"), config, blocks_of(o_proj=1))
    assert decisions(model) == {"o_proj": False}
    assert saved(model) < with_inputs(model)


def test_a_sibling_with_rows_keeps_the_input_for_all() -> None:
    selection = Selection(
        {
            "model.layers.0.self_attn.q_proj": {"rows": [0]},
            "model.layers.0.self_attn.k_proj": {"blocks": [[0, 0]]},
            "model.layers.0.mlp.up_proj": {"blocks": [[0, 0]]},
        },
        block_size=16,
    )
    model = sparseft.attach(llama(), sparseft.SylvaConfig(importance="random", block_size=16), selection)
    assert decisions(model)["k_proj"] is True and decisions(model)["up_proj"] is False
    assert saved(model) <= with_inputs(model)


def test_another_adapter_decides_anew(tmp_path) -> None:
    config = sparseft.SylvaConfig(importance="random", block_size=16)
    few = sparseft.attach(llama(), config, blocks_of(q_proj=1, k_proj=1))
    many = sparseft.attach(llama(), config, blocks_of(q_proj=8, k_proj=1))
    sparseft.save_adapter(many, tmp_path / "many")
    sparseft.load_adapter(few, tmp_path / "many", name="many")
    assert saved(few) <= with_inputs(few)  # a pass that trains settles it, one that does not leaves it
    assert decisions(few) == {"q_proj": True, "k_proj": True}
    sparseft.set_adapter(few, "default")
    with torch.no_grad():
        few(input_ids=torch.tensor([[1, 2]]))
    assert decisions(few) == {"q_proj": True, "k_proj": True}
    assert saved(few) <= with_inputs(few)
    assert decisions(few) == {"q_proj": False, "k_proj": False}


def test_reselection_decides_anew() -> None:
    config = sparseft.SylvaConfig(importance="random", block_size=16)
    q_proj = "model.layers.0.self_attn.q_proj"
    model = sparseft.attach(llama(), config, Selection({q_proj: {"blocks": [[r, 0] for r in range(8)]}}, block_size=16))
    assert decisions(model) == {"q_proj": False}
    apply_selection(model, Selection({q_proj: {"blocks": [[0, c] for c in range(8)]}}, block_size=16))
    assert decisions(model) == {"q_proj": True}


def test_one_norm_for_attention_and_mlp() -> None:
    """GPT-J feeds both from `ln_1`: q, k, v and fc_in read one input."""
    torch.manual_seed(0)
    config = transformers.GPTJConfig(vocab_size=64, n_positions=64, n_embd=64, n_layer=2, n_head=4, rotary_dim=8)
    plain = transformers.GPTJForCausalLM(config)
    for sparsity in SPARSITIES:
        model = sylva(plain, sparsity, 16)
        assert saved(model) <= with_inputs(model)
        first = decisions(model)
        assert len({first[name] for name in ("q_proj", "k_proj", "v_proj", "fc_in") if name in first}) == 1


def test_relu_keeps_its_result() -> None:
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64,
        max_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    plain = transformers.OPTForCausalLM(config)
    for sparsity in SPARSITIES:
        model = sylva(plain, sparsity, 16)
        assert saved(model) <= with_inputs(model), sparsity


@pytest.mark.parametrize("keeps_input", [True, False, None])
def test_gradients_do_not_depend_on_what_is_saved(keeps_input: bool | None) -> None:
    torch.manual_seed(0)
    layer = BlockSparseLinear(40, 24, blocks=[[0, 0], [1, 2], [2, 2]], block_size=10)
    assert layer.keeps_input is None  # it stands alone
    layer.keeps_input = keeps_input
    x = torch.randn(5, 40)
    layer(x).square().sum().backward()
    weight = layer.weight.detach().clone().requires_grad_()
    nn.functional.linear(x, weight, layer.bias).square().sum().backward()
    for block, (row, column) in enumerate([(0, 0), (1, 2), (2, 2)]):
        part = weight.grad[row * 10 : (row + 1) * 10, column * 10 : (column + 1) * 10]
        torch.testing.assert_close(layer.delta.grad[block, : part.shape[0], : part.shape[1]], part)


def test_models_without_blocks_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    share_inputs(model)
    rows = sparseft.attach(llama(), sparseft.S2FTConfig(sparsity=0.9, importance="random"))
    assert {layer.keeps_input for layer in sparse_layers(rows).values()} == {None}


@pytest.mark.parametrize(
    ("needed", "columns"),
    [({"q_proj": [0, 4]}, 2), ({"q_proj": [0, 4], "k_proj": [0, 1, 2]}, 4), ({"gate_proj": 3, "up_proj": 5}, 5)],
)
def test_siblings_save_one_slice(needed: dict[str, Any], columns: int) -> None:
    model = sparseft.attach(llama(), sparseft.SylvaConfig(importance="random", block_size=16), blocks_of(**needed))
    assert with_inputs(model) - saved(model) == TOKENS * (128 - columns * 16) * 4


def test_siblings_share_their_slice_where_activations_are_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks on saved tensors keep another tensor than the slice, which nothing else holds; and none is left behind."""
    needed = {"q_proj": [4, 0], "k_proj": [0, 1, 2], "v_proj": [3, 1], "gate_proj": [7, 2], "up_proj": [1]}
    config = sparseft.SylvaConfig(importance="random", block_size=16)
    model = sparseft.attach(llama(), config, blocks_of(**needed)).train()
    plain, made = product.slice_of, []

    def noted(*args: Any) -> torch.Tensor:
        made.append(weakref.ref(found := plain(*args)))
        return found

    monkeypatch.setattr(product, "slice_of", noted)
    ids = torch.arange(TOKENS).reshape(2, -1)
    for kinds in ((), KINDS["selective"]):
        made.clear()
        with recomputing(model, kinds) if kinds else contextlib.nullcontext():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        assert len(made) == 2
        loss.backward()
        del loss
        assert not any(each() is not None for each in made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["plain", "checkpointing", "copied", "moved", "offloaded"])
def test_a_shared_slice_gives_every_layer_its_own_gradient(how: str, dtype: torch.dtype) -> None:
    needed = {"q_proj": [4, 0], "k_proj": [0, 1, 2], "v_proj": [3, 1], "gate_proj": [7, 2], "up_proj": [1]}
    config = sparseft.SylvaConfig(importance="random", block_size=16)
    model = sparseft.attach(llama().to(dtype), config, blocks_of(**needed))
    layers = sparse_layers(model)
    assert len({id(layer.blocks.slices) for layer in layers.values()}) == 2
    expected = {}
    dense = llama().to(dtype)
    ids = torch.arange(TOKENS).reshape(2, -1)
    for batch in (ids, ids.flip(0)):
        dense(input_ids=batch, labels=batch).loss.backward()
    for name, layer in layers.items():
        grad = dense.get_submodule(name).weight.grad.float()
        rows, columns = layer.out_features // 16, layer.in_features // 16
        cut = grad.view(rows, 16, columns, 16).transpose(1, 2)
        expected[name] = cut[layer.blocks.index[:, 0], layer.blocks.index[:, 1]]
    if how == "checkpointing":
        model.train()
        model.gradient_checkpointing_enable()
    elif how == "copied":
        model = copy.deepcopy(model)
        assert (
            model.model.layers[0].self_attn.q_proj.blocks.slices is model.model.layers[0].self_attn.v_proj.blocks.slices
        )
    elif how == "moved":
        model = model.to(torch.float64).to(dtype)
    hooks = torch.autograd.graph.save_on_cpu() if how == "offloaded" else contextlib.nullcontext()
    for batch in (ids, ids.flip(0)):
        with hooks:
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for name, layer in sparse_layers(model).items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(layer.delta.grad, expected[name], rtol=0, atol=tolerance * scale)


def test_a_changed_input_is_not_taken_for_the_last_one() -> None:
    slices = SharedSlice(torch.tensor([0, 2]))
    x = torch.randn(3, 12)
    first = slices.take(x, slices.columns, 4, x.dtype)
    assert slices.take(x, slices.columns, 4, x.dtype) is first
    assert slices.take(x, slices.columns, 4, torch.bfloat16).dtype == torch.bfloat16
    x.add_(1)
    changed = slices.take(x, slices.columns, 4, x.dtype)
    assert torch.equal(changed, torch.cat([x[:, :4], x[:, 8:]], 1))
    assert torch.equal(slices.take(x + 1, slices.columns, 4, x.dtype), changed + 1)


def test_an_input_without_a_version_is_sliced_anew() -> None:
    slices = SharedSlice(torch.tensor([0, 2]))
    with torch.inference_mode():
        x = torch.zeros(3, 12)
    kept = slices.take(x, slices.columns, 4, x.dtype)
    with torch.inference_mode():
        x.add_(1)
    assert kept.eq(0).all() and slices.take(x, slices.columns, 4, x.dtype).eq(1).all()


def test_threads_do_not_take_each_others_slice() -> None:
    """Another thread comes in wherever the look-up is: at each line of it, once."""
    slices = SharedSlice(torch.tensor([0, 2]))
    code = SharedSlice.take.__code__
    for at in sorted({line for _, _, line in code.co_lines() if line}):
        x, y = torch.zeros(3, 12), torch.ones(3, 12)
        other: list[torch.Tensor] = []

        def interrupt(frame: Any, event: str, _: Any, at: int = at, y: Any = y, other: Any = other) -> Any:
            if event == "line" and not other and frame.f_lineno == at:
                sys.settrace(None)
                other.append(slices.take(y, slices.columns, 4, y.dtype))
            return interrupt if frame.f_code is code else None

        mine = slices.take(x, slices.columns, 4, x.dtype)
        before = sys.gettrace()
        sys.settrace(interrupt)
        try:
            again = slices.take(x, slices.columns, 4, x.dtype)
        finally:
            sys.settrace(before)
        assert mine.eq(0).all() and again.eq(0).all()
        assert all(slice_.eq(1).all() for slice_ in other)


def test_another_index_no_longer_shares() -> None:
    config = sparseft.SylvaConfig(importance="random", block_size=16)
    model = sparseft.attach(llama(), config, blocks_of(q_proj=[0, 1], k_proj=[2]))
    other = sparseft.attach(llama(), config, blocks_of(q_proj=[0, 5], k_proj=[2]))
    model.load_state_dict(other.state_dict())
    q, k = (getattr(model.model.layers[0].self_attn, name).blocks for name in ("q_proj", "k_proj"))
    assert q.slices is None and k.slices is not None
    ids = torch.arange(TOKENS).reshape(2, -1)
    for each in (model, other):
        each(input_ids=ids, labels=ids).loss.backward()
    for one, two in zip(sparse_layers(model).values(), sparse_layers(other).values(), strict=True):
        torch.testing.assert_close(one.delta.grad, two.delta.grad)

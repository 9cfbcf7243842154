"""`layout: permuted`: another order in memory, the same function, gradients and files."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import sparseft
from sparseft import console
from sparseft.adapters.state import state_of
from sparseft.errors import LayoutWarning, UserError
from sparseft.layers import S2RowLinear, SparseLinear, sparse_layers
from sparseft.layers.permuted_layout import front_order, plan_permutations
from sparseft.models.decoder import logical_weight
from sparseft.models.spec import ModelSpec
from sparseft.selection.compute import reselect
from sparseft.selection.selection import Selection
from sparseft.training.reselection.swap import apply_selection, load_active, save_active

Make = Callable[..., Any]
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.15}
each_model = pytest.mark.parametrize("kind", ["llama", "mha", "qwen2"])
PERMUTED = sparseft.S2FTConfig(d_ratio=0.1, layout="permuted")
GATHER = sparseft.S2FTConfig(d_ratio=0.1)
# One of the numbers of heads and groups differs in each, so that a wrong count shows.
SHAPES = {"llama": (6, 2, 12), "mha": (4, 4, 12), "qwen2": (4, 2, 12)}  # heads, key/value heads, head_dim


def build(make_model: Make, kind: str, dtype: torch.dtype = torch.float64) -> Any:
    if kind != "mha":
        return make_model(kind, dtype)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=False, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model.to(dtype).eval()


def features(units: list[int], size: int) -> list[int]:
    return [unit * size + i for unit in units for i in range(size)]


def whole_groups(kind: str) -> Selection:
    """Overlapping channels and whole key/value groups of every role, none of them where they are to lie."""
    heads, groups, dim = SHAPES[kind]
    per, last = heads // groups, groups - 1
    modules: dict[str, Any] = {}
    for layer, (o, v) in enumerate([([last], [last]), ([last, 0] if groups > 2 else [last], [1])]):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        modules |= {
            f"{attention}.q_proj": {"rows": features(o, per * dim)},
            f"{attention}.k_proj": {"rows": features(v, dim)},
            f"{attention}.v_proj": {"rows": features(v, dim)},
            f"{attention}.o_proj": {"columns": features(o, per * dim)},
            f"{mlp}.down_proj": {"columns": [71, 3, 40]},
        }
        if layer:
            modules |= {f"{mlp}.up_proj": {"rows": [40, 79, 2]}, f"{mlp}.gate_proj": {"rows": [8, 71]}}
    return Selection(modules)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 96, (3, 10), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=batch()["input_ids"]).logits


def tensors(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [n for n in left if left[n].dtype != right[n].dtype or not torch.equal(left[n], right[n])] == []


@torch.no_grad()
def randomise(model: Any) -> Any:
    """The same random delta for the same entry of the checkpoint, in whichever order a layer keeps its entries."""
    for name, layer in sparse_layers(model).items():
        generator = torch.Generator().manual_seed(len(name) + layer.in_features)
        for kind, pattern in layer.patterns.items():
            dense = torch.randn(layer.out_features, layer.in_features, generator=generator) * 0.1
            pattern.delta.copy_(dense[pattern.index] if kind == "rows" else dense[:, pattern.index])
    return model


def train(model: Any, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(sparseft.trainable_parameters(model).values(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def dense_deltas(folder: Path) -> dict[str, Tensor]:
    """What a saved adapter adds to each weight, from the file alone."""
    content, result = load_file(folder / "adapter_model.safetensors"), {}
    for name in content:
        if name.endswith(".index"):
            index, delta = content[name].tolist(), content[name.replace(".index", ".delta")]
            dense = torch.zeros(200, 200)
            for n, item in enumerate(index):
                if ".rows." in name:
                    dense[item, : delta.shape[1]] = delta[n]
                else:
                    dense[: delta.shape[0], item] = delta[:, n]
            result[name] = dense
    return result


@pytest.mark.parametrize("dtype", list(DTYPES))
@each_model
def test_same_function_and_every_bit_back(make_model: Make, kind: str, dtype: str) -> None:
    model = build(make_model, kind, DTYPES[dtype])
    expected, before = logits(model), tensors(model)
    stored = {n: p.detach().clone() for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", LayoutWarning)
        sparseft.attach(model, PERMUTED, whole_groups(kind))
    tolerance = TOLERANCE[DTYPES[dtype]]
    torch.testing.assert_close(logits(model), expected, atol=tolerance, rtol=tolerance)
    moved = [n for n, p in model.named_parameters() if n in stored and not torch.equal(p, stored[n])]
    wanted = [n for n in stored if "_proj" in n and not n.endswith(("o_proj.bias", "down_proj.bias"))]
    assert set(moved) == set(wanted)  # all of them, biases of moved rows too, and nothing else
    randomise(model)
    assert (logits(model) - expected).abs().max() > 10 * tolerance
    sparseft.detach(model)
    assert_equal(tensors(model), before)
    assert torch.equal(logits(model), expected)
    assert not sparse_layers(model) and all(p.requires_grad for p in model.parameters())


@each_model
def test_slices_are_consecutive(make_model: Make, kind: str) -> None:
    model = sparseft.attach(build(make_model, kind), PERMUTED, whole_groups(kind))
    for name, layer in sparse_layers(model).items():
        for pattern_kind, pattern in layer.patterns.items():
            if name.endswith(("o_proj", "v_proj", "up_proj", "down_proj")) and pattern.inverse is not None:
                assert isinstance(pattern.at, tuple), f"{name}.{pattern_kind}"
                start, length = pattern.at
                dim = 0 if pattern_kind == "rows" else 1
                part = layer.logical_weight.narrow(dim, start, length)
                assert torch.equal(part, pattern.base_values)
    down = model.model.layers[0].mlp.down_proj
    assert down.patterns["columns"].at == (0, 3) and down.patterns["columns"].index.tolist() == [3, 40, 71]


def test_order_of_units() -> None:
    def mask(*units: int) -> Tensor:
        return torch.zeros(8, dtype=torch.bool).index_fill(0, torch.tensor(units, dtype=torch.int64), True)

    # only the first: 6; both: 1, 3; only the second: 0, 7; of the rest the third's, 5, before 2 and 4
    order = front_order([mask(6, 1, 3), mask(7, 0, 3, 1), mask(5, 7)])
    assert order.tolist() == [6, 1, 3, 7, 0, 5, 2, 4]
    assert front_order([mask(), mask(4)]).tolist() == [4, 0, 1, 2, 3, 5, 6, 7]
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        sets = [torch.rand(8, generator=generator) < 0.4 for _ in range(2)]
        place = front_order(sets).argsort()
        for chosen in sets:
            at = place[chosen].sort().values
            assert at.tolist() == list(range(int(at[0]), int(at[0]) + len(at))) if len(at) else True


@each_model
def test_gradients_are_autograds_dense_ones(make_model: Make, kind: str) -> None:
    dense = build(make_model, kind)
    dense(**batch()).loss.backward()
    model = sparseft.attach(build(make_model, kind), PERMUTED, whole_groups(kind))
    model(**batch()).loss.backward()
    for name, layer in sparse_layers(model).items():
        expected = dense.get_submodule(name).weight.grad
        for pattern_kind, pattern in layer.patterns.items():
            part = expected[pattern.index] if pattern_kind == "rows" else expected[:, pattern.index]
            torch.testing.assert_close(pattern.delta.grad.double(), part, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
@each_model
def test_trains_saves_and_merges_as_gather_does(make_model: Make, tmp_path: Path, kind: str, dtype: str) -> None:
    models = {}
    for layout, config in (("gather", GATHER), ("permuted", PERMUTED)):
        models[layout] = sparseft.attach(build(make_model, kind, DTYPES[dtype]), config, whole_groups(kind))
        if dtype == "fp64":
            train(models[layout])
        else:
            randomise(models[layout])  # the sums' other order changes what bf16 training learns
        sparseft.save_adapter(models[layout], tmp_path / layout)
    left, right = dense_deltas(tmp_path / "gather"), dense_deltas(tmp_path / "permuted")
    assert left.keys() == right.keys()
    assert all(torch.allclose(left[n], right[n], atol=1e-6) and left[n].any() for n in left)
    tolerance = {"fp64": 1e-6, "bf16": 0.0}[dtype]
    merged = {layout: tensors(sparseft.merge(model)) for layout, model in models.items()}
    torch.testing.assert_close(merged["permuted"], merged["gather"], atol=tolerance, rtol=tolerance)
    assert not sparse_layers(models["permuted"])


@each_model
def test_adapters_of_both_layouts_are_interchangeable(make_model: Make, tmp_path: Path, kind: str) -> None:
    def fresh(config: Any) -> Any:
        return sparseft.attach(build(make_model, kind), config, whole_groups(kind))

    saved = {"gather": fresh(GATHER), "permuted": fresh(PERMUTED)}
    for layout, model in saved.items():
        sparseft.save_adapter(randomise(model), tmp_path / layout)
    expected, base = logits(saved["gather"]), logits(build(make_model, kind))
    for layout in saved:
        for model in (fresh(GATHER), fresh(PERMUTED), build(make_model, kind)):
            sparseft.load_adapter(model, tmp_path / layout, "other")
            torch.testing.assert_close(logits(model), expected, atol=1e-10, rtol=1e-10)
            if "default" in state_of(model).kind.names(model):
                sparseft.set_adapter(model, "default")
                torch.testing.assert_close(logits(model), base, atol=1e-10, rtol=1e-10)
                sparseft.fuse(model, {"default": 1.0, "other": 1.0})
                torch.testing.assert_close(logits(model), expected, atol=1e-10, rtol=1e-10)
            sparseft.detach(model)
            assert_equal(tensors(model), tensors(build(make_model, kind)))


def test_an_adapter_of_blocks_brings_the_original_order_back(make_model: Make, tmp_path: Path) -> None:
    blocks = Selection({"model.layers.0.mlp.up_proj": {"blocks": [[1, 0], [2, 1]]}}, block_size=32)
    other = sparseft.attach(build(make_model, "llama"), sparseft.SylvaConfig(block_size=32), blocks)
    with torch.no_grad():
        sparse_layers(other)["model.layers.0.mlp.up_proj"].delta[0] = 0.1
    sparseft.save_adapter(other, tmp_path / "blocks")
    model = randomise(sparseft.attach(build(make_model, "llama"), PERMUTED, whole_groups("llama")))
    before = logits(model)
    sparseft.load_adapter(model, tmp_path / "blocks", "blocks")
    assert torch.equal(logits(model), logits(other))
    assert not any(layer.is_permuted for layer in sparse_layers(model).values())
    sparseft.set_adapter(model, "default")
    torch.testing.assert_close(logits(model), before, atol=1e-12, rtol=1e-12)


@each_model
def test_state_dicts_and_saved_models_are_in_the_original_order(make_model: Make, tmp_path: Path, kind: str) -> None:
    gather = randomise(sparseft.attach(build(make_model, kind), GATHER, whole_groups(kind)))
    model = randomise(sparseft.attach(build(make_model, kind), PERMUTED, whole_groups(kind)))
    own, expected = tensors(model), tensors(gather)
    plain = {n: t for n, t in expected.items() if n in dict(build(make_model, kind).named_parameters())}
    assert_equal({n: own[n] for n in plain}, plain)
    # a checkpoint of the other layout, its entries in another order
    fresh = sparseft.attach(build(make_model, kind), PERMUTED, whole_groups(kind))
    state = {n: t.clone() for n, t in expected.items()} | {n: t for n, t in own.items() if n not in expected}
    given = dict(state)
    fresh.load_state_dict({n: t for n, t in state.items() if n in fresh.state_dict()}, strict=False)
    assert all(state[n] is given[n] and torch.equal(state[n], expected[n]) for n in expected)
    layer = sparse_layers(fresh)["model.layers.0.mlp.down_proj"]
    assert layer.patterns["columns"].index.tolist() == [71, 3, 40]
    torch.testing.assert_close(logits(fresh), logits(gather), atol=1e-12, rtol=1e-12)
    train(fresh, 1)
    train(gather, 1)
    torch.testing.assert_close(logits(fresh), logits(gather), atol=1e-6, rtol=1e-6)
    # its own, strictly
    again = sparseft.attach(build(make_model, kind), PERMUTED, whole_groups(kind))
    for assign in (False, True):
        again.load_state_dict({n: t.clone() for n, t in own.items()}, assign=assign)
        assert torch.equal(logits(again), logits(model))
    # a plain checkpoint becomes the base
    other = build(make_model, kind)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    again.load_state_dict(other.state_dict(), strict=False)
    torch.testing.assert_close(logits(again), logits(other), atol=1e-12, rtol=1e-12)
    assert_equal(tensors(sparseft.detach(again)), tensors(other))
    # Hugging Face's way
    expected_logits = logits(model)
    model.save_pretrained(tmp_path / "hf")
    files = load_file(tmp_path / "hf" / "model.safetensors")
    assert_equal({n: files[n] for n in plain}, {n: own[n] for n in plain})
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64).eval()
    torch.testing.assert_close(logits(loaded), expected_logits, atol=1e-12, rtol=1e-12)


def test_copies_and_casts(make_model: Make) -> None:
    model = randomise(sparseft.attach(build(make_model, "qwen2"), PERMUTED, whole_groups("qwen2")))
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    train(twin, 1)
    assert torch.equal(logits(model), expected) and not torch.equal(logits(twin), expected)
    assert_equal(tensors(sparseft.detach(twin)), tensors(build(make_model, "qwen2")))
    model.to(torch.bfloat16)
    assert all(p.delta.dtype == torch.float32 for m in sparse_layers(model).values() for p in m.patterns.values())
    gather = randomise(sparseft.attach(build(make_model, "qwen2"), GATHER, whole_groups("qwen2"))).to(torch.bfloat16)
    names = dict(build(make_model, "qwen2").named_parameters())
    left, right = tensors(model), tensors(gather)
    assert_equal({n: left[n] for n in names}, {n: right[n] for n in names})


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning", "ignore:None of the inputs")
@pytest.mark.parametrize("how", ["compile", "reentrant", "not_reentrant"])
def test_compiled_and_checkpointed_training_is_the_same(make_model: Make, how: str) -> None:
    models = [sparseft.attach(build(make_model, "llama"), PERMUTED, whole_groups("llama")) for _ in range(2)]
    if how == "compile":
        torch._dynamo.reset()
        run = torch.compile(models[1], fullgraph=True, backend="aot_eager")
    else:
        run = models[1].train()
        run.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        run.enable_input_require_grads()
    for step in range(2):
        for model, forward in zip(models, (models[0], run), strict=True):
            optimizer = torch.optim.SGD(sparseft.trainable_parameters(model).values(), lr=0.05)
            forward(**batch(), use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(logits(models[1]), logits(models[0]), atol=1e-9, rtol=1e-9, msg=f"step {step}")
    assert (logits(models[0]) - logits(build(make_model, "llama"))).abs().max() > 1e-3


# ---- what stays gather ----


def attach_and_say(model: Any, selection: Selection, match: str) -> Any:
    with pytest.warns(LayoutWarning, match=match):
        return sparseft.attach(model, PERMUTED, selection)


def test_incomplete_groups_stay_and_say_so(make_model: Make) -> None:
    model, expected = build(make_model, "llama"), logits(build(make_model, "llama"))
    names = "model.layers.{}.self_attn.o_proj"
    selection = Selection(
        {names.format(i): {"columns": features([4], 12)} for i in range(2)}
        | {"model.layers.0.mlp.down_proj": {"columns": [9]}}
    )
    said = "model.layers.0.self_attn and 1 more stay gather: the selection does not fill whole key/value groups"
    attach_and_say(model, selection, said)
    layers = sparse_layers(model)
    assert not layers[names.format(0)].is_permuted and layers["model.layers.0.mlp.down_proj"].is_permuted
    assert "model.layers.0.self_attn.q_proj" not in layers and not layers["model.layers.0.mlp.up_proj"].patterns
    torch.testing.assert_close(logits(model), expected, atol=1e-12, rtol=1e-12)
    train(model, 1)
    assert_equal(tensors(sparseft.detach(model)), tensors(build(make_model, "llama")))
    half = Selection({"model.layers.0.self_attn.v_proj": {"rows": [0, 1, 2]}})
    attach_and_say(build(make_model, "llama"), half, "does not fill whole heads")
    both = Selection({"model.layers.0.mlp.down_proj": {"columns": [9], "rows": [4]}})
    attach_and_say(build(make_model, "llama"), both, "more is trained in it than heads or channels")


def test_gpt2_stays_and_says_so(make_model: Make) -> None:
    model = make_model("gpt2")
    expected = logits(model)
    selection = Selection({"transformer.h.0.mlp.c_proj": {"columns": [9, 4]}})
    attach_and_say(model, selection, r"transformer.h.0.mlp stays gather: .*Conv1D")
    assert torch.equal(logits(model), expected) and list(sparse_layers(model)) == ["transformer.h.0.mlp.c_proj"]


@pytest.mark.parametrize("change", ["sinks", "norm", "shared", "alibi", "mlp_norm"])
def test_what_may_tell_units_apart_stays(make_model: Make, change: str) -> None:
    model = build(make_model, "llama")
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    name, index = "model.layers.0.self_attn.v_proj", {"rows": features([1], 12)}
    if change == "sinks":
        attention.sinks = nn.Parameter(torch.zeros(6))
    elif change == "norm":
        attention.q_norm = nn.RMSNorm(72)
    elif change == "shared":
        model.model.layers[1].self_attn.q_proj = attention.q_proj
    elif change == "alibi":
        model.config.alibi = True
    else:
        mlp.norm = nn.RMSNorm(80)
        name, index = "model.layers.0.mlp.down_proj", {"columns": [3]}
    attach_and_say(model, Selection({name: index}), "stays gather")
    assert list(sparse_layers(model)) == [name]
    assert sparse_layers(model)[name].row_permutation is None


@pytest.mark.parametrize("alibi", [True, False])
def test_heads_of_mpt_stay(alibi: bool) -> None:
    """Each has a bias of its own by its number (ALiBi), whatever the config says."""
    config = transformers.MptConfig(
        vocab_size=96, d_model=48, n_heads=4, n_layers=2, max_seq_len=64, attn_config={"alibi": alibi}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    expected = logits(model)
    third_of_v = {"transformer.blocks.0.attn.Wqkv": {"rows": features([10], 12)}}
    attach_and_say(model, Selection(third_of_v), "attn stays gather: its heads differ")
    torch.testing.assert_close(logits(model), expected)


def test_heads_of_dbrx_move() -> None:
    """It has an `attn_config` as well, and no ALiBi."""
    config = transformers.DbrxConfig(
        vocab_size=96, d_model=48, n_heads=4, n_layers=1, max_seq_len=64, ffn_config={"ffn_hidden_size": 16},
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    expected, name = logits(model), "transformer.blocks.0.norm_attn_norm.attn.Wqkv"
    sparseft.attach(model, PERMUTED, Selection({name: {"rows": features([7], 12)}}))  # the second head of v
    assert sparse_layers(model)[name].is_permuted
    torch.testing.assert_close(logits(model), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", ["qwen3", "gated", "by_layer"])
def test_a_norm_over_each_head_does_not_matter(kind: str) -> None:
    sizes = {
        "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": False,
    }  # fmt: skip
    kinds = {
        "qwen3": transformers.Qwen3Config,
        "gated": functools.partial(transformers.Qwen3_5TextConfig, layer_types=["full_attention"] * 2),
        "by_layer": functools.partial(  # the second layer's heads are twice as wide
            transformers.Gemma4TextConfig, layer_types=["sliding_attention", "full_attention"], global_head_dim=24,
            hidden_size_per_layer_input=0,
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kinds[kind](**sizes)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    expected = logits(model)
    group = ModelSpec.of(model)  # the last key/value head of each layer, with all its query heads
    last = {s.module: {s.side: features([1], s.unit * s.count // 2)} for s in group.slots if s.role in "qkvo"}
    sparseft.attach(model, PERMUTED, Selection(last))
    assert [sparse_layers(model)[name].is_permuted for name in last] == [True] * 8
    torch.testing.assert_close(logits(model), expected, atol=1e-12, rtol=1e-12)


def test_fused_projections_are_moved_part_by_part() -> None:
    config = transformers.Phi3Config(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(config).double().eval()
    expected, before = logits(model), tensors(model)
    heads = {"rows": features([1], 24) + features([5], 12)}  # a group's query heads, its key head
    selection = Selection(
        {
            "model.layers.0.self_attn.qkv_proj": heads,
            "model.layers.1.self_attn.o_proj": {"columns": features([1], 24)},
            "model.layers.1.mlp.gate_up_proj": {"rows": [7, 85]},
            "model.layers.1.mlp.down_proj": {"columns": [5, 70]},
        }
    )
    sparseft.attach(model, PERMUTED, selection)
    assert all(layer.is_permuted for layer in sparse_layers(model).values())
    assert sparse_layers(model)["model.layers.1.mlp.down_proj"].patterns["columns"].at == (0, 2)
    torch.testing.assert_close(logits(model), expected, atol=1e-12, rtol=1e-12)
    train(model, 1)
    assert_equal(tensors(sparseft.detach(model)), before)


def test_a_refused_selection_changes_nothing(make_model: Make) -> None:
    model = build(make_model, "llama")
    before = tensors(model)
    for columns in ([3, 80], [3, 3], [-1]):
        with pytest.raises(UserError):
            sparseft.attach(model, PERMUTED, Selection({"model.layers.0.mlp.down_proj": {"columns": columns}}))
        assert not sparse_layers(model)
        assert_equal(tensors(model), before)


def test_the_plan_follows_from_the_budget(make_model: Make) -> None:
    """From ratios to permutations, with what a method itself selects."""
    model = build(make_model, "mha")
    config = sparseft.S2FTConfig(o_ratio=0.5, v_ratio=0.25, d_ratio=0.1, u_ratio=0.1, layout="permuted")
    selection = sparseft.compute_selection(model, config)
    plan = plan_permutations(model, selection.modules, ModelSpec.of(model))
    assert not plan.stays and len(plan.permutations) == 14
    for sides in plan.permutations.values():
        for order in sides.values():
            assert order.sort().values.tolist() == list(range(len(order)))
    sparseft.attach(model, config, selection)
    assert all(isinstance(p.at, tuple) for m in sparse_layers(model).values() for p in m.patterns.values())


def test_the_console_shows_layout_warnings(capsys: pytest.CaptureFixture) -> None:
    console.clear_warnings()
    with pytest.warns(RuntimeWarning, match="other"), console.showing(LayoutWarning):
        warnings.warn("stays gather", LayoutWarning, stacklevel=1)
        warnings.warn("other", RuntimeWarning, stacklevel=1)
    assert console.recorded_warnings() == ["stays gather"]
    assert "warning: stays gather" in capsys.readouterr().err
    console.clear_warnings()


# ---- one layer ----


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("conv", [False, True])
def test_one_layer_in_any_order(conv: bool, kind: str) -> None:
    torch.manual_seed(0)
    plain = Conv1D(10, 7) if conv else nn.Linear(7, 10)
    plain = plain.double()
    dense = copy.deepcopy(plain)
    rows, columns = torch.arange(10), torch.arange(7)
    layer = SparseLinear.wrap(plain)
    index = [6, 0, 1]
    if kind == "rows":
        rows = torch.randperm(10)
        layer.add_pattern(kind, index)
        layer.permute(rows)
    else:
        columns = torch.randperm(7)
        layer.permute(columns=columns)
        layer.add_pattern(kind, index)  # after the fact too
    assert torch.equal(layer.logical_weight, logical_weight(dense)[rows][:, columns])
    assert torch.equal(layer.bias, dense.bias[rows])
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    y = layer(x[:, columns])
    expected = dense(x)[:, rows]
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    grad_x, x.grad = x.grad, None
    (expected * weights).sum().backward()
    torch.testing.assert_close(grad_x, x.grad, atol=1e-12, rtol=1e-12)
    full = dense.weight.grad.t() if conv else dense.weight.grad
    part = full[index] if kind == "rows" else full[:, index]
    torch.testing.assert_close(layer.delta.grad.double(), part, atol=1e-6, rtol=1e-6)
    state = layer.state_dict()
    assert torch.equal(state["weight"], dense.weight) and torch.equal(state["bias"], dense.bias)
    assert "row_permutation" not in state
    with torch.no_grad():
        layer.delta.fill_(0.5)
    wanted = logical_weight(dense).clone()
    wanted[index if kind == "rows" else (slice(None), index)] += 0.5
    stored = layer.state_dict()["weight"]
    torch.testing.assert_close(stored.t() if conv else stored, wanted)
    layer.restore_base()
    layer.permute()
    assert torch.equal(layer.weight, dense.weight) and torch.equal(layer.bias, dense.bias)


def test_permutations_that_cannot_be() -> None:
    layer = S2RowLinear(7, 10, columns=[1, 2])
    for rows in (torch.arange(9), torch.zeros(10, dtype=torch.int64)):
        with pytest.raises(ValueError, match="permutation"):
            layer.permute(rows)
    blocks = sparseft.BlockSparseLinear(7, 10, blocks=[[0, 0]], block_size=4)
    with pytest.raises(ValueError, match="blocks"):
        blocks.permute(torch.arange(10))
    with pytest.raises(ValueError, match="columns keeps the order"):
        layer.permute(torch.arange(9, -1, -1))
    layer = SparseLinear(7, 10)
    layer.permute(torch.arange(9, -1, -1))
    for kind, index in (("columns", [3]), ("blocks", [[0, 0]])):
        with pytest.raises(ValueError, match="original order"):
            SparseLinear.add_pattern(layer, kind, index, 4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({"weight": torch.zeros(3, 3), "bias": torch.zeros(10)})


def test_a_consecutive_slice_has_storage_of_its_own() -> None:
    layer = S2RowLinear(64, 8, bias=False, columns=range(16, 24))
    assert layer.patterns["columns"].at == (16, 8)
    saved: list[Tensor] = []
    for dtype in (torch.float32, torch.bfloat16):
        saved.clear()
        layer.to(dtype)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            layer(torch.randn(5, 64, dtype=dtype))
        slices = [t for t in saved if t.shape == (5, 8)]
        assert len(slices) == 1 and slices[0].untyped_storage().nbytes() == slices[0].numel() * dtype.itemsize
        assert not any(t.shape == (5, 64) for t in saved)


def test_experts_stay_gathered_and_attention_moves() -> None:
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.randint(96, (2, 9))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(ids).logits
    settings = sparseft.S2FTConfig(d_ratio=0.2, o_ratio=1.0, layout="permuted")
    with pytest.warns(Warning, match="experts are kept as one parameter"):
        sparseft.attach(model, settings)
    assert torch.allclose(model(ids).logits, logits, atol=1e-5, rtol=0)
    sparseft.detach(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- re-selection ----


def reselecting(importance: str = "weight") -> dict[str, Any]:
    """The same budget in both layouts; o and v in whole groups or not, as it falls out."""
    ratios = {"d_ratio": 0.1, "u_ratio": 0.1, "o_ratio": 0.5, "v_ratio": 0.5}
    return {
        layout: sparseft.S2FTConfig(**ratios, importance=importance, layout=layout, reselect_steps=2)
        for layout in ("gather", "permuted")
    }


@pytest.mark.filterwarnings("ignore::sparseft.errors.LayoutWarning")
@pytest.mark.parametrize("importance", ["weight", "activation", "gradient"])
@each_model
def test_a_permuted_model_is_scored_in_the_original_order(make_model: Make, kind: str, importance: str) -> None:
    config = reselecting(importance)["permuted"]
    model = build(make_model, kind)
    first = sparseft.compute_selection(model, config, [batch()])
    sparseft.attach(model, config, first)
    before, state = logits(model), tensors(model)
    again = reselect(model, config, [batch()], seed=config.seed)
    for name, kinds in first.modules.items():
        assert all(torch.equal(again.modules[name][side], index) for side, index in kinds.items()), name
    assert torch.equal(logits(model), before)
    assert_equal(tensors(model), state)


@pytest.mark.filterwarnings("ignore::sparseft.errors.LayoutWarning")
@each_model
def test_reselection_in_a_permuted_model(make_model: Make, tmp_path: Path, kind: str) -> None:
    """Against the gathered layout, trained and re-selected alike; then away from it and back."""
    models, base = {}, tensors(build(make_model, kind))
    chosen = [sparseft.compute_selection(build(make_model, kind), reselecting("random")["gather"])]
    for layout, config in reselecting("random").items():
        model = models[layout] = sparseft.attach(build(make_model, kind), config, chosen[0])
        optimizer = torch.optim.AdamW(sparseft.trainable_parameters(model).values(), lr=1e-2)
        for turn in range(4):
            for _ in range(2):
                model(**batch()).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            before, state = logits(model), tensors_of_weights(model)
            if turn == 3:
                break
            # The second turn comes back to the first selection: parked entries take up where they stood.
            selection = chosen[0] if turn == 1 else reselect(model, config, None, seed=turn + 1)
            assert apply_selection(model, selection, optimizer) > 0.1
            torch.testing.assert_close(logits(model), before, atol=1e-12, rtol=1e-12)
            assert_equal(tensors_of_weights(model), state)
        mlp = [m for n, m in sparse_layers(model).items() if "mlp" in n and m.patterns]
        moved = [isinstance(p.at, tuple) for m in mlp for p in m.patterns.values()]
        assert all(moved) if layout == "permuted" else not all(moved)
        sparseft.save_adapter(model, tmp_path / layout)
    torch.testing.assert_close(logits(models["permuted"]), logits(models["gather"]), atol=1e-8, rtol=1e-8)
    left, right = dense_deltas(tmp_path / "gather"), dense_deltas(tmp_path / "permuted")
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name] != 0, right[name] != 0)
        torch.testing.assert_close(left[name], right[name], atol=1e-6, rtol=1e-4)

    model, ids = models["permuted"], batch()["input_ids"]
    expected = tensors_of_weights(model)
    copied = copy.deepcopy(model)
    for other in (copied, sparseft.load_adapter(build(make_model, kind), tmp_path / "permuted")):
        assert_equal(tensors_of_weights(other), expected)
    sparseft.set_adapter(model, None)
    assert_equal({n: t for n, t in tensors_of_weights(model).items() if n in base}, base)
    sparseft.set_adapter(model, "default")
    assert_equal(tensors_of_weights(model), expected)
    again = sparseft.attach(build(make_model, kind), reselecting("random")["permuted"], chosen[0])
    again.load_state_dict(model.state_dict())
    assert_equal(tensors_of_weights(again), expected)
    merged = sparseft.merge(copied)
    torch.testing.assert_close(merged(ids).logits, logits(model), atol=1e-12, rtol=1e-12)
    for attached in (model, again):
        assert_equal(tensors(sparseft.detach(attached)), base)


def tensors_of_weights(model: Any) -> dict[str, Tensor]:
    """The weights and biases, in the original order."""
    return {name: tensor for name, tensor in tensors(model).items() if name.endswith(("weight", "bias"))}


@pytest.mark.filterwarnings("ignore::sparseft.errors.LayoutWarning")
@each_model
def test_a_checkpoint_of_a_reselected_permuted_model(make_model: Make, tmp_path: Path, kind: str) -> None:
    """What is resumed stands as the saved model stood, the order of its weights included."""
    config = reselecting("random")["permuted"]
    model = sparseft.attach(build(make_model, kind), config)
    for turn in range(2):
        train(model, 2)
        apply_selection(model, reselect(model, config, None, seed=turn + 1))
    train(model, 1)
    sparseft.save_adapter(model, tmp_path / "adapter")
    save_active(model, tmp_path)
    resumed = sparseft.attach(build(make_model, kind), config)
    assert load_active(resumed, tmp_path)
    assert torch.equal(logits(resumed), logits(model))
    left, right = sparse_layers(model), sparse_layers(resumed)
    for name, layer in left.items():
        other = right.get(name)
        if other is None:
            assert not layer.is_permuted and not layer.patterns
            continue
        assert torch.equal(layer.weight, other.weight), name
        for side, pattern in layer.patterns.items():
            assert torch.equal(pattern.index, other.patterns[side].index)
            assert torch.equal(pattern.delta, other.patterns[side].delta)

"""Experts kept as one 3-D parameter: each expert's matrix is a linear of its own."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import sparseft
from sparseft.adapters.lifecycle import trainable_count
from sparseft.errors import UserError
from sparseft.kernels import reference
from sparseft.layers import sparse_layers
from sparseft.layers.experts import ExpertLinear, opened
from sparseft.models.fingerprint import base_fingerprint
from sparseft.models.spec import ModelSpec
from sparseft.selection.compute import reselect
from sparseft.selection.selection import Selection
from sparseft.training.reselection.swap import apply_selection
from support.experts import MODELS, SIZES, batch, build
from support.oracles import dense_gradients

CONFIGS: dict[str, Any] = {
    "ratios": sparseft.S2FTConfig(g_ratio=0.1, u_ratio=0.2, d_ratio=0.1, o_ratio=0.5, importance="weight"),
    "sparsity": sparseft.S2FTConfig(sparsity=0.9),
    "sylva": sparseft.SylvaConfig(importance="weight", block_size=8, sparsity=0.9),
}
DOWN = "model.layers.0.mlp.experts.down_proj"


@pytest.fixture(params=list(MODELS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=batch(99)["input_ids"]).logits


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train(model: Any, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW(sparseft.trainable_parameters(model).values(), lr=1e-2)
    for step in range(steps):
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_spec_names_each_expert(kind: str) -> None:
    model = build(kind)
    spec = ModelSpec.of(model)
    width = 80 if kind == "mixtral" else 56
    for layer in range(2):
        for number in range(4):
            name = f"model.layers.{layer}.mlp.experts"
            assert spec.linears[f"{name}.gate_up_proj.{number}"] == (2 * width, 48)
            assert spec.linears[f"{name}.down_proj.{number}"] == (48, width)
            slots = {s.role: (s.side, s.start, s.unit, s.count, s.other) for s in spec.slots
                     if s.module in (f"{name}.gate_up_proj.{number}", f"{name}.down_proj.{number}")}  # fmt: skip
            assert slots == {
                "gate": ("rows", 0, 1, width, 48),
                "up": ("rows", width, 1, width, 48),
                "down": ("columns", 0, 1, width, 48),
            }
    assert not any(name.endswith(".gate") for name in spec.linears), "a router is in scope"
    assert len(spec.linears) == 2 * (4 + 8)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_attach_and_detach_keep_every_bit(kind: str, name: str) -> None:
    model = build(kind)
    before, state, fingerprint = logits(model), weights(model), base_fingerprint(model)
    keys, spec = list(model.state_dict()), ModelSpec.of(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    sparseft.attach(model, CONFIGS[name])
    assert ModelSpec.of(model) == spec and base_fingerprint(model) == fingerprint
    assert [key for key in model.state_dict() if key in set(keys)] == keys
    assert torch.equal(logits(model), before)
    train(model)
    assert not torch.equal(logits(model), before)
    sparseft.detach(model)
    assert list(model.state_dict()) == keys and all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(logits(model), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    experts = model.model.layers[0].mlp.experts
    assert experts.config is model.config and not experts._forward_pre_hooks and not experts._load_state_dict_pre_hooks
    assert type(experts.down_proj) is torch.nn.Parameter and "down_proj" not in experts.__dict__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_fresh_attach_keeps_every_bit(kind: str, implementation: str, dtype: torch.dtype) -> None:
    model = build(kind, dtype)
    model.set_experts_implementation(implementation)
    before, loss = logits(model), model(**batch()).loss
    sparseft.attach(model, CONFIGS["sparsity"])
    assert torch.equal(logits(model), before) and torch.equal(model(**batch()).loss, loss)
    assert model.model.layers[0].mlp.experts.config._experts_implementation == implementation


def test_other_implementations_give_way_to_eager(kind: str) -> None:
    model = build(kind)
    model.set_experts_implementation("batched_mm")
    before = logits(model)
    sparseft.attach(model, CONFIGS["sparsity"])
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    train(model)
    assert torch.equal(logits(sparseft.detach(model)), before)
    assert model.model.layers[0].mlp.experts.config._experts_implementation == "batched_mm"


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_gradients_are_the_dense_ones_on_the_pattern(
    kind: str, name: str, checkpointing: bool, implementation: str
) -> None:
    oracle = dense_gradients(build(kind), batch())
    model = build(kind)
    model.set_experts_implementation(implementation)
    sparseft.attach(model, CONFIGS[name])
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    model(**batch(), use_cache=False).loss.backward()
    experts = 0
    for module, layer in sparse_layers(model).items():
        for pattern_kind, pattern in layer.patterns.items():
            dense = reference.gather(oracle[module], pattern_kind, pattern.index, pattern.block_size)
            if pattern.delta.grad is None:
                assert not dense.any(), f"{module} got no gradient"  # no token came to this expert
                continue
            torch.testing.assert_close(pattern.delta.grad, dense, atol=1e-6, rtol=1e-4, msg=module)
            experts += isinstance(layer, ExpertLinear)
    assert experts >= 8


@pytest.mark.parametrize("name", list(CONFIGS))
def test_an_expert_without_tokens_gets_none_or_zeros_and_the_input_gets_all(name: str) -> None:
    """Both implementations on the experts module alone, expert 2 idle, against dense autograd: the loop does not call
    the expert, the grouped product gives it zeros as the dense gradient has."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 48, generator=generator)
    routes = torch.tensor([[0, 1], [1, 3], [3, 0], [0, 1], [1, 0], [3, 1], [0, 3]])
    shares = torch.rand(7, 2, generator=generator)
    plain = build("mixtral").model.layers[0].mlp.experts.requires_grad_(True)
    dense_x = x.clone().requires_grad_(True)
    plain(dense_x, routes, shares).square().sum().backward()
    for implementation in ("eager", "grouped_mm"):
        model = build("mixtral")
        model.set_experts_implementation(implementation)
        sparseft.attach(model, CONFIGS[name])
        experts, own_x = model.model.layers[0].mlp.experts, x.clone().requires_grad_(True)
        experts(own_x, routes, shares).square().sum().backward()
        torch.testing.assert_close(own_x.grad, dense_x.grad)
        for module, layer in sparse_layers(experts).items():
            parameter, number = module.split(".")
            for pattern_kind, pattern in layer.patterns.items():
                if number == "2" and implementation == "eager":
                    assert pattern.delta.grad is None
                    continue
                dense = getattr(plain, parameter).grad[int(number)]
                expected = reference.gather(dense, pattern_kind, pattern.index, pattern.block_size)
                torch.testing.assert_close(pattern.delta.grad, expected, atol=1e-5, rtol=1e-4)


def test_the_weights_hold_base_plus_delta_after_a_step(kind: str) -> None:
    model = build(kind)
    plain = weights(model)
    sparseft.attach(model, CONFIGS["ratios"])
    train(model)
    layer = sparse_layers(model)[f"{DOWN}.1"]
    stored = model.state_dict()[DOWN]
    expected = plain[DOWN][1].clone()
    expected[:, layer.patterns["columns"].index] += layer.delta.detach()
    assert torch.equal(stored[1], expected) and layer.delta.abs().max() > 0
    merged = sparseft.merge(copy.deepcopy(model))
    assert torch.equal(merged.state_dict()[DOWN], stored)
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-5)


def test_deltas_changed_by_hand_count_in_the_next_forward_and_backward(kind: str) -> None:
    model = sparseft.attach(build(kind), CONFIGS["sparsity"])
    with torch.no_grad():
        for name, parameter in sparseft.trainable_parameters(model).items():
            if name.startswith(f"{DOWN}.2") or name.startswith(f"{DOWN}.3"):
                parameter.add_(0.5)
    changed = model(**batch())
    changed.loss.backward()  # a write between two experts' products would be refused here
    torch.testing.assert_close(changed.logits, sparseft.merge(copy.deepcopy(model))(**batch()).logits)


def test_save_load_switch_fuse(kind: str, tmp_path: Path) -> None:
    model = sparseft.attach(build(kind), CONFIGS["ratios"])
    train(model)
    trained, count = logits(model), trainable_count(model)
    sparseft.save_adapter(model, tmp_path / "a")
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {f"{DOWN}.3.columns.index", f"{DOWN}.3.columns.delta"} <= tensors.keys()

    fresh = build(kind)
    base = logits(fresh)
    sparseft.load_adapter(fresh, tmp_path / "a")
    assert torch.equal(logits(fresh), trained) and trainable_count(fresh) == count
    sparseft.set_adapter(fresh, None)
    experts = fresh.model.layers[0].mlp.experts
    assert torch.equal(logits(fresh), base) and experts.config is fresh.config  # its own implementation too
    deltas = sparseft.trainable_parameters(fresh)
    assert not any("experts" in name for name in deltas)
    sparseft.set_adapter(fresh, "default")
    assert torch.equal(logits(fresh), trained)
    sparseft.fuse(fresh, {"default": 1.0})
    torch.testing.assert_close(logits(fresh), trained)
    sparseft.detach(fresh)
    assert torch.equal(logits(fresh), base)
    with pytest.raises(UserError, match="another base"):
        sparseft.load_adapter(build(kind, seed=1), tmp_path / "a")


def test_copies_casts_pickles_and_plain_checkpoints(kind: str) -> None:
    model = sparseft.attach(build(kind), CONFIGS["sparsity"])
    train(model)
    trained = logits(model)
    twin = copy.deepcopy(model)
    train(twin)
    assert torch.equal(logits(model), trained) and not torch.equal(logits(twin), trained)

    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False)), trained)

    half = copy.deepcopy(model).to(torch.bfloat16)
    layer, wide = sparse_layers(half)[f"{DOWN}.1"], sparse_layers(model)[f"{DOWN}.1"]
    assert layer.delta.dtype == torch.float32
    logits(half)
    rounded = (wide.base_values.bfloat16() + wide.delta).bfloat16()
    assert torch.equal(layer.weight[:, layer.patterns["columns"].index], rounded)
    sparseft.detach(half)
    assert torch.equal(half.state_dict()[DOWN], build(kind, torch.bfloat16).state_dict()[DOWN])

    again = sparseft.attach(build(kind), CONFIGS["sparsity"])
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), trained)
    other = build(kind, seed=1)
    again.load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(logits(again), logits(other)) or torch.allclose(logits(again), logits(other), atol=1e-5)
    assert not any(p.delta.any() for layer in sparse_layers(again).values() for p in layer.patterns.values())
    assert torch.equal(sparseft.detach(again).state_dict()[DOWN], other.state_dict()[DOWN])


@pytest.mark.parametrize("importance", ["weight", "activation", "product", "gradient", "fisher", "sylva"])
@pytest.mark.parametrize("method", ["s2ft", "sylva"])
def test_every_importance_scores_single_experts(kind: str, importance: str, method: str) -> None:
    model = build(kind)
    before, state = logits(model), weights(model)
    if method == "s2ft":
        config: Any = sparseft.S2FTConfig(d_ratio=0.1, u_ratio=0.1, importance=importance)
    else:
        config = sparseft.SylvaConfig(sparsity=0.9, block_size=8, importance=importance, num_partition=2)
    selection = sparseft.compute_selection(model, config, [batch()])
    assert torch.equal(logits(model), before) and all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert not sparse_layers(model)
    chosen = [selection.modules[f"{DOWN}.{number}"] for number in range(4)]
    assert all(len(next(iter(kinds.values()))) for kinds in chosen)
    sparseft.attach(model, config, selection)
    train(model, 1)


def test_gradient_scores_are_the_dense_gradients_norms(kind: str) -> None:
    data = batch(size=1)
    oracle = dense_gradients(build(kind), data)[f"{DOWN}.1"].norm(dim=0)
    config = sparseft.S2FTConfig(d_ratio=0.1, importance="gradient")
    chosen = sparseft.compute_selection(build(kind), config, [data]).modules[f"{DOWN}.1"]["columns"]
    expected = torch.argsort(oracle, descending=True, stable=True)[: len(chosen)].sort().values
    assert oracle.any() and torch.equal(chosen, expected)


@pytest.mark.parametrize("importance", ["weight", "activation", "product", "gradient", "fisher", "sylva"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_reselection_scores_experts_as_the_first_selection_does(
    kind: str, implementation: str, importance: str
) -> None:
    """Nothing is learnt yet, so the attached model's choice is the plain one's, however its experts compute."""
    model = build(kind)
    model.set_experts_implementation(implementation)
    if importance == "sylva":
        config: Any = sparseft.SylvaConfig(sparsity=0.9, block_size=8, num_partition=2)
    else:
        config = sparseft.S2FTConfig(d_ratio=0.1, o_ratio=0.5, importance=importance)
    first = sparseft.compute_selection(model, config, [batch()])
    sparseft.attach(model, config, first)
    before = logits(model)
    again = reselect(model, config, [batch()], seed=config.seed)
    for name, kinds in first.modules.items():
        for side, index in kinds.items():
            assert torch.equal(again.modules[name][side], index), name
    assert torch.equal(logits(model), before)


def test_a_reselected_adapter_of_experts(kind: str, tmp_path: Path) -> None:
    config = sparseft.S2FTConfig(d_ratio=0.1, o_ratio=0.5, importance="gradient")
    model = build(kind)
    state = weights(model)
    sparseft.attach(model, config, sparseft.compute_selection(model, config, [batch()]))
    train(model)
    assert apply_selection(model, reselect(model, config, [batch(1)], seed=1)) > 0.1
    train(model)
    trained = logits(model)
    sparseft.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(sparseft.load_adapter(build(kind), tmp_path / "adapter")), trained)
    assert all(torch.equal(t, state[n]) for n, t in sparseft.detach(model).state_dict().items())


def test_inactive_entries_are_rounded_once_when_the_model_is_cast(kind: str) -> None:
    config = sparseft.S2FTConfig(sparsity=0.8, roles=["down"], importance="gradient")
    model = build(kind)
    sparseft.attach(model, config, sparseft.compute_selection(model, config, [batch()]))
    train(model)
    assert apply_selection(model, reselect(model, config, [batch(1)], seed=1)) > 0.1
    train(model)
    model.to(torch.bfloat16)
    logits(model)
    seen = 0
    for layer in sparse_layers(model).values():
        for pattern in layer.patterns.values():
            if pattern.inactive is not None:
                found = reference.gather(layer.logical_weight, pattern.kind, pattern.inactive.index)
                once = (pattern.inactive.base + pattern.inactive.delta).bfloat16()
                assert torch.equal(found, once)
                seen += found.numel()
    assert seen > 0


def test_hooks_of_single_experts_are_called_in_a_grouped_product(kind: str) -> None:
    model = build(kind)
    sparseft.attach(model, CONFIGS["ratios"])
    data = batch()
    model(**data).loss.backward()
    expected = {n: p.grad.clone() for n, p in sparseft.trainable_parameters(model).items()}
    before, seen = logits(model), {}
    model.zero_grad()
    layer = model.get_submodule(f"{DOWN}.1")
    handle = layer.register_forward_hook(lambda m, i, o: seen.update(x=i[0].detach(), y=o.detach()))
    torch.testing.assert_close(logits(model), before)
    torch.testing.assert_close(seen["y"], seen["x"] @ layer.weight.detach().t())
    model(**data).loss.backward()
    for name, delta in sparseft.trainable_parameters(model).items():  # an expert that is not called has none
        torch.testing.assert_close(torch.zeros_like(delta) if delta.grad is None else delta.grad, expected[name])
    handle.remove()
    assert torch.equal(logits(model), before)


def test_activation_scores_see_each_expert_s_own_tokens() -> None:
    model, seen = build("mixtral"), {}
    experts = model.model.layers[0].mlp.experts
    names = [f"{DOWN}.{number}" for number in range(4)]
    with opened(model, names):
        for name in names:
            model.get_submodule(name).register_forward_hook(lambda m, i, o, n=name: seen.update({n: len(i[0])}))
        routed = []
        model.model.layers[0].mlp.gate.register_forward_hook(lambda m, i, o: routed.append(o[2]))
        logits(model)
    counts = torch.bincount(routed[0].flatten(), minlength=4).tolist()
    assert [seen.get(name, 0) for name in names] == counts
    assert type(experts.down_proj) is torch.nn.Parameter


def test_own_indices_for_one_expert_train_it_alone() -> None:
    model = build("mixtral")
    state = weights(model)
    sparseft.attach(model, CONFIGS["sparsity"], Selection({f"{DOWN}.1": {"columns": [3, 7], "rows": [0]}}))
    assert set(sparseft.trainable_parameters(model)) == {f"{DOWN}.1.rows.delta", f"{DOWN}.1.columns.delta"}
    train(model)
    merged = sparseft.merge(model)
    changed = (merged.state_dict()[DOWN] != state[DOWN]).nonzero()
    assert len(changed) and all(e == 1 and (i in (3, 7) or o == 0) for e, o, i in changed.tolist())


@pytest.mark.parametrize("name", [f"{DOWN}.4", f"{DOWN}.x", DOWN, "model.layers.0.mlp.gate", f"{DOWN}.1.2"])
def test_what_is_no_expert_is_refused_and_nothing_changes(name: str) -> None:
    model = build("mixtral")
    with pytest.raises(UserError):
        sparseft.attach(model, CONFIGS["sparsity"], Selection({name: {"columns": [0]}}))
    with pytest.raises(UserError, match="outside"):
        sparseft.attach(model, CONFIGS["sparsity"], Selection({f"{DOWN}.0": {"columns": [80]}}))
    assert not sparse_layers(model) and type(model.model.layers[0].mlp.experts.down_proj) is torch.nn.Parameter


def test_routers_are_never_in_scope() -> None:
    sizes = {"num_experts": 4, "moe_intermediate_size": 56, "shared_expert_intermediate_size": 40}
    model = build("mixtral", config=transformers.Qwen2MoeConfig(**SIZES, **sizes))
    names = ModelSpec.of(model).linears
    assert type(model.model.layers[0].mlp.shared_expert_gate) is torch.nn.Linear
    assert {"model.layers.0.mlp.shared_expert.gate_proj", "model.layers.0.mlp.experts.gate_up_proj.3"} <= names.keys()
    assert not any(name.endswith((".gate", "shared_expert_gate")) for name in names)


def test_experts_of_another_layout_stay_frozen_and_are_named() -> None:
    config = transformers.GptOssConfig(**SIZES, num_local_experts=4, head_dim=12)  # transposed, with biases
    spec = ModelSpec.of(build("mixtral", config=config))
    assert len(spec.frozen_experts(True)) == 4 and not spec.stacked


def test_lora_leaves_the_experts_alone() -> None:
    model = sparseft.attach(build("mixtral"), sparseft.LoraConfig(rank=2))
    assert not any("experts" in name for name in sparseft.trainable_parameters(model))
    with pytest.raises(UserError, match="only experts"):
        sparseft.attach(build("mixtral"), sparseft.LoraConfig(rank=2, scope="experts"))


def test_another_use_of_an_expert_than_a_linear_is_refused() -> None:
    model = sparseft.attach(build("mixtral"), CONFIGS["sparsity"])
    weight = model.model.layers[0].mlp.experts.down_proj
    assert weight.shape == (4, 48, 80) and weight.dtype == torch.float32
    for use in (lambda: torch.matmul(torch.ones(2, 48), weight[1]), lambda: weight.transpose(0, 1),
                lambda: torch.bmm(torch.ones(4, 2, 80), weight.transpose(1, 2))):  # fmt: skip
        with pytest.raises(TypeError, match="F.linear and grouped_mm only"):
            use()
    with pytest.raises(AttributeError):
        _ = weight.contiguous

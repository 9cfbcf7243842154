"""What is said to train is what trains, for every method on every architecture at hand: the linears that are listed,
that get a gradient, that change, that are saved, and that are loaded again are the same ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import sparseft
from sparseft.errors import UserError
from sparseft.files.tensors import read_tensors, split_name
from sparseft.layers import sparse_layers
from sparseft.methods.exact_targets import lora_modules
from sparseft.methods.lora import target_modules
from sparseft.models.decoder import find_expert, in_experts, is_transposed
from sparseft.models.probing import KERNEL, NO_GRADIENT, READ, UNCALLED, unreached, without_gradient
from sparseft.models.spec import ModelSpec
from sparseft.selection.selection import Selection
from sparseft.training.trainer import train
from support.running import on, summary, write_data
from support.running import sparseft as command
from support.training import examples, trainer_of

SIZES = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FULL_HEADS = SIZES | {"num_key_value_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
MLA = {
    "kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_group": 2,
    "topk_group": 1,
}  # fmt: skip
INDEX = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_state": 8, "mamba_n_groups": 1}


def config_of(model_type: str, **settings: Any) -> Callable[[], Any]:
    return lambda: transformers.AutoConfig.for_model(model_type, **settings)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": config_of("llama", **SIZES),
    "qwen2": config_of("qwen2", **SIZES),
    "gpt2": config_of("gpt2", vocab_size=96, n_embd=48, n_inner=80, n_layer=2, n_head=4, n_positions=64,
                      bos_token_id=1, eos_token_id=2),
    "phi3": config_of("phi3", **SIZES),
    "bloom": config_of("bloom", vocab_size=96, hidden_size=48, n_layer=2, n_head=4),
    "gemma2": config_of("gemma2", **SIZES, head_dim=12, sliding_window=8),
    "gemma3": config_of("gemma3_text", **SIZES, head_dim=12, sliding_window=8),
    "mixtral": config_of("mixtral", **SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": config_of("qwen2_moe", **SIZES, **EXPERTS, moe_intermediate_size=32,
                           shared_expert_intermediate_size=40),
    "qwen3_moe": config_of("qwen3_moe", **SIZES, **EXPERTS, moe_intermediate_size=32, head_dim=12),
    "qwen3_moe_dense_first": config_of("qwen3_moe", **SIZES, **EXPERTS, moe_intermediate_size=32, head_dim=12,
                                       mlp_only_layers=[0]),
    "qwen3_next": config_of("qwen3_next", **SIZES, **EXPERTS, moe_intermediate_size=32, head_dim=12,
                            shared_expert_intermediate_size=40, linear_num_value_heads=4, linear_num_key_heads=2,
                            linear_key_head_dim=8, linear_value_head_dim=8,
                            layer_types=["linear_attention", "full_attention"]),
    "deepseek_v2": config_of("deepseek_v2", **FULL_HEADS, **ROUTED, **MLA, n_shared_experts=1),
    "deepseek_v3": config_of("deepseek_v3", **FULL_HEADS, **ROUTED, **MLA),
    "deepseek_v32": config_of("deepseek_v32", **FULL_HEADS, **ROUTED, **MLA, **INDEX),
    "glm4_moe": config_of("glm4_moe", **SIZES, **ROUTED, n_shared_experts=1, n_group=1, topk_group=1, head_dim=12),
    "ernie4_5_moe": config_of("ernie4_5_moe", **SIZES, moe_num_experts=4, moe_k=2, moe_intermediate_size=32,
                              moe_num_shared_experts=1, moe_layer_start_index=1),
    "olmoe": config_of("olmoe", **SIZES, **EXPERTS),
    "granitemoe": config_of("granitemoe", **SIZES, num_local_experts=4, num_experts_per_tok=2),
    "granitemoehybrid": config_of("granitemoehybrid", **SIZES, num_local_experts=4, num_experts_per_tok=2,
                                  shared_intermediate_size=40, layer_types=["mamba", "attention"], **MAMBA2),
    "jamba": config_of("jamba", **SIZES, **EXPERTS, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
                       expert_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False),
    "bamba": config_of("bamba", **SIZES, attn_layer_indices=[1], **MAMBA2),
    "falcon_h1": config_of("falcon_h1", **SIZES, **MAMBA2, mamba_d_ssm=96),
    "nemotron_h": config_of("nemotron_h", **SIZES, hybrid_override_pattern="M*", mamba_num_heads=4, mamba_head_dim=24,
                            ssm_state_size=8, n_groups=1, head_dim=12),
    "recurrent_gemma": config_of("recurrent_gemma", **SIZES | {"num_hidden_layers": 3}, lru_width=48,
                                 attention_window_size=16),
    "lfm2": config_of("lfm2", **SIZES, layer_types=["conv", "full_attention"]),
    "lfm2_moe": config_of("lfm2_moe", **SIZES, **EXPERTS, layer_types=["conv", "full_attention"],
                          moe_intermediate_size=32, num_dense_layers=1),
    "minimax": config_of("minimax", **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=12, block_size=8,
                         layer_types=["linear_attention", "full_attention"]),
    "gpt_oss": config_of("gpt_oss", **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=12),
}  # fmt: skip
# Linears that cannot train, by the end of their names; every other model trains all of its own.
FROZEN: dict[str, dict[str, str]] = {
    "jamba": {"mamba.dt_proj": READ},
    "bamba": {"mamba.out_proj": KERNEL},
    "falcon_h1": {"mamba.out_proj": KERNEL},
    "nemotron_h": {"mixer.out_proj": KERNEL},
    "granitemoehybrid": {"mamba.out_proj": KERNEL},
    "deepseek_v32": {f"indexer.{name}": NO_GRADIENT for name in ("wq_b", "wk", "weights_proj")},
}
# DoRA goes LoRA's way: on one model of each way of naming its linears.
CASES = [(name, method) for name in MODELS for method in ("s2ft", "sylva", "lora")]
CASES += [(name, "dora") for name in ("llama", "gpt2", "mixtral", "deepseek_v3", "qwen3_next", "jamba")]


def build(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.1)
    return model.eval()


def batch(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=batch(9)["input_ids"], use_cache=False).logits


def weight(model: Any, name: str) -> Tensor:
    expert = find_expert(model, name)
    return model.get_submodule(name).weight.detach() if expert is None else expert.weight


def changed(model: Any, base: Any) -> set[str]:
    """Every linear of the decoder, expert and router whose weight differs."""
    names = [n for n, m in base.named_modules() if isinstance(getattr(m, "weight", None), Tensor)]
    names += list(ModelSpec.of(base, tried=False).stacked)
    return {name for name in names if not torch.equal(weight(model, name), weight(base, name))}


def config_for(method: str, spec: ModelSpec) -> Any:
    if method == "s2ft":
        roles = {slot.module for slot in spec.slots}
        if len(roles) == len(spec.linears):
            return sparseft.S2FTConfig(sparsity=0.5, roles=sorted({slot.role for slot in spec.slots}))
        return sparseft.S2FTConfig(sparsity=0.5, rows=spec.leaves(None).split(", "))
    if method == "sylva":
        return sparseft.SylvaConfig(sparsity=0.5, importance="weight", block_size=8)
    return sparseft.LoraConfig(rank=2, use_dora=method == "dora")


def of_gradients(model: Any) -> set[str]:
    """The linears whose deltas or LoRA got a gradient that is not zero."""
    found = {n for n, p in sparseft.trainable_parameters(model).items() if p.grad is not None and p.grad.any()}
    if hasattr(model, "peft_config"):
        return {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in found}
    return {name.rsplit(".", 2)[0] for name in found}


def saved(folder: Path) -> set[str]:
    names = read_tensors(folder / "adapter_model.safetensors", "adapter")
    if any(".lora_" in name for name in names):
        return {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names}
    return {split_name(name, folder)[0] for name in names}


@pytest.mark.parametrize(("name", "method"), CASES)
def test_five_sets_are_one(name: str, method: str, tmp_path: Path) -> None:
    base = build(name)
    before, spec = logits(base), ModelSpec.of(base)
    config = config_for(method, spec)
    model, selection = copy.deepcopy(base), None
    if method in ("s2ft", "sylva"):
        selection = sparseft.compute_selection(model, config)
        listed = set(selection.modules)
        assert listed == set(spec.linears)
    else:
        listed = set(target_modules(spec, config))
        assert listed == spec.linears.keys() - spec.stacked
    model = sparseft.attach(model, config, selection)
    optimizer = torch.optim.AdamW(sparseft.trainable_parameters(model).values(), lr=1e-2, weight_decay=0.0)
    model(**batch()).loss.backward()
    idle = listed - of_gradients(model)
    assert of_gradients(model) <= listed and all(in_experts(expert) for expert in idle) and len(idle) <= 2  # no token
    assert without_gradient(model) == []
    optimizer.step()
    trained = logits(model)
    sparseft.save_adapter(model, tmp_path / "adapter")
    assert saved(tmp_path / "adapter") == listed
    loaded = sparseft.load_adapter(copy.deepcopy(base), tmp_path / "adapter")
    again = set(lora_modules(loaded, "default")) if selection is None else set(sparse_layers(loaded))
    assert again == listed
    torch.testing.assert_close(logits(loaded), trained)
    assert not torch.equal(trained, before)
    assert changed(sparseft.merge(model), base) == listed - idle
    assert changed(sparseft.merge(loaded), base) == listed - idle


@pytest.mark.parametrize("name", list(MODELS))
def test_plain_peft_loads_what_lora_saved(name: str, tmp_path: Path) -> None:
    import peft

    base = build(name)
    model = sparseft.attach(copy.deepcopy(base), sparseft.LoraConfig(rank=2))
    with torch.no_grad():
        for parameter in sparseft.trainable_parameters(model).values():
            parameter.normal_(0.0, 0.1)
    sparseft.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=1e-5)
    merged = plain.merge_and_unload()
    assert changed(merged, base) == set(lora_modules(model, "default"))


@pytest.mark.parametrize("name", list(MODELS))
def test_full_names_the_parameters_without_a_gradient(name: str, tmp_path: Path) -> None:
    base = build(name)
    model = sparseft.attach(copy.deepcopy(base), sparseft.FullConfig())
    model(**batch()).loss.backward()
    named = set(without_gradient(model))
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0).step()
    parameters = dict(base.named_parameters())
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, parameters[n])}
    assert moved == with_gradient and {n for n in parameters if not in_experts(n)} - moved == named
    assert not any(f"{linear}.weight" in named for linear in ModelSpec.of(base).linears)
    sparseft.save_adapter(model, tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    loaded = dict(again.named_parameters())
    assert {n for n in parameters if not torch.equal(loaded[n], parameters[n])} == moved


@pytest.mark.parametrize("name", list(MODELS))
def test_what_cannot_train_is_known_and_nothing_else(name: str) -> None:
    """Dense autograd as the oracle: whatever the trial leaves out by its calls has no gradient through a module."""
    model = build(name)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    spec = ModelSpec.of(model)
    expected = FROZEN.get(name, {})
    assert {n.split(".", 3)[-1] if "indexer" not in n else n.partition("self_attn.")[2] for n in spec.frozen} == set(
        expected
    )
    assert all(reason in expected.values() for reason in spec.frozen.values())
    assert all(torch.equal(tensor, state[n]) for n, tensor in model.state_dict().items())
    assert not model.training and all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters()) and [p.requires_grad for p in model.parameters()] == flags
    # Each linear's weight gradient by hooks on its calls is the dense one, so that a layer in its place gets all of it.
    found: dict[str, Tensor] = {}

    def watch(linear: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2)
            output.register_hook(lambda g: found.update({linear: found.get(linear, 0) + g.flatten(0, -2).t() @ x}))

        return hook

    linears = [linear for linear in spec.linears if linear not in spec.stacked]
    for linear in linears:
        model.get_submodule(linear).register_forward_hook(watch(linear))
    model(**batch()).loss.backward()
    for linear in linears:
        module = model.get_submodule(linear)
        dense = module.weight.grad.t() if is_transposed(module) else module.weight.grad
        torch.testing.assert_close(found[linear], dense, atol=1e-6, rtol=1e-3, msg=linear)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_mamba", "rwkv"])
def test_models_without_attention_are_refused_by_name(model_type: str) -> None:
    settings = {"num_heads": 4, "head_dim": 24, "n_groups": 1} if model_type == "mamba2" else {}
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=96, hidden_size=48, num_hidden_layers=2, **settings
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    for method in (sparseft.S2FTConfig(), sparseft.SylvaConfig(importance="weight"), sparseft.LoraConfig()):
        with pytest.raises(UserError, match="decoders built on attention"):
            sparseft.attach(model, method)


# ---- a model that uses its linears in other ways ----


class Odd(nn.Module):
    """Llama's MLP with linears that no layer in their place could train."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(48, 80), nn.Linear(48, 80), nn.Linear(80, 48)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x).sigmoid()
        if self.way == "read":
            up = F.linear(x, self.up_proj.weight, self.up_proj.bias)
        elif self.way == "cast":
            up = self.up_proj(x) + x @ self.up_proj.weight.to(torch.float64).float().t()
        elif self.way == "no_grad":
            with torch.no_grad():
                up = self.up_proj(x)
        elif self.way == "detached":
            up = self.up_proj(x).detach()
        elif self.way == "uncalled":
            up = gate
        elif self.way == "long" and x.shape[1] < 32:
            up = gate
        else:  # asks the weight for its dtype, device and shape, which reads nothing
            assert self.up_proj.weight.shape == (80, 48)
            up = self.up_proj(x.to(self.up_proj.weight.dtype).to(self.up_proj.weight).type_as(self.up_proj.weight))
            up = up + torch.zeros_like(self.up_proj.weight).sum()
        return self.down_proj(gate * up)


class Fused(Odd):
    """The same with a kernel for another device."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return fused(x, weight=self.up_proj.weight)
        return super().forward(x)


class Clipped(Odd):
    """The same with a weight that it clips itself, in training mode alone, as Gemma 3n does."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.down_proj(F.linear(x, self.up_proj.weight.clamp(-1.0, 1.0)))
        return super().forward(x)


class ClippedElse(Odd):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        else:
            return self.down_proj(F.linear(x, self.up_proj.weight.clamp(-1.0, 1.0)))


class ClippedInline(Odd):
    def forward(self, x: Tensor) -> Tensor:
        up = F.linear(x, self.up_proj.weight.clamp(-1.0, 1.0)) if self.training else self.up_proj(x)
        return self.down_proj(self.act(self.gate_proj(x)) * up)


def fused(x: Tensor, weight: Tensor) -> Tensor:
    raise AssertionError("a kernel of another device")


WAYS = {"read": READ, "cast": READ, "no_grad": NO_GRADIENT, "detached": NO_GRADIENT, "uncalled": UNCALLED,
        "kernel": KERNEL, "training": READ, "else": READ, "inline": READ, "long": None, "usual": None}  # fmt: skip
KINDS = {"kernel": Fused, "training": Clipped, "else": ClippedElse, "inline": ClippedInline}
UP = "model.layers.0.mlp.up_proj"


def odd(way: str) -> Any:
    model = build("llama")
    torch.manual_seed(1)
    model.model.layers[0].mlp = KINDS.get(way, Odd)(way).eval()
    return model


@pytest.mark.parametrize("way", list(WAYS))
def test_linears_used_otherwise_are_left_out(way: str) -> None:
    model = odd(way).requires_grad_(False)  # whoever loads a model may have frozen it
    model.model.layers[1].mlp.train()
    expected = {UP: WAYS[way]} if WAYS[way] else {}
    spec = ModelSpec.of(model)
    assert spec.frozen == expected and spec.known.keys() == spec.linears.keys() | {UP}
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training and model.model.layers[1].mlp.training
    if not expected:
        return
    with pytest.raises(UserError, match=f"'{UP}' cannot be trained: {WAYS[way]}[.]"):
        sparseft.attach(model, sparseft.SylvaConfig(block_size=8), Selection({UP: {"rows": [0]}}))
    with pytest.raises(UserError, match=f"scope={UP} leaves nothing to train: 1 linear cannot train .* [(]{WAYS[way]}"):
        sparseft.compute_selection(model, sparseft.S2FTConfig(scope=UP))
    with pytest.raises(UserError, match="layers.0.mlp.up_proj' cannot be trained"):
        sparseft.attach(model, sparseft.LoraConfig(targets=["0.mlp.up_proj"]))
    with pytest.raises(UserError, match="layers.0.mlp.up_proj' cannot be trained"):
        sparseft.attach(model, sparseft.S2FTConfig(rows=["0.mlp.up_proj"]))


def test_an_adapter_with_such_a_linear_still_loads(tmp_path: Path) -> None:
    donor = odd("usual")
    sparseft.attach(donor, sparseft.SylvaConfig(block_size=8), Selection({UP: {"rows": [0, 3]}}))
    with torch.no_grad():
        for delta in sparseft.trainable_parameters(donor).values():
            delta.add_(1.0)
    sparseft.save_adapter(donor, tmp_path)
    model = sparseft.load_adapter(odd("read"), tmp_path)
    torch.testing.assert_close(logits(model), logits(donor))
    sparseft.fuse(model, {"default": 1.0})
    torch.testing.assert_close(logits(model), logits(donor))


def test_models_on_meta_and_models_that_cannot_be_tried_are_judged_by_their_source(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(MODELS["bamba"]())
    assert set(ModelSpec.of(model).frozen.values()) == {KERNEL}
    model = odd("kernel")
    model.model.layers[1].mlp.forward = lambda x: x[:, :, :, :, 0]
    assert ModelSpec.of(model).frozen == {UP: KERNEL}
    assert "LlamaForCausalLM could not be run on tokens alone" in capsys.readouterr().err


def test_layers_that_make_no_logits_are_refused() -> None:
    model = build("llama")
    spare = nn.ModuleList(nn.ModuleDict({"mlp": nn.Linear(480, 480)}) for _ in model.model.layers)  # larger
    model.model.spare = nn.ModuleDict({"layers": spare})
    with pytest.raises(
        UserError, match=r"LlamaForCausalLM makes its logits without any linear .*\(model.spare.layers.0."
    ):
        sparseft.attach(model, sparseft.LoraConfig(rank=2))


def test_the_model_is_tried_once() -> None:
    model, calls = build("llama"), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(3):
        assert unreached(model, {UP: model.get_submodule(UP)}) == {}
    assert len(calls) == 1


def test_names_that_end_alike_are_told_apart() -> None:
    model = build("llama")
    model.other = nn.ModuleDict({"model": copy.deepcopy(model.model)})  # other.model.layers.0… ends in model.layers.0…
    wrapped = sparseft.attach(model, sparseft.LoraConfig(rank=2))
    assert not any(name.startswith("other") for name in lora_modules(wrapped, "default"))


# ---- while it trains ----

LATE: dict[str, Any] = {
    "rows": sparseft.S2FTConfig(rows=["up_proj", "down_proj"], sparsity=0.8),
    "permuted": sparseft.S2FTConfig(sparsity=0.5, roles=["up", "down", "v", "o"], layout="permuted"),
    "sylva": sparseft.SylvaConfig(importance="weight", block_size=8, sparsity=0.5),
    "lora": sparseft.LoraConfig(rank=2),
    "dora": sparseft.DoraConfig(rank=2),
    "full": sparseft.FullConfig(),
}
OTHER = "model.layers.1.mlp.up_proj"


def cut(model: Any) -> None:
    """From now on no gradient comes to one linear, in a way that nobody could have foreseen."""
    (module,) = [m for n, m in model.named_modules() if n.removeprefix("base_model.model.") == OTHER]
    module.register_forward_hook(lambda _module, _inputs, output: output.detach())


def warned(text: str) -> list[str]:
    return [line for line in text.splitlines() if "gave no gradient" in line]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("method", list(LATE))
def test_what_gets_no_gradient_in_the_first_step_is_named_once(
    method: str, accumulation: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sparseft.attach(build("llama"), LATE[method])
    cut(model)
    looked = []
    monkeypatch.setattr("sparseft.training.trainer.without_gradient", lambda m: looked.append(1) or without_gradient(m))
    trainer = trainer_of(
        model, tmp_path, examples(24), max_steps=3, batch_size=2, gradient_accumulation=accumulation
    )  # fmt: skip
    train(trainer, None, 3)
    assert len(looked) == 1
    (line,) = warned(capsys.readouterr().err)
    assert "step 1 gave no gradient to 1 of what trains" in line
    assert line.rpartition(": ")[2].startswith(OTHER)


@pytest.mark.parametrize("method", [*LATE, "dropped"])
def test_nothing_is_named_where_all_train(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LATE.get(method, sparseft.LoraConfig(rank=2, dropout=0.5))
    trainer = trainer_of(sparseft.attach(build("llama"), config), tmp_path, examples(8), max_steps=2, batch_size=2)
    train(trainer, None, 2)
    assert warned(capsys.readouterr().err) == []


@pytest.mark.parametrize("config", [LATE["sylva"], sparseft.FullConfig()], ids=["sylva", "full"])
def test_experts_that_no_token_reached_are_not_named(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = sparseft.attach(build("mixtral"), config)
    with torch.no_grad():  # every token goes to the same two experts
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.requires_grad_(False)
    trainer = trainer_of(model, tmp_path, examples(4), max_steps=1, batch_size=2)
    train(trainer, None, 1)
    idle = [n for n, p in model.named_parameters() if p.requires_grad and in_experts(n) and not p.any()]
    assert idle or isinstance(config, sparseft.FullConfig)
    assert warned(capsys.readouterr().err) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deepseek_v3", ["method=lora"]),
        ("deepseek_v3", ["method=lora", "method.dropout=0"]),
        ("deepseek_v3", ["method=dora"]),
        ("deepseek_v3", ["method=sylva", "method.importance=weight", "method.block_size=8", "sparsity=0.9"]),
        ("jamba", ["method=lora"]),
        ("jamba", ["method=lora", "scope=self_attn"]),
    ],
)
def test_a_run_says_what_stays_frozen_and_can_be_loaded(
    name: str, words: list[str], tokenizer: Any, in_tmp: Path
) -> None:
    config = MODELS[name]()
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 128
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    base.save_pretrained("model")
    tokenizer.save_pretrained("model")
    data = write_data(in_tmp)["json"]
    done = command(in_tmp, "train", *on(in_tmp / "model", data), *words, "trainer.max_steps=2", "output_dir=run")
    assert warned(done.err) == []
    note = (
        "1 linear cannot train and stays frozen: model.layers.0.mamba.dt_proj (the model reads its weight itself)"
        if name == "jamba" and len(words) == 1
        else "cannot train"
    )
    assert (note in done.err) == (note != "cannot train")
    assert any(note in warning for warning in summary(in_tmp / "run")["warnings"]) == (note != "cannot train")
    spec = ModelSpec.of(base)
    listed = spec.linears_in(words[1].removeprefix("scope=") if "scope" in words[-1] else None).keys()
    listed = listed if "method=sylva" in words else listed - spec.stacked
    assert saved(in_tmp / "run" / "adapter") == listed
    merged = sparseft.merge(sparseft.load_adapter(copy.deepcopy(base), in_tmp / "run" / "adapter"))
    assert changed(merged, base) <= listed
    assert {n for n in listed - changed(merged, base) if not in_experts(n)} == set()

"""Every architecture that is known by its roles, and the unknown ones: gradients against the dense model's autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import sparseft
from sparseft.errors import UserError
from sparseft.kernels import reference
from sparseft.layers import SparseLinear, sparse_layers
from sparseft.methods.s2ft import ROLES
from sparseft.models.spec import ModelSpec

LLAMA = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**LLAMA, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 16}  # hidden / heads is 12
GATED = ("q", "k", "v", "o", "gate", "up", "down")
PLAIN = ("q", "k", "v", "o", "up", "down")

# The config, and the roles that the architecture has.
MODELS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "llama2": (lambda: transformers.LlamaConfig(**LLAMA), GATED),
    "llama3": (lambda: transformers.LlamaConfig(**GROUPED, rope_theta=5e5), GATED),
    "llama_bias": (lambda: transformers.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True), GATED),
    "mistral": (lambda: transformers.MistralConfig(**GROUPED, sliding_window=4), GATED),
    "qwen2": (lambda: transformers.Qwen2Config(**GROUPED), GATED),
    "qwen3": (lambda: transformers.Qwen3Config(**GEMMA), GATED),
    "gemma2": (lambda: transformers.Gemma2Config(**GEMMA, query_pre_attn_scalar=16, sliding_window=4), GATED),
    "gemma3": (lambda: transformers.Gemma3TextConfig(**GEMMA, query_pre_attn_scalar=16, sliding_window=4), GATED),
    "phi3": (lambda: transformers.Phi3Config(**GROUPED, bos_token_id=1, eos_token_id=2), GATED),
    "opt": (
        lambda: transformers.OPTConfig(
            vocab_size=96, hidden_size=48, ffn_dim=80, num_hidden_layers=2, num_attention_heads=4, dropout=0.0,
            word_embed_proj_dim=48, max_position_embeddings=64, pad_token_id=0,
        ),
        PLAIN,
    ),
    "gpt2": (
        lambda: transformers.GPT2Config(
            vocab_size=96, n_embd=48, n_inner=80, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        ),
        PLAIN,
    ),
}  # fmt: skip
FIELDS = {"q": "q_ratio", "k": "k_ratio", "v": "v_ratio", "o": "o_ratio", "gate": "g_ratio", "up": "u_ratio",
          "down": "d_ratio"}  # fmt: skip


def build(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():  # biases and norms too: code that misplaces one would agree with zeros and ones
            for name, parameter in model.named_parameters():
                centre = 1.0 if parameter.dim() == 1 and not name.endswith("bias") else 0.0
                parameter.normal_(centre, 0.1)
    return model.to(dtype).eval()


def neox() -> Any:
    return transformers.GPTNeoXConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=batch()["input_ids"]).logits


def check_one_step(config: Any, method: Any) -> dict[str, SparseLinear]:
    """Attach, gradient oracle, one step, detach: the whole contract on one model. Returns the layers that trained."""
    plain = build(config).requires_grad_(True)
    plain(**batch()).loss.backward()
    dense = {}
    for name in ModelSpec.of(plain).linears:
        module = plain.get_submodule(name)
        dense[name] = module.weight.grad.t() if type(module).__name__ == "Conv1D" else module.weight.grad
    model = build(config)
    before, state = logits(model), {n: t.clone() for n, t in model.state_dict().items()}
    sparseft.attach(model, method)
    assert torch.equal(logits(model), before)
    layers = sparse_layers(model)
    loss = model(**batch()).loss
    loss.backward()
    for name, layer in layers.items():
        for kind, pattern in layer.patterns.items():
            expected = reference.gather(dense[name], kind, pattern.index, pattern.block_size)
            torch.testing.assert_close(pattern.delta.grad, expected, atol=1e-6, rtol=1e-4, msg=f"{name}.{kind}")
    torch.optim.SGD(sparseft.trainable_parameters(model).values(), lr=1e-2).step()
    assert model(**batch()).loss < loss  # a small step down the gradient
    sparseft.detach(model)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    return layers


@pytest.mark.parametrize("name", list(MODELS))
def test_rows_and_columns_of_every_role(name: str) -> None:
    make, roles = MODELS[name]
    assert {slot.role for slot in ModelSpec.of(build(make())).slots} == set(roles)
    layers = check_one_step(make(), sparseft.S2FTConfig(**{FIELDS[role]: 0.25 for role in roles}))
    assert layers.keys() == ModelSpec.of(build(make())).linears.keys()  # every linear has a role


@pytest.mark.parametrize("name", list(MODELS))
def test_the_default_of_sparsity(name: str) -> None:
    make, _ = MODELS[name]
    check_one_step(make(), sparseft.S2FTConfig(sparsity=0.9))


@pytest.mark.parametrize("name", list(MODELS))
def test_blocks_of_every_linear(name: str) -> None:
    make, _ = MODELS[name]
    method = sparseft.SylvaConfig(importance="weight", block_size=16, sparsity=0.8)  # 24: edge blocks too
    assert check_one_step(make(), method).keys() == ModelSpec.of(build(make())).linears.keys()


@pytest.mark.parametrize("importance", ["gradient", "sylva"])
@pytest.mark.parametrize("name", list(MODELS))
def test_importance_reaches_every_linear(name: str, importance: str) -> None:
    make, roles = MODELS[name]
    ratios = {FIELDS[role]: 0.25 for role in roles}
    for method in (
        sparseft.S2FTConfig(**ratios, importance=importance),
        sparseft.SylvaConfig(block_size=16, sparsity=0.8, num_partition=2, importance=importance),
    ):
        model = build(make())
        selection = sparseft.compute_selection(model, method, [batch()])
        assert selection.modules.keys() == ModelSpec.of(model).linears.keys()


@pytest.mark.parametrize(("role", "module"), [("q", 0), ("k", 1), ("v", 2)])
def test_a_fused_projection_trains_the_rows_of_its_role(role: str, module: int) -> None:
    make, _ = MODELS["phi3"]
    selection = sparseft.compute_selection(build(make()), sparseft.S2FTConfig(**{FIELDS[role]: 1.0}))
    bounds = [0, 48, 72, 96]  # 4 query heads and 2 key/value heads of 12
    expected = torch.arange(bounds[module], bounds[module + 1])
    assert torch.equal(selection.modules["model.layers.0.self_attn.qkv_proj"]["rows"], expected)


# ---- unknown architectures ----


def test_an_unknown_architecture_trains_by_module_names() -> None:
    method = sparseft.S2FTConfig(sparsity=0.9, rows=["query_key_value"], columns=["mlp.dense_4h_to_h"])
    layers = check_one_step(neox(), method)
    kinds = {name.rpartition(".")[2]: tuple(layer.patterns) for name, layer in layers.items()}
    assert kinds == {"query_key_value": ("rows",), "dense_4h_to_h": ("columns",)} and len(layers) == 4
    spec = ModelSpec.of(build(neox()))
    scope = sum(rows * columns for rows, columns in spec.linears.values())
    trained = sum(layer.trainable_entries for layer in layers.values())
    assert abs(trained - 0.1 * scope) <= 4 * 48  # to within a feature a module


@pytest.mark.parametrize("importance", ["weight", "activation", "gradient", "sylva"])
def test_named_modules_are_chosen_from_by_importance(importance: str) -> None:
    method = sparseft.S2FTConfig(sparsity=0.9, columns=["dense_4h_to_h"], importance=importance, allocation="global")
    selection = sparseft.compute_selection(build(neox()), method, [batch()])
    assert all(name.endswith("dense_4h_to_h") for name in selection.modules)


def test_names_work_where_roles_are_known_too() -> None:
    model = sparseft.attach(build(MODELS["llama3"][0]()), sparseft.S2FTConfig(sparsity=0.9, rows=["0.mlp.up_proj"]))
    assert list(sparse_layers(model)) == ["model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rows": ["query_key"]},
            "method.rows: no linear in scope is called 'query_key'; found dense, .*query_key_value",
        ),
        ({"columns": ["key_value"]}, "method.columns: no linear in scope is called 'key_value'"),
        ({"rows": ["dense"], "columns": ["attention.dense"]}, "both name gpt_neox.layers.0.attention.dense"),
        ({"rows": ["nothing"]}, "Available: dense, dense_4h_to_h, dense_h_to_4h, query_key_value[.]$"),
        ({"rows": "dense"}, "method.rows=dense: expected a list"),
        ({"rows": []}, "method.rows is empty"),
        ({"columns": [""]}, r"method.columns\[0\] is empty"),
        ({"rows": ["dense"], "roles": ["up"]}, "method.rows and method.roles both"),
        ({"columns": ["dense"], "d_ratio": 0.5}, "method.columns and ratios both"),
        ({"rows": ["attention.dense"], "sparsity": 0.1}, "raise sparsity"),
        ({"scope": "query_key_value"}, "a role that s2ft knows .*; found query_key_value: .*method.rows"),
        ({"scope": "query_key_value", "d_ratio": 0.5}, "a role that s2ft knows .*; found query_key_value: "),
    ],
)
def test_what_was_found_is_said(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sparseft.attach(build(neox()), sparseft.S2FTConfig(**settings))


def test_the_roles_of_the_configs_are_all_met_here() -> None:
    assert {role for _, roles in MODELS.values() for role in roles} == set(ROLES)

"""Folders that peft made, in every form accepted: the base comes back bit for bit, merged is what peft computes.

The oracle is peft itself: `PeftModel.from_pretrained` on a fresh base.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparseft
from sparseft.adapters.lifecycle import mergeable
from sparseft.compose.run_config import compose
from sparseft.errors import UserError
from sparseft.evaluation.target import find_target, score_both

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),  # the oracle's own
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
]
Q_DOWN = ["q_proj", "down_proj"]

# name -> (models, options of peft.LoraConfig)
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama gpt2", {}),
    "all linears": ("llama gpt2 moe", {"target_modules": "all-linear"}),
    "a pattern": ("llama", {"target_modules": r".*layers\.1\.(mlp\.up|self_attn\.v)_proj"}),
    "rslora": ("llama", {"use_rslora": True, "lora_alpha": 3}),
    "dora": ("llama qwen2 gpt2", {"use_dora": True}),
    "dora on the head": ("llama llama-tied", {"use_dora": True, "target_modules": ["q_proj", "lm_head"]}),
    "ranks": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 32}}),
    "some layers": ("llama", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "bias all": ("llama llama-tied llama-biased qwen2 qwen2-tied gpt2", {"bias": "all"}),
    "bias lora_only": ("llama llama-biased qwen2 qwen2-tied gpt2", {"bias": "lora_only"}),
    "lora_bias": ("llama-biased qwen2-q gpt2", {"lora_bias": True}),
    "head": ("llama llama-tied qwen2-tied gpt2", {"target_modules": ["q_proj", "lm_head"]}),
    "embeddings": ("llama llama-tied qwen2-tied gpt2", {"target_modules": ["q_proj", "embed_tokens"]}),
    "head and embeddings": ("llama llama-tied gpt2", {"target_modules": ["lm_head", "embed_tokens"]}),
    "saved head": ("llama llama-tied qwen2-tied gpt2", {"modules_to_save": ["lm_head"]}),
    "saved embeddings": ("llama llama-tied gpt2", {"modules_to_save": ["embed_tokens"]}),
    "saved head and embeddings": ("llama llama-tied", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "saved embeddings with ties": (
        "llama-tied gpt2", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "embeddings with ties": (
        "llama-tied qwen2-tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "tokens with ties": ("llama-tied", {"trainable_token_indices": [3, 5], "ensure_weight_tying": True}),
    "saved norms": ("llama gpt2", {"modules_to_save": ["norm", "input_layernorm"]}),
    "saved linear": ("llama llama-biased gpt2", {"modules_to_save": ["up_proj"]}),
    "saved linear, biases": ("llama-biased gpt2", {"modules_to_save": ["up_proj"], "bias": "all"}),
    "saved block": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "saved head, LoRA on embeddings": (
        "llama llama-tied", {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    ),
    "head, biases": ("qwen2-tied gpt2", {"target_modules": ["q_proj", "lm_head"], "bias": "all"}),
    "tokens": ("llama llama-tied qwen2-tied gpt2", {"trainable_token_indices": [3, 5, 90]}),
    "other tokens in the head": (
        "llama llama-tied qwen2-tied", {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 5, 7]}},
    ),
    "tokens of the head": ("llama-tied", {"trainable_token_indices": {"lm_head": [3, 5, 7]}}),
    "tokens, biases": ("qwen2-tied", {"trainable_token_indices": [3, 5], "bias": "all"}),
    "tokens, LoRA on the head": (
        "llama", {"trainable_token_indices": [3, 5], "target_modules": ["q_proj", "lm_head"]},
    ),
    "fused experts": (
        "moe", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]},
    ),
    "one fused matrix": ("moe", {"target_parameters": ["mlp.experts.down_proj"], "target_modules": []}),
}  # fmt: skip
GPT2 = {
    "q_proj": "c_attn", "down_proj": "mlp.c_proj", "up_proj": "c_fc", "embed_tokens": "wte", "norm": "ln_f",
    "input_layernorm": "ln_1",
}  # fmt: skip
ONE_EACH = [(form, max(kinds.split(), key=lambda kind: "-tied" in kind)) for form, (kinds, _) in FORMS.items()]
CASES = [(form, kind) for form, (kinds, _) in FORMS.items() for kind in kinds.split()]


@torch.no_grad()
def build(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model whose norms and biases are random too; two calls give the same."""
    import transformers

    common = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": kind.endswith("-tied"),
    }  # fmt: skip
    family = kind.split("-")[0]
    if family == "llama":
        biased = kind == "llama-biased"
        config = transformers.LlamaConfig(**common, attention_bias=biased, mlp_bias=biased, **changes)
    elif family == "qwen2":
        config = transformers.Qwen2Config(**common, **changes)
    elif family == "moe":
        config = transformers.Qwen3MoeConfig(
            **common, head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, **changes
        )
    else:
        config = transformers.GPT2Config(
            vocab_size=96, n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **changes,
        )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            mean = 1.0 if parameter.dim() == 1 and not name.endswith("bias") else 0.0
            parameter.normal_(mean, 0.2)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=torch.tensor([[3, 5, 17, 90, 4, 2, 33, 5]])).logits


def options_of(form: str, kind: str) -> dict[str, Any]:
    options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": Q_DOWN} | FORMS[form][1]
    if kind == "qwen2-q":
        options["target_modules"] = ["q_proj", "v_proj"]  # the linears with biases
    if kind == "gpt2":
        for key in ("target_modules", "modules_to_save"):
            if isinstance(options.get(key), list):
                options[key] = [GPT2.get(name, name) for name in options[key]]
        if "trainable_token_indices" in options:
            options["trainable_token_indices"] = {"wte": options["trainable_token_indices"]}
    return options


@torch.no_grad()
def make_folder(kind: str, folder: Path, options: dict[str, Any], seed: int = 0) -> Path:
    """A folder by plain peft, all that it trains moved by random numbers."""
    import peft

    wrapped = peft.get_peft_model(build(kind), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    wrapped.save_pretrained(folder)
    return folder


def by_peft(kind: str, folder: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(build(kind), str(folder), is_trainable=True).eval()


def everything(model: Any) -> dict[str, Any]:
    """All of a model that an adapter must leave as it was."""
    return {
        "tensors": {n: t.clone() for n, t in model.state_dict(keep_vars=False).items()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)},
        "tied": len(list(model.parameters())),
        "types": {n: type(m) for n, m in model.named_modules()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()},
        "attributes": set(vars(model)),
        "config": model.config.to_dict(),
        "logits": logits(model),
    }


def assert_unchanged(before: dict[str, Any], model: Any) -> None:
    after = everything(model)
    assert list(before["tensors"]) == list(after["tensors"])
    for name, value in before["tensors"].items():
        assert torch.equal(value, after["tensors"][name]), name
    assert torch.equal(before["logits"], after["logits"])
    for what in ("flags", "tied", "types", "modes", "hooks", "attributes", "config"):
        assert before[what] == after[what], what


def train(model: Any, steps: int = 2) -> None:
    parameters = list(sparseft.trainable_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    ids = torch.tensor([[3, 5, 17, 90, 4, 2, 33, 5]])
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("form", "kind"), CASES)
def test_the_base_stays_the_base(form: str, kind: str, tmp_path: Path) -> None:
    """Off, detached, before and after training: bit for bit. On: to the bit what peft computes, trains and saves."""
    folder = make_folder(kind, tmp_path / "p", options_of(form, kind))
    oracle = by_peft(kind, folder)
    plain = build(kind)
    plain.lm_head.requires_grad_(False)
    next(plain.children()).train()  # modes of single modules are the user's
    before = everything(plain)
    assert not torch.equal(logits(oracle), before["logits"])
    model = sparseft.load_adapter(plain, folder)
    assert torch.equal(logits(model), logits(oracle))
    trainable = {name for name, parameter in oracle.named_parameters() if parameter.requires_grad}
    assert set(sparseft.trainable_parameters(model)) == trainable
    sparseft.set_adapter(model, None)
    assert torch.equal(logits(model), before["logits"])
    assert not sparseft.trainable_parameters(model)
    sparseft.set_adapter(model, "default")
    assert torch.equal(logits(model), logits(oracle))
    assert set(sparseft.trainable_parameters(model)) == trainable
    again = sparseft.save_adapter(model, tmp_path / "again")
    assert torch.equal(logits(sparseft.load_adapter(build(kind), again)), logits(oracle))
    train(model)
    trained = logits(model)
    assert not torch.equal(trained, logits(oracle))
    sparseft.set_adapter(model, None)
    assert torch.equal(logits(model), before["logits"])
    parked = sparseft.save_adapter(model, tmp_path / "parked", "default")
    assert torch.equal(logits(model), before["logits"])
    assert torch.equal(logits(sparseft.load_adapter(build(kind), parked)), trained)
    sparseft.set_adapter(model, "default")
    assert torch.equal(logits(model), trained)
    assert_unchanged(before, sparseft.detach(model))


@pytest.mark.parametrize(("form", "kind"), CASES)
def test_merged_is_what_peft_computes(form: str, kind: str, tmp_path: Path) -> None:
    """In memory and after a reload from disk, where an untied head must not be tied again."""
    import transformers

    folder = make_folder(kind, tmp_path / "p", options_of(form, kind))
    wanted = logits(by_peft(kind, folder))
    merged = sparseft.merge(sparseft.load_adapter(build(kind), folder))
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)
    assert {n: type(m) for n, m in merged.named_modules()} == {n: type(m) for n, m in build(kind).named_modules()}
    assert all(parameter.requires_grad for parameter in merged.parameters())
    merged.tie_weights()  # as transformers and lm-eval call it: ties what the config says
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(loaded), logits(merged))


def test_what_the_plain_model_has_no_weights_for_is_not_merged(tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path / "p", options_of("lora_bias", "llama") | {"bias": "none"})
    wanted = logits(by_peft("llama", folder))
    plain = build("llama")
    before = everything(plain)
    model = sparseft.load_adapter(plain, folder)
    assert not mergeable(model)
    with pytest.raises(UserError, match=r"'default' cannot be merged: it adds a bias .* to model.*_proj, which"):
        sparseft.merge(model)
    assert torch.equal(logits(model), wanted)  # as it was
    assert_unchanged(before, sparseft.detach(model))


def test_merging_nothing_gives_the_base(tmp_path: Path) -> None:
    folder = make_folder("qwen2-tied", tmp_path / "p", options_of("head, biases", "qwen2-tied"))
    plain = build("qwen2-tied")
    before = everything(plain)
    model = sparseft.load_adapter(plain, folder)
    sparseft.set_adapter(model, None)
    assert_unchanged(before, sparseft.merge(model))


@pytest.mark.parametrize("leave", [sparseft.merge, sparseft.detach])
@pytest.mark.parametrize("loaded", [True, False])
def test_a_wrapper_that_was_left_has_no_adapter(loaded: bool, leave: Any, tmp_path: Path) -> None:
    model = sparseft.attach(build("llama"), sparseft.LoraConfig(rank=2))
    folder = sparseft.save_adapter(model, tmp_path / "a")
    if loaded:
        model = sparseft.load_adapter(build("llama"), folder)
    written = (folder / "adapter_model.safetensors").read_bytes()
    plain = leave(model)
    for act in (
        lambda: sparseft.save_adapter(model, folder),
        lambda: sparseft.set_adapter(model, None),
        lambda: sparseft.merge(model),
        lambda: sparseft.detach(model),
    ):
        with pytest.raises(UserError, match="the model has no adapter"):
            act()
    assert (folder / "adapter_model.safetensors").read_bytes() == written
    assert torch.isfinite(logits(sparseft.load_adapter(plain, folder))).all()


def test_gradient_checkpointing_leaves_no_hook(tmp_path: Path) -> None:
    """peft hooks the embeddings of such a model."""
    folder = make_folder("llama", tmp_path / "p", options_of("plain", "llama"))
    plain = build("llama")
    plain.gradient_checkpointing_enable()
    before = everything(plain)
    assert_unchanged(before, sparseft.detach(sparseft.load_adapter(plain, folder)))


DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["head, biases", "saved head", "embeddings", "tokens"])
def test_half_precision(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    import peft

    kind = "qwen2-tied"
    folder = make_folder(kind, tmp_path / "p", options_of(form, kind))
    wanted = logits(peft.PeftModel.from_pretrained(build(kind).to(dtype), str(folder)).eval()).float()
    plain = build(kind).to(dtype)
    before = everything(plain)
    model = sparseft.load_adapter(plain, folder)
    assert torch.equal(logits(model).float(), wanted)
    sparseft.set_adapter(model, None)
    assert torch.equal(logits(model), before["logits"])
    assert_unchanged(before, sparseft.detach(model))
    merged = logits(sparseft.merge(sparseft.load_adapter(build(kind).to(dtype), folder))).float()
    assert (merged - wanted).abs().max() < (0.03 if dtype == torch.bfloat16 else 0.005) * wanted.abs().max()


# ---- several on one model ----

SEVERAL = {
    "biases": ({"bias": "all"}, {"bias": "all", "target_modules": ["up_proj"]}, {"bias": "lora_only"}),
    "biases and none": ({"bias": "all"}, {}, {"modules_to_save": ["norm"]}),
    "heads": ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"], "bias": "all"}, {}),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["lm_head"]}, {"bias": "all"}),
    "tokens": ({"trainable_token_indices": [3, 5]}, {"trainable_token_indices": [5, 90], "bias": "all"}),
}


@pytest.mark.parametrize("form", SEVERAL)
@pytest.mark.parametrize("kind", ["qwen2-tied", "llama-biased"])
def test_several_and_the_base(form: str, kind: str, tmp_path: Path) -> None:
    """Each alone is what peft computes of it alone; loading over a name, and one that does not fit, change no other."""
    common = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": Q_DOWN}
    names = dict(zip("abc", SEVERAL[form], strict=False))
    for seed, (name, options) in enumerate(names.items()):
        make_folder(kind, tmp_path / name, common | options, seed)
    alone: dict[str | None, Tensor] = {name: logits(by_peft(kind, tmp_path / name)) for name in names}
    plain = build(kind)
    before = everything(plain)
    alone[None] = before["logits"]
    model: Any = plain
    for name in names:
        model = sparseft.load_adapter(model, tmp_path / name, name)
        assert torch.equal(logits(model), alone[name]), name
    for name in ["a", None, "b", "a", *names, "b", None, *names]:
        sparseft.set_adapter(model, name)
        assert torch.equal(logits(model), alone[name]), name
    (tmp_path / "broken").mkdir()
    for file in (tmp_path / "a").iterdir():
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "broken" / "adapter_config.json").read_text())
    config["target_modules"] = ["k_proj"]
    (tmp_path / "broken" / "adapter_config.json").write_text(json.dumps(config))
    for name in ("a", "new"):
        with pytest.raises(UserError, match="broken"):
            sparseft.load_adapter(model, tmp_path / "broken", name)
    for name in [None, *names]:
        sparseft.set_adapter(model, name)
        assert torch.equal(logits(model), alone[name]), name
    sparseft.load_adapter(model, tmp_path / "b", "a")  # over a parked one, then over the active one
    assert torch.equal(logits(model), alone["b"])
    sparseft.load_adapter(model, tmp_path / "a", "a")
    assert torch.equal(logits(model), alone["a"])
    for name in names:
        sparseft.save_adapter(model, tmp_path / f"{name}-again", name)
        assert torch.equal(logits(sparseft.load_adapter(build(kind), tmp_path / f"{name}-again")), alone[name])
    assert torch.equal(logits(model), alone["a"])
    assert_unchanged(before, sparseft.detach(model))


def test_tokens_beside_an_adapter_without_are_refused(tmp_path: Path) -> None:
    tokens = make_folder("llama", tmp_path / "t", options_of("tokens", "llama"))
    plain = make_folder("llama", tmp_path / "p", options_of("plain", "llama"))
    model = sparseft.load_adapter(build("llama"), tokens, "t")
    before = logits(model)
    with pytest.raises(UserError, match="only one of it and 't' trains single tokens"):
        sparseft.load_adapter(model, plain, "p")
    assert torch.equal(logits(model), before)


BESIDE = {
    "LoRA, then whole": ({"target_modules": ["up_proj", "q_proj"], "bias": "all"}, {"modules_to_save": ["up_proj"]}),
    "whole, then LoRA": ({"modules_to_save": ["up_proj"]}, {"target_modules": ["q_proj", "up_proj"]}),
    "LoRA, then the block": ({"target_modules": ["up_proj"]}, {"modules_to_save": ["mlp"]}),
    "block, then LoRA": ({"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}, {"target_modules": ["up_proj"]}),
}


@pytest.mark.parametrize("form", BESIDE)
def test_one_that_peft_cannot_hold_beside_another_leaves_nothing(form: str, tmp_path: Path) -> None:
    """peft fails after it has put part of it in place: nothing of that stays, in the model or in what is saved."""
    kind = "qwen2-tied"
    common = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": Q_DOWN}
    for seed, (name, options) in enumerate(zip("ab", BESIDE[form], strict=True)):
        make_folder(kind, tmp_path / name, common | options, seed)
    plain = build(kind)
    before = everything(plain)
    model = sparseft.load_adapter(plain, tmp_path / "a", "a")
    loaded, trainable = everything(model), set(sparseft.trainable_parameters(model))
    for name in ("b", "a"):
        with pytest.raises(UserError, match="peft cannot load it on this model"):
            sparseft.load_adapter(model, tmp_path / "b", name)
        assert_unchanged(loaded, model)
        assert set(sparseft.trainable_parameters(model)) == trainable
    again = sparseft.save_adapter(model, tmp_path / "again")
    assert torch.equal(logits(by_peft(kind, again)), loaded["logits"])
    assert_unchanged(before, sparseft.detach(model))


FUSED = {
    "biases": ({"bias": "all"}, {"bias": "lora_only", "r": 2, "rank_pattern": {"q_proj": 3}}),
    "one with biases": ({}, {"bias": "all", "target_modules": "all-linear"}),
    "heads": ({"modules_to_save": ["lm_head", "norm"]}, {"modules_to_save": ["lm_head"]}),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True}, {"target_modules": ["lm_head"]}),
    "lora_bias": ({"lora_bias": True, "target_modules": ["q_proj"]}, {"target_modules": r".*\.(q|v)_proj"}),
}


@pytest.mark.parametrize("form", FUSED)
@pytest.mark.parametrize("kind", ["qwen2", "qwen2-tied"])
def test_fused_is_the_sum_of_what_they_change(form: str, kind: str, tmp_path: Path) -> None:
    """Oracle: the weights of each merged alone, untied, their differences from the base added up."""
    common = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": Q_DOWN}
    weights = {"a": 0.5, "b": -1.25}
    merged = {}
    for seed, (name, options) in enumerate(zip("ab", FUSED[form], strict=True)):
        make_folder(kind, tmp_path / name, common | options, seed)
        merged[name] = sparseft.merge(sparseft.load_adapter(build(kind), tmp_path / name)).state_dict()
    start = build(kind).state_dict()
    expected = build(kind)
    expected.lm_head.weight = torch.nn.Parameter(expected.lm_head.weight.detach().clone())
    expected.load_state_dict({n: v + sum(w * (merged[k][n] - v) for k, w in weights.items()) for n, v in start.items()})
    plain = build(kind)
    before = everything(plain)
    model = sparseft.load_adapter(plain, tmp_path / "a", "a")
    model = sparseft.load_adapter(model, tmp_path / "b", "b")
    sparseft.fuse(model, weights)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-3, atol=1e-3)
    folder = sparseft.save_adapter(model, tmp_path / "fused")
    torch.testing.assert_close(logits(sparseft.load_adapter(build(kind), folder)), logits(model), rtol=1e-5, atol=1e-5)
    for name in ("a", None, "fused"):
        sparseft.set_adapter(model, name)
        if name != "fused":
            alone = before["logits"] if name is None else logits(by_peft(kind, tmp_path / name))
            assert torch.equal(logits(model), alone)
    sparseft.fuse(model, {"a": 1.0}, "fused")  # over the old one
    torch.testing.assert_close(logits(model), logits(by_peft(kind, tmp_path / "a")), rtol=1e-4, atol=1e-4)
    assert_unchanged(before, sparseft.detach(model))


@pytest.mark.parametrize(("form", "kind"), [("tokens", "llama"), ("dora", "llama")])
def test_what_does_not_add_up_is_not_fused(form: str, kind: str, tmp_path: Path) -> None:
    folder = make_folder(kind, tmp_path / "p", options_of(form, kind))
    model = sparseft.load_adapter(build(kind), folder, "p")
    before = logits(model)
    with pytest.raises(UserError, match="fuse: 'p' .* add up: merge it instead"):
        sparseft.fuse(model, {"p": 1.0})
    assert torch.equal(logits(model), before)


# ---- ranks ----


def test_a_rank_that_no_linear_has(tmp_path: Path) -> None:
    """Where every linear has its own in `rank_pattern`, `r` is what peft wrote and nothing more."""
    options = {"r": 64, "rank_pattern": {"q_proj": 2, "down_proj": 4}}
    folder = make_folder("llama", tmp_path / "p", options_of("plain", "llama") | options)
    model = sparseft.load_adapter(build("llama"), folder)
    assert torch.equal(logits(model), logits(by_peft("llama", folder)))
    again = sparseft.save_adapter(model, tmp_path / "again")
    assert torch.equal(logits(sparseft.load_adapter(build("llama"), again)), logits(model))


@pytest.mark.parametrize(
    "changes", [{"r": 10**12}, {"rank_pattern": {"q_proj": 10**12}}, {"r": 10**12, "rank_pattern": {"q_proj": 4}}]
)
def test_ranks_that_would_take_all_memory_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path / "p", options_of("plain", "llama"))
    file = folder / "adapter_config.json"
    wider = {"target_modules": [*Q_DOWN, "up_proj"]} if len(changes) == 2 else {}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes | wider))
    with pytest.raises(UserError, match="adapter_config.json|cannot load it"):
        sparseft.load_adapter(build("llama"), folder)


# ---- eval ----


@pytest.mark.parametrize("given", [[], ["model.revision=v9", "model.tokenizer=some/other"]])
def test_what_an_adapter_brings_with_it_is_used(given: list[str], tmp_path: Path, tokenizer: Any) -> None:
    """The base's revision in its description, and a tokenizer beside it, as TRL leaves one; what is said wins."""
    folder = make_folder("llama", tmp_path / "p", options_of("plain", "llama"))
    file = folder / "adapter_config.json"
    said = {"base_model_name_or_path": "some/base", "revision": "v2"}
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    tokenizer.save_pretrained(folder)
    words = ["hardware.device=cpu", *given]
    found = find_target(compose("eval", words), run=None, adapter=str(folder), base=False, overrides=words).model
    wanted = ("v9", "some/other") if given else ("v2", str(folder))
    assert (found.path, found.revision, found.tokenizer) == ("some/base", *wanted)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """A model folder of each kind, with a tokenizer."""
    made = {}
    for kind in {kind for _, kind in CASES}:
        made[kind] = tmp_path_factory.mktemp("base") / kind
        build(kind).save_pretrained(made[kind])
        tokenizer.save_pretrained(made[kind])
    return made


def scored(words: list[str], **target: Any) -> tuple[Tensor, Tensor | None]:
    """The logits that `sparseft eval` would score: of what is evaluated, and of the base beside it."""
    config = compose("eval", words)
    seen: list[Tensor] = []

    def score(model: Any, tokenizer: Any) -> dict[str, Any]:
        from sparseft.evaluation.harness import LanguageModel

        language_model = LanguageModel(model, tokenizer, 1, None)  # what lm-eval does to a model
        seen.append(logits(language_model.model))
        return {"logits": seen[-1]}

    outcome, base = score_both(find_target(config, overrides=words, **target), config, score)
    return outcome["logits"], base["logits"] if base is not None else None


def words_of(path: Path) -> list[str]:
    return [f"model.path={path}", "hardware.device=cpu"]


@pytest.mark.parametrize(("form", "kind"), [*ONE_EACH, ("head", "gpt2"), ("lora_bias", "llama")])
def test_eval_beside_the_base_is_the_base(form: str, kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    folder = make_folder(kind, tmp_path / "p", options_of(form, kind))
    words = words_of(bases[kind])
    alone, _ = scored(words, run=None, adapter=None, base=True)
    adapted, base = scored(words, run=None, adapter=str(folder), base=False)
    assert torch.equal(base, alone)
    torch.testing.assert_close(adapted, logits(by_peft(kind, folder)), rtol=1e-4, atol=1e-4)


OWN = {
    "s2ft": sparseft.S2FTConfig(d_ratio=0.2, o_ratio=0.2),
    "sylva": sparseft.SylvaConfig(importance="random", block_size=8, sparsity=0.8),
    "lora": sparseft.LoraConfig(rank=2),
    "dora": sparseft.DoraConfig(rank=2),
}


@pytest.mark.parametrize("kind", ["qwen2-tied", "gpt2", "moe"])
@pytest.mark.parametrize("method", OWN)
def test_eval_of_our_own_adapters_is_the_base_too(
    method: str, kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    model = sparseft.attach(build(kind), OWN[method])
    train(model)
    folder = sparseft.save_adapter(model.eval(), tmp_path / "adapter")
    words = words_of(bases[kind])
    alone, _ = scored(words, run=None, adapter=None, base=True)
    adapted, base = scored(words, run=None, adapter=str(folder), base=False)
    assert torch.equal(base, alone) and not torch.equal(adapted, alone)
    torch.testing.assert_close(adapted, logits(model), rtol=1e-4, atol=1e-4)

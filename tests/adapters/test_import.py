"""LoRA and DoRA folders that peft made, over architectures: loaded, switched, fused, merged and read back.

The oracle is peft: `PeftModel.from_pretrained` on a fresh base, and for sums the weights that each merges to alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparseft
from sparseft.errors import UserError
from support.experts import build as build_experts
from support.models import build_model, tiny_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),  # the oracle's own
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # merged, sums are taken in another order

# Two kinds of linears of each architecture, and one that a regex below finds in layer 1.
LINEARS = {
    "llama": ("q_proj", "down_proj", "v_proj"),  # grouped queries, explicit head_dim
    "llama-tied": ("q_proj", "down_proj", "v_proj"),
    "qwen2": ("k_proj", "down_proj", "v_proj"),  # biases
    "phi3": ("qkv_proj", "gate_up_proj", "o_proj"),  # fused
    "gpt2": ("c_attn", "c_proj", "c_fc"),  # Conv1D
    "mixtral": ("q_proj", "o_proj", "v_proj"),
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "dora": {"use_dora": True},
    "dora, rslora": {"use_dora": True, "use_rslora": True},
    "patterns": {"rank_pattern": {"FIRST": 2, r".*\.1\..*SECOND": 6}, "alpha_pattern": {"SECOND": 3}},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear but some": {"target_modules": "all-linear", "exclude_modules": ["FIRST"]},
    "all-linear but a regex": {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    "a regex": {"target_modules": r".*\.1\..*(FIRST|THIRD)"},
    "some layers": {"layers_to_transform": [1]},
    "one layer": {"layers_to_transform": 0, "layers_pattern": "LAYERS"},
    "full names": {"target_modules": ["FULL"]},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "experts": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "one matrix of experts": {"target_parameters": ["mlp.experts.down_proj"], "target_modules": []},
    "experts by their old names": {"target_modules": ["w1", "w2", "w3", "q_proj"]},
    "experts' w2": {"target_modules": ["w2"]},
    "router": {"target_parameters": ["mlp.gate.weight"]},
}
CASES = [(kind, form) for kind in LINEARS for form in FORMS] + [("mixtral", form) for form in EXPERTS]


def build(kind: str) -> Any:
    if kind == "mixtral":
        return build_experts("mixtral")
    if kind in ("llama", "qwen2", "gpt2"):
        return build_model(kind)
    import transformers

    if kind == "phi3":
        sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = transformers.Phi3Config(vocab_size=96, num_hidden_layers=2, pad_token_id=0, **sizes)
    else:
        config = tiny_config("llama")
        config.tie_word_embeddings = True
    return build_experts("", config=config)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=torch.tensor([[3, 5, 17, 90, 4, 2, 33, 5]])).logits


def options(kind: str, form: str) -> dict[str, Any]:
    first, second, third = LINEARS[kind]
    full = next(name for name, _ in build(kind).named_modules() if name.endswith(first))
    text = json.dumps(FORMS.get(form) or EXPERTS.get(form) or {})
    layers = "h" if kind == "gpt2" else "layers"
    for word, name in (("FIRST", first), ("SECOND", second), ("THIRD", third), ("FULL", full), ("LAYERS", layers)):
        text = text.replace(word, name)
    common = {"r": 4, "lora_alpha": 8, "target_modules": [first, second], "task_type": "CAUSAL_LM"}
    return common | {"fan_in_fan_out": kind == "gpt2"} | json.loads(text)


@torch.no_grad()
def make_folder(kind: str, form: str, folder: Path, seed: int) -> Path:
    """A folder by plain peft, all that it trains moved by random numbers."""
    import peft

    wrapped = peft.get_peft_model(build(kind), peft.LoraConfig(**options(kind, form)))
    generator = torch.Generator().manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    wrapped.save_pretrained(folder)
    return folder


def by_peft(kind: str, folder: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(build(kind), str(folder)).eval()


def summed(kind: str, folders: dict[str, Path], weights: dict[str, float]) -> Any:
    """The base plus Σ weight × what each adapter merged alone by peft changes."""
    start, expected = build(kind).state_dict(), build(kind)
    merged = {name: by_peft(kind, folder).merge_and_unload().state_dict() for name, folder in folders.items()}
    expected.load_state_dict({n: v + sum(w * (merged[k][n] - v) for k, w in weights.items()) for n, v in start.items()})
    return expected


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_as_peft_has_it(kind: str, form: str, tmp_path: Path) -> None:
    """To the bit when loaded and switched; the base back to the bit; merged, fused and read back to rounding."""
    import transformers

    folders = {name: make_folder(kind, form, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))}
    alone = {name: logits(by_peft(kind, folder)) for name, folder in folders.items()}
    base = build(kind)
    before = logits(base)
    model: Any = base
    for name, folder in folders.items():
        model = sparseft.load_adapter(model, folder, name)
        assert torch.equal(logits(model), alone[name]) and not torch.equal(alone[name], before)
    for name in ("one", None, "two", "one"):
        sparseft.set_adapter(model, name)
        assert torch.equal(logits(model), before if name is None else alone[name])
    weights = {"one": 0.5, "two": -1.5}
    if "dora" in form:
        with pytest.raises(UserError, match="fuse: 'one' is a DoRA adapter, whose magnitudes do not add up"):
            sparseft.fuse(model, weights)
    else:
        sparseft.fuse(model, weights)
        torch.testing.assert_close(logits(model), logits(summed(kind, folders, weights)), **TOLERANCE)
        again = sparseft.save_adapter(model, tmp_path / "sum")
        torch.testing.assert_close(logits(sparseft.load_adapter(build(kind), again)), logits(model), **TOLERANCE)
    assert torch.equal(logits(sparseft.detach(model)), before)
    merged = sparseft.merge(sparseft.load_adapter(build(kind), folders["one"]))
    torch.testing.assert_close(logits(merged), alone["one"], **TOLERANCE)
    merged.save_pretrained(tmp_path / "merged")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(read), alone["one"], **TOLERANCE)


def test_experts_and_linears_add_up(tmp_path: Path) -> None:
    """One trains experts of all layers and a linear, the other has the linear alone."""
    folders = {
        "one": make_folder("mixtral", "experts", tmp_path / "one", 0),
        "two": make_folder("mixtral", "a regex", tmp_path / "two", 1),
    }
    model: Any = build("mixtral")
    for name, folder in folders.items():
        model = sparseft.load_adapter(model, folder, name)
    weights = {"one": 2.0, "two": 0.25}
    sparseft.fuse(model, weights)
    torch.testing.assert_close(logits(model), logits(summed("mixtral", folders, weights)), **TOLERANCE)
    sparseft.fuse(model, {"two": 1.0})
    torch.testing.assert_close(logits(model), logits(by_peft("mixtral", folders["two"])), **TOLERANCE)


def test_a_sum_is_as_wide_as_its_parts_together(tmp_path: Path) -> None:
    """As peft's own "cat": ranks side by side, no rounding by an SVD."""
    folders = {name: make_folder("llama", "plain", tmp_path / name, seed) for seed, name in enumerate(("one", "two"))}
    model: Any = build("llama")
    for name, folder in folders.items():
        model = sparseft.load_adapter(model, folder, name)
    sparseft.fuse(model, {"one": 1.0, "two": 1.0})
    content = json.loads((sparseft.save_adapter(model, tmp_path / "sum") / "adapter_config.json").read_text())
    assert (content["r"], content["lora_alpha"], content["rank_pattern"]) == (8, 8, {})
    oracle = by_peft("llama", folders["one"])
    oracle.load_adapter(str(folders["two"]), "two")
    oracle.add_weighted_adapter(["default", "two"], [1.0, 1.0], "sum", combination_type="cat")
    oracle.set_adapter("sum")
    torch.testing.assert_close(logits(model), logits(oracle), rtol=1e-5, atol=1e-5)


# ---- descriptions that say what cannot be ----

VALUES: list[Any] = [
    None, -1, 0, 3.5, "x", "", [], [1], [None], [[]], {}, {"q_proj": -1}, {"q_proj": "2"}, {"q_proj": 10**9}, True,
    False, float("inf"), 10**30, "[", ["["], {"[": 2},
]  # fmt: skip
KEYS = (
    "r lora_alpha lora_dropout target_modules target_parameters exclude_modules rank_pattern alpha_pattern use_rslora "
    "use_dora bias lora_bias layers_to_transform layers_pattern modules_to_save trainable_token_indices fan_in_fan_out "
    "kasa_config megatron_config init_lora_weights layer_replication task_type peft_type sparseft"
).split()


def altered(folder: Path, key: str) -> Iterator[Any]:
    """Puts each of `VALUES` under `key` into the folder's description, one after the other."""
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    for value in VALUES:
        path.write_text(json.dumps(content | {key: value}))
        yield value


@pytest.mark.parametrize("key", KEYS)
def test_a_malformed_description_is_one_sentence(key: str, tmp_path: Path) -> None:
    """Refused in one line with the base as it was, or what peft itself makes of it, to the bit."""
    folder = make_folder("llama", "plain", tmp_path / "one", 0)
    base = build("llama")
    before, names = logits(base), [name for name, _ in base.named_modules()]
    for value in altered(folder, key):
        try:
            model = sparseft.load_adapter(base, folder)
        except UserError as error:
            assert "\n" not in str(error) and str(folder) in str(error) and len(str(error)) < 600
        else:
            assert torch.equal(logits(model), logits(by_peft("llama", folder))), value
            base = sparseft.detach(model)
        assert torch.equal(logits(base), before) and [name for name, _ in base.named_modules()] == names, value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bias", "some", "bias='some' in adapter_config.json: expected none, all or lora_only"),
        ("use_dora", "yes", "use_dora='yes' .*: expected true or false"),
        ("lora_alpha", "16", "lora_alpha='16' .*: expected a number"),
        ("kasa_config", {}, "kasa_config .* is not supported: only plain LoRA and DoRA are"),
        ("r", 64, r"gives the ranks \[64\], but the tensors' largest is 4"),
    ],
)
def test_what_is_wrong_is_said(key: str, value: Any, message: str, tmp_path: Path) -> None:
    folder = make_folder("llama", "plain", tmp_path / "one", 0)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=message):
        sparseft.load_adapter(build("llama"), folder)


ENDLESS = r"(\w+\.?)+(\w+\.?)+!"


@pytest.mark.parametrize(
    "changes",
    [
        {"exclude_modules": ENDLESS},
        {"rank_pattern": {ENDLESS: 2}},
        {"alpha_pattern": {"(a|a)" * 4: 2}},
        {"alpha_pattern": {f"layer[{number}]": 2 for number in range(1000)}},
        {"modules_to_save": [ENDLESS]},
        {"layers_to_transform": [0], "layers_pattern": ENDLESS},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_expressions_that_match_without_end_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = make_folder("llama", "plain", tmp_path / "one", 0)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=rf"matching {list(changes)[-1]} in adapter_config.json .* without end"):
        sparseft.load_adapter(build("llama"), folder)


def test_many_plain_names_are_no_expressions(tmp_path: Path) -> None:
    folder = make_folder("llama", "plain", tmp_path / "one", 0)
    expected = logits(by_peft("llama", folder))
    path = folder / "adapter_config.json"
    names = [f"vision.layers.{number}.q_proj" for number in range(1000)]
    pattern = {r"layers\.(0|1)\..*(up|gate)_proj": 2}
    changes = {"exclude_modules": names, "alpha_pattern": pattern}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert torch.equal(logits(sparseft.load_adapter(build("llama"), folder)), expected)


@pytest.mark.parametrize("targets", [ENDLESS, r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\bmodel\.x)"])
def test_targets_by_such_an_expression_are_those_of_the_tensors(targets: str, tmp_path: Path) -> None:
    folder = make_folder("llama", "plain", tmp_path / "one", 0)
    expected = logits(by_peft("llama", folder))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": targets}))
    assert torch.equal(logits(sparseft.load_adapter(build("llama"), folder)), expected)


@pytest.mark.parametrize("name", ["0", "mlp", "model", "weight", "lora_A", "base_layer", "a.b", "z/ü", ".."])
def test_names_that_peft_takes_for_parts_of_weights(name: str, tmp_path: Path) -> None:
    """PEFT strips `.0` from `layers.0` too when it saves an adapter called 0, or one beside it."""
    for folder in ("a", "b"):
        sparseft.save_adapter(sparseft.attach(build("llama"), sparseft.LoraConfig(rank=2)), tmp_path / folder)
    plain = build("llama")
    before = [*plain.state_dict()]
    with pytest.raises(UserError, match="a peft adapter cannot be called"):
        sparseft.load_adapter(plain, tmp_path / "a", name)
    assert [*plain.state_dict()] == before and not hasattr(plain, "peft_config")
    model = sparseft.load_adapter(plain, tmp_path / "a", "first one")
    for act in (
        lambda: sparseft.load_adapter(model, tmp_path / "b", name),
        lambda: sparseft.fuse(model, {"first one": 1.0}, name),
    ):
        with pytest.raises(UserError, match="a peft adapter cannot be called"):
            act()
    assert [*model.peft_config] == ["first one"]
    sparseft.save_adapter(model, tmp_path / "c")
    assert all(file.is_file() for file in (tmp_path / "c").iterdir())

"""The predicted arithmetic of a step, against torch's own count of the products that are run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import sparseft
from sparseft.bench.contenders import Contender, loss_of
from sparseft.compose.run_config import compose
from sparseft.models.spec import ModelSpec
from sparseft.models.step_cost import StepCost, Trained
from sparseft.training.predicted import predicted_floors

BATCH, LENGTH, LABELLED = 2, 32, 8
METHODS: dict[str, Any] = {
    "s2ft": sparseft.S2FTConfig(d_ratio=0.1),
    "s2ft, heads": sparseft.S2FTConfig(o_ratio=0.5, d_ratio=0.1),
    "s2ft, upper half": sparseft.S2FTConfig(d_ratio=0.1, layers="upper:0.5"),
    "paca": sparseft.PacaConfig(rank=4),
    "lora": sparseft.LoraConfig(rank=4, dropout=0.0),
    "lora, upper half": sparseft.LoraConfig(rank=4, dropout=0.0, layers="upper:0.5"),
    "full": sparseft.FullConfig(),
    "full, upper half": sparseft.FullConfig(layers="upper:0.5"),
}


def build(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    common = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"}
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4}
    configs = {
        "llama": lambda: transformers.LlamaConfig(**sizes, **common, num_key_value_heads=2),
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=64, n_inner=176, n_layer=4, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common
        ),
    }
    return transformers.AutoModelForCausalLM.from_config(configs[kind]())


def counted(model: Any, name: str, labelled: bool) -> tuple[float, float]:
    """FLOPs a token that a forward and backward pass runs: of products of matrices, of batches of them (attention)."""
    ids = torch.randint(512, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : LENGTH - LABELLED] = -100
    contender = Contender(name, model, None, 0, labelled=labelled)
    with FlopCounterMode(display=False) as counter:
        loss_of(contender, {"input_ids": ids, "labels": labels}).backward()
    found = {"mm": 0, "bmm": 0}
    for op, flops in counter.get_flop_counts()["Global"].items():
        found["bmm" if "bmm" in str(op) else "mm"] += flops
    return found["mm"] / ids.numel(), found["bmm"] / ids.numel()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("labelled", [False, True])
def test_the_floor(kind: str, labelled: bool) -> None:
    model = build(kind)
    spec = ModelSpec.of(model)
    products, attention = counted(model.requires_grad_(False).train(), "floor", labelled)
    share = LABELLED / LENGTH if labelled else 1.0
    cost = StepCost(spec, LENGTH)
    assert StepCost(spec).step(Trained({}), labelled=share) == pytest.approx(products, rel=1e-3)
    assert cost.step(Trained({})) - StepCost(spec).floor() == pytest.approx(attention / 2, rel=1e-3)  # a half is masked
    assert cost.floor() == cost.step(Trained({}))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, kind: str) -> None:
    model, config = build(kind), METHODS[method]
    spec = ModelSpec.of(model)
    model = sparseft.attach(model, config).train()
    products, attention = counted(model, method, labelled=False)
    found = StepCost(spec).step(Trained.of(model, spec), products=config.products)
    # LoRA's lowest products ask for no gradient of their input.
    assert found == pytest.approx(products, rel=0.02 if "lora" in method else 5e-3)
    whole = StepCost(spec, LENGTH).step(Trained.of(model, spec), products=config.products)
    assert whole - found == pytest.approx(attention / 2, rel=0.03)


def test_blocks_and_recomputation() -> None:
    """A block's gradient is a product like any other; checkpoints repeat the layers that a gradient flows through."""
    model = build()
    spec = ModelSpec.of(model)
    frozen = StepCost(spec, LENGTH)
    config = sparseft.SylvaConfig(sparsity=0.9, block_size=8, importance="random", layers="upper:0.5")
    trained = Trained.of(sparseft.attach(model, config), spec)
    assert sum(trained.weights.values()) == pytest.approx(0.1 * spec.weights_in(None), rel=0.01)
    plain, recomputed = frozen.step(trained), frozen.step(trained, checkpointing=True)
    assert recomputed - plain == pytest.approx(frozen.forward() / 2)
    assert frozen.step(Trained({}), checkpointing=True) - frozen.floor() == pytest.approx(frozen.forward())
    own = 2.0 * sum(trained.weights.values())
    head = 2.0 * frozen.head
    lowest = frozen.above(frozen.lowest(trained))
    assert plain == pytest.approx(frozen.forward() + lowest + own + head)


def test_the_plan_and_the_run_say_the_same() -> None:
    """Of a model without content as of a real one, with experts too: a token goes through some of them."""
    config = compose("train", ["method=sylva", "sparsity=0.9", "method.importance=random", "method.layers=upper:0.5"])
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    content = transformers.MixtralConfig(
        **sizes, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1, vocab_size=128
    )
    found = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(content)
        spec = ModelSpec.of(model)
        assert spec.active_experts == 0.25
        model = sparseft.attach(model, config.method)
        found.append(predicted_floors(model, spec, config, length=16, labelled=1.0))
    assert found[0] == found[1] < 0.9

"""No wasted backward: below the lowest trained layer no gradient is computed, and nothing is saved for one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils._pytree import tree_leaves

import sparseft
from sparseft.adapters.lifecycle import attach
from sparseft.config import HardwareConfig, TrainerConfig
from sparseft.data.packing import Collator
from sparseft.data.tokenized import TokenizedDataset
from sparseft.memory import SavedBytes
from sparseft.methods import get_method
from sparseft.training.arguments import training_arguments
from sparseft.training.trainer import Trainer, train
from support.products import Products

LAYERS = 4
TOP = {
    "down": ({"d_ratio": 0.1}, "mlp.down_proj"),
    "o": ({"o_ratio": 0.5}, "self_attn.o_proj"),
    "q": ({"q_ratio": 0.5}, "self_attn.q_proj"),
}


def build(layers: int = LAYERS) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=layers, num_attention_heads=6,
        num_key_value_heads=2, head_dim=12, max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def attached(ratios: dict[str, float], scope: str | None) -> Any:
    model = sparseft.attach(build(), sparseft.S2FTConfig(**ratios, scope=scope))
    return model.train()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def backward_products(loss: torch.Tensor) -> int:
    with Products() as counter:
        loss.backward()
    return sum(counter.found.values())


def floor_products() -> int:
    """Of the frozen model whose embeddings' output has a gradient."""
    plain = build().train().requires_grad_(False)
    x = plain.get_input_embeddings()(batch()["input_ids"]).requires_grad_(True)
    return backward_products(plain(inputs_embeds=x, labels=batch()["labels"]).loss)


@pytest.mark.parametrize("role", TOP)
def test_below_the_lowest_trained_linear_nothing_has_a_gradient(role: str) -> None:
    ratios, lowest = TOP[role]
    model = attached(ratios, f"layers.{LAYERS - 1}.")
    wanted: dict[str, bool] = {}

    def note(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, torch.Tensor):
                wanted[name] = output.requires_grad

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(note(name))
    model(**batch())
    for name, found in wanted.items():
        below = name.startswith(tuple(f"model.layers.{i}" for i in range(LAYERS - 1)))
        if below or name in ("model.embed_tokens", "model.rotary_emb", f"model.layers.{LAYERS - 1}.input_layernorm"):
            assert not found, name
    assert wanted[f"model.layers.{LAYERS - 1}.{lowest}"]


@pytest.mark.parametrize(
    ("role", "products"),
    [
        # lm_head's input gradient, and the gradient of the delta: down's own input needs none.
        ("down", 2),
        # lm_head, down, gate and up, and the delta of o.
        ("o", 5),
        # lm_head, down, gate, up, o, two of the scores (values and keys need none), and the delta of q.
        ("q", 8),
    ],
)
def test_backward_makes_no_product_too_many(role: str, products: int) -> None:
    ratios, _ = TOP[role]
    assert backward_products(attached(ratios, f"layers.{LAYERS - 1}.")(**batch()).loss) == products


def test_every_layer_trained_costs_one_product_more_for_each_delta() -> None:
    """Against the model whose embeddings' output has a gradient: the frozen model's backward and the deltas' products,
    less the lowest down's input gradient and all that lies below it."""
    model = attached({"d_ratio": 0.1}, None)
    # Below the lowest down: its own input, gate, up, and attention with q, k, v, o and 4 products of scores and values.
    assert backward_products(model(**batch()).loss) == floor_products() + LAYERS - (1 + 2 + 4 + 4)


ALL_LINEARS: dict[str, dict[str, Any]] = {
    "s2ft": {"roles": ["q", "k", "v", "o", "gate", "up", "down"], "sparsity": 0.8},
    "sylva": {"sparsity": 0.8, "block_size": 16, "importance": "random"},
    "paca": {"sparsity": 0.8},
    "lora": {"rank": 2, "dropout": 0.0},
}


@pytest.mark.parametrize("method", ALL_LINEARS)
def test_with_any_method_no_gradient_goes_below_the_lowest_trained_layer(method: str) -> None:
    """Neither to the layers below, nor, in that layer, to its norm, the rotary embeddings and the residual."""
    settings = get_method(method)(**ALL_LINEARS[method], scope=f"layers.{LAYERS - 1}.")
    model = attach(build(), settings).train()
    seen: dict[str, bool] = {}
    for name, module in model.named_modules():
        if name.endswith(("norm", "embed_tokens", "rotary_emb")) or name.rpartition(".")[2].isdigit():
            module.register_forward_hook(
                lambda m, i, o, n=name: seen.update({n: any(t.requires_grad for t in tree_leaves(o))})
            )
    model(**batch()).loss.backward()
    last = f"layers.{LAYERS - 1}"
    wanted = {name for name, found in seen.items() if found}
    assert all(name.endswith((last, f"{last}.post_attention_layernorm", "model.norm")) for name in wanted), wanted
    assert len(wanted) == 3


@pytest.mark.parametrize("method", ["s2ft", "paca"])
def test_all_linears_trained_cost_a_product_each_and_save_the_lowest_inputs(method: str) -> None:
    """Against the model whose embeddings' output has a gradient: less q's, k's and v's input gradients in layer 0."""
    model = attach(build(), get_method(method)(**ALL_LINEARS[method])).train()
    assert backward_products(model(**batch()).loss) == floor_products() + 7 * LAYERS - 3


def test_nothing_is_saved_below_the_lowest_trained_linear() -> None:
    model = attached({"d_ratio": 0.1}, f"layers.{LAYERS - 1}.")
    saved, at = SavedBytes(model), {}
    down = model.get_submodule(f"model.layers.{LAYERS - 1}.mlp.down_proj")
    down.register_forward_pre_hook(lambda m, i: at.update(down=saved.total))
    with saved.counting():
        model(**batch())
    assert at["down"] == 0 < saved.total


METHODS: dict[str, Any] = {
    "s2ft": lambda layers: sparseft.S2FTConfig(sparsity=0.95, layers=layers),
    "s2ft, by flops": lambda layers: sparseft.S2FTConfig(sparsity=0.96, allocation="flops", layers=layers),
    "s2ft, all roles": lambda layers: sparseft.S2FTConfig(
        q_ratio=0.5, k_ratio=0.5, v_ratio=0.5, o_ratio=0.5, g_ratio=0.1, u_ratio=0.1, d_ratio=0.1, layers=layers
    ),
    "s2ft, permuted": lambda layers: sparseft.S2FTConfig(d_ratio=0.1, layout="permuted", layers=layers),
    "sylva": lambda layers: sparseft.SylvaConfig(importance="random", sparsity=0.9, block_size=4, layers=layers),
    "paca": lambda layers: sparseft.PacaConfig(rank=2, layers=layers),
    "lora": lambda layers: sparseft.LoraConfig(rank=2, layers=layers),
    "dora": lambda layers: sparseft.DoraConfig(rank=2, layers=layers),
    "full": lambda layers: sparseft.FullConfig(layers=layers),
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_flows_below_the_layers_that_were_asked_for(method: str, recomputed: bool) -> None:
    """By hooks on what each decoder layer and the embeddings give: a tensor without a gradient gets none."""
    model = sparseft.attach(build(), METHODS[method]("upper:0.5")).train()
    if recomputed:  # the Trainer's kind, without the hook on the embeddings that it takes back
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    flowed: list[int] = []

    def watch(number: int) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if output.requires_grad:
                output.register_hook(lambda grad: flowed.append(number))

        return hook

    inner.model.embed_tokens.register_forward_hook(watch(-1))
    for number, layer in enumerate(inner.model.layers):
        layer.register_forward_hook(watch(number))
    model(**batch()).loss.backward()
    lowest = LAYERS - 1 if "flops" in method else LAYERS // 2  # which has room for all
    assert sorted(set(flowed)) == list(range(lowest, LAYERS))
    for name, parameter in sparseft.trainable_parameters(model).items():
        assert parameter.grad is not None, name


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:None of the inputs")
def test_reentrant_checkpoints_start_where_they_are_given_a_gradient() -> None:
    """Their kind needs an input with one, so that nothing trains without; transformers asks for it at the embeddings
    (`enable_input_require_grads`), and the gradient then flows through all layers."""
    for asked in (False, True):
        model = sparseft.attach(build(), METHODS["s2ft"]("upper:0.5")).train()
        model.gradient_checkpointing_enable({"use_reentrant": True})
        if not asked:
            model.disable_input_require_grads()
        found: list[bool] = []
        model.model.layers[0].register_forward_hook(
            lambda m, i, output, found=found: found.append(
                (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )
        loss = model(**batch()).loss
        assert loss.requires_grad == asked and found[0] == asked


def test_recomputation_starts_at_the_lowest_trained_layer(tmp_path: Path) -> None:
    """transformers asks the embeddings' output for a gradient, so that the layers below would be computed twice."""
    model = attached({"d_ratio": 0.1}, f"layers.{LAYERS - 2}.")
    calls: Counter[int] = Counter()
    for number in range(LAYERS):
        model.model.layers[number].mlp.register_forward_pre_hook(lambda m, i, n=number: calls.update([n]))
    arguments = training_arguments(
        TrainerConfig(max_steps=1, batch_size=2, gradient_accumulation=1, learning_rate=1e-2, warmup_steps=0),
        HardwareConfig(gradient_checkpointing=True),
        seed=0, device=torch.device("cpu"), total_steps=1,
    )  # fmt: skip
    data = TokenizedDataset.from_lists([(list(range(3, 12)), list(range(3, 12)))] * 2)
    trainer = Trainer(
        model, arguments, run=tmp_path, save_total_limit=1, train_dataset=data, eval_dataset=None,
        data_collator=Collator(0), processing_class=None,
    )  # fmt: skip
    train(trainer, None, 1)
    assert [calls[number] for number in range(LAYERS)] == [1, 1, 2, 2]
    (delta,) = sparseft.trainable_parameters(model).values()
    assert delta.abs().max() > 0


def test_a_frozen_norm_saves_only_what_its_input_gradient_needs() -> None:
    """As much as the same function of a constant weight; a weight that trains costs its normalised input too."""
    norm = build(1).model.norm

    def saved(trains: bool, dtype: torch.dtype) -> int:
        module = norm.to(dtype).requires_grad_(trains)
        counter, x = SavedBytes(module), torch.randn(4, 9, 48, dtype=dtype, requires_grad=True)
        with counter.counting():
            module(x * 1.0)
        return counter.total

    for dtype in (torch.float32, torch.bfloat16):
        frozen, thawed = saved(False, dtype), saved(True, dtype)
        assert frozen < thawed
        # x in fp32 (for its square and for the product) and one number a token (the rsqrt and its result)
        assert frozen <= 4 * 9 * (2 * 48 + 3) * 4
    embedding = build(1).model.embed_tokens.requires_grad_(False)
    counter = SavedBytes(embedding)
    with counter.counting():
        embedding(batch()["input_ids"])
    assert counter.total == 0

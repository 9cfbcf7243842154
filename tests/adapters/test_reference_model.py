"""`reference_model`: the base under an attached model, beside a base of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset

import sparseft
from sparseft.config import BUNDLED_ROOT
from sparseft.layers import sparse_layers
from sparseft.layers.inactive import swap
from support import adapted
from support.nf4 import quantize

SUMS = [(a, b) for a in range(2, 6) for b in range(3, 9)]
PAIRS = [{"prompt": f"{a}+{b}=", "chosen": f" {a + b}.", "rejected": f" {a * b}."} for a, b in SUMS]
ALONE = [{"prompt": f"{a}+{b}=", "completion": f" {a + b * (b % 2)}.", "label": b % 2 == 1} for a, b in SUMS]
CONFIGS = {
    "s2ft": sparseft.S2FTConfig(sparsity=0.9, importance="random"),
    "permuted": sparseft.S2FTConfig(sparsity=0.9, importance="random", layout="permuted"),
    "sylva": sparseft.SylvaConfig(sparsity=0.9, importance="random"),
    "paca": sparseft.PacaConfig(sparsity=0.9, importance="random"),
    "losia": sparseft.LosiaConfig(sparsity=0.9, importance="random"),
    "lora": sparseft.LoraConfig(rank=2, dropout=0),
}
IDS = torch.arange(3, 40).view(1, -1)


def base() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(BUNDLED_ROOT / "tiny", dtype=torch.float32)


def moved(model: Any) -> Any:
    """The model with deltas that are not zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in sparse_layers(model).values():
            for pattern in layer.patterns.values():
                pattern.delta.copy_(0.1 * torch.randn(pattern.delta.shape, generator=generator))
            layer.write_back()
    return model


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_as_the_base_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    config = sparseft.SylvaConfig(sparsity=0.9, importance="random", block_size=4)
    plain = adapted.build(kind, dtype)
    expected = logits(copy.deepcopy(plain).eval())
    model = moved(sparseft.attach(plain, config)).eval()
    before, answer = weights(model), logits(model)
    reference = sparseft.reference_model(model)
    found = logits(reference)
    assert torch.equal(found, expected) and not found.requires_grad and not torch.equal(answer, expected)
    assert same(weights(model), before) and torch.equal(logits(model), answer)
    assert reference.config is model.config and isinstance(reference, type(model))
    assert not list(reference.parameters()) and (reference.device, reference.dtype) == (model.device, model.dtype)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "lora"])
def test_a_backward_pass_goes_through_what_was_computed_before(name: str) -> None:
    model, alone = (moved(sparseft.attach(base(), CONFIGS[name])) for _ in range(2))
    reference = sparseft.reference_model(model)
    loss = logits(model).square().mean()
    reference.train()  # its modules are the model's, in whose mode they stay
    logits(reference)
    loss.backward()
    logits(alone).square().mean().backward()
    for (of, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        if ours.requires_grad:
            assert torch.equal(ours.grad, theirs.grad) and ours.grad.any(), of


def test_of_a_packed_base_it_is_the_packed_one() -> None:
    packed = quantize(base())
    expected = logits(packed)
    model = moved(sparseft.attach(packed, CONFIGS["s2ft"]))
    answer, reference = logits(model), sparseft.reference_model(model)
    assert torch.equal(logits(reference), expected) and not torch.equal(answer, expected)
    assert torch.equal(logits(model), answer)
    loss = answer.square().mean()
    logits(reference)
    loss.backward()


def test_what_waits_of_another_selection_is_not_in_the_base() -> None:
    model = moved(sparseft.attach(base(), sparseft.S2FTConfig(sparsity=0.9, importance="random")))
    for layer in sparse_layers(model).values():
        for kind, pattern in layer.patterns.items():
            size = layer.in_features if kind == "columns" else layer.out_features
            swap(layer, kind, (pattern.index + 1) % size)
    moved(model)
    before = weights(model)
    assert torch.equal(logits(sparseft.reference_model(model)), logits(base()))
    assert same(weights(model), before)


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = moved(sparseft.attach(base(), CONFIGS["s2ft"]))
    before, reference = weights(model), sparseft.reference_model(model)
    with pytest.raises(IndexError):
        reference(input_ids=torch.tensor([[10**6]]))
    assert same(weights(model), before) and torch.is_grad_enabled()
    assert torch.equal(logits(reference), logits(base()))


def test_nothing_is_done_to_the_model_through_it() -> None:
    model = moved(sparseft.attach(base(), CONFIGS["s2ft"]))
    before, trained = weights(model), list(sparseft.trainable_parameters(model))
    reference = sparseft.reference_model(model).eval().requires_grad_(False)
    assert trained and list(sparseft.trainable_parameters(model)) == trained and model.training is False
    sync = pytest.importorskip("trl.trainer.callbacks").SyncRefModelCallback._sync_target_model
    with pytest.raises(ValueError, match="zip"):
        sync(model, reference, 0.6)
    assert same(weights(model), before)


def test_what_it_generates_is_the_bases_and_what_is_not_is_refused(tmp_path: Any) -> None:
    model = moved(sparseft.attach(base(), CONFIGS["s2ft"]))
    before, reference = weights(model), sparseft.reference_model(model)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found = reference.generate(IDS, **options)
    assert torch.equal(found, base().generate(IDS, **options)) and same(weights(model), before)
    assert not torch.equal(found, model.generate(IDS, **options))
    with pytest.raises(sparseft.UserError, match=r"^adapter_names: this is the base of all rows"):
        reference(input_ids=IDS, adapter_names=["default"])
    with pytest.raises(sparseft.UserError, match=r"^reference_model: it has no weights of its own to save"):
        reference.save_pretrained(tmp_path / "out")
    with pytest.raises(sparseft.UserError, match="has no adapter"):
        sparseft.save_adapter(reference, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_without_a_base_below_them() -> None:
    with pytest.raises(sparseft.UserError, match=r"nothing is attached to this model; it is its own reference\.$"):
        sparseft.reference_model(base())
    with pytest.raises(sparseft.UserError, match=r"all weights of this model train, so that its base is gone"):
        sparseft.reference_model(sparseft.attach(base(), sparseft.FullConfig()))


@pytest.mark.parametrize("method", [sparseft.LoraConfig, sparseft.DoraConfig])
def test_of_lora_and_dora_it_is_the_base_too(method: Any, tmp_path: Any) -> None:
    """After a warm start and under any name; a backward pass goes through what was computed before."""
    model = sparseft.attach(base(), method(rank=2, dropout=0))
    with torch.no_grad():
        for name, parameter in sparseft.trainable_parameters(model).items():
            if "lora_B" in name:
                parameter.fill_(0.02)
    sparseft.save_adapter(model, tmp_path / "tuned")
    model, alone = (sparseft.load_adapter(base(), tmp_path / "tuned", "math") for _ in range(2))
    trained = list(sparseft.trainable_parameters(model))
    answer, reference = logits(model), sparseft.reference_model(model)
    assert torch.equal(logits(reference), logits(base())) and not torch.equal(answer, logits(base()))
    assert torch.equal(reference.generate(IDS, max_new_tokens=5), base().generate(IDS, max_new_tokens=5))
    assert not list(reference.parameters()) and list(sparseft.trainable_parameters(model)) == trained
    answer.square().mean().backward()
    logits(alone).square().mean().backward()
    for (of, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert (ours.grad is None) is (theirs.grad is None) and (
            ours.grad is None or torch.equal(ours.grad, theirs.grad)
        ), of
    assert torch.equal(logits(model), answer)


def test_of_a_lora_that_trains_the_bases_biases_it_is_the_base_too(tmp_path: Any) -> None:
    """A bias of a norm is kept for the backward pass, and counts as unchanged."""
    import peft

    plain = adapted.build("gpt2", torch.float32)
    expected = logits(copy.deepcopy(plain).eval())
    wrapped = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=2, target_modules=["c_attn"], bias="all"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if name.endswith(".bias"):
                parameter.add_(0.1)
    wrapped.save_pretrained(tmp_path / "biased")
    model = sparseft.load_adapter(plain, tmp_path / "biased").eval()
    answer, reference = logits(model), sparseft.reference_model(model)
    assert torch.equal(logits(reference), expected) and not torch.equal(answer, expected)
    answer.square().mean().backward()
    assert torch.equal(logits(model), answer)


@pytest.mark.parametrize(
    ("name", "of", "options"),
    [
        ("s2ft", "DPO", {}),
        ("sylva", "DPO", {"loss_type": ["ipo"], "gradient_checkpointing": False, "gradient_accumulation_steps": 2}),
        ("permuted", "DPO", {"loss_type": ["sigmoid_norm"]}),
        ("sylva", "KTO", {}),
        ("lora", "DPO", {}),
        ("lora", "KTO", {}),
    ],
)
def test_trl_trains_as_with_a_second_model(name: str, of: str, options: dict[str, Any], tmp_path: Any) -> None:
    trl = pytest.importorskip("trl")

    def trained(reference: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model = sparseft.attach(base(), CONFIGS[name])
        arguments = getattr(trl, f"{of}Config")(
            str(tmp_path / "out"), use_cpu=True, bf16=False, report_to=[], max_steps=4, per_device_train_batch_size=4,
            logging_steps=1, learning_rate=1e-2, disable_tqdm=True, save_strategy="no", max_length=64, **options,
        )  # fmt: skip
        tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED_ROOT / "tiny")
        data = Dataset.from_list(PAIRS if of == "DPO" else ALONE)
        trainer = getattr(trl, f"{of}Trainer")(
            model, ref_model=reference(model), args=arguments, train_dataset=data, processing_class=tokenizer
        )
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        return [{k: v for k, v in line.items() if "runtime" not in k} for line in lines], weights(model)

    ours, mine = trained(sparseft.reference_model)
    theirs, other = trained(lambda model: base())
    if name == "permuted":  # its sums run in another order than the second model's
        assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], abs=1e-5)
    else:
        assert ours == theirs and same(mine, other)
    assert ours[-1]["loss"] != ours[0]["loss"]


@pytest.mark.parametrize("name", ["s2ft", "lora"])
def test_it_is_without_dropout_whatever_the_models_mode(name: str) -> None:
    config = transformers.GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=64)  # drops out a tenth
    plain = transformers.GPT2LMHeadModel(config).eval()
    expected = logits(copy.deepcopy(plain))
    model = moved(sparseft.attach(plain, CONFIGS[name]))
    reference = sparseft.reference_model(model)
    model.train()
    modes = [module.training for module in model.modules()]
    before = weights(model)
    assert torch.equal(logits(reference), expected) and reference.training is False
    assert [module.training for module in model.modules()] == modes and same(weights(model), before)
    assert not torch.equal(logits(model), logits(model))

"""The loss of labelled tokens alone, in chunks, is the plain loss, with its gradients, whatever the model does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import sparseft
from sparseft.compose.run_config import compose
from sparseft.data.packing import Collator
from sparseft.memory import AllocationCounter
from sparseft.models import head
from sparseft.models.labelled_loss import ROWS, label_rows, labelled_loss, usable, why_plain
from support.experts import build
from support.running import sparseft as sparseft_cli

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS = {
    "capped": lambda: transformers.Gemma2Config(
        **SMALL, final_logit_softcapping=0.5, head_dim=8, num_key_value_heads=2
    ),
    "scaled": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=0.3),
    "multiplied": lambda: transformers.CohereConfig(**SMALL, logit_scale=3.0),
    "llama4": lambda: transformers.Llama4TextConfig(
        **SMALL, head_dim=8, num_key_value_heads=2, intermediate_size_mlp=48, num_local_experts=2
    ),
    "gemma4": lambda: transformers.Gemma4TextConfig(
        **SMALL, head_dim=8, global_head_dim=8, num_key_value_heads=2, final_logit_softcapping=0.5,
        layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=96,
    ),
    "gemma3, with a tower for images": lambda: transformers.Gemma3Config(
        text_config=SMALL | {"head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 0.5},
        vision_config=SMALL | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4,
    ),
}  # fmt: skip
METHODS: dict[str, Any] = {
    "s2ft": lambda: sparseft.S2FTConfig(d_ratio=0.2, o_ratio=0.3),
    "sylva": lambda: sparseft.SylvaConfig(importance="random", block_size=4, sparsity=0.8),
    "lora": lambda: sparseft.LoraConfig(rank=2, dropout=0.0),
    "full": lambda: sparseft.FullConfig(),
}


def made(make_model: Callable[..., Any], kind: str, dtype: torch.dtype = torch.float32) -> Any:
    if kind not in HEADS:
        return make_model(kind).to(dtype)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(HEADS[kind]()).to(dtype).eval()


def batch_of(vocabulary: int, packed: bool = False) -> dict[str, Tensor]:
    """Three rows, of which one has no label and one is padded."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for length, prompt in ((11, 4), (7, 7), (9, 2)):
        ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
        example = {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}
        if packed:
            example["position_ids"] = [*range(4), *range(length - 4)]
        examples.append(example)
    return Collator(0)(examples)


def loss_and_gradients(model: Any, **batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(model: Any, batch: dict[str, Tensor], tolerance: float, **more: Any) -> None:
    wanted, plain = loss_and_gradients(model, **batch, **more)
    with labelled_loss(model):
        found, ours = loss_and_gradients(model, **batch, **more)
    assert "forward" not in vars(model) and not any(m._forward_hooks for m in model.modules() if m is not model)
    torch.testing.assert_close(found, wanted.float(), rtol=tolerance, atol=0.0)
    assert ours.keys() == plain.keys() and plain
    for name, gradient in plain.items():
        scale = float(gradient.float().abs().max())
        torch.testing.assert_close(ours[name], gradient, rtol=tolerance, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("tokens", [1, 4, 1000], ids=["one-token", "four-tokens", "all-tokens"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(
    make_model: Callable[..., Any], method: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sparseft.attach(make_model("llama"), METHODS[method]())
    monkeypatch.setattr(head, "LOGITS_CPU", model.config.get_text_config().vocab_size * tokens)
    batch = batch_of(model.config.get_text_config().vocab_size)
    assert why_plain(model) is None
    compare(model, batch, 1e-6)
    compare(model, batch, 1e-6, num_items_in_batch=torch.tensor(29))
    wanted = model(**batch).loss
    with labelled_loss(model):
        assert model(**batch, **{ROWS: label_rows(batch["labels"])}).loss.isclose(wanted)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", *HEADS])
def test_every_head(make_model: Callable[..., Any], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Capped, scaled and multiplied logits; trained and tied heads (gpt2's)."""
    model = made(make_model, kind)
    vocabulary = model.config.get_text_config().vocab_size
    monkeypatch.setattr(head, "LOGITS_CPU", vocabulary * 4)
    assert why_plain(model) is None
    compare(model, batch_of(vocabulary), 1e-6)


def test_packed_rows(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    compare(model, batch_of(model.config.get_text_config().vocab_size, packed=True), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_fp32_as_the_plain_way(make_model: Callable[..., Any], dtype: torch.dtype) -> None:
    model = sparseft.attach(make_model("llama").to(dtype), METHODS["s2ft"]())
    exact = sparseft.attach(make_model("llama").to(dtype), METHODS["s2ft"]()).float()
    batch = batch_of(model.config.get_text_config().vocab_size)
    truth, wanted = loss_and_gradients(exact, **batch)
    plain_loss, plain = loss_and_gradients(model, **batch)
    with labelled_loss(model):
        loss, ours = loss_and_gradients(model, **batch)
    assert abs(loss - truth) <= 1.5 * abs(plain_loss - truth) + 1e-3
    for name in plain:
        error, before = ((each[name].float() - wanted[name]).norm() for each in (ours, plain))
        assert error <= 1.2 * before + 1e-6, name


def test_activations_are_recomputed_as_ever(make_model: Callable[..., Any]) -> None:
    model = sparseft.attach(make_model("llama"), METHODS["s2ft"]()).train()
    batch = batch_of(model.config.get_text_config().vocab_size)
    wanted, plain = loss_and_gradients(model, **batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with labelled_loss(model):
        found, ours = loss_and_gradients(model, **batch)
    torch.testing.assert_close(found, wanted)
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient)


def test_evaluation_and_generation(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    batch = batch_of(model.config.get_text_config().vocab_size)
    prompt = batch["input_ids"][:, :4]
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        wanted, answer = model(**batch).loss, model.generate(prompt, **options)
        with labelled_loss(model):
            torch.testing.assert_close(model(**batch, use_cache=False).loss, wanted)
            assert torch.equal(model.generate(prompt, **options), answer)
            assert model(input_ids=prompt).logits.shape[:2] == prompt.shape


def test_a_batch_without_labels_has_no_loss(make_model: Callable[..., Any]) -> None:
    model = sparseft.attach(make_model("llama"), METHODS["s2ft"]())
    batch = batch_of(model.config.get_text_config().vocab_size)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with labelled_loss(model):
        assert model(**batch).loss.isnan()
        loss, gradients = loss_and_gradients(model, **batch, num_items_in_batch=torch.tensor(5))
    assert loss == 0 and not any(gradient.any() for gradient in gradients.values())


def test_logits_of_few_tokens_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shape = SMALL | {"vocab_size": 5000}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shape))
    model = sparseft.attach(model, METHODS["s2ft"]())
    batch = {"input_ids": (ids := torch.randint(5000, (4, 64))), "labels": ids}
    monkeypatch.setattr(head, "LOGITS_CPU", 5000 * 8)
    peaks = []
    for way in (None, labelled_loss(model)):
        if way is not None:
            way.__enter__()
        with AllocationCounter() as counter:
            loss_and_gradients(model, **batch)
        peaks.append(counter.peak)
    way.__exit__(None, None, None)
    logits = 4 * 64 * 5000 * 4
    assert peaks[0] > 2 * logits and peaks[1] < logits


def test_losses_that_are_others_are_left_to_their_models(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    plain = model.forward

    def weighted(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        if output.loss is not None:
            output.loss = output.loss * 1.5
        return output

    model.forward = weighted
    assert "cross-entropy" in str(why_plain(model))
    mixtral = build("mixtral").eval()
    mixtral.config.output_router_logits = True
    assert "experts" in str(why_plain(mixtral))
    mixtral.config.output_router_logits = False
    assert why_plain(mixtral) is None


@pytest.mark.parametrize("where", ["logits", "loss"])
def test_memory_that_runs_out_says_nothing_of_the_model(where: str, make_model: Any) -> None:
    model = make_model("llama")
    plain = model.forward

    def full(*args: Any, **given: Any) -> Any:
        if where == "logits" or "labels" in given:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(*args, **given)

    model.forward = full
    with pytest.raises(torch.OutOfMemoryError):
        why_plain(model)


def test_terms_of_a_models_own_are_kept() -> None:
    """The loss by which a model trains has them whatever the size of their weight."""
    heads = {"num_key_value_heads": 2, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
    config = transformers.BambaConfig(**SMALL, **heads, attn_layer_indices=[1], z_loss_coefficient=1e-3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    batch = batch_of(96)
    own = model(**batch).loss.detach()
    model.z_loss_coefficient = 0.0
    assert model(**batch).loss < own - 1e-3
    assert "of its own" in str(why_plain(model))
    text = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                    "moe_intermediate_size": 16, "output_router_logits": True}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0]})
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    assert "experts" in str(why_plain(model))


# ---- runs ----

NUMBERS = ("loss", "eval_loss", "grad_norm")


def test_a_run_is_the_plain_one(tmp_path: Path) -> None:
    words = [
        "train",
        "method=s2ft",
        "trainer.max_steps=3",
        "trainer.logging_steps=1",
        "trainer.gradient_accumulation=2",
    ]
    losses = []
    for way in ("auto", "plain"):
        done = sparseft_cli(tmp_path, *words, f"trainer.loss={way}", f"output_dir={way}")
        assert "logits of all tokens" not in done.err
        lines = [json.loads(line) for line in (tmp_path / way / "metrics.jsonl").read_text().splitlines()]
        losses.append([value for line in lines for name, value in line.items() if name in NUMBERS])
    for ours, plain in zip(*losses, strict=True):
        assert ours == pytest.approx(plain, rel=1e-5)


def test_a_compiled_model_says_that_it_keeps_its_loss(make_model: Callable[..., Any], capsys: Any) -> None:
    config = compose("train", ["trainer.compile=model"])
    assert not usable(make_model("llama"), config)
    assert "loss: logits of all tokens, as trainer.compile=model takes the whole model" in capsys.readouterr().err
    assert usable(make_model("llama"), compose("train", []))
    assert not usable(make_model("llama"), compose("train", ["trainer.loss=plain"]))

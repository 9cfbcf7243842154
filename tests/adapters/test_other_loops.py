"""Attached models in loops that are not ours: transformers' Trainer, accelerate, TRL and bare PyTorch.

The oracle is the plain model, in the same loop with the same batches, whose gradients are masked to the same entries.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparseft
from sparseft.cli.app import main
from sparseft.console import recorded_warnings
from sparseft.errors import UserError
from sparseft.kernels import reference
from sparseft.layers import sparse_layers
from support import adapters
from support.models import build_model, build_tokenizer

SPARSE = ("s2ft", "sylva", "paca")
ALL = (*SPARSE, "lora", "full")
TOLERANCE = {"rtol": 1e-4, "atol": 5e-5}
IDS = torch.arange(3, 40)[None]


def config_of(method: str) -> Any:
    if method in adapters.METHODS:
        return adapters.METHODS[method](0)
    return sparseft.LoraConfig(rank=2) if method == "lora" else sparseft.FullConfig()


def attached(method: str, kind: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return sparseft.attach(adapters.build(kind, dtype), config_of(method))


def masked(method: str, kind: str = "llama") -> Any:
    """The plain model, of which a training changes the entries that `attached` trains and no others."""
    model = adapters.build(kind).requires_grad_(method == "full")
    if method == "full":
        return model
    for name, layer in sparse_layers(attached(method, kind)).items():
        mask = torch.zeros(layer.out_features, layer.in_features)
        for pattern in layer.patterns.values():
            reference.scatter_(mask, pattern.kind, pattern.index, torch.ones_like(pattern.delta), pattern.block_size)
        mask = mask.t() if layer.transposed else mask
        model.get_submodule(name).weight.requires_grad_(True).register_hook(lambda grad, mask=mask: grad * mask)
    return model


def examples(count: int = 16) -> list[dict[str, list[int]]]:
    ids = torch.randint(3, 60, (count, 12), generator=torch.Generator().manual_seed(5)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def batches(count: int = 8) -> list[dict[str, Tensor]]:
    ids = torch.tensor([example["input_ids"] for example in examples(2 * count)])
    return [{"input_ids": rows, "labels": rows} for rows in ids.view(count, 2, -1)]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits.float()


def weights_of(model: Any) -> dict[str, Tensor]:
    """The plain weights, with what was learnt in them."""
    state = model.state_dict()
    return {name: value for name, value in state.items() if not {"rows", "columns", "blocks"} & set(name.split("."))}


# ---- transformers.Trainer ----


def trained(model: Any, folder: Path, resume: Path | None = None, **options: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, learning_rate=1e-2, weight_decay=0.0, logging_steps=1,
        warmup_steps=1, use_cpu=True, report_to=[], disable_tqdm=True,
        **{"max_steps": 4, "save_strategy": "no", "gradient_accumulation_steps": 2, **options},
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=examples(), eval_dataset=examples(4))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def losses(trainer: transformers.Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, {}) for method in (*SPARSE, "full")),
        ("sylva", {"gradient_checkpointing": True}),
        ("s2ft", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        pytest.param("s2ft", {"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow),
        ("paca", {"optim": "sgd"}),
    ],
)
def test_transformers_trainer_trains_as_the_dense_oracle(method, options, tmp_path):
    ours, dense = (trained(make(method), tmp_path, **options) for make in (attached, masked))
    assert losses(ours) == pytest.approx(losses(dense), abs=1e-5)
    torch.testing.assert_close(logits(ours.model), logits(dense.model), **TOLERANCE)


@pytest.mark.parametrize("method", ALL)
def test_transformers_trainer_resumes_exactly(method, tmp_path):
    whole = trained(attached(method), tmp_path, save_strategy="steps", save_steps=2)
    again = trained(attached(method), tmp_path, tmp_path / "checkpoint-2", save_strategy="steps", save_steps=2)
    assert losses(again) == losses(whole)
    assert torch.equal(logits(again.model), logits(whole.model))
    for name, parameter in sparseft.trainable_parameters(again.model).items():
        assert torch.equal(parameter, sparseft.trainable_parameters(whole.model)[name])


@pytest.mark.parametrize("method", SPARSE)
def test_a_resumed_trainer_takes_the_selection_of_the_checkpoint(method, tmp_path):
    whole = trained(attached(method), tmp_path, save_strategy="steps", save_steps=2)
    other = sparseft.attach(adapters.build("llama"), adapters.METHODS[method](1))  # another seed
    again = trained(other, tmp_path, tmp_path / "checkpoint-2")
    assert torch.equal(logits(again.model), logits(whole.model))
    sparseft.save_adapter(other, tmp_path / "adapter")
    loaded = sparseft.load_adapter(adapters.build("llama"), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(whole.model))
    assert torch.equal(logits(sparseft.detach(other)), logits(adapters.build("llama")))


@pytest.mark.parametrize("method", SPARSE)
def test_a_resumed_trainer_keeps_what_experts_have_learnt(method, tmp_path):
    whole = trained(attached(method, "mixtral"), tmp_path, save_strategy="steps", save_steps=2)
    again = trained(attached(method, "mixtral"), tmp_path, tmp_path / "checkpoint-2", save_strategy="steps")
    assert torch.equal(logits(again.model), logits(whole.model))


@pytest.mark.parametrize("method", ["s2ft", "lora"])
def test_the_best_model_is_loaded_at_the_end(method, tmp_path):
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3}
    trainer = trained(attached(method), tmp_path, load_best_model_at_end=True, **options)
    seen = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert trainer.evaluate()["eval_loss"] == min(seen)
    sparseft.save_adapter(trainer.model, tmp_path / "mine")
    loaded = sparseft.load_adapter(adapters.build("llama"), tmp_path / "mine")
    assert torch.equal(logits(loaded), logits(trainer.model))


# ---- what save_model leaves ----


@pytest.mark.parametrize(
    ("kind", "method", "dtype"),
    [
        *itertools.product(("llama", "mixtral"), SPARSE, [torch.float32]),
        *itertools.product(("gpt2", "phi3"), ("s2ft", "sylva"), [torch.bfloat16]),
        ("mixtral", "sylva", torch.bfloat16),
    ],
)
def test_save_pretrained_leaves_a_model_and_its_adapter(kind, method, dtype, tmp_path):
    model = adapters.randomise(attached(method, kind, dtype))
    model.save_pretrained(tmp_path / "saved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    expected = weights_of(model)
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    again = sparseft.load_adapter(adapters.build(kind, dtype), tmp_path / "saved" / "adapter")
    assert torch.equal(logits(again), logits(model))
    fresh = attached(method, kind, dtype)
    outcome = fresh.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"), strict=False)
    assert not outcome.unexpected_keys
    assert torch.equal(logits(fresh), logits(model))
    plain = adapters.build(kind, dtype)
    assert torch.equal(logits(sparseft.detach(fresh)), logits(plain))


def test_save_pretrained_is_the_plain_models_again_once_detached(tmp_path):
    model = attached("s2ft")
    model.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / "adapter").is_dir()
    sparseft.set_adapter(model, None)
    model.save_pretrained(tmp_path / "base")
    assert not (tmp_path / "base" / "adapter").exists()
    sparseft.detach(model).save_pretrained(tmp_path / "two")
    assert not (tmp_path / "two" / "adapter").exists()
    copied = copy.deepcopy(attached("s2ft"))
    adapters.randomise(copied)
    copied.save_pretrained(tmp_path / "three")
    loaded = sparseft.load_adapter(adapters.build("llama"), tmp_path / "three" / "adapter")
    assert torch.equal(logits(loaded), logits(copied))  # of the copy, not of what it is a copy of


def test_save_pretrained_writes_nothing_over_other_files(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="adapter: the folder holds other files"):
        attached("s2ft").save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_is_pushed_has_the_adapter_too(tmp_path, monkeypatch):
    model, pushed = attached("s2ft"), []
    for how in (lambda: model.save_pretrained(tmp_path / "a", push_to_hub=True),
                lambda: model.save_pretrained(tmp_path / "a", True, None, True)):  # fmt: skip
        with pytest.raises(UserError, match=r"without the adapter: model\.push_to_hub\('owner/name'\) uploads both"):
            how()
    assert not (tmp_path / "a").exists()
    api = SimpleNamespace(
        create_repo=lambda name, **_: SimpleNamespace(repo_id=name),
        create_commit=lambda operations, **_: pushed.extend(each.path_in_repo for each in operations),
    )
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: api)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *_, **__: ModelCard("a card"))
    model.push_to_hub("owner/name")
    assert {"model.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= set(pushed)


# ---- accelerate ----


def accelerated(
    model: Any, precision: str = "no", save: Path | None = None, resume: Path | None = None
) -> tuple[Any, list[float]]:
    """Eight micro-steps in a loop of accelerate's, saved after four; the model (unwrapped) and the losses."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_steps=2, cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 4)
    wrapped, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    if resume is not None:
        accelerator.load_state(resume)
    wrapped.train()
    seen = []
    for number, batch in enumerate(batches()):
        if resume is not None and number < 4:
            continue
        with accelerator.accumulate(wrapped):
            loss = wrapped(**batch).loss
            accelerator.backward(loss)
            seen.append(loss.item())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if save is not None and number == 3:
            accelerator.save_state(save)
    return accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False), seen


@pytest.mark.parametrize("method", ALL)
def test_accelerate_trains_as_the_oracle_and_resumes_exactly(method, tmp_path):
    model, seen = accelerated(attached(method), save=tmp_path / "state")
    if method != "lora":
        dense, expected = accelerated(masked(method))
        assert seen == pytest.approx(expected, abs=1e-5)
        torch.testing.assert_close(logits(model), logits(dense), **TOLERANCE)
    again, rest = accelerated(attached(method), resume=tmp_path / "state")
    assert rest == seen[4:]
    assert torch.equal(logits(again), logits(model))
    sparseft.save_adapter(model, tmp_path / "adapter")
    if method != "full":
        loaded = sparseft.load_adapter(adapters.build("llama"), tmp_path / "adapter")
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("method", SPARSE)
def test_mixed_precision_is_as_good_as_on_the_dense_model(method):
    """By bf16's rounding: both are about as far from fp32."""
    exact = torch.tensor(accelerated(masked(method))[1])
    ours, dense = (torch.tensor(accelerated(make(method), "bf16")[1]) for make in (attached, masked))
    model = attached(method)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert (ours - exact).abs().max() < 2 * (dense - exact).abs().max() + 0.01


# ---- a bare loop ----


def bare(model: Any, make: Callable[[list[Any], Any], Any], scaler: bool = False, after: Any = None) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make(parameters, model)
    scale = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scaler)
    seen = []
    model.train()
    for batch in batches(6):
        loss = model(**batch).loss
        seen.append(loss.item())
        scale.scale(loss).backward()
        scale.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale.step(optimizer)
        scale.update()
        optimizer.zero_grad()
        if after is not None:
            after(model)
    return seen


def by_name(parameters: list[Any], model: Any) -> torch.optim.Optimizer:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if part in name], "lr": rate}
        for part, rate in (("self_attn", 1e-2), ("mlp", 3e-3))
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)


OPTIMIZERS = {
    "foreach": lambda p, _: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0, foreach=True),
    "fused": lambda p, _: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0, fused=True),
    "momentum": lambda p, _: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    "by_name": by_name,
}


@pytest.mark.parametrize(
    ("method", "optimizer", "scaler"),
    [*itertools.product(("s2ft", "sylva"), OPTIMIZERS, [False]), ("paca", "foreach", True), ("paca", "fused", True)],
)
def test_a_bare_loop_trains_as_the_oracle(method, optimizer, scaler):
    ours, dense = attached(method), masked(method)
    expected = bare(dense, OPTIMIZERS[optimizer], scaler)
    assert bare(ours, OPTIMIZERS[optimizer], scaler) == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(logits(ours), logits(dense), **TOLERANCE)


@pytest.mark.parametrize("method", SPARSE)
def test_an_average_of_the_model_is_that_of_the_dense_one(method):
    averages = []
    for model in (attached(method), masked(method)):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        bare(model, OPTIMIZERS["foreach"], after=average.update_parameters)
        averages.append(average)
    torch.testing.assert_close(logits(averages[0]), logits(averages[1]), **TOLERANCE)


def test_weights_follow_what_was_put_into_delta_data_when_the_mode_changes(tmp_path):
    """As libraries of averaged parameters do: nothing but the values shows it."""
    model = attached("s2ft").train()
    with torch.no_grad():
        for parameter in sparseft.trainable_parameters(model).values():
            parameter.data.copy_(torch.full_like(parameter, 0.05))
    found = logits(model)  # calls eval()
    assert not torch.equal(found, logits(adapters.build("llama")))
    sparseft.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(sparseft.load_adapter(adapters.build("llama"), tmp_path / "adapter")), found)


def warned(model: Any, folder: Path) -> str:
    before = len(recorded_warnings())
    sparseft.save_adapter(model, folder)
    return "\n".join(recorded_warnings()[before:])


def test_saving_says_that_the_model_did_not_follow_its_deltas(tmp_path):
    model = attached("sylva").eval()
    with torch.no_grad():
        for parameter in sparseft.trainable_parameters(model).values():
            parameter.add_(0.05)
    assert warned(model, tmp_path / "counted") == ""
    for parameter in sparseft.trainable_parameters(model).values():
        parameter.data.add_(0.05)
    assert "something wrote to delta.data" in warned(model, tmp_path / "hidden")


def test_saving_says_what_trains_beside_the_adapter(tmp_path):
    model = attached("s2ft")
    assert warned(model, tmp_path / "plain") == ""
    model.lm_head.weight.requires_grad_(True)
    assert "1 parameters train that no sparse adapter holds, so they are not saved in it (lm_head.weight)" in warned(
        model, tmp_path / "head"
    )


def test_what_a_trainer_saved_is_exported_and_loaded_by_peft(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    build_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    model = sparseft.attach(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config_of("sylva"))
    adapters.randomise(model, scale=0.05)
    model.save_pretrained(tmp_path / "saved")  # as trainer.save_model() does
    words = ["export", f"{tmp_path}/saved/adapter", "--format", "peft-lora", "--out", f"{tmp_path}/lora"]
    assert main([*words, f"model.path={tmp_path}/base"]) == 0
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), logits(model), **TOLERANCE)

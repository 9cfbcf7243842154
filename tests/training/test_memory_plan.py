"""`sparseft train --plan`: what it computes without weights is what training takes with them."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sparseft.adapters.lifecycle import attach, trainable_parameters
from sparseft.bench.train import Contender, measure_memory, step
from sparseft.commands import plan as command
from sparseft.compose.run_config import compose
from sparseft.errors import UserError
from sparseft.layers.saved_inputs import share_inputs_in_training
from sparseft.models.labelled_loss import usable
from sparseft.models.loading import load_config
from sparseft.models.spec import ModelSpec
from sparseft.selection.compute import as_trained
from sparseft.training import memory_plan as planning
from sparseft.training import recomputing
from sparseft.training.optimizer import SparseAdamW
from sparseft.training.reselection.running import Running
from support.places import SUPPORT
from support.running import files, on, refused, sparseft, write_data

BATCH, LENGTH = 2, 64
SPARSE = ("s2ft", "sylva")
LLAMA_70B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip


def contents() -> dict[str, Any]:
    common = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    llama = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, "num_attention_heads": 4}
    return {
        "llama": transformers.LlamaConfig(**llama, **common),
        "qwen2": transformers.Qwen2Config(**llama, **common, num_key_value_heads=2, tie_word_embeddings=True),
        "gemma2": transformers.Gemma2Config(**llama, **common, num_key_value_heads=2, head_dim=32),
        "phi3": transformers.Phi3Config(**llama, **common, num_key_value_heads=2),
        "opt": transformers.OPTConfig(
            hidden_size=128, ffn_dim=512, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=128, **common
        ),
        "gpt2": transformers.GPT2Config(n_embd=128, n_layer=3, n_head=4, **common),  # dropout: no fused kernel
        "mixtral": transformers.MixtralConfig(**llama, **common, num_key_value_heads=2, num_local_experts=4),
        "qwen3_moe": transformers.Qwen3MoeConfig(
            **llama,
            **common,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=96,
        ),
    }


def configured(method: str, *words: str) -> Any:
    budget = {"full": ["method.dtype=model"], "sylva": ["sparsity=0.95", "method.block_size=16"]}
    config = compose("train", [f"method={method}", *budget.get(method, ["sparsity=0.95"]), "hardware=cpu", *words])
    if hasattr(config.method, "dropout"):
        config.method.dropout = 0.0
    return config


def laid(ids: torch.Tensor, packed: bool) -> dict[str, torch.Tensor]:
    """What a batch brings of which one row is shorter, or whose rows hold two examples each."""
    places = torch.arange(ids.shape[1]).expand(ids.shape)
    if packed:
        return {"position_ids": places % (ids.shape[1] // 2)}
    shorter = torch.arange(len(ids)) == 1
    return {"attention_mask": (places < ids.shape[1] - shorter[:, None].long()).long()} if len(ids) > 1 else {}


def measured(config: Any, content: Any, dtype: torch.dtype, vocabulary: int = 256, length: int = LENGTH) -> int:
    """The peak of a real step, as `sparseft bench train` counts it."""
    settings = copy.deepcopy(config.method)
    if config.method_name in SPARSE:
        settings.importance = "random"
    model = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(content), dtype=dtype, attn_implementation=config.model.attn_implementation
    )
    model = attach(model, settings).train()
    if config.hardware.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    parameters = list(trainable_parameters(model).values())
    plain = functools.partial(torch.optim.AdamW, fused=True)  # as training has it
    optimizer = SparseAdamW if config.method_name in SPARSE else plain
    contender = Contender("", model, optimizer(parameters, lr=1e-4), 0, labelled=usable(model, config))
    contender.recomputed = recomputing.KINDS.get(config.checkpointing, ())
    share_inputs_in_training(model)
    ids = torch.randint(vocabulary, (BATCH, length))
    batch = {"input_ids": ids, "labels": ids, **laid(ids, config.dataset.packing)}
    step(contender, batch)  # from here on the optimizer has its state
    if settings.reselects_running:
        spec, steps = ModelSpec.of(model), settings.reselect_steps
        budget = as_trained(model, settings, spec=spec)
        Running(steps, model, spec, budget, order=settings.order, seed=0).look(steps - 1)
    measure_memory(contender, batch, torch.device("cpu"))
    return contender.peak_bytes


KINDS = ["llama", "qwen2", "gemma2", "phi3", "opt", "gpt2", "mixtral", "qwen3_moe"]
PLANNED = [(kind, method, checkpointing) for kind in KINDS for checkpointing in (False, True)
           for method in ("s2ft", "sylva", "lora", "dora", "full")]  # fmt: skip


def daily(kind: str, method: str, checkpointing: bool) -> bool:
    """Every method on one architecture, and on the others one."""
    return kind == "llama" or (method == "s2ft" and not checkpointing)


@pytest.mark.parametrize(("kind", "method", "checkpointing"), [
    each if daily(*each) else pytest.param(*each, marks=pytest.mark.slow) for each in PLANNED])  # fmt: skip
def test_the_plan_is_what_a_step_takes(kind: str, method: str, checkpointing: bool) -> None:
    config = configured(method, f"hardware.gradient_checkpointing={str(checkpointing).lower()}")
    for dtype in (torch.float32, torch.bfloat16) if kind == "llama" else (torch.float32,):
        shape = planning.trainable_shape(config, contents()[kind], dtype)
        planned = planning.step_memory(config, shape, batch=BATCH, length=LENGTH).total
        assert planned == pytest.approx(measured(config, contents()[kind], dtype), rel=0.08)


LONG = {
    "padded": ("llama", [], 0.1),  # which needs none
    "packed": ("llama", ["dataset.packing=true"], 0.1),
    "grouped": ("qwen2", ["dataset.packing=true"], 0.1),  # with a mask keys and values are repeated
    "eager": ("llama", ["model.attn_implementation=eager"], 0.01),
    "recomputed": ("llama", ["hardware.gradient_checkpointing=true"], 0.2),
}


@pytest.mark.parametrize("case", LONG)
def test_the_plan_counts_the_mask_of_long_rows(case: str) -> None:
    """(batch, 1, tokens, tokens), in the model's dtype, once: as much as any layer keeps."""
    kind, words, share = LONG[case]
    content, config = contents()[kind], configured("s2ft", *words)
    for name, value in (("hidden_size", 32), ("intermediate_size", 64), ("num_hidden_layers", 2)):
        setattr(content, name, value)
    shape = planning.trainable_shape(config, content, torch.float32)
    planned = planning.step_memory(config, shape, batch=BATCH, length=384).total
    assert planned == pytest.approx(measured(config, content, torch.float32, length=384), rel=0.05)
    assert BATCH * 384 * 384 * 4 > share * planned


@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("method", ["s2ft", "sylva"])
def test_the_plan_counts_what_is_looked_at(method: str, steps: int) -> None:
    """By re-selection with running gradients: all layers in every step, or one at a time."""
    words = [f"method.reselect_steps={steps}", "method.reselect_by=running"]
    content, planned = contents()["llama"], []
    for config in (configured(method, *words), configured(method)):
        shape = planning.trainable_shape(config, content, torch.float32)
        planned.append(planning.step_memory(config, shape, batch=BATCH, length=LENGTH).total)
        assert planned[-1] == pytest.approx(measured(config, content, torch.float32), rel=0.08)
    assert planned[0] > planned[1]


def test_the_plan_counts_an_average() -> None:
    content, planned = contents()["llama"], []
    for words in ((), ("trainer.average=last:0.25",)):
        config = configured("s2ft", *words)
        shape = planning.trainable_shape(config, content, torch.float32)
        planned.append(planning.step_memory(config, shape, batch=1, length=8).total)
    assert planned[1] - planned[0] == 4 * shape.trainable


def test_the_plan_counts_the_logits_of_a_large_vocabulary_as_they_are_made() -> None:
    """A chunk of them at a time with `trainer.loss=auto`, all at once with `plain`."""
    content, totals = contents()["llama"], {}
    content.vocab_size = 40_000  # 105 tokens at once
    for loss in ("auto", "plain"):
        config = configured("s2ft", f"trainer.loss={loss}")
        shape = planning.trainable_shape(config, content, torch.float32)
        totals[loss] = planning.step_memory(config, shape, batch=BATCH, length=LENGTH).total
        assert totals[loss] == pytest.approx(measured(config, content, torch.float32, 40_000), rel=0.08)
    logits = BATCH * LENGTH * 40_000 * 4
    assert totals["plain"] - totals["auto"] > logits / 2


def test_choosing_by_the_weights_needs_none_of_them_for_a_plan() -> None:
    """Nor does `allocation=flops`, which may go all the way down."""
    totals = []
    for words in ([], ["method.importance=weight"], ["method.importance=weight", "method.allocation=flops"]):
        config = configured("s2ft", *words)
        shape = planning.trainable_shape(config, contents()["llama"], torch.float32)
        totals.append(planning.step_memory(config, shape, batch=BATCH, length=LENGTH).total)
    assert totals[0] == totals[1] == pytest.approx(totals[2], rel=0.01)


@pytest.mark.parametrize("method", ["s2ft", "sylva"])
@pytest.mark.parametrize("way", list(recomputing.KINDS))
def test_the_plan_knows_what_is_computed_again(method: str, way: str) -> None:
    plain, config = configured(method), configured(method, f"trainer.checkpointing={way}")
    for dtype in (torch.float32, torch.bfloat16):
        shape = planning.trainable_shape(config, contents()["llama"], dtype)
        planned = planning.step_memory(config, shape, batch=BATCH, length=LENGTH)
        assert planned.total == pytest.approx(measured(config, contents()["llama"], dtype), rel=0.08)
        assert planned.activations < 0.97 * planning.step_memory(plain, shape, batch=BATCH, length=LENGTH).activations


def test_the_remedy_of_one_that_computes_again_is_to_do_so_wholly() -> None:
    config = configured("s2ft", "trainer.checkpointing=selective")
    shape = planning.trainable_shape(config, contents()["llama"], torch.float32)
    whole = configured("s2ft", "trainer.checkpointing=full")
    room = planning.step_memory(whole, shape, batch=1, length=512).total
    found, tried = command.remedy(config, shape, command._phases(config, shape, 1, 512), room)
    assert found["overrides"] == ["trainer.checkpointing=full"] and tried[-1] == "trainer.checkpointing"


@pytest.mark.parametrize(
    ("words", "fits"),
    [
        ("s2ft", ["hardware.zero_stage=3"]),
        ("losia", None),  # chooses anew in turn
        ("s2ft trainer.optimizer=adafactor", None),
        ("s2ft trainer.compile=layers", None),
    ],
)
def test_no_remedy_is_what_training_refuses(
    words: str, fits: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here all that helps is ZeRO."""
    config = configured(*words.split(), "hardware.num_processes=2", "trainer.checkpointing=full")
    shape = planning.trainable_shape(config, contents()["llama"], torch.float32)
    large, small = (planning.Memory(size, 0, 0, 0, 0) for size in (2, 0))
    monkeypatch.setattr(command, "_phases", lambda config, *_: (small if config.hardware.zero_stage else large, None))
    found, _ = command.remedy(config, shape, (large, None), 1)
    assert (found and found["overrides"]) == fits


@pytest.mark.slow
def test_the_table_of_errors() -> None:
    """Prints the table of docs/benchmarks/memory.md: pytest -s -m slow tests/training/test_memory_plan.py"""
    wide = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 8, "num_attention_heads": 16}
    models = {"llama 1024 x 8": transformers.LlamaConfig(**wide, vocab_size=2048)} | contents()
    print(
        "\n| model | method | recomputed | planned MiB | measured MiB | error |\n| --- | --- | --- | --- | --- | --- |"
    )
    errors = []
    for name, content in models.items():
        for method in ("s2ft", "sylva", "lora", "dora", "full"):
            for checkpointing in (False, True):
                config = configured(method, f"hardware.gradient_checkpointing={str(checkpointing).lower()}")
                shape = planning.trainable_shape(config, content, torch.float32)
                planned = planning.step_memory(config, shape, batch=BATCH, length=LENGTH).total
                real = measured(config, content, torch.float32)
                errors.append(planned / real - 1)
                print(
                    f"| {name} | {method} | {'yes' if checkpointing else 'no'} | {planned / 2**20:.1f} | "
                    f"{real / 2**20:.1f} | {errors[-1]:+.1%} |"
                )
    assert max(map(abs, errors)) < 0.15


def test_full_fine_tuning_of_a_half_precision_model_on_the_cpu_is_in_fp32() -> None:
    config = compose("train", ["method=full", "hardware=cpu"])
    shape = planning.trainable_shape(config, contents()["llama"], torch.bfloat16)
    planned = planning.step_memory(config, shape, batch=BATCH, length=LENGTH).total
    assert planned == pytest.approx(measured(config, contents()["llama"], torch.bfloat16), rel=0.08)


def model_folder(folder: Path, content: dict[str, Any]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


def test_llama_70b_on_eight_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only its config.json is there, no weight and no tokenizer."""
    monkeypatch.setattr(command, "_around", lambda value, limit: [value])  # 80 layers take seconds each time
    path = model_folder(tmp_path / "llama3-70b", LLAMA_70B)
    words = [f"model.path={path}", "method=s2ft", "hardware=8xh100", "hardware.zero_stage=3", "sparsity=0.99"]
    before = files(tmp_path)
    plan = sparseft(tmp_path, "train", "--plan", *words, "trainer.max_length=2048", "--json").json
    assert files(tmp_path) == before
    assert plan["total_parameters"] == 70_553_706_496
    linear = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert plan["trainable_parameters"] == pytest.approx(0.01 * linear, rel=0.01)
    one, layer = plan["per_device"], linear // 80 * 2
    assert 2 * 1.05e9 > layer  # what DeepSpeed keeps gathered and gathers ahead is more than a layer
    # A column's base value and its index are kept whole beside the shards, whose delta trains.
    assert one["weights"] == pytest.approx(70.55e9 * 2 / 8 + 2 * 1.05e9 + 2 * plan["trainable_parameters"], rel=0.01)
    assert one["trained"] == pytest.approx(4 * plan["trainable_parameters"], rel=1e-3)
    bucket = 4 * min(plan["trainable_parameters"], 500_000_000)
    share = plan["trainable_parameters"] / 8
    assert one["gradients"] == pytest.approx(4 * plan["trainable_parameters"] + bucket + 4 * share, rel=1e-3)
    assert one["moments"] == pytest.approx(12 * plan["trainable_parameters"] / 8, rel=1e-3)
    assert one["total"] == sum(one[part] for part in ("weights", "trained", "gradients", "moments", "activations"))
    assert plan["fits"] is (one["total"] <= plan["device_bytes"])
    command.render(plan)
    shown = capsys.readouterr().out
    assert "70,553,706,496" in shown and "8 processes, ZeRO 3" in shown and f"{one['total'] / 2**30:.2f}" in shown


def test_llama_70b_by_fsdp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An eighth of the base, and whole: the head, two layers, and the embeddings, which are larger than a layer."""
    monkeypatch.setattr(command, "_around", lambda value, limit: [value])
    path = model_folder(tmp_path / "llama3-70b", LLAMA_70B)
    words = ["train", "--plan", f"model.path={path}", "method=s2ft", "hardware=8xh100", "hardware.zero_stage=0"]
    words += ["sparsity=0.99", "trainer.max_length=2048", "hardware.fsdp=true"]
    plan = sparseft(tmp_path, *words, "--json").json
    one, trained = plan["per_device"], plan["trainable_parameters"]
    layer, table = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672, 128256 * 8192
    assert one["weights"] == pytest.approx(2 * (70.5537e9 / 8 + 2 * table + 2 * layer + trained), rel=0.01)
    assert (one["trained"], one["gradients"], one["moments"]) == (4 * trained, 4 * trained, 8 * trained)
    command.render(plan)
    assert "8 processes, FSDP2" in capsys.readouterr().out
    assert refused(tmp_path, *words, "hardware.num_processes=1").startswith("hardware.fsdp=true: one process has")


def test_what_does_not_fit_comes_with_a_setting_that_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_around", lambda value, limit: [value])
    path = model_folder(tmp_path / "model", LLAMA_70B | {"num_hidden_layers": 4})
    words = [f"model.path={path}", "method=sylva", "trainer.batch_size=8", "hardware.memory_gib=16"]
    plan = sparseft(tmp_path, "train", "--plan", *words, "--json").json
    assert plan["fits"] is False
    remedy = plan["remedy"]
    assert remedy["bytes"] <= 16 * 2**30
    again = sparseft(tmp_path, "train", "--plan", *words, *remedy["overrides"], "--json").json
    assert again["fits"] is True and again["per_device"]["total"] == remedy["bytes"]
    assert f"With {' '.join(remedy['overrides'])} it takes" in sparseft(tmp_path, "train", "--plan", *words).out
    tiny = sparseft(tmp_path, "train", "--plan", *words, "hardware.memory_gib=0.1", "--json").json
    assert tiny["fits"] is False and tiny["remedy"] is None


def test_the_plan_says_what_a_cap_on_the_rank_leaves_unspent(tmp_path: Path) -> None:
    words = ["train", "--plan", "method=s2ft", "method.importance=random", "method.d_ratio=0.5"]
    assert "method.max_rank" not in sparseft(tmp_path, *words).err
    assert "method.max_rank=8 has room for" in sparseft(tmp_path, *words, "method.max_rank=8").err


def test_more_sequences_and_tokens_take_more(tmp_path: Path) -> None:
    plan = sparseft(tmp_path, "train", "--plan", "trainer.max_length=128", "trainer.batch_size=2", "--json").json
    totals = {(row["batch"], row["length"]): row["bytes"] for row in plan["by_length_and_batch"]}
    assert sorted(totals) == [(b, t) for b in (1, 2, 4) for t in (64, 128, 256)]
    assert totals[2, 128] == plan["per_device"]["total"]
    assert 0.9 < plan["predicted_floors"] < 1.1  # blocks in all layers
    assert all(totals[b, 64] < totals[b, 128] < totals[b, 256] for b in (1, 2, 4))
    assert all(totals[1, t] < totals[2, t] < totals[4, t] for t in (64, 128, 256))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trainer.optimizer=lion_8bit"], ["trainer.optimizer=lion_8bit: cannot be used here", "bitsandbytes"]),
        (["model.path=nowhere/at/all"], ["model.path=nowhere/at/all", "no such folder"]),
        (["hardware.memory_gib=0"], ["hardware.memory_gib"]),
    ],
)
def test_what_cannot_be_planned(words: list[str], parts: list[str], tmp_path: Path) -> None:
    message = refused(tmp_path, "train", "--plan", *words)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "words",
    [
        "method=s2ft trainer.max_length=1000",  # of a context of 128, which no example fills
        "method=full trainer.optimizer=adafactor",
        "method=lora trainer.optimizer=adagrad",
        "method=s2ft model.dtype=float16 trainer.optimizer=adamw_torch_fused",
        "method=full hardware.dtype=bfloat16 hardware.gradient_checkpointing=true",
        "method=dora dataset.packing=true trainer.scheduler=cosine",
        "method=s2ft method.reselect_steps=1 scope=self_attn model.attn_implementation=eager",
        "method=s2ft method.layout=permuted trainer.batch_size=4 hardware.micro_batch=2",
    ],
)
def test_what_training_takes_can_be_planned(words: str, tmp_path: Path, model_folder: Any) -> None:
    common = [*on(model_folder(), write_data(tmp_path)["json"]), "trainer.max_steps=1", "--json"]
    for plan in (["--plan"], ["output_dir=run"]):
        sparseft(tmp_path, "train", *plan, *common, *words.split())


@pytest.mark.parametrize(
    "words",
    [
        "method=sylva method.block_size=4 trainer.optimizer=sgd",
        "method=sylva method.reselect_steps=2 method.reselect_by=running sparsity=0.9",
        "-m method=s2ft,lora",
    ],
)
def test_what_other_tests_train_can_be_planned(words: str, tmp_path: Path, model_folder: Any) -> None:
    common = [*on(model_folder(), write_data(tmp_path)["json"]), "trainer.max_steps=1", "--json"]
    sparseft(tmp_path, "train", "--plan", *common, *words.split())


def test_attention_by_a_package_that_is_not_here_is_planned(tmp_path: Path) -> None:
    flash, fused = (
        sparseft(tmp_path, "train", "--plan", f"model.attn_implementation={name}", "--json").json
        for name in ("flash_attention_2", "sdpa")
    )
    assert flash["per_device"] == fused["per_device"]


@pytest.mark.parametrize("kind", ["falcon", "mpt"])
def test_an_architecture_with_attention_of_its_own_is_planned(kind: str, tmp_path: Path) -> None:
    sizes = {"falcon": {"num_hidden_layers": 2, "num_attention_heads": 4}, "mpt": {"n_layers": 2, "n_heads": 4}}
    width = {"falcon": {"hidden_size": 64}, "mpt": {"d_model": 64}}
    path = model_folder(tmp_path / kind, {"model_type": kind, "vocab_size": 300, **sizes[kind], **width[kind]})
    plan = sparseft(tmp_path, "train", "--plan", f"model.path={path}", "method=s2ft", "--json").json
    assert plan["per_device"]["activations"] > 0


def test_attention_that_is_none_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, "train", "--plan", "model.attn_implementation=nonsense")
    assert "nonsense" in message


def test_a_length_beyond_the_context_is_planned_for_the_context(tmp_path: Path) -> None:
    done = sparseft(tmp_path, "train", "--plan", "trainer.max_length=100000", "--json")
    assert done.json["length"] == 512
    assert "trainer.max_length=100000, but the model's context is 512 tokens" in done.err
    assert (
        done.json["per_device"]
        == sparseft(tmp_path, "train", "--plan", "trainer.max_length=512", "--json").json["per_device"]
    )


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw_torch", "adagrad", "rmsprop", "sgd"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_plan_knows_what_an_optimizer_keeps(method: str, optimizer: str) -> None:
    """Against the state that it has after a step with weights."""
    content, config = contents()["llama"], configured(method, f"trainer.optimizer={optimizer}")
    planned = planning.step_memory(config, planning.trainable_shape(config, content, torch.float32), batch=1, length=8)
    model = attach(transformers.AutoModelForCausalLM.from_config(content), config.method)
    arguments = transformers.TrainingArguments(optim=optimizer, use_cpu=True, report_to=[])
    kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
    parameters = list(trainable_parameters(model).values())
    made = kind(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    made.step()
    held = [value for state in made.state.values() for value in state.values() if torch.is_tensor(value)]
    assert planned.moments == pytest.approx(sum(value.nbytes for value in held), rel=0.01)


MIXTRAL = {
    "model_type": "mixtral", "dtype": "bfloat16", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


def test_experts_that_no_zero_stage_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_around", lambda value, limit: [value])
    path = model_folder(tmp_path / "mixtral", MIXTRAL)
    words = ["train", "--plan", f"model.path={path}", "method=s2ft", "hardware=8xh100", "hardware.zero_stage=0"]
    words += ["sparsity=0.99", "trainer.max_length=512", "trainer.batch_size=1"]
    plan = sparseft(tmp_path, *words, "--json").json
    attention, experts = 2 * 4096 * 4096 + 2 * 4096 * 1024, 8 * 3 * 4096 * 14336
    assert plan["total_parameters"] == 2 * (attention + experts + 8 * 4096 + 2 * 4096) + 2 * 32000 * 4096 + 4096
    assert plan["trainable_parameters"] == pytest.approx(0.01 * 2 * (attention + experts), rel=0.05)
    assert "hardware.zero_stage=3: experts" in refused(tmp_path, *words, "hardware.zero_stage=3")
    tight = sparseft(
        tmp_path, *words, "hardware.memory_gib=6.61", "hardware.gradient_checkpointing=true", "--json"
    ).json
    assert tight["fits"] is False and tight["remedy"]["overrides"][-1] == "hardware.zero_stage=2"


def test_shared_experts_are_no_experts() -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(contents()["mixtral"])
        model.model.layers[0].mlp.shared_experts = torch.nn.Linear(128, 128)
    planning._check_experts(model, "here")


def test_a_model_of_the_folders_own_code_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    content = contents()["llama"].to_dict() | {"model_type": "own"}
    content["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = configured("lora", f"model.path={tmp_path}", "model.trust_remote_code=true")
    model = planning._on_meta(load_config(config.model), torch.float32, config)
    assert type(model).__name__ == "OwnForCausalLM"


def test_experts_that_take_turns_are_refused() -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(contents()["mixtral"], experts_implementation="eager")
    with pytest.raises(UserError, match=r"here has experts \(MixtralExperts\) that are computed one after another"):
        planning._check_experts(model, "here")


# ---- what ZeRO shards, against two processes ----

SHARED = {  # of one method or another, and what of it is trained
    "s2ft": ["method=s2ft", "sparsity=0.8"],
    "lora": ["method=lora", "method.rank=32", "method.dropout=0"],
    "full": ["method=full"],
}
PARTS = ("weights", "trained", "gradients", "moments")


def measured_together(folder: Path, words: dict[str, list[str]]) -> dict[str, dict[str, int]]:
    """What each run's first process holds in a step of two."""
    from support.ranks import run_ranks

    run_ranks(folder, [{"name": name, "overrides": list(each)} for name, each in words.items()],
              worker=SUPPORT / "planning_worker.py")  # fmt: skip
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in words}


@pytest.mark.slow
@pytest.mark.parametrize("stages", [range(4), ["fsdp"]], ids=["zero", "fsdp"])
def test_what_is_sharded(stages: Iterable[int | str], tmp_path: Path) -> None:
    """Prints the second table of docs/benchmarks/memory.md."""
    from support.models import build_tokenizer
    from support.ranks import sharing

    tokenizer = build_tokenizer()
    wide = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8}
    content = transformers.LlamaConfig(**wide, vocab_size=len(tokenizer) + 8, bos_token_id=1, eos_token_id=2)
    transformers.AutoModelForCausalLM.from_config(content).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(f"{number} is a number, " * 20 for number in range(64)))
    common = [
        f"model.path={tmp_path / 'model'}", "dataset=text", f"dataset.train_path={tmp_path / 'text.txt'}",
        f"trainer.max_length={LENGTH}", f"trainer.batch_size={BATCH}", "trainer.gradient_accumulation=1",
        "trainer.max_steps=3", "trainer.warmup_steps=0", "dataset.eval_fraction=0", "hardware=cpu",
        "hardware.num_processes=2",
    ]  # fmt: skip
    cases = {f"{method}-{stage}": (method, stage) for method in SHARED for stage in stages}
    words = {
        name: [*common, *SHARED[method], sharing(stage), f"output_dir={tmp_path / 'runs' / name}"]
        for name, (method, stage) in cases.items()
    }
    found = measured_together(tmp_path, words)
    print("\n| method | ZeRO | " + " | ".join(PARTS) + " | peak | error |\n" + "| --- " * (len(PARTS) + 4) + "|")
    errors = {}
    for name, (method, stage) in cases.items():
        config = compose("train", words[name])
        shape = planning.trainable_shape(config, content, torch.float32)
        plan = planning.step_memory(config, shape, batch=BATCH, length=LENGTH)
        real = found[name]
        # What is alive ahead of the update and none of the others: also the buckets of what was reduced.
        real["gradients"] = real["live"] - real["weights"] - real["trained"] - real["moments"]
        errors[name] = plan.total / real["peak"] - 1
        cells = [f"{getattr(plan, part) / 2**20:.2f} / {real[part] / 2**20:.2f}" for part in PARTS]
        print(f"| {method} | {stage} | {' | '.join(cells)} | {plan.total / 2**20:.2f} / {real['peak'] / 2**20:.2f} | "
              f"{errors[name]:+.1%} |")  # fmt: skip
    assert max(map(abs, errors.values())) < 0.15, errors

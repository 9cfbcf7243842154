"""What `sparseft train --plan` says of evaluations, against evaluations."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from sparseft.adapters.lifecycle import attach
from sparseft.compose.run_config import compose
from sparseft.memory import AllocationCounter, tensor_bytes
from sparseft.training import memory_plan as planning
from sparseft.training.planned_evaluation import largest_evaluation
from support.models import build_tokenizer
from support.running import on, refused, sparseft, write_data

ROWS, LENGTH = 4, 96


def content(**more: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "num_attention_heads": 4}
    return transformers.LlamaConfig(**sizes | more, vocab_size=len(build_tokenizer()) + 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "words",
    [
        ["trainer.eval_task=mmlu"],
        ["trainer.eval_task=commonsense", "eval.num_beams=2"],
        ["trainer.sample_prompts=[a,b,c,d]"],
    ],
    ids=["scored", "beams", "prompts"],
)
def test_it_is_what_an_evaluation_takes(words: list[str], dtype: torch.dtype) -> None:
    from sparseft.evaluation.harness import LanguageModel, undisturbed

    common = ["method=s2ft", "hardware=cpu", "sparsity=0.95", "trainer.eval_steps=1", "method.importance=random"]
    config = compose("train", [*common, *words, f"eval.batch_size={ROWS}"])
    shape = planning.trainable_shape(config, content(), dtype)
    step = planning.step_memory(config, shape, batch=1, length=LENGTH)
    planned = largest_evaluation(config, shape, step, LENGTH)
    assert planned is not None and planned.asked_by in (words[0], "trainer.sample_prompts")

    model = transformers.AutoModelForCausalLM.from_config(content(), dtype=dtype)
    attach(model, config.method).eval()
    lm = LanguageModel(model, build_tokenizer(), ROWS, None)
    lm.ends = []
    scored = words[0].endswith("mmlu")
    with undisturbed(model), AllocationCounter() as counter:
        if scored:
            asked = [(None, torch.randint(3, 60, (LENGTH,)).tolist(), [5]) for _ in range(2 * ROWS)]
            lm._loglikelihood_tokens(asked, disable_tqdm=True)
        else:
            prompts = torch.randint(3, 60, (ROWS, LENGTH - 8))
            beams = {"num_beams": config.eval.num_beams, "min_new_tokens": 8}
            lm._model_generate(prompts, LENGTH, [], attention_mask=torch.ones_like(prompts), do_sample=False, **beams)
    held = tensor_bytes([*model.parameters(), *model.buffers()]) + step.moments
    # Generated ones are planned as if all tokens had been in the prompt.
    assert 0.98 * counter.peak <= planned.bytes - held <= (1.03 if scored else 1.2) * counter.peak


@pytest.mark.parametrize("task", ["preference", "mt_bench", "lm_eval:boolq", "'mmlu,boolq'", "mmul"])
def test_a_task_that_training_refuses_is_refused(task: str, tmp_path: Path) -> None:
    words = [f"trainer.eval_task={task}", "trainer.eval_steps=1"]
    assert refused(tmp_path, "train", "--plan", *words) == refused(tmp_path, "train", *words)


def test_it_may_be_the_peak_and_comes_with_what_would_fit(tmp_path: Path) -> None:
    words = ["train", "--plan", "trainer.checkpointing=full", "trainer.batch_size=1", "trainer.max_length=256"]
    plain = sparseft(tmp_path, *words, "--json").json
    assert plain["evaluation"] is None
    assert plain["peak"] == {"phase": "a training step", "bytes": plain["per_device"]["total"]}
    words += ["trainer.eval_task=mmlu", "trainer.eval_steps=1", "eval.batch_size=64"]
    plan = sparseft(tmp_path, *words, "--json").json
    found = plan["evaluation"]
    assert (found["asked_by"], found["rows"], found["tokens"]) == ("trainer.eval_task=mmlu", 64, 256)
    assert plan["per_device"] == plain["per_device"] and found["bytes"] > plain["peak"]["bytes"]
    assert plan["peak"] == {"phase": "trainer.eval_task=mmlu", "bytes": found["bytes"]}
    assert plan["peak"]["bytes"] in [row["bytes"] for row in plan["by_length_and_batch"]]
    room = f"hardware.memory_gib={(plain['peak']['bytes'] + found['bytes']) / 2**31}"
    tight = sparseft(tmp_path, *words, room, "--json").json
    assert tight["fits"] is False and tight["remedy"]["overrides"] == ["eval.batch_size=1"]
    shown = sparseft(tmp_path, *words).out
    assert "trainer.eval_task=mmlu, 64 x 256 tokens" in shown and "peak, in trainer.eval_task=mmlu" in shown


@pytest.mark.parametrize(
    "words",
    [
        ["hardware=cpu"],
        ["hardware=8xh100", "hardware.zero_stage=0"],
        ["hardware=8xh100", "hardware.zero_stage=2"],
        ["hardware=8xh100", "hardware.zero_stage=3"],
        ["hardware=8xh100", "hardware.zero_stage=0", "hardware.fsdp=true"],
    ],
    ids=["cpu", "gpu", "zero 2", "zero 3", "fsdp"],
)
@pytest.mark.parametrize("batch", ["auto", "3"])
def test_a_task_has_the_rows_that_its_evaluation_settles(words: list[str], batch: str) -> None:
    """Of `auto` one, where the evaluation finds it by trying."""
    from sparseft.evaluation.harness import settled_batch

    common = ["method=s2ft", "method.importance=random", "trainer.eval_task=mmlu", "trainer.eval_steps=1"]
    config = compose("train", [*common, *words, f"eval.batch_size={batch}"])
    shape = planning.trainable_shape(config, content(), torch.float32)
    planned = largest_evaluation(config, shape, planning.step_memory(config, shape, batch=1, length=8), 8)

    parameter = torch.nn.Parameter(torch.zeros(1))
    if "hardware.zero_stage=3" in words or "hardware.fsdp=true" in words:
        parameter.ds_id = 0  # as a sharded one has
    device = torch.device("cpu" if words == ["hardware=cpu"] else "cuda")
    settled = settled_batch(
        config.eval.batch_size, SimpleNamespace(device=device, parameters=lambda: iter([parameter]))
    )
    assert planned is not None and planned.rows == (1 if settled == "auto" else settled)


def test_a_model_without_attention_answers_without_a_cache(tmp_path: Path) -> None:
    """transformers counts the tokens of a cache by the attention layers; here all are recurrent."""
    from sparseft.evaluation.harness import LanguageModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Lfm2Config(**sizes, num_key_value_heads=2, layer_types=["conv", "conv"], vocab_size=400)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    lm = LanguageModel(model, tokenizer, 2, None)
    lm.ends = []
    prompts = torch.randint(3, 60, (2, 8))
    answers = lm._model_generate(prompts, 10, [], attention_mask=torch.ones_like(prompts), do_sample=False)
    assert answers.shape == (2, 10)
    words = ["train", *on(tmp_path / "base", write_data(tmp_path)["json"]), "method=lora"]
    words += ["trainer.sample_prompts=[a,b]", "trainer.max_steps=1", "trainer.max_length=128", "output_dir=run"]
    assert sparseft(tmp_path, *words, "--plan", "--json").json["evaluation"]["rows"] == 2
    sparseft(tmp_path, *words)
    assert len((tmp_path / "run/samples.jsonl").read_text().splitlines()) == 4


WORDS = [
    "train",
    "--plan",
    "hardware=cpu",
    "trainer.checkpointing=full",
    "trainer.batch_size=1",
    "trainer.eval_steps=1",
]


def room(size: float) -> str:
    return f"hardware.memory_gib={size / 2**30}"


def test_a_remedy_is_fewer_questions_where_auto_settles_for_several(tmp_path: Path) -> None:
    words = [*WORDS, "trainer.max_length=256", "trainer.eval_task=mmlu", "eval.batch_size=auto"]
    plan = sparseft(tmp_path, *words, "--json").json
    step, evaluation = plan["per_device"]["total"], plan["evaluation"]["bytes"]
    assert evaluation > step
    tight = sparseft(tmp_path, *words, room((step + evaluation) / 2), "--json").json
    assert tight["remedy"]["overrides"] == ["eval.batch_size=1"]


@pytest.mark.parametrize("large", ["step", "prompts"])
def test_a_remedy_is_no_fewer_questions_where_they_are_not_what_is_too_large(large: str, tmp_path: Path) -> None:
    """The step is as well, and what mends it mends the task; or the prompts are."""
    asked = {"step": ["eval.batch_size=4"], "prompts": ["eval.batch_size=2", "trainer.sample_prompts=[a,b,c,d,e,f]"]}
    words = [*WORDS, "trainer.max_length=512", "trainer.eval_task=mmlu", *asked[large]]
    plan = sparseft(tmp_path, *words, "--json").json
    step, evaluation = plan["per_device"]["total"], plan["evaluation"]["bytes"]
    least = min(step, evaluation) if large == "step" else evaluation
    tight = sparseft(tmp_path, *words, room(least - 2), "--json").json
    assert tight["remedy"]["overrides"] == ["trainer.max_length=256"]


def test_it_says_which_settings_were_tried(tmp_path: Path) -> None:
    words = [*WORDS, "trainer.max_length=512", "hardware.memory_gib=0.0001"]
    said = "nor would it with trainer.max_length changed."
    assert said in sparseft(tmp_path, *words).out
    assert said in sparseft(tmp_path, *words, "trainer.eval_task=mmlu").out  # the step alone is too large
    assert "GiB.\n" in sparseft(tmp_path, *words, "trainer.max_length=256").out

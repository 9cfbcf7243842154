"""What an evaluation between two steps will take, where that may be more than a step takes.

The held-out loss cannot be: its batches have as many rows as a step's and are of examples no longer, and it is the
forward pass alone, which keeps nothing, beside the same weights and moments. Tasks and prompts on the way have batches
of their own size, and a cache of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sparseft.adapters.lifecycle import trainable_parameters
from sparseft.config import RunConfig
from sparseft.evaluation.mmlu import MMLU
from sparseft.evaluation.tasks import FIXED_BATCH, data_folder, judging_task
from sparseft.memory import tensor_bytes
from sparseft.models.decoder import keeps_cache, last_logits
from sparseft.models.masks import unasked
from sparseft.training.memory_plan import Counter, Memory, Shape, computed_without_content, on_cpu
from sparseft.training.sample_answers import BATCH, read_prompts

EVAL_TASK = "trainer.eval_task"


@dataclass(frozen=True)
class Evaluation:
    """Rows of so many tokens each, the answers' among them, that go through the model at once."""

    asked_by: str  # the setting
    rows: int  # of beams too
    tokens: int
    bytes: int  # on one device, in all


def largest_evaluation(config: RunConfig, shape: Shape, memory: Memory, length: int) -> Evaluation | None:
    """The evaluation that takes most, with questions and answers of `length` tokens together, beside what stays of
    `memory` (a step's) between steps; None where nothing is evaluated but the held-out loss."""
    held = memory.weights + memory.trained + memory.moments
    if shape.autocast:  # copies in half precision, as long as a pass
        held += tensor_bytes(trainable_parameters(shape.model).values())
    every = [
        Evaluation(what, rows, length, held + _pass(config, shape, rows, length, generated))
        for what, rows, generated in _asked(config)
    ]
    return max(every, key=lambda each: each.bytes, default=None)


def task_batch(config: RunConfig) -> int:
    """Questions of a task at once: as `evaluation.harness.settled_batch` settles them, here of a model that is not
    loaded. Where `auto` is found by trying, so that it fits, one."""
    hardware, batch = config.hardware, config.eval.batch_size
    if batch == "auto":
        return FIXED_BATCH if on_cpu(hardware) or hardware.in_shards else 1
    return int(batch)


def _asked(config: RunConfig) -> Iterator[tuple[str, int, bool]]:
    """Who asks, rows at once, and whether answers are generated, else given ones scored."""
    if config.trainer.eval_task:
        name = judging_task(config.trainer.eval_task, data_folder(config.eval, config.model.path))
        scored = name.partition("_")[0] == MMLU
        yield f"{EVAL_TASK}={name}", task_batch(config) * (1 if scored else config.eval.num_beams), not scored
    if config.trainer.sample_prompts is not None:
        yield "trainer.sample_prompts", min(BATCH, len(read_prompts(config.trainer.sample_prompts))), True


def _pass(config: RunConfig, shape: Shape, rows: int, tokens: int, generated: bool) -> int:
    """Bytes that a forward pass takes which makes the last token's logits (all of them, where the model cannot help
    it). What is generated needs all keys and values in the end, which it is given here at once."""
    model, given = shape.model, {"input_ids": torch.zeros(rows, tokens, dtype=torch.int64, device="meta")}
    if generated:  # prompts are padded, on the left
        given["attention_mask"] = given["input_ids"]
    mode = model.training
    model.eval()
    with torch.no_grad(), Counter() as counter, computed_without_content(model), unasked(given):
        found = model(**given, **last_logits(model, 1), use_cache=generated and keeps_cache(model.config))
        if not generated:  # as lm-eval does, in fp32
            torch.log_softmax(found.logits, -1, dtype=torch.float32)
    model.train(mode)
    return counter.peak

"""`sparseft train --plan`: the memory of a training step and of evaluations, before any weight is loaded."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import transformers

from sparseft import console
from sparseft.compose import validation
from sparseft.config import RunConfig
from sparseft.data.preference_sets import UNPAIRS
from sparseft.errors import UserError
from sparseft.models.decoder import context_length
from sparseft.models.loading import load_config, model_dtype
from sparseft.models.packed.quantized import quantized_by
from sparseft.models.published import published
from sparseft.rules import show
from sparseft.training import checks, memory_plan
from sparseft.training.arguments import micro_batches
from sparseft.training.distributed_trainer import has_experts
from sparseft.training.planned_evaluation import EVAL_TASK, Evaluation, largest_evaluation, task_batch
from sparseft.training.predicted import in_words, predicted_floors
from sparseft.training.preference.objectives import sequences

GIB = 2**30
PARTS = {
    "weights": "frozen weights",
    "trained": "trained parameters",
    "gradients": "their gradients",
    "moments": "the optimizer's state",
    "activations": "activations",
}
STEP = "a training step"
# Settings that save memory, in the order in which they are tried, each on top of those before: what costs the least
# first. A change that does not apply (a batch of one sequence) is passed over, as is one of what fits already.
REMEDIES = ("eval_batch", "micro_batch", "gradient_checkpointing", "zero_stage", "offload", "max_length")


def run(config: RunConfig) -> dict[str, Any]:
    """The plan of the composed config: of whatever `train` would take. Raises UserError for what the plan cannot know
    (experts that take turns)."""
    config = copy.deepcopy(config)
    console.clear_warnings()
    checks.check_together(config)
    checks.check_trainer(config)
    content = published(config.model) or load_config(config.model, packed=True)
    if (packed := quantized_by(content)) is not None:
        raise UserError(
            f"model.path={config.model.path}: the checkpoint is packed already ({packed}), and plans are made of plain "
            "ones; plan the model that it was made of, with model.quantize=nf4, int8 or int4."
        )
    transformers.logging.set_verbosity_error()
    dtype = model_dtype(config.model, content)
    limit = context_length(content)
    length = config.trainer.max_length
    if limit and length > limit:  # training refuses longer examples, not the setting
        console.log(f"plan: trainer.max_length={length}, but the model's context is {limit} tokens: planned for those")
        config.trainer.max_length = length = limit
    shape = memory_plan.trainable_shape(config, content, dtype)
    batch = micro_batch(config)
    memory, evaluation = phases = _phases(config, shape, batch, length)
    peak = _peak(phases)
    where = evaluation.asked_by if evaluation is not None and evaluation.bytes > memory.total else STEP
    device_bytes = memory_plan.device_bytes(config.hardware)
    table = [
        {"length": tokens, "batch": rows, "bytes": _peak(phases if here else _phases(config, shape, rows, tokens))}
        for tokens in _around(length, limit)
        for rows in _around(batch, None)
        if rows >= _least(config)
        for here in [(rows, tokens) == (batch, length)]
    ]
    result: dict[str, Any] = {
        "plan": True,
        "model": config.model.path,
        "method": config.method_name,
        "dtype": str(dtype).removeprefix("torch."),
        "hardware": config.hardware.name,
        "processes": config.hardware.all_processes,
        "zero_stage": config.hardware.zero_stage,
        "fsdp": config.hardware.fsdp,
        "batch": batch,
        "length": length,
        "sequences": batch * sequences(config.objective),
        "objective": config.objective,
        "predicted_floors": None  # of an objective whose step is another one
        if config.by_preference
        else predicted_floors(shape.model, shape.spec, config, length=length, labelled=1.0),
        "trainable_parameters": shape.trainable,
        "total_parameters": shape.total,
        "per_device": asdict(memory) | {"total": memory.total},
        "evaluation": None if evaluation is None else asdict(evaluation),
        "peak": {"phase": where, "bytes": peak},
        "device_bytes": device_bytes,
        "fits": None if device_bytes is None else peak <= device_bytes,
        "by_length_and_batch": table,
        "remedy": None,
        "tried": [],
    }
    if result["fits"] is False:
        result["remedy"], result["tried"] = remedy(config, shape, phases, device_bytes)
    return result


def micro_batch(config: RunConfig) -> int:
    """Sequences, pairs or answers that go through the model at once on one device."""
    return micro_batches(config.trainer, config.hardware)[0]


def _least(config: RunConfig) -> int:
    """The smallest micro-batch that training takes."""
    return 2 if config.objective == UNPAIRS else 1


Phases = tuple[memory_plan.Memory, Evaluation | None]  # a step, and the evaluation that takes most


def _phases(config: RunConfig, shape: memory_plan.Shape, batch: int, length: int) -> Phases:
    memory = memory_plan.step_memory(config, shape, batch=batch, length=length)
    return memory, largest_evaluation(config, shape, memory, length)


def _peak(phases: Phases) -> int:
    """Bytes, in whatever phase."""
    memory, evaluation = phases
    return max(memory.total, 0 if evaluation is None else evaluation.bytes)


def _around(value: int, limit: int | None) -> list[int]:
    return [v for v in (max(1, value // 2), value, 2 * value) if v <= (limit or v)] if value > 1 else [1, 2, 4]


def remedy(
    config: RunConfig, shape: memory_plan.Shape, phases: Phases, device_bytes: int
) -> tuple[dict[str, Any] | None, list[str]]:
    """The first of `REMEDIES` with which all fits that takes `phases` now: the overrides to give and the bytes it then
    takes, None where they are not enough; and the names of the settings that were tried."""
    changed = copy.deepcopy(config)
    given: dict[str, str] = {}
    names: list[str] = []
    whole = has_experts(shape.model) or config.method.reselect_steps or config.trainer.average is not None
    stage = 2 if whole else 3  # what these need is not in shards
    if config.model.quantize != "none" or config.by_preference:
        stage = 0
    left = list(REMEDIES)
    while left:
        name = left.pop(0)
        if not _concerns(name, phases, device_bytes) or (change := _change(name, changed, stage)) is None:
            continue
        key, value = change
        tried = copy.deepcopy(changed)
        section, field = key.split(".")
        setattr(getattr(tried, section), field, value)
        if not _taken(tried):
            continue
        names += [key] if key not in names else []
        found = _phases(tried, shape, micro_batch(tried), tried.trainer.max_length)
        words = given | {key: show(value)}
        if _peak(found) <= device_bytes:
            return {"overrides": [f"{key}={value}" for key, value in words.items()], "bytes": _peak(found)}, names
        if name != "eval_batch":  # which is given only where it decides; so it is tried again after each other one
            changed, given, phases = tried, words, found
            left.insert(0, "eval_batch")
    return None, names


def _concerns(name: str, phases: Phases, device_bytes: int) -> bool:
    """Whether a remedy is one of what does not fit: of the step, the task, or (the others) of both."""
    memory, evaluation = phases
    step_fits = memory.total <= device_bytes
    if name == "eval_batch":
        return step_fits and evaluation is not None and evaluation.asked_by.startswith(EVAL_TASK)
    return not step_fits or name not in ("micro_batch", "gradient_checkpointing")


def _taken(config: RunConfig) -> bool:
    """Whether training takes such settings."""
    try:
        validation.check(config)
        checks.check_together(config)
        checks.check_trainer(config)
    except UserError:
        return False
    return True


def _change(name: str, config: RunConfig, stage: int) -> tuple[str, Any] | None:
    """The setting that a remedy changes, and to what (ZeRO up to `stage`); None where there is nothing to change."""
    trainer, hardware = config.trainer, config.hardware
    least = _least(config)
    if name == "eval_batch" and task_batch(config) > 1:
        return "eval.batch_size", 1
    if name == "micro_batch" and micro_batch(config) > least and trainer.batch_size % least == 0:
        return "hardware.micro_batch", least
    if name == "gradient_checkpointing" and trainer.checkpointing not in ("auto", "full"):
        return "trainer.checkpointing", "full"
    if name == "gradient_checkpointing" and config.checkpointing != "full":
        return "hardware.gradient_checkpointing", True
    if name == "zero_stage" and hardware.all_processes > 1 and hardware.zero_stage < stage and not hardware.fsdp:
        return "hardware.zero_stage", stage
    if name == "offload" and hardware.zero_stage == 3 and hardware.offload == "none":
        return "hardware.offload", "cpu"
    if name == "max_length" and trainer.max_length > 256:
        return "trainer.max_length", 256
    return None


def render(result: dict[str, Any]) -> None:
    """Prints the plan."""
    memory = result["per_device"]
    evaluation, peak = result["evaluation"], result["peak"]
    unit, size = ("GiB", GIB) if peak["bytes"] >= GIB else ("MiB", 2**20)
    parts = [(label, memory[key]) for key, label in PARTS.items()]
    if evaluation is not None:
        asked = f"{evaluation['asked_by']}, {evaluation['rows']} x {evaluation['tokens']} tokens"
        parts += [(STEP, memory["total"]), (asked, evaluation["bytes"])]
    parts.append((f"peak, in {peak['phase']}", peak["bytes"]))
    share = result["trainable_parameters"] / result["total_parameters"]
    processes = f"{result['processes']} processes, " if result["processes"] > 1 else ""
    sharing = "FSDP2, " if result["fsdp"] else f"ZeRO {result['zero_stage']}, " if result["zero_stage"] else ""
    console.table(
        f"Plan: {result['method']} on {result['model']}, {result['dtype']}, {result['trainable_parameters']:,} of "
        f"{result['total_parameters']:,} parameters trained ({share:.2%})",
        [f"one device, {processes}{sharing}{result['sequences']} x {result['length']} tokens at once", unit],
        [[label, f"{taken / size:,.2f}"] for label, taken in parts],
    )
    lengths = sorted({row["length"] for row in result["by_length_and_batch"]})
    batches = sorted({row["batch"] for row in result["by_length_and_batch"]})
    totals = {(row["length"], row["batch"]): row["bytes"] for row in result["by_length_and_batch"]}
    console.table(
        f"Peak in {unit} by tokens and {_counted(result['objective'])} at once",
        ["tokens", *(f"batch {batch}" for batch in batches)],
        [[str(tokens), *(f"{totals[tokens, batch] / size:,.2f}" for batch in batches)] for tokens in lengths],
    )
    print(_verdict(result))
    if result["predicted_floors"] is not None:
        print(f"A step is {in_words(result['predicted_floors'], 1.0)}.")


def _counted(objective: str) -> str:
    """What a batch is of."""
    if sequences(objective) == 2:
        return "pairs"
    return "answers" if objective == UNPAIRS else "sequences"


def _verdict(result: dict[str, Any]) -> str:
    if result["fits"] is None:
        return "How large the device is, is not known here; hardware.memory_gib=80 says it."
    size = f"{result['device_bytes'] / GIB:.1f} GiB"
    if result["fits"]:
        return f"Fits into {size}."
    if result["remedy"] is None:
        changed = f", nor would it with {', '.join(result['tried'])} changed" if result["tried"] else ""
        return f"Does not fit into {size}{changed}."
    words = " ".join(result["remedy"]["overrides"])
    return f"Does not fit into {size}. With {words} it takes {result['remedy']['bytes'] / GIB:.2f} GiB."

"""Checks configurations against their dataclasses: types, allowed values, ranges. No torch, no Hydra.

Every refusal is a `UserError` that starts with the key and the value seen: `trainer.batch_size=0: expected …`.
"""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from sparseft.config import (
    BenchConfig,
    DatasetConfig,
    EvalConfig,
    HardwareConfig,
    ModelConfig,
    RunConfig,
    TrainerConfig,
)
from sparseft.errors import UserError, nearest, shown
from sparseft.methods import METHODS

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "dataset": DatasetConfig,
    "trainer": TrainerConfig,
    "hardware": HardwareConfig,
    "eval": EvalConfig,
    "bench": BenchConfig,
}

# Spelt out because importing transformers takes seconds; a test holds them equal to the installed library's.
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
)
# These train every method here and are tested with it; transformers' other names are bitsandbytes' or refused.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
BITSANDBYTES = tuple(
    """adamw_bnb_8bit adamw_8bit ademamix ademamix_8bit lion_32bit lion_8bit paged_adamw_32bit paged_adamw_8bit
    paged_ademamix_32bit paged_ademamix_8bit paged_lion_32bit paged_lion_8bit rmsprop_bnb rmsprop_bnb_8bit
    rmsprop_bnb_32bit""".split()
)
_LOW_RANK = "it projects the gradients of whole weights, which no method here trains as such"
_IN_BACKWARD = "it updates weights within the backward pass, before the micro-steps of a step are summed"
_TWO_WEIGHTS = "the weights that it trains are not those that it would save and evaluate"
_UNTESTED = "it is not tested with sparse deltas"
REFUSED_OPTIMIZERS = {  # name: why
    **dict.fromkeys("galore_adamw galore_adamw_8bit galore_adafactor apollo_adamw".split(), _LOW_RANK),
    **dict.fromkeys("galore_adamw_layerwise galore_adamw_8bit_layerwise".split(), _IN_BACKWARD),
    **dict.fromkeys("galore_adafactor_layerwise apollo_adamw_layerwise lomo adalomo".split(), _IN_BACKWARD),
    **dict.fromkeys("schedule_free_radam schedule_free_adamw schedule_free_sgd".split(), _TWO_WEIGHTS),
    **dict.fromkeys("adamw_torch_4bit adamw_torch_8bit adamw_anyprecision grokadamw stable_adamw".split(), _UNTESTED),
    "adamw_torch_xla": "it is for TPUs",
    "adamw_torch_npu_fused": "it is for NPUs",
}

# Allowed values of the run's own fields; a method's config checks its own in `validate()`.
CHOICES: dict[str, tuple[Any, ...]] = {
    "model.dtype": ("auto", "float32", "bfloat16", "float16"),
    "dataset.format": ("auto", "alpaca", "guanaco", "messages", "oasst_trees", "prompt_completion", "text"),
    "dataset.too_long": ("cut_answer", "drop"),
    "dataset.paths": ("best", "all"),
    "trainer.scheduler": SCHEDULERS,
    "trainer.optimizer": (*OPTIMIZERS, *BITSANDBYTES),
    "trainer.resume": ("auto",),
    "hardware.device": ("auto", "cpu", "cuda"),
    "hardware.dtype": ("float32", "bfloat16", "float16"),
    "hardware.zero_stage": (0, 1, 2, 3),
    "hardware.offload": ("none", "cpu", "nvme"),
    "eval.split": ("test", "validation", "any"),
    "eval.prompt": ("auto", "alpaca", "guanaco", "chat"),
}

LARGEST = 2**63 - 1  # what the loops and counters of torch and Python hold
SMALLEST_FP32, LARGEST_FP32 = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # weights and their updates are fp32 at most

Rule = tuple[Callable[[Any], bool], str]
AT_LEAST_0: Rule = (lambda value: value >= 0, "at least 0")
AT_LEAST_1: Rule = (lambda value: value >= 1, "at least 1")
AT_LEAST_2: Rule = (lambda value: value >= 2, "at least 2")
ABOVE_0: Rule = (lambda value: value > 0, "more than 0")
BELOW_1: Rule = (lambda value: 0 <= value < 1, "a number from 0 to below 1")

# Ranges of numbers; null passes where the field allows it at all.
RANGES: dict[str, Rule] = {
    "sparsity": (
        lambda value: 0 < value < 1,
        "a share between 0 and 1, both excluded (0.984 freezes 98.4 % of the weights in scope)",
    ),
    "seed": (lambda value: 0 <= value < 2**32, "a whole number from 0 to 4294967295"),
    "dataset.eval_fraction": BELOW_1,
    "dataset.max_examples": AT_LEAST_1,
    "trainer.max_steps": (
        lambda value: value == -1 or value >= 1,
        "at least 1, or -1 to let trainer.num_epochs decide",
    ),
    "trainer.num_epochs": (lambda value: 0 < value <= 1e9, "more than 0, at most 1e9"),
    "trainer.learning_rate": (
        lambda value: SMALLEST_FP32 <= value <= LARGEST_FP32,
        "more than 0, and what fp32 can hold (from 1.2e-38 to 3.4e38)",
    ),
    "trainer.batch_size": AT_LEAST_1,
    "trainer.gradient_accumulation": AT_LEAST_1,
    "trainer.max_length": AT_LEAST_2,
    "trainer.warmup_steps": AT_LEAST_0,
    "trainer.weight_decay": (
        lambda value: 0 <= value <= LARGEST_FP32,
        "at least 0, and what fp32 can hold (up to 3.4e38)",
    ),
    "trainer.adam_beta1": BELOW_1,
    "trainer.adam_beta2": BELOW_1,
    "trainer.max_grad_norm": AT_LEAST_0,
    "trainer.max_bad_steps": AT_LEAST_1,
    "trainer.logging_steps": AT_LEAST_1,
    "trainer.eval_steps": AT_LEAST_1,
    "trainer.target_score": (lambda value: 0 < value <= 1, "an accuracy above 0, at most 1"),
    "trainer.best_after": BELOW_1,
    "trainer.save_steps": AT_LEAST_1,
    "trainer.save_total_limit": AT_LEAST_1,
    "hardware.num_processes": AT_LEAST_1,
    "hardware.num_machines": AT_LEAST_1,
    "hardware.micro_batch": AT_LEAST_1,
    "hardware.memory_gib": ABOVE_0,
    "eval.shots": AT_LEAST_0,
    "eval.limit": AT_LEAST_1,
    "eval.num_beams": AT_LEAST_1,
    "eval.max_new_tokens": AT_LEAST_1,
    "bench.steps": AT_LEAST_1,
    "bench.warmup_steps": AT_LEAST_0,
    "bench.batch_size": AT_LEAST_1,
    "bench.length": AT_LEAST_1,
    "bench.seeds": AT_LEAST_1,
    "bench.accumulation": AT_LEAST_1,
    "bench.samples": AT_LEAST_1,
}


@functools.cache
def field_types(config_class: type) -> dict[str, Any]:
    """The annotation of each field of a dataclass, resolved, in order."""
    hints = typing.get_type_hints(config_class)
    return {entry.name: hints[entry.name] for entry in fields(config_class)}


def run_fields() -> dict[str, Any]:
    """The annotations of the plain top-level settings: `seed`, `sparsity`, `output_dir`, …"""
    hints = field_types(RunConfig)
    return {name: hint for name, hint in hints.items() if name not in {*SECTIONS, "method", "method_name"}}


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """`int | str | None` -> `(int, str, NoneType)`; any other annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def is_optional(annotation: Any) -> bool:
    """Whether null is a value of the field."""
    return type(None) in alternatives(annotation)


def is_text(annotation: Any) -> bool:
    """Whether the field holds text and nothing else (null apart), so that whatever is typed is meant literally."""
    return set(alternatives(annotation)) - {type(None)} == {str}


def is_mapping(annotation: Any) -> bool:
    """Whether the field holds settings of its own, by names that are not known here."""
    return any(typing.get_origin(option) is dict for option in alternatives(annotation))


def is_list(annotation: Any) -> bool:
    """Whether the field holds a list."""
    return any(typing.get_origin(option) is list for option in alternatives(annotation))


def describe(annotation: Any) -> str:
    """What a user may write there: "a whole number or null"."""
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    words |= {Any: "a value", list: "a list such as [a,b]", dict: "a group such as {name: value}"}
    return " or ".join(
        words.get(typing.get_origin(option) or option, str(option)) for option in alternatives(annotation)
    )


def show(value: Any) -> str:
    """A value as one writes it on the command line, shortened where it is longer than a message should be."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return shown("[" + ",".join(show(item) for item in value) + "]", 300)
    if isinstance(value, dict):
        return shown("{" + ", ".join(f"{name}: {show(item)}" for name, item in value.items()) + "}", 300)
    return shown(str(value), 300)


def check_type(key: str, value: Any, annotation: Any) -> Any:
    """`value` as the field holds it (a whole number becomes a float where one is expected).

    Raises `UserError` where it does not fit. true and false are no numbers, and a number is no text.
    """
    for option in alternatives(annotation):
        if option is Any:
            return value
        if option is type(None) and value is None:
            return None
        if option is bool and isinstance(value, bool):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            if abs(value) > LARGEST:
                raise UserError(f"{key}={show(value)}: expected a whole number of at most {LARGEST}.")
            return value
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise UserError(f"{key}={value}: expected a finite number.")
            return float(value)
        if option is float and isinstance(value, str):
            number = _scientific(value)
            if number is not None:
                return number
        if option is str and isinstance(value, str):
            if not value.strip():
                alternative = f"; write {key}=null to leave it out" if is_optional(annotation) else ""
                raise UserError(f"{key} is empty: expected {describe(annotation)}{alternative}.")
            return value
        if typing.get_origin(option) is list and isinstance(value, list | tuple):
            (item,) = typing.get_args(option)
            return [check_type(f"{key}[{position}]", entry, item) for position, entry in enumerate(value)]
        if typing.get_origin(option) is dict and isinstance(value, dict):
            return {str(name): _plain(f"{key}.{name}", entry) for name, entry in value.items()}
    quoting = is_text(annotation) and value is not None and not isinstance(value, dict | list)
    hint = " (in a YAML file, quote the value)" if quoting else ""
    raise UserError(f"{key}={show(value)}: expected {describe(annotation)}{hint}.")


def _plain(key: str, value: Any) -> Any:
    """A value of a setting whose type is not known here: a finite number, text, true, false, null, a list of such."""
    if isinstance(value, list | tuple):
        return [_plain(f"{key}[{position}]", entry) for position, entry in enumerate(value)]
    if isinstance(value, str) and (number := _scientific(value)) is not None:
        return number
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value}: expected a finite number.")
    if value is None or isinstance(value, str | int | float):
        return value
    raise UserError(f"{key}={show(value)}: expected a number, text, true or false, null or a list.")


def _scientific(text: str) -> float | None:
    """`1e-4` as a number: PyYAML reads it as text for want of a dot."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if "e" in text.lower() and math.isfinite(number) else None


def build(config_class: type, content: Any, where: str, source: str = "") -> Any:
    """An instance of the dataclass from a dict; what is missing keeps its default, what is unknown is refused.

    `where` is the key of the section (`trainer`); `source` ends the message on an unknown key (" in FILE").
    """
    assert is_dataclass(config_class)
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a group of settings{source}, not '{show(content)}'.")
    hints = field_types(config_class)
    for name in content:
        if name not in hints:
            raise UserError(f"Unknown key '{where}.{name}'{source}.{nearest(str(name), hints)}")
    missing = [
        entry.name
        for entry in fields(config_class)
        if entry.name not in content and entry.default is MISSING and entry.default_factory is MISSING
    ]
    if missing:
        raise UserError(f"{where}.{missing[0]} is missing{source}: expected {describe(hints[missing[0]])}.")
    return config_class(**{name: check_type(f"{where}.{name}", value, hints[name]) for name, value in content.items()})


def check_choice(key: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuses a value that is none of `choices`, naming the nearest."""
    options = list(choices)
    if value in options:
        return
    listed = f": expected one of {', '.join(map(show, options))}" if len(options) <= 12 else " is unknown"
    begun = [option for option in map(str, options) if value and option.startswith(str(value))]
    near = f" Did you mean '{begun[0]}'?" if begun else nearest(str(value), map(str, options))
    if len(options) <= 12 and not near.startswith(" Did you mean"):
        near = ""  # the list stands there already
    sweep = (
        " To sweep over several values add --multirun."
        if isinstance(value, str) and all(part in map(str, options) for part in value.split(","))
        else ""
    )
    raise UserError(f"{key}={show(value)}{listed}.{sweep or near}")


def check(config: RunConfig) -> None:
    """Refuses values outside their range, then lets the method's config check itself."""
    device, _, number = config.hardware.device.partition(":")
    if device.lower() in ("cuda", "gpu") and number.isdigit():
        raise UserError(
            f"hardware.device={config.hardware.device}: expected one of auto, cpu, cuda; which GPU is said by the "
            f"environment: CUDA_VISIBLE_DEVICES={number}."
        )
    reason = REFUSED_OPTIMIZERS.get(config.trainer.optimizer)
    if reason is not None:
        raise UserError(
            f"trainer.optimizer={config.trainer.optimizer}: cannot be used here ({reason}); "
            f"use one of {', '.join(OPTIMIZERS)}."
        )
    for key, choices in CHOICES.items():
        value = _value(config, key)
        if value is not None:
            check_choice(key, value, choices)
    for key, (holds, expected) in RANGES.items():
        value = _value(config, key)
        if value is not None and not holds(value):
            raise UserError(f"{key}={show(value)}: expected {expected}.")
    batch_size = config.eval.batch_size
    if batch_size != "auto" and (isinstance(batch_size, str) or batch_size < 1):
        raise UserError(f"eval.batch_size={batch_size}: expected a whole number of at least 1, or auto.")
    trainer = config.trainer
    if trainer.target_score is not None and not (trainer.eval_task and trainer.eval_steps):
        raise UserError(
            f"trainer.target_score={trainer.target_score}: needs trainer.eval_task (whose accuracy it is) and "
            "trainer.eval_steps."
        )
    if (trainer.keep_best or trainer.eval_task) and not trainer.eval_steps:
        name = "keep_best=true" if trainer.keep_best else f"eval_task={trainer.eval_task}"
        raise UserError(f"trainer.{name}: needs trainer.eval_steps, the optimizer steps between evaluations.")
    hardware = config.hardware
    if hardware.offload != "none" and hardware.zero_stage == 0:
        raise UserError(
            f"hardware.offload={hardware.offload}: it is ZeRO that offloads; give hardware.zero_stage=1 to 3."
        )
    if hardware.offload == "nvme" and (hardware.zero_stage != 3 or hardware.offload_dir is None):
        raise UserError("hardware.offload=nvme: needs hardware.zero_stage=3 and hardware.offload_dir, a folder there.")
    limit = hardware.micro_batch
    if limit is not None and limit < trainer.batch_size and trainer.batch_size % limit:
        raise UserError(
            f"hardware.micro_batch={limit}: expected a divisor of trainer.batch_size={trainer.batch_size}, to split it."
        )
    if not config.bench.methods:
        raise UserError("bench.methods is empty: name at least one method.")
    for entry in config.bench.methods:
        check_choice("bench.methods", (entry.split() or [""])[0], ("floor", *METHODS))
    if hasattr(config.method, "validate"):
        config.method.validate()


def _value(config: RunConfig, key: str) -> Any:
    section, _, name = key.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)

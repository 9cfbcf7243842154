"""The keys that can be set, and what they may hold: which there are and what was probably meant by one that does not
exist; each section built and checked by its dataclass; and what several sections say together.
"""

from __future__ import annotations

import difflib
from dataclasses import is_dataclass
from typing import Any

from sparseft.compose import objectives
from sparseft.compose.overrides import GROUPS, Override
from sparseft.config import OPTIMIZERS, TRACKERS, RunConfig
from sparseft.errors import UserError, nearest
from sparseft.methods import METHODS, get_method
from sparseft.rules import check_choice, check_fields, check_type, check_value, field_types, is_mapping, show

# The groups of settings but the method, whose class is the method's own.
SECTIONS: dict[str, type] = {name: hint for name, hint in field_types(RunConfig).items() if is_dataclass(hint)}

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


def run_fields() -> dict[str, Any]:
    """The annotations of the plain top-level settings: `seed`, `sparsity`, `output_dir`, …"""
    hints = field_types(RunConfig)
    return {name: hint for name, hint in hints.items() if name not in {*SECTIONS, "method", "method_name"}}


def build(config_class: type, content: Any, where: str, source: str = "") -> Any:
    """An instance of the dataclass from a dict; what is missing keeps its default, what is unknown is refused.

    `where` is the key of the section (`trainer`); `source` ends the message on an unknown key (" in FILE").
    """
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a group of settings{source}, not '{show(content)}'.")
    hints = field_types(config_class)
    for name in content:
        if name not in hints:
            raise UserError(f"Unknown key '{where}.{name}'{source}.{nearest(str(name), hints)}")
    return config_class(**{name: check_type(f"{where}.{name}", value, hints[name]) for name, value in content.items()})


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
    for section in SECTIONS:
        check_fields(getattr(config, section), lambda name, section=section: f"{section}.{name}")
    for name, annotation in run_fields().items():
        check_value(name, getattr(config, name), annotation)
    trainer = config.trainer
    if trainer.target_score is not None and not (trainer.eval_task and trainer.eval_steps):
        raise UserError(
            f"trainer.target_score={trainer.target_score}: needs trainer.eval_task (whose accuracy it is) and "
            "trainer.eval_steps."
        )
    if (trainer.keep_best or trainer.eval_task or trainer.patience) and not trainer.eval_steps:
        asked = f"eval_task={trainer.eval_task}" if trainer.eval_task else f"patience={trainer.patience}"
        name = "keep_best=true" if trainer.keep_best else asked
        raise UserError(f"trainer.{name}: needs trainer.eval_steps, the optimizer steps between evaluations.")
    if trainer.average is not None and trainer.keep_best:
        raise UserError(
            f"trainer.average={trainer.average} and trainer.keep_best=true: what is left is the mean over steps or the "
            "best evaluation's adapter; give one of them."
        )
    if config.dataset.streaming and config.dataset.max_examples is None:
        sequences = trainer.batch_size * trainer.gradient_accumulation * config.hardware.all_processes
        taken = f"; trainer.max_steps={trainer.max_steps} takes {trainer.max_steps * sequences:,} examples"
        raise UserError(
            "dataset.streaming=true: needs dataset.max_examples, so many records are read of each source"
            f"{taken if trainer.max_steps > 0 else ''}."
        )
    for name in trainer.trackers:
        check_choice("trainer.report_to", name, TRACKERS)
    if trainer.sample_steps is not None and trainer.sample_prompts is None:
        raise UserError(f"trainer.sample_steps={trainer.sample_steps}: needs trainer.sample_prompts, what is asked.")
    hardware = config.hardware
    if trainer.compile == "graphs" and trainer.pad_to != "max_length":
        raise UserError(
            "trainer.compile=graphs: a CUDA graph repeats steps of one shape, and batches as long as their longest "
            "sequence have many; give trainer.pad_to=max_length."
        )
    if trainer.checkpointing.startswith("selective"):
        if trainer.compile != "none":
            raise UserError(
                f"trainer.checkpointing={trainer.checkpointing}: compiled code decides by itself what it computes "
                f"again; with trainer.compile={trainer.compile} use trainer.checkpointing=none or full."
            )
        if hardware.in_shards:
            raise UserError(
                f"trainer.checkpointing={trainer.checkpointing}: what is computed again needs weights that are in "
                f"shards by then; with {hardware.in_shards} use trainer.checkpointing=none or full."
            )
    if hardware.fsdp and hardware.zero_stage:
        raise UserError(
            f"hardware.fsdp=true: FSDP2 and ZeRO are two ways to the same; use hardware.zero_stage=0 (now "
            f"{hardware.zero_stage}), or hardware.fsdp=false."
        )
    if hardware.fsdp and trainer.compile != "none":
        raise UserError(
            f"trainer.compile={trainer.compile}: FSDP2 gathers between a model's modules, in Python; with "
            "hardware.fsdp=true use trainer.compile=none."
        )
    if hardware.zero_stage and trainer.compile in ("layers", "graphs"):
        raise UserError(
            f"trainer.compile={trainer.compile}: DeepSpeed gathers and reduces between a model's modules, in Python; "
            f"with hardware.zero_stage={hardware.zero_stage} use trainer.compile=none or model."
        )
    if trainer.average is not None and (hardware.zero_stage == 3 or (hardware.fsdp and config.method.trains_all)):
        raise UserError(
            f"trainer.average={trainer.average}: no process has what trains whole under {hardware.in_shards}; use "
            "hardware.fsdp=false and hardware.zero_stage=2 or less."
        )
    if hardware.offload != "none" and hardware.zero_stage == 0:
        raise UserError(
            f"hardware.offload={hardware.offload}: it is ZeRO that offloads; give hardware.zero_stage=1 to 3."
        )
    if hardware.offload == "nvme" and (hardware.zero_stage != 3 or hardware.offload_dir is None):
        raise UserError("hardware.offload=nvme: needs hardware.zero_stage=3 and hardware.offload_dir, a folder there.")
    if not config.bench.methods:
        raise UserError("bench.methods is empty: name at least one method.")
    for entry in config.bench.methods:
        check_choice("bench.methods", (entry.split() or [""])[0], ("floor", *METHODS))
    objectives.check(config)
    config.method.validate()


def known_keys(method_name: str | None = None) -> dict[str, Any]:
    """Every key that can be set, with its type; the method's own keys only if a method is given."""
    keys = dict(run_fields())
    for section, section_class in SECTIONS.items():
        keys |= {f"{section}.{name}": hint for name, hint in field_types(section_class).items()}
    if method_name is not None:
        keys |= {f"method.{name}": hint for name, hint in method_fields(method_name).items()}
    return keys


def annotation_of(key: str, keys: dict[str, Any]) -> Any:
    """The type of a key, also of one below a setting that holds others by any name; None where there is no such key."""
    group = keys.get(key.rpartition(".")[0])
    return Any if key not in keys and group is not None and is_mapping(group) else keys.get(key)


def method_fields(name: str) -> dict[str, Any]:
    return field_types(get_method(name))


def check_key(override: Override, keys: dict[str, Any], method_name: str) -> None:
    """Refuses a key that does not exist, with the nearest that does."""
    key = override.key
    if annotation_of(key, keys) is not None or (key == "method.name" and override.value == method_name):
        return
    if key == "method.name":
        raise UserError(f"{override.word}: the method is chosen as a whole, with method={override.value}.")
    sections = {name.split(".")[0] for name in keys if "." in name}
    if key in sections:
        first = next(name for name in keys if name.startswith(f"{key}."))
        raise UserError(f"{override.word}: '{key}' is a group of settings; set one of them, as in {first}=….")
    if key.startswith("method."):
        owners = [name for name in METHODS if key.removeprefix("method.") in method_fields(name)]
        other = f" (it belongs to {', '.join(owners)})" if owners else ""
        raise UserError(
            f"method={method_name} has no setting '{key}'{other}.{'' if owners else nearest_key(key, keys)}"
        )
    raise UserError(f"Unknown key '{key}' in {override.word}.{nearest_key(key, keys)}")


def nearest_key(key: str, keys: dict[str, Any]) -> str:
    """Where a key that does not exist was probably meant to go, else what there is instead.

    Compares last parts within a section: whole keys would find `trainer.resume` near `trainer.lr`.
    """
    section, _, name = key.rpartition(".")
    same_name = [known for known in keys if known.rpartition(".")[2] == name]
    if same_name:
        return f" Did you mean {' or '.join(repr(known) for known in same_name)}?"
    siblings = [known for known in keys if known.rpartition(".")[0] == section]
    if not section:
        siblings += GROUPS
    pools = [siblings] if section and siblings else [siblings, list(keys)]
    for pool in pools:
        by_name = {known.rpartition(".")[2]: known for known in reversed(pool)}
        initials = {"".join(word[:1] for word in part.split("_")): part for part in by_name if "_" in part}  # lr
        close = [initials[name]] if name in initials else difflib.get_close_matches(name, by_name, n=1)
        if close:
            return f" Did you mean '{by_name[close[0]]}'?"
    whole = nearest(key, keys)
    if section and siblings or not whole.startswith(" Did you mean"):
        sections = {known.split(".")[0] for known in keys if "." in known}
        return nearest("", siblings or sections)
    return whole

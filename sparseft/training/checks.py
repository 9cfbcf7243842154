"""What can be refused at once, before data or a model are loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from sparseft.config import AUTO, BITSANDBYTES, BUNDLED, OPTIMIZERS, RunConfig, in_bundle
from sparseft.data.reading import named_sources
from sparseft.data.sources import locate
from sparseft.distributed import launch
from sparseft.distributed.env import check_variables, processes
from sparseft.errors import UserError, looks_local, nearest_path, where_looked
from sparseft.models.checkpoint import Checkpoint
from sparseft.models.loading import check_model_path, load_config, resolve_device, type_written
from sparseft.models.packed.quantize import check_quantize
from sparseft.models.packed.quantized import quantized_by
from sparseft.selection.exclude import find_excluded
from sparseft.training import schedules, trackers
from sparseft.training.sample_answers import read_prompts


def check_one_process(config: RunConfig, command: str) -> None:
    """Refuses several processes to a command that runs in one."""
    check_variables()
    for field, possible in (("num_processes", 1), ("num_machines", 1), ("zero_stage", 0), ("fsdp", False)):
        value = getattr(config.hardware, field)
        if value != possible:
            raise UserError(
                f"hardware.{field}={str(value).lower()}: `sparseft {command}` runs in one process; use "
                f"hardware.{field}={str(possible).lower()}."
            )
    if (started := processes(config.hardware)) > 1:
        raise UserError(
            f"WORLD_SIZE={started}: a launcher has started {started} processes, but `sparseft {command}` runs in one; "
            "start it without torchrun."
        )


def check_hardware(config: RunConfig) -> None:
    """Refuses processes that cannot be started, and what cannot be trained in several."""
    hardware = config.hardware
    launch.check(hardware)
    if config.trainer.compile == "graphs" and resolve_device(hardware.device).type != "cuda":
        raise UserError(
            "trainer.compile=graphs: CUDA graphs need a CUDA device, and this run is on the CPU; use "
            "trainer.compile=none, model or layers."
        )
    check_together(config)
    if hardware.zero_stage and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"hardware.zero_stage={hardware.zero_stage}: needs the package deepspeed, which is not installed: pip "
            "install deepspeed, or shard the model by hardware.fsdp=true, which needs nothing more."
        )
    if hardware.offload == "nvme" and not (hardware.offload_dir and Path(hardware.offload_dir).is_dir()):
        raise UserError(f"hardware.offload_dir={hardware.offload_dir}: no such folder.")
    if hardware.num_processes > 1:
        gpus = torch.cuda.device_count()
        if hardware.device != "cpu" and 0 < gpus < hardware.num_processes:
            raise UserError(
                f"hardware.num_processes={hardware.num_processes}: this machine has {gpus} "
                f"{'GPU' if gpus == 1 else 'GPUs'}, and each process needs its own; use "
                f"hardware.num_processes={gpus}, or hardware.device=cpu."
            )


def check_together(config: RunConfig) -> None:
    """Refuses methods, bases and shards that do not go together, on any machine."""
    hardware = config.hardware
    if hardware.fsdp and processes(hardware) == 1:
        raise UserError(
            "hardware.fsdp=true: one process has nobody to share the model with; use hardware.num_processes=2 or more, "
            "or hardware.fsdp=false."
        )
    if hardware.in_shards and config.method.reselect_steps:
        raise UserError(
            f"method.reselect_steps={config.method.reselect_steps}: what inactive entries have learnt is kept in the "
            f"weights, which {hardware.in_shards} has in shards; use method.reselect_steps=0, or hardware.fsdp=false "
            "and hardware.zero_stage=2 or less."
        )
    if config.method.reselects_running:
        if config.trainer.compile != "none":
            raise UserError(
                f"trainer.compile={config.trainer.compile}: method.reselect_by=running looks at gradients on their "
                "way, which a compiled layer does not show; use trainer.compile=none, method.reselect_by=calibration "
                "or method.reselect_steps=0."
            )
        if config.method.reselects_in_turn and hardware.zero_stage:
            raise UserError(
                f"hardware.zero_stage={hardware.zero_stage}: method={config.method_name} with "
                "method.reselect_by=running takes a part of a layer's step alone, and ZeRO takes the step elsewhere; "
                "use hardware.zero_stage=0, method.reselect_by=calibration, or method.reselect_steps=0."
            )
    if config.model.quantize != "none":
        _check_packed(config, f"model.quantize={config.model.quantize}")


def _check_packed(config: RunConfig, quantized: str) -> None:
    """Refuses what packed weights do not go with; `quantized` is the setting that they come of."""
    hardware = config.hardware
    if config.method.trains_all:
        raise UserError(f"{quantized}: method={config.method_name} trains every weight, which packed ones cannot.")
    if config.method.reselect_steps:
        raise UserError(
            f"method.reselect_steps={config.method.reselect_steps}: what inactive entries have learnt is kept in the "
            f"weights, which are packed ({quantized}); use method.reselect_steps=0."
        )
    if hardware.zero_stage or hardware.fsdp:
        who, given = ("FSDP2", "hardware.fsdp=true") if hardware.fsdp else ("DeepSpeed", hardware.zero_stage)
        raise UserError(
            f"{quantized}: {who} takes no packed weights here yet; use hardware.fsdp=false and hardware.zero_stage=0 "
            f"(DDP), now {given}."
        )


def check_tests(config: RunConfig) -> None:
    """Refuses a folder of test data that is not there."""
    folder = config.eval.data_dir
    if folder is not None and folder.startswith(BUNDLED):
        if in_bundle(folder) is None:
            raise UserError(f"eval.data_dir={folder}: nothing of that name is bundled; bundled:data has all test data.")
    elif folder is not None and not Path(folder).expanduser().is_dir():
        raise UserError(f"eval.data_dir={folder}: no such folder{where_looked(folder)}.{nearest_path(folder)}")


def learning_rate(config: RunConfig) -> float:
    """The learning rate as given, else the method's, also where it is yet to be found."""
    given = config.trainer.learning_rate
    return given if isinstance(given, float) else config.method.learning_rate


def check_objective(config: RunConfig) -> None:
    """Refuses a preference objective without the library whose loss it is."""
    if config.by_preference and importlib.util.find_spec("trl") is None:
        raise UserError(
            f"objective={config.objective}: needs the package trl, whose losses these are: pip install "
            "'sparseft[preference]'."
        )


def check_trainer(config: RunConfig) -> None:
    """Refuses a schedule that cannot be followed, and an optimizer or a tracker that this machine has not, and
    prompts that cannot be read."""
    trainer, hardware = config.trainer, config.hardware
    if trainer.learning_rate == AUTO and (processes(hardware) > 1 or hardware.zero_stage):
        raise UserError(
            "trainer.learning_rate=auto: a rate is found in one process; find it there (hardware.num_processes=1 "
            "trainer.max_steps=1), with a trainer.gradient_accumulation that makes up for the others, and give it here."
        )
    check_objective(config)
    trackers.check(trainer.trackers)
    read_prompts(trainer.sample_prompts)
    rate = None if trainer.learning_rate == AUTO else learning_rate(config)
    schedules.check(trainer, rate, trainer.max_steps if trainer.max_steps > 0 else None)
    if trainer.label_smoothing and trainer.compile in ("model", "graphs"):
        raise UserError(
            f"trainer.label_smoothing={trainer.label_smoothing}: cannot be used with trainer.compile="
            f"{trainer.compile}, which compiles the model's own loss; use trainer.compile=layers."
        )
    name = trainer.optimizer
    pieces = f"hardware.zero_stage={hardware.zero_stage}" if hardware.zero_stage else ""
    if hardware.fsdp and config.method.trains_all:
        pieces = "hardware.fsdp=true"
    if pieces and name in ("adafactor", *BITSANDBYTES):
        raise UserError(
            f"trainer.optimizer={name}: cannot be used here (with {pieces} the optimizer gets pieces of parameters, of "
            "which it would make other steps); use adamw_torch."
        )
    if name not in BITSANDBYTES:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"trainer.optimizer={name}: cannot be used here (it needs the package bitsandbytes: pip install "
            f"bitsandbytes); without it use one of {', '.join(OPTIMIZERS)}."
        )
    if hardware.device == "cpu" or not torch.cuda.is_available():
        raise UserError(
            f"trainer.optimizer={name}: cannot be used here (bitsandbytes' optimizers train on CUDA devices); use one "
            f"of {', '.join(OPTIMIZERS)}."
        )


def check_data(config: RunConfig) -> None:
    """Refuses data files and test data that are not there."""
    for source in named_sources(config.dataset, config.model.path.startswith(BUNDLED)):
        locate(source.path, key=source.key)
    if config.dataset.eval_path is not None:
        locate(config.dataset.eval_path, key="dataset.eval_path")
    check_tests(config)


def check_excluded(config: RunConfig) -> None:
    """Refuses `method.exclude` where a folder is none of a sparse adapter; a run that goes on has its selection."""
    if config.method.sparse and (config.trainer.resume is None or config.method.reselect_steps):
        for folder in config.method.exclude or ():
            find_excluded(folder)


def check_model(config: RunConfig) -> None:
    """Refuses a model folder that is not there, a quantised checkpoint that cannot be trained, a model that could not
    be loaded again once it was trained whole, and a device that this machine has not."""
    content = load_config(config.model, packed=True)
    if config.method.trains_all and (written := type_written(content)) is not None:
        raise UserError(
            f"method={config.method.name}: of {config.model.path} the language model alone is trained, and would be "
            f"saved as a model of the type '{written}', which transformers does not load; use a method that trains a "
            "part of the weights, whose adapter is of the whole model."
        )
    check_quantize(config.model, content, resolve_device(config.hardware.device))
    if config.model.quantize != "none" and (folder := Path(check_model_path(config.model.path))).is_dir():
        Checkpoint.of_folder(folder)  # whose weights are read beside the packed ones
    if (packed := quantized_by(content)) is not None:
        _check_packed(config, f"model.path={config.model.path}, which is quantized ({packed})")
    if getattr(config.method, "residual", False) and config.model.quantize == "none" and packed is None:
        raise UserError(
            "method.residual=true: this base is at full precision, of which quantization took nothing; it is for "
            "model.quantize=nf4, int8 or int4."
        )
    if config.model.tokenizer is not None:
        path = Path(config.model.tokenizer).expanduser()
        if looks_local(config.model.tokenizer) and not path.is_dir():
            raise UserError(
                f"model.tokenizer={config.model.tokenizer}: no such folder{where_looked(path)}.{nearest_path(path)}"
            )
    resolve_device(config.hardware.device)

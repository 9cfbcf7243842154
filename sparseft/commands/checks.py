"""What can be refused at once, before torch, data or a model are loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sparseft import launch
from sparseft.config import RunConfig
from sparseft.errors import UserError
from sparseft.launch_variables import check_place


def check_one_process(config: RunConfig, command: str) -> None:
    """Refuses several processes to a command that runs in one."""
    check_place()
    for field, possible in (("num_processes", 1), ("num_machines", 1), ("zero_stage", 0)):
        value = getattr(config.hardware, field)
        if value != possible:
            raise UserError(
                f"hardware.{field}={value}: `sparseft {command}` runs in one process; use hardware.{field}={possible}."
            )


def check_hardware(config: RunConfig) -> None:
    """Refuses processes that cannot be started, and what cannot be trained in several (imports torch if several)."""
    hardware = config.hardware
    launch.check(hardware)
    if hardware.zero_stage == 3 and getattr(config.method, "reselect_steps", 0):
        raise UserError(
            f"method.reselect_steps={config.method.reselect_steps}: what parked entries have learnt is kept in the "
            "weights, which ZeRO-3 has sharded; use hardware.zero_stage=2 or less."
        )
    if hardware.zero_stage and importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"hardware.zero_stage={hardware.zero_stage}: deepspeed is not installed.")
    if hardware.offload == "nvme" and not (hardware.offload_dir and Path(hardware.offload_dir).is_dir()):
        raise UserError(f"hardware.offload_dir={hardware.offload_dir}: no such folder.")
    if hardware.num_processes > 1:
        import torch

        gpus = torch.cuda.device_count()
        if hardware.device != "cpu" and 0 < gpus < hardware.num_processes:
            raise UserError(
                f"hardware.num_processes={hardware.num_processes}: this machine has {gpus} "
                f"{'GPU' if gpus == 1 else 'GPUs'}, and each process needs its own; use "
                f"hardware.num_processes={gpus}, or hardware.device=cpu."
            )


def check_data(config: RunConfig) -> None:
    """Refuses data files that are not there."""
    from sparseft.data.sources import locate_file

    if config.dataset.train_path is not None:
        locate_file(config.dataset.train_path, key="dataset.train_path")
    if config.dataset.eval_path is not None:
        locate_file(config.dataset.eval_path, key="dataset.eval_path")


def check_model(config: RunConfig) -> None:
    """Refuses a model folder that is not there, a quantised checkpoint, and a device that this machine has not (imports
    torch and transformers)."""
    from sparseft.modeling import load_config, resolve_device

    load_config(config.model)
    if config.model.tokenizer is not None:
        path = Path(config.model.tokenizer).expanduser()
        if config.model.tokenizer.startswith((".", "/", "~")) and not path.is_dir():
            raise UserError(f"model.tokenizer={config.model.tokenizer}: no such folder.")
    resolve_device(config.hardware.device)

"""What can be refused at once, before torch, data or a model are loaded."""

from __future__ import annotations

from pathlib import Path

from sparseft.config import RunConfig
from sparseft.errors import UserError


def check_hardware(config: RunConfig) -> None:
    """Refuses what this version cannot do yet."""
    for field, possible in (("num_processes", 1), ("zero_stage", 0)):
        value = getattr(config.hardware, field)
        if value != possible:
            raise UserError(
                f"hardware.{field}={value}: several processes are not available yet; use hardware.{field}={possible}."
            )


def check_data(config: RunConfig) -> None:
    """Refuses data files that are not there."""
    from sparseft.data.sources import locate_file

    if config.dataset.train_path is not None:
        locate_file(config.dataset.train_path, key="dataset.train_path")
    if config.dataset.eval_path is not None:
        locate_file(config.dataset.eval_path, key="dataset.eval_path")


def check_model(config: RunConfig) -> None:
    """Refuses a model folder that is not there, and a device that this machine has not (imports torch)."""
    from sparseft.modeling import check_model_path, resolve_device

    check_model_path(config.model.path)
    if config.model.tokenizer is not None:
        path = Path(config.model.tokenizer).expanduser()
        if config.model.tokenizer.startswith((".", "/", "~")) and not path.is_dir():
            raise UserError(f"model.tokenizer={config.model.tokenizer}: no such folder.")
    resolve_device(config.hardware.device)

"""A run's checkpoints: which there are, and how an attached model takes up what one of them trained."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from sparseft.adapter import load_adapter, state_of
from sparseft.errors import UserError
from sparseft.files import read_tensors
from sparseft.trainer_reselecting import load_active

CHECKPOINTS = "checkpoints"
PREFIX = "checkpoint-"


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    numbers = [item.name.removeprefix(PREFIX) for item in folder.iterdir() if item.name.startswith(PREFIX)]
    return sorted(int(number) for number in numbers if number.isdigit())


def last_checkpoint(run: Path) -> str | None:
    """The newest checkpoint's folder of a run, or null."""
    steps = checkpoint_steps(run / CHECKPOINTS)
    return str(run / CHECKPOINTS / f"{PREFIX}{steps[-1]}") if steps else None


def step_of(checkpoint: str | None) -> int:
    """The optimizer step of a checkpoint's folder; -1 for none."""
    return int(Path(checkpoint).name.removeprefix(PREFIX)) if checkpoint else -1


def load_trained(model: nn.Module, folder: Path) -> None:
    """Fills the attached model's trained parameters from an adapter folder that the same method saved, in place."""
    state = state_of(model)
    assert state is not None
    if state.kind == "sparse":
        if load_active(model, folder.parent):
            return
        load_adapter(model, folder, state.active or "default")
        return
    if state.kind == "whole":
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise UserError(f"{folder}: no model*.safetensors, so this is no fully fine-tuned model.")
        tensors = {name: tensor for file in files for name, tensor in read_tensors(file, "model").items()}
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
        if unexpected or set(missing) - tied:
            raise UserError(f"{folder}: the weights do not fit the model ({[*unexpected, *missing][0]}).")
        return
    import peft

    tensors = read_tensors(folder / "adapter_model.safetensors", "adapter")
    peft.set_peft_model_state_dict(model, tensors, adapter_name=state.active or "default")

"""DeepSpeed's configuration, and what of DeepSpeed and accelerate has to be patched."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch

from sparseft.config import HardwareConfig

MAX_BUCKET = 500_000_000  # numbers that ZeRO reduces at once at most, DeepSpeed's own default


def zero_config(hardware: HardwareConfig) -> dict[str, Any]:
    """DeepSpeed's configuration of ZeRO; what depends on the run is `auto`, which transformers fills in.

    Its own mixed precision stays off: it would cast the deltas. Models keep the dtypes they have.
    """
    zero: dict[str, Any] = {"stage": hardware.zero_stage}
    target: dict[str, Any] = {"device": hardware.offload}
    if hardware.offload == "nvme":
        target["nvme_path"] = hardware.offload_dir
    if hardware.offload != "none":
        pinned = {"pin_memory": hardware.device != "cpu"}
        zero["offload_optimizer"] = target | pinned
        if hardware.zero_stage == 3:
            zero["offload_param"] = target | pinned
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW: DeepSpeed's own compiles C++ when it is first used
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def forget_zero() -> None:
    """Ends what an earlier run with DeepSpeed means to this process: accelerate would use it for the next run too, and
    with ZeRO-3 transformers would load models in shards."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def no_shared_memory() -> None:
    """Turns DeepSpeed's collectives in shared memory off, before they are set up: they are compiled when first used,
    and wait for a process that died without end."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def own_dtypes() -> Iterator[None]:
    """Inside, `deepspeed.zero.Init` leaves tensors in the dtype in which a model makes them, such as fp32 for a table
    of rotations: it would cast all of them to one. transformers gives it nothing but its configuration."""
    import deepspeed

    usual = deepspeed.zero.Init
    deepspeed.zero.Init = functools.partial(usual, tensor_overrides=[deepspeed.zero.DeepSpeedTensorOverride.device])
    try:
        yield
    finally:
        deepspeed.zero.Init = usual


def deepspeed_on_cpu() -> dict[str, Any]:
    """accelerate's settings for DeepSpeed without a device: it would not see the other processes, as it looks for them
    by the device's backend, so it is told."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import patch_environment

    no_shared_memory()
    AcceleratorState._reset_state(reset_partial_state=True)
    with patch_environment(ACCELERATE_USE_DEEPSPEED="true"):
        PartialState(backend="gloo")
    return {"use_configured_state": True}


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Inside, torch reads files with `weights_only`, also where DeepSpeed asks for the contrary: its checkpoints could
    run anything otherwise. Of its own classes they hold those three."""
    from accelerate.utils import patch_environment
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    forced = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    with patch_environment(**forced), torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        yield

"""DeepSpeed's configuration, and all that reaches into DeepSpeed and accelerate beyond what they offer.

Each such place asks first whether the thing is there (`_inside`): a silent miss would train another way than asked for.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import types
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from sparseft.config import HardwareConfig
from sparseft.distributed.ranks import all_gather_object
from sparseft.errors import RunError

MAX_BUCKET = 500_000_000  # the most elements that ZeRO reduces at once: DeepSpeed's default


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


def _inside(owner: Any, name: str, package: str = "deepspeed") -> Any:
    """What a library keeps under a name of its own; RunError where this version of it has no such thing."""
    if not hasattr(owner, name):
        kind = owner if isinstance(owner, (type, types.ModuleType)) else type(owner)
        raise RunError(
            f"{package} {version(package)} has no {kind.__name__}.{name}, which sparseft reaches into: install a "
            "version that sparseft is tested with (constraints.txt)."
        )
    return getattr(owner, name)


def no_shared_memory() -> None:
    """Turns DeepSpeed's collectives in shared memory off, before they are set up: they are compiled when first used,
    and wait for a process that died without end."""
    import deepspeed

    _inside(deepspeed.ops, "__compatible_ops__")["deepspeed_shm_comm"] = False


def deepspeed_on_cpu() -> dict[str, Any]:
    """accelerate's settings for DeepSpeed without a device: it would not see the other processes, as it looks for them
    by the device's backend, so it is told."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import patch_environment

    no_shared_memory()
    _inside(AcceleratorState, "_reset_state", "accelerate")(reset_partial_state=True)
    with patch_environment(ACCELERATE_USE_DEEPSPEED="true"):
        PartialState(backend="gloo")
    return {"use_configured_state": True}


def import_only_to_train() -> None:
    """Has accelerate ask whether a model is DeepSpeed's engine only where DeepSpeed is loaded, as no engine is made
    before. Else it imports DeepSpeed for the question, which takes a second wherever it is installed.

    An accelerate that asks in another way is left to it: that takes the second, and nothing else."""
    from accelerate.utils import other

    if hasattr(other, "is_deepspeed_available"):
        other.is_deepspeed_available = lambda: "deepspeed" in sys.modules


@contextlib.contextmanager
def own_dtypes() -> Iterator[None]:
    """Inside, `deepspeed.zero.Init` leaves tensors in the dtype in which a model makes them, such as fp32 for a table
    of rotations: it would cast all of them to one. transformers gives it nothing but its configuration."""
    import deepspeed

    usual = _inside(deepspeed.zero, "Init")
    kept = _inside(deepspeed.zero, "DeepSpeedTensorOverride").device
    deepspeed.zero.Init = functools.partial(usual, tensor_overrides=[kept])
    try:
        yield
    finally:
        deepspeed.zero.Init = usual


def change_zero(configuration: Any, **settings: Any) -> None:
    """Changes settings of ZeRO that depend on the model, which comes after transformers has read the configuration (an
    `HfDeepSpeedConfig`) and before the engine takes it."""
    _inside(configuration, "config", "transformers")["zero_optimization"].update(settings)


def judge_gradients(engine: Any) -> None:
    """Has ZeRO leave out a step whose gradient is not finite: stages 1 and 2 would only look where fp16 trains."""
    if engine.zero_optimization_stage() < 3:
        _inside(engine.optimizer, "check_grad_overflow")
        engine.optimizer.check_grad_overflow = True


class WholeMoments:
    """What ZeRO keeps in shards, as `move_moments` takes an optimizer: of each parameter its moments, whole."""

    def __init__(self, state: dict[Tensor, dict[str, Tensor]]) -> None:
        self.state = state


@contextlib.contextmanager
def whole_moments(optimizer: Any, parameters: Sequence[Tensor]) -> Iterator[Any]:
    """Inside, parameters' moments can be rearranged: the optimizer's own, or where ZeRO 1 or 2 has split them over the
    processes, what is put together of them. Afterwards each process keeps its part of those, and of the parameters."""
    shards = type(getattr(optimizer, "optimizer", optimizer)).__module__.startswith("deepspeed.")
    if not shards:
        yield optimizer
        return
    from deepspeed.utils import (
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )

    # Only parameters that this process holds a part of have a mapping; its moments exist after the first update.
    mappings = [_inside(parameter, "_hp_mapping") for parameter in parameters]
    own = {name for mapping in mappings if mapping is not None for name in _inside(mapping, "optim_fragment") or ()}
    names = sorted(set().union(*all_gather_object(own)))
    moments = WholeMoments({p: {name: safe_get_full_optimizer_state(p, name) for name in names} for p in parameters})
    yield moments
    for parameter, state in moments.state.items():
        safe_set_full_fp32_param(parameter, parameter.detach())
        for name, value in state.items():
            safe_set_full_optimizer_state(parameter, value, name)


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

"""What training in several processes needs beside transformers' Trainer: the same data, decisions and files as one.

Without `torch.distributed` every function here does what one process needs, which is mostly nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers.trainer import SCHEDULER_NAME

from sparseft import console
from sparseft.adapter import save_adapter, state_of
from sparseft.config import HardwareConfig
from sparseft.errors import RunError, UserError
from sparseft.importance.ranks import from_first, rank_and_world
from sparseft.layers import sparse_layers, write_back
from sparseft.layers.delta_path import use_delta_path
from sparseft.layers.experts import ExpertLinear
from sparseft.methods import get_method
from sparseft.modeling import ModelSpec
from sparseft.sharding import full_shape, is_sharded, state_on_first
from sparseft.trainer_checkpoints import fitting
from sparseft.trainer_reselecting import load_active

MAX_BUCKET = 500_000_000  # numbers that ZeRO reduces at once at most, DeepSpeed's own default


def is_first() -> bool:
    """Whether this process writes files and speaks."""
    return rank_and_world()[0] == 0


def barrier() -> None:
    """Waits until all processes are here. By an object, which travels between the hosts: no device has to be idle."""
    from_first(None)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in any process. All ask at the same point, or they would wait for each other."""
    if rank_and_world()[1] == 1:
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value)


@contextlib.contextmanager
def shared_folder(parent: Path) -> Iterator[Path]:
    """A new folder below `parent` that all processes see, gone afterwards unless it was renamed."""
    made = None
    if is_first():
        parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(prefix=".partial-", dir=parent)
    folder = Path(from_first(made))
    try:
        yield folder
    finally:
        if is_first():
            shutil.rmtree(folder, ignore_errors=True)


def draw_anew(checkpoint: Path, seed: int, step: int) -> bool:
    """Whether a checkpoint was saved by another number of processes than go on: then their random states say nothing of
    these ones'. Each process starts its numbers from the seed, the step and its own place, and the first one says so.
    """
    rank, world = rank_and_world()
    before = len(list(checkpoint.glob("rng_state*.pth")))
    if before == world:
        return False
    digest = hashlib.sha256(f"{seed} {step} {rank} {world}".encode()).digest()
    transformers.set_seed(int.from_bytes(digest[:4], "big"))
    if rank == 0:
        console.log(
            f"resume: {checkpoint.name} was saved by {before} processes and goes on in {world}, so random numbers (of "
            "dropout, say) are drawn anew, from the seed and the step"
        )
    return True


# ---- data ----


class EvenDataset(Dataset):
    """`dataset` lengthened by empty examples (one token without a label) to a multiple of `multiple`.

    So every process gets as many batches as the others, no example counts twice, and the sums over labelled tokens are
    those of one process. Without `fillable` (a model that takes the mean of each micro-batch, where none labelled has
    none) it is lengthened by its first examples.
    """

    def __init__(self, dataset: Any, multiple: int, *, fillable: bool = True) -> None:
        self.dataset, self.fillable = dataset, fillable
        self.length = -(-len(dataset) // multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < len(self.dataset):
            return self.dataset[index]
        if not self.fillable:
            return self.dataset[index % len(self.dataset)]
        return {"input_ids": [0], "labels": [-100]}


class EvenSampler(Sampler[int]):
    """The order of one process (that of accelerate's seeded sampler), then what the dataset was lengthened by."""

    def __init__(self, dataset: EvenDataset, seed: int) -> None:
        from accelerate.data_loader import SeedableRandomSampler

        self.dataset, self.order = dataset, SeedableRandomSampler(dataset.dataset, data_seed=seed)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        yield from self.order
        yield from range(len(self.dataset.dataset), len(self.dataset))

    def set_epoch(self, epoch: int) -> None:
        """accelerate's loader says the epoch before it iterates."""
        self.order.set_epoch(epoch)


def even(dataset: Any, batch_size: int, *, fillable: bool = True) -> Any:
    """The dataset as several processes share it; of one process as it is."""
    world = rank_and_world()[1]
    return dataset if world == 1 or dataset is None else EvenDataset(dataset, batch_size * world, fillable=fillable)


# ---- DeepSpeed ----


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


def has_experts(model: nn.Module) -> bool:
    """Whether single experts of a 3-D parameter train: a step may leave some of them without a gradient."""
    return any(isinstance(layer, ExpertLinear) for layer in sparse_layers(model).values())


def check_zero(spec: ModelSpec, method: str, settings: Any, hardware: HardwareConfig) -> None:
    """Refuses what DeepSpeed cannot train, of the linears that a sparse method with these settings chooses from."""
    if hardware.zero_stage != 3:
        return
    candidates = get_method(method).budget(spec, settings).candidates
    if not spec.stacked.isdisjoint(candidate.module for candidate in candidates):
        raise UserError(
            "hardware.zero_stage=3: experts kept as 3-D parameters cannot be sharded while single experts of them "
            "train; use hardware.zero_stage=2 or less."
        )


def keep_deltas_whole(config: dict[str, Any], model: nn.Module) -> None:
    """ZeRO-3 leaves parameters up to the largest delta unsharded: deltas are always at hand, as no module's forward
    pass would gather them. Their gradients and moments are sharded all the same."""
    deltas = [p.delta.numel() for layer in sparse_layers(model).values() for p in layer.patterns.values()]
    if deltas:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = max(deltas) + 1


def size_buckets(config: dict[str, Any], model: nn.Module) -> None:
    """Has ZeRO reduce gradients in buckets no larger than all of them together: it allocates a bucket whole, by default
    for 500 million numbers, and deltas are a fraction of that."""
    trained = sum(full_shape(parameter).numel() for parameter in model.parameters() if parameter.requires_grad)
    config["zero_optimization"]["reduce_bucket_size"] = min(trained, MAX_BUCKET)


@contextlib.contextmanager
def whole_parameters(model: nn.Module, engine: Any) -> Iterator[None]:
    """Inside, what trains can be read whole in the first process, also where ZeRO-3 has sharded it.

    Adapters are gathered on every device. A fully trained model is gathered on the first process's host, part by part,
    and is what its `state_dict` gives inside.
    """
    sharded = [p for p in model.parameters() if p.requires_grad and is_sharded(p)]
    state = state_of(model)
    if not sharded:
        yield
    elif state is not None and state.kind == "whole":
        if engine is not None:
            content = engine._zero3_consolidated_16bit_state_dict()  # in the parameters' own dtype, whatever its name
        else:
            content = state_on_first(model)
        model.state_dict = lambda *args, **options: content  # what save_pretrained asks
        try:
            yield
        finally:
            del model.state_dict
    else:
        import deepspeed

        with deepspeed.zero.GatheredParameters(sharded, modifier_rank=None):
            yield


def spread_badness(loss: Tensor) -> Tensor:
    """The loss as it is where it is finite; else one whose gradient is not a number either.

    Under DeepSpeed a step is done within the backward pass of its last micro-step. Its optimizers leave out a step
    whose gradient is not finite in any process, and this is how they learn of a loss (of any process and micro-step)
    whose gradient would have been finite.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class DistributedTrainer(transformers.Trainer):
    """transformers' Trainer in several processes: the data and the steps of one, and its files."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        fillable = self.model_accepts_loss_kwargs
        self.train_dataset = even(self.train_dataset, self.args.train_batch_size, fillable=fillable)
        self.eval_dataset = even(self.eval_dataset, self.args.eval_batch_size)

    @property
    def is_zero3(self) -> bool:
        """Whether DeepSpeed shards the parameters too: what runs the model is for all processes to do together."""
        return self.is_deepspeed_enabled and self.args.hf_deepspeed_config.is_zero3()

    def take_best(self, checkpoint: Path) -> None:
        """Takes up the best adapter that a checkpoint knows of."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        """As transformers computes it; under DeepSpeed a loss that is not finite makes the whole step a bad one."""
        result = super().compute_loss(model, inputs, return_outputs, **options)
        return spread_badness(result) if self.is_deepspeed_enabled and not return_outputs else result

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(data, EvenDataset):
            return EvenSampler(data, self.args.data_seed)
        return super()._get_train_sampler(train_dataset)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        size_buckets(self.args.hf_deepspeed_config.config, self.model)
        if self.is_zero3:
            use_delta_path(sparse_layers(self.model).values())
            keep_deltas_whole(self.args.hf_deepspeed_config.config, self.model)
        if resume_from_checkpoint is not None:  # what trains after re-selection, before the engine takes it
            with fitting(resume_from_checkpoint, "what was trained"):
                load_active(self.model, Path(resume_from_checkpoint))
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if hasattr(self.deepspeed.optimizer, "check_grad_overflow"):  # stages 1 and 2 would not look where bf16 trains
            self.deepspeed.optimizer.check_grad_overflow = True
        if resume_from_checkpoint is not None:  # not strictly: a checkpoint holds only what trains
            with fitting(resume_from_checkpoint, "what DeepSpeed saved"), weights_only():
                loaded, _ = self.deepspeed.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
            if loaded is None:
                raise RunError(f"{resume_from_checkpoint}: holds nothing that DeepSpeed could load.")
            self.take_best(Path(resume_from_checkpoint))
            write_back(sparse_layers(self.model).values())
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        self.deepspeed.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_rng_state(self, output_dir: str) -> None:
        # In turn: where the first process has failed, it has removed the folder, and another one would make it anew.
        for turn in (False, True):
            barrier()
            if is_first() is turn:
                super()._save_rng_state(output_dir)

    def save_trained(self, folder: Path) -> None:
        """Writes the adapter into `folder` (all processes call it, the first one writes), whole or not at all."""
        model = self.accelerator.unwrap_model(self.model)
        with whole_parameters(model, self.deepspeed):
            if is_first():
                save_adapter(model, folder)
        barrier()

"""What training in several processes needs beside transformers' Trainer: the same data, decisions and files as one.

Without `torch.distributed` every function here does what one process needs, which is mostly nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from sparseft import console
from sparseft.adapters.lifecycle import write_adapter
from sparseft.adapters.state import state_of
from sparseft.config import HardwareConfig
from sparseft.data.sampling import PaddedDataset, PaddedSampler, pad_to_world
from sparseft.distributed import fsdp
from sparseft.distributed.deepspeed import (
    MAX_BUCKET,
    change_zero,
    import_only_to_train,
    judge_gradients,
    weights_only,
)
from sparseft.distributed.env import processes
from sparseft.distributed.ranks import all_gather_object, barrier, is_main, rank_and_world
from sparseft.distributed.shards import any_sharded, full_shape, gathered, is_sharded, state_on_first
from sparseft.errors import RunError, UserError
from sparseft.layers import put_beside, sparse_layers, write_back
from sparseft.layers.experts import ExpertLinear, multiplied_at_once
from sparseft.models.decoder import decoder_layers
from sparseft.selection.compute import Request
from sparseft.training.checkpoints import fitting
from sparseft.training.reselection.swap import load_active

LEFT_OUT = "_ddp_params_and_buffers_to_ignore"  # where DDP looks for what a model's maker has told it


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


def has_experts(model: nn.Module) -> bool:
    """Whether single experts of a 3-D parameter train: a step may leave some of them without a gradient."""
    return any(isinstance(layer, ExpertLinear) for layer in sparse_layers(model).values())


def trains_beside_text(model: nn.Module) -> bool:
    """Whether something trains outside the decoder and its head, such as a tower for images, to which text gives no
    gradient."""
    decoder = decoder_layers(model)[0].rpartition(".")[0]
    reached = [model.get_submodule(decoder), model.get_output_embeddings()]
    own = {id(p) for module in reached if module is not None for p in module.parameters()}
    return any(p.requires_grad and id(p) not in own for p in model.parameters())


def check_shards(request: Request, hardware: HardwareConfig, model: nn.Module) -> None:
    """Refuses what cannot train in shards, of the linears that a sparse method is to choose from."""
    if hardware.in_shards is not None and request.has_experts:
        raise UserError(
            f"{hardware.in_shards}: experts kept as 3-D parameters cannot be sharded while single experts of them "
            "train; use hardware.fsdp=false and hardware.zero_stage=2 or less."
        )
    if not (hardware.zero_stage and request.has_experts and processes(hardware) > 1):
        return
    grids = any(c.kind == "grid" for c in request.budget.candidates)
    if grids or not multiplied_at_once(model):
        raise UserError(
            f"hardware.zero_stage={hardware.zero_stage}: experts kept as 3-D parameters are multiplied one by one here "
            f"({'as grids of them train' if grids else 'by the way of this model'}), and one that no token reaches has "
            "no gradient, without which ZeRO would mix up the others'; use hardware.zero_stage=0."
        )


def keep_deltas_whole(configuration: Any, model: nn.Module) -> None:
    """ZeRO-3 leaves parameters up to the largest delta unsharded: deltas are always at hand, as no module's forward
    pass would gather them. Their gradients and moments are sharded all the same."""
    deltas = [p.delta.numel() for layer in sparse_layers(model).values() for p in layer.patterns.values()]
    if deltas:
        change_zero(configuration, stage3_param_persistence_threshold=max(deltas) + 1)


def size_buckets(configuration: Any, model: nn.Module) -> None:
    """Has ZeRO reduce gradients in buckets no larger than all of them together: it allocates a bucket whole, by default
    for 500 million numbers, and deltas are a fraction of that."""
    trained = sum(full_shape(parameter).numel() for parameter in model.parameters() if parameter.requires_grad)
    change_zero(configuration, reduce_bucket_size=min(trained, MAX_BUCKET))


@contextlib.contextmanager
def whole_parameters(model: nn.Module) -> Iterator[dict[str, Tensor] | None]:
    """Inside, what trains can be read whole in the first process, also where ZeRO-3 or FSDP2 has sharded it.

    Adapters are gathered on every device. A fully trained model is gathered on the first process's host, part by part:
    its state dict is what is yielded.
    """
    sharded = [p for p in model.parameters() if p.requires_grad and is_sharded(p)]
    state = state_of(model)
    if sharded and state is not None and state.kind.trains_all:
        yield state_on_first(model)
    else:
        with gathered(sharded):
            yield None


def check_one_base(model: nn.Module) -> None:
    """Refuses (`UserError`) processes that have read different weights: nobody sends what is frozen to the others."""
    state = state_of(model)
    known = all_gather_object(None if state is None else state.fingerprints)
    other = next((rank for rank, fingerprints in enumerate(known) if fingerprints != known[0]), None)
    if other is not None:
        raise UserError(
            f"model.path: the weights that process {other} has read are not those of process 0: expected the same "
            "files on all machines."
        )


@contextlib.contextmanager
def frozen_left_out(model: nn.Module) -> Iterator[None]:
    """Inside, DDP is made without sending what is frozen from the first process to the others, which have read the same
    files and written the same into it. A weight that is sent is written: what all processes of a machine share, mapped
    from its file, each would have a copy of. And torchao's packed ones cannot be sent."""
    names = [name for name, value in model.named_parameters() if not value.requires_grad]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    try:
        yield
    finally:
        delattr(model, LEFT_OUT)


def poison_gradient(loss: Tensor) -> Tensor:
    """The loss as it is where it is finite; else one whose gradient is not a number either.

    Under DeepSpeed a step is done within the backward pass of its last micro-step. Its optimizers leave out a step
    whose gradient is not finite in any process, and this is how they learn of a loss (of any process and micro-step)
    whose gradient would have been finite.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class AfterEngineStep(transformers.TrainerCallback):
    """What torch's optimizers and schedulers would see to by themselves, after a step of DeepSpeed's engine."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator

    def on_step_end(self, args, state, control, model=None, lr_scheduler=None, **kwargs) -> None:
        write_back(sparse_layers(model).values())  # its optimizer updates the deltas behind torch's step hook
        if self.accelerator.optimizer_step_was_skipped:  # a bad step: the schedule goes on all the same
            scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate's wrapper would not step it
            if isinstance(scheduler, LRScheduler) and not isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step()


class DistributedTrainer(transformers.Trainer):
    """transformers' Trainer in several processes: the data and the steps of one, and its files."""

    def __init__(self, *args: Any, **options: Any) -> None:
        import_only_to_train()
        super().__init__(*args, **options)
        self.is_fsdp = not self.is_deepspeed_enabled and any_sharded(self.model)
        self.whole = fsdp.replicated(self.model) if self.is_fsdp else []  # what trains beside FSDP2's shards
        if self.is_deepspeed_enabled:
            self.add_callback(AfterEngineStep(self.accelerator))
        self.train_dataset = pad_to_world(self.train_dataset, self.args.train_batch_size, fillable=self.fillable)
        self.eval_dataset = pad_to_world(self.eval_dataset, self.args.eval_batch_size)

    @property
    def fillable(self) -> bool:
        """Whether a process that has no examples left can take part in a step with empty ones."""
        return self.model_accepts_loss_kwargs

    @property
    def is_zero3(self) -> bool:
        """Whether DeepSpeed shards the parameters too."""
        return self.is_deepspeed_enabled and self.args.hf_deepspeed_config.is_zero3()

    @property
    def in_shards(self) -> bool:
        """Whether no process has the parameters whole: what runs the model is for all processes to do together."""
        return self.is_zero3 or self.is_fsdp

    @property
    def trains_shards(self) -> bool:
        """Whether FSDP2 has sharded what trains: the optimizer's moments are in shards then."""
        return self.is_fsdp and not self.whole

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not any_sharded(model):  # shards lie where they belong
            super()._move_model_to_device(model, device)

    def take_best(self, checkpoint: Path) -> None:
        """Takes up the best adapter that a checkpoint knows of."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        """As transformers computes it; under DeepSpeed a loss that is not finite makes the whole step a bad one."""
        result = super().compute_loss(model, inputs, return_outputs, **options)
        return poison_gradient(result) if self.is_deepspeed_enabled and not return_outputs else result

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As transformers makes it; under FSDP2 a step's last one ends with the gradients of what is whole averaged."""
        loss = super().training_step(*args, **kwargs)
        if self.whole and self.accelerator.sync_gradients:
            fsdp.average_gradients(self.whole)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        return norm.full_tensor() if fsdp.is_dtensor(norm) else norm

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(data, PaddedDataset):
            return PaddedSampler(data, self.args.data_seed)
        return super()._get_train_sampler(train_dataset)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if self.is_fsdp:
            fsdp.keep_unwrapped(self.accelerator)
            fsdp.same_everywhere(self.whole)
        else:
            check_one_base(self.model)
        if not self.is_deepspeed_enabled:
            with frozen_left_out(self.model):
                return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        size_buckets(self.args.hf_deepspeed_config, self.model)
        if self.is_zero3:
            put_beside(self.model)
            keep_deltas_whole(self.args.hf_deepspeed_config, self.model)
        if resume_from_checkpoint is not None:  # what trains after re-selection, before the engine takes it
            with fitting(resume_from_checkpoint, "what was trained"):
                load_active(self.model, Path(resume_from_checkpoint))
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        judge_gradients(self.deepspeed)
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
        if self.trains_shards:  # one file, as one process leaves it: any number of them can go on from there
            state = fsdp.whole_state(self._own_optimizer)
            if is_main():
                torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
        elif self.is_deepspeed_enabled:
            self.deepspeed.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        else:
            return super()._save_optimizer_and_scheduler(output_dir)
        if is_main():
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.trains_shards:
            return super()._load_optimizer_and_scheduler(checkpoint)
        # Mapped: of whole moments a process takes its part. transformers would put all of them on its device.
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
        fsdp.load_whole_state(self._own_optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    @property
    def _own_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer inside accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _save_rng_state(self, output_dir: str) -> None:
        # In turn: where the first process has failed, it has removed the folder, and another one would make it anew.
        for turn in (False, True):
            barrier()
            if is_main() is turn:
                super()._save_rng_state(output_dir)

    def save_trained(self, folder: Path) -> None:
        """Writes the adapter into `folder` (all processes call it, the first one writes), whole or not at all."""
        model = self.accelerator.unwrap_model(self.model)
        with whole_parameters(model) as state_dict:
            if is_main():
                write_adapter(model, folder, state_dict=state_dict)
        barrier()

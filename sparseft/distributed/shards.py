"""Parameters of which this process holds a shard: their shapes, their values, and passes through their model.

DeepSpeed (ZeRO-3) leaves a parameter without entries while it is sharded: `ds_shape` is its shape, `ds_tensor` the
shard. FSDP2 keeps it as a DTensor (`fsdp.py`). What is here gathers as little at a time as can be: one parameter, or
for a pass one decoder layer. All processes take part in each gathering, in the same order. With whole parameters every
function does what torch does, without DeepSpeed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparseft.distributed import fsdp
from sparseft.distributed.ranks import broadcast_object, is_distributed, is_main
from sparseft.errors import UserError


def is_sharded(parameter: Tensor | None) -> bool:
    """Whether ZeRO-3 has taken charge of the parameter, be it gathered at the moment or not, or FSDP2."""
    return _is_zero(parameter) or fsdp.is_dtensor(parameter)


def _is_zero(parameter: Tensor | None) -> bool:
    return hasattr(parameter, "ds_id")


def any_sharded(model: nn.Module) -> bool:
    """Whether a model has parameters in shards."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


def shard_of(parameter: Tensor) -> Tensor:
    """The part of a parameter's values that this process holds: all of it, but under ZeRO-3 and FSDP2."""
    return parameter.to_local() if fsdp.is_dtensor(parameter) else getattr(parameter, "ds_tensor", parameter)


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor | None], *, changed: bool = False) -> Iterator[list[Tensor | None]]:
    """Inside, the parameters are whole in every process, and are what modules hold; yields them, whole, in this order.
    None and whole ones may be among them. (Under ZeRO-3 they are the same objects, under FSDP2 others.)

    changed: what rank 0 has made of them is what all shards hold afterwards; else they must stay as they are.
    """
    parameters = list(parameters)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_gathered_zero(parameters, changed))
        yield [
            stack.enter_context(fsdp.gathered(p, changed=changed)) if fsdp.is_dtensor(p) else p  # type: ignore[arg-type]
            for p in parameters
        ]


@contextlib.contextmanager
def _gathered_zero(parameters: list[Tensor | None], changed: bool) -> Iterator[None]:
    sharded = [parameter for parameter in parameters if _is_zero(parameter)]
    # What is whole at the moment needs no gathering to be read; changed, it changes in its shards too.
    chosen = [p for p in sharded if changed or p.ds_status.name != "AVAILABLE"]  # type: ignore[union-attr]
    if not chosen:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(chosen, modifier_rank=0 if changed else None):
        yield


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts a model's floating-point parameters and buffers, sharded ones in their shards.

    UserError where the shards lie on a disk (`hardware.offload=nvme`). What FSDP2 has sharded keeps the dtype that it
    gathers, and is loaded in the one that is to train (`prepare.py`).
    """
    if in_fsdp := [parameter for parameter in model.parameters() if fsdp.is_dtensor(parameter)]:
        if any(parameter.dtype != dtype for parameter in in_fsdp):
            raise ValueError(f"FSDP2 has sharded weights that are not in {dtype}")
        return
    model.to(dtype)
    for name, parameter in model.named_parameters():
        shard = shard_of(parameter)
        if not _is_zero(parameter) or shard.dtype == dtype or not shard.is_floating_point():
            continue
        if shard.numel() != shard.ds_numel:  # type: ignore[attr-defined]
            raise UserError(f"'{name}' is on a disk (hardware.offload=nvme), where it cannot be cast to {dtype}.")
        pinned = shard.is_pinned()
        shard.data = shard.data.to(dtype)
        if pinned:
            shard.data = shard.data.pin_memory()


def state_on_first(model: nn.Module) -> dict[str, Tensor]:
    """A model's state dict on rank 0's host, gathered one tensor after another; empty in the other processes.

    Tied parameters stay one tensor.
    """
    state: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        with gathered([tensor]) as (whole,):
            if is_main():
                if id(tensor) not in seen:
                    seen[id(tensor)] = whole.detach().to("cpu", copy=True)
                state[name] = seen[id(tensor)]
    return state


def load_state(model: nn.Module, files: Iterable[Mapping[str, Tensor]]) -> tuple[list[str], list[str]]:
    """`load_state_dict(strict=False)` of what lies in several files. Returns the names (missing, unexpected).

    Of a sharded model one tensor after another: what rank 0 has counts, the others' mappings may be empty, and so no
    process needs more than one file. RuntimeError in all of them where a shape does not fit, before anything of that
    file is taken.
    """
    if not any_sharded(model):
        return model.load_state_dict({name: value for file in files for name, value in file.items()}, strict=False)
    own = model.state_dict(keep_vars=True)
    names: list[str] = []
    for tensors in files:
        told = broadcast_object({name: tuple(value.shape) for name, value in tensors.items()})
        names += told
        for name, shape in told.items():
            if name in own and tuple(full_shape(own[name])) != shape:
                raise RuntimeError(f"size mismatch for {name}: {shape} is not {tuple(full_shape(own[name]))}")
        with torch.no_grad():
            for name in told:
                if name in own:
                    _take(own[name], tensors[name] if is_main() else None)
    return [name for name in own if name not in names], [name for name in names if name not in own]


def _take(tensor: Tensor, value: Tensor | None) -> None:
    """Fills a parameter or buffer, in shards or whole, from rank 0's value."""
    if is_sharded(tensor):
        with gathered([tensor], changed=True) as (whole,):
            if value is not None:
                whole.detach().copy_(value)
        return
    if value is not None:
        tensor.copy_(value)
    if is_distributed():
        dist.broadcast(tensor.detach(), src=0)


@contextlib.contextmanager
def running(model: nn.Module, decoder_layers: Callable[[], Iterable[nn.Module]]) -> Iterator[None]:
    """Inside, a sharded model can be run, forward and backward, before DeepSpeed's engine has it.

    Each of `decoder_layers()` is gathered for its own part of a pass, and so is every module outside of them that has
    parameters. All processes run as many passes, in step. Nothing changes for a model that is not sharded, or that the
    engine has; FSDP2 gathers by itself.
    """
    if not any(map(_is_zero, model.parameters())) or hasattr(model, "ds_inflight_param_registry"):
        yield
        return
    held: dict[nn.Module, contextlib.ExitStack] = {}

    def take(module: nn.Module, *_: Any) -> None:
        if module not in held:
            held[module] = contextlib.ExitStack()
            held[module].enter_context(gathered(parameters[module]))

    def give_back(module: nn.Module, *_: Any) -> None:
        if module in held:
            held.pop(module).close()

    layers = list(decoder_layers())
    inside = {module for layer in layers for module in layer.modules()}
    parameters = {layer: list(layer.parameters()) for layer in layers}
    for module in model.modules():
        if module not in inside and (own := list(module.parameters(recurse=False))):
            parameters[module] = own
    handles = []
    for module in parameters:
        handles += [module.register_forward_pre_hook(take), module.register_forward_hook(give_back)]
        if not isinstance(module, nn.Embedding):  # the way back from a table needs no value of it
            handles.append(module.register_full_backward_pre_hook(take))
            handles.append(module.register_full_backward_hook(give_back))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for stack in held.values():
            stack.close()

"""FSDP2, torch's `fully_shard`: a model in shards over all processes, one decoder layer of which is whole at a time.

The model is sharded as soon as it is loaded, by torch itself. accelerate would shard it when training begins, and has
no FSDP on a CPU: until then each process would hold all of it, for calibration, the first evaluation and the deltas'
places. So accelerate leaves the model as it is (`keep_unwrapped`), and does the rest as ever: data, mixed precision,
clipping, accumulation.

What a sparse method or LoRA trains is put into the sharded model afterwards, so FSDP2 does not know of it: these
parameters are plain, the same on every process, and their gradients are averaged once a step (`average_gradients`).
They are a few hundredths of the model, so sharding them too would save little and cost a gathering each time they are
used; whole, their optimizer, checkpoints and files are those of one process.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparseft.distributed.ranks import all_reduce_sum, is_main, rank_and_world
from sparseft.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_sharded: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # the models of this process


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a shard of one, torch's DTensor, whose shape is that of the whole. Imports nothing for it."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


# ---- loading ----


@contextlib.contextmanager
def read_by_first() -> Iterator[None]:
    """Inside, transformers reads a checkpoint's weights in the first process of each machine alone (accelerate's
    `cpu_ram_efficient_loading`); the others' parameters have no values, and mostly no memory."""
    from accelerate.utils import patch_environment

    with patch_environment(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true"):
        yield


def shard(model: nn.Module, layers: Sequence[nn.Module], embeddings: nn.Module | None, device: torch.device) -> None:
    """Shards a model, loaded under `read_by_first`, over all processes. The first one's values count: they travel one
    parameter at a time, and no process has more than one group of parameters whole at once.

    The groups are the decoder `layers`, the embeddings where the head is not tied to them, and the rest. Every group is
    in shards whenever no pass uses it.

    Raises UserError where a group's parameters differ in dtype, or two groups share one.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    groups = list(layers)
    if embeddings is not None and _is_apart(embeddings, model):
        groups.insert(0, embeddings)
    _check_groups(model, groups)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _from_first(buffer, device)
    mesh = init_device_mesh(device.type, (rank_and_world()[1],), mesh_dim_names=("fsdp",))
    for group in (*groups, model):
        _fill(group, device)
        fully_shard(group, mesh=mesh, reshard_after_forward=True)
    _sharded.add(model)
    model._is_fsdp_managed_module = True  # type: ignore[assignment]  # transformers' generate() waits for the others


def _is_apart(part: nn.Module, model: nn.Module) -> bool:
    """Whether no module outside of `part` holds a parameter of it."""
    inside, own = set(part.modules()), {id(p) for p in part.parameters()}
    others = (p for module in model.modules() if module not in inside for p in module._parameters.values())
    return own.isdisjoint(map(id, others))


def _check_groups(model: nn.Module, groups: Sequence[nn.Module]) -> None:
    kind, names = type(model).__name__, {id(p): name for name, p in model.named_parameters()}
    inside = {module for group in groups for module in group.modules()}
    outside = [p for m in model.modules() if m not in inside for p in m._parameters.values() if p is not None]
    owners: dict[int, int] = {}
    for number, members in enumerate([*(list(group.parameters()) for group in groups), outside]):
        for parameter in members:
            name = names[id(parameter)]
            if owners.setdefault(id(parameter), number) != number:
                raise UserError(
                    f"hardware.fsdp=true: {kind} uses '{name}' in two places that FSDP2 gathers apart; use "
                    "hardware.fsdp=false."
                )
            if parameter.dtype != members[0].dtype:
                raise UserError(
                    f"hardware.fsdp=true: {kind} keeps '{name}' in {parameter.dtype} beside {members[0].dtype}, and "
                    "FSDP2 gathers weights of one dtype; use model.dtype=float32, or hardware.fsdp=false."
                )


def _fill(group: nn.Module, device: torch.device) -> None:
    """Puts whole parameters on the device, with the first process's values; tied ones stay one."""
    filled: dict[int, nn.Parameter] = {}
    for module in group.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or is_dtensor(parameter):
                continue
            if id(parameter) not in filled:
                filled[id(parameter)] = nn.Parameter(_from_first(parameter, device), parameter.requires_grad)
            module._parameters[name] = filled[id(parameter)]


@torch.no_grad()
def _from_first(tensor: Tensor, device: torch.device) -> Tensor:
    if is_main():
        value = tensor.detach().to(device).contiguous()
    else:
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    dist.broadcast(value, src=0)
    return value


# ---- reading and writing what is in shards ----


@contextlib.contextmanager
def gathered(parameter: DTensor, *, changed: bool) -> Iterator[Tensor]:
    """Inside, modules hold a whole parameter in the place of one in shards; yields it. changed: what the first process
    has made of it is what all shards hold afterwards."""
    whole = nn.Parameter(parameter.detach().full_tensor(), requires_grad=parameter.requires_grad)
    modules = (module for model in _sharded for module in model.modules())
    places = [(m._parameters, name) for m in modules for name, p in m._parameters.items() if p is parameter]
    for held, name in places:
        held[name] = whole
    try:
        yield whole
    finally:
        for held, name in places:
            held[name] = parameter  # type: ignore[assignment]
    if changed:
        dist.broadcast(whole.detach(), src=0)
        fill(parameter, whole.detach())


@torch.no_grad()
def fill(parameter: DTensor, whole: Tensor) -> None:
    """Takes this process's part of a whole tensor, which all have."""
    parameter.to_local().copy_(sharded_as(whole, parameter).to_local())


def sharded_as(whole: Tensor, parameter: DTensor) -> DTensor:
    """A whole tensor, which all processes have, in shards as a parameter is; nothing travels."""
    from torch.distributed.tensor import distribute_tensor

    there = whole.to(parameter.device)
    return distribute_tensor(there, parameter.device_mesh, parameter.placements, src_data_rank=None)


# ---- training ----


def keep_unwrapped(accelerator: Any) -> None:
    """Has accelerate prepare models for mixed precision alone, as it does those that are only evaluated: it would wrap
    them for data parallelism, which knows no shards."""
    prepare = accelerator.prepare_model
    accelerator.prepare_model = lambda model, **_: prepare(model, device_placement=False, evaluation_mode=True)


def same_everywhere(parameters: Iterable[nn.Parameter]) -> None:
    """Gives all processes the first one's values of `replicated` parameters."""
    for parameter in parameters:
        dist.broadcast(parameter.detach(), src=0)


def replicated(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train and are whole in every process."""
    return [p for p in model.parameters() if p.requires_grad and not is_dtensor(p)]


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Makes the gradients of `replicated` parameters their mean over the processes, by one reduction for each dtype.

    A process that has passed a parameter by, as tokens do with experts, adds nothing to its mean; one that all have
    passed by stays without a gradient.
    """
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for group in by_dtype.values():
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        missing = [place for place, p in enumerate(group) if p.grad is None]
        had = grads[0].new_ones(len(group))  # how many processes had a gradient travels with the gradients
        if missing:
            had[missing] = 0.0
        together = torch.cat([*(grad.flatten() for grad in grads), had])
        all_reduce_sum(together)
        together /= rank_and_world()[1]
        *means, had = together.split([*(grad.numel() for grad in grads), len(group)])
        for grad, mean in zip(grads, means, strict=True):
            grad.copy_(mean.view_as(grad))
        for place in missing:  # alone here the device is asked
            if had[place]:
                group[place].grad = grads[place]


# ---- an optimizer whose moments are in shards ----


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state dict that the optimizer of one process would have, on the first process's host; a call of all. In the
    others tensors are missing."""
    state = optimizer.state_dict()
    held: dict[Any, dict[str, Any]] = {}
    for key, values in state["state"].items():
        held[key] = dict(values)  # the optimizer's own dicts are what it gives
        for name, value in values.items():
            if is_dtensor(value):
                whole = value.full_tensor()
                held[key][name] = whole.cpu() if is_main() else None
    return state | {"state": held}


def load_whole_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Takes up `whole_state`, which all processes have; each keeps its part. ValueError where a shape does not fit."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    held = {number: dict(values) for number, values in state["state"].items()}
    for number, values in held.items():
        parameter = parameters[number]
        for name, value in values.items():
            if isinstance(value, Tensor) and value.dim() and is_dtensor(parameter):
                if value.shape != parameter.shape:
                    shapes = f"{tuple(value.shape)} does not belong to {tuple(parameter.shape)}"
                    raise ValueError(f"'{name}' of shape {shapes}")
                values[name] = sharded_as(value, parameter)
    optimizer.load_state_dict(state | {"state": held})

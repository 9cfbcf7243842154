"""`SparseAdamW`: AdamW whose step writes the weights of sparse layers in the pass that updates their deltas.

Same trajectory and same `state_dict` as `torch.optim.AdamW`. On CUDA the deltas of all layers, their moments and their
weights take one Triton launch for each kind of pattern and dtype of weight (`kernels/adamw_triton.py`); elsewhere
torch's fused AdamW updates the deltas, and each layer that changed is written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from sparseft.errors import UserError
from sparseft.layers.pattern import Pattern
from sparseft.layers.sparse_linear import SparseLinear
from sparseft.layers.write_back import WritesWeights, layers_of

if TYPE_CHECKING:
    from sparseft.kernels.adamw_triton import Entry, Launch

_REFUSED = ("amsgrad", "maximize", "capturable", "differentiable")


@dataclass(eq=False)
class _Held:
    """One parameter of the optimizer in this step, with its layer and pattern if it is a delta."""

    parameter: Tensor
    group: dict[str, Any]
    layer: SparseLinear | None
    pattern: Pattern | None


class SparseAdamW(WritesWeights, torch.optim.AdamW):
    """AdamW for `trainable_parameters(model)`: after its step, weights hold base + delta, rounded once from fp32.

    Takes parameters and groups as `torch.optim.AdamW` does; the deltas of live sparse layers are found among them,
    other parameters are updated as ever. Weight decay is decoupled and acts on deltas, never on frozen entries.
    Parameters without a gradient are left alone. A checkpoint of either optimizer loads in the other.

    Raises `UserError` for `amsgrad`, `maximize`, `capturable`, `differentiable` and a learning rate that is a tensor,
    in a parameter group or a loaded state.
    """

    kernel_devices: ClassVar[frozenset[str]] = frozenset({"cuda"})
    found_inf: Tensor | None = None  # float32 (): where it is 1, a step leaves weights, moments and counts as they are
    _tables: _Tables | None = None  # not part of the state: copies and loaded optimizers make their own

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group may have its own lr, betas, eps and weight_decay."""
        _check_group(self.defaults | param_group)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the state of a SparseAdamW or a `torch.optim.AdamW` of the same parameters."""
        for group in state_dict["param_groups"]:
            _check_group(group)
        super().load_state_dict(state_dict)
        for state in self.state.values():  # a fused optimizer, or map_location, keeps its counts on the device
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"]).to(device="cpu", dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient, and of their layers' weights; returns the closure's loss.

        RuntimeError where a gradient is a sparse tensor.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held = self._held()
        if self._skips(held):
            return loss
        written = self._step_by_kernel(held)
        rest = [item for item in held if item.parameter.grad is not None and item not in written]
        for group in self.param_groups:
            self._step_by_torch(group, [item.parameter for item in rest if item.group is group])
        # fused and foreach updates do not count as changes of a tensor's version, so it is no use to look there
        layers = {item.layer: None for item in rest if item.layer is not None}
        layers |= {item.layer: None for item in held if item.pattern is not None and item.pattern.stale}
        for layer in layers:
            layer.write_back()
        return loss

    def _held(self) -> list[_Held]:
        """All parameters, with state for those that have a gradient."""
        sites = layers_of(parameter for group in self.param_groups for parameter in group["params"])
        held = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if parameter.grad.is_sparse:
                        raise RuntimeError("AdamW does not take sparse gradients: use torch.optim.SparseAdam.")
                    if not self.state[parameter]:
                        self.state[parameter] = _fresh_state(parameter)
                held.append(_Held(parameter, group, *sites.get(id(parameter), (None, None))))
        return held

    def _skips(self, held: list[_Held]) -> bool:
        """Whether the whole step is skipped, which the host has to ask where anything is not torch's fused update's."""
        updated = [item.parameter for item in held if item.parameter.grad is not None]
        if self.found_inf is None or all(_fuses(parameter, self.state[parameter]) for parameter in updated):
            return False
        return bool(self.found_inf)

    def _step_by_kernel(self, held: list[_Held]) -> set[_Held]:
        """Updates and writes what the kernel can take; returns what it has done."""
        candidates = [
            item
            for item in held
            if item.pattern is not None
            and item.parameter.device.type in self.kernel_devices
            and self.state.get(item.parameter)
        ]
        if not candidates or not _has_triton():
            return set()
        keys = [_key(item, self.state[item.parameter]) for item in candidates]
        if self._tables is None or self._tables.keys != keys:
            self._tables = _Tables.of(candidates, keys, self.state)
        done: set[_Held] = set()
        for launch, places in self._tables.launches:
            done |= self._launch(launch, [candidates[place] for place in places])
        for item in done:  # autograd must see what the kernel changed behind its back, so that it refuses stale graphs
            assert item.layer is not None and item.pattern is not None
            torch.autograd.graph.increment_version(item.parameter)
            torch.autograd.graph.increment_version(item.layer.weight)
            item.pattern.written_version = item.parameter._version
        return done

    def _launch(self, launch: Launch, items: Sequence[_Held]) -> set[_Held]:
        from sparseft.kernels.adamw_triton import rates

        active = [item for item in items if item.parameter.grad is not None]
        if not active:
            return set()
        steps = [self.state[item.parameter]["step"] for item in active]
        torch._foreach_add_(steps, 1)
        made: dict[tuple[int, float], list[float]] = {}  # most tensors share one entry
        by_item: dict[_Held, list[float]] = {}
        for item, step in zip(active, steps, strict=True):
            group, count = item.group, float(step)
            if (id(group), count) not in made:
                numbers = rates(group["lr"], *group["betas"], group["eps"], group["weight_decay"], count)
                made[id(group), count] = numbers
            by_item[item] = made[id(group), count]
        nothing = [0.0] * len(next(iter(made.values())))
        # Copies of gradients in another layout live until the launch is queued: the allocator keeps streams in order.
        grads = [None if (g := item.parameter.grad) is None else g.float().contiguous() for item in items]
        launch.run(grads, [by_item.get(item, nothing) for item in items])
        return set(active)

    def _step_by_torch(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """torch's own update: of the kinds that it has for the CPU, the fused one is the fastest."""
        fused: list[Tensor] = []
        other: list[Tensor] = []
        for parameter in parameters:
            (fused if _fuses(parameter, self.state[parameter]) else other).append(parameter)
        beta1, beta2 = group["betas"]
        for chosen, is_fused in ((fused, True), (other, None)):
            if chosen:
                states = [self.state[p] for p in chosen]
                adamw(
                    chosen,
                    [p.grad for p in chosen],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [],
                    [state["step"] for state in states],
                    fused=is_fused,
                    found_inf=self.found_inf if is_fused else None,
                    has_complex=any(p.is_complex() for p in chosen),
                    amsgrad=False,
                    beta1=beta1,
                    beta2=beta2,
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )


def _check_group(group: dict[str, Any]) -> None:
    for option in _REFUSED:
        if group.get(option):
            raise UserError(f"SparseAdamW has no {option}: expected {option}=False, or use torch.optim.AdamW.")
    if isinstance(group.get("lr"), Tensor):
        raise UserError("SparseAdamW: expected lr as a number, got a tensor.")


def _fuses(parameter: Tensor, state: dict[str, Tensor]) -> bool:
    """Whether torch's fused AdamW for the CPU may take it: that one pairs elements by their place in memory, whatever
    the strides of gradient and moments."""
    tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
    return parameter.is_floating_point() and all(
        t.device.type == "cpu" and t.is_contiguous() and t.dtype == parameter.dtype for t in tensors
    )


def _fresh_state(parameter: Tensor) -> dict[str, Tensor]:
    """As torch's AdamW starts: counts on the CPU, where reading them costs no wait for the device."""
    return {
        "step": torch.tensor(0.0, dtype=torch.float32),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


@functools.cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:  # a CUDA build of torch without it (Windows)
        return False
    return True


@dataclass
class _Tables:
    """The kernel's launches over what was held when they were made, and by what one sees that anything moved."""

    keys: list[Any]
    launches: list[tuple[Launch, list[int]]]  # each with the places of its entries among the candidates
    indices: list[Any]  # held, so that no other index can take their address while `keys` has it

    @classmethod
    def of(cls, items: Sequence[_Held], keys: list[Any], states: dict[Tensor, Any]) -> _Tables:
        """Tables over those `items` that the kernel can take; the others are torch's."""
        from sparseft.kernels.adamw_triton import Entry, Launch

        entries: dict[Any, list[Entry]] = {}
        places: dict[Any, list[int]] = {}
        for place, item in enumerate(items):
            layer, pattern, state = item.layer, item.pattern, states[item.parameter]
            assert layer is not None and pattern is not None
            weight, base = layer.logical_weight, pattern.base_values
            entry = Entry(item.parameter.detach(), state["exp_avg"], state["exp_avg_sq"], base, weight, pattern.at)
            if _fits(entry, layer):
                key = (weight.device, weight.dtype, pattern.kind)
                entries.setdefault(key, []).append(entry)
                places.setdefault(key, []).append(place)
        launches = [(Launch(found, key[2]), places[key]) for key, found in entries.items()]
        return cls(keys, launches, [(item.pattern.index, item.pattern.inverse) for item in items if item.pattern])


def _fits(entry: Entry, layer: SparseLinear) -> bool:
    """Whether the kernel can take this delta; patterns of one layer may overlap, which `write_back` sums up."""
    from sparseft.kernels.adamw_triton import LARGEST, WEIGHT_DTYPES

    values = (entry.delta, entry.exp_avg, entry.exp_avg_sq, entry.base_values)
    index = (entry.at,) if isinstance(entry.at, Tensor) else ()
    return (
        len(layer.patterns) == 1
        and entry.weight.dtype in WEIGHT_DTYPES
        and entry.base_values.dtype == entry.weight.dtype
        and all(value.dtype == torch.float32 for value in values[:3])
        and all(tensor.is_contiguous() for tensor in (*values, *index))
        and all(tensor.device == entry.weight.device for tensor in (*values, *index))
        and 0 < entry.delta.numel() <= LARGEST
    )


def _key(item: _Held, state: dict[str, Tensor]) -> tuple[Any, ...]:
    """Changes whenever the kernel's tables have to: other storage, other entries, another order of the weight."""
    layer, pattern = item.layer, item.pattern
    assert layer is not None and pattern is not None
    weight, base, index, inverse, run = layer.weight, pattern.base_values, pattern.index, pattern.inverse, pattern.run
    return (
        id(item.parameter),
        item.parameter.data_ptr(),
        item.parameter.stride(),
        state["exp_avg"].data_ptr(),
        state["exp_avg_sq"].data_ptr(),
        base.data_ptr(),
        base.dtype,
        weight.data_ptr(),
        weight.dtype,
        weight.device,
        weight.stride(),
        len(layer.patterns),
        run or (index.data_ptr(), index._version),
        None if inverse is None else (inverse.data_ptr(), inverse._version),
    )

"""`SparseAdamW`: AdamW whose step writes the weights of sparse layers in the pass that updates their deltas.

Same trajectory and same `state_dict` as `torch.optim.AdamW`. On CUDA the deltas of all layers, their moments and their
weights take one Triton launch for each kind of pattern and dtype of weight (`kernels/adamw_triton.py`); elsewhere
torch's fused AdamW updates the deltas, and each layer that changed is written once.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, compress
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from sparseft.errors import UserError
from sparseft.kernels import dispatch, grid
from sparseft.kernels.grid import Grids
from sparseft.layers.pattern import changes
from sparseft.layers.sparse_linear import SparseLinear
from sparseft.layers.write_back import WritesWeights, layers_of

if TYPE_CHECKING:
    from sparseft.kernels.adamw_triton import Entry, Table

_REFUSED = ("amsgrad", "maximize", "capturable", "differentiable")
_FUSED_DEVICES = ("cpu", "cuda")  # where torch's fused AdamW is used
_state_tensors = operator.itemgetter("exp_avg", "exp_avg_sq", "step")
Gradients = Sequence[Tensor | None]
Groups = Sequence[dict[str, Any]]
Flag = Tensor | None


class SparseAdamW(WritesWeights, torch.optim.AdamW):
    """AdamW for `trainable_parameters(model)`: after its step, weights hold base + delta, rounded once from fp32.

    Takes parameters and groups as `torch.optim.AdamW` does; the deltas of live sparse layers are found among them,
    other parameters are updated as ever. Weight decay is decoupled and acts on deltas, never on frozen entries.
    Parameters without a gradient are left alone. A checkpoint of either optimizer loads in the other.

    `found_inf` and `grad_scale`, tensors of one number each, may be set before a step, as `torch.amp.GradScaler` does
    with torch's fused AdamW: where the first is 1 the step changes nothing, counts of steps included, and gradients
    are divided by the second. Neither makes the host wait, but for parameters that torch's fused AdamW cannot take
    (complex numbers, gaps in memory).

    Raises `UserError` for `amsgrad`, `maximize`, `capturable`, `differentiable` and a learning rate that is a tensor,
    in a parameter group or a loaded state.
    """

    kernel_devices: ClassVar[frozenset[str]] = frozenset({"cuda"})
    found_inf: Tensor | None = None
    grad_scale: Tensor | None  # no value at all until there is one: GradScaler would multiply by a None
    _step_supports_amp_scaling = True  # GradScaler sets these two, and does not ask the device itself
    _plan: _Plan | None = None  # not part of the state: copies and loaded optimizers make their own

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
        self._plan = None
        for state in self.state.values():  # a fused optimizer, or map_location, keeps its counts on the device
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"]).to(device="cpu", dtype=torch.float32)

    def state_dict(self) -> dict[str, Any]:
        """As torch's: counts of steps are on the CPU there, wherever they are kept between steps."""
        found = super().state_dict()
        found["state"] = {
            key: state | {"step": state["step"].to("cpu", copy=True)} if "step" in state else state
            for key, state in found["state"].items()
        }
        return found

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient, and of their layers' weights; returns the closure's loss.

        RuntimeError where a gradient is a sparse tensor.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        grads = [parameter.grad for parameter in parameters]
        if torch.sparse_coo in {grad.layout for grad in grads if grad is not None}:
            raise RuntimeError("AdamW does not take sparse gradients: use torch.optim.SparseAdam.")
        plan = self._plan
        if plan is None or not plan.holds(self, parameters, grads):
            for parameter, grad in zip(parameters, grads, strict=True):
                if grad is not None and not self.state[parameter]:
                    self.state[parameter] = _fresh_state(parameter)
            plan = self._plan = _Plan(self, parameters)
        found_inf, grad_scale = _as_scalar(self.found_inf), _as_scalar(getattr(self, "grad_scale", None))
        plan.write_stale(grads, may_stop=found_inf is not None)
        plan.step_by_kernel(self.param_groups, grads, found_inf, grad_scale)
        plan.step_by_torch(self.param_groups, grads, found_inf, grad_scale)
        return loss


class _Plan:
    """How the parameters are updated, and by what one sees that it has to be made anew.

    Holds no layer, and lets go of where weights are held when a layer dies, so that models die when their last user
    forgets them.
    """

    def __init__(self, optimizer: SparseAdamW, parameters: list[Tensor]) -> None:
        self.changes = changes.count
        self.parameters = parameters
        self.sizes = [len(group["params"]) for group in optimizer.param_groups]
        self.groups = [number for number, size in enumerate(self.sizes) for _ in range(size)]
        self.states: list[dict[str, Any]] = [optimizer.state.get(parameter, {}) for parameter in parameters]
        self.fresh = [place for place, state in enumerate(self.states) if not state]  # had no gradient yet
        self.held = [state for state in self.states if state]
        sites = layers_of(parameters)
        found = [(place, *sites[id(parameter)]) for place, parameter in enumerate(parameters) if id(parameter) in sites]
        # alive as long as `changes` stands still
        forget = functools.partial(_forget_weights, weakref.ref(self))
        self.layers: dict[int, Callable[[], Any]] = {place: weakref.ref(layer, forget) for place, layer, _ in found}
        self.patterns: dict[int, Callable[[], Any]] = {place: weakref.ref(pattern) for place, _, pattern in found}
        self.tables: list[tuple[Table, list[int]]] = []
        devices = optimizer.kernel_devices
        candidates = [p for p in self.layers if self.states[p] and parameters[p].device.type in devices]
        if candidates and dispatch.mode() != "reference" and _has_triton():
            self._make_tables(candidates)
        self.by_kernel = [place for _, places in self.tables for place in places]
        self.kernel_deltas = [parameters[place] for place in self.by_kernel]
        self.kernel_patterns = [self.patterns[place] for place in self.by_kernel]
        self.kernel_versions: list[int] = []  # of the deltas, after the last step: it left all as written
        # held, since layers lie all over the memory: to ask each of them in each step took as long as the update
        self.weight_places = [self.layers[place]().weight_place(self.patterns[place]()) for place in self.by_kernel]
        by_kernel = set(self.by_kernel)
        # by group: the places of those that torch's fused AdamW takes, and of those that it does not
        self.by_torch: list[tuple[list[int], list[int]]] = [([], []) for _ in self.sizes]
        for place, (parameter, state) in enumerate(zip(parameters, self.states, strict=True)):
            if state and place not in by_kernel:
                fuses = _fuses(parameter, state)
                state["step"] = state["step"].to(parameter.device if fuses else "cpu")
                self.by_torch[self.groups[place]][0 if fuses else 1].append(place)
        self.written = [place for place in self.layers if place not in by_kernel]
        self.state_ids = [*map(id, optimizer.state.values())]
        self.seen = self._look()

    def _make_tables(self, candidates: Sequence[int]) -> None:
        """Tables of those deltas that the kernel can take; the others are torch's."""
        from sparseft.kernels.adamw_triton import Entry, Table

        entries: dict[torch.device, list[Entry]] = {}
        places: dict[torch.device, list[int]] = {}
        for place in candidates:
            layer, pattern, state = self.layers[place](), self.patterns[place](), self.states[place]
            delta = self.parameters[place].detach()
            moments, base = (state["exp_avg"], state["exp_avg_sq"]), pattern.base_values
            group, width = self.groups[place], None
            weight, at = layer.written(pattern)
            if isinstance(at, Grids):
                if len(at.parts) > 1:
                    continue
                at, width = grid.encode(*at.parts[0]), len(at.parts[0][1])
            if weight is None:  # nothing is written
                continue
            entry = Entry(delta, *moments, base, weight, at, pattern.kind, state["step"], group, width)
            if _fits(entry, layer):
                entries.setdefault(delta.device, []).append(entry)
                places.setdefault(delta.device, []).append(place)
        for device, found in entries.items():
            table = Table(found, len(self.sizes))
            self.tables.append((table, places[device]))
            for place, count in zip(places[device], table.counts.unbind(), strict=True):
                self.states[place]["step"] = count

    def _look(self) -> list[Any]:
        """What may change without a layer's, or the optimizer's, knowing: where tensors lie, and their layout."""
        self.weights: list[Tensor] = [held[name] for held, name in self.weight_places]
        tensors = [*self.parameters, *self.weights, *chain.from_iterable(map(_state_tensors, self.held))]
        return [
            [*map(Tensor.data_ptr, tensors)],
            [*map(Tensor.is_contiguous, self.parameters)],
            [*map(Tensor.stride, self.weights)],
        ]

    def holds(self, optimizer: SparseAdamW, parameters: list[Tensor], grads: Gradients) -> bool:
        """Whether nothing has changed since the plan was made."""
        return (
            self.changes == changes.count
            and self.sizes == [len(group["params"]) for group in optimizer.param_groups]
            and all(map(operator.is_, parameters, self.parameters))
            and self.state_ids == [*map(id, optimizer.state.values())]
            and all(self.held)
            and all(grads[place] is None for place in self.fresh)
            and self.seen == self._look()
        )

    def write_stale(self, grads: Gradients, *, may_stop: bool) -> None:
        """Writes deltas that were changed by hand and that the step, which may stop at a flag, would leave unwritten.

        Fused and foreach updates do not count as changes of a tensor's version: what they did is no use to look for.
        """
        if may_stop and self.kernel_versions != [delta._version for delta in self.kernel_deltas]:
            places: Iterable[int] = self.patterns
        else:
            places = [place for place in self.patterns if grads[place] is None]
        for place in places:
            if not self.patterns[place]().holds(self.parameters[place]):
                self.layers[place]().write_back()

    def step_by_kernel(self, groups: Groups, grads: Gradients, found_inf: Flag, grad_scale: Flag) -> None:
        """Updates and writes what the kernel takes."""
        if not self.tables:
            return
        from sparseft.kernels.adamw_triton import numbers_of

        numbers = [numbers_of(group["lr"], *group["betas"], group["eps"], group["weight_decay"]) for group in groups]
        for table, places in self.tables:
            own = [grads[place] for place in places]
            present = [grad for grad in own if grad is not None]
            if not present:
                continue
            if not all(map(Tensor.is_contiguous, present)) or {grad.dtype for grad in present} != {torch.float32}:
                # The copies live until the launch is queued: the allocator keeps streams in order.
                own = [None if grad is None else grad.float().contiguous() for grad in own]
            table.run(own, numbers, found_inf, grad_scale)
        weights, self.weights = self.weights, []  # until the next step looks for them
        active = [grads[place] is not None for place in self.by_kernel]
        # autograd must see that the kernel changed weights behind its back, so that it refuses stale graphs. Deltas
        # count no change, as in torch's fused steps: so no pattern has to be told that the weight holds its delta.
        torch.autograd.graph.increment_version(weights if all(active) else [*compress(weights, active)])
        versions = [delta._version for delta in self.kernel_deltas]
        if versions != self.kernel_versions:
            for pattern, delta in compress(zip(self.kernel_patterns, self.kernel_deltas, strict=True), active):
                pattern().wrote(delta)
            self.kernel_versions = versions

    def step_by_torch(self, groups: Groups, grads: Gradients, found_inf: Flag, grad_scale: Flag) -> None:
        """Updates the others by torch's own AdamW, by its fused kind where it can be, and writes their layers."""
        for group, (fused, others) in zip(groups, self.by_torch, strict=True):
            chosen = [(place, grad) for place in fused if (grad := grads[place]) is not None]
            # it pairs elements by their place in memory
            own = [grad if grad.is_contiguous() else grad.contiguous() for _, grad in chosen]
            self._adamw(group, [place for place, _ in chosen], own, True, found_inf, grad_scale)
            chosen = [(place, grad) for place in others if (grad := grads[place]) is not None]
            if chosen and not (found_inf is not None and float(found_inf) == 1):
                own = [grad if grad_scale is None else grad / grad_scale.to(grad.device) for _, grad in chosen]
                self._adamw(group, [place for place, _ in chosen], own, None, None, None)
        for ref in dict.fromkeys(self.layers[place] for place in self.written if grads[place] is not None):
            ref().write_back()

    def _adamw(
        self,
        group: dict[str, Any],
        places: list[int],
        grads: list[Tensor],
        fused: bool | None,
        found_inf: Flag,
        grad_scale: Flag,
    ) -> None:
        if not places:
            return
        parameters, states = [self.parameters[place] for place in places], [self.states[place] for place in places]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=fused,
            grad_scale=grad_scale,
            found_inf=found_inf,
            has_complex=any(parameter.is_complex() for parameter in parameters),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _forget_weights(plan: Callable[[], _Plan | None], _: Any) -> None:
    """A layer died."""
    if (found := plan()) is not None:
        found.weight_places = []


def _check_group(group: dict[str, Any]) -> None:
    for option in _REFUSED:
        if group.get(option):
            raise UserError(f"SparseAdamW has no {option}: expected {option}=False, or use torch.optim.AdamW.")
    if isinstance(group.get("lr"), Tensor):
        raise UserError("SparseAdamW: expected lr as a number, got a tensor.")


def _as_scalar(number: Flag) -> Flag:
    """Without a dimension, as torch's fused AdamW takes it."""
    return number if number is None or number.dim() == 0 else number.reshape(())


def _fuses(parameter: Tensor, state: dict[str, Tensor]) -> bool:
    """Whether torch's fused AdamW may take it."""
    tensors = (parameter, state["exp_avg"], state["exp_avg_sq"])
    return (
        parameter.is_floating_point()
        and parameter.device.type in _FUSED_DEVICES
        and all(t.device == parameter.device and t.is_contiguous() and t.dtype == parameter.dtype for t in tensors)
    )


def _fresh_state(parameter: Tensor) -> dict[str, Tensor]:
    """As torch's AdamW starts: counts on the CPU, from where they go to where they are needed."""
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


def _fits(entry: Entry, layer: SparseLinear) -> bool:
    """Whether the kernel can take this delta; patterns of one layer may overlap, which `write_back` sums up."""
    from sparseft.kernels.adamw_triton import LARGEST, WEIGHT_DTYPES

    values = (entry.delta, entry.exp_avg, entry.exp_avg_sq, entry.base_values)
    index = (entry.at,) if isinstance(entry.at, Tensor) else ()
    return (
        len(layer.patterns) == 1
        and entry.weight.dtype in WEIGHT_DTYPES
        and dispatch.gpu_knows(entry.weight.device, entry.weight.dtype)
        and entry.base_values.dtype == entry.weight.dtype
        and all(value.dtype == torch.float32 for value in values[:3])
        and all(tensor.is_contiguous() for tensor in (*values, *index))
        and all(tensor.device == entry.weight.device for tensor in (*values, *index))
        and 0 < entry.delta.numel() <= LARGEST
        and not entry.delta.is_inference()  # has no version to count
    )

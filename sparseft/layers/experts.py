"""Experts kept as one 3-D parameter: each trains a pattern of its own slice, as a `SparseLinear` does of its weight.

transformers' own loop over experts (`eager`) computes `F.linear(state, self.down_proj[expert])`, its default
`grouped_mm(states, self.down_proj.transpose(-2, -1), offs=...)`. While experts train, the name `down_proj` of the
experts module stands for an `ExpertStack`: a module whose children are the layers of single experts (so that deltas
are named `down_proj.3.columns.delta`), whose items `F.linear` takes as weights and whose transpose `grouped_mm` does.
The 3-D parameter stays where it was: names and shapes of the base's `state_dict` do not change.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseft.layers.grouped_product import Grouping, grouped_product
from sparseft.layers.pattern import Pattern
from sparseft.layers.sparse_linear import SparseLinear
from sparseft.models.decoder import Expert, find_expert, stack_parameter, stacks

_CONFIG = "_sparseft_config"  # where an opened experts module keeps its own config
# What may be asked of a stack as of its parameter; a product by another way would lose the deltas' gradient silently.
_FACTS = ("shape", "dtype", "device", "ndim", "is_meta", "is_cuda", "dim", "size", "numel", "stride", "data_ptr")
_GROUPED = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")


class ExpertLinear(SparseLinear):
    """One expert's linear (out, in): its weight is a slice of the experts module's 3-D parameter, not its own.

    `F.linear(x, layer)` is the layer's product, so that an experts module can take the layer for a weight.
    """

    def __init__(self, expert: Expert) -> None:
        nn.Module.__init__(self)
        self._experts = (expert.experts,)  # in a tuple, so that it is no child
        self.parameter, self.number, self.transposed = expert.parameter, expert.number, False
        self.out_features, self.in_features = expert.weight.shape
        self.register_parameter("bias", None)
        self._original: tuple[nn.Module, ...] = ()
        self._weight_loaded = False
        self._inactive_cast = False
        self.train(expert.experts.training)
        self._set_up()

    @property
    def experts(self) -> nn.Module:
        """The experts module that the layer's slice is of."""
        return self._experts[0]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The expert's slice (out, in): a view of the 3-D parameter."""
        return stack_parameter(self._experts[0], self.parameter)[self.number]

    def weight_place(self, pattern: Pattern) -> tuple[dict[str, Any], str]:
        return self._experts[0]._parameters, self.parameter

    @property
    def joins(self) -> bool:
        """Never: each expert has tokens of its own, and many have none."""
        return False

    def put_in_place(self, *, eager: bool = False) -> None:
        """The experts module uses this layer from now on for its expert.

        It goes on computing by `grouped_mm` where that is its way, else expert by expert (`eager`, also on demand):
        its further ways take the 3-D parameter whole, whose gradient would be dense.
        """
        experts, name = self._experts[0], self.parameter
        stack = experts._modules.get(name)
        if stack is None:
            if _CONFIG not in experts.__dict__:
                experts.__dict__[_CONFIG] = experts.config
                experts.config = copy.copy(experts.config)
                if eager or experts.config._experts_implementation != "grouped_mm":
                    experts.config._experts_implementation = "eager"
                experts.register_forward_pre_hook(_write_stale)
                experts.register_load_state_dict_pre_hook(_see_weight)
            stack = ExpertStack(experts, name)
            experts._modules[name] = stack  # where named_modules and state_dict look
            experts.__dict__[name] = stack  # where the experts' forward looks, before the parameter
        stack._modules[str(self.number)] = self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        def product(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
            y = weight(input)
            return y if bias is None else y + bias

        if func is not F.linear:
            raise _unknown_use(func)
        return product(*args, **(kwargs or {}))

    def _apply(self, fn, recurse: bool = True):
        dtypes = {kind: pattern.base_values.dtype for kind, pattern in self.patterns.items()}
        nn.Module._apply(self, fn, recurse)
        for kind, pattern in self.patterns.items():
            if pattern.base_values.dtype != dtypes[kind]:
                pattern.written_version = -1  # the 3-D parameter is cast after its children: to be written afterwards
                self._inactive_cast = True
        return self

    def write_back(self) -> None:
        """As `SparseLinear.write_back`; after a cast also the inactive entries, rounded once from fp32."""
        if self._inactive_cast:
            self.write_inactive()
            self._inactive_cast = False
        super().write_back()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)
        self._loaded(self._weight_loaded, state_dict, prefix)
        self._weight_loaded = False


class ExpertStack(nn.Module):
    """Stands for a 3-D parameter (experts, out, in): `stack[e]` is expert e's layer, or its plain weight.

    Its shape, dtype and the like are the parameter's.
    """

    def __init__(self, experts: nn.Module, parameter: str) -> None:
        super().__init__()
        self._experts = (experts,)
        self.parameter = parameter
        self._grouping = Grouping()
        self.train(experts.training)

    def __getitem__(self, index: Any) -> Any:
        layer = self._modules.get(str(int(index)))
        return layer if layer is not None else stack_parameter(self._experts[0], self.parameter)[index]

    def __getattr__(self, name: str) -> Any:
        if name in _FACTS and "_experts" in self.__dict__:
            return getattr(stack_parameter(self._experts[0], self.parameter), name)
        return super().__getattr__(name)

    def transpose(self, first: int, second: int) -> _Transposed:
        """The stack as `grouped_mm` takes it: (experts, in, out)."""
        if {first % 3, second % 3} != {1, 2}:
            raise _unknown_use("transpose")
        return _Transposed(self)

    def grouped(self, func: Any, x: Tensor, offs: Tensor) -> Tensor:
        """The product of all experts with their tokens, by transformers' or torch's function."""
        layers: dict[int, Any] = {int(number): layer for number, layer in self._modules.items()}
        if any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers.values()):
            return self._one_by_one(x, offs)  # the joint product would not call the hooks of single experts
        if any("grid" in layer.patterns for layer in layers.values()):
            return self._one_by_one(x, offs)  # it knows no grids
        weight = stack_parameter(self._experts[0], self.parameter).detach()
        return grouped_product(func, x, weight, offs, layers, self._grouping)

    def _one_by_one(self, x: Tensor, offs: Tensor) -> Tensor:
        """The same product as `grouped`, expert by expert, so that the hooks of their layers are called."""
        parts, start = [], 0
        for number, stop in enumerate(offs.tolist()):
            if stop > start:  # an expert without a token is not called, as in the loop over experts
                parts.append(F.linear(x[start:stop], self[number]))
            start = stop
        rest = x.new_zeros(len(x) - start, self.shape[1])  # tokens of no expert here (expert parallelism)
        return torch.cat([*parts, rest.to(parts[0].dtype) if parts else rest])


class _Transposed:
    """A stack's (experts, in, out) view, of which only the grouped product and the facts can be had."""

    def __init__(self, stack: ExpertStack) -> None:
        self.stack = stack

    def __getattr__(self, name: str) -> Any:
        if name not in _FACTS or "stack" not in self.__dict__:
            raise AttributeError(name)
        return getattr(stack_parameter(self.stack._experts[0], self.stack.parameter).transpose(-2, -1), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        options = {name: value for name, value in (kwargs or {}).items() if value is not None}
        named = getattr(func, "__name__", str(func)).rpartition(".")[2]
        if named not in _GROUPED or len(args) != 2 or options.keys() != {"offs"} or not isinstance(args[1], cls):
            raise _unknown_use(func)
        return args[1].stack.grouped(func, args[0], options["offs"])


def _unknown_use(func: Any) -> TypeError:
    name = getattr(func, "__name__", func)
    return TypeError(f"experts that train sparsely are weights of F.linear and grouped_mm only, the model calls {name}")


def _expert_layers(experts: nn.Module) -> Iterator[tuple[str, ExpertLinear]]:
    """The open layers of an experts module, with their names below it."""
    for name, stack in experts._modules.items():
        if isinstance(stack, ExpertStack):
            for number, layer in stack._modules.items():
                assert isinstance(layer, ExpertLinear)
                yield f"{name}.{number}", layer


def _write_stale(experts: nn.Module, _inputs: Any) -> None:
    """Ahead of the forward pass: a write between two experts' products would spoil what the first saved."""
    for _, layer in _expert_layers(experts):
        layer.write_if_stale()


def _see_weight(experts: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    """Ahead of loading: a 3-D weight is that of each of its experts."""
    for _, layer in _expert_layers(experts):
        layer._weight_loaded = prefix + layer.parameter in state_dict


def multiplied_at_once(model: nn.Module) -> bool:
    """Whether a plain model multiplies all experts of a 3-D parameter in one product, which leaves none of them without
    a gradient."""
    return all(module.config._experts_implementation == "grouped_mm" for module in model.modules() if stacks(module))


def open_expert(expert: Expert, *, eager: bool = False) -> ExpertLinear:
    """The expert's layer, put in place where it is not yet: without a pattern the model's function is unchanged."""
    stack = expert.experts._modules.get(expert.parameter)
    layer = stack._modules.get(str(expert.number)) if isinstance(stack, ExpertStack) else None
    if layer is None:
        layer = ExpertLinear(expert)
        layer.put_in_place(eager=eager)
    assert isinstance(layer, ExpertLinear)
    return layer


def close_experts(model: nn.Module, *, idle: bool = False) -> None:
    """Puts every experts module (`idle`: those that train nothing) back as it was before `open_expert`.

    The weights stay as they are; the module computes by its own implementation again.
    """
    for experts in [module for module in model.modules() if _CONFIG in module.__dict__]:
        if idle and any(layer.patterns for _, layer in _expert_layers(experts)):
            continue
        for name in [name for name, child in experts._modules.items() if isinstance(child, ExpertStack)]:
            del experts._modules[name]
            del experts.__dict__[name]
        experts.config = experts.__dict__.pop(_CONFIG)
        for hooks in (experts._forward_pre_hooks, experts._load_state_dict_pre_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "hook", hook) in (_write_stale, _see_weight):
                    del hooks[key]


@contextlib.contextmanager
def opened(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """The experts among `names` are modules of a plain model inside, so that hooks can watch each of them."""
    found = [expert for name in names if (expert := find_expert(model, name)) is not None]
    try:
        for expert in found:
            open_expert(expert, eager=True)
        yield
    finally:
        close_experts(model)

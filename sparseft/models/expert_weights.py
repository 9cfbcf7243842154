"""Experts kept as one 3-D parameter (experts, out, in), as transformers 5 keeps them: which a model has, by name.

Each expert's matrix is a logical linear of its own, named by the parameter's path and the expert's number:
`model.layers.0.mlp.experts.down_proj.3`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparseft.distributed.zero3 import full_shape
from sparseft.models.quantized import is_plain


@dataclass(frozen=True)
class Expert:
    """One expert's matrix: `experts._parameters[parameter][number]`."""

    experts: nn.Module
    parameter: str
    number: int

    @property
    def weight(self) -> Tensor:
        """The expert's (out, in) weight: a view, without gradient."""
        return stack_parameter(self.experts, self.parameter).detach()[self.number]


def stack_parameter(experts: nn.Module, name: str) -> nn.Parameter:
    """The 3-D parameter itself, also where a module of the same name stands before it."""
    parameter = experts._parameters[name]
    assert parameter is not None
    return parameter


def stacks(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """A module's own 3-D parameters that hold one linear weight (out, in) for each expert, with their shapes.

    transformers marks such modules (`use_experts_implementation`), and says whether they are stored transposed or
    with biases; those are left out, as is every 3-D parameter of an unmarked module.
    """
    marked = hasattr(getattr(module, "config", None), "_experts_implementation")
    if not marked or getattr(module, "is_transposed", True) or getattr(module, "has_bias", True):
        return {}
    return {
        name: (int(shape[0]), int(shape[1]), int(shape[2]))
        for name, p in module._parameters.items()
        if p is not None and len(shape := full_shape(p)) == 3 and is_plain(p)
    }


def other_stacks(module: nn.Module) -> list[str]:
    """A module's own 3-D parameters that nothing here can train: transposed, biased, or of a kind unknown."""
    if isinstance(module, _ConvNd) or getattr(module, "sparseft_pattern", False):  # a kernel; blocks that train
        return []
    known = stacks(module)
    stacked = [name for name, p in module._parameters.items() if p is not None and len(full_shape(p)) == 3]
    return [name for name in stacked if name not in known]


def find_expert(model: nn.Module, name: str) -> Expert | None:
    """The expert that `<path of the parameter>.<number>` names, or None where it names none."""
    path, _, number = name.rpartition(".")
    owner, _, parameter = path.rpartition(".")
    if not number.isdecimal() or not owner:
        return None
    module: nn.Module | None = model
    for part in owner.split("."):
        module = module._modules.get(part) if module is not None else None
    if module is None:
        return None
    shape = stacks(module).get(parameter)
    return Expert(module, parameter, int(number)) if shape is not None and int(number) < shape[0] else None


def is_router(parent: nn.Module, leaf: str) -> bool:
    """Whether the child `leaf` of `parent` weighs experts (a router or a shared expert's gate): never trained.

    Such a child stands beside the experts; a gate projection stands beside up and down.
    """
    has_experts = any("expert" in name and not name.endswith("gate") for name in parent._modules)
    return has_experts and (leaf in ("gate", "router", "classifier") or leaf.endswith("expert_gate"))


def in_experts(name: str) -> bool:
    """Whether a linear or parameter of this name belongs to routed experts, which a batch's tokens may pass by."""
    return "experts" in name.split(".")

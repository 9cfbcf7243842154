"""`trainer.checkpointing=selective`: what is cheap to compute is computed again in the backward pass, not kept for it.

Much of what a backward pass keeps was made by no product: activations, gated products, normalised inputs, copies in
another dtype. torch asks by its hooks on saved tensors how each is to be kept; here one that follows elementwise from
what is kept anyway is kept as that recipe. What it follows from is read off autograd's own graph, so no module has to
be known, replaced or called twice: the forward pass is the plain one to the bit, and so are its products and its
attention, which run once. Operations that are not known here keep what they keep.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseft.layers import SparseLinear
from sparseft.layers.product import SINGLE_PATTERN, dense_product
from sparseft.layers.saved_inputs import inputs_made_again
from sparseft.models.decoder import decoder_layers
from sparseft.models.spec import role_of

Node = Any  # torch.autograd.graph.Node
Make = Callable[[], Tensor]

# `products`: elementwise, of gates and norms. `copies`: in another dtype, as of norms' inputs and softmax's result.
CHEAP = ("activations", "products", "copies")
UP = "up"  # the up projection of gated MLPs: a matrix product, for a quarter of what is kept
KINDS: dict[str, tuple[str, ...]] = {"selective": CHEAP, "selective_up": (*CHEAP, UP)}  # by trainer.checkpointing


class Kept:
    """A tensor that is kept as it is. That nobody has written to it since, torch does not check under hooks."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # Without its history: an operation that saves its own result would hold itself. The version is shared.
        self.tensor, self.version = tensor.detach(), tensor._version

    def read(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of {self.tensor.dtype} and shape {tuple(self.tensor.shape)} is at version "
                f"{self.tensor._version}; expected version {self.version} instead."
            )
        return self.tensor

    unpack = read


class Recipe:
    """A tensor that is made when it is read, and held until all that have saved it have read it once."""

    __slots__ = ("_made", "_make", "kind", "waiting")

    def __init__(self, make: Make, kind: str | None) -> None:
        self._make = make
        self.kind = kind  # None: a view of what is kept
        self._made: Tensor | None = None
        self.waiting = 0  # so many have saved it and not read it yet

    def read(self) -> Tensor:
        made = self._made  # read once: a device's backward pass has a thread of its own
        made = self._make() if made is None else made
        self._made = made if self.waiting > 0 else None
        return made

    def unpack(self) -> Tensor:
        self.waiting -= 1
        return self.read()


class Recomputing:
    """The hooks of one forward pass, which hold its graph's nodes until `close`: afterwards what is saved at a node
    holds nothing but nodes that come before it, so that a graph is gone with its last user."""

    def __init__(self, kinds: Collection[str], up_weights: Collection[int]) -> None:
        self.kinds, self.up_weights = kinds, up_weights
        self.taken: Counter[str] = Counter()  # bytes that are not kept, by kind
        self._known: dict[tuple[Node, int], Kept | Recipe | None] = {}

    def close(self) -> None:
        self._known.clear()

    def pack(self, tensor: Tensor) -> Kept | Recipe:
        """How the tensor is kept."""
        node = tensor.grad_fn
        if node is None:  # a parameter, or what asks for no gradient
            return Kept(tensor)
        place = (node, tensor.output_nr)
        found = self.find(*place) or self._narrowed(node, tensor)
        if found is None:
            found = self._known[place] = Kept(tensor)
        if isinstance(found, Recipe):
            if found.waiting == 0 and found.kind is not None:
                self.taken[found.kind] += tensor.nbytes
            found.waiting += 1
        return found

    @staticmethod
    def unpack(held: Kept | Recipe) -> Tensor:
        with torch.no_grad():
            return held.unpack()

    def find(self, node: Node, number: int) -> Kept | Recipe | None:
        """The result `number` of an operation, where it is kept or follows from what is."""
        place = (node, number)
        if self._known.get(place) is None:
            recipe = self._recipe(node) if number == 0 else None
            if recipe is not None:
                self._known[place] = recipe
        return self._known.get(place)

    def _recipe(self, node: Node) -> Recipe | None:
        name = node.name()
        rule, kind = RULES.get(name), KIND_OF.get(name)
        make = None if rule is None or kind not in (None, *self.kinds) else rule(self, node)
        if make is None:
            return None
        viewed = self._known.get(node.next_functions[0]) if kind is None else None
        return Recipe(make, viewed.kind if isinstance(viewed, Recipe) else kind)

    def operand(self, node: Node, place: int, constant: str = "") -> Make | None:
        """Reads the operation's operand `place`; one that has no gradient stands under the name `constant`."""
        before, number = node.next_functions[place]
        if before is None:
            return (lambda: getattr(node, constant)) if constant else None
        if before.name() == ACCUMULATES:
            return Kept(before.variable).read
        found = self.find(before, number)
        return None if found is None else found.read

    def _narrowed(self, node: Node, tensor: Tensor) -> Kept | Recipe | None:
        """Of a copy in a wider dtype its original is kept, which holds the same numbers."""
        if "copies" not in self.kinds or node.name() != "ToCopyBackward0":
            return None
        before, number = node.next_functions[0]
        if before is None or before.name() == ACCUMULATES:
            return None
        made = before._input_metadata[number]
        dtype = made.dtype
        if made.device != tensor.device or not dtype.is_floating_point or dtype.itemsize >= tensor.dtype.itemsize:
            return None
        original = tensor.detach().to(dtype)
        self.taken["copies"] -= original.nbytes
        self._known[before, number] = Kept(original)
        return self.find(node, 0)


ACCUMULATES = "torch::autograd::AccumulateGrad"  # the name of a leaf's node


def _activation(function: Callable[[Tensor, Node], Tensor]) -> Callable[[Recomputing, Node], Make | None]:
    def rule(hooks: Recomputing, node: Node) -> Make | None:
        x = hooks.operand(node, 0)
        return None if x is None else lambda: function(x(), node)

    return rule


def _multiplied(hooks: Recomputing, node: Node) -> Make | None:
    a, b = hooks.operand(node, 0, "_saved_self"), hooks.operand(node, 1, "_saved_other")
    return None if a is None or b is None else lambda: a() * b()


def _copied(hooks: Recomputing, node: Node) -> Make | None:
    x, found = hooks.operand(node, 0), node._input_metadata[0]
    device, dtype = found.device, found.dtype
    return None if x is None else lambda: x().to(device, dtype)


def _viewed(hooks: Recomputing, node: Node) -> Make | None:
    x, shape = hooks.operand(node, 0), tuple(node._input_metadata[0].shape)
    return None if x is None else lambda: x().view(shape)


def _normalised(hooks: Recomputing, node: Node) -> Make | None:
    """From the means and inverse deviations that the operation has saved: equal up to rounding."""
    x = hooks.operand(node, 0)
    if x is None or node._saved_result2.dtype != torch.float32:
        return None

    def make() -> Tensor:
        values, weight, bias = x(), node._saved_weight, node._saved_bias
        made = (values.float() - node._saved_result1) * node._saved_result2
        made = made if weight is None else made * weight
        return (made if bias is None else made + bias).to(values.dtype)

    return make


def _scaled(hooks: Recomputing, node: Node) -> Make | None:
    """An RMSNorm that ran as one kernel (an accelerator's), from the inverse means that it has saved: equal up to
    rounding. Elsewhere torch makes it of operations that are known here."""
    x = hooks.operand(node, 0)
    if x is None or node._saved_result1.dtype != torch.float32:
        return None

    def make() -> Tensor:
        values, weight = x(), node._saved_weight
        made = values.float() * node._saved_result1
        return (made if weight is None else made * weight).to(values.dtype)

    return make


def _projected(hooks: Recomputing, node: Node) -> Make | None:
    if node.next_functions[1][0] is not None:  # a weight that trains
        return None
    weight = node._saved_mat2  # of a frozen linear without bias: its weight, transposed
    x = hooks.operand(node, 0) if _storage(weight) in hooks.up_weights else None
    return None if x is None else lambda: x() @ weight


def _projected_sparsely(hooks: Recomputing, node: Node) -> Make | None:
    """Of a linear that trains a pattern, whose weight holds base + delta."""
    weight, transposed = node.weight, node.plan.transposed
    x = hooks.operand(node, 0) if _storage(weight) in hooks.up_weights else None
    return None if x is None else lambda: dense_product(x(), weight, None, transposed)


RULES: dict[str, Callable[[Recomputing, Node], Make | None]] = {
    "SiluBackward0": _activation(lambda x, node: F.silu(x)),
    "GeluBackward0": _activation(lambda x, node: F.gelu(x, approximate=node._saved_approximate)),
    "MulBackward0": _multiplied,
    "NativeLayerNormBackward0": _normalised,
    "FusedRmsNormBackward0": _scaled,
    "ToCopyBackward0": _copied,
    "ViewBackward0": _viewed,
    "UnsafeViewBackward0": _viewed,
    "MmBackward0": _projected,
    **{f"{function.__name__}Backward": _projected_sparsely for function in SINGLE_PATTERN},
}
KIND_OF = {
    "SiluBackward0": "activations",
    "GeluBackward0": "activations",
    "MulBackward0": "products",
    "NativeLayerNormBackward0": "products",
    "FusedRmsNormBackward0": "products",
    "ToCopyBackward0": "copies",
    "MmBackward0": UP,
    **{f"{function.__name__}Backward": UP for function in SINGLE_PATTERN},
}  # views are of the kind of what is viewed


@contextlib.contextmanager
def recomputing(model: nn.Module, kinds: Collection[str] = CHEAP) -> Iterator[Recomputing]:
    """Inside, a forward pass of the model keeps recipes where it can; its backward pass may run afterwards.

    kinds: of `CHEAP`, and `UP`. What is yielded counts what is not kept (`taken`).
    """
    hooks = Recomputing(kinds, up_weights(model) if UP in kinds else ())
    try:
        with inputs_made_again(), torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
            yield hooks
    finally:
        hooks.close()


def up_weights(model: nn.Module) -> set[int]:
    """The storages of the weights of those up projections that are computed again: of gated MLPs, frozen or with a
    pattern that trains, without bias, in all decoder layers but the last, whose backward pass comes while everything
    else is still kept."""
    found = set()
    for layer in decoder_layers(model)[1][:-1]:
        modules = dict(layer.named_modules())
        gated = {name.rpartition(".")[0] for name in modules if role_of(name) == "gate"}
        for name, module in modules.items():
            if role_of(name) != "up" or name.rpartition(".")[0] not in gated:
                continue
            known = type(module) is nn.Linear or (isinstance(module, SparseLinear) and not module.beside)
            if known and module.bias is None and not module.weight.requires_grad:
                found.add(_storage(module.weight))
    return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # on the meta device too, where all have one address


def describe(taken: Counter[str]) -> str | None:
    """What a micro-step does not keep, in MiB by kind; None where that is nothing."""
    kinds = {kind: count / 2**20 for kind, count in taken.most_common() if count > 0}
    parts = ", ".join(f"{kind} {size:,.1f}" for kind, size in kinds.items())
    return f"{sum(kinds.values()):,.1f} MiB ({parts})" if kinds else None

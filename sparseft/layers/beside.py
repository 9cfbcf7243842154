"""`BesideLinear`: a linear whose own weight is never written, with the trained entries beside it.

Quantized weights cannot hold base + delta, nor can one in shards (ZeRO-3, FSDP2), of which a process borrows the rest
for the time of a product. So the module itself is kept and called, whatever it is, and what a small dense part makes of
x is added. The part of columns, say, is `compact` (out, k), in the dtype that the model computes in:

    y = base(x) + x[:, columns] @ compact.T,    compact = round(base values + delta)

Base values are what the part starts from: zero, so that the base keeps its own entries, or what quantization took of
them (a pattern's `residual`), so that training starts at the checkpoint's full precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparseft.distributed.shards import is_sharded
from sparseft.errors import UserError
from sparseft.kernels import grid, reference
from sparseft.layers.beside_product import BesideProduct, added
from sparseft.layers.pattern import Pattern, changes
from sparseft.layers.product import Plan
from sparseft.layers.sparse_linear import SparseLinear
from sparseft.models.decoder import logical_shape
from sparseft.models.packed.quantized import dequantized, is_packed, keep_differentiable


def stands_beside(linear: nn.Module) -> bool:
    """Whether a linear's weight cannot hold base + delta."""
    return is_packed(linear) or is_sharded(linear._parameters.get("weight"))


class BesideLinear(SparseLinear):
    """A linear layer around a module that is called as it is, and never changed.

    Parameters and buffers of the module are the layer's own, so that their names stay as they were; patterns are
    child modules, as of every `SparseLinear`, and so are adapter files. A weight is never written: undoing is exact,
    and switching exchanges the small parts.

    Of a quantized module each pattern has a `compact` part, which is written as other layers' weights are (write-back,
    `SparseAdamW`). Of plain weights the part is made of the deltas in each product: in shards they have no other place.
    """

    beside = True
    checkpoint: Callable[[], Tensor] | None = None  # gives the weight (out, in) at full precision, where it is known
    row_permutation = None
    column_permutation = None
    transposed = False

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError("BesideLinear.wrap(module) makes one.")

    @classmethod
    def wrap(cls, linear: nn.Module, dtype: torch.dtype | None = None) -> BesideLinear:
        """A layer around a module, with no pattern yet. dtype: in what it computes, where its weight does not say."""
        if next(linear.children(), None) is not None:
            raise UserError(f"a {type(linear).__name__} has modules of its own, beside which nothing can be trained.")
        keep_differentiable(linear)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.out_features, layer.in_features = logical_shape(linear)
        layer.compact_dtype = dtype or _dtype_of(linear)
        layer.holds = is_packed(linear)
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            layer.__dict__[name] = linear.__dict__[name]  # the very same, whatever the module does with them
        for parameter in linear._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(False)
        layer._original = (linear,)
        layer._set_up()
        layer.train(linear.training)
        return layer

    @property
    def base(self) -> nn.Module:
        """The module that is called."""
        return self._original[0]

    @property
    def logical_weight(self) -> Tensor:
        """What the parts start from where nothing else is known: zeros (out, in), which take no memory."""
        some = next(t for t in (*self._parameters.values(), *self._buffers.values()) if t is not None)
        return torch.zeros((), dtype=self.compact_dtype, device=some.device).expand(self.out_features, self.in_features)

    def new_pattern(
        self, kind: str, index: Tensor, block_size: int | None = None, inverse: Tensor | None = None
    ) -> Pattern:
        return Pattern(kind, index, self.logical_weight, block_size)

    @torch.no_grad()
    def install(self, patterns: dict[str, Pattern]) -> dict[str, Pattern]:
        old = super().install(patterns)
        for pattern in old.values():
            if pattern not in patterns.values():
                pattern.compact = None  # what waits takes no more memory than its delta
        self.take_residuals()
        return old

    @torch.no_grad()
    def take_residuals(self) -> None:
        """Parts of patterns with `residual` start from what the checkpoint holds beyond the base; UserError where
        nobody knows what that was."""
        chosen = [pattern for pattern in self.patterns.values() if pattern.residual]
        if not chosen or not self.holds:  # plain weights are at full precision
            return
        if self.checkpoint is None:
            raise UserError(
                "method.residual=true: what the checkpoint held is not known of this base; it is where "
                "model.quantize packed it on loading."
            )
        packed, full = dequantized(self.base), self.checkpoint()
        wide = torch.promote_types(self.compact_dtype, torch.float32)
        if len(chosen) > 1:
            packed = packed.to(wide, copy=True)
        for pattern in chosen:
            before, now = (reference.gather(w, pattern.kind, pattern.index.to(w.device), pattern.block_size)
                           for w in (full, packed))  # fmt: skip
            before = before.to(now.device, wide)
            pattern.base_values = (before - now.to(wide)).to(pattern.base_values)
            if len(chosen) > 1:  # an entry in several patterns starts there once: what one has taken, the next has not
                reference.scatter_(packed, pattern.kind, pattern.index.to(packed.device), before, pattern.block_size)
        changes.count += 1
        self.write_back()

    def restore_base(self) -> None:
        """Nothing to do: the weight holds the base always."""

    def write_inactive(self) -> None:
        """There are none: what re-selection puts aside needs a weight that keeps it."""

    @torch.no_grad()
    def write_back(self) -> None:
        """Writes base values + delta into each pattern's part, rounded once from fp32."""
        if not self.holds:
            return
        for pattern in self.patterns.values():
            if pattern.compact is None or pattern.compact.dtype != self.compact_dtype:
                pattern.compact = torch.empty_like(pattern.delta, dtype=self.compact_dtype)
                changes.count += 1
            pattern.compact.copy_(pattern.base_values + pattern.delta)
            pattern.wrote(pattern.delta)

    @property
    def is_written(self) -> bool:
        return not self.holds or all(
            pattern.delta.is_inference()
            or pattern.delta.is_meta
            or (
                pattern.compact is not None
                and torch.equal(pattern.compact, (pattern.base_values + pattern.delta).to(pattern.compact.dtype))
            )
            for pattern in self.patterns.values()
        )

    def written(self, pattern: Pattern) -> tuple[Tensor | None, reference.At]:
        """The part as a matrix: blocks below one another, a grid's rows by its columns."""
        part = pattern.compact if self.holds else None
        if part is None:
            return None, pattern.at
        if pattern.kind == "blocks":
            places = torch.arange(len(part), device=part.device)
            return part.view(-1, part.shape[-1]), torch.stack([places, torch.zeros_like(places)], 1)
        if pattern.kind == "grid":
            if len(pattern.grids.parts) > 1:
                return None, pattern.at
            rows, columns = (torch.arange(len(side), device=part.device) for side in pattern.grids.parts[0])
            return part.view(len(rows), len(columns)), grid.located(grid.encode(rows, columns), reference.padded)
        return part, (0, len(pattern.index))

    def weight_place(self, pattern: Pattern) -> tuple[dict[str, Any], str]:
        return pattern._buffers, "compact"

    @property
    def joins(self) -> bool:
        """Never: each makes the gradients of its own part."""
        return False

    def train(self, mode: bool = True) -> BesideLinear:
        self.base.train(mode)
        super().train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for pattern in self.patterns.values():
            delta = pattern.delta
            if self.holds and not pattern.holds(delta):
                self.write_back()
            values = pattern.compact if self.holds else delta.detach()
            if torch.is_grad_enabled() and (delta.requires_grad or x.requires_grad or y.requires_grad):
                y = BesideProduct.apply(y, x, delta, values, pattern, self._plan_of(pattern))
            else:
                y = added(y, x, values, pattern)
        return y

    def _plan_of(self, pattern: Pattern) -> Plan:
        """How the pattern is trained, made anew when something has changed."""
        if torch.compiler.is_compiling():
            return pattern.plan(False, self.in_features, self.keeps_input)
        known: Any = self._plan
        if known is None or known[0] != changes.count:
            count = changes.count  # before anything is read: another thread may change it
            plans = {k: p.plan(False, self.in_features, self.keeps_input) for k, p in self.patterns.items()}
            known = self.__dict__["_plan"] = count, plans
        return known[1][pattern.kind]

    def permute(self, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        """ValueError but for the original order, which is the only one: the weight cannot be rewritten."""
        if rows is not None or columns is not None:
            raise ValueError("a weight beside which deltas stand keeps its order")

    def unwrap(self) -> nn.Module:
        """The module, as it was and always has been."""
        self.base.train(self.training)
        return self.base

    def _set_up_order(self) -> None:
        """There is one order, and the buffers are the module's."""

    def _apply(self, fn, recurse: bool = True):
        before = self.compact_dtype
        nn.Module._apply(self, fn, recurse)
        self.compact_dtype = next((p.base_values.dtype for p in self.patterns.values()), before)
        changes.count += 1
        if self.compact_dtype != before:
            self.write_back()  # as of every sparse layer: rounded once again from fp32
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self.write_if_stale()
        self.base._save_to_state_dict(destination, prefix, keep_vars)  # with what a quantized one adds

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        ours = tuple(f"{prefix}{kind}." for kind in self.patterns)
        theirs = (
            {name: value for name, value in state_dict.items() if not name.startswith(ours)} if ours else state_dict
        )
        self.base._load_from_state_dict(theirs, prefix, *args)
        whole = prefix + "weight" in state_dict
        if whole and not any(f"{prefix}{kind}.delta" in state_dict for kind in self.patterns):
            self._take_new_base()

    def _take_new_base(self) -> None:
        super()._take_new_base()
        self.write_back()

    def extra_repr(self) -> str:
        return f"{self.base!r} with {', '.join(self.patterns) or 'nothing'} beside it"


def _dtype_of(linear: nn.Module) -> torch.dtype:
    """In what a module computes, as far as its tensors say."""
    tensors = [linear._parameters.get("weight"), linear._parameters.get("bias"), *linear._buffers.values()]
    return next((t.dtype for t in tensors if t is not None and t.is_floating_point() and t.itemsize > 1), torch.float32)

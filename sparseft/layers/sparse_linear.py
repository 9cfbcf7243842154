"""`SparseLinear`: a frozen weight plus small fp32 deltas on patterns of its own entries.

The weight's selected entries always hold *base + delta*, rounded once from fp32, so that the forward pass is the frozen
model's single product. The backward pass computes the dense input gradient, and the weight gradient on the patterns
only (partial back-propagation, S2FT §3.3; `layers/product.py`). A write-back after each optimizer step
(`layers/write_back.py`) keeps weight and deltas together.

The layers of one kind of pattern are in `layers/kinds.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparseft.distributed.shards import full_shape, gathered
from sparseft.kernels import reference
from sparseft.layers.pattern import Pattern, as_index, changes, states_of, updates
from sparseft.layers.permutation import can_train, inverse, permute_entries, permuted
from sparseft.layers.product import (
    BlocksProduct,
    ColumnsProduct,
    PatternsProduct,
    RowsProduct,
    applied,
    dense_product,
    refuse_transforms,
)
from sparseft.layers.write_back import enrol
from sparseft.models.decoder import BIAS_APART, is_transposed, logical_weight

_PRODUCTS = {
    "rows": applied(RowsProduct),
    "columns": applied(ColumnsProduct),
    "blocks": applied(BlocksProduct),
    "grid": applied(ColumnsProduct),
}


class _Plan(NamedTuple):
    """What the forward pass of a layer with one pattern does, as of `changes`; else it is found out each time."""

    changes: int
    pattern: Pattern | None = None
    product: Callable[..., Tensor] | None = None
    how: Any = None
    joint: Any = None  # those that make gradients together, and the layer's place among them
    place: int = 0
    plain: bool = True  # weight and bias are parameters, which may be exchanged at any time; else they are computed


class SparseLinear(nn.Module):
    """A linear layer `y = x Wᵀ + b`, W (out, in), that trains fp32 deltas on patterns of its frozen weight.

    Its patterns are child modules named `rows`, `columns`, `blocks` and `grid`, so that parameters are called
    `<module>.rows.delta` and so on, as in adapter files. Without a pattern it is a frozen linear layer.
    `transposed` layers keep their weight as (in, out), as Conv1D does; indices always mean the logical (out, in).

    Weight and bias may be stored with rows and columns permuted (`layers/permutation.py`): `row_permutation` (out,)
    and `column_permutation` (in,) say which original one each stored one is, None that none was moved. Indices and
    state dicts are in the original order always.
    """

    sparseft_linear = True
    weight: nn.Parameter
    row_permutation: Tensor | None
    column_permutation: Tensor | None
    _keeps_input: bool | None = None
    _joint: tuple[Any, int] | None = None
    _plan: _Plan | None = None
    _awaits: tuple[int, ...] | None = None  # the deltas (`states_of`) of a state dict, if their weight is still to come
    bias_apart = False  # whether the bias is added to the product as it was rounded, as by the module it replaced
    beside = False  # whether the deltas stand beside the weight (`layers/beside.py`), not in it

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None,
                 *, transposed: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=False)
        else:
            self.register_parameter("bias", None)
        self._original: tuple[nn.Module, ...] = ()  # in a tuple, so that it is no child
        self.reset_parameters()
        self._set_up()

    def _set_up(self) -> None:
        """What every layer needs, however it was made."""
        self._set_up_order()
        self._inverses: dict[str, tuple[Tensor, Tensor]] = {}  # by kind: a permutation and its inverse
        self.register_load_state_dict_post_hook(_after_load)
        enrol(self)

    def _set_up_order(self) -> None:
        """Buffers that move with the layer; checkpoints, in the original order, do not hold them."""
        self.register_buffer("row_permutation", None, persistent=False)
        self.register_buffer("column_permutation", None, persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_inverses": {}, "_plan": None, "_awaits": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        enrol(self)  # copies made by deepcopy and pickle take part in the write-back too

    def reset_parameters(self) -> None:
        """As `nn.Linear` initialises itself; only of use where the layer stands alone."""
        if self.weight.is_meta:
            return
        nn.init.kaiming_uniform_(self.logical_weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
            nn.init.uniform_(self.bias, -bound, bound)
        self._take_new_base()

    @classmethod
    def wrap(cls, linear: nn.Module) -> SparseLinear:
        """A layer around the very parameters of an `nn.Linear` or `Conv1D`, with no pattern yet."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.transposed = is_transposed(linear)
        rows, columns = full_shape(linear.weight)
        layer.in_features, layer.out_features = (rows, columns) if layer.transposed else (columns, rows)
        layer.weight = linear.weight
        layer.register_parameter("bias", linear.bias)
        layer.bias_apart = linear.bias is not None and type(linear).__name__ in BIAS_APART
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        layer._original = (linear,)
        layer.train(linear.training)
        layer._set_up()
        return layer

    @property
    def original(self) -> nn.Module | None:
        """The module that this layer replaced, if any."""
        return self._original[0] if self._original else None

    @property
    def logical_weight(self) -> Tensor:
        """The weight as (out, in), in the order in which it is stored: a view, without gradient."""
        return logical_weight(self)

    def weight_place(self, pattern: Pattern) -> tuple[dict[str, Any], str]:
        """Where the tensor is held, and under which name, in whose storage the pattern's entries are written."""
        return self._parameters, "weight"

    def written(self, pattern: Pattern) -> tuple[Tensor, reference.At]:
        """The matrix (a view) into which the pattern's base + delta is written, and where in it its entries lie."""
        return self.logical_weight, pattern.at

    @property
    def is_permuted(self) -> bool:
        """Whether the weight is stored in another order than the checkpoint's."""
        return self.row_permutation is not None or self.column_permutation is not None

    @property
    def patterns(self) -> dict[str, Pattern]:
        """The patterns in use, by kind."""
        modules = self._modules
        return {kind: modules[kind] for kind in reference.KINDS if modules.get(kind) is not None}

    @property
    def delta(self) -> nn.Parameter:
        """The delta of a layer with one pattern."""
        return self._only().delta

    @property
    def base_values(self) -> Tensor:
        """The base's entries of a layer with one pattern."""
        return self._only().base_values

    def _only(self) -> Pattern:
        patterns = self.patterns
        if len(patterns) != 1:
            raise TypeError(f"the layer has {len(patterns)} patterns: use .patterns")
        return next(iter(patterns.values()))

    @property
    def trainable_entries(self) -> int:
        """Entries of the weight that train; the part of an edge block outside the weight does not count."""
        shape = (self.out_features, self.in_features)
        return sum(
            reference.trainable_entries(p.kind, p.index.cpu(), shape, p.block_size) for p in self.patterns.values()
        )

    def add_pattern(self, kind: str, index: Any, block_size: int | None = None) -> Pattern:
        """Trains the entries that `index` names too. Raises `UserError` where the index does not fit the weight."""
        if kind in self.patterns:
            raise ValueError(f"the layer already trains {kind}")
        self.restore_base()  # what another pattern has learnt is no part of this one's base
        try:
            pattern = self.new_pattern(kind, as_index(kind, index), block_size, self.inverse_of(kind))
            self.add_module(kind, pattern)
        finally:
            self.write_back()
        return pattern

    def new_pattern(
        self, kind: str, index: Tensor, block_size: int | None = None, inverse: Tensor | None = None
    ) -> Pattern:
        """A pattern of the weight with deltas of zero, whose base is what the weight holds; not in use yet. inverse:
        the order in which it is stored (`inverse_of`); `install` puts that right."""
        with gathered([self.weight]):
            return Pattern(kind, index, self.logical_weight, block_size, inverse)

    @torch.no_grad()
    def install(self, patterns: dict[str, Pattern]) -> dict[str, Pattern]:
        """Puts the base back, takes `patterns` instead of the present ones, writes them, and returns the old."""
        inverses = {kind: self.inverse_of(kind) for kind in patterns}
        self.restore_base()
        old = self.patterns
        for kind in old:
            del self._modules[kind]
        changes.count += 1
        if patterns:
            with gathered([self._parameters.get("weight")]):  # None: of a packed one that keeps it elsewhere
                weight = self.logical_weight
                for kind, pattern in patterns.items():
                    if pattern.inverse is not inverses[kind]:
                        pattern.permute(inverses[kind])
                    pattern.take_base(weight)
                    self._modules[kind] = pattern
            self.write_inactive()
            self.write_back()
            changes.count += 1
        return old

    @torch.no_grad()
    def restore_base(self) -> None:
        """Writes the base's own values, bit for bit; the deltas stay as they are."""
        if self.weight.is_meta:
            return
        weight = self.logical_weight
        for pattern in self.patterns.values():
            reference.scatter_(weight, pattern.kind, pattern.at, pattern.base_values, pattern.block_size)
            if pattern.inactive is not None:
                at, base = pattern.stored(pattern.inactive.index), pattern.inactive.base.to(weight.device)
                reference.scatter_(weight, pattern.kind, at, base, pattern.block_size)

    @torch.no_grad()
    def write_inactive(self) -> None:
        """Writes base + delta of the inactive entries: needed only where the weight held the base."""
        weight = self.logical_weight
        for pattern in self.patterns.values():
            if pattern.inactive is not None and not weight.is_meta:
                values = (pattern.inactive.base + pattern.inactive.delta).to(weight)
                at = pattern.stored(pattern.inactive.index)
                reference.scatter_(weight, pattern.kind, at, values, pattern.block_size)

    @torch.no_grad()
    def write_back(self) -> None:
        """Writes base + delta into the weight, rounded once from fp32."""
        patterns = list(self.patterns.values())
        if not patterns:
            return
        weight = self.logical_weight
        if weight.is_meta:
            return
        refuse_transforms()  # their deltas are no values that a weight could hold
        if len(patterns) == 1:
            pattern = patterns[0]
            values = (pattern.base_values + pattern.delta).to(weight.dtype)  # in fp32, or float64 where the base is
            reference.scatter_(weight, pattern.kind, pattern.at, values, pattern.block_size)
        else:  # patterns may overlap (fused adapters): add them up in fp32, round once
            total = weight.to(torch.promote_types(weight.dtype, torch.float32))
            for p in patterns:
                reference.scatter_(total, p.kind, p.at, p.base_values.to(total.dtype), p.block_size)
            for p in patterns:
                values = reference.gather(total, p.kind, p.at, p.block_size) + p.delta
                reference.scatter_(total, p.kind, p.at, values, p.block_size)
            for p in patterns:
                values = reference.gather(total, p.kind, p.at, p.block_size).to(weight.dtype)
                reference.scatter_(weight, p.kind, p.at, values, p.block_size)
        for pattern in patterns:
            pattern.wrote(pattern.delta)

    def write_if_stale(self) -> None:
        """`write_back` where a delta was changed or exchanged by other means than an optimizer's step."""
        if any(pattern.stale for pattern in self.patterns.values()):
            self.write_back()

    @property
    def is_written(self) -> bool:
        """Whether the weight's entries are base + delta, by their values: waits for the device.

        False after a delta was changed through `.data`, which PyTorch does not count, until `write_back`.
        """
        patterns = list(self.patterns.values())
        if len(patterns) != 1 or self.weight.is_meta:  # of patterns that overlap no entry says whose
            return True
        pattern, weight = patterns[0], self.logical_weight
        if pattern.delta.is_inference():
            return True
        values = (pattern.base_values + pattern.delta.detach()).to(weight.dtype)
        expected = weight.clone()
        reference.scatter_(expected, pattern.kind, pattern.at, values, pattern.block_size)
        return torch.equal(weight, expected)

    def train(self, mode: bool = True) -> SparseLinear:
        """Also writes the deltas where the mode changes: what averages of parameters put into `delta.data`, as they do
        ahead of an evaluation, leaves no trace in its version."""
        if mode != self.training and self.patterns:
            self.write_back()
            updates.count += 1
        return super().train(mode)

    @property
    def keeps_input(self) -> bool | None:
        """Whether blocks save x itself, not a slice; None: decided for this layer alone."""
        return self._keeps_input

    @keeps_input.setter
    def keeps_input(self, keeps_input: bool | None) -> None:
        self._keeps_input = keeps_input
        changes.count += 1

    @property
    def joint(self) -> tuple[Any, int] | None:
        """The layers with which this one makes its gradients (`layers/joint_gradients.py`), and its place there."""
        return self._joint

    @joint.setter
    def joint(self, joint: tuple[Any, int] | None) -> None:
        self._joint = joint
        changes.count += 1

    @property
    def joins(self) -> bool:
        """Whether it may have such."""
        return not self.bias_apart

    def forward(self, x: Tensor) -> Tensor:  # (…, in) -> (…, out)
        if torch.compiler.is_compiling():
            return self._with_patterns(x)
        plan = self._plan
        if plan is None or plan.changes != changes.count:
            plan = self._plan = self._make_plan()
        pattern = plan.pattern
        if pattern is None:
            self.write_if_stale()
            return self._with_patterns(x)
        delta = pattern._parameters["delta"]
        if delta is not pattern.written_delta or delta._version != pattern.written_version:
            self.write_back()
        if plan.plain:
            parameters = self._parameters
            weight, bias = parameters["weight"], parameters["bias"]
        else:
            weight, bias = self.weight, self.bias
        if torch.is_grad_enabled() and delta.requires_grad:
            begun = None if plan.joint is None else plan.joint.begun
            try:
                if begun is None or begun[2][plan.place] is not delta:
                    y = plan.product(x, weight, bias, delta, plan.how)
                else:
                    node, token, _ = begun
                    y = plan.product(x, weight, bias, token, plan.how, node, plan.place)
            except RuntimeError:
                refuse_transforms()  # asked only now, as that takes its time
                raise
        else:
            y = dense_product(x, weight, bias, self.transposed)
        return y

    def _make_plan(self) -> _Plan:
        count = changes.count  # before anything is read: another thread may change it
        patterns = self.patterns
        pattern = next(iter(patterns.values())) if len(patterns) == 1 else None
        if self.bias_apart or pattern is None or "delta" not in pattern._parameters or pattern.delta.is_inference():
            return _Plan(count)  # a delta that is computed, or whose changes nobody counts, is looked at each time
        how = pattern.plan(self.transposed, self.in_features, self.keeps_input)
        plain = self._parameters.keys() >= {"weight", "bias"}
        return _Plan(count, pattern, _PRODUCTS[pattern.kind], how, *(self.joint or (None, 0)), plain)

    def _replicate_for_data_parallel(self) -> SparseLinear:
        """A replica of `nn.DataParallel` computes with tensors of its own, which are no parameters of it."""
        replica = super()._replicate_for_data_parallel()
        replica._plan = None
        return replica

    def _with_patterns(self, x: Tensor) -> Tensor:
        """The forward pass with any number of patterns, and what a compiler sees of it."""
        patterns = self.patterns
        bias, apart = (None, self.bias) if self.bias_apart else (self.bias, None)
        if torch.is_grad_enabled() and any(p.delta.requires_grad for p in patterns.values()):
            found = [patterns.get(kind) for kind in reference.KINDS]
            deltas = [pattern.delta if pattern is not None else None for pattern in found]
            how = self.transposed, self.in_features, self.keeps_input
            plans = [pattern.plan(*how) if pattern is not None else None for pattern in found]
            y = PatternsProduct.apply(x, self.weight, bias, *deltas, self.transposed, *plans)
        else:
            y = dense_product(x, self.weight, bias, self.transposed)
        return y if apart is None else y + apart

    def _apply(self, fn, recurse: bool = True):
        def keep_integers(tensor: Tensor) -> Tensor:  # the permutations
            result = fn(tensor)
            return result if tensor.is_floating_point() or result.dtype == tensor.dtype else tensor.to(result.device)

        dtype = self.weight.dtype
        super()._apply(keep_integers, recurse)
        changes.count += 1
        if self.weight.dtype != dtype:
            self.write_inactive()
            self.write_back()  # base and delta were cast apart: their sum is rounded once again from fp32
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self.write_if_stale()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._permute_entries(destination, prefix, inverse(self.row_permutation), inverse(self.column_permutation))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if self.is_permuted:
            state_dict = dict(state_dict)  # the caller's own stays as it is
            self._permute_entries(state_dict, prefix, self.row_permutation, self.column_permutation)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._loaded(prefix + "weight" in state_dict, state_dict, prefix)

    def _permute_entries(self, entries: dict, prefix: str, rows: Tensor | None, columns: Tensor | None) -> None:
        own = {prefix + "weight": self.weight, prefix + "bias": self.bias}
        permute_entries(entries, own, rows, columns, transposed=self.transposed)

    # -- another order ------------------------------------------------------------------------------------------------

    def inverse_of(self, kind: str) -> Tensor | None:
        """Where each original row (column) is stored, or None where none was moved.

        ValueError where the other side was moved: a pattern's values keep the original order along that one.
        """
        if not can_train(kind, self.row_permutation, self.column_permutation):
            raise ValueError(f"{kind} need the weight's other side in its original order: layer.permute() first")
        permutation = {"rows": self.row_permutation, "columns": self.column_permutation}.get(kind)
        if permutation is None:
            return None
        known = self._inverses.get(kind)
        if known is None or known[0] is not permutation:  # the same tensor each time, by which a pattern knows it
            known = self._inverses[kind] = permutation, permutation.argsort()
        return known[1]

    @torch.no_grad()
    def permute(self, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        """Stores the original's row `rows[i]` (and bias entry) as row i, and its column `columns[j]` as column j.

        `rows` (out,) and `columns` (in,) are permutations; None is the original order. What the weight holds and the
        deltas stay as they are, bit for bit. Raises ValueError where one is no permutation of the layer's features,
        or a pattern of the layer needs its other side in place (`permutation.can_train`).
        """
        for given, length in ((rows, self.out_features), (columns, self.in_features)):
            if given is not None and not torch.equal(given.sort().values.cpu(), torch.arange(length)):
                raise ValueError(f"expected a permutation of 0 … {length - 1}")
        for kind in self.patterns:
            if not can_train(kind, rows, columns):
                raise ValueError(f"a layer that trains {kind} keeps the order of its other side")
        device = self.weight.device
        rows, columns = (given.to(device) if given is not None else None for given in (rows, columns))
        if not self.weight.is_meta:
            old = inverse(self.row_permutation), inverse(self.column_permutation)
            for tensor in (self.weight, self.bias):
                if tensor is not None:
                    with gathered([tensor], changed=True) as (whole,):
                        original = permuted(whole.detach(), *old, transposed=self.transposed)
                        whole.detach().copy_(permuted(original, rows, columns, transposed=self.transposed))
        self.row_permutation, self.column_permutation = rows, columns
        for kind, pattern in self.patterns.items():
            pattern.permute(self.inverse_of(kind))

    @torch.no_grad()
    def _loaded(self, weight: bool, state_dict: dict[str, Any], prefix: str) -> None:
        """A `weight` without deltas is the new base, unless it holds those that came before it, in a file of theirs."""
        deltas = any(f"{prefix}{kind}.delta" in state_dict for kind in self.patterns)
        if weight and not deltas and not self.weight.is_meta:
            loaded = self.weight.detach().clone()
            self.write_inactive()
            self.write_back()
            if not (self._awaits == states_of(self.patterns.values()) and torch.equal(self.weight, loaded)):
                self.weight.copy_(loaded)
                self._take_new_base()
        if weight or deltas:
            self._awaits = () if deltas and not weight else None

    @torch.no_grad()
    def _take_new_base(self) -> None:
        """The weight as it is now (a plain checkpoint's, say) is the base: the deltas start anew."""
        for pattern in self.patterns.values():
            pattern.inactive = None
            pattern.take_base(self.logical_weight)
            pattern.delta.zero_()
            pattern.wrote(pattern.delta)

    def unwrap(self) -> nn.Module:
        """The module that this layer replaced, with its weight and bias in the original order; TypeError where it
        replaced none."""
        original = self.original
        if original is None:
            raise TypeError("a sparse layer that replaced nothing cannot be turned back")
        self.permute()
        original.weight, original.bias = self.weight, self.bias
        original.train(self.training)
        return original

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return text + (", transposed=True" if self.transposed else "")


def _after_load(layer: SparseLinear, keys: Any) -> None:
    """Writes deltas that a state dict brought without their weight: a compiled forward does not look for them."""
    layer.write_if_stale()
    if layer._awaits == ():  # they have just been read
        layer._awaits = states_of(layer.patterns.values())

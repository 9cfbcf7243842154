"""`SparseLinear`: a frozen weight plus small fp32 deltas on patterns of its own entries.

The weight's selected entries always hold *base + delta*, rounded once from fp32, so that the forward pass is the frozen
model's single product. The backward pass computes the dense input gradient, and the weight gradient on the patterns
only (partial back-propagation, S2FT §3.3). A write-back after each optimizer step (torch's global step hook) keeps
weight and deltas together.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparseft.distributed.zero3 import full_shape, gathered, is_sharded
from sparseft.kernels import dispatch, reference
from sparseft.layers.pattern import Pattern, as_index, version_of
from sparseft.layers.reordering import arrange_entries, fits_order, inverse
from sparseft.layers.saved_slices import flat, slice_of
from sparseft.layers.unmerged import add_deltas

_LIVE: weakref.WeakSet[SparseLinear] = weakref.WeakSet()  # every sparse layer there is


class _SparseProduct(torch.autograd.Function):
    """y = x Wᵀ + b with the weight gradient on the patterns only.

    The deltas enter for their gradients' sake: their values are already in the weight.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, transposed, size, rows, rows_delta, columns, columns_delta, blocks, needed,
                position, blocks_delta, slices):  # fmt: skip
        y = _product(x, weight, bias, transposed)
        ctx.bias_dtype = bias.dtype if bias is not None else None
        # Rows and columns are indices, or (start, length) where they are consecutive in the stored weight.
        ctx.run, rows_index = (rows, None) if isinstance(rows, tuple) else (None, rows)
        saved = [weight, rows_index, blocks, position]
        # Rows need all of x, which is shared with the layer's siblings; the others only a slice, in its own storage.
        whole = rows is not None or (blocks is not None and needed is None)
        saved.append(x if whole else None)
        if isinstance(columns, tuple):
            own = {"copy": True, "memory_format": torch.contiguous_format}  # a view would keep all of x alive
            saved.append(reference.select(x, -1, columns).to(y.dtype, **own))
        else:
            saved.append(x.index_select(-1, columns).to(y.dtype) if columns is not None else None)
        if blocks is not None and not whole:
            take = slice_of if slices is None else slices.take
            saved.append(take(x, needed, size, y.dtype))
        else:
            saved.append(None)
        ctx.save_for_backward(*saved)
        ctx.transposed, ctx.size = transposed, size
        return y

    @staticmethod
    @once_differentiable  # a slice's own history is not kept, so a second derivative would be wrong without a word
    def backward(ctx, grad_output):
        weight, rows, blocks, position, x, x_columns, x_blocks = ctx.saved_tensors
        rows = rows if ctx.run is None else ctx.run
        grad_x = bias_grad = rows_grad = columns_grad = blocks_grad = None
        if ctx.needs_input_grad[0]:
            w = weight.to(grad_output.dtype)
            grad_x = grad_output @ (w.t() if ctx.transposed else w)
        grad = flat(grad_output)
        if ctx.needs_input_grad[2]:  # frozen unless the caller thawed it
            bias_grad = grad.sum(0).to(ctx.bias_dtype)
        if x is not None:
            x = flat(x).to(grad.dtype)
        if rows is not None:
            rows_grad = dispatch.rows_gradient(grad, x, rows)
        if x_columns is not None:
            columns_grad = dispatch.columns_gradient(grad, flat(x_columns).to(grad.dtype))
        if blocks is not None:
            x_side, at = (x, blocks[:, 1]) if x_blocks is None else (x_blocks.to(grad.dtype), position)
            blocks_grad = dispatch.blocks_gradient(grad, x_side, blocks[:, 0], at, ctx.size)
        found = (grad_x, None, bias_grad, None, None, None, rows_grad, None, columns_grad)
        return *found, None, None, None, blocks_grad, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if not transposed:
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])  # as Conv1D computes it, so that a fresh attach changes no bit
    y = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return y.view(*x.shape[:-1], weight.shape[1])


class SparseLinear(nn.Module):
    """A linear layer `y = x Wᵀ + b`, W (out, in), that trains fp32 deltas on patterns of its frozen weight.

    Its patterns are child modules named `rows`, `columns` and `blocks`, so that parameters are called
    `<module>.rows.delta` and so on, as in adapter files. Without a pattern it is a frozen linear layer.
    `transposed` layers keep their weight as (in, out), as Conv1D does; indices always mean the logical (out, in).

    Weight and bias may be stored in another order of rows and columns (`layers/reordering.py`): `row_order` (out,) and
    `column_order` (in,) say which original one each stored one is, null that none was moved. Indices and state dicts
    are in the original order always.
    """

    sparseft_linear = True
    weight: nn.Parameter
    row_order: Tensor | None
    column_order: Tensor | None
    keeps_input: bool | None = None  # whether blocks save x itself, not a slice; null: decided for this layer alone
    writes_weight = True  # false: the weight keeps the base and the deltas are added to the product (unmerged.py)

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
        self._original_order()
        self.reset_parameters()
        self._join()

    def _join(self) -> None:
        _LIVE.add(self)
        self.register_load_state_dict_post_hook(_after_load)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _LIVE.add(self)  # copies made by deepcopy and pickle take part in the write-back too

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
        layer.transposed = type(linear).__name__ == "Conv1D"
        rows, columns = full_shape(linear.weight)
        layer.in_features, layer.out_features = (rows, columns) if layer.transposed else (columns, rows)
        layer.weight = linear.weight
        layer.register_parameter("bias", linear.bias)
        layer.writes_weight = not is_sharded(layer.weight)  # base + delta has no place to stay in a shard
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        layer._original = (linear,)
        layer._original_order()
        layer.train(linear.training)
        layer._join()
        return layer

    @staticmethod
    def weight_of(linear: nn.Module) -> Tensor:
        """The logical weight (out, in) of a plain or sparse linear: a view, without gradient."""
        if isinstance(linear, SparseLinear):
            return linear.logical_weight
        weight = linear.weight.detach()
        return weight.t() if type(linear).__name__ == "Conv1D" else weight

    @property
    def original(self) -> nn.Module | None:
        """The module that this layer replaced, if any."""
        return self._original[0] if self._original else None

    @property
    def logical_weight(self) -> Tensor:
        """The weight as (out, in), in the order in which it is stored: a view, without gradient."""
        weight = self.weight.detach()
        return weight.t() if self.transposed else weight

    @property
    def reordered(self) -> bool:
        """Whether the weight is stored in another order than the checkpoint's."""
        return self.row_order is not None or self.column_order is not None

    @property
    def patterns(self) -> dict[str, Pattern]:
        """The patterns in use, by kind."""
        return {kind: self._modules[kind] for kind in reference.KINDS if self._modules.get(kind) is not None}

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
            with gathered([self.weight]):
                pattern = Pattern(kind, as_index(kind, index), self.logical_weight, block_size, self.place_of(kind))
            self.add_module(kind, pattern)
        finally:
            self.write_back()
        return pattern

    @torch.no_grad()
    def install(self, patterns: dict[str, Pattern]) -> dict[str, Pattern]:
        """Puts the base back, takes `patterns` instead of the present ones, writes them, and returns the old."""
        places = {kind: self.place_of(kind) for kind in patterns}
        self.restore_base()
        old = self.patterns
        for kind in old:
            del self._modules[kind]
        with gathered([self.weight] if patterns else []):
            for kind, pattern in patterns.items():
                pattern.put(places[kind])
                pattern.take_base(self.logical_weight)
                self.add_module(kind, pattern)
        self.write_parked()
        self.write_back()
        return old

    @torch.no_grad()
    def restore_base(self) -> None:
        """Writes the base's own values, bit for bit; the deltas stay as they are."""
        if self.weight.is_meta or not self.writes_weight:
            return
        weight = self.logical_weight
        for pattern in self.patterns.values():
            reference.scatter_(weight, pattern.kind, pattern.at, pattern.base_values, pattern.block_size)
            if pattern.parked is not None:
                at, base = pattern.stored(pattern.parked.index), pattern.parked.base.to(weight.device)
                reference.scatter_(weight, pattern.kind, at, base, pattern.block_size)

    @torch.no_grad()
    def write_parked(self) -> None:
        """Writes base + delta of the parked entries: needed only where the weight held the base."""
        weight = self.logical_weight
        for pattern in self.patterns.values():
            if pattern.parked is not None and not weight.is_meta:
                values = (pattern.parked.base + pattern.parked.delta).to(weight)
                at = pattern.stored(pattern.parked.index)
                reference.scatter_(weight, pattern.kind, at, values, pattern.block_size)

    @torch.no_grad()
    def write_back(self) -> None:
        """Writes base + delta into the weight, rounded once from fp32."""
        patterns = list(self.patterns.values())
        if not patterns or self.weight.is_meta or not self.writes_weight:
            return
        weight = self.logical_weight
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
            pattern.written_version = version_of(pattern.delta)

    def _write_if_stale(self) -> None:
        if any(pattern.stale for pattern in self.patterns.values()):
            self.write_back()

    def forward(self, x: Tensor) -> Tensor:  # (…, in) -> (…, out)
        if not torch.compiler.is_compiling():
            self._write_if_stale()  # deltas changed by other means than an optimizer's step
        trains = torch.is_grad_enabled() and any(p.delta.requires_grad for p in self.patterns.values())
        y = self._product_that_trains(x) if trains else _product(x, self.weight, self.bias, self.transposed)
        return y if self.writes_weight else add_deltas(y, x, self.patterns.values())

    def _product_that_trains(self, x: Tensor) -> Tensor:
        rows, columns, blocks = (self._modules.get(kind) for kind in reference.KINDS)
        needed = blocks.columns_needed(self.in_features, self.keeps_input) if blocks is not None else None
        return _SparseProduct.apply(
            x,
            self.weight,
            self.bias,
            self.transposed,
            blocks.block_size if blocks is not None else None,
            rows.at if rows is not None else None,
            rows.delta if rows is not None else None,
            columns.at if columns is not None else None,
            columns.delta if columns is not None else None,
            blocks.index if blocks is not None else None,
            needed[0] if needed is not None else None,
            needed[1] if needed is not None else None,
            blocks.delta if blocks is not None else None,
            blocks.slices if blocks is not None else None,
        )

    def _apply(self, fn, recurse: bool = True):
        dtype = self.weight.dtype
        super()._apply(fn, recurse)
        if self.weight.dtype != dtype:
            self.write_parked()
            self.write_back()  # base and delta were cast apart: their sum is rounded once again from fp32
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self._write_if_stale()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.reordered:
            arrange_entries(self, destination, prefix, stored=False)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if self.reordered:
            state_dict = dict(state_dict)  # the caller's own stays as it is
            arrange_entries(self, state_dict, prefix, stored=True)
        super()._load_from_state_dict(state_dict, prefix, *args)
        plain = prefix + "weight" in state_dict and not any(
            f"{prefix}{kind}.delta" in state_dict for kind in self.patterns
        )
        if plain:
            self._take_new_base()

    def place_of(self, kind: str) -> Tensor | None:
        """Where each original row (column) is stored, or null where none was moved.

        ValueError where the other side was moved: a pattern's values keep the original order along that one.
        """
        if not fits_order(kind, self.row_order, self.column_order):
            raise ValueError(f"{kind} need the weight's other side in its original order: reorder(layer) first")
        return inverse({"rows": self.row_order, "columns": self.column_order}.get(kind))

    def _original_order(self) -> None:
        """No order yet. The buffers move with the layer; checkpoints, in the original order, do not hold them."""
        self.register_buffer("row_order", None, persistent=False)
        self.register_buffer("column_order", None, persistent=False)

    @torch.no_grad()
    def _take_new_base(self) -> None:
        """The weight as it is now (a plain checkpoint's, say) is the base: the deltas start anew."""
        for pattern in self.patterns.values():
            pattern.parked = None
            pattern.take_base(self.logical_weight)
            pattern.delta.zero_()
            pattern.written_version = version_of(pattern.delta)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return text + (", transposed=True" if self.transposed else "")


def write_back(layers: Iterable[SparseLinear]) -> None:
    """Writes every layer's base + delta into its weight."""
    for layer in layers:
        layer.write_back()


def _after_load(layer: SparseLinear, keys: Any) -> None:
    """Writes deltas that a state dict brought without their weight: a compiled forward does not look for them."""
    layer._write_if_stale()


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """torch's global step hook: writes the layers whose deltas this optimizer holds."""
    if not _LIVE or getattr(optimizer, "writes_weights", False):  # SparseAdamW has written them itself
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    write_back(layer for layer in list(_LIVE) if any(id(pattern.delta) in held for pattern in layer.patterns.values()))


register_optimizer_step_post_hook(_after_step)

"""A batch in which each row has an adapter of its own: what the deltas make of each row is added to the base's product.

The weights hold the base. The deltas of several adapters that have one shape are multiplied together, so that the work
on the host does not grow with the number of adapters, and none of it with the size of the weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sparseft.errors import RunError
from sparseft.layers.pattern import block_runs
from sparseft.layers.permutation import inverse


class Content(Protocol):
    """One adapter's deltas of one kind on one weight, in the checkpoint's order."""

    @property
    def index(self) -> Tensor: ...
    @property
    def delta(self) -> Tensor: ...
    @property
    def block_size(self) -> int | None: ...


class Matrices(NamedTuple):
    """`count` dense parts of a delta: matrix (count, k, m) takes the features `inputs` (count, k) to `outputs`
    (count, m); None: all of them, in the order in which they are stored. Those of one adapter have no output twice."""

    inputs: Tensor | None
    outputs: Tensor | None
    matrix: Tensor


@dataclass
class Part:
    """Matrices of one shape, each for as many rows of the batch, `rows` (count, c); no row and output is in it twice.

    `all_rows`: they are those of the whole batch, in its order.
    """

    rows: Tensor
    inputs: Tensor | None
    outputs: Tensor | None
    matrix: Tensor
    all_rows: bool

    def add_(self, y: Tensor, x: Tensor) -> None:
        """Adds what the matrices make of x (rows, tokens, in) to y (rows, tokens, out), in place."""
        count, each = self.rows.shape
        tokens = x.shape[1]
        if self.inputs is None:
            taken = x if self.all_rows else x.index_select(0, self.rows.view(-1))
        else:
            taken = x.transpose(1, 2)[self.rows[:, :, None], self.inputs[:, None, :]].transpose(2, 3)
        taken = taken.reshape(count, each * tokens, self.matrix.shape[1])
        if self.outputs is None and self.all_rows:
            y.view(count, each * tokens, y.shape[2]).baddbmm_(taken, self.matrix)
            return
        made = torch.bmm(taken, self.matrix)
        if self.outputs is None:
            y.index_add_(0, self.rows.view(-1), made.view(count * each, tokens, y.shape[2]))
            return
        features, where = y.transpose(1, 2), (self.rows[:, :, None], self.outputs[:, None, :])
        features[where] = features[where] + made.view(count, each, tokens, made.shape[2]).transpose(2, 3)


class Made(NamedTuple):
    """What parts are made for: the adapter of each row, the product's device and dtype, the order of the weight."""

    choice: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    rows: Tensor | None
    columns: Tensor | None

    def same(self, other: Made) -> bool:
        return self[:3] == other[:3] and self.rows is other.rows and self.columns is other.columns


class ByRow:
    """What several adapters add to one linear's product.

    Args:
        shape: (out, in) of the weight.
        adapters: By number, the kinds of deltas that each has on the weight; it may have none.
    """

    def __init__(self, shape: tuple[int, int], adapters: Mapping[int, Mapping[str, Content]]) -> None:
        self.shape, self.adapters = shape, adapters
        # The parts of the last call and what they were made for, as one value: threads may call at the same time.
        self._made: tuple[Made, list[Part]] | None = None

    def add(self, y: Tensor, x: Tensor, choice: tuple[int, ...], layer: nn.Module) -> Tensor:
        """y (…, out), the base's product of x (…, in), with the deltas of adapter `choice[r]` added to each row r of
        the batch, in place where that can be. `layer` is the linear, sparse or not.

        x is (rows, tokens, in), or has the tokens of all rows one after another. Differentiable in y and x.
        RunError where it has another number of rows.
        """
        if x.dim() < 2 or x.shape[0] % len(choice) or (x.dim() != 2 and x.shape[0] != len(choice)):
            raise RunError(
                f"a linear was given an input of shape {tuple(x.shape)}, which are no {len(choice)} rows, so that each "
                "could have its own adapter: use one adapter at a time with this model."
            )
        y = y if y.is_contiguous() else y.contiguous()
        tokens = y.numel() // (len(choice) * y.shape[-1])
        rows_of_y = y.view(len(choice), tokens, y.shape[-1])
        rows_of_x = x.reshape(len(choice), tokens, x.shape[-1])
        if x.dtype != y.dtype:
            rows_of_x = rows_of_x.to(y.dtype)
        wanted = Made(
            choice,
            y.device,
            y.dtype,
            getattr(layer, "row_permutation", None),
            getattr(layer, "column_permutation", None),
        )
        made = self._made
        if made is None or not made[0].same(wanted):
            made = self._made = wanted, self._make(wanted)
        for part in made[1]:
            part.add_(rows_of_y, rows_of_x)
        return y

    @torch.inference_mode(False)
    @torch.no_grad()
    def _make(self, wanted: Made) -> list[Part]:
        choice, device, dtype, row_order, column_order = wanted
        groups: dict[tuple[object, ...], list[tuple[list[int], Matrices]]] = defaultdict(list)
        rows_of: dict[int, list[int]] = defaultdict(list)
        for row, number in enumerate(choice):
            rows_of[number].append(row)
        for number, rows in rows_of.items():
            for kind, content in self.adapters.get(number, {}).items():
                for made in matrices(kind, content, self.shape, row_order, column_order):
                    key = made.inputs is None, made.outputs is None, made.matrix.shape[1:], len(rows)
                    groups[key].append((rows, made))
        parts = []
        for members in groups.values():
            rows = torch.cat([torch.tensor(own).expand(len(made.matrix), -1) for own, made in members])
            inputs, outputs = (
                None if any(part is None for part in side) else torch.cat([*side]).to(device)
                for side in ([made.inputs for _, made in members], [made.outputs for _, made in members])
            )
            matrix = torch.cat([made.matrix.to(device, dtype, non_blocking=True) for _, made in members])
            whole = rows.numel() == len(choice) and torch.equal(rows.view(-1), torch.arange(len(choice)))
            parts.append(Part(rows.to(device), inputs, outputs, matrix.contiguous(), whole))
        return parts


def matrices(
    kind: str, content: Content, shape: tuple[int, int], row_order: Tensor | None, column_order: Tensor | None
) -> Sequence[Matrices]:
    """An adapter's deltas of one kind as dense matrices, for a weight of `shape` (out, in) that is stored with its rows
    and columns permuted, or not (None)."""
    index, delta = content.index.cpu(), content.delta.detach()
    row_place, column_place = (None if order is None else inverse(order.cpu()) for order in (row_order, column_order))

    def stored(features: Tensor, place: Tensor | None) -> Tensor:
        return features if place is None else place[features]

    if kind == "rows":
        whole = delta if column_order is None else delta.index_select(1, column_order.to(delta.device))
        return [Matrices(None, stored(index, row_place)[None], whole.t()[None])]
    if kind == "columns":
        whole = delta if row_order is None else delta.index_select(0, row_order.to(delta.device))
        return [Matrices(stored(index, column_place)[None], None, whole.t()[None])]
    size = content.block_size
    assert size is not None
    within, found = torch.arange(size), []
    for block_rows, members in block_runs(index[:, 0]):
        inputs = (index[members, 1][:, :, None] * size + within).flatten(1)  # (block rows, m·B)
        matrix = delta[members.to(delta.device)].transpose(2, 3).flatten(1, 2)
        outside = inputs >= shape[1]
        if outside.any():  # of a block at the edge
            inputs = inputs.masked_fill(outside, 0)
            matrix = matrix.masked_fill(outside[:, :, None].to(matrix.device), 0)
        outputs = block_rows[:, None] * size + within
        whole_rows = outputs[:, -1] < shape[0]
        for chosen, width in ((whole_rows, size), (~whole_rows, shape[0] % size)):
            if chosen.any():
                own = outputs[chosen, :width]
                picked = matrix[chosen.to(matrix.device), :, :width]
                found.append(Matrices(stored(inputs[chosen], column_place), stored(own, row_place), picked))
    return found

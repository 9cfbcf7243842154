"""A batch in which each row has an adapter of its own: what the deltas make of each row is added to the base's product.

The weights hold the base. The deltas of several adapters that have one shape are multiplied together, so that the work
on the host does not grow with the number of adapters, and none of it with the size of the weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sparseft.errors import RunError
from sparseft.kernels import grid
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


class Features(NamedTuple):
    """Features of an activation: runs of `width`, run i being those from i · width on. `runs` (count, n)."""

    runs: Tensor
    width: int


class Matrices(NamedTuple):
    """`count` dense parts of a delta: matrix (count, k, m) takes the k features `inputs` to the m features `outputs`;
    None: all of them, in the order in which they are stored. Those of one adapter and kind have no output twice."""

    inputs: Features | None
    outputs: Features | None
    matrix: Tensor


class Part:
    """Matrices of one shape, each for as many rows of the batch.

    Args:
        rows: (count, c) the rows of each; no row and output is in it twice.
        inputs, outputs, matrix: As of `Matrices`.
        all_rows: Whether the rows are those of the whole batch, in its order.
    """

    def __init__(
        self, rows: Tensor, inputs: Features | None, outputs: Features | None, matrix: Tensor, all_rows: bool
    ) -> None:
        self.rows, self.inputs, self.outputs, self.matrix, self.all_rows = rows, inputs, outputs, matrix, all_rows
        self._places: dict[tuple[int, int, int], Tensor] = {}  # of runs, for the last number of tokens

    def add_(self, y: Tensor, x: Tensor) -> None:
        """Adds what the matrices make of x (rows, tokens, in) to y (rows, tokens, out), in place."""
        count, each = self.rows.shape
        tokens = x.shape[1]
        if self.inputs is not None:
            taken = self._take(x, self.inputs)
        else:
            taken = x if self.all_rows else x.index_select(0, self.rows.view(-1))
        taken = taken.reshape(count, each * tokens, self.matrix.shape[1])
        if self.outputs is None and self.all_rows:
            y.view(count, each * tokens, y.shape[2]).baddbmm_(taken, self.matrix)
            return
        made = torch.bmm(taken, self.matrix)
        if self.outputs is None:
            y.index_add_(0, self.rows.view(-1), made.view(count * each, tokens, y.shape[2]))
        else:
            self._add_(y, made.view(count, each, tokens, made.shape[2]), self.outputs)

    def _take(self, x: Tensor, features: Features) -> Tensor:
        """Each matrix's features of its rows: (count, c, tokens, k)."""
        if features.width == 1:
            return x.transpose(1, 2)[self._single(features)].transpose(2, 3)
        return x.reshape(-1, features.width).index_select(0, self._place(x, features))

    def _add_(self, y: Tensor, made: Tensor, features: Features) -> None:
        if features.width == 1:
            by_feature, where = y.transpose(1, 2), self._single(features)
            by_feature[where] = by_feature[where] + made.transpose(2, 3)
        else:
            runs, where = y.view(-1, features.width), self._place(y, features)
            runs.index_copy_(0, where, runs.index_select(0, where) + made.reshape(-1, features.width))

    def _single(self, features: Features) -> tuple[Tensor, Tensor]:
        return self.rows[:, :, None], features.runs[:, None, :]

    def _place(self, activation: Tensor, features: Features) -> Tensor:
        """Where the runs lie among all runs of an activation (rows, tokens, …)."""
        tokens, runs = activation.shape[1], activation.shape[2] // features.width
        key = id(features), tokens, runs
        place = self._places.get(key)
        if place is None:
            with torch.inference_mode(False):
                every = self.rows[:, :, None] * tokens + torch.arange(tokens, device=self.rows.device)
                place = (every[..., None] * runs + features.runs[:, None, None, :]).view(-1)
            self._places = {known: old for known, old in self._places.items() if known[1] == tokens} | {key: place}
        return place


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

    def add(self, y: Tensor, x: Tensor, choice: tuple[int, ...], tokens: int, layer: nn.Module) -> Tensor:
        """y (…, out), the base's product of x (…, in), with the deltas of adapter `choice[r]` added to each row r of
        the batch, in place where that can be. `layer` is the linear, sparse or not.

        x is (rows, `tokens`, in), or (rows · tokens, in). Differentiable in y and x. RunError where it has another
        shape.
        """
        rows = len(choice)
        if x.shape[:-1] not in ((rows, tokens), (rows * tokens,)):
            raise RunError(
                f"a linear was given an input of shape {tuple(x.shape)}, which are no {rows} rows of {tokens} tokens, "
                "so that each could have its own adapter: use one adapter at a time with this model."
            )
        y = y if y.is_contiguous() else y.contiguous()
        rows_of_y, rows_of_x = y.view(rows, tokens, y.shape[-1]), x.reshape(rows, tokens, x.shape[-1])
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
                    sides = [side and (side.width, side.runs.shape[1]) for side in made[:2]]
                    groups[(kind, *sides, made.matrix.shape[1:], len(rows))].append((rows, made))
        parts = []
        for members in groups.values():
            rows = torch.cat([torch.tensor(own).expand(len(made.matrix), -1) for own, made in members])
            inputs, outputs = (_joined([made[side] for _, made in members], device) for side in range(2))
            matrix = torch.cat([made.matrix.to(device, dtype, non_blocking=True) for _, made in members])
            whole = rows.numel() == len(choice) and torch.equal(rows.view(-1), torch.arange(len(choice)))
            parts.append(Part(rows.to(device), inputs, outputs, matrix.contiguous(), whole))
        return parts


def _joined(features: Sequence[Any], device: torch.device) -> Features | None:
    """Those of several matrices, all of one width."""
    if features[0] is None:
        return None
    return Features(torch.cat([each.runs for each in features]).to(device), features[0].width)


def matrices(
    kind: str, content: Content, shape: tuple[int, int], row_order: Tensor | None, column_order: Tensor | None
) -> Sequence[Matrices]:
    """An adapter's deltas of one kind as dense matrices, for a weight of `shape` (out, in) that is stored with its rows
    and columns permuted, or not (None)."""
    index, delta = content.index.cpu(), content.delta.detach()
    row_place, column_place = (None if order is None else inverse(order.cpu()) for order in (row_order, column_order))

    def stored(features: Tensor, place: Tensor | None) -> Features:
        return Features(features if place is None else place[features], 1)

    if kind == "rows":
        whole = delta if column_order is None else delta.index_select(1, column_order.to(delta.device))
        return [Matrices(None, stored(index[None], row_place), whole.t()[None])]
    if kind == "columns":
        whole = delta if row_order is None else delta.index_select(0, row_order.to(delta.device))
        return [Matrices(stored(index[None], column_place), None, whole.t()[None])]
    if kind == "grid":
        return [
            Matrices(stored(columns.cpu()[None], column_place), stored(rows.cpu()[None], row_place), matrix.t()[None])
            for rows, columns, matrix in grid.matrices(index, delta)
        ]
    size = content.block_size
    assert size is not None
    within, found = torch.arange(size), []
    for block_rows, members in block_runs(index[:, 0]):
        columns = index[members, 1]  # (block rows, blocks in each)
        matrix = delta[members.to(delta.device)].transpose(2, 3).flatten(1, 2)
        inputs = Features(columns, size)
        if shape[1] % size or column_place is not None:
            features = (columns[:, :, None] * size + within).flatten(1)
            outside = features >= shape[1]  # of a block at the edge
            matrix = matrix.masked_fill(outside[:, :, None].to(matrix.device), 0)
            inputs = stored(features.masked_fill(outside, 0), column_place)
        if not shape[0] % size and row_place is None:
            found.append(Matrices(inputs, Features(block_rows[:, None], size), matrix))
            continue
        features = block_rows[:, None] * size + within
        whole_rows = features[:, -1] < shape[0]
        for chosen, width in ((whole_rows, size), (~whole_rows, shape[0] % size)):
            if chosen.any():
                outputs = stored(features[chosen, :width], row_place)
                own = Features(inputs.runs[chosen], inputs.width)
                found.append(Matrices(own, outputs, matrix[chosen.to(matrix.device), :, :width]))
    return found

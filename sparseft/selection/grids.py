"""Which rows and columns of one weight make the grid with the largest sum of scores, nearly.

The best grid is hard to find (a heaviest biclique); LoSiA (arXiv 2507.04487, §3.1) takes the best of three greedy ones:
rows by their sums and columns by theirs over these rows; columns first; and both by their sums over the whole weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseft.errors import RunError
from sparseft.kernels.grid import encode
from sparseft.selection.ranking import rank_units


def chosen_grid(scores: Tensor, size: tuple[int, int], order: str, generator: torch.Generator) -> Tensor:
    """The index of the grid of `size` (rows, columns) that `method.order` keeps by `scores` (out, in)."""
    if order == "sampled":
        return drawn_grid(scores, size, generator)
    return best_grid(scores if order == "largest" else -scores, size)


def best_grid(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The index (`kernels/grid.py`) of the grid of `size` (rows, columns) with the largest sum of `scores` (out, in)
    among the three greedy ones; ties go to lower indices, and to the first of these in the order above.

    Sums are taken on the device of the scores in their dtype. RunError where a score is not finite.
    """
    if not scores.isfinite().all():
        raise RunError("an importance score is not finite: the model's weights or activations overflow.")
    height, width = size
    down, across = scores.sum(1), scores.sum(0)
    rows, columns = _most(down, height), _most(across, width)
    grids = [
        (rows, _most(scores[rows].sum(0), width)),
        (_most(scores[:, columns].sum(1), height), columns),
        (rows, columns),
    ]
    sums = torch.stack([scores[rows][:, columns].sum() for rows, columns in grids])
    rows, columns = grids[int(sums.argmax())]
    return encode(rows.sort().values.cpu(), columns.sort().values.cpu())


def drawn_grid(scores: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A grid drawn in proportion to `scores` (out, in), none negative: rows by their sums, and of the columns by theirs
    over these rows, one after another without replacement. Scores of 0 come last, in random order."""
    height, width = size
    rows = _drawn(scores.sum(1), height, generator)
    return encode(rows, _drawn(scores[rows.to(scores.device)].sum(0), width, generator))


def random_grid(keys: Tensor, shape: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A grid by random numbers `keys` (out + in,), one for each feature of a weight of `shape`."""
    sides = keys.split(shape)
    return encode(*(_most(side, count).sort().values.cpu() for side, count in zip(sides, size, strict=True)))


def _most(sums: Tensor, count: int) -> Tensor:
    return sums.argsort(descending=True, stable=True)[:count]


def _drawn(sums: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return rank_units(sums, "sampled", generator)[:count].sort().values

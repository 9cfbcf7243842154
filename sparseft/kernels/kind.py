"""`Kind`: what one kind of pattern is, which entries of a weight its index names, and in which order it has them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sparseft.errors import UserError

Run = tuple[int, int]  # (start, length): consecutive rows or columns, which a view reaches without an index
Shape = tuple[int, int]  # of a logical weight: (out, in)


class Kind:
    """One kind of pattern of a logical weight (out, in): a class in a file of its own, listed in `kernels/kinds.py`.

    `index` is an int64 tensor in a form of its own, `at` where the entries lie in the weight as it is stored: an index,
    or what the kind has made of one. Values (deltas, base values, gradients) count entries along dimension `dim`.
    `size` is the block size, None of what has none.
    """

    name: ClassVar[str]
    dim: ClassVar[int] = 0

    def index(self, given: Any) -> Tensor:
        """The caller's indices as a tensor; `UserError` where they are no numbers."""
        try:  # on the CPU also where `torch.device` sets another: a list under the meta device would lose its numbers
            return given if isinstance(given, Tensor) else torch.as_tensor(given, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.name} cannot be read as indices ({error}).") from None

    def check(self, index: Tensor, shape: Shape, size: int | None) -> None:
        """`UserError` where an index has the wrong shape, repeats, or lies outside a weight of `shape`."""
        raise NotImplementedError

    def values_shape(self, index: Tensor, shape: Shape, size: int | None) -> tuple[int, ...]:
        """The shape of the values."""
        raise NotImplementedError

    def entries(self, index: Tensor, shape: Shape, size: int | None) -> int:
        """How many entries of the weight an index covers."""
        raise NotImplementedError

    def gather(self, weight: Tensor, at: Any, size: int | None) -> Tensor:
        """A copy of the entries, in the weight's dtype."""
        raise NotImplementedError

    def scatter_(self, weight: Tensor, at: Any, values: Tensor, size: int | None) -> None:
        """Writes the entries in place; `values` in the weight's dtype."""
        raise NotImplementedError

    def keys(self, index: Tensor) -> Tensor:
        """One int64 number for each place along `dim`, on the CPU, by which two indices compare."""
        return index.cpu()

    def of_keys(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """What `keys` undoes: the index of distinct keys (n,), and in which order they come in it (n,)."""
        return keys, torch.arange(len(keys))

    def unit_of(self, index: Tensor) -> Tensor | None:
        """Of what is counted along `dim`, the unit that each belongs to, from 0; None: each is a unit."""
        return None

    def rectangles(self, index: Tensor, shape: Shape, size: int | None) -> Tensor:
        """The entries as rectangles (n, 4): top, bottom, left, right (ends excluded), not cut off at the weight's
        sides."""
        raise NotImplementedError

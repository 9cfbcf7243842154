"""What layers of blocks save of their input: the column blocks they need, once for all layers that read one input."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from sparseft.kernels import reference


def flat(x: Tensor) -> Tensor:
    """(..., features) as (tokens, features); no -1, which nothing says where there is no feature."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def slice_of(
    x: Tensor,  # (..., in)
    needed: Tensor,  # (k,) block columns
    size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The needed column blocks of x, in storage of their own: (tokens, k · size)."""
    return reference.to_blocks(flat(x), size).index_select(1, needed).flatten(1).to(dtype)


class SharedSlice:
    """One slice for all layers of blocks that are given the very same input: the first makes it, the others take it.

    Neither the input nor the slice is kept alive by this: graphs that have saved the slice do that.

    Args:
        columns: block columns that any of the layers needs, ascending, on the CPU.
    """

    def __init__(self, columns: Tensor) -> None:
        self.columns = columns
        # The input, its version, and the slice, as one value: threads may call the layers at the same time.
        self._last: tuple[weakref.ref[Tensor], int, weakref.ref[Tensor]] | None = None

    def take(self, x: Tensor, needed: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """As `slice_of`, with `needed` being `columns` on the device of x."""
        if torch.compiler.is_compiling():  # the compiler finds by itself what is computed twice
            return slice_of(x, needed, size, dtype)
        if x.is_inference():  # it keeps no count of its changes
            return slice_of(x, needed, size, dtype)
        if (last := self._last) is not None and last[0]() is x and last[1] == x._version:
            known = last[2]()
            if known is not None and known.dtype == dtype:
                return known
        version = x._version
        made = slice_of(x, needed, size, dtype)
        self._last = weakref.ref(x), version, weakref.ref(made)
        return made

    def __reduce__(self) -> Any:
        return SharedSlice, (self.columns,)  # copies share among themselves, and begin with no slice

"""Counting the matrix products that run."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product")  # how their names begin


class Products(TorchDispatchMode):
    """Counts matrix products, attention's too, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(PRODUCTS):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))

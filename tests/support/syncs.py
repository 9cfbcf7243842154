"""What makes the host wait for the device, or allocate by what the device holds: seen on a CPU, where nothing waits."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that copy a value to the host, or whose result's size is one.
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"}
SIZED = {"nonzero", "nonzero_numpy", "argwhere", "masked_select", "bincount", "unique_dim", "unique_consecutive"}
SIZED |= {"_unique", "_unique2", "unique_dim_consecutive", "masked_scatter", "combinations"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# Of Python's, those that no operator shows.
SPOKEN = {"tolist", "numpy", "__array__", "cpu", "__reduce_ex__"}


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Inside, torch raises where the host would wait for a GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Audit(TorchDispatchMode):
    """Notes, while it is on, each operation that would make the host wait for a GPU, with who asked for it.

    These are: reading a number of the device (`.item()`, `bool(t)`, `float(t)`, `.tolist()`, `.numpy()`, `.cpu()`,
    `.to("cpu")`, `torch.equal`), results as large as the values say (`nonzero`, `masked_select`, `unique`, indexing by
    booleans, `repeat_interleave` without a size), and tensors made of the host's numbers (`torch.tensor(…)`), which are
    copied from memory that the device cannot read by itself. A CUDA graph can capture none of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._words = _Words(self)
        self._within = contextlib.ExitStack()
        self._suspended = True

    def start(self) -> None:
        self._suspended = False
        self._within.enter_context(self)
        self._within.enter_context(self._words)

    def stop(self) -> None:
        self._suspended = True
        self._within.close()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, it is the host's own business: data that no device has seen, copies that have arrived."""
        before, self._suspended = self._suspended, True
        try:
            yield
        finally:
            self._suspended = before

    def note(self, what: str) -> None:
        if self._suspended:
            return
        own = [
            f for f in traceback.extract_stack() if "/torch/" not in f.filename and "support/syncs" not in f.filename
        ]
        at = own[-1] if own else None
        path = "/".join(at.filename.split("/")[-2:]) if at else "?"
        self.found.append(f"{what} in {path}:{at.name if at else '?'}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in READS | SIZED:
            self.note(name)
        elif name in INDEXED and any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            self.note(f"{name} by booleans")
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.note("repeat_interleave without a size")
        elif name in ("lift_fresh", "lift", "lift_fresh_copy"):
            self.note("a tensor made of the host's numbers")
        return func(*args, **kwargs)


class _Words(TorchFunctionMode):
    def __init__(self, audit: Audit) -> None:
        super().__init__()
        self.audit = audit

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in SPOKEN:
            self.audit.note(f".{name}()")
        elif name == "to" and "cpu" in (*args[1:], (kwargs or {}).get("device")):  # spelt out: not another's device
            self.audit.note(".to('cpu')")
        return func(*args, **(kwargs or {}))

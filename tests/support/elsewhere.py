"""A device that is not the CPU, on any machine: what mixes tensors of two devices fails there as on a GPU.

`elsewhere:0` is torch's device for backends of others (PrivateUse1). A tensor there holds one of the CPU, so that the
results are its, and refuses what CUDA would: another operand on the CPU (but for single numbers and indices), numpy.
Importing this module makes it, for the whole process: use it in one of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
NAME = "elsewhere"


class TwoDevices(RuntimeError):
    """An operation was given tensors of the CPU and of elsewhere."""


class Backend:
    """What torch asks the module of a device, `torch.elsewhere`."""

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def get_rng_state(device: Any = 0) -> Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: Tensor, device: Any = 0) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None: ...


class Elsewhere(Tensor):
    """A tensor that lies elsewhere."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Elsewhere) -> None:
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner

    def tolist(self) -> list[Any]:
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert a tensor on {NAME} to numpy; use .cpu() first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def storage(self) -> Any:
        return self.inner.storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.__reduce_ex__(protocol)  # files are read to the CPU

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = there(self.inner.detach().clone())
            copied.__dict__.update({name: value for name, value in self.__dict__.items() if name != "inner"})
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __repr__(self) -> str:
        return f"Elsewhere({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, dict(kwargs or {}))


_setup_privateuseone_for_python_backend(NAME, backend_module=Backend)
DEVICE = torch.device(NAME, 0)


def there(tensor: Tensor) -> Tensor:
    """A tensor of the CPU, elsewhere (the same memory)."""
    return Elsewhere(tensor)


def here(tensor: Tensor) -> Tensor:
    """Of a tensor elsewhere that of the CPU which it holds; any other as it is."""
    return tensor.inner if isinstance(tensor, Elsewhere) else tensor


# CUDA takes indices from the CPU in these, and copies between devices
TAKES_BOTH = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is aten.copy_.default:
        here(args[0]).copy_(here(args[1]))
        return args[0]
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    device = kwargs.get("device")
    if func is aten._to_copy.default:
        goes = torch.device(device) if device is not None else tensors[0].device
        how = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
        made = func(here(args[0]), device="cpu", **how)
        return there(made) if goes.type == NAME else made
    far = [value for value in tensors if isinstance(value, Elsewhere)]
    near = [value for value in tensors if not isinstance(value, Elsewhere) and value.dim() > 0]
    if near and func not in TAKES_BOTH:
        shapes = [[tuple(value.shape) for value in of] for of in (far, near)]
        raise TwoDevices(f"{func}: tensors elsewhere {shapes[0]}, on the CPU {shapes[1]}")
    if func is aten.histc.default and not args[0].is_floating_point():  # a CPU counts no whole numbers
        return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    stays = torch.device(device).type != NAME if device is not None else not far
    if device is not None:
        kwargs["device"] = "cpu"
    made = func(*tree_map_only(Elsewhere, here, args), **tree_map_only(Elsewhere, here, kwargs))
    if stays:
        return made
    known = {id(here(value)): value for value in tensors}  # what is changed in place stays the tensor that it is

    def placed(value: Tensor) -> Tensor:
        found = known.get(id(value))
        assert found is None or found.shape == value.shape, f"{func} gave a tensor elsewhere another size"
        return there(value) if found is None else found

    return tree_map_only(Tensor, placed, made)


_library = torch.library.Library("aten", "IMPL")


def _makes(name: str, function: Any) -> None:
    def made(*args: Any, device: Any = None, pin_memory: Any = None, layout: Any = None, **options: Any) -> Tensor:
        return there(function(*args, **options))

    _library.impl(name, made, "PrivateUse1")


def _empty(size: Any, dtype: Any = None, memory_format: Any = None) -> Tensor:
    return torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format)


def _copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    here(to).copy_(here(source))
    return to


_makes("empty.memory_format", _empty)
_makes("empty_strided", torch.empty_strided)
for name in ("arange", "arange.start", "arange.start_step"):
    _makes(name, torch.arange)
for name in ("eye", "eye.m"):
    _makes(name, torch.eye)
_makes("tril_indices", torch.tril_indices)
_makes("triu_indices", torch.triu_indices)
_library.impl("_copy_from", _copy_from, "PrivateUse1")

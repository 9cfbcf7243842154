"""Which way the sparse arithmetic is computed: by Triton kernels on CUDA, in plain torch elsewhere.

The environment variable SPARSEFT_KERNELS says otherwise: `auto` (the default), `triton`, or `reference` (plain torch
everywhere). triton is imported when its first kernel is needed, so this works where it is not installed.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch
from torch import Tensor

from sparseft.errors import UserError, nearest
from sparseft.kernels import reference
from sparseft.kernels.grid import Grids

VARIABLE = "SPARSEFT_KERNELS"
CHOICES = ("auto", "triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The first GPUs (compute capability) that Triton's products know; bf16 came one generation later.
FIRST_GPU, FIRST_GPU_BF16 = (7, 0), (8, 0)


def mode() -> str:
    """What SPARSEFT_KERNELS asks for; a `UserError` names the choices where it is none of them."""
    value = os.environ.get(VARIABLE) or "auto"
    if value not in CHOICES:
        raise UserError(f"{VARIABLE}={value}: expected one of {', '.join(CHOICES)}.{nearest(value, CHOICES)}")
    return value


@functools.cache
def _blocks_triton() -> ModuleType | None:
    """The kernel's module, or None where triton cannot be imported."""
    try:
        from sparseft.kernels import blocks_triton
    except ImportError:
        return None
    return blocks_triton


def kernel_for(tensor: Tensor) -> ModuleType | None:
    """The module of the Triton kernel that computes with tensors like this one; None: plain torch does.

    float64 is always computed in plain torch. A `UserError` where SPARSEFT_KERNELS=triton cannot be had.
    """
    wanted = mode()
    if wanted == "reference" or tensor.dtype not in KERNEL_DTYPES:
        return None
    if wanted == "auto":
        return _blocks_triton() if tensor.is_cuda and gpu_knows(tensor.device, tensor.dtype) else None
    module = _blocks_triton()
    if module is None:
        raise UserError(f"{VARIABLE}=triton: triton cannot be imported; install it, or choose auto or reference.")
    if not tensor.is_cuda and not (tensor.device.type == "cpu" and module.INTERPRETED):
        raise UserError(
            f"{VARIABLE}=triton: kernels need CUDA tensors, these are on '{tensor.device.type}'; choose auto or "
            "reference, or set TRITON_INTERPRET=1 to run them in Triton's interpreter on the CPU."
        )
    return module


@functools.cache  # asking the device takes as long as a small product
def gpu_knows(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton has code for this GPU and numbers of this dtype; what is no CUDA device it is not asked about."""
    if torch.version.hip or device.type != "cuda":
        return True
    first = FIRST_GPU_BF16 if dtype == torch.bfloat16 else FIRST_GPU
    return torch.cuda.get_device_capability(device) >= first


def blocks_gradient(grad_output: Tensor, x: Tensor, block_rows: Tensor, block_columns: Tensor, size: int) -> Tensor:
    """dW of the blocks (n, B, B) in fp32, from grad_output (tokens, out) and x (tokens, in), which share a dtype.

    Block b is `grad_output[:, block_rows[b]]ᵀ x[:, block_columns[b]]`; columns may count within a slice of x. The part
    of an edge block outside the operands is zero.
    """
    if torch.compiler.is_compiling():  # one operator to the compiler: what is inside depends on indices' values
        return torch.ops.sparseft.blocks_gradient(grad_output, x, block_rows, block_columns, size)
    return _blocks_gradient(grad_output, x, block_rows, block_columns, size)


def _blocks_gradient(grad_output: Tensor, x: Tensor, block_rows: Tensor, block_columns: Tensor, size: int) -> Tensor:
    kernel = kernel_for(x)
    if kernel is not None:
        return kernel.blocks_gradient(grad_output, x, block_rows, block_columns, size)
    return reference.blocks_gradient(grad_output, x, block_rows, block_columns, size).float()


@torch.library.custom_op("sparseft::blocks_gradient", mutates_args=())
def _blocks_gradient_op(grad_output: Tensor, x: Tensor, block_rows: Tensor, block_columns: Tensor, size: int) -> Tensor:
    return _blocks_gradient(grad_output, x, block_rows, block_columns, size)


@_blocks_gradient_op.register_fake
def _(grad_output: Tensor, x: Tensor, block_rows: Tensor, block_columns: Tensor, size: int) -> Tensor:
    return x.new_empty(block_rows.shape[0], size, size, dtype=torch.float32)


def rows_gradient(grad_output: Tensor, x: Tensor, rows: Tensor | reference.Run) -> Tensor:
    """dW[rows, :] (k, in), summed and kept in fp32, from grad_output (tokens, out) and x (tokens, in) of one dtype."""
    return _token_product(reference.select(grad_output, 1, rows), x)


def columns_gradient(grad_output: Tensor, x_columns: Tensor) -> Tensor:
    """dW[:, columns] (out, k), summed and kept in fp32, from grad_output (tokens, out) and x[:, columns] (tokens, k) of
    one dtype."""
    return _token_product(grad_output, x_columns)


def grid_gradient(grad_output: Tensor, x_columns: Tensor, grids: Grids) -> Tensor:
    """dW of the grids (entries,), summed and kept in fp32, from grad_output (tokens, out) and the columns of x that
    they need (tokens, count), of one dtype."""
    found = []
    for (rows, _), within in zip(grids.parts, grids.within, strict=True):
        own = x_columns if within is None else x_columns.index_select(1, within)
        found.append(_token_product(grad_output.index_select(1, rows), own).flatten())
    return found[0] if len(found) == 1 else torch.cat(found)


def _token_product(left: Tensor, right: Tensor) -> Tensor:
    if torch.compiler.is_compiling() and left.dtype.itemsize < 4:  # the compiler would unroll its loop over pieces
        return torch.ops.sparseft.token_product(left, right)
    return reference.token_product(left, right).float()


@torch.library.custom_op("sparseft::token_product", mutates_args=())
def _token_product_op(left: Tensor, right: Tensor) -> Tensor:
    return reference.token_product(left, right).float()


@_token_product_op.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[1], right.shape[1], dtype=torch.float32)


def experts_gradient(
    grad_output: Tensor, x: Tensor, offs: Tensor, parts: Tensor, sizes: tuple[int, int], total: int, block_size: int
) -> Tensor:
    """The weight gradients of experts' parts, summed and kept in fp32, one after another in one tensor (total,).

    `reference.experts_gradient` says what they are; `sizes` are the largest height and width among the parts. Where a
    kernel computes, that is one launch, and nothing waits for the device.
    """
    if torch.compiler.is_compiling():
        return torch.ops.sparseft.experts_gradient(grad_output, x, offs, parts, *sizes, total, block_size)
    return _experts_gradient(grad_output, x, offs, parts, *sizes, total, block_size)


def _experts_gradient(
    grad_output: Tensor, x: Tensor, offs: Tensor, parts: Tensor, height: int, width: int, total: int, block_size: int
) -> Tensor:
    if kernel_for(x) is not None:
        from sparseft.kernels import experts_triton

        return experts_triton.experts_gradient(grad_output, x, offs, parts, (height, width), total, block_size)
    return reference.experts_gradient(grad_output, x, offs, parts, total, block_size).float()


@torch.library.custom_op("sparseft::experts_gradient", mutates_args=())
def _experts_gradient_op(
    grad_output: Tensor, x: Tensor, offs: Tensor, parts: Tensor, height: int, width: int, total: int, block_size: int
) -> Tensor:
    return _experts_gradient(grad_output, x, offs, parts, height, width, total, block_size)


@_experts_gradient_op.register_fake
def _(
    grad_output: Tensor, x: Tensor, offs: Tensor, parts: Tensor, height: int, width: int, total: int, block_size: int
) -> Tensor:
    return x.new_empty(total, dtype=torch.float32)

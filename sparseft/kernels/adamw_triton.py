"""AdamW over the deltas of many layers in one launch, which writes their weights in the same pass.

A launch walks over *chunks* of all its tensors. Where these lie (addresses, strides, indices) is read from a table in
device memory that is made once and again only when a tensor moved; gradients, which autograd allocates anew for each
step, have a small table of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft.kernels.reference import Run

CHUNK = 2048  # elements of a delta that one program updates
FIELDS = 13  # int64 numbers that describe one tensor: `_describe`
RATES = tl.constexpr(7)  # fp32 numbers that each tensor is updated by: `rates`
OPTIONS = {"enable_fp_fusion": False}  # each product rounded on its own, as in torch's steps
WEIGHT_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
LARGEST = 2**31 - CHUNK  # elements of a delta: the kernel counts them in int32


class Entry(NamedTuple):
    """One delta (contiguous, fp32) with its moments, base values and weight, all on one device.

    `weight` is the logical (out, in) view with any strides; `at` and the values' shapes are those of
    `kernels/reference.py`.
    """

    delta: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    base_values: Tensor
    weight: Tensor
    at: Tensor | Run


def rates(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: float) -> list[float]:
    """What one step multiplies by, made in float64 as torch does: 1 - 0.999 in fp32 is off by 5e-5 of itself."""
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    return [1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps, lr / correction1, correction2**0.5]


@triton.jit
def _round_to_bfloat16(value):
    """The bits (uint16) of the nearest bf16, ties to even: the interpreter's own conversion cuts off instead."""
    bits = value.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value == value, bits, 0x7FC0).to(tl.uint16)


@triton.jit
def _adamw_kernel(chunks, table, grads, rates, KIND: tl.constexpr, WEIGHT: tl.constexpr, FIELDS: tl.constexpr,
                  CHUNK: tl.constexpr):  # fmt: skip
    """chunks (n, 2) int32: tensor, first element; table (tensors, FIELDS) int64; grads (tensors,) int64, 0 where a
    tensor has none in this step; rates (tensors, RATES) fp32. KIND: 0 rows, 1 columns, 2 blocks."""
    program = tl.program_id(0)
    tensor = tl.load(chunks + 2 * program)
    first = tl.load(chunks + 2 * program + 1)
    grad_address = tl.load(grads + tensor)
    if grad_address != 0:
        row = table + tensor * FIELDS
        delta_pointer = tl.load(row).to(tl.pointer_type(tl.float32))
        average_pointer = tl.load(row + 1).to(tl.pointer_type(tl.float32))
        square_pointer = tl.load(row + 2).to(tl.pointer_type(tl.float32))
        base_pointer = tl.load(row + 3).to(tl.pointer_type(WEIGHT))
        index_address = tl.load(row + 5)
        index_pointer = index_address.to(tl.pointer_type(tl.int64))
        run_start = tl.load(row + 6)
        numel = tl.load(row + 7).to(tl.int32)
        width = tl.load(row + 8).to(tl.int32)
        stride_out = tl.load(row + 9)
        stride_in = tl.load(row + 10)
        own = rates + tensor * RATES
        keep = tl.load(own)
        weight1 = tl.load(own + 1)
        beta2 = tl.load(own + 2)
        weight2 = tl.load(own + 3)
        eps = tl.load(own + 4)
        step_size = tl.load(own + 5)
        correction = tl.load(own + 6)

        element = first + tl.arange(0, CHUNK)
        live = element < numel
        grad = tl.load(grad_address.to(tl.pointer_type(tl.float32)) + element, mask=live, other=0.0)
        delta = tl.load(delta_pointer + element, mask=live, other=0.0)
        average = tl.load(average_pointer + element, mask=live, other=0.0)
        square = tl.load(square_pointer + element, mask=live, other=0.0)
        base = tl.load(base_pointer + element, mask=live, other=0.0).to(tl.float32)
        average = average + weight1 * (grad - average)
        square = beta2 * square + weight2 * grad * grad
        denominator = tl.div_rn(tl.sqrt_rn(square), correction) + eps
        delta = delta * keep - step_size * tl.div_rn(average, denominator)
        tl.store(delta_pointer + element, delta, mask=live)
        tl.store(average_pointer + element, average, mask=live)
        tl.store(square_pointer + element, square, mask=live)

        across = element // width
        within = element % width
        if KIND == 0:  # values (k, in)
            if index_address == 0:
                out = run_start + across
            else:
                out = tl.load(index_pointer + across, mask=live, other=0)
            place = out * stride_out + within * stride_in
            inside = live
        elif KIND == 1:  # values (out, k)
            if index_address == 0:
                column = run_start + within
            else:
                column = tl.load(index_pointer + within, mask=live, other=0)
            place = across * stride_out + column * stride_in
            inside = live
        else:  # values (n, B, B), of which an edge block's part outside the weight is never written
            block = across // width
            out = tl.load(index_pointer + 2 * block, mask=live, other=0) * width + across % width
            column = tl.load(index_pointer + 2 * block + 1, mask=live, other=0) * width + within
            inside = live & (out < tl.load(row + 11)) & (column < tl.load(row + 12))
            place = out * stride_out + column * stride_in
        value = base + delta
        weight_address = tl.load(row + 4)
        if WEIGHT == tl.bfloat16:
            bits = _round_to_bfloat16(value)
            tl.store(weight_address.to(tl.pointer_type(tl.uint16)) + place, bits, mask=inside)
        else:
            tl.store(weight_address.to(tl.pointer_type(WEIGHT)) + place, value.to(WEIGHT), mask=inside)


def _describe(entry: Entry) -> list[int]:
    """The FIELDS of one tensor."""
    run = isinstance(entry.at, tuple)
    return [
        *(t.data_ptr() for t in (entry.delta, entry.exp_avg, entry.exp_avg_sq, entry.base_values, entry.weight)),
        0 if run else entry.at.data_ptr(),
        entry.at[0] if run else 0,
        entry.delta.numel(),
        entry.delta.shape[-1],
        *entry.weight.stride(),
        *entry.weight.shape,
    ]


def _upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of `values` on the device; from pinned memory, so that no step waits for the device."""
    pinned = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


class Launch:
    """The update of all `entries` of one kind, one weight dtype and one device: one kernel launch a step."""

    def __init__(self, entries: Sequence[Entry], kind: str) -> None:
        device = entries[0].delta.device
        self.kind = ("rows", "columns", "blocks").index(kind)
        self.device, self.dtype = device, WEIGHT_DTYPES[entries[0].weight.dtype]
        # Held for as long as their addresses are: where a weight is stored in another order, nobody else keeps them.
        self._indices = [entry.at for entry in entries]
        self.table = _upload([_describe(entry) for entry in entries], torch.int64, device)
        pairs = [(n, first) for n, e in enumerate(entries) for first in range(0, e.delta.numel(), CHUNK)]
        self.chunks = _upload(pairs, torch.int32, device)
        self._addresses: list[int] = []
        self._grads: Tensor | None = None

    def run(self, grads: Sequence[Tensor | None], rates: Sequence[Sequence[float]]) -> None:
        """One step: `grads` (fp32, contiguous, None: leave this one alone) and `rates` by entry."""
        addresses = [0 if grad is None else grad.data_ptr() for grad in grads]
        if addresses != self._addresses:
            self._addresses, self._grads = addresses, _upload(addresses, torch.int64, self.device)
        numbers = _upload(rates, torch.float32, self.device)
        arguments = (self.chunks, self.table, self._grads, numbers, self.kind, self.dtype, FIELDS, CHUNK)
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with on_device:  # else Triton's interpreter
            _adamw_kernel[(len(self.chunks),)](*arguments, **OPTIONS)

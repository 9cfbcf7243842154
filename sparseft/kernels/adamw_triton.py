"""AdamW over the deltas of many layers in one launch, which writes their weights in the same pass.

A launch walks over *chunks* of its tensors. Where these lie (addresses, strides, indices) is read from a table in
device memory that is made once and again only when a tensor moved; gradients, which autograd allocates anew for each
step, have a small table of their own. Steps are counted on the device, by a small launch ahead of the others: whether
one is taken is for a flag there to say, which the host need not read.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft.kernels.kind import Run

KERNEL_KINDS = ("rows", "columns", "blocks", "grid")  # of patterns; the kernel knows them by number
CHUNK = 2048  # elements of a delta that one program updates
COUNTED = 128  # tensors whose steps one program counts
FIELDS = 13  # int64 numbers that describe one tensor: `_describe`
NUMBERS = tl.constexpr(8)  # float64 numbers of one parameter group: `numbers_of`
RATES = tl.constexpr(7)  # fp32 numbers that each tensor is updated by
# Each product rounded on its own, as in torch's steps. With 8 warps a thread has 8 elements, two accesses of 16 bytes
# for each fp32 tensor: with 4, programs need twice the registers.
OPTIONS = {"enable_fp_fusion": False, "num_warps": 8}
WEIGHT_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
LARGEST = 2**31 - CHUNK  # elements of a delta: the kernel counts them in int32
WIDE = 16  # bytes of the widest access; as many elements fill a whole number of them, whatever their dtype


class Entry(NamedTuple):
    """One delta (contiguous, fp32) with its moments, base values and weight, all on one device.

    `weight` is the logical (out, in) view with any strides; `at` and the values' shapes are those of
    `kernels/kinds.py`; of a grid `at` is the index, of one alone, and `width` the number of its columns. `step` (): the
    steps taken, on any device; `group`: the number of its parameter group.
    """

    delta: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    base_values: Tensor
    weight: Tensor
    at: Tensor | Run
    kind: str
    step: Tensor
    group: int
    width: int | None = None


def numbers_of(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> tuple[float, ...]:
    """What the kernels need of one parameter group; made, and kept, in float64 as torch does: 1 - 0.999 in fp32 is off
    by 5e-5 of itself. Powers of a beta are taken by its logarithm."""
    logarithms = (math.log2(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    return (1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps, lr, *logarithms)


@triton.jit(do_not_specialize=["tensors", "found_inf"])
def _count_kernel(grads, groups, numbers, found_inf, counts, rates, tensors, COUNTED: tl.constexpr):
    """Counts a step of each tensor that has a gradient, and makes the rates of its update.

    grads (tensors,) int64 addresses, 0 for none; groups (tensors,) int32; numbers (groups, NUMBERS) float64; counts
    (tensors,) fp32; rates (tensors, RATES) fp32. Nothing is changed where `found_inf` () is 1."""
    tensor = tl.program_id(0) * COUNTED + tl.arange(0, COUNTED)
    found = tl.zeros([COUNTED], tl.float32) + tl.load(found_inf)  # the interpreter cannot broadcast what it compared
    active = (tl.load(grads + tensor, mask=tensor < tensors, other=0) != 0) & (found != 1.0)
    count = tl.load(counts + tensor, mask=active, other=0.0) + 1.0
    tl.store(counts + tensor, count, mask=active)
    given = numbers + tl.load(groups + tensor, mask=active, other=0) * NUMBERS
    own = rates + tensor * RATES
    for number in tl.static_range(5):
        tl.store(own + number, tl.load(given + number, mask=active, other=0.0).to(tl.float32), mask=active)
    lr = tl.load(given + 5, mask=active, other=0.0)
    steps = count.to(tl.float64)
    correction1 = 1.0 - tl.exp2(steps * tl.load(given + 6, mask=active, other=-1.0))
    correction2 = 1.0 - tl.exp2(steps * tl.load(given + 7, mask=active, other=-1.0))
    tl.store(own + 5, (lr / correction1).to(tl.float32), mask=active)
    tl.store(own + 6, tl.sqrt(correction2).to(tl.float32), mask=active)


@triton.jit
def _round_to_bfloat16(value):
    """The bits (uint16) of the nearest bf16, ties to even: the interpreter's own conversion cuts off instead."""
    bits = value.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value == value, bits, 0x7FC0).to(tl.uint16)


@triton.jit(do_not_specialize=["found_inf", "grad_scale"])
def _adamw_kernel(chunks, table, grads, rates, found_inf, grad_scale, KIND: tl.constexpr, WEIGHT: tl.constexpr,
                  WIDE_VALUES: tl.constexpr, WIDE_WEIGHT: tl.constexpr, FIELDS: tl.constexpr,
                  CHUNK: tl.constexpr):  # fmt: skip
    """chunks (n, 2) int32: tensor, first element; table (tensors, FIELDS) int64; grads (tensors,) int64, 0 where a
    tensor has none in this step; rates (tensors, RATES) fp32. Gradients are divided by `grad_scale` (); nothing is
    changed where `found_inf` () is 1. KIND: 0 rows, 1 columns, 2 blocks. WIDE_VALUES, WIDE_WEIGHT: what
    `_wide_values`, `_wide_weight` say of all tensors of the launch."""
    program = tl.program_id(0)
    tensor = tl.load(chunks + 2 * program)
    first = tl.multiple_of(tl.load(chunks + 2 * program + 1), 16)
    grad_address = tl.load(grads + tensor)
    if (grad_address != 0) & (tl.load(found_inf) != 1.0):
        row = table + tensor * FIELDS
        grad_pointer = grad_address.to(tl.pointer_type(tl.float32))
        delta_pointer = tl.load(row).to(tl.pointer_type(tl.float32))
        average_pointer = tl.load(row + 1).to(tl.pointer_type(tl.float32))
        square_pointer = tl.load(row + 2).to(tl.pointer_type(tl.float32))
        base_pointer = tl.load(row + 3).to(tl.pointer_type(WEIGHT))
        # bf16 is stored as bits: see `_round_to_bfloat16`
        weight_pointer = tl.load(row + 4).to(tl.pointer_type(tl.uint16 if WEIGHT == tl.bfloat16 else WEIGHT))
        index_address = tl.load(row + 5)
        index_pointer = index_address.to(tl.pointer_type(tl.int64))
        run_start = tl.load(row + 6)
        numel = tl.load(row + 7).to(tl.int32)
        width = tl.load(row + 8).to(tl.int32)
        stride_out = tl.load(row + 9)
        stride_in = tl.load(row + 10)
        columns = tl.load(row + 12)
        # Said of each number where it is loaded: from a function of its own the compiler would not hear it.
        if WIDE_VALUES:
            grad_pointer = tl.multiple_of(grad_pointer, 16)
            delta_pointer = tl.multiple_of(delta_pointer, 16)
            average_pointer = tl.multiple_of(average_pointer, 16)
            square_pointer = tl.multiple_of(square_pointer, 16)
            base_pointer = tl.multiple_of(base_pointer, 16)
            numel = tl.multiple_of(numel, 16)
        if WIDE_WEIGHT:
            if KIND == 1:
                run_start = tl.multiple_of(run_start, 16)
            width = tl.multiple_of(width, 16)
            stride_out = tl.multiple_of(stride_out, 16)
            columns = tl.multiple_of(columns, 16)
            weight_pointer = tl.multiple_of(weight_pointer, 16)
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
        grad = tl.div_rn(tl.load(grad_pointer + element, mask=live, other=0.0), tl.load(grad_scale))
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
            column = within.to(tl.int64)
            inside = live
        elif KIND == 1:  # values (out, k)
            out = across.to(tl.int64)
            if WIDE_WEIGHT:
                column = run_start + within
            elif index_address == 0:
                column = run_start + within
            else:
                column = tl.load(index_pointer + within, mask=live, other=0)
            inside = live
        elif (
            KIND == 3
        ):  # values (rows · columns,) of one grid, whose index has its rows, then its columns as -1 - column
            out = tl.load(index_pointer + across, mask=live, other=0)
            column = -1 - tl.load(index_pointer + numel // width + within, mask=live, other=0)
            inside = live
        else:  # values (n, B, B), of which an edge block's part outside the weight is never written
            block = across // width
            out = tl.load(index_pointer + 2 * block, mask=live, other=0) * width + across % width
            column = tl.load(index_pointer + 2 * block + 1, mask=live, other=0) * width + within
            inside = live & (out < tl.load(row + 11)) & (column < columns)
        place = out * stride_out + (column if WIDE_WEIGHT else column * stride_in)
        value = base + delta
        if WEIGHT == tl.bfloat16:
            tl.store(weight_pointer + place, _round_to_bfloat16(value), mask=inside)
        else:
            tl.store(weight_pointer + place, value.to(WEIGHT), mask=inside)


def _describe(entry: Entry) -> list[int]:
    """The FIELDS of one tensor."""
    run = isinstance(entry.at, tuple)
    return [
        *(t.data_ptr() for t in (entry.delta, entry.exp_avg, entry.exp_avg_sq, entry.base_values, entry.weight)),
        0 if run else entry.at.data_ptr(),
        entry.at[0] if run else 0,
        entry.delta.numel(),
        entry.width or entry.delta.shape[-1],
        *entry.weight.stride(),
        *entry.weight.shape,
    ]


def _divides(*numbers: int) -> bool:
    return functools.reduce(operator.or_, numbers) % WIDE == 0


def _wide_values(entry: Entry) -> bool:
    """Whether the kernel may read and write delta, moments and base values WIDE bytes at a time."""
    values = (entry.delta, entry.exp_avg, entry.exp_avg_sq, entry.base_values)
    return _divides(entry.delta.numel(), *(tensor.data_ptr() for tensor in values))


def _wide_weight(entry: Entry) -> bool:
    """Whether WIDE neighbours of the values are neighbours in the weight too, from a whole number of them on."""
    weight, starts = entry.weight, {"rows": (0,), "blocks": (entry.weight.shape[1],)}.get(entry.kind)
    if starts is None:
        starts = (entry.at[0],) if isinstance(entry.at, tuple) else (1,)
    return weight.stride(1) == 1 and _divides(weight.data_ptr(), weight.stride(0), entry.delta.shape[-1], *starts)


def _upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of `values` on the device; from pinned memory, so that no step waits for the device.

    RuntimeError while a CUDA graph is captured: its replays would send what the memory holds by then."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "SparseAdamW: something moved, or a learning rate changed, since the last step, which a CUDA graph cannot "
            "capture: take a step first, and keep gradients where they are (zero_grad(set_to_none=False))."
        )
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class _Sent:
    """Numbers at one place of the device's memory, sent again only when they changed."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        self._values: list[Any] = []

    def hold(self, values: list[Any]) -> bool:
        """Whether they had to be sent."""
        if values == self._values:
            return False
        self.tensor.copy_(_upload(values, self.tensor.dtype, self.tensor.device))
        self._values = values
        return True


class Table:
    """The update of all `entries` of one device: a launch that counts their steps, and one for those of each kind,
    dtype of weight and width of access. `counts` (entries,) are the steps taken, fp32, on the device."""

    def __init__(self, entries: Sequence[Entry], groups: int) -> None:
        self.device = device = entries[0].delta.device
        # Held for as long as their addresses are: where a weight is stored in another order, nobody else keeps them.
        self._indices = [entry.at for entry in entries]
        self._fields = _upload([_describe(entry) for entry in entries], torch.int64, device)
        self._groups = _upload([entry.group for entry in entries], torch.int32, device)
        self.counts = torch.stack([entry.step.to(device, torch.float32, non_blocking=True) for entry in entries])
        self._rates = torch.zeros(len(entries), RATES.value, device=device)
        self._numbers = _Sent((groups, NUMBERS.value), torch.float64, device)
        self._grads = _Sent((len(entries),), torch.int64, device)
        self._wide_grads = True
        self._goes_on, self._as_it_is = torch.zeros((), device=device), torch.ones((), device=device)
        chunks: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
        for number, entry in enumerate(entries):
            values = _wide_values(entry)
            constants = (
                KERNEL_KINDS.index(entry.kind),
                WEIGHT_DTYPES[entry.weight.dtype],
                values,
                values and _wide_weight(entry),
            )
            firsts = range(0, entry.delta.numel(), CHUNK)
            chunks.setdefault(constants, []).extend((number, first) for first in firsts)
        self.launches = [(constants, _upload(pairs, torch.int32, device)) for constants, pairs in chunks.items()]

    def run(
        self,
        grads: Sequence[Tensor | None],
        numbers: list[tuple[float, ...]],
        found_inf: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> None:
        """One step: `grads` by entry (fp32, contiguous, None: leave this one alone), `numbers_of` each group.

        `found_inf`, `grad_scale`: one number each, on any device. Where the first is 1 nothing is changed, counts
        included; gradients are divided by the second."""
        addresses = [0 if grad is None else grad.data_ptr() for grad in grads]
        if self._grads.hold(addresses):
            self._wide_grads = _divides(*addresses)
        self._numbers.hold(numbers)
        stop = self._goes_on if found_inf is None else self._own(found_inf)
        scale = self._as_it_is if grad_scale is None else self._own(grad_scale)
        tables = self._grads.tensor, self._groups, self._numbers.tensor
        size = len(addresses)
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with on_device:  # else Triton's interpreter
            _count_kernel[(triton.cdiv(size, COUNTED),)](*tables, stop, self.counts, self._rates, size, COUNTED)
            for (kind, weight, *wide), chunks in self.launches:
                arguments = (chunks, self._fields, self._grads.tensor, self._rates, stop, scale, kind, weight)
                wide = wide if self._wide_grads else (False, False)
                _adamw_kernel[(len(chunks),)](*arguments, *wide, FIELDS, CHUNK, **OPTIONS)

    def _own(self, number: Tensor) -> Tensor:
        return number.to(self.device, torch.float32, non_blocking=True)

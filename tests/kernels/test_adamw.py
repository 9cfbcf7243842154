"""The optimizer's kernels by themselves, against AdamW written out in float64, and compiled without a device.

Whole optimizers on their path: tests/training/test_optimizer.py.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton, which Linux has")
from sparseft.kernels import adamw_triton as kernels
from sparseft.kernels import blocks_triton, reference
from support.compiling import run_compiling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(
    DEVICE == "cpu" and not blocks_triton.INTERPRETED, reason="triton was imported without its interpreter"
)
GROUP = {"lr": 3e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def off_by(tensor: Tensor, elements: int) -> Tensor:
    """The same values from `elements` after the start of a storage: for 16 bytes at a time it lies wrong."""
    storage = torch.zeros(tensor.numel() + elements, dtype=tensor.dtype, device=tensor.device)
    view = storage[elements:].view(tensor.shape)
    return view.copy_(tensor)


def entry(
    kind: str,
    shape: tuple[int, int],
    index: object,
    dtype: torch.dtype,
    size: int | None = None,
    off: int = 0,
    step: int = 0,
) -> kernels.Entry:
    weight = torch.randn(shape, device=DEVICE).to(dtype)
    at = index if isinstance(index, tuple) else torch.tensor(index, device=DEVICE)
    base = reference.gather(weight, kind, at, size)
    values = [off_by(torch.randn(base.shape, device=DEVICE), off) for _ in range(3)]
    count = torch.tensor(float(step))
    width = int((at < 0).sum()) if kind == "grid" else None
    second = values[2].square_()
    return kernels.Entry(values[0], values[1], second, off_by(base, off), weight, at, kind, count, 0, width)


def updated(entry: kernels.Entry, grad: Tensor, size: int | None) -> list[Tensor]:
    """AdamW's next step, in float64, and the weight with base + delta rounded once from fp32."""
    lr, beta1, beta2, eps, weight_decay = GROUP.values()
    delta, average, square, grad = (t.double() for t in (entry.delta, entry.exp_avg, entry.exp_avg_sq, grad))
    step = int(entry.step) + 1
    average = average + (1 - beta1) * (grad - average)
    square = beta2 * square + (1 - beta2) * grad * grad
    denominator = square.sqrt() / math.sqrt(1 - beta2**step) + eps
    delta = delta * (1 - lr * weight_decay) - lr / (1 - beta1**step) * average / denominator
    return [delta, average, square]


ENTRIES = {
    "rows, wide": ("rows", (40, 64), [3, 39, 0], {}),
    "rows, odd": ("rows", (10, 37), [3, 9, 0], {}),
    "rows, a run": ("rows", (40, 48), (7, 5), {}),
    "rows, several chunks": ("rows", (90, 80), list(range(0, 90, 2)), {}),
    "columns, wide": ("columns", (33, 64), (16, 32), {}),
    "columns, a run from an odd place": ("columns", (48, 64), (3, 32), {}),
    "columns, odd": ("columns", (21, 13), [12, 2, 7], {}),
    "columns, their number even and places not": ("columns", (32, 64), list(range(0, 64, 4)), {}),
    "blocks, wide": ("blocks", (64, 48), [[3, 2], [0, 0]], {"size": 16}),
    "blocks, cut at rows": ("blocks", (60, 48), [[3, 2], [0, 0]], {"size": 16}),
    "blocks, cut at columns": ("blocks", (64, 40), [[3, 2], [0, 0]], {"size": 16}),
    "blocks, odd": ("blocks", (22, 13), [[4, 2], [0, 0], [1, 1]], {"size": 5}),
    "a grid": ("grid", (21, 13), [12, 2, 7, 20, -1, -13, -6], {}),
    "a grid of several chunks": ("grid", (90, 80), [*range(0, 90, 2), *range(-80, -10)], {}),
    "one element": ("rows", (1, 1), [0], {}),
    "from within a storage": ("rows", (40, 64), [3, 39, 0], {"off": 1}),
}


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_update_of_many_shapes_at_once(dtype: torch.dtype) -> None:
    """All in one table, the 3rd without a gradient; gradients of the second step lie where 16 bytes do not begin."""
    torch.manual_seed(0)
    entries, sizes = [], []
    for number, (kind, shape, index, options) in enumerate(ENTRIES.values()):
        entries.append(entry(kind, shape, index, dtype, step=number * 11, **options))
        sizes.append(options.get("size"))
    table = kernels.Table(entries, groups=1)
    wide = {(values, weight) for (_, _, values, weight), _ in table.launches}
    assert wide == {(False, False), (True, False), (True, True)}
    for round_ in range(2):
        entries = [old._replace(step=count.clone()) for old, count in zip(entries, table.counts, strict=True)]
        grads = [off_by(torch.randn(e.delta.shape, device=DEVICE), round_) for e in entries]
        expected = [updated(e, g, size) for e, g, size in zip(entries, grads, sizes, strict=True)]
        idle = [t.clone() for t in entries[2][:5]]
        table.run([None if n == 2 else g for n, g in enumerate(grads)], [kernels.numbers_of(*GROUP.values())])
        assert all(map(torch.equal, idle, entries[2][:5])) and table.counts[2] == 22
        for number, (e, size) in enumerate(zip(entries, sizes, strict=True)):
            if number == 2:
                continue
            assert table.counts[number] == number * 11 + round_ + 1
            for found, truth in zip(e[:3], expected[number], strict=True):
                torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-6)
            whole = e.weight.clone()
            reference.scatter_(whole, e.kind, e.at, (e.base_values + e.delta).to(dtype), size)
            assert torch.equal(whole, e.weight), list(ENTRIES)[number]  # and so nothing beside the entries


@interpreted
def test_rates_are_as_exact_as_those_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one step, a few, a million: fp32's last place is what they may differ by from float64."""
    steps = [0, 1, 6, 99, 9_999, 999_999]
    entries = [entry("rows", (1, 1), [0], torch.float32, step=step) for step in steps]
    for beta1, beta2 in ((0.9, 0.999), (0.0, 0.5), (0.5, 0.0), (0.99, 0.99999)):
        table = kernels.Table(entries, groups=1)
        numbers = GROUP | {"beta1": beta1, "beta2": beta2}
        table.run([torch.ones(1, 1, device=DEVICE)] * len(steps), [kernels.numbers_of(*numbers.values())])
        lr, decay = numbers["lr"], numbers["weight_decay"]
        fixed = [1 - lr * decay, 1 - beta1, beta2, 1 - beta2, numbers["eps"]]
        truth = [[*fixed, lr / (1 - beta1 ** (n + 1)), math.sqrt(1 - beta2 ** (n + 1))] for n in steps]
        found = table._rates.double().cpu()
        torch.testing.assert_close(found, torch.tensor(truth, dtype=torch.float64), rtol=1.2e-7, atol=0)


COMPILING = """
import triton.language as tl
from sparseft.kernels import adamw_triton as module
from support.compiling import ARCHITECTURES, compiled

pointers = {"chunks": "*i32", "table": "*i64", "grads": "*i64", "rates": "*fp32", "found_inf": "*fp32"}
counting = {"grads": "*i64", "groups": "*i32", "numbers": "*fp64", "found_inf": "*fp32", "counts": "*fp32",
            "rates": "*fp32", "tensors": "i32"}
for architecture in ARCHITECTURES:
    for kind, weight, values, whole in (
        (0, tl.bfloat16, True, True), (1, tl.float32, True, False), (2, tl.bfloat16, True, True),
        (2, tl.float16, False, False), (3, tl.bfloat16, True, False),
    ):
        constants = dict(KIND=kind, WEIGHT=weight, WIDE_VALUES=values, WIDE_WEIGHT=whole, FIELDS=module.FIELDS,
                         CHUNK=module.CHUNK)
        types = pointers | {"grad_scale": "*fp32"}
        made = compiled(module._adamw_kernel, types, constants, architecture, **module.OPTIONS)
        print(architecture, kind, weight, values, whole, made.registers, made.spilled)
        assert made.spilled == 0 and made.registers <= 128, made.registers
        # 16 bytes at a time: two loads of each fp32 tensor, two stores of three; bf16 takes one
        lines = [line for line in made.ptx.splitlines() if ".v4." in line]
        loads, stores = (sum(word in line for line in lines) for word in ("ld.global", "st.global"))
        # of columns the index too; of a grid it is read at two places, neither of which goes on by one
        wanted = (0, 0) if not values else (9, 7) if whole else (9, 6) if kind == 3 else (10, 6)
        assert (loads, stores) == wanted, (loads, stores)
    made = compiled(module._count_kernel, counting, {"COUNTED": module.COUNTED}, architecture, enable_fp_fusion=False)
    print(architecture, "count", made.registers, made.spilled)
    assert made.spilled == 0 and made.registers <= 64
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton.backends.nvidia") is None, reason="triton without NVIDIA's backend"
)
def test_the_kernels_compile_to_few_registers_and_wide_accesses(tmp_path: Path) -> None:
    """Needs no GPU: the interpreter accepts code that the compiler does not."""
    print(run_compiling(COMPILING, tmp_path))

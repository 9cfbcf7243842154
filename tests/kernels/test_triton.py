"""The Triton kernels against autograd's dense gradients, in Triton's interpreter or on a CUDA device.

`conftest.py` asks for the interpreter before anything imports triton. What only a GPU can show is marked `gpu`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from sparseft.bench import kernels
from sparseft.errors import UserError
from sparseft.kernels import dispatch, reference
from sparseft.layers import BlockSparseLinear
from support.blocks import DEVICE, block_parts, dense_gradient, operands, some_blocks
from support.running import files, refused

pytest.importorskip("triton", reason="needs triton, which Linux has")
from sparseft.kernels import blocks_triton
from support.places import ROOT

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.skipif(
        DEVICE == "cpu" and not blocks_triton.INTERPRETED, reason="triton was imported without its interpreter"
    ),
    # what triton 3.6's interpreter does with `range` over bounds of run time: an error from numpy 2.4 on
    pytest.mark.filterwarnings("error:Conversion of an array with ndim > 0:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Kernels compute here, whatever the device; yields the calls of the kernel, to see that it was used."""
    calls: list[Any] = []
    real = blocks_triton.blocks_gradient

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(args)
        return real(*args, **options)

    monkeypatch.setattr(blocks_triton, "blocks_gradient", counted)
    monkeypatch.setenv("SPARSEFT_KERNELS", "triton")
    yield calls


def check(
    grad_output: Tensor, x: Tensor, index: Tensor, size: int, tolerance: float = 1e-5, splits: int | None = None
) -> Tensor:
    rows, columns = index.to(x.device).unbind(1)
    found = blocks_triton.blocks_gradient(grad_output, x, rows, columns, size, splits=splits)
    expected = block_parts(dense_gradient(grad_output, x), index, size)
    assert found.dtype == torch.float32 and found.shape == expected.shape and found.is_contiguous()
    # fp16 and bf16 products are exact in fp32: what is left is the error of fp32 sums.
    scale = expected.abs().max().item() or 1.0
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * scale)
    ones = block_parts(torch.ones(grad_output.shape[1], x.shape[1]), index, size).to(found.device)
    assert not found[ones == 0].any()  # exactly zero outside: the optimizer and clipping see it
    return found


# ---- the kernel ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 3, 65])
@pytest.mark.parametrize(("shape", "size"), [((37, 53), 16), ((22, 27), 4), ((200, 130), 64)])
def test_blocks_equal_the_dense_gradient(shape: tuple[int, int], size: int, tokens: int, dtype: torch.dtype) -> None:
    check(*operands(tokens, shape, dtype), some_blocks(shape, size), size)


@pytest.mark.parametrize("size", [1, 4, 5, 8, 12, 16, 32, 48, 64, 100, 128, 160])
def test_every_block_size(size: int) -> None:
    """Powers of two, others, and blocks that take several tiles; each with edge blocks."""
    shape = (2 * size + 3, size + 1)
    check(*operands(33, shape), some_blocks(shape, size, share=0.5), size)


@pytest.mark.parametrize("shape", [(5, 3), (3, 40), (40, 3), (1, 1)])
def test_blocks_larger_than_the_weight(shape: tuple[int, int]) -> None:
    check(*operands(7, shape), some_blocks(shape, 64), 64)


@pytest.mark.parametrize("splits", [1, 2, 3, 1000])
@pytest.mark.parametrize("tokens", [1, 64, 65, 300])
def test_splits_of_the_tokens_add_up(tokens: int, splits: int) -> None:
    grad_output, x = operands(tokens, (40, 24))
    index = some_blocks((40, 24), 8)
    found = check(grad_output, x, index, 8, splits=splits)
    assert torch.equal(found, check(grad_output, x, index, 8, splits=splits))  # in a fixed order: bit for bit the same


def test_number_of_splits() -> None:
    for tokens in (1, 512, 2047):
        assert blocks_triton.splits_of(tokens=tokens, programs=66, processors=132) == 1
    assert blocks_triton.splits_of(tokens=8192, programs=66, processors=132) == 4
    assert blocks_triton.splits_of(tokens=8192, programs=1, processors=132) == 16  # of 512 tokens each
    assert blocks_triton.splits_of(tokens=8192, programs=4000, processors=132) == 1
    assert blocks_triton.splits_of(tokens=1, programs=1, processors=132) == 1


def test_operands_of_any_strides() -> None:
    tokens, shape, size = 21, (37, 53), 16
    index = some_blocks(shape, size)
    grad_output, x = operands(tokens, shape)
    plain = check(grad_output, x, index, size)
    for form in (
        lambda t: t.t().contiguous().t(),  # features far apart
        lambda t: torch.stack([t, t], dim=1)[:, 1],  # tokens far apart
        lambda t: torch.stack([t, t], dim=2)[..., 0],  # nothing consecutive
        lambda t: F.pad(t, (3, 2))[:, 3:-2],  # not aligned
    ):
        assert torch.equal(check(form(grad_output), form(x), index, size), plain)
    check(torch.ones((), device=DEVICE).expand(tokens, shape[0]), x, index, size)  # what a sum's gradient looks like
    check(grad_output, x[:1].expand(tokens, -1), index, size)
    rows, columns = torch.stack([index[:, 0], index[:, 1]]).to(DEVICE)  # indices of another stride
    assert torch.equal(blocks_triton.blocks_gradient(grad_output, x, rows, columns, size), plain)


def test_a_slice_of_x_by_positions() -> None:
    tokens, shape, size = 19, (37, 53), 16
    grad_output, x = operands(tokens, shape)
    index = torch.tensor([[2, 3], [0, 1], [1, 3]], device=DEVICE)
    needed, position = torch.unique(index[:, 1], return_inverse=True)
    compact = reference.to_blocks(x, size).index_select(1, needed).flatten(1)
    found = blocks_triton.blocks_gradient(grad_output, compact, index[:, 0], position, size)
    assert torch.equal(found, blocks_triton.blocks_gradient(grad_output, x, index[:, 0], index[:, 1], size))


def test_no_block_and_no_token() -> None:
    grad_output, x = operands(4, (8, 8))
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert blocks_triton.blocks_gradient(grad_output, x, none, none, 4).shape == (0, 4, 4)


# ---- the layer ----


def trained_by(module: nn.Module, x: Tensor, upstream: Tensor | None) -> Tensor:
    y = module(x)
    y.backward(upstream) if upstream is not None else y.sum().backward()
    return y.detach()


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 65])
@pytest.mark.parametrize(("shape", "size"), [((37, 53), 16), ((37, 53), 4), ((3, 5), 8), ((129, 131), 128)])
def test_layer_against_the_dense_mirror(
    shape: tuple[int, int], size: int, tokens: int, conv: bool, forced: list[Any]
) -> None:
    """Forward and every gradient: of x, of the bias, and of the deltas, whether a slice or x itself is saved."""
    torch.manual_seed(0)
    out_features, in_features = shape
    dense = Conv1D(out_features, in_features) if conv else nn.Linear(in_features, out_features)
    nn.init.normal_(dense.bias)
    dense = dense.to(DEVICE)
    index = some_blocks(shape, size, share=0.1)
    x_dense = torch.randn(tokens, in_features, device=DEVICE, requires_grad=True)
    for upstream in (torch.randn(out_features, tokens, device=DEVICE).t(), None):  # not contiguous; expanded
        for keeps_input in (True, False):
            layer = BlockSparseLinear.from_linear(copy_of(dense), index, size)
            layer.keeps_input = keeps_input
            layer.bias.requires_grad_(True)
            x = x_dense.detach().clone().requires_grad_()
            dense.zero_grad()
            x_dense.grad = None
            assert torch.equal(trained_by(layer, x, upstream), trained_by(dense, x_dense, upstream))
            gradient = dense.weight.grad.t() if conv else dense.weight.grad
            torch.testing.assert_close(x.grad, x_dense.grad)
            torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
            torch.testing.assert_close(layer.delta.grad, block_parts(gradient, index, size), rtol=1e-4, atol=1e-4)
    assert len(forced) == 4


def copy_of(linear: nn.Module) -> nn.Module:
    other = type(linear)(*((linear.nf, linear.nx) if isinstance(linear, Conv1D) else linear.weight.shape[::-1]))
    other.load_state_dict(linear.state_dict())
    return other.to(linear.weight.device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_in_half_precision_and_more_dimensions(dtype: torch.dtype, forced: list[Any]) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(53, 37).to(DEVICE, dtype)
    index = some_blocks((37, 53), 16)
    layer = BlockSparseLinear.from_linear(copy_of(dense).to(dtype), index, 16)
    x = torch.randn(5, 2, 53, device=DEVICE, dtype=dtype).transpose(0, 1)  # not contiguous
    upstream = torch.randn(2, 5, 37, device=DEVICE, dtype=dtype)
    trained_by(layer, x, upstream)
    expected = dense_gradient(upstream.reshape(-1, 37), x.reshape(-1, 53))
    torch.testing.assert_close(layer.delta.grad.double(), block_parts(expected, index, 16), rtol=1e-4, atol=1e-4)
    assert len(forced) == 1


def test_autocast(forced: list[Any]) -> None:
    """The kernel gets both operands in the precision that the product had."""
    torch.manual_seed(0)
    layer = BlockSparseLinear(48, 32, blocks=[[0, 0], [1, 2]], block_size=16).to(DEVICE)
    x, upstream = torch.randn(6, 48, device=DEVICE), torch.randn(6, 32, device=DEVICE, dtype=torch.bfloat16)
    for keeps_input in (True, False):
        layer.keeps_input, layer.delta.grad = keeps_input, None
        with torch.autocast(DEVICE, torch.bfloat16):
            y = layer(x)
        y.backward(upstream)
        expected = block_parts(dense_gradient(upstream, x.bfloat16()), layer.patterns["blocks"].index, 16)
        torch.testing.assert_close(layer.delta.grad.double(), expected, rtol=1e-4, atol=1e-4)
    assert [call[1].dtype for call in forced] == [torch.bfloat16] * 2


@pytest.mark.parametrize("keeps_input", [True, False])
def test_torch_compile_without_graph_breaks(keeps_input: bool, forced: list[Any]) -> None:
    torch.manual_seed(0)
    layer = BlockSparseLinear(53, 37, blocks=[[0, 0], [2, 3]], block_size=16).to(DEVICE)
    layer.keeps_input = keeps_input
    x = torch.randn(5, 53, device=DEVICE)
    layer(x).square().sum().backward()
    expected, layer.delta.grad = layer.delta.grad, None
    torch._dynamo.reset()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    torch.testing.assert_close(layer.delta.grad, expected)
    assert len(forced) == 2


def test_the_operator_keeps_its_promises_to_the_compiler() -> None:
    grad_output, x = operands(7, (37, 53))
    rows, columns = some_blocks((37, 53), 16).to(DEVICE).unbind(1)
    torch.library.opcheck(torch.ops.sparseft.blocks_gradient, (grad_output, x, rows, columns, 16))


# ---- the choice ----


def test_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 2)
    monkeypatch.setenv("SPARSEFT_KERNELS", "tritn")
    with pytest.raises(UserError, match=r"SPARSEFT_KERNELS=tritn: expected .*reference\. Did you mean 'triton'\?"):
        dispatch.kernel_for(x)
    with pytest.raises(UserError, match="SPARSEFT_KERNELS=tritn"):  # at once, not in the first backward pass
        BlockSparseLinear(8, 8, blocks=[[0, 0]], block_size=4)
    for value in ("auto", "", "reference"):
        monkeypatch.setenv("SPARSEFT_KERNELS", value)
        assert dispatch.kernel_for(x) is None
    monkeypatch.delenv("SPARSEFT_KERNELS")
    assert dispatch.mode() == "auto"
    monkeypatch.setenv("SPARSEFT_KERNELS", "triton")
    assert dispatch.kernel_for(x.double()) is None  # plain torch always
    monkeypatch.setattr(blocks_triton, "INTERPRETED", False)
    with pytest.raises(UserError, match="need CUDA tensors, these are on 'cpu'"):
        dispatch.kernel_for(x)
    monkeypatch.setattr(dispatch, "_blocks_triton", lambda: None)
    with pytest.raises(UserError, match="triton cannot be imported"):
        dispatch.kernel_for(x)


@pytest.mark.parametrize("value", ["tritn", "triton"])
def test_a_choice_that_cannot_be_had_leaves_nothing(value: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEFT_KERNELS", value)
    monkeypatch.setattr(blocks_triton, "INTERPRETED", False)
    message = refused(in_tmp, "train", "method=sylva", "hardware=cpu", "trainer.max_steps=1")
    assert message.startswith(f"SPARSEFT_KERNELS={value}: ")
    assert files(in_tmp) == set()


def test_without_triton() -> None:
    """On the CPU triton is not even imported; where it is missing, plain torch computes."""
    code = (
        "import sys, torch\n"
        "sys.modules['triton'] = None\n"  # import triton fails
        "from sparseft.kernels import dispatch\n"
        "one = torch.zeros(1, dtype=torch.int64)\n"
        "assert dispatch.blocks_gradient(torch.ones(3, 4), torch.ones(3, 4), one, one, 4).sum() == 48\n"
        "assert dispatch._blocks_triton() is None\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "SPARSEFT_KERNELS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr


COMPILED = """
import re, subprocess, sys, torch, triton
from triton.backends.compiler import GPUTarget
from sparseft.kernels import blocks_triton, experts_triton, group_triton

ARCHITECTURES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}  # with their instruction for products of large tiles


def check(what, kernel, types, constants, options, architecture, divisible, registers, wanted):
    place = kernel.arg_names.index
    types = dict.fromkeys(kernel.arg_names, "i32") | types | dict.fromkeys(constants, "constexpr")
    values = {(place(key),): value for key, value in constants.items()}
    attributes = {(place(key),): [["tt.divisibility", 16]] for key in divisible}
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=values, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert made.metadata.shared <= 64 * 1024, "more shared memory than the smallest GPU has"
    assert wanted in made.asm["ptx"], f"{what}: no {wanted}"
    assert "scf.while" not in made.asm["ttir"] and "scf.for" in made.asm["ttir"], f"{what}: a loop not pipelined"
    with open("kernel.cubin", "wb") as file:
        file.write(made.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "kernel.cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\\d+)", usage)}
    assert found["REG"] <= registers and found["STACK"] == found["LOCAL"] == 0, f"{what}: {found}"


for architecture, large in ARCHITECTURES.items():
    for name, dtype, size in (("bf16", torch.bfloat16, 64), ("fp16", torch.float16, 4), ("fp32", torch.float32, 128)):
        tile, chunk, warps, stages = blocks_triton.tile_of(size, dtype)
        constants = dict(SIZE=size, TILE=tile, TILES=triton.cdiv(size, tile), CHUNK=chunk, PRECISION="ieee")
        constants["UPCAST"] = False
        options = dict(num_warps=warps, num_stages=stages)
        wanted = "fma.rn.f32" if name == "fp32" else large if tile >= 64 else "mma.sync"
        # of strides that are not aligned only that all fits into a thread's registers, 255
        for aligned, registers in ((True, 128), (False, 255))[: 1 if size < 16 else 2]:
            what = f"{architecture} {name} {size} {aligned}"
            pointers = {"grad_output": "*" + name, "x": "*" + name, "block_rows": "*i64", "block_columns": "*i64",
                        "out": "*fp32"}
            lengths = ["grad_output", "x", "out", "grad_token", "x_token", "out_features", "in_features"]
            check(f"blocks {what}", blocks_triton._blocks_kernel, pointers,
                  constants | dict(grad_feature=1, x_feature=1), options, architecture, lengths if aligned else [],
                  registers, wanted)
            pointers = {"blocks": "*i32", "table": "*i64", "out": "*fp32"}
            fixed = dict(DTYPE=group_triton.DTYPES[dtype], ALIGNED=aligned, FIELDS=group_triton.FIELDS)
            check(f"group {what}", group_triton._group_kernel, pointers, constants | fixed, options, architecture,
                  pointers, registers, wanted)

# The experts' kernel, whose loads are asynchronous copies of 16 bytes.
kernel = experts_triton._experts_kernel
for target, height, width, unit, products in ((80, 24, 2048, 16, "mma.sync"), (90, 2048, 48, 16, "wgmma.mma_async")):
    down, across, chunk, warps, stages = experts_triton.tiles_of(height, width, torch.bfloat16)
    constants = dict(UNIT=unit, FIELDS=experts_triton.FIELDS, TILES=16, DOWN=down, ACROSS=across, CHUNK=chunk,
                     PRECISION="ieee", UPCAST=False, grad_feature=1, x_feature=1)
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    types |= {"grad_output": "*bf16", "x": "*bf16", "offs": "*i32", "parts": "*i64", "out": "*fp32"}
    values = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    even = ("grad_output", "x", "parts", "out", "grad_token", "x_token", "out_features", "in_features")
    attributes = {(kernel.arg_names.index(key),): [["tt.divisibility", 16]] for key in even}
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=values, attrs=attributes)
    options = dict(num_warps=warps, num_stages=stages)
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    assert products in made.asm["ptx"] and "cp.async.cg" in made.asm["ptx"], f"sm_{target}"
    assert made.metadata.shared <= 96 * 1024
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton.backends.nvidia") is None, reason="triton without NVIDIA's backend"
)
def test_the_kernels_compile_for_cuda(tmp_path: Path) -> None:
    """No GPU is needed for this: to machine code, by tensor cores but for fp32 products that must be exact, in
    registers alone."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    root = ROOT
    (tmp_path / "compiled.py").write_text(COMPILED)
    environment["PYTHONPATH"] = str(root)
    done = subprocess.run(
        [sys.executable, tmp_path / "compiled.py"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


# ---- the benchmark ----


def test_the_benchmark_measures_every_combination(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEFT_KERNELS", "reference")
    monkeypatch.setattr(kernels, "TRANSFER", {"cpu": 2**16, "cuda": 2**16})
    rows = kernels.measure(torch.device(DEVICE), [(128, 256)], 8, torch.float32, 2, 0)
    names = ("shape", "tokens", "dtype", "block_size", "blocks", "way")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ((128, 256), 8, "float32", size, blocks, "reference")
        for size, counts in ((16, (2, 6)), (64, (1, 1)), (128, (1, 1)))
        for blocks in counts
    ]
    for row in rows:
        assert row["density"] == row["blocks"] * row["block_size"] ** 2 / (128 * 256)
        assert min(row["kernel_us"], row["dense_us"], row["bound_us"]) > 0


def test_moved_bytes_by_hand() -> None:
    """Two block rows and one block column of 4, 10 tokens of 2 bytes each; two blocks of 16 fp32 numbers."""
    assert kernels.moved_bytes(torch.tensor([[0, 5], [3, 5]]), 4, 10, 2) == 3 * 4 * 10 * 2 + 2 * 16 * 4


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [4, 16, 32, 64, 128])
@pytest.mark.parametrize(("tokens", "shape"), [(512, (4096, 4096)), (8192, (1024, 4096)), (2049, (11008, 4096))])
def test_real_sizes(tokens: int, shape: tuple[int, int], size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    grad_output, x = (torch.randn(tokens, features, device=CUDA).to(dtype) for features in shape)
    share = 0.016 if size > 4 else 0.001  # the oracle slices block by block
    check(grad_output, x, some_blocks(shape, size, share), size, tolerance=1e-4)


@pytest.mark.gpu
def test_tf32_is_torchs_to_allow() -> None:
    grad_output, x = (torch.randn(4096, 1024, device=CUDA) for _ in range(2))
    rows, columns = some_blocks((1024, 1024), 64).to(CUDA).unbind(1)
    truth = reference.blocks_gradient(grad_output.double(), x.double(), rows, columns, 64)
    errors = []
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            found = blocks_triton.blocks_gradient(grad_output, x, rows, columns, 64)
            errors.append((found - truth).abs().max().item())
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors[0] < 1e-3 < errors[1]


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """A strided operand whose last token lies past 2³¹ elements."""
    tokens, step = 70, 2**25
    storage = torch.zeros(tokens * step, dtype=torch.float16, device=CUDA)
    grad_output = storage.view(tokens, step)[:, :64]
    grad_output.copy_(torch.randn(tokens, 64))
    x = torch.randn(tokens, 64, device=CUDA).half()
    check(grad_output, x, torch.tensor([[0, 1], [1, 0]]), 32, tolerance=1e-3)


@pytest.mark.gpu
def test_auto_takes_the_kernel_on_cuda(monkeypatch: pytest.MonkeyPatch, forced: list[Any]) -> None:
    monkeypatch.setenv("SPARSEFT_KERNELS", "auto")
    layer = BlockSparseLinear(64, 64, device=CUDA, blocks=[[0, 0], [1, 1]], block_size=32)
    layer(torch.randn(8, 64, device=CUDA)).sum().backward()
    assert len(forced) == 1 and layer.delta.grad.any()

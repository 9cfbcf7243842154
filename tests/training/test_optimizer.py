"""`SparseAdamW` against `torch.optim.AdamW` and a write-back, on the path of the CPU and on the kernel's.

With SPARSEFT_TEST_KERNEL=1 everything here runs by the kernel, in Triton's interpreter: the last test but the GPU's
starts this file so in a process of its own, as Triton reads its variable when it is first imported.
"""

from __future__ import annotations

import copy
import functools
import gc
import io
import os
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers.pytorch_utils import Conv1D

import sparseft
from sparseft.errors import UserError
from sparseft.kernels import dispatch, reference
from sparseft.layers import BesideLinear, SparseLinear, sparse_layers, write_back
from sparseft.layers.inactive import swap
from sparseft.selection.selection import Selection
from sparseft.training.optimizer import SparseAdamW
from sparseft.training.reselection.swap import move_moments
from support.places import ROOT
from support.syncs import waiting_is_an_error

BY_KERNEL = os.environ.get("SPARSEFT_TEST_KERNEL") == "1"
if BY_KERNEL:
    from sparseft.kernels import adamw_triton
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
ON_A_DEVICE = {
    "rtol": 1e-6,
    "atol": 4e-6,
}  # a product and a sum are rounded once or twice, of 100 gradients up to 3
SIZE = 4
OUT, IN = 22, 13  # divisible by no block size
PATTERNS: dict[str, dict[str, Any]] = {
    "rows": {"rows": [7, 0, 21]},
    "run": {"rows": [5, 6, 7]},
    "columns": {"columns": [12, 2]},
    "columns_run": {"columns": [3, 4, 5]},
    "blocks": {"blocks": [[5, 3], [0, 0], [5, 1], [2, 3]]},  # cut on both sides, whole, cut on one side, the other
    "grid": {"grid": ([7, 0, 21], [12, 2])},
    "grids": {"grid": [7, 0, -13, -3, 21, -3]},  # which torch's own update takes
    "mixed": {"rows": [0, 5], "columns": [6, 1], "blocks": [[0, 0], [5, 3]]},  # overlapping
}


@pytest.fixture(autouse=True)
def _by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    if BY_KERNEL:
        monkeypatch.setattr(SparseAdamW, "kernel_devices", frozenset({"cpu"}))


def layer_of(name: str, *, conv: bool = False, dtype: torch.dtype = torch.float32) -> SparseLinear:
    linear: nn.Module = Conv1D(OUT, IN) if conv else nn.Linear(IN, OUT)
    nn.init.normal_(linear.weight)
    layer = SparseLinear.wrap(linear.to(dtype))
    for kind, index in PATTERNS[name].items():
        layer.add_pattern(kind, index, SIZE if kind == "blocks" else None)
    return layer


def zoo(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A layer of each kind and layout, and a plain one."""
    torch.manual_seed(0)
    model = nn.ModuleDict()
    for name in PATTERNS:
        model[name] = layer_of(name, dtype=dtype)
        model[f"conv_{name}"] = layer_of(name, conv=True, dtype=dtype)
    for kind, length in (("rows", OUT), ("columns", IN)):  # the other side keeps its order
        model[f"moved_{kind}"] = layer_of(kind, dtype=dtype)
        model[f"moved_{kind}"].permute(**{kind: torch.randperm(length)})
    model["idle"] = SparseLinear.wrap(nn.Linear(IN, OUT).to(dtype))
    model["plain"] = nn.Linear(3, 2)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def give_gradients(model: nn.Module, step: int, *, skip: int = 0) -> None:
    """The same random gradients for the same model and step; with `skip` every skip-th parameter has none."""
    generator = torch.Generator().manual_seed(step)
    inside = {
        id(p.delta): reference.gather(torch.ones(layer.out_features, layer.in_features), "blocks", p.index.cpu(), SIZE)
        for layer in sparse_layers(model).values()
        for p in layer.patterns.values()
        if p.kind == "blocks"
    }
    for number, parameter in enumerate(trained(model)):
        gradient = torch.randn(parameter.shape, generator=generator)
        gradient = gradient * inside[id(parameter)] if id(parameter) in inside else gradient
        parameter.grad = None if skip and (number + step) % skip == 0 else gradient.to(parameter)


def check_weights(model: nn.Module, bases: dict[str, Tensor]) -> None:
    """Every weight is its base with base + delta on the patterns, bit for bit."""
    for name, layer in sparse_layers(model).items():
        found = layer.weight.detach().clone()
        with torch.no_grad():
            layer.weight.copy_(bases[name])
        layer.write_inactive()
        layer.write_back()
        assert torch.equal(found, layer.weight), name
        if "blocks" in layer.patterns:
            pattern = layer.patterns["blocks"]
            ones = torch.ones(layer.out_features, layer.in_features, device=layer.weight.device)
            inside = reference.gather(ones, "blocks", pattern.index, pattern.block_size)
            assert not pattern.delta[inside == 0].any()


def bases_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in sparse_layers(model).items()}


def check_alike(model: nn.Module, oracle: nn.Module, tolerance: dict[str, float] = TOLERANCE) -> None:
    for ours, theirs in zip(trained(model), trained(oracle), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


def check_state(
    ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, tolerance: dict[str, float] = TOLERANCE
) -> None:
    left, right = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].keys() == right[key].keys()
        for name in left[key]:
            torch.testing.assert_close(left[key][name], right[key][name], **tolerance)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, skip: int = 0) -> None:
    for step in steps:
        give_gradients(model, step, skip=skip)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_many_steps_are_torchs_and_a_write_back(dtype: torch.dtype) -> None:
    model = zoo(dtype)
    oracle, bases = copy.deepcopy(model), bases_of(model)
    ours = SparseAdamW(trained(model), lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.AdamW(trained(oracle), lr=1e-2, weight_decay=0.1)
    # The interpreter is slow, and how deltas move does not depend on the weight.
    many = (15 if dtype == torch.float32 else 5) if BY_KERNEL else 100
    steps = range(many if dtype in (torch.float32, torch.bfloat16) else 5)
    run(model, ours, steps)
    run(oracle, theirs, steps)
    check_alike(model, oracle)
    check_state(ours, theirs)
    check_weights(model, bases)


@pytest.mark.parametrize("reason", ["SPARSEFT_KERNELS", "GPU"])
def test_without_the_kernel_torch_updates(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where plain torch is asked for, and on a GPU that Triton has no code for."""
    monkeypatch.setattr(SparseAdamW, "kernel_devices", frozenset({"cpu"}))
    if reason == "GPU":
        monkeypatch.setattr(dispatch, "gpu_knows", lambda device, dtype: False)
    else:
        monkeypatch.setenv("SPARSEFT_KERNELS", "reference")
    model = zoo()
    oracle, bases = copy.deepcopy(model), bases_of(model)
    ours, theirs = SparseAdamW(trained(model), lr=1e-2), torch.optim.AdamW(trained(oracle), lr=1e-2)
    run(model, ours, range(2))
    run(oracle, theirs, range(2))
    assert not ours._plan.tables
    check_alike(model, oracle)
    check_weights(model, bases)


@pytest.mark.parametrize("kind", ["rows", "columns", "blocks", "grid"])
def test_deltas_of_several_chunks_and_gradients_in_another_layout(kind: str) -> None:
    """Larger than what one program of the kernel updates; (out, in) = (150, 90)."""
    torch.manual_seed(0)
    index: Any = {"rows": torch.randperm(150)[:60], "columns": torch.randperm(90)[:40]}.get(kind)
    if kind == "grid":
        index = torch.randperm(150)[:80], torch.randperm(90)[:70]
    if index is None:
        index = torch.cartesian_prod(torch.arange(5), torch.arange(3))[torch.randperm(15)]  # of 32: cut on both sides
    layer = SparseLinear.wrap(nn.Linear(90, 150).to(torch.bfloat16))
    layer.add_pattern(kind, index, 32 if kind == "blocks" else None)
    oracle, bases = copy.deepcopy(layer), bases_of(layer)
    assert layer.delta.numel() > 2 * 2048
    x = torch.randn(7, 90, dtype=torch.bfloat16)
    for one, cls in ((layer, SparseAdamW), (oracle, torch.optim.AdamW)):
        optimizer = cls([one.delta], lr=1e-2)
        for _ in range(3):
            with torch.no_grad():
                one.weight.copy_(bases[""])  # the same input to both: one rounding apart, gradients would differ
            one.patterns[kind].written_version = one.delta._version
            one(x).float().square().sum().backward()
            if one.delta.dim() == 2:
                one.delta.grad = one.delta.grad.t().contiguous().t()
            optimizer.step()
            optimizer.zero_grad()
    check_alike(layer, oracle)
    check_weights(layer, bases)


def test_groups_schedulers_and_missing_gradients() -> None:
    """Two groups of other settings, rates that change every step, and parameters that have no gradient in some."""
    model = zoo(torch.bfloat16)
    oracle, bases = copy.deepcopy(model), bases_of(model)
    optimizers: list[torch.optim.Optimizer] = []
    for m, cls in ((model, SparseAdamW), (oracle, torch.optim.AdamW)):
        held = trained(m)
        optimizer = cls([{"params": held[::2], "lr": 3e-2, "weight_decay": 0.3}], lr=1e-2, betas=(0.8, 0.95), eps=1e-6)
        optimizer.add_param_group({"params": held[1::2], "betas": (0.5, 0.9), "weight_decay": 0.0, "eps": 1e-4})
        optimizers.append(optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        for step in range(11):
            give_gradients(m, step, skip=3)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    check_alike(model, oracle)
    check_state(*optimizers)
    check_weights(model, bases)
    assert len({float(state["step"]) for state in optimizers[0].state.values()}) > 1


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    model = zoo()
    optimizer = SparseAdamW(trained(model), lr=1e-2, weight_decay=0.5)
    run(model, optimizer, range(2))
    before = [p.detach().clone() for p in trained(model)]
    for p in trained(model):
        p.grad = None
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, trained(model), strict=True))


@pytest.mark.parametrize("first", ["ours", "torch", "torch_fused"])
def test_state_dicts_go_both_ways_in_the_middle_of_a_run(first: str) -> None:
    make = {
        "ours": lambda m: SparseAdamW(trained(m), lr=1e-2),
        "torch": lambda m: torch.optim.AdamW(trained(m), lr=1e-2),
        "torch_fused": lambda m: torch.optim.AdamW(trained(m), lr=1e-2, fused=True),
    }
    model = zoo()
    oracle, bases = copy.deepcopy(model), bases_of(model)
    run(oracle, make["torch"](oracle), range(8))
    optimizer = make[first](model)
    run(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = make["torch" if first == "ours" else "ours"](model)
    other.load_state_dict(torch.load(file))
    run(model, other, range(4, 8))
    check_alike(model, oracle)
    check_weights(model, bases)


@pytest.mark.parametrize("kind", ["rows", "columns", "blocks", "grid"])
def test_reselection_moves_moments_and_the_tables_follow(kind: str) -> None:
    others = {"rows": [21, 3, 4], "columns": [2, 9], "blocks": [[0, 0], [5, 2], [5, 3], [1, 1]]}
    others["grid"] = [21, 3, 4, -3, -10]
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": layer_of(kind), "b": layer_of(kind, conv=True)})
    oracle, bases = copy.deepcopy(model), bases_of(model)
    optimizers = [SparseAdamW(trained(model), lr=1e-2), torch.optim.AdamW(trained(oracle), lr=1e-2)]
    for m, optimizer in zip((model, oracle), optimizers, strict=True):
        run(m, optimizer, range(3))
        for layer in sparse_layers(m).values():
            source = swap(layer, kind, torch.tensor(others[kind]))
            move_moments(optimizer, layer.patterns[kind], source)
        run(m, optimizer, range(3, 6))
    check_alike(model, oracle)
    check_state(*optimizers)
    check_weights(model, bases)
    assert model["a"].patterns[kind].inactive is not None


def replace_weight(model: nn.Module, optimizer: Any) -> None:
    model["rows"].weight = nn.Parameter(model["rows"].weight.detach().clone(), requires_grad=False)


def move_data(tensor: Tensor) -> None:
    tensor.data = tensor.data.clone()


def state_of(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    return optimizer.state[model["rows"].delta]


def replace_state(model: nn.Module, optimizer: Any) -> None:
    optimizer.state[model["rows"].delta] = {k: v.clone() for k, v in state_of(model, optimizer).items()}


def take_out_and_put_back(model: nn.Module, optimizer: Any) -> None:
    model["rows"].install(model["rows"].install({}))


def add_group(model: nn.Module, optimizer: Any) -> None:
    torch.manual_seed(1)
    model["new"] = layer_of("columns")
    optimizer.add_param_group({"params": [model["new"].delta], "lr": 0.1})


def swap_parameters(model: nn.Module, optimizer: Any) -> None:
    held = optimizer.param_groups[0]["params"]
    held[0], held[1] = held[1], held[0]


def index_in_place(model: nn.Module, optimizer: Any) -> None:
    """As a state dict is loaded: these entries' own base values come with it."""
    layer = model["rows"]
    layer.restore_base()
    layer.rows.index.copy_(torch.tensor([1, 2, 0]))
    layer.rows._locate()
    layer.rows.base_values.copy_(layer.weight.detach()[layer.rows.index])


def stand_beside(model: nn.Module) -> None:
    layer = model["rows"]
    patterns = layer.install({})
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear.weight, linear.bias = layer.weight, layer.bias
    model["rows"] = BesideLinear.wrap(linear)
    model["rows"].install(patterns)


MOVES = {
    "weight.data": lambda model, _: move_data(model["rows"].weight),
    "another weight": replace_weight,
    "delta.data": lambda model, _: move_data(model["rows"].delta),
    "moment": lambda m, o: state_of(m, o).update(exp_avg=state_of(m, o)["exp_avg"].clone()),
    "moment.data": lambda m, o: move_data(state_of(m, o)["exp_avg_sq"]),
    "count": lambda m, o: state_of(m, o).update(step=torch.tensor(7.0)),
    "state": replace_state,
    "state forgotten": lambda m, o: o.state.pop(m["rows"].delta),
    "optimizer's state loaded": lambda _, o: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "model's state loaded": lambda m, _: m.load_state_dict(copy.deepcopy(m.state_dict())),
    "index in place": index_in_place,
    "another dtype": lambda m, _: m.to(torch.bfloat16),
    "another order": lambda m, _: m["rows"].permute(rows=torch.arange(OUT).roll(5)),
    "patterns out and in again": take_out_and_put_back,
    "a second pattern": lambda m, _: m["columns"].add_pattern("rows", [1]),
    "beside": lambda m, _: stand_beside(m),
    "another group": add_group,
    "parameters in another order": swap_parameters,
}


@pytest.mark.parametrize("way", MOVES)
def test_the_step_follows_whatever_moves(way: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.ModuleDict({kind: layer_of(kind) for kind in ("rows", "columns", "blocks")})
    oracle = copy.deepcopy(model)
    ours, theirs = SparseAdamW(trained(model), lr=1e-2), torch.optim.AdamW(trained(oracle), lr=1e-2)
    for m, optimizer in ((model, ours), (oracle, theirs)):
        run(m, optimizer, range(2))
        plans = [ours._plan]
        run(m, optimizer, range(2, 4))
        plans.append(ours._plan)
        MOVES[way](m, optimizer)
        run(m, optimizer, range(4, 6))
        plans.append(ours._plan)
        if m is model:
            assert plans[0] is plans[1]  # made once
            assert plans[1] is not plans[2] or not BY_KERNEL
    check_alike(model, oracle)
    for (name, layer), twin in zip(sparse_layers(model).items(), sparse_layers(oracle).values(), strict=True):
        torch.testing.assert_close(layer.weight, twin.weight, msg=name)
        found = layer.weight.detach().clone()
        layer.restore_base()
        layer.write_back()
        assert torch.equal(found, layer.weight), name


def test_a_layer_that_died_leaves_a_plain_parameter() -> None:
    """Nor does the optimizer keep it alive."""
    model = nn.ModuleDict({"a": layer_of("rows"), "b": layer_of("rows")})
    optimizer = SparseAdamW(trained(model), lr=1e-2)
    run(model, optimizer, range(2))
    delta, weight = model["b"].delta, model["b"].weight
    died = weakref.ref(model["b"])
    before, values = weight.detach().clone(), delta.detach().clone()
    del model["b"]
    gc.collect()
    assert died() is None
    delta.grad = torch.ones_like(delta)
    run(model, optimizer, range(2, 3))
    assert torch.equal(weight, before) and not torch.equal(delta, values)
    last = weakref.ref(model["a"].weight)
    del model
    gc.collect()
    assert last() is None


class Operators(TorchDispatchMode):
    """Counts what torch is asked to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class Unseen:
    """A kernel whose launches, which the interpreter makes of torch's operators, are not counted."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            with _disable_current_modes():
                self.kernel[grid](*args, **options)

        return launch


def test_a_step_makes_no_host_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor, by the kernel, does it ask torch for anything: nothing is read, allocated or sent that did not change."""
    model: nn.Module = nn.ModuleDict({kind: layer_of(kind) for kind in ("rows", "run", "columns")})
    model["blocks"] = SparseLinear.wrap(nn.Linear(16, 16).to(torch.bfloat16))
    model["blocks"].add_pattern("blocks", [[0, 0], [3, 1]], SIZE)
    if BY_KERNEL:
        for name in ("_count_kernel", "_adamw_kernel"):
            monkeypatch.setattr(adamw_triton, name, Unseen(getattr(adamw_triton, name)))
    optimizer = SparseAdamW(trained(model), lr=1e-2)
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.full((), 2.0)
    give_gradients(model, 0)
    optimizer.step()
    seen = {}
    for name, rate in (("the same", 1e-2), ("another rate", 2e-2)):
        optimizer.param_groups[0]["lr"] = rate
        with Operators() as operators:
            optimizer.step()
        seen[name] = [each for each in operators.seen if not each.startswith("profiler::")]
    if BY_KERNEL:
        assert seen["the same"] == []
        assert set(seen["another rate"]) <= {"aten::lift_fresh", "aten::detach", "aten::copy_"}
    else:
        assert "aten::_fused_adamw_" in seen["the same"]
    waits = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::is_nonzero"}
    assert not waits & {name.partition(".")[0] for name in seen["the same"]}


def with_others(dtype: torch.dtype = torch.float32) -> nn.Module:
    """All layers, and parameters that torch's fused AdamW cannot take."""
    model = zoo(dtype)
    model["others"] = nn.ParameterList(
        [torch.randn(3, 2, dtype=torch.complex64), nn.Parameter(torch.randn(4, 6)[:, ::2].detach())]
    )
    assert not model["others"][1].is_contiguous()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flag_stops_a_step_and_gradients_are_scaled_back(dtype: torch.dtype) -> None:
    model = with_others(dtype)
    oracle = copy.deepcopy(model)
    ours, theirs = SparseAdamW(trained(model), lr=1e-2), torch.optim.AdamW(trained(oracle), lr=1e-2)
    bases = bases_of(model)
    ours.found_inf, ours.grad_scale = torch.zeros((), dtype=torch.float32), torch.tensor([4.0])
    for step in range(8):
        stops = step in (0, 3, 4)
        give_gradients(model, step, skip=3 if step > 4 else 0)
        for parameter in trained(model):
            if parameter.grad is not None:
                parameter.grad *= 4
                if stops:
                    parameter.grad.fill_(float("nan"))
        ours.found_inf.fill_(float(stops))
        before = copy.deepcopy((list(model.parameters()), ours.state_dict()["state"]))
        ours.step()
        if stops:
            assert all(torch.equal(a, b) for a, b in zip(before[0], model.parameters(), strict=True))
            after = ours.state_dict()["state"]
            for key, state in before[1].items():
                assert all(torch.equal(state[name], after[key][name]) for name in state)
        else:
            run(oracle, theirs, range(step, step + 1), skip=3 if step > 4 else 0)
    check_alike(model, oracle)
    check_state(ours, theirs)
    check_weights(model, bases)
    assert {float(state["step"]) for state in ours.state_dict()["state"].values()} <= {3.0, 4.0, 5.0}


def test_a_stopped_step_still_writes_what_was_changed_by_hand() -> None:
    model = nn.ModuleDict({"a": layer_of("rows"), "b": layer_of("blocks")})
    bases = bases_of(model)
    optimizer = SparseAdamW(trained(model), lr=1e-2)
    optimizer.found_inf = torch.zeros(1)
    run(model, optimizer, range(2))
    with torch.no_grad():
        model["a"].delta.add_(1.0)
    optimizer.found_inf = torch.ones(1)
    run(model, optimizer, range(2, 3))
    check_weights(model, bases)
    assert not model["a"].rows.stale


def test_a_grad_scaler_treats_it_as_torchs_fused_one() -> None:
    model = nn.ModuleDict({"a": layer_of("rows"), "b": layer_of("columns")})
    oracle, x = copy.deepcopy(model), torch.randn(5, IN)
    for m, make in ((model, SparseAdamW), (oracle, functools.partial(torch.optim.AdamW, fused=True))):
        optimizer, scaler = make(trained(m), lr=1e-2), torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(5):
            loss = m["a"](x).square().mean() + m["b"](x).square().mean()
            scaler.scale(loss).backward()
            if step == 2:
                m["a"].delta.grad[0, 0] = float("inf")
            if step == 3:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == 4.0
        assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}
        assert getattr(optimizer, "found_inf", None) is None
    check_alike(model, oracle)


def test_counts_of_steps_are_saved_as_torchs_are() -> None:
    model = zoo()
    optimizer = SparseAdamW(trained(model), lr=1e-2)
    run(model, optimizer, range(2))
    saved = optimizer.state_dict()["state"]
    run(model, optimizer, range(2, 3))
    for state in saved.values():
        step = state["step"]
        assert step.dtype == torch.float32 and step.device.type == "cpu" and step.shape == () and step == 2
        assert step.untyped_storage().nbytes() == 4  # no view: a file would hold what it is a view of


def test_experts_train_their_slices() -> None:
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_experts_per_tok=2, num_local_experts=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    experts = "model.layers.0.mlp.experts"
    selection = Selection(
        {
            f"{experts}.down_proj.1": {"columns": [3, 70, 4]},
            f"{experts}.down_proj.3": {"columns": [0]},
            f"{experts}.gate_up_proj.2": {"rows": [90, 1]},
            "model.layers.0.self_attn.o_proj": {"columns": [1, 2]},
        }
    )
    sparseft.attach(model, sparseft.S2FTConfig(), selection=selection)
    twin = copy.deepcopy(model)
    ids = torch.randint(3, 96, (2, 10))
    for m, cls in ((model, SparseAdamW), (twin, torch.optim.AdamW)):
        optimizer = cls(sparseft.trainable_parameters(m).values(), lr=1e-2)
        for _ in range(4):
            m(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name, rtol=2e-2, atol=2e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    write_back(sparse_layers(model).values())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_copies_of_a_model_and_its_optimizer_go_their_own_way() -> None:
    model = zoo()
    bases = bases_of(model)
    optimizer = SparseAdamW(trained(model), lr=1e-2)
    run(model, optimizer, range(3))
    twin, copied = copy.deepcopy((model, optimizer))
    run(model, optimizer, range(3, 6))
    before = [p.detach().clone() for p in model.parameters()]
    run(twin, copied, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    check_weights(twin, bases)


def test_closures_hooks_and_clipping() -> None:
    model = nn.ModuleDict({"a": layer_of("rows"), "b": layer_of("columns")})
    oracle = copy.deepcopy(model)
    x = torch.randn(5, IN)
    for m, cls in ((model, SparseAdamW), (oracle, torch.optim.AdamW)):
        optimizer = cls(trained(m), lr=1e-2)

        def closure(m: nn.Module = m, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = m["a"](x).square().sum() + m["b"](x).square().sum()
            loss.backward()
            nn.utils.clip_grad_norm_(trained(m), 1.0)
            return loss

        losses = [optimizer.step(closure).item() for _ in range(4)]
        assert losses == sorted(losses, reverse=True)
    check_alike(model, oracle)


def test_the_hook_after_the_step_writes_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo()
    calls: list[SparseLinear] = []
    write_back = SparseLinear.write_back
    monkeypatch.setattr(SparseLinear, "write_back", lambda layer: (calls.append(layer), write_back(layer))[1])
    run(model, SparseAdamW(trained(model), lr=1e-2), range(1))
    held = [layer for layer in sparse_layers(model).values() if layer.patterns]
    grids = [model["grids"], model["conv_grids"]]
    several = [layer for layer in held if len(layer.patterns) > 1 or layer in grids]  # the kernel leaves them to it
    assert calls == (several if BY_KERNEL else held)
    calls.clear()
    model["rows"](torch.randn(2, IN))
    assert not calls  # nor does the forward pass


def test_a_delta_changed_by_hand_is_written_too() -> None:
    model = nn.ModuleDict({"a": layer_of("rows"), "b": layer_of("rows")})
    bases = bases_of(model)
    optimizer = SparseAdamW(trained(model), lr=1e-2)
    with torch.no_grad():
        model["a"].delta.add_(1.0)
    give_gradients(model, 0)
    model["a"].delta.grad = None
    optimizer.step()
    assert not torch.equal(model["a"].weight, bases["a"])
    check_weights(model, bases)


def test_a_backward_pass_over_changed_weights_is_still_refused() -> None:
    layer = layer_of("rows")
    optimizer = SparseAdamW([layer.delta], lr=1e-2)
    loss = layer(torch.randn(3, IN, requires_grad=True)).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "capturable", "differentiable"])
def test_what_it_cannot_do_is_refused(option: str) -> None:
    layer = layer_of("rows")
    with pytest.raises(UserError, match=option):
        SparseAdamW([{"params": [layer.delta], option: True}])
    optimizer = SparseAdamW([layer.delta])
    state = optimizer.state_dict()
    state["param_groups"][0][option] = True
    with pytest.raises(UserError, match=option):
        optimizer.load_state_dict(state)


def test_a_tensor_as_learning_rate_and_sparse_gradients_are_refused() -> None:
    layer = layer_of("rows")
    with pytest.raises(UserError, match="lr as a number"):
        SparseAdamW([layer.delta], lr=torch.tensor(1e-3))
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        SparseAdamW(embedding.parameters()).step()


@pytest.mark.skipif(BY_KERNEL, reason="this is the interpreter's process")
def test_the_kernel_does_the_same_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="needs triton")
    env = os.environ | {"SPARSEFT_TEST_KERNEL": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", __file__]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_the_gpu_as_torch_does(dtype: torch.dtype) -> None:
    model = zoo(dtype).cuda()
    oracle, bases = copy.deepcopy(model), bases_of(model)
    ours = SparseAdamW(trained(model), lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.AdamW(trained(oracle), lr=1e-2, weight_decay=0.1)
    run(model, ours, range(100), skip=5)
    run(oracle, theirs, range(100), skip=5)
    check_alike(model, oracle, ON_A_DEVICE)
    check_state(ours, theirs, ON_A_DEVICE)
    check_weights(model, bases)
    ((table, places),) = ours._plan.tables
    assert len(places) > 3 and {constants[0] for constants, _ in table.launches} == {0, 1, 2}  # the kinds


@pytest.mark.gpu
def test_on_the_gpu_a_step_takes_few_launches() -> None:
    """As many for sixteen layers as for two: one for each kind."""
    counts = []
    for copies in (1, 8):
        model = nn.ModuleList(layer_of(kind) for kind in ("rows", "columns") for _ in range(copies)).cuda()
        optimizer = SparseAdamW(trained(model), lr=1e-2)
        run(model, optimizer, range(2))
        give_gradients(model, 2)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
            torch.cuda.synchronize()
        counts.append(sum(event.count for event in profile.key_averages() if event.key == "_adamw_kernel"))
    assert counts == [2, 2]


@pytest.mark.gpu
def test_on_the_gpu_no_step_waits() -> None:
    """Nor where gradients lie elsewhere and rates are others."""
    model = zoo().cuda()
    optimizer = SparseAdamW(trained(model), lr=1e-2)
    optimizer.found_inf = torch.zeros((), device="cuda")
    run(model, optimizer, range(2))
    give_gradients(model, 2)
    optimizer.param_groups[0]["lr"] = 2e-2
    for layer in [layer for layer in sparse_layers(model).values() if len(layer.patterns) > 1]:
        for pattern in layer.patterns.values():  # torch's, and a write-back that looks at the indices of cut blocks
            pattern.delta.grad = None
    torch.cuda.synchronize()
    with waiting_is_an_error():
        optimizer.step()


@pytest.mark.gpu
def test_on_the_gpu_a_step_can_be_captured() -> None:
    """Replays count steps, and heed the flag, by what the device holds at the time."""
    model: nn.Module = nn.ModuleDict({kind: layer_of(kind) for kind in ("rows", "columns", "blocks")}).cuda()
    oracle, bases = copy.deepcopy(model), bases_of(model)
    ours, theirs = SparseAdamW(trained(model), lr=1e-2), torch.optim.AdamW(trained(oracle), lr=1e-2)
    ours.found_inf = torch.zeros((), device="cuda")
    give_gradients(model, 0)
    ours.step()
    run(oracle, theirs, range(1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for step in range(1, 6):
        give_gradients(oracle, step)
        for parameter, twin in zip(trained(model), trained(oracle), strict=True):
            parameter.grad.copy_(twin.grad)
        ours.found_inf.fill_(float(step == 3))
        graph.replay()
        if step != 3:
            theirs.step()
    check_alike(model, oracle)
    check_state(ours, theirs)
    check_weights(model, bases)

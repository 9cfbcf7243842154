"""Switching between many adapters of one base: which bits it leaves, what work it is, and where adapters wait."""

from __future__ import annotations

import functools
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sparseft
from sparseft.adapters.state import state_of
from sparseft.config import BUNDLED_ROOT
from sparseft.errors import RunError, UserError
from sparseft.layers import SparseLinear, sparse_layers
from sparseft.models.decoder import base_parameters
from sparseft.selection.selection import Selection
from support import nf4
from support.adapters import METHODS, build, randomise, reselected, saved

TENSORS = "adapter_model.safetensors"
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
# one with rows and blocks of one weight, whose sum is rounded once
OVERLAPPING = {
    "llama": "model.layers.0.mlp.down_proj",
    "gpt2": "transformer.h.0.mlp.c_proj",
    "phi3": "model.layers.1.mlp.gate_up_proj",
    "mixtral": "model.layers.1.mlp.experts.down_proj.2",
}


def bits(model: Any) -> dict[str, Tensor]:
    """The weights that a checkpoint of the base holds, as whole numbers: -0.0 and NaNs are told apart."""
    found = {name: p.detach().clone() for name, p in base_parameters(model)}
    return {name: tensor.view(BITS[tensor.dtype]) for name, tensor in found.items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@torch.no_grad()
def odd_base(kind: str, dtype: torch.dtype) -> Any:
    """A base with values in its linears that only a copy of bits gives back: -0.0, infinities, NaNs with payloads."""
    model = build(kind, dtype)
    integers = BITS[dtype]
    high = {torch.float32: 0x7FC0_0000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}[dtype]
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and ("proj" in name or "c_" in name):
            flat = parameter.view(-1)
            place = torch.randperm(len(flat), generator=generator)[: len(flat) // 8]
            negative, infinite, payload = place.chunk(3)
            flat[negative] = -0.0
            flat[infinite] = float("inf")
            payloads = torch.randint(1, 60, (len(payload),), generator=generator)
            flat.view(integers)[payload] = (high + payloads).to(integers)
    return model


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("llama", torch.float16),
        ("gpt2", torch.bfloat16),
        ("phi3", torch.bfloat16),
        pytest.param("mixtral", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_a_thousand_switches_leave_every_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Against the same adapter on a fresh model each time a sample is taken, and the base itself."""

    def make() -> Any:
        return odd_base(kind, dtype)

    base = bits(make())
    model = reselected(make())
    for seed, (name, config) in enumerate(METHODS.items()):
        folder = saved(make, tmp_path / name, config(seed), seed)
        sparseft.load_adapter(model, folder, name, keep=("device", "host", "disk")[seed % 3], activate=False)
    both = Selection({OVERLAPPING[kind]: {"rows": [0, 3], "blocks": [[0, 0], [1, 1]]}}, block_size=32)
    saved(make, tmp_path / "both", sparseft.SylvaConfig(), 5, both)
    sparseft.load_adapter(model, tmp_path / "both", "both", keep="disk", activate=False)
    sparseft.fuse(model, {"s2ft": 1.0, "sylva": -0.5, "both": 0.25, "default": 0.7}, "fused")
    fresh: dict[str | None, dict[str, Tensor]] = {None: base}
    for name in ("default", *METHODS, "both", "fused"):
        folder = sparseft.save_adapter(model, tmp_path / f"{name}-saved", name)
        fresh[name] = bits(sparseft.load_adapter(make(), folder))
        assert not same(fresh[name], base)

    draw = random.Random(0)
    names = list(fresh)
    for number in range(1000):
        name = draw.choice(names)
        sparseft.set_adapter(model, name)
        if number % 23 == 0:
            assert same(bits(model), fresh[name]), (number, name)
    for name in names:
        sparseft.set_adapter(model, name)
        assert same(bits(model), fresh[name]), name
    assert same(bits(sparseft.detach(model)), base)


def test_permuted_layout_stays_right(tmp_path: Path) -> None:
    """An adapter whose layout moved the weights' rows and columns, beside others that want them as they were."""
    config = sparseft.S2FTConfig(sparsity=0.8, importance="random", layout="permuted", roles=["o", "down", "up"])
    model = randomise(sparseft.attach(build("llama"), config), 1)
    assert any(layer.is_permuted for layer in sparse_layers(model).values())
    ids = torch.arange(3, 15)[None]
    folder = sparseft.save_adapter(model, tmp_path / "default")
    expected = {None: build("llama"), "default": sparseft.load_adapter(build("llama"), folder)}
    for seed, name in enumerate(METHODS):
        folder = saved(lambda: build("llama"), tmp_path / name, METHODS[name](seed), seed)
        expected[name] = sparseft.load_adapter(build("llama"), folder)
        sparseft.load_adapter(model, folder, name, activate=False)
    draw = random.Random(1)
    with torch.no_grad():
        for _ in range(60):
            name = draw.choice(list(expected))
            sparseft.set_adapter(model, name)
            torch.testing.assert_close(model(ids).logits, expected[name](ids).logits, atol=1e-4, rtol=1e-4)
    assert same(bits(sparseft.detach(model)), bits(build("llama")))


# ---- what work it is ----


class Operations(TorchDispatchMode):
    """Counts what torch is asked to compute, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_work_does_not_grow_with_the_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {name: saved(lambda: build("llama"), tmp_path / name, METHODS[name](1), 1) for name in METHODS}
    one = {"model.layers.0.self_attn.q_proj": {"rows": [1]}, "model.layers.1.self_attn.q_proj": {"rows": [2]}}
    folders["small"] = saved(lambda: build("llama"), tmp_path / "small", sparseft.S2FTConfig(), 3, Selection(one))
    touched: list[SparseLinear] = []
    install = SparseLinear.install
    monkeypatch.setattr(SparseLinear, "install", lambda layer, new: touched.append(layer) or install(layer, new))

    def work(count: int) -> dict[str, tuple[Counter[str], int]]:
        model = build("llama")
        found = {}
        for number in range(count):
            with Operations() as loading:
                name = list(folders)[number % 5]
                sparseft.load_adapter(model, folders[name], f"{name}{number}", activate=False)
        found["load"] = loading.counts, 0
        for _ in range(2):  # an adapter's patterns are made when it is first active
            for old, new in (("s2ft0", "sylva1"), ("sylva1", "small4"), ("small4", None), (None, "paca2")):
                sparseft.set_adapter(model, old)
                touched.clear()
                with Operations() as switching:
                    sparseft.set_adapter(model, new)
                found[f"{old}, {new}"] = switching.counts, len(touched)
        return found

    few, many = work(5), work(200)
    assert few == many
    assert few["small4, None"][1] == 2
    assert few["sylva1, small4"][1] == 14  # all linears of two layers, those of `small` among them
    assert sum(few["small4, None"][0].values()) < 20


def test_an_unused_adapter_costs_no_pattern(tmp_path: Path) -> None:
    """Loading leaves the model as it is: nothing is converted and the active adapter stays."""
    folder = saved(lambda: build("llama"), tmp_path / "a", METHODS["s2ft"](0), 1)
    model = build("llama")
    before = bits(model), {name: type(module) for name, module in model.named_modules()}
    sparseft.load_adapter(model, folder, "a", activate=False)
    assert same(bits(model), before[0]) and {n: type(m) for n, m in model.named_modules()} == before[1]
    assert sparseft.trainable_parameters(model) == {}
    sparseft.load_adapter(model, folder, "b")
    sparseft.load_adapter(model, folder, "b", activate=False)  # the active one anew stays active
    assert sparseft.trainable_parameters(model)
    sparseft.load_adapter(model, folder, "c", activate=False)
    written = bits(model)
    sparseft.set_adapter(model, "c")
    assert same(bits(model), written)
    with pytest.raises(UserError, match="no adapter is called 'd'"):
        sparseft.set_adapter(model, "d")
    assert same(bits(sparseft.merge(model)), written)


# ---- training goes on ----


def batch(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("keep", ["device", "host", "disk"])
@pytest.mark.parametrize("optimizer", ["AdamW", "SparseAdamW"])
def test_an_optimizer_goes_on_after_switching(keep: str, optimizer: str, tmp_path: Path) -> None:
    """The deltas that it holds are the adapter's, wherever that one waited; the file it came from stays as it was."""
    make = sparseft.SparseAdamW if optimizer == "SparseAdamW" else torch.optim.AdamW
    a, b = (saved(lambda: build("llama"), tmp_path / name, METHODS[name](0), 1) for name in ("sylva", "paca"))
    content = (a / TENSORS).read_bytes()
    results = []
    for switching in (False, True):
        model = sparseft.load_adapter(build("llama"), a, "a", keep=keep)
        sparseft.load_adapter(model, b, "b", keep=keep, activate=False)
        trained = make(list(sparseft.trainable_parameters(model).values()), lr=1e-2)
        for step in range(4):
            if switching:
                sparseft.set_adapter(model, "b")
                with torch.inference_mode():  # switched within it, parameters must still be of use outside
                    model(**batch(step))
                    sparseft.set_adapter(model, None)
                    sparseft.set_adapter(model, "a")
            model(**batch(step)).loss.backward()
            trained.step()
            trained.zero_grad()
        sparseft.set_adapter(model, "b")
        sparseft.save_adapter(model, tmp_path / f"trained-{switching}", "a")  # while it waits
        sparseft.set_adapter(model, "a")
        results.append(bits(model))
    assert same(*results)
    assert (tmp_path / "trained-True" / TENSORS).read_bytes() == (tmp_path / "trained-False" / TENSORS).read_bytes()
    assert not same(results[0], bits(sparseft.load_adapter(build("llama"), a)))
    assert (a / TENSORS).read_bytes() == content


class Elsewhere(Tensor):
    """Says that it lies on another device than the model."""

    device = torch.device("meta")  # type: ignore[assignment]


@pytest.mark.parametrize("optimizer", ["loop", "fused", "SparseAdamW", "averaged"])
@pytest.mark.parametrize("keep", ["host", "disk"])
def test_what_was_trained_on_a_device_waits_on_the_host(keep: str, optimizer: str, tmp_path: Path) -> None:
    """Fused steps, and averages that are put into `.data` ahead of an evaluation, leave no trace in versions."""
    folder = saved(lambda: build("llama"), tmp_path / "a", METHODS["s2ft"](0), 1)
    model = sparseft.load_adapter(build("llama"), folder, "a", keep=keep)
    waiting = state_of(model).kind.adapters["a"].waiting
    for kinds in waiting.values():
        for kind, value in kinds.items():
            kinds[kind] = value._replace(delta=value.delta.clone().as_subclass(Elsewhere))
    deltas = list(sparseft.trainable_parameters(model).values())
    sparseft.set_adapter(model, None)
    assert all(isinstance(value.delta, Elsewhere) for kinds in waiting.values() for value in kinds.values())
    sparseft.set_adapter(model, "a")
    for delta in deltas:
        delta.data = delta.data.as_subclass(Tensor).clone()  # as on its way to a device
    if optimizer == "averaged":
        for delta in deltas:
            delta.data.fill_(0.05)
        model.train()
    else:
        makers = {"SparseAdamW": sparseft.SparseAdamW, "fused": functools.partial(torch.optim.AdamW, fused=True)}
        trained = makers.get(optimizer, torch.optim.AdamW)(deltas, lr=1e-2)
        model(**batch(0)).loss.backward()
        trained.step()
    expected = bits(model)
    assert not same(expected, bits(sparseft.load_adapter(build("llama"), folder)))
    sparseft.set_adapter(model, None)
    sparseft.set_adapter(model, "a")
    assert same(bits(model), expected)


def test_loading_the_same_entries_keeps_the_optimizer_valid(tmp_path: Path) -> None:
    folder = saved(lambda: build("llama"), tmp_path / "a", METHODS["s2ft"](0), 1)
    other = saved(lambda: build("llama"), tmp_path / "b", METHODS["s2ft"](0), 2)
    model = sparseft.load_adapter(build("llama"), folder, "a", keep="disk")
    held = list(sparseft.trainable_parameters(model).values())
    sparseft.set_adapter(model, None)
    sparseft.load_adapter(model, other, "a", keep="disk")
    assert all(one is two for one, two in zip(held, sparseft.trainable_parameters(model).values(), strict=True))
    assert same(bits(model), bits(sparseft.load_adapter(build("llama"), other)))


def test_loading_the_same_entries_is_loading_that_adapter(tmp_path: Path) -> None:
    """Also where it starts from other weights (`method.residual`), and what its description says."""
    selection = Selection({OVERLAPPING["llama"]: {"columns": [1, 5]}})
    ids = torch.arange(3, 20)[None]

    def attached(residual: bool) -> Any:
        return sparseft.attach(nf4.load(BUNDLED_ROOT / "tiny"), sparseft.S2FTConfig(residual=residual), selection)

    model = attached(True)
    expected = model(ids).logits
    sparseft.save_adapter(model, tmp_path / "residual")
    other = attached(False)
    assert not torch.equal(other(ids).logits, expected)
    assert torch.equal(sparseft.load_adapter(other, tmp_path / "residual")(ids).logits, expected)
    paca = sparseft.attach(build("llama"), sparseft.PacaConfig(), selection)
    sparseft.save_adapter(paca, tmp_path / "paca")
    model = sparseft.attach(build("llama"), sparseft.S2FTConfig(), selection)
    sparseft.save_adapter(sparseft.load_adapter(model, tmp_path / "paca"), tmp_path / "again")
    found, wanted = (json.loads((tmp_path / each / "adapter_config.json").read_text()) for each in ("again", "paca"))
    assert found == wanted


# ---- where adapters wait ----


def test_disk_maps_the_file(tmp_path: Path) -> None:
    folder = saved(lambda: build("llama"), tmp_path / "a", METHODS["s2ft"](0), 1)
    model = build("llama")
    sparseft.load_adapter(model, folder, "host", keep="host", activate=False)
    if Path("/proc/self/maps").exists():
        assert str(folder) not in Path("/proc/self/maps").read_text()
    sparseft.load_adapter(model, folder, "disk", keep="disk", activate=False)
    if Path("/proc/self/maps").exists():
        assert str(folder) in Path("/proc/self/maps").read_text()


def test_a_file_that_was_altered_is_refused(tmp_path: Path) -> None:
    folder = saved(lambda: build("llama"), tmp_path / "a", METHODS["s2ft"](0), 1)
    model = build("llama")
    for keep in ("host", "disk"):
        sparseft.load_adapter(model, folder, keep, keep=keep, activate=False)
    sparseft.set_adapter(model, "host")
    written = bits(model)
    expected = (folder / TENSORS).read_bytes()
    (tmp_path / "copy").write_bytes(expected[:-4] + b"\0\0\0\0")
    os.replace(folder / TENSORS, tmp_path / "old")  # another file in its place is none of its business
    os.replace(tmp_path / "copy", folder / TENSORS)
    sparseft.set_adapter(model, "disk")
    assert same(bits(model), written)
    with pytest.raises(UserError, match="altered"):
        sparseft.load_adapter(model, folder, "new", keep="disk", activate=False)

    os.replace(tmp_path / "old", folder / TENSORS)
    sparseft.load_adapter(model, folder, "disk2", keep="disk", activate=False)
    sparseft.set_adapter(model, None)
    content = bytearray(expected)
    content[-3] ^= 4
    (folder / TENSORS).write_bytes(content)
    with pytest.raises(RunError, match="altered after the adapter was loaded"):
        sparseft.set_adapter(model, "disk2")
    assert same(bits(model), bits(build("llama")))
    sparseft.set_adapter(model, "host")
    assert same(bits(model), written)


def test_what_is_refused(tmp_path: Path) -> None:
    folder = saved(lambda: build("llama"), tmp_path / "a", METHODS["s2ft"](0), 1)
    with pytest.raises(UserError, match="keep='dsk': expected device, host, disk. Did you mean 'disk'"):
        sparseft.load_adapter(build("llama"), folder, keep="dsk")
    model = build("gpt2")
    with pytest.raises(UserError):  # nothing is left of a refused load
        sparseft.load_adapter(model, folder, keep="disk", activate=False)
    assert not hasattr(model, "_sparseft") and not model._forward_pre_hooks and "generate" not in vars(model)
    lora = sparseft.attach(build("llama"), sparseft.LoraConfig(rank=2))
    sparseft.save_adapter(lora, tmp_path / "lora")
    with pytest.raises(UserError, match="keep='disk' is for sparse adapters"):
        sparseft.load_adapter(build("llama"), tmp_path / "lora", keep="disk")


def test_peft_loads_without_becoming_active(tmp_path: Path) -> None:
    lora = sparseft.attach(build("llama"), sparseft.LoraConfig(rank=2))
    sparseft.save_adapter(lora, tmp_path / "lora")
    with torch.no_grad():
        for parameter in sparseft.trainable_parameters(lora).values():
            parameter.normal_()
    sparseft.save_adapter(lora, tmp_path / "other")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        base = build("llama")(ids).logits
        model = sparseft.load_adapter(build("llama"), tmp_path / "other", "x", activate=False)
        assert torch.equal(model(ids).logits, base)
        sparseft.set_adapter(model, "x")
        changed = model(ids).logits
        assert not torch.equal(changed, base)
        sparseft.load_adapter(model, tmp_path / "lora", "y", activate=False)
        assert torch.equal(model(ids).logits, changed)

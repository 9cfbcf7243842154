"""Sylva's statistics: padded groups against one sample at a time, recomputation, bf16, sums on disk, and what the
damping came to."""

from __future__ import annotations

import errno
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparseft
from sparseft.distributed import ranks
from sparseft.errors import RunError
from sparseft.importance import room as host_memory
from sparseft.importance.batching import WINDOW, groups_of, may_share, packed, pad_together, sees_ahead, split_samples
from sparseft.importance.hooks import Observation, observe
from sparseft.importance.kfac import FactorSettings, KroneckerFactors, block_scores, entry_importance, summary
from sparseft.importance.scores import compute_scores
from sparseft.layers.experts import opened
from sparseft.models.spec import ModelSpec
from support import experts
from support.calibration import LENGTHS, samples
from support.oracles import chosen_units


def collected(model: nn.Module, batches: Any, together: int = 0) -> KroneckerFactors:
    """The exact (dense) statistics of every linear."""
    spec = ModelSpec.of(model)
    found = KroneckerFactors(FactorSettings(num_partition=0), 0, spec.linears, torch.device("cpu"))
    observe(model, spec.linears, groups_of(model, batches, gradients=True, together=together), found, gradients=True)
    return found


def assert_same(left: KroneckerFactors, right: KroneckerFactors, rtol: float = 2e-5) -> None:
    """The same modules, sources, token counts and, relative to each matrix's largest entry, the same sums."""
    assert left.sources == right.sources
    (a, _), (b, _) = left.state(), right.state()
    assert a.keys() == b.keys() and a
    for name, value in b.items():
        peak = float(value.abs().max())
        torch.testing.assert_close(a[name], value, rtol=rtol, atol=rtol * peak, msg=lambda m, n=name: f"{n}: {m}")


def autograd(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Σ of per-sample gradients (out, in) of every linear, by plain autograd."""
    spec = ModelSpec.of(model)
    model.zero_grad()
    for batch in batches:
        model(**batch).loss.backward()
    grads = {name: model.get_submodule(name).weight.grad.float() for name in spec.linears}
    model.zero_grad()
    return {name: grad.t() if name in spec.transposed else grad for name, grad in grads.items()}


@pytest.mark.parametrize("together", [12, 24, 2048])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_padded_group_counts_as_its_samples_alone(make_model: Callable[..., Any], kind: str, together: int) -> None:
    model, batches = make_model(kind), samples()
    assert may_share(model)
    alone = collected(model, batches)
    assert_same(collected(model, batches, together), alone)
    for name, wanted in autograd(model, batches).items():
        torch.testing.assert_close(alone.sums[name], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert {h.tokens for h in (*alone.inputs.values(), *alone.gradients.values())} == {sum(LENGTHS)}


@pytest.mark.parametrize("window", [None, 4])
def test_padding_needs_no_mask_and_a_window_one_for_all_layers(window: int | None) -> None:
    """The scores are those of the samples alone, and those that transformers' own masks give."""
    import transformers

    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window,
    )  # fmt: skip
    model, batches, given = transformers.AutoModelForCausalLM.from_config(config), samples(), []
    assert may_share(model) and ModelSpec.of(model)  # which tries it once
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _m, _a, kwargs: given.append(kwargs["attention_mask"]), with_kwargs=True
        )
    together = collected(model, batches, 24)
    long = [mask for mask in given if mask is not None]
    assert len(given) == 9 and len(long) == (9 if window else 0)  # three groups
    assert len({id(mask) for mask in long}) == len(long) // 3
    assert all(mask.is_floating_point() and mask.untyped_storage().nbytes() <= 12 * 16 * 4 for mask in long)
    assert_same(together, collected(model, batches))
    for name, wanted in autograd(model, batches).items():
        torch.testing.assert_close(together.sums[name], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_a_group_goes_through_the_model_once(make_model: Callable[..., Any]) -> None:
    model, seen = make_model("llama"), []
    ModelSpec.of(model)  # which tries it once, on tokens of its own
    model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    collected(model, samples(), 24)
    assert seen == [(2, 12), (2, 9), (2, 5)]  # 12 12 | 9 7 | 5 2
    seen.clear()
    collected(model, samples(), 4)
    assert len(seen) == len(LENGTHS)  # longer than the limit: alone


def test_groups_keep_to_their_tokens_and_to_every_sample() -> None:
    every = samples(lengths=tuple(range(2, 2 + 2 * WINDOW + 5)))
    items = [sample for batch in every for sample in split_samples(batch)]
    groups = list(packed(iter(items), 100))
    for group in groups:
        longest = max(sample["input_ids"].shape[1] for sample in group)
        assert len(group) == 1 or len(group) * longest <= 100
    assert sorted(id(sample) for group in groups for sample in group) == sorted(map(id, items))
    odd = [{**items[0], "position_ids": torch.arange(2)[None]}, items[1], items[2]]
    assert [len(group) for group in packed(iter(odd), 100)] == [2, 1]  # what is not plain is not padded
    batch, kept = pad_together(items[:2])
    assert batch.keys() == {"input_ids", "labels"} and batch["labels"][0, 2] == -100
    assert kept is not None and kept.tolist() == [0, 1, 3, 4, 5]
    assert pad_together(items[:1])[1] is None


def test_left_padded_batches_are_cut_first(make_model: Callable[..., Any]) -> None:
    model, batches = make_model("qwen2"), samples(lengths=(9, 5))
    pad = functools.partial(nn.functional.pad, pad=(4, 0))
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    left = {k: torch.cat([batches[0][k], pad(batches[1][k], value=v)]) for k, v in fills.items()}
    assert_same(collected(model, [left], 2048), collected(model, batches))


def test_experts_see_one_sample_at_a_time() -> None:
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    assert not may_share(transformers.AutoModelForCausalLM.from_config(config))


def ahead(kind: str) -> Any:
    """A model whose attention sees later tokens."""
    import transformers

    sizes = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 80}
    gemma = sizes | {"num_key_value_heads": 2, "head_dim": 12}
    torch.manual_seed(0)
    config: Any
    if kind == "gemma3":
        config = transformers.Gemma3TextConfig(**gemma, use_bidirectional_attention=True)
    else:
        config = transformers.LlamaConfig(**sizes)
        config.is_causal = kind != "config"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for layer in model.model.layers if kind == "modules" else ():
        layer.self_attn.is_causal = False
    return model


@pytest.mark.parametrize("kind", ["gemma3", "config", "modules"])
def test_attention_that_sees_later_tokens_is_shown_no_padding(kind: str) -> None:
    model, batches = ahead(kind), samples()
    assert not may_share(model)
    together = collected(model, batches, 24)
    for name, wanted in autograd(
        model, [{"input_ids": b["input_ids"], "labels": b["labels"]} for b in batches]
    ).items():
        torch.testing.assert_close(together.sums[name], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_a_tower_for_images_that_sees_all_of_them_does_not_keep_text_apart() -> None:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = transformers.Gemma3TextConfig(**sizes, vocab_size=96, num_key_value_heads=2, head_dim=8)
    vision = transformers.SiglipVisionConfig(**sizes, image_size=28, patch_size=14)
    model = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )
    assert any(getattr(module, "is_causal", True) is False for module in model.modules())
    assert not sees_ahead(model)


class _Sorted(nn.Module):
    """Gives the linear inside its tokens without the last, as a router does that drops some."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.inner = linear

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        return torch.cat([self.inner(flat[:-1]), self.inner.weight.new_zeros(1, self.inner.out_features)]).view(x.shape)


def test_a_linear_that_is_not_given_the_positions_is_shown_one_sample_at_a_time(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    model.model.layers[0].mlp.register_module("extra", _Sorted(nn.Linear(48, 48, bias=False)))
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + mlp.extra(x)
    assert may_share(model)
    assert_same(collected(model, samples(), 2048), collected(model, samples()), rtol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("together", [0, 2048])
def test_recomputed_activations_are_counted_once(
    make_model: Callable[..., Any], together: int, reentrant: bool
) -> None:
    """transformers recomputes in training mode only, which calibration leaves; who recomputes anyway adds nothing."""
    model, batches = make_model("llama"), samples()
    wanted = collected(model, batches, together)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert_same(collected(model, batches, together), wanted, rtol=0)
    assert model.is_gradient_checkpointing and model.training
    model.gradient_checkpointing_disable()
    passes = []
    for layer in model.model.layers:
        plain = layer.forward

        def counted(*args: Any, plain: Any = plain, **kwargs: Any) -> Any:
            passes.append(1)
            return plain(*args, **kwargs)

        layer.forward = functools.partial(checkpoint, counted, use_reentrant=reentrant)
        if reentrant:  # takes no keyword arguments
            layer.forward = lambda x, c=counted, **kwargs: checkpoint(
                functools.partial(c, **kwargs), x, use_reentrant=True
            )
    assert_same(collected(model, batches, together), wanted, rtol=1e-6)
    forwards = 1 if together else len(batches)
    assert len(passes) == 2 * forwards * len(model.model.layers)  # each really went twice


def test_bf16_is_summed_in_fp32(make_model: Callable[..., Any]) -> None:
    """Against float64 sums over the same bf16 activations and gradients; bf16 sums would be off by 1e-2."""
    model, batches = make_model("llama", torch.bfloat16), samples(lengths=(40,) * 8)
    name = "model.layers.1.mlp.gate_proj"
    module, xs, gs = model.get_submodule(name), [], []
    found = KroneckerFactors(FactorSettings(num_partition=0), 0, {name: (80, 48)}, torch.device("cpu"))

    def both(seen: Observation) -> None:
        xs.append(seen.x.double())
        gs.append(seen.gradient.double())
        found(seen)

    observe(model, [name], groups_of(model, batches, gradients=True), both, gradients=True)
    assert module.weight.dtype == torch.bfloat16 and len(xs) == 8
    x, g = torch.cat(xs), torch.cat(gs)
    tokens = len(x)
    for value, wanted in (
        (found.inputs[name].to_dense(), x.t() @ x / tokens),
        (found.gradients[name].to_dense(), g.t() @ g / tokens),
        (found.sums[name].double(), g.t() @ x),
    ):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
    assert found.sums[name].dtype == torch.float32


@pytest.mark.parametrize("by_layer", [False, True])
def test_an_experts_mean_gradient_is_over_all_samples(by_layer: bool) -> None:
    """Also of one that few of them reach, whose score would else be that of a linear whose every sample is so large."""
    model, batches = experts.build("mixtral"), samples(lengths=(2, 2, 3))
    budget = sparseft.SylvaConfig(sparsity=0.9, block_size=8).budget(ModelSpec.of(model))
    reached: Counter[str] = Counter()
    with opened(model, [c.module for c in budget.candidates]):
        shapes = {c.module: c.shape for c in budget.candidates}
        sums = KroneckerFactors(FactorSettings(num_partition=0), 0, shapes, torch.device("cpu"))

        def seen(observation: Observation) -> None:
            reached[observation.name] += observation.samples
            sums(observation)

        observe(model, shapes, groups_of(model, batches, gradients=True), seen, gradients=True)
        found = compute_scores(
            model, budget.candidates, "sylva", seed=0, batches=batches, factors=sums.settings, by_layer=by_layer
        )
    assert set(reached.values()) == {1, 2, 3}
    for c in budget.candidates:
        wanted = torch.zeros(c.count, dtype=torch.float64)
        if c.module in reached:
            A, G = sums.inputs[sums.sources[c.module]], sums.gradients[c.module]
            wanted = block_scores(*entry_importance(sums.sums[c.module] / len(batches), A, G), c.unit).reshape(-1)
        torch.testing.assert_close(found.scores[c.key], wanted, rtol=1e-4, atol=1e-4 * float(wanted.max()))


# -- sums on disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 4096)
    yield


def test_sums_that_would_crowd_memory_go_to_files_without_a_name(
    make_model: Callable[..., Any], tmp_path: Path, little_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = make_model("llama"), sparseft.SylvaConfig(sparsity=0.9, block_size=8)
    mapped = sparseft.compute_selection(model, config, samples(), resume=tmp_path / "unfinished")
    assert not list(tmp_path.rglob("*"))
    sums = host_memory.Room(10**6, torch.device("cpu"), "the summed gradients", tmp_path)
    assert sums.place == host_memory.DISK and not sums.in_memory
    tensor = sums.zeros(7, 5)
    tensor += 1
    assert tensor.sum() == 35 and tensor.is_shared() and not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert (
        host_memory.available_bytes() > 2**20
        and host_memory.Room(10**6, torch.device("cpu"), "").place == host_memory.HOST
    )
    assert sparseft.compute_selection(model, config, samples()).digest() == mapped.digest()


def test_a_full_disk_is_one_clear_error(tmp_path: Path, little_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match=r"the summed gradients need 0\.0 GiB.*the disk has no room left"):
        host_memory.Room(10**6, torch.device("cpu"), "the summed gradients", tmp_path).zeros(100, 100)
    assert not list(tmp_path.iterdir())


# -- damping ----------------------------------------------------------------------------------------------------------


def test_the_selection_says_how_far_the_damping_rose(
    make_model: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = make_model("llama")
    exact = sparseft.compute_selection(
        model, sparseft.SylvaConfig(block_size=8, num_partition=0, damping=0.01), samples()
    )
    found = exact.meta["second_order"]
    assert found["raised"] == 0 and found["matrices"] == 2 * (4 + 7)  # A shared by q, k, v and by gate, up
    assert found["effective_damping"] == {"min": 0.01, "median": 0.01, "max": 0.01}
    assert "more damping" not in capsys.readouterr().err
    positive = sparseft.compute_selection(model, sparseft.SylvaConfig(block_size=8, damping=1e-9), samples())
    assert positive.meta["second_order"]["effective_damping"] == {"min": 1e-9, "median": 1e-9, "max": 1e-9}
    config = sparseft.SylvaConfig(block_size=8, structure="hodlr", damping=1e-9)
    rough = sparseft.compute_selection(model, config, samples())
    found = rough.meta["second_order"]
    assert 0 < found["raised"] <= 22 and found["effective_damping"]["max"] > found["damping"] == 1e-9
    assert f"{found['raised']} of 22 matrices needed more damping than 1e-09" in capsys.readouterr().err
    rough.save(tmp_path / "selection", {name: ModelSpec.of(model).linears[name] for name in rough.modules})
    assert sparseft.Selection.load(tmp_path / "selection").meta["second_order"] == found
    assert summary([], 0.1) == {"damping": 0.1, "matrices": 0, "raised": 0}


def test_samples_are_split_alike_whatever_the_batches() -> None:
    items = samples()
    assert [s["input_ids"].shape[1] for b in items for s in split_samples(b)] == list(LENGTHS)


# -- CUDA -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("importance", ["sylva", "gradient"])
def test_the_device_chooses_what_the_cpu_chooses(
    make_model: Callable[..., Any], importance: str, by_layer: bool
) -> None:
    config = sparseft.SylvaConfig(sparsity=0.9, block_size=8, importance=importance, num_partition=0)
    chosen = []
    for device in ("cpu", "cuda"):
        model = make_model("llama").to(device)
        found = sparseft.compute_selection(model, config, samples(lengths=(64,) * 8), by_layer=by_layer)
        chosen.append(chosen_units(found))
    assert len(chosen[0] & chosen[1]) >= 0.99 * len(chosen[0])


@pytest.mark.gpu
@pytest.mark.parametrize("structure", ["multilevel", "hodlr"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_device_multiplies_halves_exactly(dtype: torch.dtype, structure: str) -> None:
    """The sums and sketches of the same observations, more than a chunk of them and of odd widths."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(5000, n, generator=generator).to(dtype) for n in (777, 1001))
    states = []
    for device in ("cpu", "cuda"):
        settings = FactorSettings(structure=structure)
        found = KroneckerFactors(settings, 0, {"m": (1001, 777)}, torch.device(device))
        found(Observation("m", x.to(device), None, gradient.to(device), "m", 3))
        states.append(found.state()[0])
    for name, wanted in states[0].items():
        peak = float(wanted.abs().max())
        torch.testing.assert_close(
            states[1][name].cpu(), wanted, rtol=1e-5, atol=1e-5 * peak, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_sums_are_reduced_at_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another rank has no room on its device, this one's sums go by the host too."""

    class OnDevice:
        """Stands for a tensor on a device."""

        def __init__(self, held: torch.Tensor) -> None:
            self.held = held

        def cpu(self) -> torch.Tensor:
            return self.held.clone()

        def copy_(self, there: torch.Tensor) -> None:
            self.held.copy_(there)

    def reduced(place: str) -> OnDevice:
        sums = KroneckerFactors(FactorSettings(num_partition=0), 0, {"m": (2, 3)}, torch.device("cpu"))
        sums._open("m", "m")
        sums.room.place = host_memory.DEVICE
        total = OnDevice(torch.ones(2, 3))
        sums.sums["m"] = total  # type: ignore[assignment]
        monkeypatch.setattr(ranks, "all_gather_object", lambda own: [own, (own[0], place)])
        sums.reduce()
        return total

    reached = []

    def doubled(tensor: Any) -> None:
        reached.append(tensor)
        if isinstance(tensor, torch.Tensor):
            tensor *= 2

    monkeypatch.setattr(ranks, "all_reduce_sum", doubled)
    total = reduced(host_memory.HOST)
    assert not any(isinstance(tensor, OnDevice) for tensor in reached) and total.held.tolist() == [[2.0] * 3] * 2
    total = reduced(host_memory.DEVICE)
    assert sum(tensor is total for tensor in reached) == 1

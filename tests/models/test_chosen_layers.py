"""`method.layers`: what it means, what it refuses, and that a budget is spent in the layers that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sparseft
from sparseft.errors import UserError
from sparseft.models.chosen_layers import chosen_layers
from sparseft.models.spec import ModelSpec
from sparseft.models.step_cost import trained_by_linear
from support.models import build_model
from support.running import refused, summary
from support.running import sparseft as command

SPARSE: dict[str, Any] = {
    "s2ft": lambda **more: sparseft.S2FTConfig(**{"sparsity": 0.95} | more),
    "sylva": lambda **more: sparseft.SylvaConfig(**{"sparsity": 0.9, "importance": "random", "block_size": 4} | more),
    "paca": lambda **more: sparseft.PacaConfig(**{"sparsity": 0.9} | more),
    "lora": lambda **more: sparseft.LoraConfig(**{"sparsity": 0.9} | more),
    "dora": lambda **more: sparseft.DoraConfig(**{"sparsity": 0.9} | more),
}


@pytest.mark.parametrize(
    ("value", "layers"),
    [
        ("upper:0.5", {5, 6, 7, 8, 9}), ("upper:1", set(range(10))), ("upper:.01", {9}), ("upper:0.26", {7, 8, 9}),
        ("3-5", {3, 4, 5}), ("9-9", {9}), ([2], {2}), ([7, 3], {3, 7}),
    ],
)  # fmt: skip
def test_what_it_means_in_ten_layers(value: Any, layers: set[int]) -> None:
    assert chosen_layers(value, 10) == layers


def test_all_is_no_choice() -> None:
    assert chosen_layers("all", 10) is None


@pytest.mark.parametrize(
    "value", ["upper:0", "upper:1.5", "upper:", "lower:0.5", "5-3", "", "[]", "[-1]", "12", "0.5", "upper", "[1,a]"]
)
def test_what_no_model_has_is_refused_before_anything_is_loaded(value: str, tmp_path: Path) -> None:
    told = refused(tmp_path, "train", "method=s2ft", f"method.layers={value}", "output_dir=run")
    assert "method.layers" in told and "xpected" in told and not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["s2ft", "lora", "full"])
def test_layers_that_this_model_has_not(method: str, tmp_path: Path) -> None:
    words = [f"method={method}", "output_dir=run", "trainer.max_steps=1"]
    told = refused(tmp_path, "train", *words, "method.layers=[0,40]")
    assert "no decoder layer 40" in told and "method.layers=[0,40]" in told and not (tmp_path / "run").exists()
    assert "decoder layer 999999999999" in refused(tmp_path, "train", *words, "method.layers=0-999999999999")


def test_a_scope_without_one_of_the_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"method\.layers and scope=layers\.0\. .* in the decoder layers 0\."):
        sparseft.attach(build_model("llama"), sparseft.S2FTConfig(scope="layers.0.", layers=[1]))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", SPARSE)
def test_the_budget_of_all_layers_is_spent_in_those_that_are_named(method: str, kind: str) -> None:
    base = build_model(kind)
    spec = ModelSpec.of(base)
    counts = {}
    for layers in ("all", [1]):
        model = sparseft.attach(build_model(kind), SPARSE[method](layers=layers))
        trained = trained_by_linear(model, spec)
        assert {spec.layer_of[name] for name in trained} == ({0, 1} if layers == "all" else {1})
        assert sum(p.numel() for p in sparseft.trainable_parameters(model).values()) == sum(trained.values())
        counts[str(layers)] = sum(trained.values())
    assert counts["[1]"] == pytest.approx(counts["all"], rel=0.2)  # whole units and ranks


@pytest.mark.parametrize(
    ("config", "more"),
    [
        (sparseft.S2FTConfig(d_ratio=0.2, o_ratio=0.5), {}),
        (sparseft.PacaConfig(rank=3), {}),
        (sparseft.LoraConfig(rank=2), {}),
    ],
)
def test_ratios_and_ranks_are_of_each_layer_that_trains(config: Any, more: dict[str, Any]) -> None:
    spec = ModelSpec.of(build_model("llama"))
    everywhere = trained_by_linear(sparseft.attach(build_model("llama"), config), spec)
    config.layers = [1]
    upper = trained_by_linear(sparseft.attach(build_model("llama"), config), spec)
    assert upper == {name: count for name, count in everywhere.items() if spec.layer_of[name] == 1}


@pytest.mark.parametrize("method", ["s2ft", "sylva", "paca", "lora"])
def test_a_budget_that_does_not_fit_is_refused(method: str) -> None:
    with pytest.raises(UserError, match=r"sparsity=0\.3 asks for .* method\.layers.*: raise sparsity or name more"):
        sparseft.attach(build_model("llama"), SPARSE[method](sparsity=0.3, layers="upper:0.5"))


def test_full_fine_tuning_trains_the_layers_alone() -> None:
    model = sparseft.attach(build_model("llama"), sparseft.FullConfig(layers=[1]))
    names = sparseft.trainable_parameters(model)
    assert names and all(name.startswith("model.layers.1.") for name in names)


def test_a_run_with_reselection_stays_in_its_layers(tmp_path: Path) -> None:
    """Continued too, whose config has been to a file and back."""
    words = [
        "train", "method=s2ft", "sparsity=0.95", "method.layers=upper:0.25", "method.reselect_steps=2",
        "trainer.gradient_accumulation=1", "trainer.max_length=64", "output_dir=run", "trainer.scheduler=constant",
    ]  # fmt: skip
    done = command(tmp_path, *words, "trainer.max_steps=3")
    again = command(tmp_path, *words, "trainer.max_steps=5", "trainer.resume=auto")
    assert "re-selection at step 4" in again.err
    assert "re-selection at step 2" in done.err and "step: predicted at 0." in done.err
    facts = summary(tmp_path / "run")
    assert facts["method_config"]["layers"] == "upper:0.25" and 0.2 < facts["predicted_floors"] < 0.6
    from sparseft.files.tensors import read_described

    tensors, _ = read_described(tmp_path / "run" / "adapter" / "adapter_model.safetensors", "adapter")
    depth = 4
    assert tensors and all(int(name.split(".")[2]) >= depth - 1 for name in tensors)

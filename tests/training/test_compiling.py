"""`trainer.compile`: the same training by compiled layers, and what CUDA graphs need."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch._dynamo.utils import counters

from sparseft.adapters.lifecycle import attach, trainable_parameters
from sparseft.methods import get_method
from sparseft.training import compiling
from sparseft.training.compiling import CompiledLayers, own_gradients
from sparseft.training.trainer import train
from support.running import METHODS, on, refused, sparseft, summary, write_data
from support.training import attached, examples, trained, trainer_of

LAYERS = 4


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def deep(method: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return attach(transformers.AutoModelForCausalLM.from_config(config), get_method(method)(**settings)).train()


def gradients(model: Any, length: int = 9) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(length))
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in trainable_parameters(model).items() if p.grad is not None}


@pytest.mark.parametrize(
    ("method", "settings", "backend"),
    [
        ("s2ft", {"sparsity": 0.9, "roles": ["o", "down"], "importance": "weight"}, "aot_eager"),
        pytest.param("s2ft", {"d_ratio": 0.1}, "inductor", marks=pytest.mark.slow),
        ("sylva", {"sparsity": 0.9, "block_size": 16, "importance": "weight"}, "aot_eager"),
        ("lora", {"rank": 2, "dropout": 0.0}, "aot_eager"),
    ],
)
def test_compiled_layers_have_the_gradients_of_the_plain_ones(
    method: str, settings: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler on the CPU")
    monkeypatch.setattr(compiling, "BACKEND", backend)
    model = deep(method, **settings)
    for parameter in trainable_parameters(model).values():  # at zero, LoRA's A has no gradient
        parameter.data += 0.01 * torch.randn_like(parameter)
    expected = gradients(model)
    layers = CompiledLayers(model)
    assert counters["stats"]["unique_graphs"] == 0
    with layers.running():
        found = gradients(model)
        graphs = counters["stats"]["unique_graphs"]
        assert gradients(model).keys() == found.keys() and counters["stats"]["unique_graphs"] == graphs
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))
    assert not counters["graph_break"]
    # The first layer's input asks for no gradient; blocks differ in how many columns of the input they need.
    assert graphs <= (2 if method != "sylva" else LAYERS)
    gradients(model, 5)  # outside nothing is compiled, whatever the shape
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_run_with_compiled_layers_ends_as_a_plain_one(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With activations recomputed: the backward pass runs the layers again."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    ends = []
    for compiled in (False, True):
        model = attached(make_model("llama"), "s2ft")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trainer = trainer_of(model, tmp_path / str(compiled), examples(12), examples(3, seed=1), max_steps=3,
                             batch_size=2, gradient_accumulation=2, eval_steps=2)  # fmt: skip
        if compiled:
            trainer.compiled = CompiledLayers(model)
        done = train(trainer, None, 3)
        ends.append((done.loss, trained(model)))
        assert (counters["stats"]["unique_graphs"] > 0) is compiled
    (loss, plain), (compiled_loss, found) = ends
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_gradients_move_out_of_a_graphs_memory() -> None:
    model = torch.nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    model.bias.grad = None
    before = model.weight.grad
    own_gradients(model)
    assert torch.equal(model.weight.grad, before) and model.weight.grad.data_ptr() != before.data_ptr()
    assert model.bias.grad is None


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("compiling"))["json"]


def test_batches_of_one_shape_train_the_same(data: Path, model_folder: Any, tmp_path: Path) -> None:
    words = ["train", *on(model_folder(), data), *METHODS["s2ft"], "trainer.max_steps=3"]
    sparseft(tmp_path, *words, "output_dir=longest")
    sparseft(tmp_path, *words, "output_dir=whole", "trainer.pad_to=max_length")
    longest, whole = summary(tmp_path / "longest"), summary(tmp_path / "whole")
    assert whole["tokens"] == longest["tokens"]
    assert whole["train_loss"] == pytest.approx(longest["train_loss"], rel=1e-5)
    message = refused(tmp_path, *words, "trainer.pad_to=max_length", "trainer.max_length=129")
    assert "trainer.max_length=129 is more than the model's context of 128 tokens" in message


def test_graphs_are_refused_in_one_sentence(data: Path, model_folder: Any, tmp_path: Path) -> None:
    words = ["train", *on(model_folder(), data), *METHODS["s2ft"], "trainer.compile=graphs"]
    message = refused(tmp_path, *words)
    assert message.endswith("sequence have many; give trainer.pad_to=max_length.")
    message = refused(tmp_path, *words, "trainer.pad_to=max_length", "hardware.device=cpu")
    assert message == (
        "trainer.compile=graphs: CUDA graphs need a CUDA device, and this run is on the CPU; use trainer.compile=none, "
        "model or layers."
    )
    message = refused(tmp_path, *words, "trainer.pad_to=max_length", "hardware.zero_stage=1")
    assert "with hardware.zero_stage=1 use trainer.compile=none or model." in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["layers", "graphs"])
@pytest.mark.parametrize("method", ["s2ft", "sylva"])
def test_on_the_gpu_compiled_steps_train_the_same(
    method: str, compile: str, data: Path, model_folder: Any, tmp_path: Path
) -> None:
    words = ["train", *on(model_folder(), data), *METHODS[method], "trainer.max_steps=4", "hardware.device=cuda"]
    words += ["trainer.pad_to=max_length", "dataset.packing=true"]
    losses = []
    for kind in ("none", compile):
        sparseft(tmp_path, *words, f"trainer.compile={kind}", f"output_dir={kind}")
        losses.append(summary(tmp_path / kind)["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)

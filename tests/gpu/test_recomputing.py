"""`trainer.checkpointing=selective` on the device: the plain step's loss and gradients, less memory, and no wait."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sparseft.adapters.lifecycle import attach, trainable_parameters
from sparseft.bench.timing import held_bytes, peak_bytes
from sparseft.layers.saved_inputs import share_inputs_in_training
from sparseft.methods import get_method
from sparseft.training.recomputing import CHEAP, UP, recomputing
from support.running import METHODS, on, sparseft, summary, write_data
from support.syncs import waiting_is_an_error
from support.training import tensors

ALL = (*CHEAP, UP)
SETTINGS: dict[str, dict[str, Any]] = {
    "s2ft": {"sparsity": 0.95, "roles": ["down"], "importance": "weight"},
    "sylva": {"sparsity": 0.95, "block_size": 16, "importance": "weight"},
    "lora": {"rank": 4, "dropout": 0.0},
}
EPSILON = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # the backward pass of attention may sum in any order
each_dtype = pytest.mark.parametrize("dtype", list(EPSILON), ids=str)
each_method = pytest.mark.parametrize("method", SETTINGS)


def made(method: str, dtype: torch.dtype, device: str) -> Any:
    """A Llama of four layers, each of which keeps some hundred KiB; grouped queries."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)
    return attach(model, get_method(method)(**SETTINGS[method])).train()


def loss_of(model: Any, kinds: tuple[str, ...]) -> torch.Tensor:
    ids = torch.arange(2 * 128, device=model.device).remainder(89).add(3).view(2, 128)
    with recomputing(model, kinds) if kinds else contextlib.nullcontext():
        return model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients(model: Any, kinds: tuple[str, ...]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    share_inputs_in_training(model)
    loss = loss_of(model, kinds)
    loss.backward()
    found = {name: p.grad for name, p in trainable_parameters(model).items()}
    model.zero_grad()
    return loss.detach(), found


@each_dtype
@each_method
def test_loss_and_gradients_are_the_plain_ones(method: str, dtype: torch.dtype, device: str) -> None:
    model = made(method, dtype, device)
    loss, expected = gradients(model, ())
    for kinds in (CHEAP, ALL):
        again, found = gradients(model, kinds)
        torch.testing.assert_close(again, loss, rtol=EPSILON[dtype], atol=0)
        assert expected and found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.isfinite().all() and gradient.device.type == device
            off = (found[name] - gradient).abs().max()
            assert off <= EPSILON[dtype] * gradient.abs().max(), (name, kinds)


@each_dtype
@each_method
def test_less_is_kept_and_the_peak_is_lower(method: str, dtype: torch.dtype, device: str) -> None:
    model, place = made(method, dtype, device), torch.device(device)

    def step(kinds: tuple[str, ...]) -> None:
        loss_of(model, kinds).backward()
        model.zero_grad(set_to_none=True)

    held, peaks = [], []
    for kinds in ((), CHEAP, ALL):
        share_inputs_in_training(model)
        step(kinds)  # what the first one allocates for good: workspaces, tables, what the layers settle
        held.append(held_bytes(lambda kinds=kinds: loss_of(model, kinds), place))
        peaks.append(peak_bytes(lambda kinds=kinds: step(kinds), place))
    assert held[1] < 0.92 * held[0] and peaks[1] < peaks[0]
    if method == "lora":  # whose up projection is a sum of two products
        assert held[2] <= held[1]
    else:
        assert held[2] < 0.97 * held[1] and peaks[2] < peaks[1]


@pytest.mark.gpu
@each_method
def test_what_is_made_again_waits_for_nothing(method: str) -> None:
    model = made(method, torch.bfloat16, "cuda")
    gradients(model, ALL)  # tables of kernels are made in the first
    loss = loss_of(model, ALL)  # masks are made outside, by what the batch holds
    with waiting_is_an_error():
        loss.backward()


@pytest.mark.parametrize(
    ("method", "way", "device"),
    [("s2ft", "selective_up", "cpu")]
    + [
        pytest.param(method, way, "cuda", marks=pytest.mark.gpu)
        for method, way in (("s2ft", "selective"), ("s2ft", "selective_up"), ("sylva", "selective"))
    ],
)
def test_a_run_ends_as_a_plain_one(method: str, way: str, device: str, model_folder: Any, tmp_path: Path) -> None:
    model, data = model_folder(), write_data(tmp_path)["json"]
    given = [word for word in on(model, data) if word != "hardware=cpu"]
    steps = ["trainer.max_steps=4", "trainer.learning_rate=1e-3", "model.dtype=float32", f"hardware.device={device}"]
    for name, setting in (("plain", "none"), ("less", way)):
        run = [f"trainer.checkpointing={setting}", f"output_dir={tmp_path / name}"]
        done = sparseft(tmp_path, "train", *given, *METHODS[method], *steps, *run)
        assert ("are computed again, not kept" in done.err) == (setting != "none")
    found, expected = tensors(tmp_path / "less"), tensors(tmp_path / "plain")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6 if device == "cpu" else 2e-5)
    losses = [summary(tmp_path / name)["eval_loss_after"] for name in ("plain", "less")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)

"""FSDP2: what is refused before anything is loaded, and what can be seen without other processes.

What it trains is held against one process in tests/processes (test_distributed.py, test_sharding.py, test_kill.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from sparseft.distributed import fsdp
from sparseft.errors import UserError
from support.running import refused

FSDP = ["hardware.fsdp=true", "hardware.num_processes=2", "hardware=cpu"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hardware.zero_stage=2"], "hardware.fsdp=true: FSDP2 and ZeRO are two ways to the same; use"),
        (["hardware.num_processes=1"], "hardware.fsdp=true: one process has nobody to share the model with"),
        (["hardware.offload=cpu"], "hardware.offload=cpu: it is ZeRO that offloads"),
        (["trainer.compile=layers"], "trainer.compile=layers: FSDP2 gathers between a model's modules"),
        (["trainer.checkpointing=selective"], "with hardware.fsdp=true use trainer.checkpointing=none or full"),
        (["method=s2ft", "method.reselect_steps=2"], "method.reselect_steps=2: what inactive entries have learnt"),
        (["method=losia"], "use method.reselect_steps=0, or hardware.fsdp=false"),
        (["model.quantize=int8"], "model.quantize=int8: FSDP2 takes no packed weights here yet"),
        (["method=full", "trainer.average=ema:0.9"], "no process has what trains whole under hardware.fsdp=true"),
        (["method=full", "trainer.optimizer=adafactor"], "with hardware.fsdp=true the optimizer gets pieces"),
        (["trainer.learning_rate=auto"], "trainer.learning_rate=auto: a rate is found in one process"),
    ],
)
def test_what_fsdp_cannot_do_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path, "train", *FSDP, *words)
    assert not (tmp_path / "outputs").exists()


def test_other_commands_run_in_one_process(tmp_path: Path) -> None:
    message = refused(tmp_path, "bench", "train", "hardware.fsdp=true")
    assert message == "hardware.fsdp=true: `sparseft bench` runs in one process; use hardware.fsdp=false."


@pytest.mark.parametrize("words", [("eval", "mmlu", "--base"), ("bench", "train"), ("chat",)])
def test_other_commands_are_started_once(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    message = refused(tmp_path, *words)
    assert message == (
        f"WORLD_SIZE=2: a launcher has started 2 processes, but `sparseft {words[0]}` runs in one; start it without "
        "torchrun."
    )


def llama(dtype: torch.dtype = torch.float32) -> transformers.LlamaForCausalLM:
    content = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(content).to(dtype)


def shard(model: transformers.LlamaForCausalLM) -> None:
    fsdp.shard(model, list(model.model.layers), model.get_input_embeddings(), torch.device("cpu"))


def test_a_parameter_of_two_layers_is_refused() -> None:
    model = llama()
    first, second = model.model.layers
    second.mlp = first.mlp
    with pytest.raises(UserError, match=r"LlamaForCausalLM uses 'model.layers.0.mlp.gate_proj.weight' in two places"):
        shard(model)


def test_weights_of_two_dtypes_are_refused() -> None:
    model = llama(torch.bfloat16)
    model.model.layers[1].input_layernorm.float()
    with pytest.raises(UserError, match=r"keeps 'model.layers.1.+' in torch.+ beside torch.+ use model.dtype=float32"):
        shard(model)


def gradients(world: list[list[list[float] | None]], monkeypatch: pytest.MonkeyPatch) -> list[list[float] | None]:
    """The first process's gradients after averaging those of a world, given by process and parameter."""
    sent: list[torch.Tensor] = []

    def of(process: list[list[float] | None]) -> list[nn.Parameter]:
        parameters = [nn.Parameter(torch.zeros(2)) for _ in process]
        for parameter, grad in zip(parameters, process, strict=True):
            parameter.grad = None if grad is None else torch.tensor(grad)
        return parameters

    monkeypatch.setattr(fsdp, "rank_and_world", lambda: (0, len(world)))
    monkeypatch.setattr(fsdp, "all_reduce_sum", lambda tensor: sent.append(tensor.clone()))
    for process in world[1:]:
        fsdp.average_gradients(of(process))
    monkeypatch.setattr(fsdp, "all_reduce_sum", lambda tensor: tensor.add_(sum(sent)))
    first = of(world[0])
    fsdp.average_gradients(first)
    return [None if parameter.grad is None else parameter.grad.tolist() for parameter in first]


def test_gradients_become_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gradients([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 0.0]]], monkeypatch) == [[3.0, 4.0], [5.0, 2.0]]


def test_what_a_process_passed_by_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one process would have it: what nobody came to has no gradient, so that no optimizer moves it."""
    world = [[None, None, [2.0, 2.0]], [[4.0, 2.0], None, None]]
    assert gradients(world, monkeypatch) == [[2.0, 1.0], None, [1.0, 1.0]]

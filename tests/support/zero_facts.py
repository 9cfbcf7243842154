"""What tests/test_patches.py asks of DeepSpeed and accelerate, in a process of its own, as it changes both for good.

python tests/support/zero_facts.py FACTS.json
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def alone() -> dict[str, str]:
    """The environment of the one process of a job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    return place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def of_accelerate() -> dict[str, Any]:
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState

    Accelerator(cpu=True)
    known = [bool(AcceleratorState._shared_state), bool(PartialState._shared_state)]
    AcceleratorState._reset_state(reset_partial_state=True)
    return {"known": known, "after": [bool(AcceleratorState._shared_state), bool(PartialState._shared_state)]}


def of_a_plain_model() -> dict[str, Any]:
    """Whether accelerate loads DeepSpeed to look for its engine around a model."""
    from accelerate.utils import extract_model_from_parallel, other

    seen, model = {}, nn.Linear(2, 2)
    for answer in (False, True):
        with mock.patch.object(other, "is_deepspeed_available", lambda answer=answer: answer):
            assert extract_model_from_parallel(model) is model
        seen[str(answer)] = "deepspeed" in sys.modules
    return seen


def of_shared_memory() -> dict[str, Any]:
    """Whether DeepSpeed asks `__compatible_ops__` before it compiles its collectives in shared memory."""
    import deepspeed
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    built = {}
    for allowed in (True, False):
        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = allowed
        builder = mock.Mock(NAME=ShareMemCommBuilder.NAME)
        accelerator = mock.Mock(create_op_builder=lambda name, builder=builder: builder)
        with mock.patch("deepspeed.comm.torch.get_accelerator", lambda accelerator=accelerator: accelerator):
            build_shm_op()
        built[str(allowed)] = builder.load.called
    return {"name": ShareMemCommBuilder.NAME, "built": built}


def of_configuration(folder: Path) -> dict[str, Any]:
    """Whether what is changed in the parsed configuration is what DeepSpeed gets."""
    import transformers

    from sparseft.distributed.deepspeed import deepspeed_on_cpu

    config = CONFIG | {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
    args = transformers.TrainingArguments(
        str(folder), deepspeed=config, accelerator_config=deepspeed_on_cpu(), report_to=[]
    )
    args.hf_deepspeed_config.config["zero_optimization"]["reduce_bucket_size"] = 123
    plugin = transformers.Trainer(nn.Linear(2, 2), args).accelerator.state.deepspeed_plugin
    seen = plugin.hf_ds_config.config["zero_optimization"].get("reduce_bucket_size")
    return {"bucket": seen, "same": plugin.deepspeed_config is args.hf_deepspeed_config.config}


class Table(nn.Module):
    """A linear with a buffer in fp32, as a table of rotations is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def of_shards() -> dict[str, Any]:
    import deepspeed

    settings = CONFIG | {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    overrides = [deepspeed.zero.DeepSpeedTensorOverride.device]
    with deepspeed.zero.Init(config_dict_or_path=settings, tensor_overrides=overrides):
        model = Table()
    weight = model.linear.weight
    facts: dict[str, Any] = {
        "table": str(model.table.dtype),
        "id": hasattr(weight, "ds_id"),
        "shape": list(weight.ds_shape),
        "outside": [weight.ds_status.name, weight.numel()],
        "shard": [weight.ds_tensor.numel(), weight.ds_tensor.ds_numel],
        "running before": hasattr(model, "ds_inflight_param_registry"),
    }
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=None):
        facts["inside"] = [weight.ds_status.name, weight.numel()]
    settings = CONFIG | {"zero_optimization": {"stage": 3}}
    engine, *_ = deepspeed.initialize(
        model=Table(), config=settings, model_parameters=None, optimizer=None, dist_init_required=False
    )
    facts["running"] = hasattr(engine.module, "ds_inflight_param_registry")
    facts["told apart"] = hasattr(nn.Linear(2, 2).weight, "ds_id")
    return facts


def of_a_step() -> dict[str, Any]:
    """Stage 2: what a parameter knows of its moments, and whether a step whose gradient is not finite is left out."""
    import deepspeed
    from accelerate.utils import extract_model_from_parallel

    from sparseft.distributed.deepspeed import import_only_to_train

    import_only_to_train()

    model = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine, wrapped, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=CONFIG | {"zero_optimization": {"stage": 2}}, dist_init_required=False
    )
    facts: dict[str, Any] = {"there": hasattr(wrapped, "check_grad_overflow")}
    wrapped.check_grad_overflow = True

    def step(x: torch.Tensor) -> bool:
        before = model.weight.detach().clone()
        engine.backward(engine(x).square().mean())
        engine.step()
        return not torch.equal(before, model.weight)

    facts["finite"] = step(torch.ones(1, 8))
    facts["infinite"] = step(torch.full((1, 8), torch.inf))
    mapping = model.weight._hp_mapping
    facts["unwrapped"] = extract_model_from_parallel(engine) is model
    facts["moments"] = sorted(mapping.optim_fragment or ()) if mapping is not None else None
    return facts


def main(out: Path) -> None:
    facts: dict[str, Any] = {"accelerate": of_accelerate(), "plain": of_a_plain_model()}
    os.environ.update(alone())
    import deepspeed

    facts["shared memory"] = of_shared_memory()
    deepspeed.init_distributed("gloo")
    facts["shards"] = of_shards()
    facts["step"] = of_a_step()
    facts["configuration"] = of_configuration(out.parent)
    out.write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

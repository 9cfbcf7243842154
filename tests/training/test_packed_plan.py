"""`train --plan` of a base that model.quantize packs, against steps on one that bitsandbytes or torchao has packed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sparseft.adapters.lifecycle import attach, trainable_parameters
from sparseft.commands import plan
from sparseft.compose.run_config import compose
from sparseft.config import ModelConfig
from sparseft.errors import UserError
from sparseft.layers.saved_inputs import share_inputs_in_training
from sparseft.memory import AllocationCounter, tensor_bytes
from sparseft.models.labelled_loss import labelled_loss, usable
from sparseft.models.loading import load_model
from sparseft.models.published import SHAPES, published
from sparseft.training import memory_plan as planning
from sparseft.training.optimizer import SparseAdamW
from support.running import refused, sparseft

PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao"}
COMMON = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 4, "vocab_size": 512}  # fmt: skip
# LLaMA-3 70B with an eighth of its width and of its depth.
SCALED = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 10, "num_attention_heads": 8,
          "num_key_value_heads": 1, "vocab_size": 16032}  # fmt: skip


def stored(model: torch.nn.Module) -> int:
    """Bytes of every storage that a packed model has, those of packed weights' own parts too."""
    tensors: list[torch.Tensor] = list(model.buffers())
    for parameter in model.parameters():
        state: Any = getattr(parameter, "quant_state", None)
        if hasattr(parameter, "qdata"):
            tensors += [parameter.qdata, parameter.scale, parameter.zero_point]
            continue
        tensors.append(parameter)
        while state is not None:
            tensors += [value for value in vars(state).values() if torch.is_tensor(value)]
            state = state.state2
    return tensor_bytes(tensors)


def planned_and_measured(
    folder: Path, shape: dict[str, Any], words: list[str], tokens: int
) -> tuple[planning.Memory, int, int]:
    """The plan, and of a real step: what lies there before it, and the peak."""
    content = transformers.LlamaConfig(**shape, **COMMON, dtype="bfloat16")
    config = compose("train", [*words, "hardware=cpu"])
    if hasattr(config.method, "dropout"):
        config.method.dropout = 0.0
    built = planning.trainable_shape(config, content, torch.bfloat16)
    plan = planning.step_memory(config, built, batch=1, length=tokens)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(copy.deepcopy(content), dtype=torch.bfloat16).save_pretrained(folder)
    model = load_model(ModelConfig(path=str(folder), quantize=config.model.quantize)).requires_grad_(False)
    settings = copy.deepcopy(config.method)
    if settings.sparse:
        settings.importance = "random"
    model = attach(model, settings).train()
    parameters = list(trainable_parameters(model).values())
    optimizer = (SparseAdamW if settings.sparse else torch.optim.AdamW)(parameters, lr=1e-4)
    share_inputs_in_training(model)
    ids = torch.randint(shape["vocab_size"], (1, tokens))
    rows = {"rows": torch.arange(tokens - 1)} if usable(model, config) else {}

    def step() -> None:
        given: dict[str, Any] = {"input_ids": ids, "labels": ids, "use_cache": False}
        if rows:
            with labelled_loss(model, torch.device("cpu")):
                loss = model(**given, **{planning.ROWS: rows["rows"]}).loss
        else:
            loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    state = [value for entry in optimizer.state.values() for value in entry.values() if torch.is_tensor(value)]
    resident = stored(model) + tensor_bytes(state)
    with AllocationCounter() as counter:
        step()
    return plan, resident, resident + counter.peak


@pytest.mark.parametrize("method", ["s2ft", "sylva", "lora"])
@pytest.mark.parametrize("quantize", PACKAGES)
def test_the_plan_is_what_a_step_takes(quantize: str, method: str, tmp_path: Path) -> None:
    pytest.importorskip(PACKAGES[quantize])
    budget = ["method.rank=8"] if method == "lora" else ["sparsity=0.95"]
    budget += ["method.block_size=16"] if method == "sylva" else []
    words = [f"method={method}", f"model.quantize={quantize}", *budget]
    plan, resident, peak = planned_and_measured(tmp_path, SMALL, words, 64)
    assert plan.weights + plan.trained + plan.moments == pytest.approx(resident, rel=0.02)
    assert plan.total == pytest.approx(peak, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["method=s2ft", "method.d_ratio=0.03"],
                                   ["method=sylva", "sparsity=0.99", "method.block_size=16"]])  # fmt: skip
def test_a_70b_model_at_a_64th(words: list[str], tmp_path: Path) -> None:
    """Prints what docs/benchmarks/memory.md says: pytest -s -m slow tests/training/test_packed_plan.py"""
    pytest.importorskip("bitsandbytes")
    plan, resident, peak = planned_and_measured(tmp_path, SCALED, ["model.quantize=nf4", *words], 64)
    print(f"\n{' '.join(words)}: {plan.total / 2**20:.1f} MiB planned, {peak / 2**20:.1f} measured, "
          f"{plan.total / peak - 1:+.1%}; lies there: {resident / 2**20:.1f}")  # fmt: skip
    assert plan.total == pytest.approx(peak, rel=0.15)


def test_the_plan_needs_no_package_and_no_residual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the bundled model; four bits take less than eight, and these less than none."""
    totals = {}
    for quantize in ("none", "int8", "nf4", "int4"):
        more = [] if quantize == "none" else ["method.residual=true"]
        plan = sparseft(tmp_path, "train", "--plan", "method=s2ft", f"model.quantize={quantize}", *more, "--json").json
        totals[quantize] = plan["per_device"]["weights"]
        total = plan["total_parameters"]
        assert total == totals.setdefault("parameters", total)
    assert totals["none"] > totals["int8"] > totals["nf4"] and totals["int8"] > totals["int4"]
    assert "every weight" in refused(tmp_path, "train", "--plan", "method=full", "model.quantize=nf4")


def test_published_shapes_are_the_models() -> None:
    assert published(ModelConfig(path="openai-community/gpt2")) is None
    sizes = {"meta-llama/Meta-Llama-3-70B": 70_553_706_496, "meta-llama/Llama-2-7b-hf": 6_738_415_616}
    for path, parameters in sizes.items():
        content = published(ModelConfig(path=path))
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(content)
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters
        assert content.dtype == torch.bfloat16
    assert SHAPES["llama3-70b"]["num_hidden_layers"] == 80


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao"])
def test_a_checkpoint_that_is_packed_already_has_no_plan(method: str, tmp_path: Path) -> None:
    """It can be trained all the same, so nothing else is said of it."""
    settings = {"quant_method": method, "load_in_4bit": True, "quant_type": {"default": "int8_weight_only"}}
    content = transformers.LlamaConfig(**SMALL, **COMMON).to_dict() | {"quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(content))
    message = refused(tmp_path, "train", "--plan", f"model.path={tmp_path}", "method=s2ft")
    assert f"packed already ({method})" in message and "model.quantize=nf4" in message


def test_a_plan_refuses_what_train_refuses() -> None:
    words = ["model.quantize=nf4", "method=s2ft", "hardware=cpu", "hardware.num_processes=2", "hardware.zero_stage=3"]
    with pytest.raises(UserError, match="takes no packed weights here yet"):
        plan.run(compose("train", words))

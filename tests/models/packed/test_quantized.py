"""Quantised models: which modules count as linears, and that the others are refused by name before work starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations
from transformers.integrations.finegrained_fp8 import FP8Linear, replace_with_fp8_linear
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import FineGrainedFP8Config

import sparseft
from sparseft.errors import UserError
from sparseft.layers import SparseLinear
from sparseft.models.decoder import is_linear, stacks
from sparseft.models.packed.quantized import LOADED, check_config, check_plain, is_packed, quantized_by
from sparseft.models.spec import ModelSpec
from support.running import files, on, refused, write_data

SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


class Packed(nn.Parameter):
    """As bitsandbytes' and torchao's weights are: a class of their own."""


class Named(nn.Linear):
    """A subclass that computes the same."""


class Scaled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def changed(change: Callable[[nn.Linear], Any]) -> nn.Linear:
    linear = nn.Linear(32, 32)
    change(linear)
    return linear


def cast(dtype: torch.dtype) -> Callable[[nn.Linear], None]:
    def change(linear: nn.Linear) -> None:
        linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)

    return change


def wrapped_forward(linear: nn.Linear) -> None:  # as compressed-tensors does
    linear.forward = lambda x: nn.functional.linear(x, linear.weight) / 2  # type: ignore[method-assign]


LINEARS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Linear(32, 32),
    "without bias, bf16": lambda: nn.Linear(32, 32, bias=False, dtype=torch.bfloat16),
    "fp64": lambda: nn.Linear(32, 32, dtype=torch.float64),
    "Conv1D": lambda: Conv1D(32, 32),
    "same product": lambda: Named(32, 32),
    "Falcon's": lambda: FalconLinear(32, 32),
    "meta": lambda: nn.Linear(32, 32, device="meta"),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "another product": lambda: Scaled(32, 32),
    "router": lambda: Llama4Router(transformers.Llama4TextConfig(hidden_size=32, num_local_experts=4)),
    "grouped": lambda: DeepseekV4GroupedLinear(32, 32, 4),
    "of attention": lambda: NonDynamicallyQuantizableLinear(32, 32),
    "lazy": lambda: nn.LazyLinear(32),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(32, 32)),
    "its own forward": lambda: changed(wrapped_forward),
    "no linear": lambda: nn.LayerNorm(32),
    "embedding": lambda: nn.Embedding(32, 32),
}
QUANTIZED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "FP8Linear": (lambda: FP8Linear(32, 32, block_size=(32, 32)), "a FP8Linear whose weight is float8_e4m3fn"),
    "FP8Linear, not packed": (
        lambda: _plain_fp8(), "a FP8Linear with weight_scale_inv beside its weight"
    ),
    "float8": (lambda: changed(cast(torch.float8_e5m2)), "a Linear whose weight is float8_e5m2"),
    "int8": (lambda: changed(cast(torch.int8)), "a Linear whose weight is int8"),
    "uint8": (lambda: changed(cast(torch.uint8)), "a Linear whose weight is uint8"),
    "a class of its own": (
        lambda: changed(lambda linear: setattr(linear, "weight", Packed(linear.weight.detach()))),
        "a Linear whose weight is a Packed",
    ),
    "a scale": (
        lambda: changed(lambda linear: linear.register_parameter("weight_scale", nn.Parameter(torch.ones(1)))),
        "a Linear with weight_scale beside its weight",
    ),
    "a scale in a buffer": (
        lambda: changed(lambda linear: linear.register_buffer("input_scale", torch.ones(1))),
        "a Linear with input_scale beside its weight",
    ),
    "GPTQ": (lambda: _gptq(), "a Module whose qweight is int32"),
}  # fmt: skip


def _plain_fp8() -> nn.Module:
    module = FP8Linear(32, 32, block_size=(32, 32))
    module.weight = nn.Parameter(torch.ones(32, 32))
    return module


def _gptq() -> nn.Module:
    module = nn.Module()
    module.register_buffer("qweight", torch.zeros(4, 32, dtype=torch.int32))
    return module


@pytest.mark.parametrize("name", LINEARS)
def test_linears_that_can_be_trained(name: str) -> None:
    module = LINEARS[name]()
    assert is_linear(module)
    check_plain(nn.ModuleList([module]))


@pytest.mark.parametrize("name", [*OTHERS, *QUANTIZED])
def test_modules_that_are_no_plain_linears(name: str) -> None:
    make = OTHERS.get(name) or QUANTIZED[name][0]
    assert not is_linear(make())


@pytest.mark.parametrize("name", OTHERS)
def test_others_that_are_not_quantised_are_just_no_linears(name: str) -> None:
    check_plain(nn.ModuleList([OTHERS[name]()]))


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL))


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantised_module_is_refused_by_its_name_and_class(name: str) -> None:
    make, message = QUANTIZED[name]
    model = llama()
    model.model.layers[1].mlp.up_proj = make()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    batches = [{"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.ones(1, 4, dtype=torch.long)}]
    calls: list[Callable[[], object]] = [
        lambda: sparseft.compute_selection(model, sparseft.S2FTConfig(sparsity=0.9, importance="gradient"), batches),
        *(
            lambda config=config: sparseft.attach(model, config)
            for config in (
                sparseft.S2FTConfig(sparsity=0.9), sparseft.SylvaConfig(importance="weight", block_size=16),
                sparseft.LoraConfig(rank=2), sparseft.FullConfig(),
            )
        ),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(
            UserError, match=rf"^'model\.layers\.1\.mlp\.up_proj' is {message}; quantized models of this kind "
        ):
            call()
    for key, value in model.state_dict().items():  # FP8Linear's weight is memory as it was found, perhaps nan
        torch.testing.assert_close(value.float(), state[key].float(), rtol=0, atol=0, equal_nan=True)


def test_a_model_of_fp8_linears_and_experts() -> None:
    settings = FineGrainedFP8Config(weight_block_size=(32, 32))
    dense = replace_with_fp8_linear(llama(), modules_to_not_convert=["lm_head"], quantization_config=settings)
    with pytest.raises(UserError, match="'model.layers.0.self_attn.q_proj' is a FP8Linear whose weight is float8"):
        sparseft.attach(dense, sparseft.S2FTConfig(sparsity=0.9))
    config = transformers.Qwen3MoeConfig(
        **SMALL, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    experts = model.model.layers[0].mlp.experts
    assert stacks(experts) and ModelSpec.of(model)
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert "down_proj" not in stacks(experts)
    with pytest.raises(UserError, match="'model.layers.0.mlp.experts' is a .*Experts whose down_proj is float8"):
        sparseft.attach(model, sparseft.S2FTConfig(sparsity=0.9))


@pytest.mark.parametrize("method", sorted({*AUTO_QUANTIZATION_CONFIG_MAPPING, "of-tomorrow"}))
@pytest.mark.parametrize("where", ["the model", "its text part", "a part that its class does not know"])
def test_the_config_of_every_quantisation_is_refused(method: str, where: str) -> None:
    settings = {"quant_method": method, "bits": 4}
    if where == "the model":
        config = transformers.LlamaConfig(**SMALL, quantization_config=settings)
    elif where.startswith("a part"):
        config = transformers.LlamaConfig(**SMALL, talker_config={"text_config": {"quantization_config": settings}})
    else:
        config = transformers.Gemma3Config(text_config={**SMALL, "quantization_config": settings})
    with pytest.raises(
        UserError, match=rf"^model.path=x: the weights are quantized \({method}\); quantized models of this kind"
    ):
        check_config(config, "model.path=x")


def test_packed_checkpoints_are_let_through_where_they_can_be_trained_beside() -> None:
    for method in LOADED:
        config = transformers.LlamaConfig(**SMALL, quantization_config={"quant_method": method})
        assert quantized_by(config) == method
        check_config(config, "x", packed=True)
        with pytest.raises(UserError, match="are quantized"):
            check_config(config, "x")
    assert quantized_by(transformers.LlamaConfig(**SMALL)) is None
    for module in (nn.Linear(2, 2), SparseLinear(2, 2), nn.LayerNorm(2)):
        assert not is_packed(module)


def test_configs_without_a_method_and_without_a_quantisation() -> None:
    for settings, said in (({"load_in_8bit": True}, "bitsandbytes"), ({"bits": 4}, "unnamed")):
        with pytest.raises(UserError, match=said):
            check_config(transformers.LlamaConfig(**SMALL, quantization_config=settings), "x")
    for settings in (None, {}):
        check_config(transformers.LlamaConfig(**SMALL, quantization_config=settings), "x")
    check_config(transformers.Gemma3Config(), "x")


def test_every_command_refuses_a_quantised_checkpoint(tmp_path: Path, model_folder: Any, in_tmp: Path) -> None:
    shutil.copytree(model_folder("llama"), tmp_path / "gptq")
    config = tmp_path / "gptq" / "config.json"
    settings = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    for weights in (tmp_path / "gptq").glob("*.safetensors"):
        weights.unlink()  # never looked at
    words = on(tmp_path / "gptq", write_data(tmp_path)["json"])
    there = files(tmp_path)
    data = Path(sparseft.__file__).parent / "bundled" / "data"
    evaluated = ("--base", "hardware=cpu", f"model.path={tmp_path / 'gptq'}")
    for command in (
        *(("train", *words, f"method={method}", "output_dir=run") for method in ("s2ft", "sylva", "lora", "full")),
        ("train", *words, "hardware.num_processes=2"),
        ("train", "--plan", *words),
        ("preprocess", *words),
        ("bench", "train", *words, "bench.methods=[full]"),
        ("eval", "boolq", *evaluated, f"eval.data_dir={data}"),
    ):
        message = refused(tmp_path, *command)
        assert "the weights are quantized (gptq)" in message and "use the unquantized checkpoint" in message
        assert files(tmp_path) == there

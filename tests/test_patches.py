"""What sparseft patches, overrides or calls of other libraries without their promise that it stays.

A test fails where such a thing is gone, renamed or does something else, and says which file relies on it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import functools
import importlib
import inspect
import json
import logging
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparseft.training.distributed_trainer import LEFT_OUT, DistributedTrainer
from sparseft.training.trainer import Trainer
from support.experts import MODELS, batch, build
from support.places import ROOT, SUPPORT


@functools.cache
def sources() -> dict[str, str]:
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted((ROOT / "sparseft").rglob("*.py"))}


def relied_on(name: str) -> str:
    """Who in sparseft says `name`: what a failing test ends with. Fails itself where nobody does any more."""
    users = [path for path, text in sources().items() if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)]
    assert users, f"nothing in sparseft says '{name}' any more: its test has had its day"
    return f"'{name}' is not what {', '.join(users)} relies on"


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_all_that_is_tested_here_is_still_relied_on() -> None:
    for name in re.findall(r'relied_on\("([^"]+)"\)', Path(__file__).read_text()):
        relied_on(name)


# -- transformers' Trainer --------------------------------------------------------------------------------------------

OVERRIDDEN = {
    "_evaluate": ["trial", "ignore_keys_for_eval", "skip_scheduler"],
    "_get_grad_norm": ["model", "grad_norm"],
    "_get_output_dir": ["trial"],
    "_get_train_sampler": ["train_dataset"],
    "_move_model_to_device": ["model", "device"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_load_rng_state": ["checkpoint"],
    "_prepare_inputs": ["inputs"],
    "_prepare_for_training": ["max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_save_checkpoint": ["model", "trial"],
    "_save_optimizer_and_scheduler": ["output_dir"],
    "_save_rng_state": ["output_dir"],
    "_track_num_input_tokens": ["inputs"],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "create_optimizer": ["model"],
    "evaluate": ["eval_dataset", "ignore_keys", "metric_key_prefix"],
    "save_model": ["output_dir", "_internal_call"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
}
CALLED = {"get_optimizer_cls_and_kwargs": ["args", "model"]}


@pytest.mark.parametrize("name", [*OVERRIDDEN, *CALLED])
def test_the_trainer_has_the_methods(name: str) -> None:
    own = getattr(transformers.Trainer, name, None)
    assert own is not None and parameters(own) == (OVERRIDDEN | CALLED)[name], relied_on(name)
    assert name in CALLED or getattr(Trainer, name) is not own, f"Trainer.{name} is overridden no more"


def test_every_private_override_is_listed() -> None:
    own = {name for kind in (Trainer, DistributedTrainer) for name in vars(kind) if re.match("_[a-z]", name)}
    assert {name for name in own if hasattr(transformers.Trainer, name)} <= OVERRIDDEN.keys()


def recording(calls: list[str]) -> type[transformers.Trainer]:
    """transformers' Trainer, which notes its calls of what ours overrides."""

    def noted(name: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return getattr(transformers.Trainer, name)(self, *args, **kwargs)

        return call

    return type("Recording", (transformers.Trainer,), {name: noted(name) for name in OVERRIDDEN})


class Updates(transformers.TrainerCallback):
    """Notes when the optimizer is about to update."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("update")


def test_the_trainer_calls_them_in_this_order(tmp_path: Path, make_model: Any) -> None:
    data = [{"input_ids": list(range(3, 9)), "labels": list(range(3, 9))}] * 4

    def train(steps: int, resume: str | None = None) -> list[str]:
        args = transformers.TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to=[],
            disable_tqdm=True, max_grad_norm=1.0, eval_strategy="steps", eval_steps=1,
        )  # fmt: skip
        calls: list[str] = []
        made = recording(calls)
        trainer = made(make_model("llama"), args, train_dataset=data, eval_dataset=data, callbacks=[Updates(calls)])
        trainer.train(resume_from_checkpoint=resume)
        return calls

    def all_in_order(calls: list[str], *expected: str) -> None:
        rest = iter(calls)
        for name in expected:
            assert name in rest, f"{name} is not called, or at another time: {relied_on(name.strip())}; {calls}"

    calls = train(1)
    all_in_order(
        calls, "_get_train_sampler", "_prepare_for_training", "training_step", "compute_loss", "_get_grad_norm"
    )
    assert calls.index("training_step") < calls.index("_get_grad_norm") < calls.index("update"), (
        f"a step is no longer judged between backward and update: {relied_on('_get_grad_norm')}"
    )
    all_in_order(calls, "training_step", "_prepare_inputs", "compute_loss", "_track_num_input_tokens")
    assert "_track_num_input_tokens" in calls, relied_on("_track_num_input_tokens")
    assert "create_optimizer" in calls, relied_on("create_optimizer")
    all_in_order(calls, "_get_grad_norm", "_evaluate", "evaluate", "_save_checkpoint", "_get_output_dir", "save_model")
    for part in ("_save_optimizer_and_scheduler", "_save_rng_state"):
        all_in_order(calls, "_save_checkpoint", part)
    names = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert {"rng_state.pth", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= names, relied_on("rng_state*.pth")
    calls = train(2, resume=str(tmp_path / "checkpoint-1"))
    all_in_order(calls, "_load_from_checkpoint", "training_step")
    all_in_order(calls, "_prepare_for_training", "_load_optimizer_and_scheduler", "training_step")
    all_in_order(calls, "_load_rng_state", "training_step")


def test_one_gpu_of_several(tmp_path: Path) -> None:
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    assert hasattr(args, "_n_gpu"), relied_on("_n_gpu")
    args._n_gpu = 7
    assert args.n_gpu == 7, relied_on("_n_gpu")


def test_a_quantized_model_with_an_adapter(make_model: Any, tmp_path: Path) -> None:
    """The flag by which the Trainer tells it from one without, and that nothing else of it is asked."""

    class Trainable:
        is_trainable = True

    model = make_model("llama")
    model.is_quantized, model.hf_quantizer = True, Trainable()
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model, args)
    model._hf_peft_config_loaded = True
    transformers.Trainer(model, args)


# -- transformers' models ---------------------------------------------------------------------------------------------


def test_the_models_attention(make_model: Any) -> None:
    """Its name, which the config keeps, and the plain function that stands in the module of each architecture."""
    model = make_model("llama")
    assert model.config._attn_implementation == "sdpa", relied_on("_attn_implementation")
    assert model._can_set_attn_implementation() is True, relied_on("_can_set_attn_implementation")
    attention = model.model.layers[0].self_attn
    plain = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
    assert plain is not None, relied_on("eager_attention_forward")
    assert parameters(plain)[:5] == ["module", "query", "key", "value", "attention_mask"], relied_on(
        "eager_attention_forward"
    )


def test_what_makes_masks_asks_by_these_names() -> None:
    """Both are looked up when they are called, so that they can be replaced; `test_masks.py` has what comes of it."""
    from transformers import masking_utils

    name = "warn_if_padding_and_no_attention_mask"
    assert parameters(getattr(transformers.PreTrainedModel, name)) == ["input_ids", "attention_mask"], relied_on(name)
    asked = "_preprocess_mask_arguments", "find_packed_sequence_indices"
    for name, user in (("find_packed_sequence_indices", asked[0]), ("is_tracing", asked[1])):
        names = getattr(masking_utils, user).__code__.co_names
        assert hasattr(masking_utils, name) and name in names, f"{user} of masking_utils: {relied_on(name)}"
    own = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    assert own["sdpa"] is masking_utils.sdpa_mask and own._local_mapping == {}, relied_on("_local_mapping")


def test_which_models_there_are() -> None:
    known = transformers.AutoModelForCausalLM._model_mapping
    assert transformers.LlamaConfig in known and transformers.T5Config not in known, relied_on("_model_mapping")


def test_what_stays_in_fp32(tmp_path: Path, make_model: Any) -> None:
    model = make_model("llama")
    for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        assert not getattr(model, name, ["gone"]), relied_on(name)
    model.save_pretrained(tmp_path)
    strict = type("Strict", (transformers.LlamaForCausalLM,), {"_keep_in_fp32_modules_strict": ["input_layernorm"]})
    loaded = strict.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.model.layers[0].input_layernorm.weight.dtype == torch.float32, relied_on(
        "_keep_in_fp32_modules_strict"
    )
    assert "input_layernorm" in loaded._keep_in_fp32_modules_strict, relied_on("_keep_in_fp32_modules_strict")


def test_which_weights_are_tied(make_model: Any) -> None:
    model = make_model("gpt2")
    assert set(model._tied_weights_keys) == {"lm_head.weight"}, relied_on("_tied_weights_keys")
    pairs = {"lm_head.weight": "transformer.wte.weight"}
    assert model.all_tied_weights_keys == pairs, relied_on("all_tied_weights_keys")
    assert model.get_expanded_tied_weights_keys(all_submodels=True) == pairs, relied_on(
        "get_expanded_tied_weights_keys"
    )
    model.config.tie_word_embeddings = False
    assert not model.get_expanded_tied_weights_keys(all_submodels=True), relied_on("get_expanded_tied_weights_keys")


def test_a_model_asks_itself_for_its_state_when_it_is_saved(tmp_path: Path, make_model: Any) -> None:
    from safetensors.torch import load_file

    model = make_model("llama")
    content = {name: torch.full_like(value, 3.0) for name, value in model.state_dict().items()}
    model.state_dict = lambda *args, **options: content
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all((value == 3.0).all() for value in saved.values()), relied_on("model.state_dict")


def test_trainers_save_by_the_models_own_save_pretrained(make_model: Any, tmp_path: Path) -> None:
    """It is replaced on the model, and told by position what its third argument is not."""
    names = parameters(transformers.PreTrainedModel.save_pretrained)
    assert names[:2] == ["save_directory", "is_main_process"], relied_on("save_pretrained")
    assert "save_original_format" in names, relied_on("save_original_format")
    model, asked = make_model("llama"), []
    model.save_pretrained = lambda *args, **options: asked.append((args, options))
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    transformers.Trainer(model, arguments).save_model(str(tmp_path / "saved"))
    assert len(asked) == 1, relied_on("save_pretrained")


def test_linears_that_are_told_by_their_names() -> None:
    from transformers.pytorch_utils import Conv1D

    linear = Conv1D(4, 8)
    assert linear.nf == 4 and linear.weight.shape == (8, 4), relied_on("nf")
    from transformers.models.falcon.modeling_falcon import FalconLinear

    falcon = FalconLinear(8, 4)
    x = torch.randn(3, 8)
    torch.testing.assert_close(falcon(x), F.linear(x, falcon.weight, falcon.bias))


def test_the_hooks_on_the_embeddings(make_model: Any) -> None:
    model = make_model("llama")
    model.enable_input_require_grads()
    assert isinstance(vars(model).get("_require_grads_hooks"), list), relied_on("_require_grads_hooks")
    assert "_require_grads_hook" in vars(model), relied_on("_require_grads_hook")


def test_a_model_is_loaded_under_deepspeeds_init(tmp_path: Path, make_model: Any, monkeypatch: Any) -> None:
    """transformers looks `deepspeed.zero.Init` up when it loads a model, and gives it nothing but its configuration."""
    deepspeed = pytest.importorskip("deepspeed")
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    usual = deepspeed.zero.Init
    assert {"config_dict_or_path", "tensor_overrides"} <= set(parameters(usual.__init__)), relied_on("tensor_overrides")
    asked: list[dict[str, Any]] = []

    def init(**options: Any) -> contextlib.AbstractContextManager[None]:
        asked.append(options)
        return contextlib.nullcontext()

    make_model("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(deepspeed.zero, "Init", init)
    alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        with contextlib.suppress(Exception):  # it expects parameters in shards afterwards
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        del alive
        unset_hf_deepspeed_config()
    assert asked and set(asked[0]) == {"config_dict_or_path"}, relied_on("deepspeed.zero.Init")


def test_files_that_are_not_there_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `cached_files` does not know by name it takes and drops, and then raises."""
    from transformers.utils.hub import cached_file, cached_files

    for name in ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"):
        assert name in parameters(cached_files), relied_on(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    assert cached_file("nobody/nothing", "model.safetensors", **missing) is None
    with pytest.raises(OSError, match="connect"):
        cached_file("nobody/nothing", "model.safetensors")


# -- transformers' experts --------------------------------------------------------------------------------------------


class Products(TorchFunctionMode):
    """Notes the functions that a 3-D parameter, or a view of one, is given to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.seen.append((getattr(func, "__name__", ""), func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", list(MODELS))
def test_how_experts_compute(kind: str) -> None:
    model = build(kind)
    experts = model.model.layers[0].mlp.experts
    assert experts.config is model.config, relied_on("_experts_implementation")
    assert experts.config._experts_implementation == "grouped_mm", relied_on("_experts_implementation")
    assert experts.is_transposed is False and experts.has_bias is False, relied_on("is_transposed")
    assert {name: p.dim() for name, p in experts._parameters.items()} == {"gate_up_proj": 3, "down_proj": 3}
    with Products() as grouped, torch.no_grad():
        model(**batch())
    own = copy.copy(experts.config)
    own._experts_implementation = "eager"
    assert own._experts_implementation == "eager", relied_on("_experts_implementation")
    assert experts.config._experts_implementation == "grouped_mm", relied_on("_experts_implementation")
    experts.config = own  # of this module alone
    with Products() as single, torch.no_grad():
        model(**batch())
    names = [name for name, *_ in grouped.seen]
    used = [name for name in names if name in ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")]
    slices = {experts.down_proj[number].data_ptr() for number in range(4)}
    loops = [args for name, func, args, _ in single.seen if func is F.linear and args[1].data_ptr() in slices]
    assert used or "linear" in names, relied_on("grouped_mm")
    assert loops, relied_on("_experts_implementation")


def test_a_stack_is_asked_as_a_parameter_is() -> None:
    """The same in one product and one after another, with an `ExpertStack` in the parameter's place."""
    from sparseft.layers.experts import close_experts, open_expert
    from sparseft.models.decoder import find_expert

    model = build("mixtral")
    with torch.no_grad():
        expected = model(**batch()).logits
        expert = find_expert(model, "model.layers.0.mlp.experts.down_proj.1")
        assert expert is not None
        layer = open_expert(expert)
        called = []
        layer.register_forward_hook(lambda *_: called.append(True))
        torch.testing.assert_close(model(**batch()).logits, expected)
        close_experts(model)
    assert called, relied_on("grouped_mm_fallback")


# What transformers' modules that ask late (cli/libraries.py) know before and after a package is loaded.
LATE = """
import json, sys
from sparseft.cli.libraries import QUESTIONS, load
load("transformers.trainer")
import transformers
from transformers import trainer, trainer_utils, utils
from transformers.loss import loss_for_object_detection as losses

packages = ("peft", "datasets", "pandas", "scipy")
facts = {"asked": sorted({question.function for question in QUESTIONS if hasattr(utils, question.function)})}
facts["loaded by it"] = [name for name in packages if name in sys.modules]
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
facts["before"] = trainer_utils._is_peft_model(model)
facts["others"] = [utils.is_peft_available(), utils.is_datasets_available(), utils.is_scipy_available()]
facts["still not loaded"] = [name for name in packages if name in sys.modules]

import torch
costs = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
facts["matched"] = [[int(i) for i in found] for found in losses.linear_sum_assignment(costs)]
import datasets, peft
wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
facts["after"] = [trainer_utils._is_peft_model(wrapped), trainer_utils._is_peft_model(model.get_input_embeddings())]
rows = datasets.Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]], "unused": [0]})
at = transformers.Trainer(wrapped, transformers.TrainingArguments(report_to="none", use_cpu=True), train_dataset=rows)
facts["columns"] = at.get_train_dataloader().dataset.column_names
print(json.dumps(facts))
"""


def test_transformers_asks_for_packages_when_it_needs_them() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}\n{relied_on('asking_late')}"
    facts = json.loads(done.stdout.splitlines()[-1])
    asked = ["is_datasets_available", "is_peft_available", "is_scipy_available"]
    assert facts["asked"] == asked, relied_on("is_peft_available")
    if Version(transformers.__version__) >= Version("5.23"):  # before, it imports scikit-learn, which takes others
        assert facts["loaded by it"] == [] and facts["still not loaded"] == [], relied_on("asking_late")
    assert not {"peft", "datasets"} & set(facts["still not loaded"]), relied_on("asking_late")
    assert not facts["before"] and facts["others"] == [True, True, True], relied_on("is_peft_available")
    assert facts["matched"] == [[0, 1], [1, 0]], relied_on("linear_sum_assignment")
    assert facts["after"] == [True, False], relied_on("is_peft_available")
    assert facts["columns"] == ["input_ids", "labels"], relied_on("is_datasets_available")


# -- DeepSpeed and accelerate -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process of its own has seen of DeepSpeed and accelerate."""
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("zero") / "facts.json"
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "zero_facts.py"), str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"DeepSpeed or accelerate lacks what sparseft/distributed relies on:\n{done.stderr}"
    return json.loads(out.read_text())


def test_accelerate_forgets_its_state(zero: dict[str, Any]) -> None:
    assert zero["accelerate"] == {"known": [True, True], "after": [False, False]}, relied_on("_reset_state")


def test_accelerate_asks_before_it_loads_deepspeed(zero: dict[str, Any]) -> None:
    assert zero["plain"] == {"False": False, "True": True}, relied_on("is_deepspeed_available")
    assert zero["step"]["unwrapped"], relied_on("import_only_to_train")


def test_collectives_in_shared_memory_can_be_turned_off(zero: dict[str, Any]) -> None:
    assert zero["shared memory"]["name"] == "deepspeed_shm_comm", relied_on("deepspeed_shm_comm")
    assert zero["shared memory"]["built"] == {"True": True, "False": False}, relied_on("__compatible_ops__")


def test_what_is_set_in_the_configuration_reaches_deepspeed(zero: dict[str, Any]) -> None:
    assert zero["configuration"] == {"bucket": 123, "same": True}, relied_on("hf_deepspeed_config")


def test_tensors_keep_their_dtypes_in_shards(zero: dict[str, Any]) -> None:
    assert zero["shards"]["table"] == "torch.float32", relied_on("DeepSpeedTensorOverride")


@pytest.mark.parametrize(
    ("fact", "name", "expected"),
    [
        ("id", "ds_id", True),
        ("told apart", "ds_id", False),
        ("shape", "ds_shape", [4, 8]),
        ("outside", "ds_status", ["NOT_AVAILABLE", 0]),
        ("inside", "ds_status", ["AVAILABLE", 32]),
        ("shard", "ds_numel", [32, 32]),
        ("shard", "ds_tensor", [32, 32]),
        ("running before", "ds_inflight_param_registry", False),
        ("running", "ds_inflight_param_registry", True),
    ],
)
def test_what_a_parameter_in_shards_says(zero: dict[str, Any], fact: str, name: str, expected: Any) -> None:
    assert zero["shards"][fact] == expected, relied_on(name)


def test_deepspeed_leaves_a_bad_step_out(zero: dict[str, Any]) -> None:
    step = zero["step"]
    assert (step["there"], step["finite"], step["infinite"]) == (True, True, False), relied_on("check_grad_overflow")


def test_deepspeed_knows_the_moments_of_a_parameter(zero: dict[str, Any]) -> None:
    assert zero["step"]["moments"] == ["exp_avg", "exp_avg_sq"], relied_on("_hp_mapping")


def test_accelerates_hooks_on_a_module() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    linear = nn.Linear(2, 2)
    add_hook_to_module(linear, ModelHook())
    assert "forward" in vars(linear) and hasattr(linear, "_hf_hook"), relied_on("_hf_hook")


def test_the_order_of_accelerates_sampler() -> None:
    from accelerate.data_loader import SeedableRandomSampler

    def order(epoch: int) -> list[int]:
        sampler = SeedableRandomSampler(range(50), data_seed=3)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0) == order(0) != order(1) and sorted(order(1)) == list(range(50)), relied_on("SeedableRandomSampler")


# -- FSDP2: its mechanism is held against one process in tests/processes ----------------------------------------------


def test_accelerate_prepares_models_by_the_method_that_is_replaced() -> None:
    """That it then wraps none is seen in several processes (tests/processes/test_distributed.py)."""
    from accelerate import Accelerator

    own = parameters(Accelerator.prepare_model)
    assert own == ["model", "device_placement", "evaluation_mode"], relied_on("evaluation_mode")
    assert "self.prepare_model(" in inspect.getsource(Accelerator._prepare_one), relied_on("prepare_model")


def test_transformers_asks_whether_a_model_is_in_shards() -> None:
    from transformers.integrations import is_fsdp_managed_module

    model = nn.Linear(2, 2)
    assert not is_fsdp_managed_module(model)
    model._is_fsdp_managed_module = True  # type: ignore[assignment]
    assert is_fsdp_managed_module(model), relied_on("_is_fsdp_managed_module")


def test_transformers_leaves_reading_to_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import is_fsdp_enabled

    from sparseft.distributed.fsdp import read_by_first

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert not is_fsdp_enabled()
    with read_by_first():
        assert is_fsdp_enabled(), relied_on("FSDP_CPU_RAM_EFFICIENT_LOADING")
    assert not is_fsdp_enabled()


def test_peft_gathers_where_it_takes_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    from sparseft.distributed import shards
    from sparseft.methods.lora import whole_where_read

    asked: list[Any] = []
    gathered = shards.gathered
    monkeypatch.setattr(shards, "gathered", lambda parameters: asked.append(parameters) or gathered(parameters))
    model = nn.Sequential(nn.Linear(4, 4))
    with whole_where_read():
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], use_dora=True))
    assert len(asked) == 1, relied_on("gather_params_ctx")


def test_files_are_read_without_running_what_they_hold(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from sparseft.distributed.deepspeed import weights_only

    torch.save({"a": Path("x")}, tmp_path / "file.pt")
    assert torch.load(tmp_path / "file.pt", weights_only=False) == {"a": Path("x")}
    with weights_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file.pt", weights_only=False)
        pytest.fail(relied_on("TORCH_FORCE_WEIGHTS_ONLY_LOAD"))


@pytest.mark.parametrize(
    ("module", "logger", "sentence"),
    [
        ("accelerate.accelerator", "accelerate.accelerator", "Gradient accumulation steps mismatch"),
        ("transformers.optimization", None, "Both num_training_steps and num_stable_steps"),
    ],
)
def test_sentences_that_are_silenced_are_still_said(module: str, logger: str | None, sentence: str) -> None:
    source = Path(inspect.getfile(__import__(module, fromlist=["_"]))).read_text()
    assert sentence in source, relied_on(sentence)
    assert logger is None or logger in logging.root.manager.loggerDict, relied_on(logger or "")


# -- peft -------------------------------------------------------------------------------------------------------------


def lora(**options: Any) -> Any:
    import peft

    return peft.LoraConfig(task_type=peft.TaskType.CAUSAL_LM, r=2, **options)


def test_peft_asks_for_the_conversion_of_names(make_model: Any, monkeypatch: Any) -> None:
    """By the module's attribute, with the config, the model and its conversions, before it looks for the targets."""
    import peft
    from peft.utils import transformers_weight_conversion as conversion

    name = "convert_peft_config_for_transformers"
    assert parameters(getattr(conversion, name, lambda: None))[:2] == ["peft_config", "model"], relied_on(name)
    given = []

    def convert(config: Any, model: nn.Module, conversions: Any) -> None:
        given.append(model)
        config.target_modules = {"down_proj"}

    monkeypatch.setattr(conversion, name, convert)
    model = make_model("llama")
    wrapped = peft.get_peft_model(model, lora(target_modules=["up_proj"]))
    kinds = [n for n, m in wrapped.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert given and given[0] is model and kinds and all(n.endswith("down_proj") for n in kinds), relied_on(name)


def test_peft_asks_for_the_conversion_of_tensors(make_model: Any, monkeypatch: Any) -> None:
    """By the module's attribute, with the tensors by name, and takes what it gets."""
    import peft
    from peft.utils import transformers_weight_conversion as conversion

    name = "convert_peft_adapter_state_dict_for_transformers"
    assert "adapter_state_dict" in parameters(getattr(conversion, name, lambda: None)), relied_on(name)
    monkeypatch.setattr(conversion, name, lambda adapter_state_dict, **_: {"other": adapter_state_dict["given"]})
    wrapped = peft.get_peft_model(make_model("llama"), lora(target_modules=["up_proj"]))
    result = peft.set_peft_model_state_dict(wrapped, {"given": torch.zeros(1)})
    assert result.unexpected_keys == ["other"], relied_on(name)


def test_the_inside_of_pefts_layers(make_model: Any) -> None:
    import peft
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper

    config = lora(target_modules=["up_proj"], modules_to_save=["lm_head"], trainable_token_indices=[3, 5])
    model = peft.get_peft_model(make_model("llama"), config, adapter_name="a")
    base = model.get_base_model()
    names = dict(model.named_parameters())
    assert "base_model.model.lm_head.original_module.weight" in names, relied_on("original_module")
    layer = base.model.layers[0].mlp.up_proj
    assert isinstance(layer, LoraLayer) and isinstance(layer, BaseTunerLayer), relied_on("LoraLayer")
    assert layer.r["a"] == 2 and layer.scaling["a"] == 8 / 2, relied_on("scaling")
    assert layer.lora_A["a"].weight.shape[0] == layer.lora_B["a"].weight.shape[1] == 2, relied_on("lora_A")
    assert "a" not in layer.lora_embedding_A and layer.lora_bias == {"a": False}, relied_on("lora_bias")
    assert type(layer.base_layer) is nn.Linear and layer.get_base_layer() is layer.base_layer, relied_on("base_layer")
    head = base.lm_head
    assert isinstance(head, ModulesToSaveWrapper) and isinstance(head, AuxiliaryTrainingWrapper)
    assert type(head.original_module) is nn.Linear and list(head.modules_to_save) == ["a"], relied_on("modules_to_save")
    table = base.model.embed_tokens
    assert isinstance(table, TrainableTokensWrapper), relied_on("TrainableTokensWrapper")
    tokens = table.token_adapter
    assert list(tokens.trainable_tokens_delta) == ["a"], relied_on("trainable_tokens_delta")
    assert isinstance(tokens.base_layer, nn.Embedding), relied_on("token_adapter")
    assert "peft_config" in vars(base), relied_on("peft_config")
    x, seen = torch.randn(3, layer.in_features), layer.base_layer.weight.detach().clone()
    nn.init.ones_(layer.lora_B["a"].weight)
    layer.scaling["a"] = 0.5  # what a layer computes with
    product = x @ layer.lora_A["a"].weight.T @ layer.lora_B["a"].weight.T
    torch.testing.assert_close(layer(x), x @ seen.T + 0.5 * product, atol=1e-4, rtol=1e-4)
    layer.merge(adapter_names=["a"])
    torch.testing.assert_close(x @ layer.base_layer.weight.T, x @ seen.T + 0.5 * product, atol=1e-4, rtol=1e-4)


def test_pefts_layers_around_parameters_come_off() -> None:
    import peft

    model = build("mixtral")
    config = lora(target_modules=[], target_parameters=["mlp.experts.down_proj"])
    wrapped = peft.get_peft_model(model, config, adapter_name="a")
    name = "unload_and_optionally_merge_module"
    layers = [module for module in wrapped.modules() if hasattr(module, name)]
    assert layers and parameters(getattr(layers[0], name)) == ["merge", "safe_merge", "adapter_names"], relied_on(name)
    inner = getattr(layers[0], name)(merge=False, safe_merge=False, adapter_names=None)
    assert isinstance(inner.down_proj, nn.Parameter), relied_on(name)


def test_what_a_lora_is_described_by() -> None:
    import peft

    settings = peft.LoraConfig().to_dict()
    for name in ("rank_pattern", "alpha_pattern", "lora_bias", "target_parameters", "use_rslora", "use_dora", "bias"):
        assert name in settings, relied_on(name)
    assert settings["bias"] == "none" and settings["rank_pattern"] == {}, relied_on("rank_pattern")


# -- lm-eval ----------------------------------------------------------------------------------------------------------


def test_lm_evals_bars_can_be_replaced() -> None:
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    from tqdm import tqdm

    for module in (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface):
        assert getattr(module, "tqdm", None) is tqdm, f"{module.__name__}: {relied_on('tqdm')}"
        assert re.search(r"(?<![\w.])tqdm\(", inspect.getsource(module)), f"{module.__name__}: {relied_on('tqdm')}"


def test_lm_evals_model_has_the_methods() -> None:
    from lm_eval.models.huggingface import HFLM

    for name, wanted in {
        "_loglikelihood_tokens": ["requests", "disable_tqdm"],
        "_model_generate": ["context", "max_length", "stop"],
        "generate_until": ["requests", "disable_tqdm"],
    }.items():
        own = getattr(HFLM, name, None)
        assert own is not None and parameters(own)[: len(wanted)] == wanted, relied_on(name)
        calls = [n for n, f in inspect.getmembers(HFLM, inspect.isfunction) if f"self.{name}(" in inspect.getsource(f)]
        assert calls or name == "generate_until", f"{name} is called no more: {relied_on(name)}"
    assert "self.batch_size_per_gpu" in inspect.getsource(HFLM.batch_size.fget), relied_on("batch_size_per_gpu")


def test_lm_evals_lengths(make_model: Any, tokenizer: Any) -> None:
    from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length

    config = make_model("llama").config
    assert resolve_max_length(config, tokenizer) == config.max_position_embeddings, relied_on("resolve_max_length")
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert normalize_gen_kwargs({name: 7}, 99)["max_gen_toks"] == 7, f"{name}: {relied_on('normalize_gen_kwargs')}"
    assert normalize_gen_kwargs({}, 99)["max_gen_toks"] == 99, relied_on("normalize_gen_kwargs")


def test_lm_evals_groups_weigh_their_members() -> None:
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig

    assert {"name", "aggregate_metric_list", "metadata"} <= set(parameters(Group)), relied_on("aggregate_metric_list")
    assert {"metric", "weight_by_size"} <= set(parameters(AggMetricConfig)), relied_on("AggMetricConfig")
    metric = AggMetricConfig(metric="acc", weight_by_size=False)
    assert Group("g", aggregate_metric_list=[metric], metadata={"version": "1.0"}).aggregate_metric_list == [metric]
    assert callable(getattr(Group, "add", None)), relied_on("group.add")


def test_lm_evals_evaluation_takes_tasks_and_groups() -> None:
    from lm_eval.evaluator import evaluate

    assert {"lm", "task_dict", "limit", "bootstrap_iters", "log_samples"} <= set(parameters(evaluate)), relied_on(
        "task_dict"
    )


@pytest.mark.parametrize("name", ["UNSAFE_CODE", "MULTIMODAL"])
def test_lm_evals_marks_of_tasks_that_are_refused(name: str) -> None:
    """lm-eval's own evaluation goes by them."""
    import lm_eval.api.task
    import lm_eval.evaluator

    assert f"self.{name} = True" in inspect.getsource(lm_eval.api.task), relied_on(name)
    assert f'getattr(task, "{name}"' in inspect.getsource(lm_eval.evaluator), relied_on(name)


def test_lm_evals_index_of_tasks(tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    for name in ("one", "other"):
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\ntag: both\ndataset_path: json\n")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)  # its own take seconds to index
    assert {"one", "other", "both"} <= set(manager.task_index), relied_on("task_index")
    assert set(manager.all_tags) == {"both"}, relied_on("all_tags")
    assert set(manager.task_index["both"].tags) == {"one", "other"}, relied_on("tags")
    assert parameters(manager.load), relied_on("task_manager().load")


def test_lm_evals_requests() -> None:
    from lm_eval.api.instance import Instance

    request = Instance("generate_until", {}, ("prompt", {"until": []}), 0)
    request.arguments = ("other", {})
    assert request.args == ("other", {}), relied_on("arguments")


# -- torch ------------------------------------------------------------------------------------------------------------


def test_tensors_count_their_changes() -> None:
    tensor = torch.zeros(3)
    before = tensor._version
    tensor.add_(1)
    tensor[:1].zero_()
    assert tensor._version == before + 2, relied_on("_version")
    with torch.inference_mode():
        with pytest.raises(RuntimeError):
            _ = torch.zeros(3)._version
            pytest.fail(f"inference tensors count too: {relied_on('_version')}")


def test_which_nodes_a_backward_pass_comes_to() -> None:
    """A node that is given no gradient is called all the same, and those above it can ask whether it will be."""
    seen: list[Any] = []

    class Below(torch.autograd.Function):
        @staticmethod
        def forward(ctx, delta):
            ctx.set_materialize_grads(False)
            return delta.new_empty(0)

        @staticmethod
        def backward(ctx, nothing):
            seen.append((nothing, torch._C._current_graph_task_id()))
            return torch.ones(2)

    class Above(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, token):
            ctx.node = token.grad_fn
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append((torch._C._will_engine_execute_node(ctx.node), torch._C._current_graph_task_id()))
            return grad, None

    x, delta = torch.zeros(3, requires_grad=True), torch.zeros(2, requires_grad=True)
    loss = Above.apply(x, Below.apply(delta)).sum()
    torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward()
    (first, one), (second, other), (nothing, same) = seen
    assert (first, second, nothing) == (False, True, None), relied_on("_will_engine_execute_node")
    assert one != other == same >= 0, relied_on("_current_graph_task_id")
    assert delta.grad.tolist() == [1, 1], relied_on("set_materialize_grads")


def test_functorch_is_refused_below_its_own_check() -> None:
    """`applied` leaves out what `Function.apply` does ahead of torch's own."""
    from sparseft.errors import UserError
    from sparseft.layers import S2RowLinear

    layer, x = S2RowLinear(4, 3, columns=[1]), torch.randn(2, 4)
    with pytest.raises(UserError, match=r"torch\.func"):
        torch.func.grad(lambda x: layer(x).sum())(x)
        pytest.fail(f"a transform went through: {relied_on('_are_functorch_transforms_active')}")


def test_storages_on_the_meta_device_are_told_apart() -> None:
    one, other = torch.empty(3, device="meta"), torch.empty(3, device="meta")
    assert one.untyped_storage()._cdata != other.untyped_storage()._cdata, relied_on("_cdata")
    assert one.untyped_storage()._cdata == one[1:].untyped_storage()._cdata, relied_on("_cdata")


def test_the_device_of_several_processes_can_be_said(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert isinstance(arguments.__dict__["_setup_devices"], torch.device), relied_on("_setup_devices")
    arguments._setup_devices = torch.device("cpu", 0)
    assert arguments.device.index == 0, relied_on("_setup_devices")


def test_the_product_of_all_experts() -> None:
    assert torch.ops.aten._grouped_mm.default is not None, relied_on("_grouped_mm")
    x, weight = torch.randn(8, 16, dtype=torch.bfloat16), torch.randn(2, 16, 16, dtype=torch.bfloat16)
    offs = torch.tensor([3, 8], dtype=torch.int32)
    y = torch.ops.aten._grouped_mm.default(x, weight, offs)
    expected = torch.cat([x[:3].float() @ weight[0].float(), x[3:].float() @ weight[1].float()])
    torch.testing.assert_close(y.float(), expected, atol=0.1, rtol=0.05)


def test_convolutions_have_one_base() -> None:
    from torch.nn.modules.conv import _ConvNd

    assert all(issubclass(kind, _ConvNd) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)), relied_on("_ConvNd")


def test_what_a_module_calls_when_it_is_cast_saved_and_loaded() -> None:
    called = []

    class Watched(nn.Linear):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            called.append("_apply")
            return super()._apply(fn, recurse)

        def _save_to_state_dict(self, destination: Any, prefix: Any, keep_vars: Any) -> None:
            called.append("_save_to_state_dict")
            super()._save_to_state_dict(destination, prefix, keep_vars)

        def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
            called.append("_load_from_state_dict")
            super()._load_from_state_dict(state_dict, prefix, *args)

    module = nn.Sequential(Watched(2, 2))
    module.double()
    module.load_state_dict(module.state_dict())
    for name in ("_apply", "_save_to_state_dict", "_load_from_state_dict"):
        assert name in called, relied_on(name)


def test_hooks_of_a_module_can_be_told_and_taken_away() -> None:
    module = nn.Linear(2, 2)

    def hook(*_: Any) -> None:
        raise AssertionError

    module.register_forward_pre_hook(hook)
    module.register_load_state_dict_pre_hook(hook)
    for name in ("_forward_pre_hooks", "_load_state_dict_pre_hooks"):
        hooks = getattr(module, name)
        found = [key for key, value in hooks.items() if getattr(value, "hook", value) is hook]
        assert len(found) == 1, relied_on(name)
        del hooks[found[0]]
    module(torch.ones(2))
    module.load_state_dict(module.state_dict())


@pytest.mark.parametrize(
    ("register", "names"),
    [
        ("register_forward_hook", ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")),
        ("register_forward_pre_hook", ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")),
        ("register_full_backward_hook", ("_backward_hooks",)),
        ("register_full_backward_pre_hook", ("_backward_pre_hooks",)),
    ],
)
def test_a_modules_hooks_are_in_no_other_place(register: str, names: tuple[str, ...]) -> None:
    """A reference model has the model's attributes, but none of its hooks."""
    module = nn.Linear(2, 2)
    plain = {name for name, value in vars(module).items() if value and "hook" in name}
    options = {"with_kwargs": True} | ({"always_call": True} if "pre" not in register else {})
    getattr(module, register)(lambda *_: None, **(options if "forward" in register else {}))
    found = {name for name, value in vars(module).items() if value and "hook" in name} - plain
    assert found - {"_is_full_backward_hook"} == set(names), relied_on("_forward_hooks_with_kwargs")


def test_a_module_looks_where_experts_are_put_in_place() -> None:
    """Into its `__dict__` before its parameters, into `_modules` for names and state."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(2))
    child = nn.Linear(1, 1)
    module._modules["weight"] = child
    assert module.weight is module._parameters["weight"], relied_on("_modules")
    module.__dict__["weight"] = child
    assert module.weight is child, relied_on("__dict__")
    assert list(module.state_dict()) == ["weight", "weight.weight", "weight.bias"], relied_on("_modules")


def test_the_compilers_counters_and_settings() -> None:
    from torch._dynamo.exc import TorchDynamoException
    from torch._dynamo.utils import counters

    assert issubclass(TorchDynamoException, Exception), relied_on("TorchDynamoException")
    with torch._dynamo.config.patch(recompile_limit=3):
        assert torch._dynamo.config.recompile_limit == 3, relied_on("recompile_limit")
    torch._dynamo.reset()
    counters.clear()

    def broken(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    compiled = torch.compile(broken, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [4.0, 4.0]
    assert counters["stats"]["unique_graphs"] == 2, relied_on("unique_graphs")
    assert sum(counters["graph_break"].values()) == 1, relied_on("graph_break")
    torch._dynamo.reset()


def test_what_a_compiled_model_holds() -> None:
    inner = nn.Linear(2, 2)
    assert torch.compile(inner, backend="eager")._orig_mod is inner, relied_on("_orig_mod")
    assert inner._compiled_call_impl is None, relied_on("_compiled_call_impl")
    inner.compile(backend="eager")
    assert inner._compiled_call_impl is not None, relied_on("_compiled_call_impl")


def test_a_stream_can_be_kept_busy() -> None:
    assert callable(getattr(torch.cuda, "_sleep", None)), relied_on("torch.cuda._sleep")


def test_storages_are_seen_when_operations_make_them() -> None:
    from sparseft.memory import AllocationCounter

    with AllocationCounter() as counter:
        kept = torch.ones(1000) * 2
        del kept
    assert counter.peak >= 4000 and counter.live == 0, relied_on("TorchDispatchMode")


# -- the others -------------------------------------------------------------------------------------------------------


def test_hugging_face_data_sets_have_a_fingerprint() -> None:
    import datasets

    one, same = (datasets.Dataset.from_dict({"a": [1, 2]}) for _ in range(2))
    assert isinstance(one._fingerprint, str) and one._fingerprint, relied_on("_fingerprint")
    assert one.map(lambda row: {"b": row["a"]})._fingerprint != one._fingerprint, relied_on("_fingerprint")


def test_typers_errors_are_clicks() -> None:
    """Of the click that typer works with, its own copy or the package: what a wrong option raises."""
    import typer

    from sparseft.cli.app import ClickException

    app = typer.Typer()

    @app.command()
    def main(number: int) -> None:
        pass

    with pytest.raises(ClickException) as raised:
        typer.main.get_command(app).main(["x"], standalone_mode=False)
        pytest.fail(relied_on("ClickException"))
    assert raised.value.exit_code == 2, relied_on("ClickException")
    assert "'number'" in raised.value.format_message().lower(), relied_on("ClickException")


def test_hydras_state_can_be_put_back() -> None:
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert GlobalHydra.instance().hydra is None, relied_on("GlobalHydra")
    GlobalHydra.instance().hydra = None
    parsed = OverridesParser.create().parse_override("a=[1,x]")
    assert parsed.value() == [1, "x"], relied_on("OverridesParser")


def test_tritons_kernels_are_launched_by_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `kernel[grid](...)` comes down to, compiled and interpreted: `bench host` leaves it out."""
    triton = pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    seen: list[tuple[str, object, tuple[object, ...]]] = []
    for kind in (JITFunction, InterpretedFunction):
        run = lambda self, *args, grid, warmup, **kwargs: seen.append((type(self).__name__, grid, args))  # noqa: E731
        monkeypatch.setattr(kind, "run", run)

    def kernel(pointer):
        pass

    for made in (JITFunction(kernel), InterpretedFunction(kernel)):
        made[(3,)](7)
    expected = [("JITFunction", (3,), (7,)), ("InterpretedFunction", (3,), (7,))]
    assert seen == expected, relied_on("InterpretedFunction")
    assert isinstance(triton.jit(kernel), (JITFunction, InterpretedFunction)), relied_on("JITFunction")


def test_ligers_patch_of_one_model() -> None:
    liger = pytest.importorskip("liger_kernel.transformers")
    assert callable(liger._apply_liger_kernel_to_instance), relied_on("_apply_liger_kernel_to_instance")


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_fused_optimizers_skip_a_step_by_a_flag(kind: Any) -> None:
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = kind([parameter], lr=0.1, fused=True)
    assert getattr(optimizer, "_step_supports_amp_scaling", False), relied_on("_step_supports_amp_scaling")
    seen = []
    for bad in (0.0, 1.0, 0.0):
        parameter.grad = torch.full_like(parameter, float("nan") if bad else 1.0)
        optimizer.found_inf = torch.full((), bad)
        optimizer.step()
        state = optimizer.state[parameter]
        seen.append([value.clone() for value in (parameter.detach(), *state.values())])
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True)), relied_on("found_inf")
    assert not torch.equal(seen[1][0], seen[2][0]) and state["step"] == 2, relied_on("found_inf")


# -- how transformers turns a checkpoint's tensors into parameters ----------------------------------------------------


def test_conversions_of_a_checkpoint() -> None:
    """Names are asked one by one, converters are fed by hand, and the way back works without values."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key, revert_weight_conversion

    model = build("mixtral")
    known = dict(model.named_parameters())
    transforms = conversion_mapping.get_model_conversion_mapping(model)
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    renamings = [each for each in transforms if not isinstance(each, WeightConverter)]
    name = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
    assert target == "model.layers.0.mlp.experts.down_proj", relied_on("rename_source_key")
    assert pattern in {each for one in converters for each in one.source_patterns}, relied_on("rename_source_key")
    bare, _ = rename_source_key("norm.weight", renamings, converters, model.base_model_prefix, known)
    assert bare == "model.norm.weight", relied_on("rename_source_key")
    converter = copy.deepcopy(next(each for each in converters if pattern in each.source_patterns))
    for number in range(4):
        converter.add_tensor(target, name.replace(".2.", f".{number}."), pattern, torch.full((48, 80), number))
    made = converter.convert(target, model=model, config=model.config)
    assert list(made) == [target], relied_on("add_tensor")
    value = made[target][0] if isinstance(made[target], list) else made[target]
    assert value[:, 0, 0].tolist() == [0, 1, 2, 3], relied_on("add_tensor")
    saved = revert_weight_conversion(model, {name: p.to("meta") for name, p in known.items()})
    assert saved[name].shape == (48, 80), relied_on("revert_weight_conversion")
    assert saved[name].is_meta, relied_on("revert_weight_conversion")


# -- chat templates ---------------------------------------------------------------------------------------------------


def test_a_templates_date_is_that_of_a_module_level_clock(tokenizer: Any) -> None:
    """`data/templates.py` sets it."""
    from sparseft.data.templates import rendered

    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}"
    assert rendered(tokenizer, [], day="2020-02-29") == "2020-02-29", relied_on("strftime_now")
    assert rendered(tokenizer, []) == datetime.date.today().isoformat(), relied_on("strftime_now")


# -- trackers ----------------------------------------------------------------------------------------------------------


def test_the_trackers_callbacks_are_called_as_they_take_it() -> None:
    from transformers import integrations
    from transformers.integrations.integration_utils import rewrite_logs

    assert "tb_writer" in parameters(integrations.TensorBoardCallback.__init__), relied_on("TensorBoardCallback")
    for name in ("WandbCallback", "MLflowCallback"):
        callback = getattr(integrations, name)
        assert parameters(callback.on_train_begin)[:3] == ["args", "state", "control"], relied_on("WandbCallback")
        assert "logs" in parameters(callback.on_log), relied_on("MLflowCallback")
    assert rewrite_logs({"loss": 1, "eval_loss": 2}) == {"train/loss": 1, "eval/loss": 2}, relied_on("rewrite_logs")


def test_trackio_holds_its_folder_as_constants(tmp_path: Path) -> None:
    import trackio.media.media
    import trackio.sqlite_storage
    import trackio.utils

    from sparseft.training.trackers import keep_trackio_in

    before = trackio.utils.TRACKIO_DIR
    try:
        keep_trackio_in(tmp_path)
        assert trackio.sqlite_storage.TRACKIO_DIR == trackio.utils.TRACKIO_DIR == tmp_path, relied_on("TRACKIO_DIR")
        assert trackio.media.media.MEDIA_DIR == tmp_path / "media", relied_on("MEDIA_DIR")
    finally:
        keep_trackio_in(before)


def test_wandb_says_without_asking_whether_there_is_a_login() -> None:
    import wandb

    assert {"prompt", "verify"} <= set(parameters(wandb.login)), relied_on("wandb")


def test_autograds_nodes_say_what_they_follow_from() -> None:
    """`training/recomputing.py` reads names of nodes, what they saved, and the dtype and shape of their results."""
    x = torch.randn(2, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    gate, weight = x * 1.0, torch.ones(8)
    wide = gate.float()
    assert wide.grad_fn.name() == "ToCopyBackward0"
    before, number = wide.grad_fn.next_functions[0]
    assert before._input_metadata[number].dtype == torch.bfloat16
    scaled = wide * weight
    assert scaled.grad_fn.name() == "MulBackward0" and scaled.grad_fn.next_functions[1][0] is None
    assert torch.equal(scaled.grad_fn._saved_other, weight)
    assert torch.nn.functional.silu(gate).grad_fn.name() == "SiluBackward0"
    gelu = torch.nn.functional.gelu(gate, approximate="tanh").grad_fn
    assert gelu.name() == "GeluBackward0" and gelu._saved_approximate == "tanh"
    norm = torch.nn.functional.layer_norm(wide, (8,), weight).grad_fn
    assert norm.name() == "NativeLayerNormBackward0" and norm._saved_result2.shape == (2, 4, 1)
    product = torch.nn.functional.linear(wide, torch.randn(16, 8)).grad_fn
    assert product.name() == "UnsafeViewBackward0" and tuple(product._input_metadata[0].shape) == (2, 4, 16)
    product, _ = product.next_functions[0]
    assert product.name() == "MmBackward0" and product._saved_mat2.shape == (8, 16)
    leaf, _ = before.next_functions[0]
    assert leaf.name() == "torch::autograd::AccumulateGrad" and leaf.variable is x


def test_what_is_written_and_put_back_can_count_as_unchanged() -> None:
    """`adapters/reference_model.py` does so between a forward pass and its backward pass."""
    weight, x = torch.randn(3, 3), torch.randn(3, requires_grad=True)
    loss = (weight @ x).sum()
    with torch.autograd._unsafe_preserve_version_counter((weight,)):
        weight.add_(0)
    loss.backward()  # would raise
    assert weight._version == 0, relied_on("_unsafe_preserve_version_counter")


def test_a_model_without_its_loads_conversions_is_saved_by_its_architectures() -> None:
    """`models/quantized.keep_savable` takes away those of a packed checkpoint, which have no reverse."""
    from transformers.core_model_loading import revert_weight_conversion

    text = inspect.getsource(revert_weight_conversion)
    assert 'getattr(model, "_weight_conversions", None)' in text, relied_on("_weight_conversions")
    assert "get_model_conversion_mapping(model, add_legacy=False)" in text, relied_on("_weight_conversions")


def test_ddp_can_be_told_what_not_to_send() -> None:
    """`training/distributed_trainer.frozen_left_out` names the frozen weights, while DDP is made."""
    text = inspect.getsource(nn.parallel.DistributedDataParallel.__init__)
    told = relied_on("_set_params_and_buffers_to_ignore_for_model")
    assert "set(module._ddp_params_and_buffers_to_ignore)" in text, told
    model = nn.Linear(2, 2)
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["weight"])
    assert getattr(model, LEFT_OUT) == ["weight"]


# -- TRL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo", "simpo"])
def test_trls_trainers_have_what_a_run_takes_over(objective: str) -> None:
    """`training/preference/trainer.py` overrides and reads these; what they compute has tests of its own there."""
    pytest.importorskip("trl")
    from sparseft.training.preference.objectives import OBJECTIVES
    from sparseft.training.preference.trainer import PreferenceTrainer, trainer_class

    own = OBJECTIVES[objective].trainer()
    for name in ("create_model_card", "_send_telemetry", "log", "compute_loss"):
        assert name in vars(PreferenceTrainer) and hasattr(own, name), relied_on(name)
    order = trainer_class(objective).__mro__
    assert order.index(Trainer) < order.index(own) < order.index(transformers.Trainer)
    text = inspect.getsource(own)
    gathered = set(re.findall(r"accelerator\.(gather\w*|reduce|pad_across_processes)\(", inspect.getsource(own)))
    assert gathered == {"gather", "gather_for_metrics"} - ({"gather"} if objective != "dpo" else set()), relied_on(
        "each_for_itself"
    )
    if objective == "kto":
        assert parameters(own._compute_kl_logps) == ["model", "batch"], relied_on("_compute_kl_logps")
        assert "kl = (KL_logps - ref_KL_logps).mean().detach()" in text, relied_on("_compute_kl_logps")
    if OBJECTIVES[objective].reference:
        assert 'self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}' in text, relied_on("_metrics")
        assert 'if "ref" in ref_model_unwrapped.peft_config else None' in text, relied_on("delete_adapter")
    else:
        assert "self._stored_metrics[train_eval][key].append" in text, relied_on("_stored_metrics")
        assert parameters(own.get_batch_loss_metrics) == ["model", "batch", "train_eval"], relied_on("exact_logits")


def test_trl_packs_no_preferences() -> None:
    """So `dataset.packing` is refused (docs/preference.md): once this fails there is something to take up."""
    pytest.importorskip("trl")
    from sparseft.training.preference.objectives import OBJECTIVES

    for objective in OBJECTIVES.values():
        names = {field.name for field in dataclasses.fields(objective.configuration())}
        packs = {name for name in names if "packing" in name or "padding_free" in name}
        assert packs <= {"padding_free"}, relied_on("TRL's trainers pack none of these")
        text = inspect.getsource(objective.trainer())
        if packs:
            assert "temporarily unavailable after a refactor" in text, relied_on("TRL's trainers pack none of these")
            assert "self.padding_free = False" in text, relied_on("TRL's trainers pack none of these")


def test_trls_head_is_what_a_plan_counts() -> None:
    """`training/preference/planned.py` folds its tiles without torch, as a GPU's kernel does."""
    pytest.importorskip("trl")
    from trl.kernels import chunked_logprob
    from trl.trainer.dpo_trainer import DPOTrainer

    for name in ("_forward_tile", "_backward_tile"):
        text = inspect.getsource(chunked_logprob.ChunkedLogProbFunction)
        assert callable(getattr(chunked_logprob, name)) and f"else {name}" in text, relied_on(name)
    text = inspect.getsource(DPOTrainer.__init__)
    assert 'outputs = ("log_probs", "entropy", "mean_logits", "is_top1")' in text, relied_on("OUTPUTS")


def test_a_steps_batches_come_at_once_and_its_loss_is_their_mean() -> None:
    """Of which `PreferenceTrainer.get_batch_samples` makes the mean over all processes."""
    text = inspect.getsource(transformers.Trainer)
    assert "self.current_gradient_accumulation_steps = len(batch_samples)" in text, relied_on("get_batch_samples")
    assert "loss = loss / self.current_gradient_accumulation_steps" in text, relied_on("get_batch_samples")


def test_a_routers_term_is_added_whole_to_each_micro_steps_loss() -> None:
    """Where the loss on tokens is divided by the step's, over all processes: which `models/router_loss.py` mends."""
    for kind in ("mixtral", "qwen3_moe", "gpt_oss"):
        text = inspect.getsource(importlib.import_module(f"transformers.models.{kind}.modeling_{kind}"))
        assert "loss += self.router_aux_loss_coef * aux_loss" in text, relied_on("router_aux_loss_coef")
    text = inspect.getsource(transformers.Trainer)
    assert "if self.args.average_tokens_across_devices:" in text, relied_on("average_tokens_across_devices")


def test_trl_tokenises_by_map_and_filter_alone() -> None:
    """Which `training/preference/batches.Tokenised` leaves without effect."""
    pytest.importorskip("trl")
    from sparseft.training.preference.objectives import OBJECTIVES

    for objective in OBJECTIVES.values():
        own = objective.trainer()
        text = inspect.getsource(getattr(own, "_prepare_dataset", own.__init__))
        changes = set(re.findall(r"(?<!\w)(?:train_|eval_)?dataset = (?:train_|eval_)?dataset\.(\w+)", text))
        assert changes and changes <= {"map", "filter"}, relied_on("Tokenised")

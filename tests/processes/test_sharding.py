"""A model loaded in shards is the one loaded whole, in every weight, and no process holds more than its part."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations import deepspeed

from sparseft.config import ModelConfig
from sparseft.errors import UserError
from sparseft.models.loading import check_precision
from support.places import SUPPORT
from support.ranks import METHODS, Runs, run_ranks, trained
from support.running import sparseft

WORKER = SUPPORT / "sharding_worker.py"
# Whether transformers fills a layer's experts before it puts the next layer's together. 5.17 puts all of them together
# first, in every process, on the host.
ONE_LAYER_AT_ONCE = inspect.isgeneratorfunction(deepspeed._apply_weight_conversions_to_state_dict)


def experts_folder(folder: Path, tokenizer: Any) -> Path:
    """A tiny Mixtral, whose files hold each expert for itself and whose model keeps them as 3-D parameters."""
    config = transformers.MixtralConfig(
        vocab_size=len(tokenizer) + 8, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=96,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def altered(source: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    """A copy of a model's folder with its tensors changed."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def model(folder: Path, dtype: str, *importances: str) -> dict[str, Any]:
    return {"path": str(folder), "dtype": dtype, "importances": importances}


LOST = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path], tokenizer: Any) -> Path:
    """The folder of what the two processes found by ZeRO-3 and by FSDP2."""
    folder = tmp_path_factory.mktemp("sharding")
    llama = model_folder()
    job = {
        "models": {
            "llama": model(llama, "float32", "random", "weight", "product", "gradient", "sylva"),
            "rounded": model(llama, "bfloat16", "weight"),
            "tied": model(model_folder("gpt2"), "auto", "fisher", "sylva"),
            "experts": model(experts_folder(folder / "mixtral", tokenizer), "auto"),
        },
        "broken": {
            "missing": altered(llama, folder / "missing", lambda tensors: tensors.pop(LOST)),
            "mismatched": altered(llama, folder / "mismatched", lambda t: t.update({LOST: t[LOST][:-1].clone()})),
        },
    }
    run_ranks(folder, job, worker=WORKER)
    return folder


@pytest.fixture(params=["zero", "fsdp"])
def found(request: Any, every: Path) -> list[dict[str, Any]]:
    """What each of two processes found."""
    return [json.loads((every / f"{request.param}-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["llama", "rounded", "tied", "experts"])
def test_what_is_loaded_in_shards_is_what_is_loaded_whole(found: list[dict[str, Any]], name: str) -> None:
    for each in found:
        different = [what for what, same in each[name]["same"].items() if not same]
        assert not different


@pytest.mark.parametrize("name", ["llama", "rounded", "tied", "experts"])
def test_each_process_holds_half_and_one_module(found: list[dict[str, Any]], name: str) -> None:
    for rank, each in enumerate(found):
        facts = each[name]
        print(f"{name}, process {rank}: { ({key: value for key, value in facts.items() if key != 'same'}) } bytes")
        spare = 0.03 * facts["whole"]  # shards filled up to equal lengths, buffers
        assert abs(facts["shards"] - facts["whole"] / 2) <= spare
        assert abs(facts["resident"] - facts["whole"] / 2) <= spare
        # One module is gathered while it is made, one while it is filled; and of experts, one layer's are put together.
        together = facts["largest"] if ONE_LAYER_AT_ONCE else max(facts["experts"], facts["largest"])
        # FSDP2's first process has read the whole checkpoint, on the host, before it shards it a group at a time; where
        # all experts are put together first, the others have too.
        reads = rank == 0 or (facts["experts"] and not ONE_LAYER_AT_ONCE)
        held = facts["whole"] / (1 if facts["fsdp"] and reads else 2)
        assert facts["peak"] <= held + facts["largest"] + together + spare


def test_weights_that_do_not_fit_are_refused(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert "does not fit its config.json: 1 weights are missing" in each["missing"] and LOST in each["missing"]
    assert found[1]["mismatched"] == found[0]["mismatched"]  # the second one reads no values: it is told
    assert "mismatch" in found[0]["mismatched"]


def test_a_model_that_keeps_a_part_in_fp32_is_refused() -> None:
    """In shards all weights are loaded in one dtype: with its gate in fp32 the model would be another."""

    class Gated(torch.nn.Module):
        _keep_in_fp32_modules_strict = {"gate"}

        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.gate, self.dtype = torch.nn.Linear(2, 2, dtype=dtype), dtype

    check_precision(ModelConfig(path="gated"), Gated(torch.float32))
    with pytest.raises(UserError, match=r"zero_stage=3: Gated keeps 'gate.weight' in float32.*zero_stage=2 or less"):
        check_precision(ModelConfig(path="gated"), Gated(torch.bfloat16))


# ---- runs ----


ENDED = ["s2ft", "lora", "full"]
SYLVA = [*METHODS["sylva"], "method.num_samples=5", "seed=3"]  # 3 samples for one process, 2 for the other


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path], tokenizer: Any) -> Runs:
    """Runs of a model in bf16, all by the same two processes: each, and again when it has ended."""
    runs = Runs(tmp_path_factory.mktemp("ended"), model_folder())
    experts = experts_folder(runs.folder / "mixtral", tokenizer)
    cases = []
    for method in ENDED:
        case = runs.case(method, 3, "model.dtype=bfloat16", "trainer.max_steps=2")
        again = {"name": f"{method}-again", "overrides": [*case["overrides"], "trainer.resume=auto"]}
        cases += [case, case | again]
    sharded = [*runs.base, *SYLVA, "hardware.num_processes=2", "hardware.zero_stage=3", "cache_dir=sharded"]
    cases.append({"name": "preprocess", "command": "preprocess", "overrides": sharded})
    overrides = [*runs.base, *METHODS["s2ft"], f"model.path={experts}", "hardware.zero_stage=3", "output_dir=experts"]
    cases.append({"name": "experts", "command": "train", "overrides": overrides, "refused": True})
    run_ranks(runs.folder, cases)
    return runs


@pytest.mark.parametrize("method", ENDED)
def test_a_run_that_has_ended_is_taken_up_from_its_checkpoint(runs: Runs, method: str) -> None:
    """There is no engine then: what was trained is put into the shards, and gathered from them, without it."""
    run = runs.folder / f"{method}-3"
    left, right = trained(run), trained(run / "checkpoints" / "checkpoint-2")
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    first, second = (
        json.loads((runs.folder / f"{name}.json").read_text()) for name in (f"{method}-3", f"{method}-again")
    )
    assert first["eval_loss_after"] == second["eval_loss_after"] != first["eval_loss_before"]


def test_a_model_in_shards_is_calibrated_as_a_whole_one_is(runs: Runs) -> None:
    words = [*runs.base, *SYLVA, "cache_dir=whole"]
    alone = Path(sparseft(runs.folder, "preprocess", *words, "--json").json["selection"])
    result = json.loads((runs.folder / "preprocess.json").read_text())
    sharded = Path(result["selection"])
    assert alone.name == sharded.name and not result["cached"]
    left, right = (load_file(runs.folder / path / "selection.safetensors") for path in (alone, sharded))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_experts_in_shards_are_refused_before_anything_is_chosen(runs: Runs) -> None:
    message = json.loads((runs.folder / "experts.json").read_text())["message"]
    assert message.startswith("hardware.zero_stage=3: experts kept as 3-D parameters")
    assert not (runs.folder / "experts").exists()
